"""The merge loop on flat arrays, compiled by Numba: output equal to `merging.merge_words`, for large word tables.

All words lie behind each other, one token per place; a merge empties a place and links its neighbours past it:

    place      0  1  2 │ 3  4  5  6  7 │ …          after (l, o) → 256:   256 . w │ 256 . w e r
    token      l  o  w │ l  o  w  e  r │ …
    next       1  2  - │ 4  5  6  7  - │ …          Every place knows the pair that begins there, and every pair
    pair       0  1  - │ 0  1  2  3  - │ …          chains its places (head → chain → chain …), so a merge touches
    weight     5  5  5 │ 2  2  2  2  2 │ …          exactly the places it changes and their neighbours.

Chains are doubly linked, hence always exact. The heap holds each pair once; an entry too high sinks when it is met.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from scratchlm.tokenizer.merging import Pair, Tick


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """``njit`` with its disk cache, or without one where no folder for it can be written."""
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:
        return numba.njit(nogil=True)(function)


@_compile
def _token_order(first, second, pool, start):
    """-1, 0 or 1: the byte string of `first` is less than, equal to or greater than that of `second`."""
    if first == second:
        return 0
    at, other = start[first], start[second]
    end, other_end = start[first + 1], start[second + 1]
    while at < end and other < other_end:
        if pool[at] != pool[other]:
            return 1 if pool[at] > pool[other] else -1
        at += 1
        other += 1
    return 1 if at < end else -1


@_compile
def _above(first, second, claimed, pairs, pool, start):
    """Whether pair `first` is to be merged before pair `second`."""
    if claimed[first] != claimed[second]:
        return claimed[first] > claimed[second]
    order = _token_order(pairs[first, 0], pairs[second, 0], pool, start)
    if order == 0:
        order = _token_order(pairs[first, 1], pairs[second, 1], pool, start)
    return order > 0


@_compile
def _rise(heap, position, claimed, pairs, pool, start):
    while position > 0:
        parent = (position - 1) >> 1
        if not _above(heap[position], heap[parent], claimed, pairs, pool, start):
            return
        heap[position], heap[parent] = heap[parent], heap[position]
        position = parent


@_compile
def _sink(heap, size, claimed, pairs, pool, start):
    position = 0
    while True:
        child = 2 * position + 1
        if child >= size:
            return
        if child + 1 < size and _above(heap[child + 1], heap[child], claimed, pairs, pool, start):
            child += 1
        if not _above(heap[child], heap[position], claimed, pairs, pool, start):
            return
        heap[position], heap[child] = heap[child], heap[position]
        position = child


@_compile
def _slot(table, pairs, left, right):
    """Where the pair is, or may be put, in the hash table (linear probing; the size is a power of two)."""
    mask = len(table) - 1
    slot = (left * 0x9E3779B1 + right * 0x85EBCA77) & 0x7FFFFFFFFFFFFFFF
    slot = (slot ^ (slot >> 17)) & mask
    while table[slot] >= 0 and (pairs[table[slot], 0] != left or pairs[table[slot], 1] != right):
        slot = (slot + 1) & mask
    return slot


@_compile
def _unlink(place, pair_at, head, chain, back):
    if back[place] >= 0:
        chain[back[place]] = chain[place]
    else:
        head[pair_at[place]] = chain[place]
    if chain[place] >= 0:
        back[chain[place]] = back[place]
    pair_at[place] = -1


@_compile
def _link(place, pair, pair_at, head, chain, back):
    pair_at[place] = pair
    back[place] = -1
    chain[place] = head[pair]
    if head[pair] >= 0:
        back[head[pair]] = place
    head[pair] = place


@_compile
def _longer(array, size):
    grown = np.empty(size, array.dtype)
    grown[: len(array)] = array
    return grown


@_compile
def _merge(token, after, weight, wanted, least, made, signals):
    """The loop. `made` receives the merges; returns how many there are.

    signals[0] counts merges for a progress bar, signals[1] asks to stop, signals[2] says "inside a run of equal tokens".
    """
    places = len(token)
    before = np.full(places, -1, np.int64)
    pair_at = np.full(places, -1, np.int64)
    chain = np.empty(places, np.int64)
    back = np.empty(places, np.int64)

    pool = np.empty(1 << 16, np.uint8)
    start = np.empty(256 + wanted + 1, np.int64)
    for byte in range(256):
        pool[byte] = byte
        start[byte] = byte
    start[256] = 256
    tokens = 256

    room = 1 << 12
    pairs = np.empty((room, 2), np.int64)
    count = np.empty(room, np.int64)
    claimed = np.empty(room, np.int64)
    head = np.empty(room, np.int64)
    heap = np.empty(room, np.int64)
    table = np.full(4 * room, -1, np.int64)
    known = 0  # pairs so far
    heaped = 0

    done = 0
    new = -1  # -1: the first round enters every place, each later one the neighbours of a merge
    left, right, best = -1, -1, -1
    while True:
        first_fresh = known
        # Places whose pair begins anew, in the order they have to be entered.
        place = places - 1 if new < 0 else head[best]
        while place >= 0:
            entering_one, entering_two = -1, -1
            if new < 0:
                if after[place] >= 0:
                    before[after[place]] = place
                    entering_one = place
                following_place = place - 1
            else:
                if (
                    left == right and signals[2] == 0
                ):  # "aaaa": pair up from the left end of the run, as reading would
                    while before[place] >= 0 and pair_at[before[place]] == best:
                        place = before[place]
                second = after[place]
                third = after[second]
                previous = before[place]
                count[best] -= weight[place]
                _unlink(place, pair_at, head, chain, back)
                if third >= 0:
                    count[pair_at[second]] -= weight[place]
                    _unlink(second, pair_at, head, chain, back)
                    before[third] = place
                    entering_two = place
                if previous >= 0:
                    count[pair_at[previous]] -= weight[place]
                    _unlink(previous, pair_at, head, chain, back)
                    entering_one = previous
                token[place] = new
                after[place] = third
                signals[2] = 0
                if left == right and third >= 0 and pair_at[third] == best:
                    following_place = third  # on with the run: its left end is behind us
                    signals[2] = 1
                else:
                    following_place = -2  # whichever comes first in the chain
            for entering in (entering_one, entering_two):
                if entering < 0:
                    continue
                first, other = token[entering], token[after[entering]]
                slot = _slot(table, pairs, first, other)
                if table[slot] < 0:
                    if known == room:
                        room *= 2
                        longer = np.empty((room, 2), np.int64)
                        longer[:known] = pairs
                        pairs = longer
                        count, claimed = _longer(count, room), _longer(claimed, room)
                        head, heap = _longer(head, room), _longer(heap, room)
                        table = np.full(4 * room, -1, np.int64)
                        for pair in range(known):
                            table[_slot(table, pairs, pairs[pair, 0], pairs[pair, 1])] = pair
                        slot = _slot(table, pairs, first, other)
                    pairs[known, 0], pairs[known, 1] = first, other
                    count[known] = 0
                    head[known] = -1
                    table[slot] = known
                    known += 1
                count[table[slot]] += weight[entering]
                _link(entering, table[slot], pair_at, head, chain, back)
            place = head[best] if following_place == -2 else following_place
        for pair in range(first_fresh, known):
            if count[pair] > 0:
                claimed[pair] = count[pair]
                heap[heaped] = pair
                _rise(heap, heaped, claimed, pairs, pool, start)
                heaped += 1
        # The most frequent pair: sink entries that promise too much until the top one is true.
        while heaped > 0 and claimed[heap[0]] != count[heap[0]]:
            claimed[heap[0]] = count[heap[0]]
            if claimed[heap[0]] == 0:
                heaped -= 1
                heap[0] = heap[heaped]
            _sink(heap, heaped, claimed, pairs, pool, start)
        if heaped == 0 or done == wanted or count[heap[0]] < least or signals[1] != 0:
            return done
        best = heap[0]
        heaped -= 1
        heap[0] = heap[heaped]
        _sink(heap, heaped, claimed, pairs, pool, start)
        left, right = pairs[best, 0], pairs[best, 1]
        new = tokens
        tokens += 1
        size = start[left + 1] - start[left] + start[right + 1] - start[right]
        if start[new] + size > len(pool):
            pool = _longer(pool, 2 * (start[new] + size))
        middle = start[new] + start[left + 1] - start[left]
        pool[start[new] : middle] = pool[start[left] : start[left + 1]]
        pool[middle : start[new] + size] = pool[start[right] : start[right + 1]]
        start[tokens] = start[new] + size
        made[done, 0], made[done, 1] = left, right
        done += 1
        signals[0] = done


def merge_words_fast(
    words: dict[bytes, int], merges: int, min_frequency: int = 1, tick: Tick = lambda done: None
) -> list[Pair]:
    """Like `merging.merge_words`; `tick` is called twenty times a second at most, with the number of new merges.

    The first call on a machine compiles the loop (a few seconds); Numba keeps the result beside this file, or in the
    user's cache folder, for all later ones.
    """
    text = b"".join(words)
    lengths = np.fromiter(map(len, words), np.int64, len(words))
    weight = np.repeat(np.fromiter(words.values(), np.int64, len(words)), lengths)
    after = np.arange(1, len(text) + 1, dtype=np.int64)
    after[np.cumsum(lengths) - 1] = -1
    token = np.frombuffer(text, np.uint8).astype(np.int64)
    made = np.empty((merges, 2), np.int64)
    signals = np.zeros(3, np.int64)
    result: list[int] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            result.append(int(_merge(token, after, weight, merges, max(1, min_frequency), made, signals)))
        except BaseException as error:
            failure.append(error)

    # In a thread of its own (the loop holds no lock), so that the bar moves and Ctrl-C is heard.
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    shown = 0
    try:
        while thread.is_alive():
            thread.join(0.05)
            done = int(signals[0])
            tick(done - shown)
            shown = done
    except BaseException:
        signals[1] = 1
        raise
    if failure:
        raise failure[0]
    tick(result[0] - shown)
    return [(int(left), int(right)) for left, right in made[: result[0]]]
