r"""Pre-tokens of UTF-8 bytes at memory's pace, for the patterns that nearly everybody uses.

    data      I t ' s ␣ 4 2 <|end|> o k            bytes, the whole buffer
    regions   [0, 7, 50256]  [14, 16, −1]          texts in it: begin, end, special token that follows (−1: none)
                    │
                    ▼  scanner(data, regions, cursor, spans)
    spans     [0, 2] [2, 4] [4, 7] [−1, 50256] [14, 16] [−1, −1]

A named pattern never looks to the left of where a match begins, so a scanner stops when `spans` is full and goes on from
`cursor` with no other state. What is found equals what `regex` finds, on every input (bytes that are not UTF-8 each stand for
a character of no class, as ``surrogateescape`` makes them).

Importing this module loads no Numba; the first call of a scanner does, and compiles it once per machine.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from scratchlm.tokenizer.patterns import PATTERNS
from scratchlm.tokenizer.unicode_classes import class_pages

Scan = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], int]


class Scanner:
    """A compiled scanner; calling it fills `spans`.

    Args of a call:
        data: uint8, contiguous. Only regions are read.
        regions: int64, shape (regions, 3): begin and end of a text, and the id that follows it.
        cursor: int64, shape (2,), changed: index of the region and place in it. (0, regions[0, 0]) at first;
            ``cursor[0] == len(regions)`` when all is done.
        spans: int64, shape (capacity, 2), changed: begin and end of each pre-token; at the end of each region one
            row (−1, the id that follows).

    Returns of a call:
        rows written; 0 only when all is done.
    """

    def __init__(self, name: str, family: str, option: int = 0) -> None:
        self.name = name
        self._family = family
        self._option = option
        self._compiled: Any = None

    def __call__(self, data: np.ndarray, regions: np.ndarray, cursor: np.ndarray, spans: np.ndarray) -> int:
        if self._compiled is None:
            self._tables = class_pages()
            self._compiled = importlib.import_module(f"scratchlm.tokenizer.scanner_{self._family}").scan
        if data.flags.writeable:  # to Numba, arrays that may be written to are another type: one is enough
            data = data.view()
            data.flags.writeable = False
        return int(self._compiled(data, regions, cursor, spans, *self._tables, self._option))

    def __reduce__(self) -> tuple[type[Scanner], tuple[str, str, int]]:
        return (Scanner, (self.name, self._family, self._option))

    def __repr__(self) -> str:
        return f"Scanner({self.name!r})"


_SCANNERS = {PATTERNS["gpt2"]: Scanner("gpt2", "gpt2")}


def scanner_for(pattern: str) -> Scan | None:
    """The scanner of a pattern's name, or of a text that says the same; None if there is none for it."""
    return _SCANNERS.get(PATTERNS.get(pattern, pattern))
