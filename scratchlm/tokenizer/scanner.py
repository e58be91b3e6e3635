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

import functools
import importlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from scratchlm.tokenizer import scanner_reference
from scratchlm.tokenizer.patterns import PATTERNS, WITH_SCANNER, Pattern
from scratchlm.tokenizer.scanner_reference import TO_THE_END
from scratchlm.tokenizer.unicode_classes import class_pages

Scan = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], int]


# How far plain Python looks for the end of a pre-token.
_LOOK = 1 << 11


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

    def __call__(self, data: np.ndarray, regions: np.ndarray, cursor: np.ndarray, spans: np.ndarray) -> int:
        arguments = self.arguments(data)
        row = 0
        while True:
            row += self.compiled(*arguments(regions, cursor, spans[row:]))
            if row == len(spans) or cursor[0] == len(regions):
                return row
            row += self.by_reference(data, regions, cursor, spans[row:])

    @functools.cached_property
    def compiled(self) -> Any:
        """The function that Numba compiles."""
        return self._module.scan

    @functools.cached_property
    def _module(self) -> Any:
        return importlib.import_module(f"scratchlm.tokenizer.scanner_{self._family}")

    @functools.cached_property
    def _tables(self) -> tuple[np.ndarray, np.ndarray]:
        return class_pages()

    def arguments(self, data: np.ndarray) -> Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[Any, ...]]:
        """(regions, cursor, spans) → all arguments of `compiled` for the text `data`."""
        blocks = importlib.import_module("scratchlm.tokenizer.scanner_blocks")
        if data.flags.writeable:  # to Numba, arrays that may be written to are another type: one is enough
            data = data.view()
            data.flags.writeable = False
        edge = np.zeros(blocks.EDGE + blocks.READ, np.uint8)
        last = data[-blocks.EDGE :]
        edge[blocks.EDGE - len(last) : blocks.EDGE] = last
        edge.flags.writeable = False
        return lambda regions, cursor, spans: (
            data, regions, cursor, spans, *self._tables, self._option, edge, self._module.longer.address()
        )  # fmt: skip

    def by_reference(self, data: np.ndarray, regions: np.ndarray, cursor: np.ndarray, spans: np.ndarray) -> int:
        """End the pre-token at `cursor` in plain Python; or, if it is long or one of many, compile what ends it, and do nothing."""
        region, at = cursor.tolist()
        end = int(regions[region, 1]) - at
        match = getattr(scanner_reference, f"match_{self._family}")
        try:
            length = match(data[at : at + min(end, _LOOK)].tobytes(), 0, end, *self._tables, self._option)
        except IndexError:  # it wants to see what lies beyond
            self._module.longer.address(at_once=True)
            return 0
        if self._module.longer.address(length):
            return 0
        spans[0] = at, at + length
        cursor[1] = at + length
        return 1

    def __reduce__(self) -> tuple[type[Scanner], tuple[str, str, int]]:
        return (Scanner, (self.name, self._family, self._option))

    def __repr__(self) -> str:
        return f"Scanner({self.name!r})"


class RegexScanner:
    """The same for any other pattern, by the `regex` library: slow, and equal. What a pattern leaves out between two matches
    is a pre-token too.

    Matches may depend on what stands to their left, so a text is searched from its beginning; a call that goes on where the
    last one in this thread stopped goes on with its search.

    Args:
        pattern: a name or a pattern of the `regex` library.

    Raises:
        UserError: the pattern is none.
    """

    def __init__(self, pattern: str) -> None:
        self._pattern = Pattern(pattern)
        self.name = self._pattern.name
        self._open = threading.local()

    def __call__(self, data: np.ndarray, regions: np.ndarray, cursor: np.ndarray, spans: np.ndarray) -> int:
        row, (region, at) = 0, cursor.tolist()
        while region < len(regions) and row < len(spans):
            begin, end, following = regions[region].tolist()
            for piece in self._from(data, begin, end, at):
                spans[row] = at, at + piece
                at += piece
                row += 1
                if row == len(spans):
                    break
            if at == end and row < len(spans):
                spans[row] = -1, following
                row += 1
                region += 1
                at = int(regions[region, 0]) if region < len(regions) else at
        cursor[:] = region, at
        return row

    def _from(self, data: np.ndarray, begin: int, end: int, at: int) -> Iterator[int]:
        """Lengths in bytes of the pre-tokens from `at` on."""
        state = self._open.__dict__
        text = (data.ctypes.data, begin, end)
        if at == begin or state.get("text") != text or state["reached"] != at:
            # `data` is kept so that no other can get its address.
            state.update(text=text, data=data, reached=begin)
            state["lengths"] = self._lengths(bytes(data[begin:end]).decode("utf-8", "surrogateescape"))
            while state["reached"] < at:
                state["reached"] += next(state["lengths"])
        for length in state["lengths"]:
            state["reached"] += length
            yield length
        state.clear()

    def _lengths(self, text: str) -> Iterator[int]:
        for piece in self._pattern.pieces(text):
            yield len(piece) if piece.isascii() else len(piece.encode("utf-8", "surrogateescape"))

    def __reduce__(self) -> tuple[type[RegexScanner], tuple[str]]:
        return (RegexScanner, (self.name,))

    def __repr__(self) -> str:
        return f"RegexScanner({self.name!r})"


_SCANNERS = {
    "gpt2": Scanner("gpt2", "gpt2"),
    "cl100k": Scanner("cl100k", "cl100k", 3 + TO_THE_END),
    "llama3": Scanner("llama3", "cl100k", 3),
    "qwen2": Scanner("qwen2", "cl100k", 1),
    "o200k": Scanner("o200k", "o200k"),
}


def scanner_for(pattern: str) -> Scanner | None:
    """The compiled scanner of a pattern's name, or of a text that says the same; None if there is none for it."""
    return _SCANNERS.get(WITH_SCANNER.get(PATTERNS.get(pattern, pattern), ""))


def any_scanner(pattern: str) -> Scan:
    """The compiled scanner of `pattern`, or one that asks `regex`.

    Raises:
        UserError: the pattern is none.
    """
    return scanner_for(pattern) or RegexScanner(pattern)
