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

import functools
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray
from numba.core import types

from scratchlm.tokenizer import machine_words, on_demand, unicode_classes
from scratchlm.tokenizer import scanner_reference as reference
from scratchlm.tokenizer.machine_words import built_in, inner, outer
from scratchlm.tokenizer.on_demand import OnDemand, address_of, call

BLOCK = 64
READ = BLOCK + 3  # bytes that are looked at for a block: its last may begin a character of four
EDGE = (
    READ - 1
)  # bytes at the end of a buffer where no block can begin: they are read from a copy with room behind it
_BYTE, _WORD = ir.IntType(8), ir.IntType(64)


@functools.cache
def inner_reference(name: str) -> Callable[..., Any]:
    """A function of ``scanner_reference.py``, compiled together with those it calls."""
    plain = getattr(reference, name)
    called = [part for part in plain.__code__.co_names if isinstance(getattr(reference, part, None), FunctionType)]
    parts = {part: inner_reference(part) for part in called}
    return inner(FunctionType(plain.__code__, {**plain.__globals__, **parts}, name))


@built_in
def borrowed(typing_context: Any, array: Any) -> Any:
    """The same array without an owner: Numba counts references at every call and every branch, and finds none to count.

    Its owner must outlive it, as the arguments of a function do.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        view = context.make_array(signature.args[0])(context, builder, arguments[0])
        view.meminfo = ir.Constant(view.meminfo.type, None)
        view.parent = ir.Constant(view.parent.type, None)
        return view._getvalue()

    return array(array), generate


def _sources() -> int:
    """A number that changes when any file does that goes into a scanner: Numba itself looks at one file only."""
    digest = hashlib.blake2b(digest_size=7)
    for path in sorted(
        [
            *Path(__file__).parent.glob("scanner*.py"),
            *map(Path, (unicode_classes.__file__, machine_words.__file__, on_demand.__file__)),
        ]
    ):
        digest.update(path.read_bytes())
    return int.from_bytes(digest.digest(), "little")


def build(
    name: str, block_starts: Callable[..., Any]
) -> Callable[[Any, Any, Any, Any, Any, Any, int, Any, int], int]:
    """The scanner of one pattern: the loop below around its compiled function, kept on disk.

    Args:
        name: of the pattern.
        block_starts: (data, at, end, pages, leaves, option) → mask of the boundaries behind `at` in the block that begins
            there, all certain; 0 if it holds none.
    """
    return outer(_named(_loop(_sources()), f"scan_{name}", block_starts=block_starts))


_COUNT, _BYTES, _PAGES = types.int64, types.CPointer(types.uint8), types.CPointer(types.uint16)


def build_match(name: str) -> OnDemand:
    """What ends the pre-tokens that blocks leave open: a function of ``scanner_reference.py``, (data, at, end, pages, leaves, option) →
    where the pre-token that begins at `at` ends."""
    signature = _COUNT(_BYTES, _COUNT, _COUNT, _PAGES, _BYTES, _COUNT)
    return OnDemand(
        "the scanner of long pre-tokens",
        signature,
        _named(_by_address(_sources()), name, match=inner_reference(name)),
    )


def _named(function: Any, name: str, **parts: Any) -> Any:
    """`function` under a name of its own, by which Numba keeps it, with `parts` in the places of its globals of those names. (Not in its
    closure: that is part of the key of what is kept, and compiled functions are never the same twice.)"""
    named = FunctionType(function.__code__, {**function.__globals__, **parts}, name, None, function.__closure__)
    named.__qualname__ = name
    return named


def _by_address(sources: int) -> Any:
    def match_by_address(data, at, end, pages, leaves, option):
        pages = carray(pages, unicode_classes.CODE_POINTS >> 6)
        return match(
            carray(data, end), at, end if sources > 0 else at, pages, carray(leaves, (len(pages), 64)), option
        )

    return match_by_address


# What these call; `build` and `build_match` put the functions of one pattern in their place.
block_starts: Any = None
match: Any = None


def _loop(sources: int) -> Any:
    def scan(data, regions, cursor, spans, pages, leaves, option, edge, longer):
        """Stops before a pre-token that blocks leave open, if there is no function to end it: `longer` is 0.

        edge: the last EDGE bytes of `data`, with READ more behind them; zeros before them where there are fewer.
        """
        row, room = 0, len(spans)
        region, at = cursor[0], cursor[1]
        index, table = borrowed(pages), borrowed(leaves)
        safe = len(data) - READ
        open_end = False
        while region < len(regions) and row < room and sources > 0:
            end = regions[region, 1]
            while at < end and row < room:
                text, shift = borrowed(data), 0
                if at > safe:
                    text, shift = borrowed(edge), len(data) - EDGE
                starts = block_starts(text, at - shift, end - shift, index, table, option)
                if starts == 0:
                    if longer == 0:
                        open_end = True
                        break
                    spans[row, 0] = at
                    addresses = address_of(pages), address_of(leaves)
                    at = call(longer, (address_of(data), at, end, addresses[0], addresses[1], option))
                    spans[row, 1] = at
                    row += 1
                block = at
                while starts != 0 and row < room:
                    spans[row, 0] = at
                    at = block + trailing_zeros(starts)
                    spans[row, 1] = at
                    starts &= starts - 1
                    row += 1
            if open_end:
                break
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

    return types.int64(types.int64), generate


@built_in
def leading_zeros(typing_context: Any, mask: Any) -> Any:
    """How many bits are 0 above the highest bit set; `mask` must not be 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctlz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), generate


