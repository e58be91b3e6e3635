"""Where special tokens lie in bytes: the texts between them, as the scanner wants them.

    data      I t ' s ␣ 4 2 < | e n d | > o k
    regions   [0, 7, 50256]            [14, 16, −1]        begin, end, id of the special token that follows (−1: none)

Special tokens nearly all begin with the same two bytes ("<|"), which text hardly ever holds. A compiled loop compares 64 bytes at once
with them (``pair_search.py``); only where both are found is the list of special tokens looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

# More beginnings than this take a compiled alternation instead.
_MOST_PAIRS = 4
# Places found before they are looked at.
_PLACES = 1 << 10
# In shorter texts a compiled loop is not worth it.
_SHORT = 1 << 13


# begin, end, id that follows or −1
Region = tuple[int, int, int]


class SpecialSearch:
    """Finds special tokens in bytes: the leftmost first, of those that begin at one place the longest.

    Args:
        ids: special token (UTF-8) → id.
    """

    def __init__(self, ids: dict[bytes, int]) -> None:
        self._ids = ids
        longest_first = sorted(ids, key=len, reverse=True)
        self._pattern = re.compile(b"|".join(map(re.escape, longest_first))) if ids else None
        pairs = {special[:2] for special in ids}
        few = 0 < len(pairs) <= _MOST_PAIRS and all(len(pair) == 2 for pair in pairs)
        self._pairs = np.array([list(pair) for pair in sorted(pairs)], np.uint8) if few else None

    def regions(self, data: bytes | memoryview, begin: int, end: int) -> list[Region]:
        """Rows (begin, end, id) that cover ``data[begin:end]``; the last one has id −1."""
        rows: list[Region] = []
        for match in self._matches(data, begin, end):
            rows.append((begin, match.start(), self._ids[match.group()]))
            begin = match.end()
        rows.append((begin, end, -1))
        return rows

    def occurs(self, data: bytes | memoryview) -> bool:
        """Whether there is any special token in `data`."""
        return any(True for _ in self._matches(data, 0, len(data)))

    def _matches(self, data: bytes | memoryview, begin: int, end: int) -> Iterator[re.Match[bytes]]:
        if self._pattern is None:
            return iter(())
        if self._pairs is None or end - begin < _SHORT:
            return self._pattern.finditer(data, begin, end)
        return self._candidates(data, begin, end)

    def _candidates(self, data: bytes | memoryview, begin: int, end: int) -> Iterator[re.Match[bytes]]:
        from scratchlm.tokenizer.pair_search import find_pairs

        assert self._pattern is not None and self._pairs is not None
        array = np.frombuffer(data, np.uint8)
        array.flags.writeable = False
        found = np.empty(_PLACES, np.int64)
        done = at = begin
        while at < end:
            count, at = find_pairs(array, at, end, self._pairs, found)
            for place in found[:count].tolist():
                if place >= done and (match := self._pattern.match(data, place, end)):
                    done = match.end()
                    yield match
