"""Ids → bytes → text.

    pool     h e l l o ␣ w o r l d …          all tokens one behind the other
    start    0   2     5 6 …                  token i is pool[start[i] : start[i + 1]]

A few ids are looked up in the vocabulary and joined. Many go through compiled loops: first the ids are checked and their bytes
and characters counted; then each token is copied 16 bytes at a time, whatever its length (the next one overwrites what was too
much; only tokens longer than that take a second step).

    ids ──65,536 at a time──► uint32 ──► bytes, in a buffer that stays in the cache ──► str of this step
                                                                                             │
    str of all, made without content for as many characters    │ … │ … │ here │     ◄────────┘

How wide its characters are (1, 2 or 4 bytes) the first bytes of characters tell. Bytes that are no UTF-8 are found by the steps'
decoder; then the text is put together anew, with U+FFFD where they stood.
"""

from __future__ import annotations

import codecs
import ctypes
import functools
import mmap
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from scratchlm.errors import UserError
from scratchlm.tokenizer.buffers import HUGE

# Below, joining is as fast; above, the compiled loops are worth their import.
_FEW = 1 << 9
_FIRST = 1 << 16
# Ids per step: what they become on the way to a text stays in the cache.
_STEP = 1 << 16


class Decoder:
    """Decodes for a `Tokenizer`.

    Args:
        vocab: id → bytes.
        vocab_size: the highest id + 1.
    """

    def __init__(self, vocab: dict[int, bytes], vocab_size: int) -> None:
        self._vocab = vocab
        self._vocab_size = vocab_size
        self._compiled = False

    def decode(self, ids: Iterable[int]) -> str:
        listed = self._listed(ids)
        if self._are_few(listed):
            return self._join(listed).decode("utf-8", errors="replace")
        numbers = self._as_array(listed)
        counted = [self._count(step, numbers) for step in _steps(numbers)]
        try:
            return self._text(numbers, counted)
        except (UnicodeDecodeError, SystemError):  # no UTF-8; or a Python that lets nobody write to a new str
            return self._bytes(numbers, counted).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        listed = self._listed(ids)
        if self._are_few(listed):
            return self._join(listed)
        numbers = self._as_array(listed)
        return self._bytes(numbers, [self._count(step, numbers) for step in _steps(numbers)])

    def decode_batch(self, batch: Iterable[Iterable[int]]) -> list[str]:
        texts = []
        for number, ids in enumerate(batch):
            try:
                texts.append(self.decode(ids))
            except UserError as error:
                raise UserError(f"in list {number} of the batch: {error}") from error
        return texts

    # ---------------------------------------------------------------- plain

    def _listed(self, ids: Iterable[int]) -> list[int] | np.ndarray:
        if isinstance(ids, np.ndarray) and ids.ndim == 1 and ids.dtype.kind in "iu":
            return ids
        listed = ids.tolist() if hasattr(ids, "tolist") else ids
        if not isinstance(listed, Iterable):
            raise UserError(f"cannot decode {ids!r}: give a list of ids, or an array or tensor of one dimension")
        return listed if isinstance(listed, list) else list(listed)

    def _are_few(self, ids: list[int] | np.ndarray) -> bool:
        """Whether `ids` are better joined than given to compiled loops."""
        self._compiled = self._compiled or len(ids) > _FIRST
        return len(ids) <= _FEW or not self._compiled

    def _join(self, ids: list[int] | np.ndarray) -> bytes:
        listed = ids if isinstance(ids, list) else ids.tolist()
        try:
            return b"".join(map(self._vocab.__getitem__, listed))
        except (KeyError, TypeError) as error:
            for position, index in enumerate(listed):
                if not isinstance(index, (int, np.integer)) or index not in self._vocab:
                    raise UserError(self._unknown_id(index, position)) from error
            raise

    def _unknown_id(self, index: Any, position: int) -> str:
        """What to say of an id that stands for nothing."""
        where = f"id {index!r} at position {position} is not in the vocabulary"
        if isinstance(index, (int, np.integer)) and 0 <= index < self._vocab_size:
            return f"{where}: no token has it, it is one of {self._vocab_size - len(self._vocab):,} ids left unused"
        return f"{where} of {len(self._vocab)} tokens (0 to {self._vocab_size - 1})"

    # ---------------------------------------------------------------- compiled

    @functools.cached_property
    def _tables(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(pool with room behind it; start and length of each id, packed, −1 for unused ids; its characters, packed with the width
        of the widest: 1, 2, 4 or 8 for 7, 8, 16 or more bits)."""
        lengths = np.zeros(self._vocab_size, np.int64)
        ids = np.fromiter(self._vocab, np.int64, len(self._vocab))
        lengths[ids] = np.fromiter(map(len, self._vocab.values()), np.int64, len(ids))
        starts = np.cumsum(lengths) - lengths
        pool = np.frombuffer(b"".join(self._vocab[index] for index in sorted(self._vocab)) + bytes(16), np.uint8)
        packed = np.full(self._vocab_size, -1, np.int64)
        packed[ids] = (starts[ids] << 24) | lengths[ids]
        token_of = np.repeat(np.arange(self._vocab_size), lengths)
        first = (pool[:-16] & 0xC0) != 0x80  # of a character
        characters = np.bincount(token_of[first], minlength=self._vocab_size).astype(np.uint32) << 4
        width = np.array([1, 2, 4, 8], np.uint32)[np.searchsorted([0xC2, 0xC4, 0xF0], pool[:-16], "right")]
        np.bitwise_or.at(characters, token_of[first], width[first])
        return pool, packed, characters

    def _as_array(self, ids: list[int] | np.ndarray) -> np.ndarray:
        if isinstance(ids, np.ndarray):
            return ids
        from scratchlm.tokenizer.integer_list import read

        array_of = read(ids)
        if array_of is not None:
            return array_of
        try:
            return np.frombuffer(array("I", ids), np.uintc)  # half the time of np.array
        except (TypeError, OverflowError):
            self._join(ids)  # it names the one that is wrong
            return np.array(ids)  # they only behave like integers

    def _count(self, step: tuple[int, np.ndarray], ids: np.ndarray) -> tuple[int, int, int]:
        """(bytes, characters, widths of characters) of a step of `ids`.

        Raises:
            UserError: an id is not in the vocabulary.
        """
        begin, numbers = step
        size, characters, widths = _loops()[0](numbers, *self._tables[1:])
        if size < 0:
            place = begin - 1 - size
            raise UserError(self._unknown_id(ids[place].item(), place))
        return size, characters, widths

    def _bytes(self, ids: np.ndarray, counted: list[tuple[int, int, int]]) -> bytes:
        size = sum(size for size, *_ in counted)
        # A bytes object is made without content and filled before anyone else sees it: one copy less.
        raw = _new_bytes(None, size)
        buffer = _memory(_address(raw), size)
        at = 0
        for _, step in _steps(ids):
            at = self._copy(step, buffer, at)
        return raw

    def _text(self, ids: np.ndarray, counted: list[tuple[int, int, int]]) -> str:
        """Raises: UnicodeDecodeError: these are not the bytes of a text."""
        decode = codecs.getincrementaldecoder("utf-8")(
            "strict"
        ).decode  # keeps a character that the end of a step cuts
        buffer = np.empty(max((size for size, *_ in counted), default=0), np.uint8)
        parts = (decode(buffer[: self._copy(step, buffer, 0)].data) for _, step in _steps(ids))
        characters, widths = sum(number for _, number, _ in counted), 0
        for *_, width in counted:
            widths |= width
        text = _joined(parts, characters, _WIDEST[widths.bit_length()])
        decode(b"", True)
        return text

    def _copy(self, step: np.ndarray, buffer: np.ndarray, at: int) -> int:
        behind = int(_loops()[1](step, *self._tables[:2], buffer, at))
        if behind < 0:
            raise UserError(
                "the ids to decode were changed while they were decoded; give an array that nobody writes to"
            )
        return behind


def _steps(ids: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(place of the first, `_STEP` ids as uint32, the one type that loops are compiled for)."""
    for begin in range(0, len(ids), _STEP):
        step = ids[begin : begin + _STEP]
        if step.dtype.kind == "i":
            step = step.astype(np.int64).view(np.uint64)  # what is negative becomes large
        if step.itemsize > 4:
            step = np.minimum(step, np.uint64(0xFFFFFFFF))  # what is too large stays so: no token has this id
        step = np.ascontiguousarray(step, np.uint32).view()
        step.flags.writeable = False  # to Numba, arrays that may be written to are another type: one is enough
        yield begin, step


# The last character of a width, by the bits of the first byte's class (see `_tables`).
_WIDEST = (0x7F, 0x7F, 0xFF, 0xFFFF, 0x10FFFF)


def _joined(parts: Iterator[str], characters: int, widest: int) -> str:
    """`parts` one behind the other: so many characters, the widest of which needs as much room as `widest`.

    "".join would keep all parts until it begins, in fresh memory; here each is copied while it lies in the cache.
    """
    if characters < 2:  # a str that others may share
        return "".join(parts)
    text = _new_str(characters, widest)
    address, at = id(text), 0
    _ask_for_huge_pages(address, sys.getsizeof(text))
    for part in parts:
        at += _copy_characters(address, at, part, 0, len(part))
    return text


@functools.cache
def _loops() -> tuple[Callable[..., tuple[int, int, int]], Callable[..., int]]:
    """The compiled loops (`token_copy`), ready to run."""
    from scratchlm.tokenizer.compiling import compiling

    with compiling("the decoder"):
        from scratchlm.tokenizer.token_copy import copy_tokens, count

        ids, pool = np.zeros(0, np.uint32), np.frombuffer(b"", np.uint8)
        ids.flags.writeable = False
        count(ids, np.zeros(0, np.int64), np.zeros(0, np.uint32))
        copy_tokens(ids, pool, np.zeros(0, np.int64), np.zeros(0, np.uint8), 0)
    return count, copy_tokens


def _memory(address: int, size: int) -> np.ndarray:
    """The `size` bytes at `address`, to be written to."""
    _ask_for_huge_pages(address, size)
    return np.frombuffer(memoryview((ctypes.c_char * size).from_address(address)).cast("B"), np.uint8)


def _ask_for_huge_pages(address: int, size: int) -> None:
    """For memory that was not touched yet, where the system has them."""
    if size >= HUGE and (advise := _advise()) is not None:
        page = mmap.PAGESIZE
        advise(-(-address // page) * page, size - page, mmap.MADV_HUGEPAGE)


@functools.cache
def _advise() -> Any:
    """`madvise` of the C library; None where there is none, or where it knows no huge pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


_new_bytes = ctypes.pythonapi.PyBytes_FromStringAndSize
_new_bytes.restype = ctypes.py_object
_new_bytes.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t]
_address = ctypes.pythonapi.PyBytes_AsString
_address.restype = ctypes.c_void_p
_address.argtypes = [ctypes.py_object]

_new_str = ctypes.pythonapi.PyUnicode_New
_new_str.restype = ctypes.py_object
_new_str.argtypes = [ctypes.c_ssize_t, ctypes.c_uint32]
# The str to be written to is given as its address: Python allows no second reference to it, not even that of a call.
_copy_characters = ctypes.pythonapi.PyUnicode_CopyCharacters
_copy_characters.restype = ctypes.c_ssize_t
_copy_characters.argtypes = [
    ctypes.c_void_p,
    ctypes.c_ssize_t,
    ctypes.py_object,
    ctypes.c_ssize_t,
    ctypes.c_ssize_t,
]