@built_in
def down(typing_context: Any, mask: Any, count: Any) -> Any:
    """`mask` shifted to the right by less than 64, zeros coming in: masks are signed, and ``>>`` would copy the sign."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.lshr(arguments[0], arguments[1])

    return types.int64(types.int64, types.int64), generate


@built_in
def four_bytes(typing_context: Any, data: Any, at: Any) -> Any:
    """``data[at:at + 4]`` as one number, the first byte highest."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        start = builder.gep(array.data, [arguments[1]])
        word = builder.load(builder.bitcast(start, ir.IntType(32).as_pointer()), align=1)
        word = word if sys.byteorder == "big" else builder.bswap(word)
        return builder.zext(word, _WORD)

    return types.int64(data, at), generate


def comparisons(context: Any, builder: Any, signature: Any, arguments: Any) -> tuple[Any, Any]:
    """Generators of comparisons of 64 bytes at once: in a range, and with one value."""
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

    return between, equal


@built_in
def ascii_masks(typing_context: Any, data: Any, at: Any) -> Any:
    """Masks of ``data[at:at + 64]``, which must lie inside `data`.

    Returns: upper-case letters, lower-case letters, digits, white space, blanks, line ends (CR, LF), apostrophes, slashes,
    bytes from 0x80 on, bytes from 0x80 to 0xBF. What a caller does not use costs nothing.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        between, equal = comparisons(context, builder, signature, arguments)
        blank = equal(0x20)
        masks = [
            between(0x41, 0x5A), between(0x61, 0x7A), between(0x30, 0x39), builder.or_(blank, between(0x09, 0x0D)), blank,
            builder.or_(equal(0x0A), equal(0x0D)), equal(0x27), equal(0x2F), between(0x80, 0xFF), between(0x80, 0xBF),
        ]  # fmt: skip
        return context.make_tuple(builder, signature.return_type, [builder.bitcast(mask, _WORD) for mask in masks])

    return types.UniTuple(types.int64, 10)(data, at), generate


@built_in
def common_letters(typing_context: Any, data: Any, at: Any) -> Any:
    """Masks of first and second bytes that by themselves say "letter", in ``data[at:at + 64]``.

    Returns: first bytes of U+5000–9FFF, U+B000–CFFF and U+3040–30FF (Chinese, Hangul and Kana: letters without case; Kana but for
    nine signs); of the letters U+0620–064A and U+0671–06D3 (Arabic, without case); of U+0400–043F and of U+0440–047F (Cyrillic); second bytes of
    U+0400–042F (upper case) and of U+0440–045F (lower case, as is U+0430–043F).
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        between, equal = comparisons(context, builder, signature, arguments)

        def kana(second: int, others: Any) -> Any:
            """First bytes of a page of Kana, but for some third bytes."""
            behind = builder.lshr(builder.bitcast(equal(second), _WORD), ir.Constant(_WORD, 1))
            others = builder.lshr(builder.bitcast(others, _WORD), ir.Constant(_WORD, 2))
            return builder.and_(behind, builder.not_(others))

        pages = [kana(0x81, equal(0x80)), kana(0x82, between(0x97, 0xA0)), kana(0x83, equal(0xBB))]
        three = functools.reduce(builder.or_, pages)
        three = builder.and_(three, builder.bitcast(equal(0xE3), _WORD))
        for first in (between(0xE5, 0xE9), between(0xEB, 0xEC)):
            three = builder.or_(three, builder.bitcast(first, _WORD))
        arabic = builder.bitcast(equal(0xDA), _WORD)
        for first, seconds in (
            (0xD8, between(0xA0, 0xBF)),
            (0xD9, builder.or_(between(0x80, 0x8A), between(0xB1, 0xBF))),
            (0xDB, between(0x80, 0x93)),
        ):
            behind = builder.lshr(builder.bitcast(seconds, _WORD), ir.Constant(_WORD, 1))
            arabic = builder.or_(arabic, builder.and_(builder.bitcast(equal(first), _WORD), behind))
        masks = [equal(0xD0), equal(0xD1), between(0x80, 0xAF), between(0x80, 0x9F)]
        masks = [three, arabic, *(builder.bitcast(mask, _WORD) for mask in masks)]
        return context.make_tuple(builder, signature.return_type, masks)

    return types.UniTuple(types.int64, 6)(data, at), generate


