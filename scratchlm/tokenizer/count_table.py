"""Distinct words and how often each occurs: a hash table on flat arrays, filled by compiled loops.

    spans ──► key of 16 bytes ──hash──► slots ──► rows, in order of first appearance

    word          low              high                          slots     rows: low, high, count
    ␣the          20 74 68 65      0 … 0 | 4                     ┌───┐
    16 bytes      hash of          place in      | 255           │ 1 ├──┐  0  ␣the  | 4    812
    or more       all bytes        the arena                     │ - │  └► 1  low   | 3      5
                                                                 │ 0 ├──►  …
    arena         length (8 bytes), bytes │ length, bytes │ …    └───┘

Words of up to 15 bytes, nearly all, are their own key, so that finding one compares two numbers. Frequent words come
early in a text, hence their rows lie side by side. Keys and slots are computed for some hundred words ahead, so that the
processor waits for several cache lines at once.
"""

from __future__ import annotations

import numpy as np

from scratchlm.tokenizer.counting import WordCounts
from scratchlm.tokenizer.machine_words import load64, outer, part

PAD = 16
"""Bytes behind the last word that a buffer must have: keys are read eight bytes at a time."""

_AHEAD = 256
_NONE, _ONE = np.uint64(0), np.uint64(1)
_LONG = np.uint64(255) << np.uint64(56)
_MIX, _MIX_HIGH, _MIX_LAST = (
    np.uint64(number) for number in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0xD6E8FEB86659FD93)
)
# Of the first, and of the second eight bytes from where a word begins, by its length: those that belong to it.
_FIRST = np.array([(1 << (8 * min(length, 8))) - 1 for length in range(16)], np.uint64)
_SECOND = np.array([(1 << (8 * max(length - 8, 0))) - 1 for length in range(16)], np.uint64)


@part
def _hash(low, high):
    mixed = low * _MIX + high * _MIX_HIGH
    mixed ^= mixed >> np.uint64(32)
    mixed *= _MIX_LAST
    return np.int64(mixed >> np.uint64(20))


@part
def _long_key(data, begin, size):
    """A hash of all bytes of a long word, for `low`."""
    mixed = np.uint64(size) * _MIX
    at = begin
    while at + 8 <= begin + size:
        mixed = (mixed ^ load64(data, at)) * _MIX_HIGH
        mixed ^= mixed >> np.uint64(29)
        at += 8
    if at < begin + size:
        mixed = (mixed ^ (load64(data, at) & _FIRST[begin + size - at])) * _MIX_HIGH
        mixed ^= mixed >> np.uint64(29)
    return mixed


@part
def _slot(slots, rows, low, high, slot):
    """Where a short word is, or may be put."""
    mask = len(slots) - 1
    while slots[slot] >= 0 and (rows[slots[slot], 0] != low or rows[slots[slot], 1] != high):
        slot = (slot + 1) & mask
    return slot


@part
def _long_slot(slots, rows, arena, low, data, begin, size):
    """Where a long word is, or may be put."""
    mask = len(slots) - 1
    slot = _hash(low, _LONG) & mask
    while slots[slot] >= 0:
        row = slots[slot]
        if rows[row, 0] == low and rows[row, 1] >= _LONG:
            at = np.int64(rows[row, 1] ^ _LONG)
            if np.int64(load64(arena, at)) == size:
                at += 8
                same = 0
                while same < size and arena[at + same] == data[begin + same]:
                    same += 1
                if same == size:
                    return slot
        slot = (slot + 1) & mask
    return slot


@part
def _keep(arena, at, data, begin, size):
    """Write a long word to the arena; returns its end there."""
    for byte in range(8):
        arena[at + byte] = np.uint8((size >> (8 * byte)) & 255)
    at += 8
    for byte in range(size):
        arena[at + byte] = data[begin + byte]
    return at + size


@outer
def _add(data, spans, begin, end, longest, slots, rows, arena, used):
    """Count ``spans[begin:end]``. Returns where it stopped: at `end`, or at a long word for which the arena has no room.

    used: rows, bytes of the arena, words left out as too long, their bytes. There must be room for end - begin rows.
    """
    lows, highs = np.empty(_AHEAD, np.uint64), np.empty(_AHEAD, np.uint64)
    homes = np.empty(_AHEAD, np.int64)
    mask = len(slots) - 1
    while begin < end:
        ahead = min(_AHEAD, end - begin)
        for index in range(ahead):
            at = spans[begin + index, 0]
            size = spans[begin + index, 1] - at
            if at < 0 or size > 15:
                size = 0
                at = 0
            low = load64(data, at) & _FIRST[size]
            high = load64(data, at + 8) & _SECOND[size] | np.uint64(size) << np.uint64(56)
            lows[index], highs[index] = low, high
            homes[index] = _hash(low, high) & mask
        for index in range(ahead):
            low, high, home = lows[index], highs[index], homes[index]
            if high != np.uint64(0):  # short
                row = slots[home]
                if row >= 0 and rows[row, 0] == low and rows[row, 1] == high:
                    rows[row, 2] += _ONE
                    continue
            at = spans[begin + index, 0]
            size = spans[begin + index, 1] - at
            if at < 0 or size == 0:  # the end of a region
                continue
            if size > longest:
                used[2] += 1
                used[3] += size
                continue
            if size < 16:
                slot = _slot(slots, rows, low, high, home)
            else:
                low = _long_key(data, at, size)
                slot = _long_slot(slots, rows, arena, low, data, at, size)
                if slots[slot] < 0:
                    if used[1] + size + 8 > len(arena):
                        return begin + index
                    high = _LONG | np.uint64(used[1])
                    used[1] = _keep(arena, used[1], data, at, size)
            if slots[slot] < 0:
                row = used[0]
                slots[slot] = row
                rows[row, 0], rows[row, 1], rows[row, 2] = low, high, np.uint64(0)
                used[0] = row + 1
            rows[slots[slot], 2] += _ONE
        begin += ahead
    return end


