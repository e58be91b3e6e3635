"""The merge loop of BPE training (Sennrich et al. 2016, algorithm 1), with incremental pair counts.

Words are kept as lists of token ids, each with its count; a pair's count is the sum over the words that hold it:

    word        tokens         count        pair counts             where
    low         l o w             5         (l,o): 5+2+6 = 13       {0, 1, 2}
    lower       l o w e r         2         (o,w): 13               {0, 1, 2}
    lowest      l o w e s t       6         (w,e):  8   (e,s): 6    {1, 2}  {2}

The most frequent pair becomes a token; among equals the pair whose byte strings are lexicographically greater. Only the
words that hold it change, and only the counts of pairs at their seams, so nothing is counted twice. A heap with
outdated entries finds the next pair: counts of existing pairs only ever fall, so an entry found too high is put back
with its true count.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise

Pair = tuple[int, int]
Tick = Callable[[int], object]


class _Descending:
    """Turns Python's smallest-first heap around for byte strings: compares greater where the bytes are smaller."""

    __slots__ = ("pair",)

    def __init__(self, pair: tuple[bytes, bytes]) -> None:
        self.pair = pair

    def __lt__(self, other: _Descending) -> bool:
        return self.pair > other.pair


def merge_words(
    words: dict[bytes, int], merges: int, min_frequency: int = 1, tick: Tick = lambda done: None
) -> list[Pair]:
    """The first `merges` merges, fewer if no pair occurs `min_frequency` times any more.

    Args:
        words: pre-token → count.
        merges: how many are wanted.
        min_frequency: least count of a pair to be merged (at least 1).
        tick: called after every merge with 1, the number of new merges.

    Returns:
        pairs of token ids; ids below 256 are bytes, 256 + i is the token made by merge i.
    """
    tokens = [bytes([byte]) for byte in range(256)]
    splits = [list(word) for word in words]
    counts = list(words.values())
    pair_count: defaultdict[Pair, int] = defaultdict(int)
    where: defaultdict[Pair, set[int]] = defaultdict(set)
    for index, split in enumerate(splits):
        for pair in pairwise(split):
            pair_count[pair] += counts[index]
            where[pair].add(index)

    def entry(pair: Pair) -> tuple[int, _Descending, Pair]:
        return (-pair_count[pair], _Descending((tokens[pair[0]], tokens[pair[1]])), pair)

    heap = [entry(pair) for pair in pair_count]
    heapq.heapify(heap)
    made: list[Pair] = []
    while heap and len(made) < merges:
        claimed, _, pair = heap[0]
        if -claimed != pair_count[pair]:  # outdated
            heapq.heapreplace(heap, entry(pair)) if pair_count[pair] > 0 else heapq.heappop(heap)
            continue
        if -claimed < max(1, min_frequency):
            break
        heapq.heappop(heap)
        left, right = pair
        new = len(tokens)
        tokens.append(tokens[left] + tokens[right])
        made.append(pair)
        changed: set[Pair] = set()
        for index in where.pop(pair):
            split, count = splits[index], counts[index]
            merged: list[int] = []
            position, end = 0, len(split)
            while position < end:
                if position + 1 < end and split[position] == left and split[position + 1] == right:
                    merged.append(new)
                    position += 2
                else:
                    merged.append(split[position])
                    position += 1
            for old in pairwise(split):
                pair_count[old] -= count
            for now in pairwise(merged):
                pair_count[now] += count
                if new in now:
                    where[now].add(index)
                    changed.add(now)
            splits[index] = merged
        del pair_count[pair]
        for fresh in changed:
            heapq.heappush(heap, entry(fresh))
        tick(1)
    return made
