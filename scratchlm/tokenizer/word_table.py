"""The word table: pre-tokens → ids at a few nanoseconds each, in memory that does not grow.

A row is 32 bytes, two to a cache line. Words of up to 15 bytes are their own key, up to seven ids lie in the row itself:

    row     bytes 0 … 7 │ bytes 8 … 14, length │ id id id id │ id id id, count     uint16 ids
            bytes 0 … 7 │ bytes 8 … 14, length │ id id       │ id, count           uint32 ids
            hash        │ length, 16 on top    │ place in ring │ number, count 0   16 bytes or more
            bytes 0 … 7 │ bytes 8 … 14, length │ place in ring │ number, count 0   more ids than fit

    ring    … │ word, ids │ ids │ word, ids │ ▓▓▓ oldest is overwritten ▓▓▓ │ …

Pre-tokens come in batches of 256. First all keys are made, without a branch, and their rows asked for (`prefetch`); then
all rows are read, by then in the cache: two comparisons, two stores of 8 bytes, and the count moves the
output on (what was stored too far is overwritten by the next word). Anything else goes the slow way: the row may be one of the
next seven; or the word is new, is merged, and takes a free row among these eight or replaces one, each in its turn.
So the table is bounded, is never emptied, and wrong ids cannot come of it: a row counts only with its
whole key, and a place in the ring only while nothing was written over it.

One table belongs to one thread at a time.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

import numpy as np

from scratchlm.errors import UserError
from scratchlm.tokenizer.machine_words import U, inner, load64, lowest_bit, outer, prefetch, stamp, store64
from scratchlm.tokenizer.merge_table import SHORT, MergeTable, empty_lists, merge_long, merge_short, scratch_size
from scratchlm.tokenizer.scanner_blocks import borrowed

_ONE, _NONE = U(1), U(0)
_BATCH = 256
_WINDOW = 8
_ROW = 32
# Longer pre-tokens are merged anew each time: few come twice, and they would fill the ring.
MOST_CACHED = 128
# Addresses in working memory are int32.
LONGEST = 1 << 29
# Room that `encode_spans` wants behind the last id it may write.
SLACK = 16

_MASK_LOW = np.array([(1 << 8 * min(length, 8)) - 1 for length in range(17)], np.uint64)
_MASK_HIGH = np.array([(1 << 8 * max(length - 8, 0)) - 1 for length in range(16)] + [0], np.uint64)
_LONG = U(16 << 56)
_MIX, _STIR, _TOP = U(0x9E3779B97F4A7C15), U(0xC2B2AE3D27D4EB4F), U(36)

# Places in the state of a table.
_IDS, _RING, _TURN, _REGION, _NEED, _FILLED = range(6)
_NO_MARKS = np.zeros(0, np.int64)


def private_pages(size: int) -> np.ndarray:
    """`size` zero bytes that take memory only where they are touched, in huge pages where the system has them."""
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE") and size >= 1 << 22:
        pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, np.uint8)


@inner
def _hash_long(data, begin, length):
    value = U(length) * _STIR
    for offset in range(0, length - 8, 8):
        value = (value ^ load64(data, begin + offset)) * _MIX
        value ^= value >> U(32)
    value = (value ^ load64(data, begin + length - 8)) * _MIX
    return value ^ (value >> U(29))


@inner
def _same(data, begin, ring, place, length):
    for offset in range(0, length - 8, 8):
        if load64(data, begin + offset) != load64(ring, place + offset):
            return False
    return load64(data, begin + length - 8) == load64(ring, place + length - 8)


@inner
def _slot(low, high):
    value = low ^ (high * _STIR)
    value ^= value >> U(29)
    return (value * _MIX) >> _TOP


@inner
def _whole_word(data, begin, length, low, high, whole, pool):
    """Id of the token that is this very word, or -1. Rows of `whole`: key as in the table, id + 1, place in `pool`."""
    mask = U((len(whole) >> 2) - 1)
    slot = _slot(low, high) & mask
    while True:
        row = slot << U(2)
        if whole[row + U(2)] == _NONE:
            return -1
        if (
            whole[row] == low
            and whole[row + _ONE] == high
            and (length < 16 or _same(data, begin, pool, np.int64(whole[row + U(3)]), length))
        ):
            return np.int64(whole[row + U(2)]) - 1
        slot = (slot + _ONE) & mask


@inner
def _slow(
    data,
    begin,
    length,
    low,
    high,
    home,
    rows,
    ring,
    pairs,
    small,
    heads,
    bits,
    scratch,
    tokens,
    keys,
    whole,
    pool,
    out,
    n,
    state,
):
    """One word whose home row does not answer: find its row, or merge it and give it one. Returns the new `n`."""
    size = out.itemsize
    mask = U((len(rows) >> 2) - 1)
    chosen, free = U(0), False
    for step in range(_WINDOW):
        row = ((home + U(step)) & mask) << U(2)
        if rows[row] == low and rows[row + _ONE] == high:
            last = rows[row + U(3)]
            if last >> U(64 - 8 * size) != _NONE:
                store64(out, n * size, rows[row + U(2)])
                store64(out, n * size + 8, last)
                return n + np.int64(last >> U(64 - 8 * size))
            start = np.int64(rows[row + U(2)])
            if state[_RING] <= start + len(ring) - 64:
                place = start & (len(ring) - 1)
                if length < 16 or _same(data, begin, ring, place, length):
                    if length >= 16:
                        place += (length + 7) & ~7
                    count = np.int64(last)
                    for offset in range(0, count * size, 8):
                        store64(out, n * size + offset, load64(ring, place + offset))
                    return n + count
            chosen, free = row, True  # overwritten since, or another word with this hash: this one takes its row
            break
        if not free and rows[row + _ONE] == _NONE:
            chosen, free = row, True
            state[_FILLED] += 1
            break
    before = n
    known = np.int64(-1)
    if len(whole) > 4:
        known = _whole_word(data, begin, length, low, high, whole, pool)
    if known >= 0:
        out[n] = known
        n += 1
    elif length <= SHORT:
        alive = merge_short(data, begin, length, pairs, small, tokens, keys)
        while alive != _NONE:
            out[n] = tokens[lowest_bit(alive)]
            n += 1
            alive &= alive - _ONE
    else:
        n = merge_long(data, begin, length, pairs, small, heads, bits, scratch, out, n)
    if length > MOST_CACHED:
        return n
    if not free:
        chosen = ((home + U(state[_TURN] & (_WINDOW - 1))) & mask) << U(2)
        state[_TURN] += 1
    count = n - before
    rows[chosen], rows[chosen + _ONE] = low, high
    if length < 16 and count * size <= 16 - size:
        for index in range(count, 8 if size == 2 else 4):
            out[before + index] = 0
        rows[chosen + U(2)] = load64(out, before * size)
        rows[chosen + U(3)] = load64(out, before * size + 8) | (U(count) << U(64 - 8 * size))
        return n
    word = (length + 7) & ~7 if length >= 16 else 0
    start = state[_RING]
    if (start & (len(ring) - 1)) + word + count * size + 16 > len(ring):
        start = (start | (len(ring) - 1)) + 1
    place = start & (len(ring) - 1)
    for offset in range(0, word - 8, 8):
        store64(ring, place + offset, load64(data, begin + offset))
    if word > 0:
        store64(ring, place + length - 8, load64(data, begin + length - 8))
    for offset in range(0, count * size, 8):
        store64(ring, place + word + offset, load64(out, before * size + offset))
    state[_RING] = start + word + ((count * size + 7) & ~7)
    rows[chosen + U(2)], rows[chosen + U(3)] = U(start), U(count)
    return n


def _loop(sources: int) -> Callable[..., Any]:
    def encode_spans(
        data,
        tail,
        spans,
        first,
        end,
        rows,
        ring,
        pairs,
        small,
        heads,
        bits,
        scratch,
        whole,
        pool,
        out,
        marks,
        state,
    ):
        """Ids of ``spans[first:end]`` to `out`; returns how many spans are done (see `WordTable.encode`)."""
        owned_32, owned_64 = np.empty(128, np.uint32), np.empty(3 * _BATCH, np.uint64)
        tokens, keys = borrowed(owned_32[:64]), borrowed(owned_32[64:])
        lows, highs = borrowed(owned_64[:_BATCH]), borrowed(owned_64[_BATCH : 2 * _BATCH])
        homes = borrowed(owned_64[2 * _BATCH :])
        data, tail, spans, rows, ring = (
            borrowed(data),
            borrowed(tail),
            borrowed(spans),
            borrowed(rows),
            borrowed(ring),
        )
        pairs, small, heads, bits = borrowed(pairs), borrowed(small), borrowed(heads), borrowed(bits)
        scratch, whole, pool = borrowed(scratch), borrowed(whole), borrowed(pool)
        out, marks, state = borrowed(out), borrowed(marks), borrowed(state)
        size = out.itemsize
        mask = U((len(rows) >> 2) - 1)
        n = state[_IDS]
        safe = len(data) - 16 if sources > 0 else 0
        while first < end:
            batch = min(end - first, _BATCH)
            text = 0
            for index in range(batch):
                begin = spans[first + index, 0]
                if begin < 0:  # the end of a region
                    lows[index], highs[index] = U(spans[first + index, 1] + 1), _NONE
                    homes[index] = _NONE
                    text += 1
                    continue
                length = spans[first + index, 1] - begin
                text += length
                if length < 16:
                    if begin <= safe:
                        low, high = load64(data, begin), load64(data, begin + 8)
                    else:
                        low, high = load64(tail, begin - safe), load64(tail, begin - safe + 8)
                    low &= _MASK_LOW[length]
                    high = (high & _MASK_HIGH[length]) | (U(length) << U(56))
                else:
                    low, high = _hash_long(data, begin, length), _LONG | U(length)
                home = _slot(low, high) & mask
                prefetch(rows, np.int64(home << U(5)))
                lows[index], highs[index], homes[index] = low, high, home
            if n + text + SLACK > len(out):
                state[_NEED] = text
                break
            index = 0
            while index < batch:
                low, high, home = lows[index], highs[index], homes[index]
                row = home << U(2)
                if (rows[row] ^ low) | (rows[row + _ONE] ^ high) == _NONE:
                    last = rows[row + U(3)]
                    count = np.int64(last >> U(64 - 8 * size))
                    if count != 0:
                        store64(out, n * size, rows[row + U(2)])
                        store64(out, n * size + 8, last)
                        n += count
                        index += 1
                        continue
                if high == _NONE:
                    if low != _NONE:
                        out[n] = low - _ONE
                        n += 1
                    if len(marks) > 0:
                        marks[state[_REGION]] = n
                    state[_REGION] += 1
                else:
                    begin = spans[first + index, 0]
                    length = spans[first + index, 1] - begin
                    if length > SHORT and len(scratch) < scratch_need(length, len(heads) - 1):
                        break
                    n = _slow(
                        data, begin, length, low, high, home, rows, ring, pairs, small, heads, bits, scratch, tokens,
                        keys, whole, pool, out, n, state,
                    )  # fmt: skip
                index += 1
            first += index
            if index < batch:
                state[_NEED] = -(spans[first, 1] - spans[first, 0])
                break
        state[_IDS] = n
        owned_32[0], owned_64[0] = 0, 0  # they live until here
        return first

    return encode_spans


scratch_need = inner(scratch_size)
encode_spans = outer(_loop(stamp("merge_table.py", "scanner_blocks.py")))


def _fill(sources: int) -> Callable[..., Any]:
    def fill_whole(pool, starts, ids, whole):
        mask = U((len(whole) >> 2) - 1)
        for index in range(len(ids) if sources > 0 else 0):
            begin, length = starts[index], starts[index + 1] - starts[index]
            if length < 16:
                low = load64(pool, begin) & _MASK_LOW[length]
                high = (load64(pool, begin + 8) & _MASK_HIGH[length]) | (U(length) << U(56))
            else:
                low, high = _hash_long(pool, begin, length), _LONG | U(length)
            slot = _slot(low, high) & mask
            while whole[(slot << U(2)) + U(2)] != _NONE:
                slot = (slot + _ONE) & mask
            row = slot << U(2)
            whole[row], whole[row + _ONE] = low, high
            whole[row + U(2)], whole[row + U(3)] = U(ids[index] + 1), U(begin)

    return fill_whole


_fill_whole = outer(_fill(stamp()))


def whole_words(tokens: dict[bytes, int]) -> tuple[np.ndarray, np.ndarray]:
    """(rows, pool): a table of byte strings that become one id each, for `ignore_merges`."""
    pool = np.frombuffer(b"".join(tokens) + bytes(16), np.uint8)
    starts = np.zeros(len(tokens) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, tokens), np.int64, len(tokens)), out=starts[1:])
    whole = np.zeros(4 << (2 * len(tokens)).bit_length(), np.uint64)
    _fill_whole(pool, starts, np.fromiter(tokens.values(), np.int64, len(tokens)), whole)
    return whole, pool


class WordTable:
    """The working memory of one thread: table, ring, and what merging needs.

    Args:
        merges: what to apply.
        whole: rows and bytes of tokens that are taken whole (:func:`whole_words`), or None.
    """

    def __init__(self, merges: MergeTable, whole: tuple[np.ndarray, np.ndarray] | None) -> None:
        self._merges = merges
        self._whole = whole or (np.zeros(4, np.uint64), np.frombuffer(bytes(16), np.uint8))
        self._heads, self._bits = empty_lists(merges.merges)
        self._scratch = np.empty(scratch_size(1024, merges.merges), np.int32)
        self._state = np.zeros(6, np.int64)
        self._rows = np.zeros(0, np.uint64)
        self._ring = np.zeros(0, np.uint8)
        self._marks = _NO_MARKS

    @property
    def bytes(self) -> int:
        """Most memory that table and ring take."""
        return self._rows.nbytes + self._ring.nbytes

    def make_room(self, text: int, most: int) -> None:
        """Grow to what suits `text` more bytes, or fourfold when three quarters full; within `most` bytes. A table that grows
        starts afresh."""
        rows = 1 << max(6, (most // 2 // _ROW).bit_length() - 1)
        filled = 4 * int(self._state[_FILLED]) > 3 * (len(self._rows) >> 2)
        rows = min(rows, max(1 << max(12, (text // 96).bit_length()), len(self._rows) if filled else 0))
        if rows * _ROW > self._rows.nbytes:
            self._rows = private_pages(rows * _ROW).view(np.uint64)
            self._ring = private_pages(max(rows * _ROW, 1 << 14))
            self._state[:] = 0

    def start(self, marks: np.ndarray | None) -> None:
        """Before a text: region i of it will leave the number of ids behind it in ``marks[i]``."""
        self._state[_REGION] = 0
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
        state = self._state
        state[_IDS] = n
        while True:
            state[_NEED] = 0
            first = encode_spans(
                data, tail, spans, first, end, self._rows, self._ring, self._merges.pairs, self._merges.small,
                self._heads, self._bits, self._scratch, *self._whole, ids, self._marks, state,
            )  # fmt: skip
            need = int(state[_NEED])
            if need >= 0:
                return first, int(state[_IDS]), need + SLACK
            if -need > LONGEST:
                raise UserError(f"a pre-token of {-need:,} bytes is too long; the longest may have {LONGEST:,}")
            self._scratch = np.empty(scratch_size(-need, self._merges.merges), np.int32)
