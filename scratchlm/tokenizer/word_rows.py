"""The rows of a word table: pre-tokens → ids at a few nanoseconds each, compiled.

A row is 32 bytes, two to a cache line. Words of up to 15 bytes are their own key, up to seven ids lie in the row itself:

    row     bytes 0 … 7 │ bytes 8 … 14, length │ id id id id │ id id id, size     uint16 ids; their size in bytes
            bytes 0 … 7 │ bytes 8 … 14, length │ id id       │ id, size           uint32 ids
            hash        │ length, 16 on top    │ place in ring │ number, size 0   16 bytes or more
            bytes 0 … 7 │ bytes 8 … 14, length │ place in ring │ number, size 0   more ids than fit

    ring    … │ word, ids │ ids │ word, ids │ ▓▓▓ oldest is overwritten ▓▓▓ │ …

Pre-tokens come in batches. First all keys are made, without a branch, and their rows asked for (`prefetch`); then
all rows are read, by then in the cache: two comparisons, two stores of 8 bytes, and the size moves the
output on (what was stored too far is overwritten by the next word). Anything else goes the slow way: the row may be another one
of the group; or the word is new, is merged, and takes a free row of the group or replaces one, each in its turn.

    group   ┌──────┬──────┐┌──────┬──────┐┌──────┬──────┐┌──────┬──────┐       row h, then h^1 (the same cache line),
            │  ^2  │  ^3  ││ home │  ^1  ││  ^6  │  ^7  ││  ^4  │  ^5  │       h^2, h^3, …: 16 that are aligned
            └──────┴──────┘└──────┴──────┘└──────┴──────┘└──────┴──────┘

What grows and owns these rows is `word_table.WordTable`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from scratchlm.tokenizer.machine_words import U, fold, inner, load64, lowest_bit, outer, prefetch, stamp, store64
from scratchlm.tokenizer.merge_table import (
    SHORT,
    SHORTEST,
    merge_short,
    merge_shortest,
    scratch_size,
)
from scratchlm.tokenizer.on_demand import address_of, call
from scratchlm.tokenizer.scanner_blocks import borrowed

_ONE, _NONE = U(1), U(0)
BATCH = 128
ROW = 32
_GROUP = 16
# Longer pre-tokens are merged anew each time: few come twice, and they would fill the ring.
MOST_CACHED = 128
# Bytes of ids of a word that is not long, at most; and what two stores of 8 bytes write beyond the last id.
_MOST_SHORT, SLACK = 64, 32
# Ids for which there must be room before a batch begins.
ROOM = (_MOST_SHORT * BATCH + SLACK) // 2

# Of 16 bytes from where a word begins, by its length: those that belong to it.
_FIRST = np.array([(1 << 8 * min(length, 8)) - 1 for length in range(16)], np.uint64)
_SECOND = np.array([(1 << 8 * max(length - 8, 0)) - 1 for length in range(16)], np.uint64)
_LONG = U(16 << 56)
_MIX, _STIR = U(0x9E3779B97F4A7C15), U(0xC2B2AE3D27D4EB4F)

# Places in the state of a table.
IDS, RING, TURN, REGION, WANTED, AMOUNT, FILLED, LIMIT, WRAPS = range(9)
# What `encode_spans` stops for.
NOTHING, WANTS_ROOM, WANTS_SCRATCH, WANTS_ROWS, WANTS_RING, WANTS_LONG_WORD = range(6)
# Working memory of `encode_spans`, in bytes: for each word of a batch the two halves of its key and its home row; then which
# of the words are long.
_LOWS, _HIGHS, _HOMES, _LONGS, WORK = (8 * BATCH * part for part in range(5))


@inner
def _rare_key(data, tail, begin, length):
    """The key of a word of 16 bytes or more, or of one so near the end that 16 bytes cannot be read from where it begins."""
    if length < 16:
        begin -= len(data) - 16
        return _short_key(tail, begin, length)
    value = U(length) * _STIR
    for offset in range(0, length - 8, 8):
        value = fold(value ^ load64(data, begin + offset), _MIX)
    return fold(value ^ load64(data, begin + length - 8), _MIX), _LONG | U(length)


@inner
def _short_key(data, begin, length):
    low = load64(data, begin) & load64(_FIRST, 8 * length)
    high = load64(data, begin + 8) & load64(_SECOND, 8 * length)
    return low, high | (U(length) << U(56))


@inner
def _same(data, begin, ring, place, length):
    for offset in range(0, length - 8, 8):
        if load64(data, begin + offset) != load64(ring, place + offset):
            return False
    return load64(data, begin + length - 8) == load64(ring, place + length - 8)


@inner
def _hash(low, high):
    return np.int64(fold(low ^ _MIX, high ^ _STIR))


@inner
def _whole_word(data, begin, length, low, high, whole, pool):
    """Id of the token that is this very word, or -1. Rows of `whole`: key as in the table, id + 1, place in `pool`."""
    mask = (len(whole) << 3) - ROW
    row = _hash(low, high) & mask
    while True:
        index = load64(whole, row + 16)
        if index == _NONE:
            return -1
        if (
            load64(whole, row) == low
            and load64(whole, row + 8) == high
            and (length < 16 or _same(data, begin, pool, np.int64(load64(whole, row + 24)), length))
        ):
            return np.int64(index) - 1
        row = (row + ROW) & mask


@inner
def _slow(
    data, begin, length, low, high, home, rows, ring, pairs, small, heads, bits, scratch, tokens, keys, whole, pool, out, at, state,
    merge_long,
):  # fmt: skip
    """One word that the first two rows do not answer: find its row, or merge it and give it one. Returns the new `at`, or −1: the
    ring is full and may grow."""
    size = out.itemsize
    top = U(64 - 8 * size)
    chosen, filled = np.int64(-1), 0
    for step in range(0, _GROUP * ROW, ROW):
        row = home ^ step
        if load64(rows, row) == low and load64(rows, row + 8) == high:
            last = load64(rows, row + 24)
            if last >> top != _NONE:
                store64(out, at, load64(rows, row + 16))
                store64(out, at + 8, last)
                return at + np.int64(last >> top)
            start = np.int64(load64(rows, row + 16))
            if state[RING] <= start + len(ring) - 64:
                place = start & (len(ring) - 1)
                if length < 16 or _same(data, begin, ring, place, length):
                    if length >= 16:
                        place += (length + 7) & ~7
                    written = np.int64(last)
                    for offset in range(0, written, 8):
                        store64(out, at + offset, load64(ring, place + offset))
                    return at + written
            chosen = row  # overwritten since, or another word with this hash: this one takes its row
            break
        if load64(rows, row + 8) == _NONE:
            chosen, filled = row, 1
            break
    n = at >> (size >> 1)
    before = n
    known = np.int64(-1)
    if len(whole) > 4:
        known = _whole_word(data, begin, length, low, high, whole, pool)
    if known >= 0:
        out[n] = known
        n += 1
    elif length <= SHORT:
        if length <= SHORTEST:
            alive = merge_shortest(data, begin, length, pairs, small, tokens, keys)
        else:
            alive = merge_short(data, begin, length, pairs, small, tokens, keys)
        while alive != _NONE:
            out[n] = tokens[lowest_bit(alive)]
            n += 1
            alive &= alive - _ONE
    else:
        merges = len(heads) - 1
        count = call(
            merge_long,
            (
                address_of(data), begin, length, address_of(pairs), len(pairs), address_of(small), merges, address_of(heads),
                address_of(bits), len(bits), address_of(scratch), len(scratch),
            ),
        )  # fmt: skip
        for index in range(count):
            out[n + index] = scratch[index]
        n += count
    written = (n - before) * size
    if length > MOST_CACHED:
        return at + written
    word = (length + 7) & ~7 if length >= 16 else 0
    if chosen < 0:
        chosen = home ^ ((state[TURN] & (_GROUP - 1)) * ROW)
        state[TURN] += 1
    if word == 0 and written <= 16 - size:
        for index in range(n, before + (8 if size == 2 else 4)):
            out[index] = 0
        store64(rows, chosen + 16, load64(out, at))
        store64(rows, chosen + 24, load64(out, at + 8) | (U(written) << top))
    else:
        start = state[RING]
        if (start & (len(ring) - 1)) + word + written + 16 > len(ring):
            if state[WRAPS] == 0:
                return -1
            start = (start | (len(ring) - 1)) + 1
        place = start & (len(ring) - 1)
        for offset in range(0, word - 8, 8):
            store64(ring, place + offset, load64(data, begin + offset))
        if word > 0:
            store64(ring, place + length - 8, load64(data, begin + length - 8))
        for offset in range(0, written, 8):
            store64(ring, place + word + offset, load64(out, at + offset))
        state[RING] = start + word + ((written + 7) & ~7)
        store64(rows, chosen + 16, U(start))
        store64(rows, chosen + 24, U(written))
    store64(rows, chosen, low)
    store64(rows, chosen + 8, high)
    state[FILLED] += filled
    return at + written


def _loop(sources: int) -> Callable[..., Any]:
    def encode_spans(
        data, tail, spans, first, end, rows, ring, pairs, small, heads, bits, scratch, work, tokens, keys, whole, pool, out, marks, state,
        merge_long,
    ):  # fmt: skip
        """Ids of ``spans[first:end]`` to `out`; returns how many spans are done (see `WordTable.encode`)."""
        data, tail, spans, rows, ring = (
            borrowed(data),
            borrowed(tail),
            borrowed(spans),
            borrowed(rows),
            borrowed(ring),
        )
        pairs, small, heads, bits = borrowed(pairs), borrowed(small), borrowed(heads), borrowed(bits)
        scratch, work, tokens, keys = borrowed(scratch), borrowed(work), borrowed(tokens), borrowed(keys)
        whole, pool, out, marks, state = (
            borrowed(whole),
            borrowed(pool),
            borrowed(out),
            borrowed(marks),
            borrowed(state),
        )
        size = out.itemsize
        top = U(64 - 8 * size)
        room = len(out) * size
        mask = (len(rows) << 3) - ROW
        safe = U(max(len(data) - 15, 0)) if sources > 0 else _NONE
        at = state[IDS] * size  # in bytes
        wanted = NOTHING
        while first < end:
            batch = min(end - first, BATCH)
            if state[FILLED] >= state[LIMIT]:
                wanted = WANTS_ROWS
                break
            if at + _MOST_SHORT * batch + SLACK > room:
                wanted = WANTS_ROOM
                break
            longs = 0
            for index in range(batch):
                place = 16 * (first + index)
                begin = np.int64(load64(spans, place))
                length = np.int64(load64(spans, place + 8)) - begin
                if length < 16 and U(begin) < safe:
                    low, high = _short_key(data, begin, length)
                elif begin < 0:  # the end of a region
                    low, high = U(length), _NONE
                else:
                    low, high = _rare_key(data, tail, begin, length)
                    store64(work, _LONGS + longs, U(8 * index))
                    longs += 8
                home = _hash(low, high) & mask
                prefetch(rows, home)
                store64(work, _LOWS + 8 * index, low)
                store64(work, _HIGHS + 8 * index, high)
                store64(work, _HOMES + 8 * index, U(home))
            for index in range(0, longs, 8):
                word = np.int64(load64(work, _LONGS + index))
                row = np.int64(load64(work, _HOMES + word))
                if load64(rows, row) == load64(work, _LOWS + word):
                    prefetch(ring, np.int64(load64(rows, row + 16)) & (len(ring) - 1))
            index = 0
            while True:
                while index < batch:
                    low, high = load64(work, _LOWS + 8 * index), load64(work, _HIGHS + 8 * index)
                    row = np.int64(load64(work, _HOMES + 8 * index))
                    if (load64(rows, row) ^ low) | (load64(rows, row + 8) ^ high) != _NONE:
                        row ^= ROW
                        if (load64(rows, row) ^ low) | (load64(rows, row + 8) ^ high) != _NONE:
                            break
                    last = load64(rows, row + 24)
                    written = np.int64(last >> top)
                    if written == 0:
                        break
                    store64(out, at, load64(rows, row + 16))
                    store64(out, at + 8, last)
                    at += written
                    index += 1
                if index == batch:
                    break
                low, high = load64(work, _LOWS + 8 * index), load64(work, _HIGHS + 8 * index)
                if high == _NONE:
                    if low != _NONE:
                        out[at >> (size >> 1)] = low - _ONE
                        at += size
                    if len(marks) > 0:
                        marks[state[REGION]] = at >> (size >> 1)
                    state[REGION] += 1
                    index += 1
                    continue
                begin = np.int64(load64(spans, 16 * (first + index)))
                length = np.int64(load64(spans, 16 * (first + index) + 8)) - begin
                if length >= 16 and at + length * size + _MOST_SHORT * batch + SLACK > room:
                    wanted = WANTS_ROOM
                    state[AMOUNT] = length
                    break
                if length > SHORT and merge_long == 0:
                    wanted = WANTS_LONG_WORD
                    break
                if length > SHORT and len(scratch) < scratch_need(length, len(heads) - 1):
                    wanted = WANTS_SCRATCH
                    state[AMOUNT] = length
                    break
                behind = _slow(
                    data, begin, length, low, high, np.int64(load64(work, _HOMES + 8 * index)), rows, ring, pairs, small, heads, bits,
                    scratch, tokens, keys, whole, pool, out, at, state, merge_long,
                )  # fmt: skip
                if behind < 0:
                    wanted = WANTS_RING
                    break
                at = behind
                index += 1
            first += index
            if wanted != NOTHING:
                break
        state[IDS] = at >> (size >> 1)
        state[WANTED] = wanted
        return first

    return encode_spans


scratch_need = inner(scratch_size)
encode_spans = outer(_loop(stamp("merge_table.py", "scanner_blocks.py", "on_demand.py")))


def _copies(sources: int) -> Callable[..., Any]:
    def copy_rows(old, new):
        """Put the rows of `old` into the empty `new`; returns how many. First those that are at home, where the frequent ones are: no two of
        them want the same row, as a home in the new table begins with that in the old."""
        old, new = borrowed(old), borrowed(new)
        old_mask, mask = (len(old) << 3) - ROW, (len(new) << 3) - ROW
        kept = 0
        for turn in range(2 if sources > 0 else 0):
            for place in range(0, len(old) << 3, ROW):
                low, high = load64(old, place), load64(old, place + 8)
                home = _hash(low, high)
                if high == _NONE or (home & old_mask == place) != (turn == 0):
                    continue
                for step in range(0, _GROUP * ROW, ROW):
                    row = (home & mask) ^ step
                    if load64(new, row + 8) == _NONE:
                        for part in range(0, ROW, 8):
                            store64(new, row + part, load64(old, place + part))
                        kept += 1
                        break
        return kept

    return copy_rows


copy_rows = outer(_copies(stamp("scanner_blocks.py")))


def _fill(sources: int) -> Callable[..., Any]:
    def fill_whole(pool, starts, ids, whole):
        mask = (len(whole) << 3) - ROW
        for index in range(len(ids) if sources > 0 else 0):
            begin, length = starts[index], starts[index + 1] - starts[index]
            low, high = _short_key(pool, begin, length) if length < 16 else _rare_key(pool, pool, begin, length)
            row = _hash(low, high) & mask
            while load64(whole, row + 16) != _NONE:
                row = (row + ROW) & mask
            store64(whole, row, low)
            store64(whole, row + 8, high)
            store64(whole, row + 16, U(ids[index] + 1))
            store64(whole, row + 24, U(begin))

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
