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
from typing import Any, NamedTuple

import numba
import numpy as np

from scratchlm.tokenizer.buffers import HUGE, private_pages
from scratchlm.tokenizer.compiling import compiling, given_room
from scratchlm.tokenizer.machine_words import ask_for, peek32, peek64

_ITEMS, _TYPE, _FORM, _DIGIT = 24, 8, 16, 24
# Sizes in bytes, as CPython tells them: of an object without content, a list, and an int without and with one more digit.
_SIZES = (16, 40, 24, 4)
_AHEAD = 24


class Forms(NamedTuple):
    """What stands at `form` of 0, and of integers from 1 to 2³⁰ − 1."""

    zero: int
    one_digit: int


@functools.cache
def forms() -> Forms | None:
    """How integers look here; None where lists or integers do not lie in memory as drawn above."""
    sizes = (object.__basicsize__, list.__basicsize__, int.__basicsize__, int.__itemsize__)
    if sys.implementation.name != "cpython" or sizes != _SIZES or sys.byteorder != "little":
        return None
    numbers = [0, 1, 2, 255, 256, 257, 65_536, (1 << 30) - 1, -1, 1 << 30, True]
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
    found_values = [_word(id(number) + _DIGIT) & 0xFFFFFFFF for number in numbers[1:8]]
    zero, ones, others = found[0], found[1:8], found[8:10]
    if kinds[:10] != [id(int)] * 10 or kinds[10] == id(int) or found_values != numbers[1:8]:
        return None
    if len(set(ones)) != 1 or zero in ones or set(others) & {zero, *ones}:
        return None
    return Forms(zero, ones[0])


def _word(address: int) -> int:
    return ctypes.c_uint64.from_address(address).value


# With the interpreter's lock: nobody changes the list meanwhile.
@given_room
@numba.njit(cache=True)
def _read(items, count, kind, zero, one_digit, out):
    """Values to `out`; returns how many there are before the first that is no int, negative, or 2³⁰ and more."""
    for place in range(count):
        ask_for(peek64(items + 8 * min(place + _AHEAD, count - 1)))
        number = np.int64(peek64(items + 8 * place))
        form = np.int64(peek64(number + _FORM))
        if np.int64(peek64(number + _TYPE)) != kind or (form != one_digit and form != zero):
            return place
        out[place] = peek32(number + _DIGIT) if form == one_digit else 0
    return count


def read(ids: list[int]) -> np.ndarray | None:
    """The values of `ids` as uint32; None unless all are plain integers from 0 to 2³⁰ − 1, and lie in memory as they should."""
    found = forms()
    if found is None or type(ids) is not list:
        return None
    size = 4 * len(ids)
    out = np.frombuffer(private_pages(size), np.uint32) if size >= HUGE else np.empty(len(ids), np.uint32)
    arguments: tuple[Any, ...] = (_word(id(ids) + _ITEMS), len(ids), id(int), found.zero, found.one_digit, out)
    if _read.signatures:
        done = _read(*arguments)
    else:
        with compiling("the decoder"):
            done = _read(*arguments)
    return out if done == len(ids) else None
