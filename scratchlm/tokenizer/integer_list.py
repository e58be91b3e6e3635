"""A list of Python integers → uint32, read where CPython keeps them.

    list ──► items │ ● │ ● │ ● │ …                               8 bytes each
                     └──► references │ type │ form │ digits …    8, 8, 8 and 4 bytes; `form` holds size and sign

``array("I", ids)`` asks one integer after the other for its value and waits for the memory that each lies in. Here all have the
one form that ids have, and memory is asked for ahead of time: twice as fast.

CPython promises none of this. So it is tried on integers whose values are known before the first list is read; where anything
is otherwise (another Python, another layout), `read` declines, and ``array`` has to do.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from scratchlm.tokenizer.buffers import HUGE, private_pages
from scratchlm.tokenizer.compiling import compiling
from scratchlm.tokenizer.machine_words import ask_for, outer, peek32, peek64, stamp

_LENGTH, _ITEMS, _TYPE, _FORM, _DIGIT = 16, 24, 8, 16, 24
# Sizes in bytes, as CPython tells them: of an object without content, a list, and an int without and with one more digit.
_SIZES = (16, 40, 24, 4)
_AHEAD = 24


class Forms(NamedTuple):
    """What stands at `form`: of 0, of 1 (since 3.14 small integers bear a mark), and of other integers up to 2³⁰ − 1."""

    zero: int
    small: int
    one_digit: int


@functools.cache
def forms() -> Forms | None:
    """How integers look here; None where lists or integers do not lie in memory as drawn above."""
    sizes = (object.__basicsize__, list.__basicsize__, int.__basicsize__, int.__itemsize__)
    if sys.implementation.name != "cpython" or sizes != _SIZES or sys.byteorder != "little":
        return None
    numbers = [0, 1, 2, 255, 256, 257, 2_000, 65_536, (1 << 30) - 1, -1, 1 << 30, True]
    items = _word(id(numbers) + _ITEMS)
    # The first one tells whether that is where the items are.
    if (
        items % 8
        or items == 0
        or [_word(items + 8 * place) for place in range(len(numbers))] != list(map(id, numbers))
    ):
        return None
    kinds = [_word(id(number) + _TYPE) for number in numbers]
    found = [_word(id(number) + _FORM) for number in numbers]
    found_values = [_word(id(number) + _DIGIT) & 0xFFFFFFFF for number in numbers[1:9]]
    zero, small, one_digit = found[0], found[1], found[8]
    ones, others = {small, one_digit}, {zero, *found[9:11]}
    if kinds[:11] != [id(int)] * 11 or kinds[11] == id(int) or found_values != numbers[1:9]:
        return None
    if (
        _word(id(numbers) + _LENGTH) != len(numbers)
        or set(found[1:9]) - ones
        or ones & others
        or zero in found[9:11]
    ):
        return None
    return Forms(zero, small, one_digit)


def _word(address: int) -> int:
    return ctypes.c_uint64.from_address(address).value


def _loop(sources: int) -> Callable[..., Any]:
    def read_integers(listed, kind, zero, small, one_digit, out):
        """Values of the list at `listed` to `out`. Returns whether it has as many items as `out`, all of them ints from 0 to 2³⁰ − 1.

        Runs with the interpreter's lock, so that nobody changes the list between these lines."""
        count = len(out)
        if np.int64(peek64(listed + _LENGTH)) != count or sources == 0:
            return False
        items = np.int64(peek64(listed + _ITEMS))
        for place in range(count):
            ask_for(peek64(items + 8 * min(place + _AHEAD, count - 1)))
            number = np.int64(peek64(items + 8 * place))
            if np.int64(peek64(number + _TYPE)) != kind:
                return False
            form = np.int64(peek64(number + _FORM))
            if form in (one_digit, small):
                out[place] = peek32(number + _DIGIT)
            elif form == zero:
                out[place] = 0
            else:
                return False
        return True

    return read_integers


_read = outer(_loop(stamp()), nogil=False)


def read(ids: list[int]) -> np.ndarray | None:
    """The values of `ids` as uint32; None unless all are plain integers from 0 to 2³⁰ − 1, and lie in memory as they should."""
    found = forms()
    if found is None or type(ids) is not list:
        return None
    length = len(ids)
    out = np.frombuffer(private_pages(4 * length), np.uint32) if 4 * length >= HUGE else np.empty(length, np.uint32)
    if not _read.signatures:
        with compiling("the decoder"):
            _read(id([]), id(int), *found, np.empty(0, np.uint32))
    return out if _read(id(ids), id(int), *found, out) else None
