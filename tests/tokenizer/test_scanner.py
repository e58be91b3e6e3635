"""Scanners: spans equal those of `regex`, and those of the reference that goes character by character, on every input."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import scanner_oracle as oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from scratchlm.tokenizer import scanner_reference as reference
from scratchlm.tokenizer import unicode_classes
from scratchlm.tokenizer.patterns import PATTERNS, WITH_SCANNER
from scratchlm.tokenizer.scanner import any_scanner, scanner_for

TEXT = {name: text for text, name in reversed(WITH_SCANNER.items())}
NAMES = list(TEXT)
REFERENCE = {
    "gpt2": (reference.match_gpt2, 0),
    "cl100k": (reference.match_cl100k, 3 + reference.TO_THE_END),
    "llama3": (reference.match_cl100k, 3),
    "qwen2": (reference.match_cl100k, 1),
    "o200k": (reference.match_o200k, 0),
}


def walk(name: str, text: bytes) -> list[tuple[int, int]]:
    """Spans by the reference, in plain Python."""
    match, option = REFERENCE[name]
    spans, at = [], 0
    while at < len(text):
        start, at = at, match(text, at, len(text), *unicode_classes.class_pages(), option)
        spans.append((start, at))
    return spans


def test_every_pattern_with_a_scanner_is_tested():
    assert set(PATTERNS) <= set(NAMES) == set(REFERENCE)


@given(text=oracle.texts)
@settings(deadline=None, max_examples=200)
def test_spans_equal_those_of_regex(text):
    for pattern in WITH_SCANNER:
        rows = oracle.scan_all(scanner_for(pattern), text, [(0, len(text), 5)])
        assert rows == [*oracle.expected(pattern, text), (-1, 5)], pattern


@given(text=oracle.texts)
@settings(deadline=None, max_examples=100)
def test_reference_equals_regex(text):
    for name in NAMES:
        assert walk(name, text) == oracle.expected(TEXT[name], text), name


@given(texts=st.lists(oracle.texts, max_size=6), capacity=st.integers(1, 70), behind=st.integers(0, 70))
@settings(deadline=None, max_examples=100)
def test_any_capacity_and_several_regions(texts, capacity, behind):
    data, regions = b"", []
    for index, text in enumerate(texts):
        data += b"x "  # what stands between regions belongs to none
        regions.append((len(data), len(data) + len(text), index - 1))
        data += text
    data += b"'" * behind
    for pattern in [*NAMES, r"\p{L}+|a*", r"(?<=a)b|\s+$|^\S"]:
        rows = []
        for index, text in enumerate(texts):
            start = regions[index][0]
            rows += [(start + a, start + b) for a, b in oracle.expected(TEXT.get(pattern, pattern), text)]
            rows.append((-1, index - 1))
        scan = any_scanner(TEXT.get(pattern, pattern))
        assert oracle.scan_all(scan, data, regions, capacity) == rows, pattern


@pytest.mark.parametrize("name", NAMES)
def test_block_boundaries(name):
    # Every piece at every place around the end of a block, of the buffer and of a region.
    scan = scanner_for(TEXT[name])
    for filler in ["a", "é ", "عر", "漢", " ", "1!", "A\n"]:
        for piece in [*oracle.PIECES, *oracle.NOT_UTF8]:
            middle = piece if isinstance(piece, bytes) else piece.encode()
            texts = [
                (filler * 64).encode()[:n] + middle + tail for n in range(60, 66) for tail in (b"", b"x", b" y")
            ]
            regions, data = [], b""
            for text in texts:
                regions.append((len(data), len(data) + len(text), 0))
                data += text
            want = [
                row
                for text, region in zip(texts, regions, strict=True)
                for row in [
                    *((region[0] + a, region[0] + b) for a, b in oracle.expected(TEXT[name], text)),
                    (-1, 0),
                ]
            ]
            assert oracle.scan_all(scan, data, regions) == want, (filler, piece)


def test_classes_are_those_of_the_installed_regex():
    ours, theirs = unicode_classes.code_point_classes(), unicode_classes.classes_of_regex()
    differ = np.flatnonzero(ours != theirs)
    assert not len(differ), (
        f"the installed regex has another Unicode version than {unicode_classes.UNICODE_VERSION}: {len(differ)} code points "
        "differ: " + " ".join(f"U+{point:04X}" for point in differ[:200])
    )


def test_letters_known_by_their_bytes():
    # What `common_letters` takes for granted.
    classes = unicode_classes.code_point_classes()
    upper, lower = (unicode_classes.LETTER | case for case in (unicode_classes.UPPER, unicode_classes.LOWER))
    for first, last, bits in [
        (0x5000, 0x9FFF, unicode_classes.LETTER),
        (0xB000, 0xCFFF, unicode_classes.LETTER),
        (0x400, 0x42F, upper),
        (0x430, 0x45F, lower),
        (0x620, 0x64A, unicode_classes.LETTER),
        (0x671, 0x6D3, unicode_classes.LETTER),
    ]:
        assert set(classes[first : last + 1].tolist()) == {bits}
    signs = {0x3040, *range(0x3097, 0x309D), 0x30A0, 0x30FB}
    assert {p for p in range(0x3040, 0x3100) if classes[p] != unicode_classes.LETTER} == signs


def test_pages_hold_every_code_point():
    pages, leaves = unicode_classes.class_pages()
    points = np.arange(unicode_classes.CODE_POINTS)
    assert np.array_equal(leaves[pages[points >> 6], points & 63], unicode_classes.code_point_classes())


def test_no_regions_and_empty_regions():
    scan = scanner_for("gpt2")
    assert oracle.scan_all(scan, b"abc", []) == []
    assert oracle.scan_all(scan, b"", [(0, 0, -1), (0, 0, 7)]) == [(-1, -1), (-1, 7)]


def test_scanners_are_found_by_name_and_by_text():
    assert scanner_for("gpt2") is scanner_for(PATTERNS["gpt2"]) is not None
    assert scanner_for(r"\w+") is None
    assert scanner_for(TEXT["qwen2"]).name == "qwen2"
    assert pickle.loads(pickle.dumps(scanner_for("gpt2"))).name == "gpt2"
    assert pickle.loads(pickle.dumps(any_scanner(r"\w+"))).name == r"\w+"


def test_regex_scanner_goes_on_without_searching_again():
    # 20,000 calls for one span each: searching from the beginning every time would take minutes.
    text = b"a b" * 20_000
    assert len(oracle.scan_all(any_scanner(r"\w"), text, [(0, len(text), -1)], 1)) == 60_001


def test_importing_loads_no_numba():
    code = "import sys, scratchlm.tokenizer.scanner as s; s.scanner_for('gpt2'); assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


READ_AT_THE_EDGE = """
import ctypes, mmap, sys
import numpy as np
from scratchlm.tokenizer.scanner import scanner_for