@outer
def _rehash(slots, rows, number):
    mask = len(slots) - 1
    for slot in range(len(slots)):
        slots[slot] = -1
    for row in range(number):
        high = rows[row, 1]
        slot = _hash(rows[row, 0], min(high, _LONG)) & mask
        while slots[slot] >= 0:
            slot = (slot + 1) & mask
        slots[slot] = row


@outer
def _absorb(other_rows, number, other_arena, slots, rows, arena, used):
    """Add the counts of another table, for which there must be room."""
    for other in range(number):
        low, high = other_rows[other, 0], other_rows[other, 1]
        if high < _LONG:
            slot = _slot(slots, rows, low, high, _hash(low, high) & (len(slots) - 1))
        else:
            at = np.int64(high ^ _LONG)
            size = np.int64(load64(other_arena, at))
            slot = _long_slot(slots, rows, arena, low, other_arena, at + 8, size)
            if slots[slot] < 0:
                high = _LONG | np.uint64(used[1])
                used[1] = _keep(arena, used[1], other_arena, at + 8, size)
        if slots[slot] < 0:
            row = used[0]
            slots[slot] = row
            rows[row, 0], rows[row, 1], rows[row, 2] = low, high, np.uint64(0)
            used[0] = row + 1
        rows[slots[slot], 2] += other_rows[other, 2]


@outer
def _unpack(rows, number, arena, text, ends, counts):
    """Write the words behind each other; with an empty `text` only add up their sizes. Returns the size."""
    end = np.int64(0)
    for row in range(number):
        low, high = rows[row, 0], rows[row, 1]
        is_long = high >= _LONG
        at = np.int64((high ^ _LONG) if is_long else _NONE)
        size = np.int64(load64(arena, at) if is_long else high >> np.uint64(56))
        if len(text) > 0:
            for byte in range(size):
                if is_long:
                    text[end + byte] = arena[at + 8 + byte]
                elif byte < 8:
                    text[end + byte] = np.uint8((low >> np.uint64(8 * byte)) & np.uint64(255))
                else:
                    text[end + byte] = np.uint8((high >> np.uint64(8 * (byte - 8))) & np.uint64(255))
            ends[row] = end + size
            counts[row] = np.int64(rows[row, 2])
        end += size
    return end


def _grown(array: np.ndarray, room: int) -> np.ndarray:
    longer = np.empty((room, *array.shape[1:]), array.dtype)
    longer[: len(array)] = array
    return longer


class CountTable:
    """Counts of words.

    Args:
        longest: words of more bytes are left out (and counted in ``left_out``).
    """

    def __init__(self, longest: int = 2**62) -> None:
        self._longest = longest
        self._slots = np.full(1 << 14, -1, np.int32)
        self._rows = np.empty((1 << 13, 3), np.uint64)
        self._arena = np.empty(1 << 16, np.uint8)
        self._used = np.zeros(4, np.int64)

    @property
    def left_out(self) -> tuple[int, int]:
        """Words longer than `longest`, and their bytes."""
        return int(self._used[2]), int(self._used[3])

    def add(self, data: np.ndarray, spans: np.ndarray, number: int) -> None:
        """Count the first `number` rows of `spans`.

        Args:
            data: uint8, with ``PAD`` bytes behind the last word.
            spans: int64, shape (capacity, 2), begin and end of each word; rows with a negative begin are passed over.
        """
        self._make_room(number)
        done = 0
        while True:
            done = _add(data, spans, done, number, self._longest, self._slots, self._rows, self._arena, self._used)
            if done == number:
                return
            size = int(spans[done, 1] - spans[done, 0])
            self._arena = _grown(self._arena, 2 * len(self._arena) + size + 8)

    def absorb(self, other: CountTable) -> None:
        """Add the counts of `other`."""
        number, size = int(other._used[0]), int(other._used[1])
        self._make_room(number)
        if self._used[1] + size > len(self._arena):
            self._arena = _grown(self._arena, int(self._used[1]) + size)
        _absorb(other._rows, number, other._arena, self._slots, self._rows, self._arena, self._used)
        self._used[2:] += other._used[2:]

    def words(self) -> WordCounts:
        """The words in order of first appearance, and their counts."""
        number = int(self._used[0])
        ends, counts = np.empty(number, np.int64), np.empty(number, np.int64)
        size = _unpack(self._rows, number, self._arena, np.empty(0, np.uint8), ends, counts)
        text = np.empty(size, np.uint8)
        _unpack(self._rows, number, self._arena, text, ends, counts)
        return WordCounts(text, ends, counts)

    def _make_room(self, more: int) -> None:
        needed = int(self._used[0]) + more
        if needed > len(self._rows):
            self._rows = _grown(self._rows, max(needed, 2 * len(self._rows)))
        if 2 * needed > len(self._slots):
            slots = len(self._slots)
            while 2 * needed > slots:
                slots *= 2
            self._slots = np.empty(slots, np.int32)
            _rehash(self._slots, self._rows, int(self._used[0]))
