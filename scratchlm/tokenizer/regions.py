"""Where special tokens lie in bytes: the texts between them, as the scanner wants them.

    data      I t ' s ␣ 4 2 < | e n d | > o k
    regions   [0, 7, 50256]            [14, 16, −1]        begin, end, id of the special token that follows (−1: none)

Special tokens nearly all begin with the same two bytes ("<|"), which text hardly ever holds. NumPy compares whole blocks with them
at memory's pace; only where both are found is the list of special tokens looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

# More beginnings than this take a compiled alternation instead.
_MOST_PAIRS = 4
_BLOCK = 1 << 16
# In shorter texts NumPy's calls cost more than they save.
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
        self._pairs = sorted(pairs) if len(pairs) <= _MOST_PAIRS and all(len(pair) == 2 for pair in pairs) else None

    def regions(self, data: bytes | memoryview, begin: int, end: int) -> list[Region]:
        """Rows (begin, end, id) that cover ``data[begin:end]``; the last one has id −1."""
        rows: list[Region] = []
        if self._pattern is not None:
            matches = (
                self._pattern.finditer(data, begin, end)
                if self._pairs is None or end - begin < _SHORT
                else self._candidates(np.frombuffer(data, np.uint8), data, begin, end)
            )
            for match in matches:
                rows.append((begin, match.start(), self._ids[match.group()]))
                begin = match.end()
        rows.append((begin, end, -1))
        return rows

    def _candidates(
        self, array: np.ndarray, data: bytes | memoryview, begin: int, end: int
    ) -> Iterator[re.Match[bytes]]:
        assert self._pattern is not None and self._pairs is not None
        done = begin
        for start in range(begin, end - 1, _BLOCK):
            block = array[start : min(start + _BLOCK + 1, end)]
            found = np.zeros(len(block) - 1, np.bool_)
            for first, second in self._pairs:
                found |= (block[:-1] == first) & (block[1:] == second)
            for place in np.flatnonzero(found).tolist():
                if start + place >= done and (match := self._pattern.match(data, start + place, end)):
                    done = match.end()
                    yield match
