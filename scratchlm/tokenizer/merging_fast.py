"""The merge loop on flat arrays, compiled by Numba: output equal to `merging.merge_words`, for large word tables.

All words lie behind each other, one token per place, with an edge between them. A merged token keeps the places of its
parts, and its first and its last place name it, so that both neighbours are one step away:

    place      0  1  2  3  4  5  6  7  8  9 10             after (l, o) → 256:   | 256 256 w | 256 256 w e r |
    token      |  l  o  w  |  l  o  w  e  r  |             after (256, w) → 257: | 257  .  257 | 257 . 257 e r |
    width of a token in places: l, o, w: 1   256: 2   257: 3

**Only what may be merged is listed.** The count of a pair only ever falls once it has come into being, so a pair that
begins below the count of the last merge is never merged. That count is not known before the end; it is guessed, and the
work is done in rounds, each with a lower guess (`least`):

    ┌─► compact   one place per token again, words of one token dropped; an upper bound of every pair's count
    │   survey    pairs that occur `least` times, and where: a few thousand out of a million
    │   merge     until the most frequent pair occurs less than `least` times
    └── lower `least`, unless it is `min_frequency` or all merges are made

Any guess gives the same merges; a good one makes the tables so small that they stay in the processor's cache.

**A merge of (a, b) to c changes counts by its neighbours**, not by its places. All places are visited once, in order, and
what stands to the left and to the right is added up; then, once for each different neighbour x,

    places of (a, b)  … x [a b] y …      gained[x] = Σ count of the word      (x, a) loses gained[x], (x, c) begins with it
                                         gained[y] likewise                   (b, y) loses gained[y], (c, y) begins with it

The upper bound of the survey is a count sketch (Cormode and Muthukrishnan 2005, with one row): counters chosen by a hash of the pair,
where pairs that share a counter can only make it larger.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from scratchlm.tokenizer.compiling import announce
from scratchlm.tokenizer.counting import WordCounts
from scratchlm.tokenizer.machine_words import outer, part
from scratchlm.tokenizer.merging import Pair, Tick

_MIX = 0x9E3779B97F4A7C15 - (1 << 64)  # Fibonacci hashing (Knuth, volume 3, 6.4)
_LOW = 0xFFFFFFFF
_SKETCH = 1 << 17  # counters: 1 MB, the size of a second-level cache
_BLOCK = 2048
_MANY = 0x7FFFFFFF  # counts from here on do not fit into the lists of places, which then name the word instead

# Rounds: merges that the first one aims at, and how many times as many the next may aim at.
_FIRST_ROUND = 2500
_NEXT_ROUND = 12

_INT32_PLACES = 2**31 - 2


@part
def _greater_token(first, second, prefix, pool, start):
    """-1, 0 or 1: the byte string of `first` is less than, equal to or greater than that of `second`."""
    if first == second:
        return 0
    if prefix[first] != prefix[second]:
        return 1 if prefix[first] > prefix[second] else -1
    at, other = start[first], start[second]
    end, other_end = start[first + 1], start[second + 1]
    while at < end and other < other_end:
        if pool[at] != pool[other]:
            return 1 if pool[at] > pool[other] else -1
        at += 1
        other += 1
    return 1 if at < end else -1


@part
def _above(count, key, other_count, other_key, prefix, pool, start):
    """Whether the pair `key` is to be merged before the pair `other_key`."""
    if count != other_count:
        return count > other_count
    order = _greater_token(key >> 32, other_key >> 32, prefix, pool, start)
    if order == 0:
        order = _greater_token(key & _LOW, other_key & _LOW, prefix, pool, start)
    return order > 0


@part
def _rise(heap, claimed, position, keys, prefix, pool, start):
    pair, count = heap[position], claimed[position]
    while position > 0:
        parent = (position - 1) >> 1
        if not _above(count, keys[pair], claimed[parent], keys[heap[parent]], prefix, pool, start):
            break
        heap[position], claimed[position] = heap[parent], claimed[parent]
        position = parent
    heap[position], claimed[position] = pair, count


@part
def _sink(heap, claimed, size, keys, prefix, pool, start):
    position = 0
    pair, count = heap[0], claimed[0]
    while True:
        child = 2 * position + 1
        if child >= size:
            break
        other = child + 1
        if other < size and _above(
            claimed[other], keys[heap[other]], claimed[child], keys[heap[child]], prefix, pool, start
        ):
            child = other
        if not _above(claimed[child], keys[heap[child]], count, keys[pair], prefix, pool, start):
            break
        heap[position], claimed[position] = heap[child], claimed[child]
        position = child
    heap[position], claimed[position] = pair, count


@part
def _slot(table, keys, key):
    """Where the pair is, or may be put, in the hash table (linear probing; the size is a power of two)."""
    mask = len(table) - 1
    slot = ((key * _MIX) >> 40) & mask
    while table[slot] >= 0 and keys[table[slot]] != key:
        slot = (slot + 1) & mask
    return slot


@part
def _rehash(keys, known, room):
    table = np.empty(4 * room, np.int32)
    for slot in range(len(table)):
        table[slot] = -1
    for pair in range(known):
        table[_slot(table, keys, keys[pair])] = pair
    return table


@part
def _longer(array, size):
    grown = np.empty(size, array.dtype)
    for index in range(len(array)):
        grown[index] = array[index]
    return grown


@outer
def _spread(text, ends, counts, edge, token, weight):
    """Lay out the words as bytes; those of one byte are left out. Returns how many places and words there are."""
    token[0] = edge
    size, words, begin = 1, 0, 0
    for word in range(len(ends)):
        end = ends[word]
        if end - begin > 1:
            for at in range(begin, end):
                token[size] = text[at]
                size += 1
            token[size] = edge
            size += 1
            weight[words] = counts[word]
            words += 1
        begin = end
    return size, words


@outer
def _compact(token, size, weight, width, edge, sketch):
    """One place per token, no words of one token, and a new sketch. Returns how many places and words remain."""
    mask = len(sketch) - 1
    for slot in range(len(sketch)):
        sketch[slot] = 0
    read, write, word, words = 1, 1, 0, 0
    while read < size:
        begin = write
        while token[read] != edge:
            one = token[read]
            token[write] = one
            read += width[one]
            write += 1
        read += 1
        if write - begin < 2:
            write = begin
        else:
            count = weight[word]
            weight[words] = count
            words += 1
            for at in range(begin, write - 1):
                key = (np.int64(token[at]) << 32) | np.int64(token[at + 1])
                sketch[((key * _MIX) >> 40) & mask] += count
            token[write] = edge
            write += 1
        word += 1
    for one in range(len(width)):
        width[one] = 1
    return write, words


@part
def _candidates(token, begin, end, word, edge, sketch, least, found_key, found_at, found_word):
    """Places in [begin, end) whose pair may occur `least` times. No branch: half of them would be mispredicted.

    Returns how many there are, and the number of the word at `end`.
    """
    mask = len(sketch) - 1
    found = 0
    left = np.int64(token[begin])
    for at in range(begin, end):
        right = np.int64(token[at + 1])
        key = (left << 32) | right
        found_key[found], found_at[found], found_word[found] = key, at, word
        frequent = sketch[((key * _MIX) >> 40) & mask] >= least
        found += int(frequent & (left != edge) & (right != edge))
        word += int(right == edge)
        left = right
    return found, word


@outer
def _survey(token, size, weight, edge, sketch, least, index):
    """The pairs that occur `least` times: their keys (left << 32 | right), counts, and places in ascending order.

    Returns: keys, counts, first place of each in the list of places, how many it has, how many pairs, hash table of keys,
    list of places, list of the counts of the words there (or ~ number of the word), length of the list.
    """
    found_key = np.empty(_BLOCK, np.int64)
    found_at = np.empty(_BLOCK, np.int64)
    found_word = np.empty(_BLOCK, np.int64)
    room = np.int64(1 << 12)
    keys, counts, many = np.empty(room, np.int64), np.empty(room, np.int64), np.empty(room, np.int64)
    known = np.int64(0)
    table = _rehash(keys, known, room)
    word = np.int64(0)
    for begin in range(1, size - 1, _BLOCK):
        end = min(begin + _BLOCK, size - 1)
        found, word = _candidates(token, begin, end, word, edge, sketch, least, found_key, found_at, found_word)
        if known + found > room:
            room = 2 * room
            keys, counts, many = _longer(keys, room), _longer(counts, room), _longer(many, room)
            table = _rehash(keys, known, room)
        for candidate in range(found):
            key = found_key[candidate]
            slot = _slot(table, keys, key)
            if table[slot] < 0:
                table[slot] = known
                keys[known], counts[known], many[known] = key, 0, 0
                known += 1
            counts[table[slot]] += weight[found_word[candidate]]
            many[table[slot]] += 1

    # What only shared a counter with others goes; for the second pass the sketch says "listed" or "not listed".
    for slot in range(len(sketch)):
        sketch[slot] = 0
    first = np.empty(room, np.int64)
    listed = total = np.int64(0)
    for pair in range(known):
        if counts[pair] >= least:
            keys[listed], counts[listed], first[listed] = keys[pair], counts[pair], total
            total += many[pair]
            many[listed] = 0
            sketch[((keys[pair] * _MIX) >> 40) & (len(sketch) - 1)] = 1
            listed += 1
    known = listed
    table = _rehash(keys, known, room)

    places = np.empty(total + total // 4 + 64, index.dtype)
    shares = np.empty(len(places), index.dtype)
    word = np.int64(0)
    for begin in range(1, size - 1, _BLOCK):
        end = min(begin + _BLOCK, size - 1)
        found, word = _candidates(
            token, begin, end, word, edge, sketch, np.int64(1), found_key, found_at, found_word
        )
        for candidate in range(found):
            pair = table[_slot(table, keys, found_key[candidate])]
            if pair >= 0:
                at = first[pair] + many[pair]
                count = weight[found_word[candidate]]
                places[at] = found_at[candidate]
                shares[at] = count if count < _MANY else ~found_word[candidate]
                many[pair] += 1
    return keys, counts, first, many, known, table, places, shares, total


@part
def _name(new, left, right, prefix, pool, start):
    """Write down the byte string of a new token, and its first eight bytes as a number. Returns the pool."""
    size = start[left + 1] - start[left] + start[right + 1] - start[right]
    begin = start[new]
    if begin + size > len(pool):
        pool = _longer(pool, 2 * (begin + size))
    for token in (left, right):
        for at in range(start[token], start[token + 1]):
            pool[begin] = pool[at]
            begin += 1
    start[new + 1] = begin
    packed = np.uint64(0)
    for at in range(start[new], min(begin, start[new] + 8)):
        packed |= np.uint64(pool[at]) << np.uint64(56 - 8 * (at - start[new]))
    prefix[new] = packed
    return pool


@outer
def _merge(
    token, weight, width, keys, counts, first, many, known, table, places, shares, total,
    edge, least, made, achieved, prefix, pool, start, signals,
):  # fmt: skip
    """Merge while a pair occurs `least` times. `made` receives the merges, `achieved` their counts. Returns the pool.

    signals[0] counts merges, also for a progress bar; signals[1] asks to stop.
    """
    gone = edge + 1  # where the second part of a merged token began
    room = len(keys)
    heap, claimed = np.empty(room, np.int64), np.empty(room, np.int64)
    heaped = 0
    for pair in range(known):
        heap[heaped], claimed[heaped] = pair, counts[pair]
        _rise(heap, claimed, heaped, keys, prefix, pool, start)
        heaped += 1
    # By neighbour: gained count and places, to the left and to the right; which neighbours, and their new pairs.
    gained = np.zeros((len(width), 4), np.int64)
    gained[edge, 1] = gained[edge, 3] = 1  # so that an edge is never noted down
    lefts, rights = np.empty(len(width), np.int32), np.empty(len(width), np.int32)
    left_pair, right_pair = np.empty(len(width), np.int32), np.empty(len(width), np.int32)
    for one in range(len(width)):
        left_pair[one] = right_pair[one] = -1
    done = signals[0]
    while True:
        # The most frequent pair: sink entries that promise too much until the top one is true.
        while heaped > 0 and claimed[0] != counts[heap[0]]:
            claimed[0] = counts[heap[0]]
            if claimed[0] < least:
                heaped -= 1
                heap[0], claimed[0] = heap[heaped], claimed[heaped]
            _sink(heap, claimed, heaped, keys, prefix, pool, start)
        if heaped == 0 or done == len(made) or signals[1] != 0:
            return pool
        best = heap[0]
        achieved[done] = claimed[0]
        heaped -= 1
        heap[0], claimed[0] = heap[heaped], claimed[heaped]
        _sink(heap, claimed, heaped, keys, prefix, pool, start)
        left, right, new = keys[best] >> 32, keys[best] & _LOW, 256 + done
        pool = _name(new, left, right, prefix, pool, start)
        made[done, 0], made[done, 1] = left, right
        done += 1
        signals[0] = done

        # Every place, in ascending order ("aaaa" pairs up from the left); those that still hold the pair move to the front.
        span = width[left]
        whole = span + width[right]
        width[new] = whole
        begin = end = first[best]
        number_left = number_right = 0
        again = 0  # count of (new, left) that was made, and merged away at the next place: "abab"
        for entry in range(begin, begin + many[best]):
            at = places[entry]
            if token[at] != left or token[at + span] != right:
                continue
            share = shares[entry]
            places[end], shares[end] = at, share
            end += 1
            count = int(share)
            if count < 0:
                count = weight[~count]
            before, behind = token[at - 1], token[at + whole]
            token[at + span] = gone
            token[at] = token[at + whole - 1] = new
            if before == new:
                again += count
            if gained[before, 1] == 0:
                lefts[number_left] = before
                number_left += 1
            gained[before, 0] += count
            gained[before, 1] += 1
            if gained[behind, 3] == 0:
                rights[number_right] = behind
                number_right += 1
            gained[behind, 2] += count
            gained[behind, 3] += 1

        if known + number_left + number_right > room:
            while known + number_left + number_right > room:
                room *= 2
            keys, counts, first, many = (
                _longer(keys, room), _longer(counts, room), _longer(first, room), _longer(many, room)
            )  # fmt: skip
            heap, claimed = _longer(heap, room), _longer(claimed, room)
            table = _rehash(keys, known, room)
        fresh = known
        for number in range(number_left):
            one = int(lefts[number])
            count = gained[one, 0]
            if one != new:
                pair = table[_slot(table, keys, (one << 32) | left)]
                if pair >= 0:
                    counts[pair] -= count
            if count >= least:
                keys[known], counts[known], first[known], many[known] = (one << 32) | new, count, total, 0
                left_pair[one] = known
                total += gained[one, 1]
                known += 1
            gained[one, 0] = gained[one, 1] = 0
        for number in range(number_right):
            one = int(rights[number])
            count = gained[one, 2]
            pair = table[_slot(table, keys, (right << 32) | one)]
            if pair >= 0:
                counts[pair] -= count
            if one == left:
                count -= again
            if count >= least:
                keys[known], counts[known], first[known], many[known] = (new << 32) | one, count, total, 0
                right_pair[one] = known
                total += gained[one, 3]
                known += 1
            gained[one, 2] = gained[one, 3] = 0
        counts[best] = 0
        if known == fresh:
            continue
        # Of most merges nothing comes that is frequent enough; of this one does: list its places.
        if total > len(places):
            places, shares = _longer(places, 2 * total), _longer(shares, 2 * total)
        for entry in range(begin, end):
            at = places[entry]
            before = token[at - 1]
            pair = left_pair[before]
            if pair >= 0:
                places[first[pair] + many[pair]] = at - width[before]
                shares[first[pair] + many[pair]] = shares[entry]
                many[pair] += 1
            pair = right_pair[token[at + whole]]
            if pair >= 0:
                places[first[pair] + many[pair]] = at
                shares[first[pair] + many[pair]] = shares[entry]
                many[pair] += 1
        for pair in range(fresh, known):
            left_pair[keys[pair] >> 32] = right_pair[keys[pair] & _LOW] = -1
            table[_slot(table, keys, keys[pair])] = pair
            heap[heaped], claimed[heaped] = pair, counts[pair]
            _rise(heap, claimed, heaped, keys, prefix, pool, start)
            heaped += 1


def _next_least(least: int, peak: int, achieved: np.ndarray, wanted: int, min_frequency: int) -> int:
    """How often a pair shall occur to be listed in the next round: about the count of the last merge aimed at.

    Args:
        least: of the last round; 0 before the first.
        peak: at least the count of the most frequent pair.
        achieved: counts of the merges made so far.
        wanted, min_frequency: as in `merge_words_fast`.

    Counts of merges fall as a power of their number: the n-th has about peak / n at first, and falls faster later.
    """
    done = len(achieved)
    if least == 0:
        guess = peak / (1.3 * max(1, min(wanted, _FIRST_ROUND)))
    elif done < 2:
        guess = least / 8
    else:
        fall = np.log2(achieved[done // 2] / achieved[-1]) + 0.2
        guess = 0.7 * least * (done / min(wanted, _NEXT_ROUND * done)) ** fall
    return max(1, min_frequency, int(min(guess, least - 1 if least else peak)))


def _learn(words: WordCounts, made: np.ndarray, min_frequency: int, signals: np.ndarray) -> None:
    """All rounds; `made` receives the merges, `signals` their number."""
    wanted = len(made)
    tokens = 256 + wanted
    edge = tokens  # and tokens + 1 is "gone"
    size = len(words.text) + len(words.ends) + 2
    token = np.empty(size, np.uint16 if tokens + 2 <= 1 << 16 else np.int32)
    index = np.empty(0, np.int32 if size <= _INT32_PLACES else np.int64)
    weight = np.empty(len(words.ends), np.int64)
    achieved = np.empty(wanted, np.int64)
    start = np.empty(tokens + 1, np.int64)
    start[:257] = np.arange(257)
    pool = np.empty(1 << 16, np.uint8)
    pool[:256] = np.arange(256)
    prefix = np.zeros(tokens, np.uint64)
    prefix[:256] = np.arange(256, dtype=np.uint64) << np.uint64(56)
    width = np.ones(tokens + 2, np.int32)
    sketch = np.empty(_SKETCH, np.int64)
    size, _ = _spread(words.text, words.ends, words.counts, edge, token, weight)
    least = 0
    while signals[0] < wanted and signals[1] == 0 and least != max(1, min_frequency):
        size, _ = _compact(token, size, weight, width, edge, sketch)
        least = _next_least(least, int(sketch.max()), achieved[: signals[0]], wanted, min_frequency)
        listed = _survey(token, size, weight, edge, sketch, least, index)
        pool = _merge(token, weight, width, *listed, edge, least, made, achieved, prefix, pool, start, signals)


def merge_words_fast(
    words: dict[bytes, int] | WordCounts,
    merges: int,
    min_frequency: int = 1,
    tick: Tick = lambda done: None,
    show: bool = False,
) -> list[Pair]:
    """Like `merging.merge_words`; `tick` is called twenty times a second at most, with the number of new merges.

    The first call on a machine compiles the loop (a few seconds; with `show` a line says so); Numba keeps the result beside
    this file, or in the user's cache folder, for all later ones.
    """
    table = words if isinstance(words, WordCounts) else WordCounts.of(words)
    made = np.empty((merges, 2), np.int32)
    signals = np.zeros(2, np.int64)
    failure: list[BaseException] = []
    announce(_merge, "the merge loop", show)

    def work() -> None:
        try:
            _learn(table, made, min_frequency, signals)
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
    tick(int(signals[0]) - shown)
    pairs: Any = made[: signals[0]].tolist()
    return [(left, right) for left, right in pairs]
