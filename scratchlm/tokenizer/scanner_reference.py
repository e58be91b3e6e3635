r"""Pre-tokenisation character by character: what a pattern matches at one place, as one would write it down.

The readable twin of the scanners that work on blocks of 64 bytes (``scanner_blocks.py``), and what these fall back on for a
pre-token longer than a block, for the last bytes of a text and for rare cases. Plain Python; Numba compiles the very same
functions. All take

    data: uint8, the whole buffer;  start, end: a place in it, and where the text ends;  pages, leaves: `class_pages()`

and return where the pre-token that begins at `start` ends. Nothing to the left of `start` is ever read.
"""

from __future__ import annotations

from typing import Any

from scratchlm.tokenizer.unicode_classes import LETTER, NUMBER, SPACE

_KIND = LETTER | NUMBER | SPACE
_BLANK, _APOSTROPHE = 0x20, 0x27


def character(data: Any, at: int, end: int, pages: Any, leaves: Any) -> tuple[int, int]:
    """Class bits and length in bytes of the character at `at`. A byte that is not UTF-8 is a character of no class."""
    first = int(data[at])
    if first < 0x80:
        return int(leaves[pages[first >> 6], first & 63]), 1
    if first < 0xE0:
        length, lowest, point = 2, 0x80, first & 0x1F
    elif first < 0xF0:
        length, lowest, point = 3, 0x800, first & 0x0F
    else:
        length, lowest, point = 4, 0x10000, first & 0x0F
    if first < 0xC2 or first > 0xF4 or at + length > end:
        return 0, 1
    for place in range(at + 1, at + length):
        byte = int(data[place])
        if byte & 0xC0 != 0x80:
            return 0, 1
        point = point << 6 | byte & 0x3F
    if point < lowest or point > 0x10FFFF or 0xD800 <= point < 0xE000:
        return 0, 1
    return int(leaves[pages[point >> 6], point & 63]), length


def contraction(data: Any, start: int, end: int) -> int:
    """Length of 's 't 'm 'd 'll 've 're at `start`, or 0."""
    if start + 1 >= end or data[start] != _APOSTROPHE:
        return 0
    first = data[start + 1]
    if first == 0x73 or first == 0x74 or first == 0x6D or first == 0x64:  # s t m d
        return 2
    if start + 2 >= end:
        return 0
    second = data[start + 2]
    if (first == 0x6C and second == 0x6C) or (second == 0x65 and (first == 0x76 or first == 0x72)):  # ll ve re
        return 3
    return 0


def match_gpt2(data: Any, start: int, end: int, pages: Any, leaves: Any, option: int = 0) -> int:
    r"""``'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+``"""
    length = contraction(data, start, end)
    if length > 0:
        return start + length
    at = start
    bits, length = character(data, at, end, pages, leaves)
    if data[start] == _BLANK and start + 1 < end:
        bits, length = character(data, start + 1, end, pages, leaves)
        at = start if bits & SPACE else start + 1
    kind = bits & _KIND
    last = at
    while at < end:
        bits, length = character(data, at, end, pages, leaves)
        if bits & _KIND != kind:
            break
        last = at
        at += length
    # White space leaves its last character to what follows, if anything does and if there is more than one.
    return last if kind == SPACE and at < end and last > start else at
