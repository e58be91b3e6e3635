"""Merging one pre-token, compiled: the same ids as `encoder.merge_tokens`, for every length.

The merges lie in a hash table of one integer each, four to a group, so that a question costs one cache line and no guess of
the processor, whose wrong guesses took more time than all else:

    row     63 …… 43 │ 42 …… 22 │ 21 …… 0            pair of ids ──hash──► a group, or the next one where it is full
             left id │ right id │ rank               ``merged[rank]`` is the id that the pair becomes

    rank    least of the four differences            The row asked for differs by its rank, any other by 2²² or more.
            row − (left │ right │ 0)

**Up to 64 bytes** all tokens have a fixed place, and the ranks of their pairs lie side by side. A merge leaves a
hole at the right one's place; one bit per place says who is left, so neighbours are found by counting zeros:

    place   0    1    2    3    4           keys: rank << 6 | place, no pair: all ones
    token   h    e    l    l    o           The least key is the best pair, and the leftmost of equals.
    key    12·0 40·1  5·2  -    -           It is found 16 keys at a time (`least16`).
    after   h    e    ll   .    o           alive = 0b10111

Up to 15 bytes the keys never leave one vector register (what is written word by word and then read as a vector waits for the
memory in between), and a wall on either side stands for the neighbour that is not there: a token that no merge knows.

    place   0    1    2    3    4    5    6
    token   ▓    h    e    l    l    o    ▓

**Longer ones** (a line of dashes, base64, Chinese without spaces, ten million times one letter) keep a doubly linked list
of tokens and, instead of a heap, one list of places per rank, taken from the lowest rank on:

    rank    0     1     2     3     …       A tree of bits over the ranks finds the lowest list that is not empty.
    list    │     4,9   │     0,2,7         Its places are put in order and merged from the left; an entry whose pair
    bits    0     1     0     1             has another rank by now is passed over. New pairs go to their lists.

A merge can make a pair of a *lower* rank only where a vocabulary lists several merges for one token; then the
rest of the list is put back and the lower rank goes first. Every pair is put into a list once, and each list sorted once:
O(n log n) comparisons at most, and mostly steps from left to right through memory, which a heap would jump about in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import carray
from numba.core import types

from scratchlm.tokenizer.buffers import private_pages
from scratchlm.tokenizer.encoder import merge_tokens
from scratchlm.tokenizer.machine_words import (
    U,
    highest_bit,
    inner,
    least,
    least16,
    load16,
    lowest_bit,
    prefetch,
    put,
    stamp,
)
from scratchlm.tokenizer.on_demand import OnDemand

ID_BITS = 21
RANK_BITS = 22
# Ids and ranks that fit the row; the highest id is the wall. Above, the tokenizer keeps to the plain road.
MOST_IDS = (1 << ID_BITS) - 1
MOST_MERGES = (1 << RANK_BITS) - 1

_NO_RANK = U(MOST_MERGES)
_EMPTY = U(0xFFFFFFFFFFFFFFFF)
_MIX, _TOP = U(0x9E3779B97F4A7C15), U(40)
_ONE, _NONE, _ALL_BUT_ONE = U(1), U(0), U(0xFFFFFFFFFFFFFFFE)
_NO_KEY = np.uint32(0xFFFFFFFF)
_WALL = np.uint32(MOST_IDS)
_PER_GROUP = 4

# Places of the tables in `MergeTable.small`.
_BYTE_IDS = 1 << 16
_FIRST_ID = _BYTE_IDS + 256
_MERGED = _FIRST_ID + 1

# Words of so many bytes are merged in a register; in place.
SHORTEST, SHORT = 15, 64
# Working memory for a long pre-token, in int32: per byte its token, the rank of the pair that begins there, and the places
# before and after it; then blocks of 15 list entries and the number of the next block; then one list in order.
_PLACE, _BLOCK = 4, 16
_TOKEN, _RANK, _BEFORE, _AFTER = 0, 1, 2, 3
_USED, _FREE = 0, 1  # in the first block: the first block never used, and the first one given back (0: none)


def scratch_size(length: int, merges: int) -> int:
    """int32 of working memory that :func:`merge_long` needs for `length` bytes (no more than a part is touched)."""
    entries = 3 * length
    blocks = entries // (_BLOCK - 1) + min(entries, merges) + 2
    return _BLOCK * (1 + blocks) + _PLACE * length + entries


class MergeTable(NamedTuple):
    """What the compiled functions read; shared by threads.

    Attributes:
        pairs: uint64, the rows; the size is a power of two.
        small: uint32: the rank of each pair of bytes (65,536), the id of each byte (256), the id that merge 0 makes if ids go up with
            ranks one by one (else 0), the id that each merge makes.
        merges: how many there are.
        plain: merges bytes in plain Python, by the reference.
    """

    pairs: np.ndarray
    small: np.ndarray
    merges: int
    plain: Callable[[bytes], list[int]]


def merge_table(byte_ids: list[int], ranks: dict[int, int]) -> MergeTable:
    """The tables of `byte_ids` and the rank table of `scratchlm.tokenizer.encoder`."""
    keys = np.fromiter(ranks.keys(), np.uint64, len(ranks))
    values = np.fromiter(ranks.values(), np.uint64, len(ranks))
    left, right = keys >> U(32), keys & U(0xFFFFFFFF)
    rank, made = values >> U(32), values & U(0xFFFFFFFF)
    packed = (left << U(ID_BITS)) | right
    bits = max(4, (2 * len(ranks)).bit_length())
    pairs = np.frombuffer(private_pages(8 << bits), np.uint64)  # no group lies in two cache lines
    pairs[:] = _EMPTY
    slot = ((packed * _MIX) >> _TOP).astype(np.int64) & (len(pairs) - _PER_GROUP)
    rows = (packed << U(RANK_BITS)) | rank
    while len(rows):  # all at once: whoever finds a free slot takes it, the others look one slot further
        free = pairs[slot] == _EMPTY
        pairs[slot[free]] = rows[free]
        waiting = pairs[slot] != rows
        rows, slot = rows[waiting], (slot[waiting] + 1) & (len(pairs) - 1)
    small = np.full(_MERGED + len(ranks), MOST_MERGES, np.uint32)
    byte_of = np.full(max(max(byte_ids), int(left.max(initial=0)), int(right.max(initial=0))) + 1, -1, np.int32)
    byte_of[byte_ids] = np.arange(256)
    both = (byte_of[left] >= 0) & (byte_of[right] >= 0)
    small[(byte_of[left[both]] << 8) | byte_of[right[both]]] = rank[both]
    small[_BYTE_IDS:_FIRST_ID] = byte_ids
    small[_MERGED + rank.astype(np.int64)] = made
    first = made - rank
    small[_FIRST_ID] = first[0] if len(ranks) and (first == first[0]).all() else 0
    return MergeTable(pairs, small, len(ranks), lambda word: merge_tokens([byte_ids[byte] for byte in word], ranks))


def empty_lists(merges: int) -> tuple[np.ndarray, np.ndarray]:
    """(heads, bits): the lists per rank, all empty, and the tree of bits over them; one pair per thread."""
    lowest = (merges >> 6) + 1
    middle = (lowest >> 6) + 1
    top = (middle >> 6) + 1
    return np.full(merges + 1, -1, np.int32), np.zeros(lowest + middle + top, np.uint64)


@inner
def rank_of(left, right, pairs):
    """Rank of the pair of ids, or `_NO_RANK`. All integers are uint64."""
    key = (left << U(ID_BITS)) | right
    zero = key << U(RANK_BITS)
    mask = U(len(pairs) - _PER_GROUP)
    group = ((key * _MIX) >> _TOP) & mask
    while True:
        last = pairs[group + U(3)]
        rank = min(
            min(pairs[group] - zero, pairs[group + U(1)] - zero), min(pairs[group + U(2)] - zero, last - zero)
        )
        if (rank < _NO_RANK) | (last == _EMPTY):
            return min(rank, _NO_RANK)
        group = (group + U(_PER_GROUP)) & mask


@inner
def merge_shortest(data, begin, length, pairs, small, tokens, keys):
    """Merge ``data[begin : begin + length]``, at most `SHORTEST` bytes; as :func:`merge_short`, but a token at place i is
    ``tokens[i]`` for i = 1, 2, …"""
    for lane in range(16):
        keys[lane] = _NO_KEY
    tokens[0] = tokens[length + 1] = _WALL
    first, first_id = data[begin], small[_FIRST_ID]
    tokens[1] = small[_BYTE_IDS + first]
    for index in range(1, length):
        second = data[begin + index]
        tokens[index + 1] = small[_BYTE_IDS + second]
        keys[index] = np.uint32((small[(first << 8) | second] << 6) | index)
        first = second
    vector = load16(keys, 0)
    alive = (U(4) << U(length)) - _ONE  # with both walls
    while True:
        best = least(vector)
        rank = best >> 6
        if rank >= MOST_MERGES:
            return alive & ((_ONE << U(length)) - _ONE) << _ONE
        place: Any = np.int64(best & 63)
        made = np.uint32(first_id + rank) if first_id != 0 else small[_MERGED + rank]
        tokens[place] = made
        behind = _ALL_BUT_ONE << U(place)
        right = lowest_bit(alive & behind)
        alive ^= _ONE << U(right)
        later, earlier = lowest_bit(alive & behind), highest_bit(alive & ~(_EMPTY << U(place)))
        vector = put(vector, right, _NO_KEY)
        with_later, with_earlier = (
            rank_of(U(made), U(tokens[later]), pairs),
            rank_of(U(tokens[earlier]), U(made), pairs),
        )
        vector = put(vector, place, np.uint32((with_later << U(6)) | U(place)))
        vector = put(vector, earlier, np.uint32((with_earlier << U(6)) | U(earlier)))


@inner
def merge_short(data, begin, length, pairs, small, tokens, keys):
    """Merge ``data[begin : begin + length]``, at most 64 bytes.

    Args:
        tokens: uint32[64], receives the tokens at the places of their first bytes.
        keys: uint32[64], working memory.

    Returns:
        uint64 with a 1 for each place where a token begins.
    """
    lanes = (length + 15) & ~15
    for index in range(max(length - 1, 0), lanes):
        keys[index] = _NO_KEY
    tokens[0] = small[_BYTE_IDS + data[begin]]
    for index in range(length - 1):
        first, second = data[begin + index], data[begin + index + 1]
        tokens[index + 1] = small[_BYTE_IDS + second]
        keys[index] = np.uint32((small[(first << 8) | second] << 6) | index)
    alive = _EMPTY >> U(64 - length)
    while True:
        best = least16(keys, 0)
        for lane in range(64, 4 * lanes, 64):
            best = min(best, least16(keys, lane))
        rank = best >> 6
        if rank >= MOST_MERGES:
            return alive
        place: Any = np.int64(best & 63)
        right = place + 1 + lowest_bit(alive >> U(place + 1))
        made = small[_MERGED + rank]
        tokens[place] = made
        alive ^= _ONE << U(right)
        keys[right] = _NO_KEY
        later = (alive >> U(right)) >> _ONE
        if later != _NONE:
            neighbour = right + 1 + lowest_bit(later)
            keys[place] = np.uint32((rank_of(U(made), U(tokens[neighbour]), pairs) << U(6)) | U(place))
        else:
            keys[place] = _NO_KEY
        earlier = alive & ((_ONE << U(place)) - _ONE)
        if earlier != _NONE:
            neighbour = highest_bit(earlier)
            keys[neighbour] = np.uint32((rank_of(U(tokens[neighbour]), U(made), pairs) << U(6)) | U(neighbour))


@inner
def _lowest_list(bits, lowest, middle):
    """The lowest rank whose list is not empty, or -1."""
    for top in range(lowest + middle, len(bits)):
        if bits[top] != _NONE:
            word = ((top - lowest - middle) << 6) + lowest_bit(bits[top])
            word = (word << 6) + lowest_bit(bits[lowest + word])
            return (word << 6) + lowest_bit(bits[word])
    return -1


@inner
def _append(rank, place, heads, bits, lowest, middle, scratch):
    """Put `place` into the list of `rank`."""
    # A head is the address behind the last entry: its low four bits count the entries of the block, 1 to 15.
    head = heads[rank]
    if head < 0:
        bits[rank >> 6] |= _ONE << U(rank & 63)
        bits[lowest + (rank >> 12)] |= _ONE << U((rank >> 6) & 63)
        bits[lowest + middle + (rank >> 18)] |= _ONE << U((rank >> 12) & 63)
    if head < 0 or head & 15 == 15:
        block = scratch[_FREE]
        if block != 0:
            scratch[_FREE] = scratch[block + 15]
        else:
            block = scratch[_USED]
            scratch[_USED] = block + _BLOCK
        scratch[block + 15] = head & ~15 if head > 0 else 0
        head = block
    scratch[head] = place
    heads[rank] = head + 1


@inner
def _take(rank, heads, bits, lowest, middle, scratch, current):
    """Empty the list of `rank` into ``scratch[current:]``; returns how many there are."""
    head = heads[rank]
    count = 0
    while head > 0:  # from the last entry to the first
        block = head & ~15
        for index in range((head & 15) - 1, -1, -1):
            scratch[current + count] = scratch[block + index]
            count += 1
        earlier = scratch[block + 15]
        scratch[block + 15] = scratch[_FREE]
        scratch[_FREE] = block
        head = earlier + 15 if earlier > 0 else 0
    first, last = current, current + count - 1
    while first < last:
        scratch[first], scratch[last] = scratch[last], scratch[first]
        first += 1
        last -= 1
    heads[rank] = -1
    bits[rank >> 6] &= ~(_ONE << U(rank & 63))
    if bits[rank >> 6] == _NONE:
        bits[lowest + (rank >> 12)] &= ~(_ONE << U((rank >> 6) & 63))
        if bits[lowest + (rank >> 12)] == _NONE:
            bits[lowest + middle + (rank >> 18)] &= ~(_ONE << U((rank >> 12) & 63))
    return count


@inner
def _sort(values, first, count):
    """Put ``values[first : first + count]`` in order: nothing to do where they are, else heapsort."""
    falls = 0
    for index in range(first + 1, first + count):
        falls += values[index - 1] > values[index]
    if falls == 0:
        return
    start, end = count >> 1, count
    while end > 1:
        if start > 0:
            start -= 1
        else:
            end -= 1
            values[first + end], values[first] = values[first], values[first + end]
        value, position = values[first + start], start
        while 2 * position + 1 < end:
            child = 2 * position + 1
            if child + 1 < end and values[first + child + 1] > values[first + child]:
                child += 1
            if value >= values[first + child]:
                break
            values[first + position] = values[first + child]
            position = child
        values[first + position] = value


@inner
def _merge_long(data, begin, length, pairs, small, heads, bits, scratch):
    """Merge ``data[begin : begin + length]``; the ids are left at the beginning of `scratch`.

    Args:
        heads, bits: from :func:`empty_lists`; left empty again.
        scratch: int32, at least :func:`scratch_size` of them.

    Returns:
        how many ids there are.
    """
    merges = len(heads) - 1
    lowest = (merges >> 6) + 1
    middle = (lowest >> 6) + 1
    entries = 3 * length
    places = _BLOCK * (1 + entries // (_BLOCK - 1) + min(entries, merges) + 2)
    current = places + _PLACE * length
    scratch[_USED], scratch[_FREE] = _BLOCK, 0
    for place in range(length):
        record = places + _PLACE * place
        scratch[record + _TOKEN] = small[_BYTE_IDS + data[begin + place]]
        scratch[record + _BEFORE], scratch[record + _AFTER] = place - 1, place + 1
        scratch[record + _RANK] = -1
        if place + 1 < length:
            rank = np.int64(small[(data[begin + place] << 8) | data[begin + place + 1]])
            if rank < MOST_MERGES:
                scratch[record + _RANK] = rank
                _append(rank, place, heads, bits, lowest, middle, scratch)
    while True:
        rank = _lowest_list(bits, lowest, middle)
        if rank < 0:
            break
        count = _take(rank, heads, bits, lowest, middle, scratch, current)
        _sort(scratch, current, count)
        made = small[_MERGED + rank]
        index = 0
        while index < count:
            ahead = scratch[current + min(index + 8, count - 1)]
            prefetch(scratch, (places + _PLACE * ahead) << 2)
            place = scratch[current + index]
            record = places + _PLACE * place
            index += 1
            if scratch[record + _RANK] != rank:
                continue
            right = scratch[record + _AFTER]
            third = scratch[places + _PLACE * right + _AFTER]
            previous = scratch[record + _BEFORE]
            scratch[places + _PLACE * right + _RANK] = -1
            scratch[record + _TOKEN], scratch[record + _RANK], scratch[record + _AFTER] = made, -1, third
            if third < length:
                scratch[places + _PLACE * third + _BEFORE] = place
            least: Any = merges
            for side in range(2):  # the new token with the one behind it, and with the one before it
                first, second = (place, third) if side == 0 else (previous, place)
                if first < 0 or second >= length:
                    continue
                record = places + _PLACE * first
                left = U(scratch[record + _TOKEN])
                found = np.int64(rank_of(left, U(scratch[places + _PLACE * second + _TOKEN]), pairs))
                scratch[record + _RANK] = -1
                if found < MOST_MERGES:
                    least = found if found < least else least
                    scratch[record + _RANK] = found
                    _append(found, first, heads, bits, lowest, middle, scratch)
            if least < rank:
                while index < count:
                    _append(rank, scratch[current + index], heads, bits, lowest, middle, scratch)
                    index += 1
    n = place = 0
    while place < length:  # over the blocks, which are all given back
        scratch[n] = scratch[places + _PLACE * place + _TOKEN]
        n += 1
        place = scratch[places + _PLACE * place + _AFTER]
    return n


def _by_address(sources: int) -> Callable[..., Any]:
    def merge_long(data, begin, length, pairs, most_pairs, small, merges, heads, bits, most_bits, scratch, size):
        return _merge_long(
            carray(data, begin + length), begin, length if sources > 0 else 0, carray(pairs, most_pairs),
            carray(small, _MERGED + merges), carray(heads, merges + 1), carray(bits, most_bits), carray(scratch, size),
        )  # fmt: skip

    return merge_long


_COUNT, _BYTES, _WORDS, _IDS, _INTS = (
    types.int64, *(types.CPointer(kind) for kind in (types.uint8, types.uint64, types.uint32, types.int32))
)  # fmt: skip
_ARGUMENTS = (_BYTES, _COUNT, _COUNT, _WORDS, _COUNT, _IDS, _COUNT, _INTS, _WORDS, _COUNT, _INTS, _COUNT)
# Words of more than `SHORT` bytes; arrays as addresses, those with a size of their own followed by it.
merge_long = OnDemand("the merging of long words", _COUNT(*_ARGUMENTS), _by_address(stamp("merge_table.py")))
