"""Ids → bytes → text.

    pool     h e l l o ␣ w o r l d …          all tokens one behind the other
    start    0   2     5 6 …                  token i is pool[start[i] : start[i + 1]]

A few ids are looked up in the vocabulary and joined. Many go through compiled loops: the lengths are summed
and the ids checked; then each token is copied 16 bytes at a time, whatever its length (the next one overwrites
what was too much; only tokens longer than that take a second step).
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Iterable
from typing import Any

import numpy as np

from scratchlm.errors import UserError

# Below, joining is as fast; above, the compiled loops are worth their import.
_FEW = 1 << 9
_FIRST = 1 << 16
# Ids per step: they are brought to one type in a buffer that stays in the cache.
_STEP = 1 << 14


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
        known = self._array(listed)
        if known is None:
            return self._join(listed).decode("utf-8", errors="replace")
        buffer = np.empty(self._size(known) + 16, np.uint8)
        size = self._copy(known, buffer)
        return str(buffer[:size].data, "utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        listed = self._listed(ids)
        known = self._array(listed)
        if known is None:
            return self._join(listed)
        size = self._size(known)
        # A bytes object is made without content and filled before anyone else sees it: one copy less.
        raw = _new_bytes(None, size)
        buffer = np.frombuffer(memoryview((ctypes.c_char * size).from_address(_address(raw))).cast("B"), np.uint8)
        self._copy(known, buffer)
        return raw

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

    def _array(self, ids: list[int] | np.ndarray) -> np.ndarray | None:
        """`ids` for the compiled loops; None if they are few, or not all of them integers: they are joined."""
        self._compiled = self._compiled or len(ids) > _FIRST
        if len(ids) <= _FEW or not self._compiled:
            return None
        if isinstance(ids, np.ndarray):
            return ids
        try:
            return np.frombuffer(array("I", ids), np.uintc)  # half the time of np.array
        except (TypeError, OverflowError):
            return None

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
    def _tables(self) -> tuple[np.ndarray, np.ndarray]:
        """(pool with room behind it, start and length of each id, packed; −1 for unused ids)."""
        lengths = np.zeros(self._vocab_size, np.int64)
        ids = np.fromiter(self._vocab, np.int64, len(self._vocab))
        lengths[ids] = np.fromiter(map(len, self._vocab.values()), np.int64, len(ids))
        starts = np.cumsum(lengths) - lengths
        pool = b"".join(self._vocab[index] for index in sorted(self._vocab)) + bytes(16)
        packed = np.full(self._vocab_size, -1, np.int64)
        packed[ids] = (starts[ids] << 24) | lengths[ids]
        return np.frombuffer(pool, np.uint8), packed

    def _size(self, ids: np.ndarray) -> int:
        """Bytes in all.

        Raises:
            UserError: an id is not in the vocabulary.
        """
        from scratchlm.tokenizer.compiling import compiling
        from scratchlm.tokenizer.token_copy import total_length

        total = 0
        with compiling("the decoder"):
            for begin in range(0, len(ids), _STEP):
                step = self._step(ids, begin)
                size = total_length(step, self._tables[1])
                if size < 0:
                    place = begin - 1 - size
                    raise UserError(self._unknown_id(ids[place].item(), place))
                total += size
        return total

    def _copy(self, ids: np.ndarray, buffer: np.ndarray) -> int:
        from scratchlm.tokenizer.token_copy import copy_tokens

        at = 0
        for begin in range(0, len(ids), _STEP):
            at = copy_tokens(self._step(ids, begin), *self._tables, buffer, at)
        return at

    def _step(self, ids: np.ndarray, begin: int) -> np.ndarray:
        step = ids[begin : begin + _STEP]
        if step.dtype == np.uint64:  # what would be negative is out of range anyway
            step = np.minimum(step, np.uint64(1 << 62))
        step = step.astype(np.int64, copy=False).view()
        step.flags.writeable = False  # to Numba, arrays that may be written to are another type: one is enough
        return step


_new_bytes = ctypes.pythonapi.PyBytes_FromStringAndSize
_new_bytes.restype = ctypes.py_object
_new_bytes.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t]
_address = ctypes.pythonapi.PyBytes_AsString
_address.restype = ctypes.c_void_p
_address.argtypes = [ctypes.py_object]
