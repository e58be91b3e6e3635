"""The word table of one thread: memory that is bounded, and grows with the words it meets.

**A table grows with the words it meets**: when half of its rows are taken it becomes twice as large and keeps what it knows, up to a
limit; from there on new words take the places of old ones. So small texts touch little memory, and a long one is never
encoded with a table too small for its words. Wrong ids cannot come of any of this: a row counts only with its
whole key, and a place in the ring only while nothing was written over it.

    text ──► scanner ──► spans ──► rows (`word_rows`) ──► ids
                                     │  ▲
                              wants ─┘  └─ room for ids, more rows or ring, working memory, one long word merged

One table belongs to one thread at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from scratchlm.errors import UserError
from scratchlm.tokenizer.buffers import private_pages
from scratchlm.tokenizer.merge_table import SHORT, MergeTable, empty_lists, merge_long, scratch_size
from scratchlm.tokenizer.word_rows import (
    AMOUNT,
    FILLED,
    IDS,
    LIMIT,
    REGION,
    ROOM,
    ROW,
    WANTED,
    WANTS_LONG_WORD,
    WANTS_RING,
    WANTS_ROOM,
    WANTS_ROWS,
    WANTS_SCRATCH,
    WORK,
    WRAPS,
    copy_rows,
    encode_spans,
)

if TYPE_CHECKING:
    from scratchlm.tokenizer.scanner import Scanner

_FEWEST = 1 << 12  # rows of a new table
# Addresses in working memory are int32.
LONGEST = 1 << 29
_NO_MARKS = np.zeros(0, np.int64)


def _zeros(size: int, at_once: bool = False) -> np.ndarray:
    return np.frombuffer(private_pages(size, at_once), np.uint8)


class Room(Protocol):
    """Where ids are written to."""

    array: np.ndarray
    n: int

    def reserve(self, more: int) -> None: ...


class WordTable:
    """The working memory of one thread: table, ring, and what merging needs.

    Args:
        merges: what to apply.
        whole: rows and bytes of tokens that are taken whole (:func:`whole_words`), or None.
        most: bytes that table and ring may have.
    """

    def __init__(self, merges: MergeTable, whole: tuple[np.ndarray, np.ndarray] | None, most: int) -> None:
        self._merges = merges
        self._whole = whole or (np.zeros(4, np.uint64), np.frombuffer(bytes(16), np.uint8))
        self._heads, self._bits = empty_lists(merges.merges)
        self._scratch = np.empty(scratch_size(1024, merges.merges), np.int32)
        self._work = np.empty(WORK >> 3, np.uint64)
        self._tokens, self._keys = np.empty(SHORT, np.uint32), np.empty(SHORT, np.uint32)
        self._state = np.zeros(9, np.int64)
        self._marks = _NO_MARKS
        self._entries: dict[tuple[str, np.dtype], tuple[int, int]] = {}  # of scanner and `encode_spans`
        # Sizes are powers of two.
        self._most_rows = max(1 << 6, 1 << (max(most // 2 // ROW, 1).bit_length() - 1))
        self._most_ring = max(1 << 14, self._most_rows * ROW)
        self._rows = np.zeros(0, np.uint64)
        self._ring = _zeros(1 << 14)
        self._more_rows(min(_FEWEST, self._most_rows))
        self._state[WRAPS] = len(self._ring) == self._most_ring

    @property
    def bytes(self) -> int:
        """Most memory that table and ring take."""
        return self._rows.nbytes + self._ring.nbytes

    def _more_rows(self, rows: int) -> None:
        larger = _zeros(rows * ROW, at_once=True).view(np.uint64)
        self._state[FILLED] = copy_rows(self._rows, larger) if len(self._rows) else 0
        self._rows = larger
        self._state[LIMIT] = rows // 2 if rows < self._most_rows else rows + 1

    def _more_ring(self) -> None:
        larger = _zeros(2 * len(self._ring))
        larger[: len(self._ring)] = self._ring
        self._ring = larger
        self._state[WRAPS] = len(larger) == self._most_ring

    def start(self, marks: np.ndarray | None) -> None:
        """Before a text: region i of it will leave the number of ids behind it in ``marks[i]``."""
        self._state[REGION] = 0
        self._marks = _NO_MARKS if marks is None else marks

    def encode(
        self, data: np.ndarray, tail: np.ndarray, spans: np.ndarray, first: int, end: int, ids: np.ndarray, n: int
    ) -> tuple[int, int, int]:
        """Ids of ``spans[first:end]`` (rows as the scanner leaves them) into ``ids[n:]``.

        Args:
            data: uint8, read-only; spans are places in it.
            tail: its last 16 bytes, at 0 to 15 of 64 (zeros before them where there are fewer).

        Returns:
            (spans done, ids written, room wanted): when not all are done, `ids` wants so much room behind them.
        """
        self._state[IDS] = n
        while True:
            first = encode_spans(*self._arguments(data, tail, spans, first, end, ids))
            first, room = self._answer(data, spans, first, ids)
            if first == end or room:
                return first, int(self._state[IDS]), room

    def encode_text(
        self,
        scanner: Scanner,
        data: np.ndarray,
        tail: np.ndarray,
        regions: np.ndarray,
        spans: np.ndarray,
        ids: Room,
    ) -> None:
        """Append the ids of `regions` to `ids`; `spans` are working memory. As scanning and :meth:`encode` in turn, in one compiled loop."""
        from scratchlm.tokenizer.text_loop import entry, text_loop

        state = self._state
        state[IDS] = ids.n
        # What `_entries` were compiled for: they are called by address, which nobody checks.
        assert regions.flags.c_contiguous and spans.flags.c_contiguous and not data.flags.writeable
        cursor = np.array([0, regions[0, 0]], np.int64)
        scan = scanner.arguments(data)
        kinds = scanner.name, ids.array.dtype
        if kinds not in self._entries:
            self._entries[kinds] = (
                entry(scanner.compiled, scan(regions[:0], cursor, spans)),
                entry(encode_spans, self._arguments(data, tail, spans, 0, 0, ids.array)),
            )
        starting, table = self._entries[kinds]
        first = count = 0
        while True:
            _, _, _, _, *scanning = scan(regions, cursor, spans)
            words = self._arguments(data, tail, spans, 0, 0, ids.array)
            first, count = text_loop(
                starting, regions, cursor, *scanning, table, *words[:3], *words[5:], first, count
            )  # fmt: skip
            if count == 0:
                if cursor[0] == len(regions):
                    break
                count = scanner.by_reference(data, regions, cursor, spans)
                continue
            first, room = self._answer(data, spans, first, ids.array)
            ids.n = int(state[IDS])
            if room:
                ids.reserve(room)
        ids.n = int(state[IDS])

    def _arguments(
        self, data: np.ndarray, tail: np.ndarray, spans: np.ndarray, first: int, end: int, ids: np.ndarray
    ) -> tuple[Any, ...]:
        """Of `encode_spans`."""
        return (
            data, tail, spans, first, end, self._rows, self._ring, self._merges.pairs, self._merges.small, self._heads, self._bits,
            self._scratch, self._work, self._tokens, self._keys, *self._whole, ids, self._marks, self._state, merge_long.address(),
        )  # fmt: skip

    def _answer(self, data: np.ndarray, spans: np.ndarray, first: int, ids: np.ndarray) -> tuple[int, int]:
        """Give the compiled loop what it stopped for before span `first`. Returns where to go on, and room wanted behind the ids (0: none)."""
        state = self._state
        wanted, amount = int(state[WANTED]), int(state[AMOUNT])
        state[AMOUNT] = 0
        if wanted == WANTS_ROOM:
            return first, amount + ROOM
        if wanted == WANTS_ROWS:
            self._more_rows(2 * (len(self._rows) >> 2))
        elif wanted == WANTS_RING:
            self._more_ring()
        elif wanted == WANTS_LONG_WORD:
            begin, behind = spans[first].tolist()
            if len(self._whole[0]) == 4 and not merge_long.address(behind - begin):
                word = self._merges.plain(data[begin:behind].tobytes())
                n = int(state[IDS])
                ids[n : n + len(word)] = word
                state[IDS] = n + len(word)
                return first + 1, 0
            merge_long.address(at_once=True)
        elif wanted == WANTS_SCRATCH:
            if amount > LONGEST:
                raise UserError(f"a pre-token of {amount:,} bytes is too long; the longest may have {LONGEST:,}")
            self._scratch = np.empty(scratch_size(amount, self._merges.merges), np.int32)
        return first, 0