@built_in
def first_bits(typing_context: Any, count: Any) -> Any:
    """A mask of the lowest `count` bits, 0 ≤ count; all from 64 on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (count,) = arguments
        few = builder.sub(builder.shl(ir.Constant(_WORD, 1), count), ir.Constant(_WORD, 1))
        return builder.select(
            builder.icmp_signed("<", count, ir.Constant(_WORD, BLOCK)), few, ir.Constant(_WORD, -1)
        )

    return types.int64(types.int64), generate


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
    numbers = white = marks = 0
    leads = high & ~continuation
    # The most frequent letters without a loop: three bytes of Chinese, Kana and Hangul, two of Arabic and Cyrillic.
    three, arabic, cyrillic, more_cyrillic, upper_half, lower_third = common_letters(data, at)
    followed = leads & down(continuation, 1)
    three &= followed & down(continuation, 2)
    upper = cyrillic & down(upper_half, 1)
    lower = cyrillic & ~upper | more_cyrillic & down(lower_third, 1)
    upper &= followed
    lower &= followed
    known = three | arabic & followed | upper | lower
    leads &= ~known
    tails = known << 1 | three << 2
    upper |= upper << 1
    lower |= lower << 1
    letters = known | tails
    length = BLOCK
    while leads != 0:
        place = trailing_zeros(leads)
        leads &= leads - 1
        word = four_bytes(data, at + place)
        # A code point is the number of its page and six bits, which stand in its last byte.
        if word < 0xE000_0000:
            tail = 0b10
            page, low = word >> 24 & 0x1F, word >> 16
            valid = page >= 2  # C0 and C1 would be ASCII
        elif word < 0xF000_0000:
            tail = 0b110
            page, low = word >> 18 & 0x3C0 | word >> 16 & 0x3F, word >> 8
            valid = page >= 0x20 and page >> 5 != 27  # not shorter ones, nor surrogates
        else:
            tail = 0b1110
            page, low = word >> 12 & 0x7000 | word >> 10 & 0xFC0 | word >> 8 & 0x3F, word
            valid = page >= 0x400 and page < 0x4400 and word < 0xF800_0000
        shifted = tail << place
        cut = down(shifted, place) != tail
        if cut and whole:
            length = place
            break
        if cut or not valid or continuation & shifted != shifted:
            continue
        bits = np.int64(leaves[pages[page], low & 0x3F])
        mask = shifted | 1 << place
        tails |= shifted
        letters |= mask & -(bits & 1)
        numbers |= mask & -(bits >> 1 & 1)
        white |= mask & -(bits >> 2 & 1)
        upper |= mask & -(bits >> 3 & 1)
        lower |= mask & -(bits >> 4 & 1)
        marks |= mask & -(bits >> 5 & 1)
    return letters, numbers, white, upper, lower, marks, tails, length


@inner
def white_starts(white, lines, tails, inside):
    r"""Where pre-tokens of white space begin, ``\s*[\r\n]+|\s+(?!\S)|\s+``.

        white     0 1 1 1 1 1 1 1 0        text: x␣⏎␣⏎␣␣␣y
        lines     0 0 1 0 1 0 0 0 0
        starts    0 1 0 0 0 1 0 1 0        a run, what follows its last line end, its last character

    Args:
        white, lines: white space and the line ends among it that no pre-token before has taken.
        tails, inside: bytes of characters after the first; all bytes that are text.
    """
    rest = white & ~lines
    behind = (lines << 1) & rest  # where white space goes on behind a line end …
    if behind != 0:
        more = (behind + rest) & ~rest & lines  # … and another line end follows: that one counts
        while more != 0:
            lowest = more & (0 - more)
            more ^= lowest
            behind ^= 1 << 63 - leading_zeros(behind & (lowest - 1))
    last = rest & ~down(white, 1) & down(inside, 1)  # what follows is not white, and in sight
    last = last & ~tails | down(last & tails, 1)  # from its last byte to its first: there are at most three
    last = last & ~tails | down(last & tails, 1)
    return white & ~(white << 1) | behind | last


@inner
def run_start_at_end(run, inside, length):
    """How many bits stand up to the beginning of the run that the block's end is in, that bit included."""
    before = inside & ~run
    return 0 if before == 0 else BLOCK + 1 - leading_zeros(before)


@inner
def digit_starts(numbers, tails, most):
    """Where groups of at most `most` digits begin."""
    if most == 1:
        return numbers & ~tails
    heads = ~tails
    group = numbers & ~(numbers << 1)
    starts = group
    while group != 0:  # three characters on, if there are that many
        group = ((group << 1) + tails) & heads & numbers
        group = ((group << 1) + tails) & heads & numbers
        group = ((group << 1) + tails) & heads & numbers
        starts |= group
    return starts
