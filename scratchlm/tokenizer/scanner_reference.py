r"""Pre-tokenisation character by character: what a pattern matches at one place, as one would write it down.

The readable twin of the scanners that work on blocks of 64 bytes (``scanner_blocks.py``), and what these fall back on for a
pre-token longer than a block, for the last bytes of a text and for rare cases. Plain Python; Numba compiles the very same
functions. All take

    data: uint8, the whole buffer;  start, end: a place in it, and where the text ends;  pages, leaves: `class_pages()`

and return where the pre-token that begins at `start` ends. Nothing to the left of `start` is ever read.
"""

from __future__ import annotations

from typing import Any

from scratchlm.tokenizer.unicode_classes import LETTER, LOWER, MARK, NUMBER, SPACE, UPPER

_KIND = LETTER | NUMBER | SPACE
_BLANK, _APOSTROPHE, _SLASH, _LF, _CR = 0x20, 0x27, 0x2F, 0x0A, 0x0D
TO_THE_END = 8


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


def contraction(data: Any, start: int, end: int, any_case: bool) -> int:
    """Length of 's 't 'm 'd 'll 've 're at `start`, or 0. In any case, ``ſ`` (U+017F) is an s too."""
    if start + 1 >= end or data[start] != _APOSTROPHE:
        return 0
    first = int(data[start + 1])
    second = int(data[start + 2]) if start + 2 < end else 0
    if any_case:
        if first == 0xC5 and second == 0xBF:
            return 3
        first, second = first | 0x20, second | 0x20
    if first == 0x73 or first == 0x74 or first == 0x6D or first == 0x64:  # s t m d
        return 2
    if (first == 0x6C and second == 0x6C) or (second == 0x65 and (first == 0x76 or first == 0x72)):  # ll ve re
        return 3
    return 0


def run_end(data: Any, at: int, end: int, pages: Any, leaves: Any, kinds: int, kind: int) -> int:
    """Where the characters end that are of `kind` among `kinds`."""
    while at < end:
        bits, length = character(data, at, end, pages, leaves)
        if bits & kinds != kind:
            break
        at += length
    return at


def white_space(data: Any, start: int, end: int, pages: Any, leaves: Any, lines: bool, to_the_end: bool) -> int:
    r"""``\s+(?!\S)|\s+``; with `lines`, ``\s*[\r\n]+`` before it, and with `to_the_end`, ``\s++\Z`` before that."""
    at = last = start
    behind_line = start
    while at < end:
        bits, length = character(data, at, end, pages, leaves)
        if bits & SPACE == 0:
            break
        last = at
        at += length
        if data[last] == _LF or data[last] == _CR:
            behind_line = at
    if at == end and to_the_end:
        return end
    if lines and behind_line > start:
        return behind_line
    # The last character is left to what follows, if anything does and if there is more than one.
    return last if at < end and last > start else at


def match_gpt2(data: Any, start: int, end: int, pages: Any, leaves: Any, option: int = 0) -> int:
    r"""``'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+``"""
    length = contraction(data, start, end, False)
    if length > 0:
        return start + length
    at = start
    bits, length = character(data, at, end, pages, leaves)
    if data[start] == _BLANK and start + 1 < end:
        following, length = character(data, start + 1, end, pages, leaves)
        if following & SPACE == 0:
            bits, at = following, start + 1
    if bits & SPACE:
        return white_space(data, start, end, pages, leaves, False, False)
    return run_end(data, at, end, pages, leaves, _KIND, bits & _KIND)


def match_cl100k(data: Any, start: int, end: int, pages: Any, leaves: Any, option: int) -> int:
    r"""``(?i:'(?:[sdmt]|ll|ve|re))|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|`` white space.

    `option`: the longest group of digits; plus `TO_THE_END` for ``\s++\Z``.
    """
    length = contraction(data, start, end, True)
    if length > 0:
        return start + length
    bits, length = character(data, start, end, pages, leaves)
    following, _ = character(data, start + length, end, pages, leaves) if start + length < end else (SPACE, 0)
    line = data[start] == _LF or data[start] == _CR
    if bits & LETTER or (bits & NUMBER == 0 and not line and following & LETTER):
        return run_end(data, start + length, end, pages, leaves, LETTER, LETTER)
    if bits & NUMBER:
        return _digits(data, start, end, pages, leaves, option & 7)
    at = start
    if data[start] == _BLANK:
        bits, at = following, start + 1
    if bits & SPACE:
        return white_space(data, start, end, pages, leaves, True, option >= TO_THE_END)
    if bits & NUMBER:  # behind a blank
        return start + 1
    at = run_end(data, at, end, pages, leaves, _KIND, 0)
    while at < end and (data[at] == _LF or data[at] == _CR):
        at += 1
    return at


def _digits(data: Any, at: int, end: int, pages: Any, leaves: Any, most: int) -> int:
    for _ in range(most):
        if at < end:
            bits, length = character(data, at, end, pages, leaves)
            if bits & NUMBER:
                at += length
    return at


def cased_word(data: Any, start: int, end: int, pages: Any, leaves: Any) -> int:
    r"""``[upper]*[lower]+|[upper]+[lower]*``, where letters without case and marks are both upper and lower."""
    at = behind_both = start
    bits = LETTER
    while at < end:
        bits, length = character(data, at, end, pages, leaves)
        if bits & (LETTER | MARK) == 0 or bits & LOWER:
            break
        at += length
        if bits & UPPER == 0:
            behind_both = at
    if at < end and bits & LOWER:
        while at < end:
            bits, length = character(data, at, end, pages, leaves)
            if bits & (LETTER | MARK) == 0 or bits & UPPER:
                break
            at += length
        return at
    # No lower case behind: the first alternative gives characters back until its [lower]+ finds one that is both.
    return behind_both if behind_both > start else at


def match_o200k(data: Any, start: int, end: int, pages: Any, leaves: Any, option: int = 0) -> int:
    r"""o200k: words as `cased_word`, one other character before, a contraction behind; digits by three; the rest like cl100k,
    with slashes among the line ends. See ``scanner_o200k.py``."""
    bits, length = character(data, start, end, pages, leaves)
    following, _ = character(data, start + length, end, pages, leaves) if start + length < end else (SPACE, 0)
    line = data[start] == _LF or data[start] == _CR
    word = -1
    if bits & (LETTER | MARK):
        word = start
    elif bits & NUMBER == 0 and not line and following & (LETTER | MARK):
        word = start + length
    if word >= 0:
        at = cased_word(data, word, end, pages, leaves)
        return at + contraction(data, at, end, True)
    if bits & NUMBER:
        return _digits(data, start, end, pages, leaves, 3)
    at = start
    if data[start] == _BLANK:
        bits, at = following, start + 1
    if bits & SPACE:
        return white_space(data, start, end, pages, leaves, True, False)
    if bits & NUMBER:  # behind a blank
        return start + 1
    at = run_end(data, at, end, pages, leaves, _KIND, 0)
    while at < end and (data[at] == _LF or data[at] == _CR or data[at] == _SLASH):
        at += 1
    return at
