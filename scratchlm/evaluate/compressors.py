"""General compressors as yardsticks: how many bits per byte do gzip and xz need for the same held-out text?

A language model with an arithmetic coder *is* a compressor of its bits per byte (Delétang et al. 2023, "Language
Modeling Is Compression"), so the figures stand side by side. The comparison is fair to neither side: the model has seen
training text and its own size is not counted, while gzip and xz start from nothing but may learn from the whole
held-out text, not just from one window. It says where the ground floor is.
"""

from __future__ import annotations

import lzma
import math
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from pydantic import ConfigDict

from scratchlm.progress import progress
from scratchlm.section import Section

_BLOCK = 1 << 20  # small documents are joined to blocks of this many bytes: calls cost, blocks do not matter


class CompressorResult(Section):
    """What one compressor made of the text."""

    model_config = ConfigDict(ser_json_inf_nan="strings", allow_inf_nan=True)

    bytes: int
    """Size of the compressed file, header and checksum included."""
    bits_per_byte: float
    """8 · compressed bytes / text bytes; NaN for an empty text."""
    seconds: float
    """Time spent compressing, on one core."""


class _Compressor(Protocol):
    def compress(self, data: bytes, /) -> bytes: ...
    def flush(self) -> bytes: ...


def _gzip() -> _Compressor:
    # wbits 31: a gzip file (10 bytes of header without a name, 8 of trailer) around a 32 KiB window.
    return zlib.compressobj(level=9, wbits=31)


def _xz() -> _Compressor:
    # One block with a CRC64, as `xz -9e -T1` writes; the encoder may take up to 674 MiB, whatever the input.
    return lzma.LZMACompressor(lzma.FORMAT_XZ, preset=9 | lzma.PRESET_EXTREME)


COMPRESSORS: dict[str, Callable[[], _Compressor]] = {"gzip -9": _gzip, "xz -9e": _xz}
"""Name → a fresh streaming compressor."""


def _blocks(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Join small chunks and cut large ones, so that every block but the last has `_BLOCK` bytes."""
    buffer = bytearray()
    for chunk in chunks:
        view = memoryview(chunk)
        for start in range(0, len(view), _BLOCK):  # a huge document is never copied whole
            buffer += view[start : start + _BLOCK]
            if len(buffer) >= _BLOCK:
                yield bytes(buffer[:_BLOCK])
                del buffer[:_BLOCK]
    if buffer:
        yield bytes(buffer)


def compressed_sizes(
    chunks: Iterable[bytes],
    *,
    names: Iterable[str] = tuple(COMPRESSORS),
    total: int | None = None,
    show: bool = True,
) -> dict[str, CompressorResult]:
    """Compress the concatenation of `chunks` with each compressor, in one pass and bounded memory.

    Sizes are those of ``gzip -9n`` (to a few bytes in a thousand: GNU gzip and zlib cut their blocks differently) and of
    ``xz -9e -T1`` (exactly) reading the bytes from standard input.

    Args:
        chunks: the text's bytes in any pieces, e.g. one per document; walked through once.
        names: which of :data:`COMPRESSORS`.
        total: number of bytes, if known, for the progress bar.
        show: show the bar.

    Returns:
        name → size, bits per byte, seconds; in the order of `names`.
    """
    running = {name: COMPRESSORS[name]() for name in names}
    sizes = dict.fromkeys(running, 0)
    seconds = dict.fromkeys(running, 0.0)
    text_bytes = 0
    with progress(description="compress", total=total, bytes_=True, show=show) as bar:
        for block in _blocks(chunks):
            for name, compressor in running.items():
                start = time.perf_counter()
                sizes[name] += len(compressor.compress(block))
                seconds[name] += time.perf_counter() - start
            text_bytes += len(block)
            bar.update(len(block))
        for name, compressor in running.items():
            start = time.perf_counter()
            sizes[name] += len(compressor.flush())
            seconds[name] += time.perf_counter() - start
    return {
        name: CompressorResult(
            bytes=size, bits_per_byte=8 * size / text_bytes if text_bytes else math.nan, seconds=seconds[name]
        )
        for name, size in sizes.items()
    }