page = mmap.PAGESIZE
memory = mmap.mmap(-1, 3 * page)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
libc = ctypes.CDLL(None, use_errno=True)
for forbidden in (0, 2 * page):  # the pages on both sides of the middle one
    assert libc.mprotect(ctypes.c_void_p(address + forbidden), page, 0) == 0
middle = np.frombuffer(memory, np.uint8)[page : 2 * page]
for piece in ["word ", "漢", "\\U0001f600 ", "'s", "  \\n", "é!\\u0301"]:
    text = (piece.encode() * 300)[:300]
    for size in range(1, 300):
        for place in (0, page - size):
            data = middle[place : place + size]
            data[:] = np.frombuffer(text, np.uint8)[300 - size :]
            for name in sys.argv[1:]:
                cursor, spans = np.zeros(2, np.int64), np.zeros((400, 2), np.int64)
                assert scanner_for(name)(data, np.array([[0, size, -1]]), cursor, spans) > 1
print("done")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is protected by a call of Linux's C library")
def test_nothing_outside_the_buffer_is_read():
    # The pages around the text may not be read: doing so ends the process.
    done = subprocess.run(
        [sys.executable, "-c", READ_AT_THE_EDGE, *PATTERNS], capture_output=True, text=True, check=False
    )
    assert done.stdout == "done\n", done.stderr


CACHE_HITS = """
import sys
import numpy as np
from scratchlm.tokenizer.scanner import scanner_for

for name in sys.argv[1:]:
    scan, data = scanner_for(name), np.zeros(9, np.uint8)
    for data.flags.writeable in (True, False):  # one compiled version for both
        scan(data, np.array([[0, 9, -1]]), np.zeros(2, np.int64), np.zeros((9, 2), np.int64))
    stats = scan.compiled.stats
    scan._module.longer.address(at_once=True)
    longer = scan._module.longer._compiled.cache_hits
    print(name, sum(stats.cache_hits.values()), sum(stats.cache_misses.values()), longer)
"""


@pytest.mark.slow
def test_compiled_once_per_machine(tmp_path):
    command = [sys.executable, "-c", CACHE_HITS, *PATTERNS]
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    first, second = (
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    )
    assert first.split("\n") == [*(f"{name} 0 1 0" for name in PATTERNS), ""]
    assert second.split("\n") == [*(f"{name} 1 0 1" for name in PATTERNS), ""]


@pytest.mark.parametrize("patience", [1 << 40, 0], ids=["plain Python", "compiled"])
@pytest.mark.parametrize("name", sorted(set(WITH_SCANNER.values())))
def test_pre_tokens_longer_than_a_block(name, patience, monkeypatch):
    """What ends them is compiled when there is enough to do, and plain Python until then; neither is fooled by what lies far away."""
    pattern, scan = next((text, scanner_for(text)) for text, found in WITH_SCANNER.items() if found == name)
    assert scan is not None
    oracle.scan_all(scan, b"x", [(0, 1, -1)])  # loads it
    monkeypatch.setattr(scan._module.longer, "_compiled", None)
    monkeypatch.setattr(scan._module.longer, "_patience", patience)
    for size in (63, 64, 65, 66, 67, 68, 130, 500, 2047, 2048, 2049, 3000):
        runs = ["a", " ", "\n", "-", "é", "漢", "\u3000", "A", "1", "'", "\n ", "日A", "/"]
        tails = ["", "x", "\n", "\n x", "l", "'s", "日", " ", "\u0301", "\n/"]
        texts = [head + run * size + tail for head in ("", "\n", "日") for run in runs for tail in tails]
        data = "".join(texts[size % 7 :: 7]).encode()
        assert oracle.scan_all(scan, data, [(0, len(data), -1)])[:-1] == oracle.expected(pattern, data)
        for text in texts[size % 13 :: 13]:
            data = text.encode()
            assert oracle.scan_all(scan, data, [(0, len(data), -1)])[:-1] == oracle.expected(pattern, data)
