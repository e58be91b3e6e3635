"""Compressors against the standard library's one-shot functions and the command line tools."""

from __future__ import annotations

import gzip
import itertools
import lzma
import math
import random
import shutil
import subprocess
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import scratchlm
from scratchlm.evaluate import compressors
from scratchlm.evaluate.compressors import COMPRESSORS, compressed_sizes


def source_text() -> list[bytes]:
    """Real text at hand: this package's own source, one document per file."""
    folder = Path(scratchlm.__file__).parent
    return [path.read_bytes() for path in sorted(folder.rglob("*.py"))]


def sizes(chunks: list[bytes]) -> dict[str, int]:
    return {name: result.bytes for name, result in compressed_sizes(chunks, show=False).items()}


def one_shot(data: bytes) -> dict[str, int]:
    return {
        "gzip -9": len(gzip.compress(data, 9)),
        "xz -9e": len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)),
    }


@pytest.mark.parametrize(
    "data", [b"", b"a", "é".encode() * 1000, bytes(range(256)) * 40], ids=["empty", "1", "é", "all"]
)
def test_equals_one_shot_compression(data: bytes) -> None:
    assert sizes([data]) == one_shot(data)


def test_equals_one_shot_compression_on_text() -> None:
    documents = source_text()
    assert sizes(documents) == one_shot(b"".join(documents))


@settings(deadline=None, max_examples=8)
@given(cuts=st.lists(st.integers(0, 60_000), max_size=6), block=st.integers(1, 4096))
def test_pieces_do_not_matter(cuts: list[int], block: int) -> None:
    text = random.Random(0).choices([b"the ", b"cat ", b"sat ", b"\n", b"on a mat "], k=15_000)
    data = b"".join(text)[:60_000]
    edges = [0, *sorted(cuts), len(data)]
    pieces = [data[a:b] for a, b in itertools.pairwise(edges)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compressors, "_BLOCK", block)
        assert b"".join(compressors._blocks(pieces)) == data
        assert sizes(pieces) == one_shot(data)


def command_line(*command: str, data: bytes) -> int:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    return len(subprocess.run(command, input=data, capture_output=True, check=True).stdout)


def test_xz_equals_the_command() -> None:
    # -T1: one thread and so one block without sizes in its header; with threads a file has some bytes more.
    documents = source_text()
    assert sizes(documents)["xz -9e"] == command_line("xz", "-9e", "-T1", "-c", data=b"".join(documents))


def test_gzip_is_within_half_a_percent_of_the_command() -> None:
    # -n: no file name in the header, so both headers have 10 bytes. The rest differs a little: GNU gzip has its own
    # deflate, which begins a new block after 32 Ki symbols, where zlib begins one after 16 Ki.
    documents = source_text()
    expected = command_line("gzip", "-9n", "-c", data=b"".join(documents))
    assert sizes(documents)["gzip -9"] == pytest.approx(expected, rel=0.005)


def test_bits_per_byte_and_seconds() -> None:
    data = b"abcd" * 5000
    results = compressed_sizes([data], show=False)
    assert list(results) == list(COMPRESSORS) == ["gzip -9", "xz -9e"]
    for result in results.values():
        assert result.bits_per_byte == 8 * result.bytes / len(data) and result.seconds > 0
    assert all(math.isnan(result.bits_per_byte) for result in compressed_sizes([], show=False).values())


def test_names_choose() -> None:
    assert list(compressed_sizes([b"x"], names=["gzip -9"], show=False)) == ["gzip -9"]


def test_text_is_streamed() -> None:
    # 64 MiB go through in pieces of 1 KiB and, as one document, in blocks: Python never holds more than a few of them.
    piece = b"0123456789abcdef" * 64
    tracemalloc.start()
    try:
        result = compressed_sizes((piece for _ in range(1 << 16)), names=["gzip -9"], show=False)["gzip -9"]
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert result.bits_per_byte < 0.1


def test_large_document_is_cut_without_a_copy() -> None:
    document = bytes(32 << 20)
    tracemalloc.start()
    try:
        assert sum(len(block) for block in compressors._blocks([document])) == len(document)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_progress_is_shown_on_request(capfd: pytest.CaptureFixture[str]) -> None:
    compressed_sizes([b"x" * 100], names=["gzip -9"], total=100, show=False)
    assert capfd.readouterr().err == ""
    compressed_sizes([b"x" * 100], names=["gzip -9"], total=100)
    assert "compress: 100%" in capfd.readouterr().err
