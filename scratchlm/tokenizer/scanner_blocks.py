r"""64 bytes at a time: for each class of characters one 64-bit number, whose bit i says whether byte i belongs to it.

    bytes      T h e ␣ c a f é é ␣ 4 2 .          é is two bytes, and both carry its class
    letters    1 1 1 0 1 1 1 1 1 0 0 0 0
    numbers    0 0 0 0 0 0 0 0 0 0 1 1 0
    white      0 0 0 1 0 0 0 0 0 1 0 0 0
    tails      0 0 0 0 0 0 0 0 1 0 0 0 0          bytes of a character after its first

"Where does a run of letters begin" is then ``letters & ~(letters << 1)``, for all 64 bytes at once: what in a loop would
be 64 branches, half of them mispredicted, is three instructions. ASCII bytes are compared all together by the processor's
vector unit. Of other characters each is decoded and looked up, and its bits are added to the same masks, so that mixed text
needs no other path.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from scratchlm.tokenizer import scanner_reference as reference
from scratchlm.tokenizer import unicode_classes
from scratchlm.tokenizer.unicode_classes import LETTER, LOWER, MARK, NUMBER, SPACE, UPPER

BLOCK = 64
_ONE, _NONE, _ALL = np.uint64(1), np.uint64(0), np.uint64(0xFFFF_FFFF_FFFF_FFFF)
_BYTE, _WORD = ir.IntType(8), ir.IntType(64)

built_in: Any = intrinsic  # for type checkers, who know nothing of the typing context that numba fills in


def inner(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled as a part of whatever calls it."""
    return numba.njit(nogil=True)(function)


def inner_reference(name: str) -> Callable[..., Any]:
    """A function of ``scanner_reference.py``, compiled together with those it calls."""
    parts = {part: inner(getattr(reference, part)) for part in ("character", "contraction")}
    plain = getattr(reference, name)
    return inner(FunctionType(plain.__code__, {**plain.__globals__, **parts}, name))


def _sources() -> int:
    """A number that changes when any file does that goes into a scanner: Numba itself looks at one file only."""
    digest = hashlib.blake2b(digest_size=7)
    for path in sorted([*Path(__file__).parent.glob("scanner*.py"), Path(unicode_classes.__file__)]):
        digest.update(path.read_bytes())
    return int.from_bytes(digest.digest(), "little")


def build(
    name: str, block_starts: Callable[..., Any], match: Callable[..., Any]
) -> Callable[[Any, Any, Any, Any, Any, Any, int], int]:
    """The scanner of one pattern: the loop below around its two compiled functions, kept on disk.

    Args:
        name: of the pattern.
        block_starts: (data, at, end, pages, leaves, option) → mask of the boundaries behind `at` in the block that begins
            there, all certain; 0 if it holds none.
        match: (data, at, end, pages, leaves, option) → where the pre-token that begins at `at` ends.
    """
    loop = _loop(_sources())
    names = {**loop.__globals__, "block_starts": block_starts, "match": match}
    scan = FunctionType(loop.__code__, names, f"scan_{name}", None, loop.__closure__)
    scan.__qualname__ = scan.__name__
    try:
        return numba.njit(cache=True, nogil=True)(scan)
    except RuntimeError:  # no folder to keep it in can be written
        return numba.njit(nogil=True)(scan)


# What the loop calls; `build` puts the functions of one pattern in their place.
block_starts: Any = None
match: Any = None


def _loop(sources: int) -> Any:
    def scan(data, regions, cursor, spans, pages, leaves, option):
        row, room = 0, len(spans)
        region, at = cursor[0], cursor[1]
        while region < len(regions) and row < room and sources > 0:
            end = regions[region, 1]
            while at < end and row < room:
                starts = _NONE
                if at + BLOCK <= len(data):
                    starts = block_starts(data, at, end, pages, leaves, option)
                if starts == _NONE:
                    spans[row, 0] = at
                    at = match(data, at, end, pages, leaves, option)
                    spans[row, 1] = at
                    row += 1
                block = at
                while starts != _NONE and row < room:
                    spans[row, 0] = at
                    at = block + trailing_zeros(starts)
                    spans[row, 1] = at
                    starts &= starts - _ONE
                    row += 1
            if at >= end and row < room:
                spans[row, 0] = -1
                spans[row, 1] = regions[region, 2]
                row += 1
                region += 1
                if region < len(regions):
                    at = regions[region, 0]
        cursor[0], cursor[1] = region, at
        return row

    return scan


