"""Text that arrives in pieces: hold back its end until nothing to come can change what has been decided.

    arrived so far    … the cat sat<|endof
                              │    │└────── may become <|endoftext|>: hold back
                              │    └─────── the word may go on: hold back
                      ────────┘ settled: hand out

Used for lazy encoding and for counting files larger than memory. What is held back is the longest special token plus
the last pre-tokens of the named patterns. For other patterns `regex` itself is asked whether a match looked at the end
(`Pattern.settled`); those which look to their left or at the absolute end of the text (``(?<=``, ``\\b``, ``^``, ``$`` …)
are held back until the next special token or the end of the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from scratchlm.errors import UserError
from scratchlm.tokenizer.patterns import Pattern

# Text is looked at in blocks about this long (characters).
BLOCK = 1 << 16
# Uncut text ends at a boundary found this close to the end.
_CLOSELY = 1 << 11


class Settled(NamedTuple):
    """Decided pre-tokens, then the special token that ended them, if one did; in front of them, where it was asked for, text
    that is decided but not yet cut: its pre-tokens alone are those it has here."""

    pieces: list[str]
    special: str | None
    text: str = ""


def check_specials(special_tokens: Iterable[str]) -> tuple[str, ...]:
    """Special tokens as a tuple.

    Raises:
        UserError: they are one str, or one of them is not a str, empty, named twice or not encodable.
    """
    if isinstance(special_tokens, str):
        raise UserError(f"special_tokens = {special_tokens!r} is one string; give a list of strings")
    specials = tuple(special_tokens)
    for special in specials:
        if not isinstance(special, str):
            raise UserError(f"special token {special!r} is of type {type(special).__name__}, not a str")
        if not special:
            raise UserError("a special token is empty; every special token needs at least one character")
        if any("\ud800" <= character <= "\udfff" for character in special):
            raise UserError(f"special token {special!r} holds a lone surrogate, which UTF-8 cannot hold; rename it")
        if specials.count(special) > 1:
            raise UserError(f"special token {special!r} is named twice; remove one")
    return specials


class SpecialSplitter:
    """Finds special tokens: the leftmost first, and of those that start at one place the longest."""

    def __init__(self, specials: Iterable[str]) -> None:
        self.specials = sorted(specials, key=len, reverse=True)
        self._compiled = re.compile("|".join(map(re.escape, self.specials))) if self.specials else None
        self._split = re.compile(f"({self._compiled.pattern})") if self._compiled else None
        self._prefixes = {special[:length] for special in self.specials for length in range(1, len(special))}
        self.longest = max(map(len, self.specials), default=0)

    def split(self, text: str) -> list[str]:
        """[text, special, text, special, …, text]: specials stand at the odd places; texts may be empty."""
        if self._split is None or not any(special in text for special in self.specials):
            return [text]
        return self._split.split(text)

    def search(self, text: str, start: int) -> re.Match[str] | None:
        """The first special token that starts at `start` or later."""
        return self._compiled.search(text, start) if self._compiled else None

    def possible_start(self, text: str, start: int) -> int:
        """The first place from `start` on where a special token may begin that the end of `text` cuts off."""
        for position in range(max(start, len(text) - self.longest + 1), len(text)):
            if text[position:] in self._prefixes:
                return position
        return len(text)

    def crosses(self, text: str, cut: int) -> bool:
        """Whether any special token, found by the search or not, lies across position `cut`."""
        return any(
            text.startswith(special, start)
            for special in self.specials
            for start in range(max(0, cut - len(special) + 1), cut)
        )


class TextStream:
    """Pre-tokens and special tokens of a text that arrives in chunks of any size.

    Args:
        pattern: how it is cut.
        splitter: its special tokens.
        uncut: hand out text uncut where that can be (`Settled.text`).
    """

    def __init__(self, pattern: Pattern, splitter: SpecialSplitter, uncut: bool = False) -> None:
        self._pattern = pattern
        self._splitter = splitter
        self._uncut = uncut
        self._waiting: list[str] = []
        self._length = 0
        self._enough = BLOCK

    def feed(self, chunk: str) -> list[Settled]:
        """Add `chunk`; return what is settled by now (often nothing)."""
        self._waiting.append(chunk)
        self._length += len(chunk)
        if self._length < self._enough:
            return []
        settled, rest = self._take("".join(self._waiting))
        self._waiting, self._length = [rest], len(rest)
        # One pre-token longer than a block would be scanned again for every chunk: wait for twice as much instead.
        self._enough = max(BLOCK, 2 * len(rest))
        return settled

    def finish(self) -> list[Settled]:
        """The text ends here: everything left."""
        parts = self._splitter.split("".join(self._waiting))
        self._waiting, self._length, self._enough = [], 0, BLOCK
        specials = [*parts[1::2], None]
        return [self._whole(text, special) for text, special in zip(parts[::2], specials, strict=True)]

    def _whole(self, text: str, special: str | None) -> Settled:
        return Settled([], special, text) if self._uncut else Settled(self._pattern.split(text), special)

    def _take(self, text: str) -> tuple[list[Settled], str]:
        settled = []
        start = 0
        while True:
            match = self._splitter.search(text, start)
            doubtful = self._splitter.possible_start(text, start)
            # A special cut off by the end may begin before the match ("ab" in sight, "xab…" possible), or with it.
            if match is None or match.start() >= doubtful:
                break
            settled.append(self._whole(text[start : match.start()], match.group()))
            start = match.end()
        # Only the end has to be looked at closely, behind a place that is a boundary whatever comes.
        near = max(start, doubtful - _CLOSELY)
        cut = self._pattern.safe_cut(text, near, doubtful) if self._uncut else None
        cut = start if cut is None else cut
        pieces, rest = self._pattern.settled(text[cut:doubtful])
        settled.append(Settled(pieces, None, text[start:cut]))
        return settled, text[cut + rest :]


def settle(
    chunks: Iterable[str], pattern: Pattern, splitter: SpecialSplitter, uncut: bool = False
) -> Iterator[Settled]:
    """Walk over `chunks` as one text, in memory that does not grow with it. `uncut`: see :class:`TextStream`."""
    stream = TextStream(pattern, splitter, uncut)
    for chunk in chunks:
        # A chunk may be a whole book: its pre-tokens must never all exist at once.
        for start in range(0, len(chunk), BLOCK):
            yield from stream.feed(chunk[start : start + BLOCK])
    yield from stream.finish()
