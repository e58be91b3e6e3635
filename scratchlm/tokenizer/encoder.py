"""Applying merges to one pre-token, exactly as training would have.

Of all adjacent pairs the one learnt first is merged, the leftmost of equals, until no pair is in the table:

    h e l l o     (l,l): 5   (h,e): 12   (ll,o): 40
    h e ll o      (h,e): 12  (ll,o): 40
    he ll o       (ll,o): 40
    he llo        nothing left

The rank table maps a pair of ids, packed into one integer, to its rank and the id it becomes:

    (left << 32 | right)  ──►  (rank << 32 | merged)
"""

from __future__ import annotations

import heapq
from array import array
from itertools import pairwise

_MASK = (1 << 32) - 1
_PLACE = (1 << 40) - 1
# Up to here, looking through the whole pre-token for the best pair is faster than keeping a heap.
_SHORT = 48


def merge_tokens(ids: list[int], ranks: dict[int, int]) -> list[int]:
    """`ids` of single bytes → ids after all merges; `ids` may be changed.

    O(n²) comparisons for short pre-tokens, O(n log n) with a heap for long ones; the results are equal.
    """
    return _merge_short(ids, ranks) if len(ids) <= _SHORT else _merge_long(ids, ranks)


def _merge_short(ids: list[int], ranks: dict[int, int]) -> list[int]:
    unknown = 1 << 64
    find = ranks.get
    found = [find(left << 32 | right, unknown) for left, right in pairwise(ids)]
    while found:
        best = min(found)
        if best == unknown:
            break
        position = found.index(best)
        ids[position : position + 2] = [best & _MASK]
        del found[position]
        if position:
            found[position - 1] = find(ids[position - 1] << 32 | ids[position], unknown)
        if position < len(found):
            found[position] = find(ids[position] << 32 | ids[position + 1], unknown)
    return ids


def _merge_long(ids: list[int], ranks: dict[int, int]) -> list[int]:
    # A doubly linked list of tokens and a heap of (rank << 40 | position): smallest rank first, leftmost of equals. An
    # entry whose pair has changed since is recognised by looking its pair up again. Arrays and plain integers, because
    # a pre-token of megabytes would take gigabytes as lists of tuples.
    end = len(ids)
    before = array("q", range(-1, end - 1))
    after = array("q", range(1, end + 1))
    find = ranks.get
    heap: list[int] = []
    for position in range(end - 1):
        known = find(ids[position] << 32 | ids[position + 1])
        if known is not None:
            heap.append(known >> 32 << 40 | position)
    heapq.heapify(heap)
    while heap:
        entry = heapq.heappop(heap)
        position = entry & _PLACE
        right = after[position]
        if ids[position] < 0 or right == end:
            continue
        known = find(ids[position] << 32 | ids[right])
        if known is None or known >> 32 != entry >> 40:
            continue
        merged = known & _MASK
        ids[position] = merged
        ids[right] = -1
        following = after[right]
        after[position] = following
        if following < end:
            before[following] = position
            known = find(merged << 32 | ids[following])
            if known is not None:
                heapq.heappush(heap, known >> 32 << 40 | position)
        previous = before[position]
        if previous >= 0:
            known = find(ids[previous] << 32 | merged)
            if known is not None:
                heapq.heappush(heap, known >> 32 << 40 | previous)
    return [token for token in ids if token >= 0]


class WordCache(dict[str, bytes]):
    """Pre-token → its ids as raw bytes of the array type, computed when first asked for.

    Raw bytes, because joining them is the fastest way in Python from a list of words to one array. Bounded: when full
    it starts afresh (frequent words are back at once); long pre-tokens are not kept.

    Args:
        byte_ids: id of each single byte value.
        ranks: the rank table.
        whole: byte strings that are taken as one token without merging (empty for classic BPE).
        dtype: numpy type code of ids, ``"H"`` (uint16) or ``"I"`` (uint32).
        limit: most entries.
    """

    MAX_WORD = 64

    def __init__(
        self, byte_ids: list[int], ranks: dict[int, int], whole: dict[bytes, int], dtype: str, limit: int = 1 << 17
    ) -> None:
        super().__init__()
        self._byte_ids = byte_ids
        self._ranks = ranks
        self._whole = whole
        self._dtype = dtype
        self._limit = limit

    def __missing__(self, word: str) -> bytes:
        raw = word.encode("utf-8", "surrogateescape")
        known = self._whole.get(raw)
        if known is not None:
            ids = [known]
        else:
            byte_ids = self._byte_ids
            ids = merge_tokens([byte_ids[byte] for byte in raw], self._ranks)
        packed = array(self._dtype, ids).tobytes()
        if len(word) <= self.MAX_WORD:
            if len(self) >= self._limit:
                self.clear()
            self[word] = packed
        return packed