@built_in
def trailing_zeros(typing_context: Any, mask: Any) -> Any:
    """The position of the lowest bit set; `mask` must not be 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), generate


@built_in
def leading_zeros(typing_context: Any, mask: Any) -> Any:
    """How many bits are 0 above the highest bit set; `mask` must not be 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctlz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), generate


@built_in
def ascii_masks(typing_context: Any, data: Any, at: Any) -> Any:
    """Masks of ``data[at:at + 64]``, which must lie inside `data`.

    Returns: upper-case letters, lower-case letters, digits, white space, blanks, line ends (CR, LF), apostrophes, slashes,
    bytes from 0x80 on, bytes from 0x80 to 0xBF. What a caller does not use costs nothing.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector = ir.VectorType(_BYTE, BLOCK)
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        start = builder.gep(array.data, [arguments[1]])
        block = builder.load(builder.bitcast(start, vector.as_pointer()), align=1)

        def all_(value: int) -> Any:
            return ir.Constant(vector, [value] * BLOCK)

        def between(low: int, high: int) -> Any:
            return builder.icmp_unsigned("<", builder.sub(block, all_(low)), all_(high - low + 1))

        def equal(value: int) -> Any:
            return builder.icmp_unsigned("==", block, all_(value))

        blank = equal(0x20)
        masks = [
            between(0x41, 0x5A), between(0x61, 0x7A), between(0x30, 0x39), builder.or_(blank, between(0x09, 0x0D)), blank,
            builder.or_(equal(0x0A), equal(0x0D)), equal(0x27), equal(0x2F), between(0x80, 0xFF), between(0x80, 0xBF),
        ]  # fmt: skip
        return context.make_tuple(builder, signature.return_type, [builder.bitcast(mask, _WORD) for mask in masks])

    return types.UniTuple(types.uint64, 10)(data, at), generate


@inner
def first_bits(count):
    """A mask of the lowest `count` bits, 0 ≤ count ≤ 64."""
    return _ALL if count >= 64 else (_ONE << np.uint64(count)) - _ONE


@inner
def wide_masks(data, at, high, continuation, whole, pages, leaves):
    """Masks of the characters outside ASCII.

    Args:
        data, at: where the block begins.
        high, continuation: its bytes from 0x80 on, and those up to 0xBF; none beyond the end of the text.
        whole: the text goes on behind the 64th byte.

    Returns:
        letters, numbers, white space, upper case, lower case, marks, tails; and how many bytes of the block they tell of:
        less than 64 where the block's end would cut a character in two.
    """
    letters = numbers = white = upper = lower = marks = tails = _NONE
    leads = high & ~continuation
    length = np.int64(BLOCK)
    while leads != _NONE:
        place = trailing_zeros(leads)
        leads &= leads - _ONE
        first = np.int64(data[at + place])
        size = 2 if first < 0xE0 else (3 if first < 0xF0 else 4)
        if place + size > BLOCK and whole:
            length = place
            break
        tail = (first_bits(size - 1) << np.uint64(1)) << np.uint64(place)
        if place + size > BLOCK or (continuation & tail) != tail:
            continue
        if size == 2:
            point = (first & 0x1F) << 6 | np.int64(data[at + place + 1]) & 0x3F
            if point < 0x80:
                continue
        elif size == 3:
            point = (
                (first & 0x0F) << 12
                | (np.int64(data[at + place + 1]) & 0x3F) << 6
                | np.int64(data[at + place + 2]) & 0x3F
            )
            if point < 0x800 or (point >> 11) == 27:
                continue
        else:
            point = (
                (first & 0x0F) << 18
                | (np.int64(data[at + place + 1]) & 0x3F) << 12
                | (np.int64(data[at + place + 2]) & 0x3F) << 6
                | np.int64(data[at + place + 3]) & 0x3F
            )
            if point < 0x10000 or point > 0x10FFFF or first > 0xF4:
                continue
        bits = np.int64(leaves[pages[point >> 6], point & 63])
        mask = tail | _ONE << np.uint64(place)
        tails |= tail
        letters |= mask & np.uint64(-(bits & LETTER))
        numbers |= mask & np.uint64(-((bits & NUMBER) // NUMBER))
        white |= mask & np.uint64(-((bits & SPACE) // SPACE))
        upper |= mask & np.uint64(-((bits & UPPER) // UPPER))
        lower |= mask & np.uint64(-((bits & LOWER) // LOWER))
        marks |= mask & np.uint64(-((bits & MARK) // MARK))
    return letters, numbers, white, upper, lower, marks, tails, length
