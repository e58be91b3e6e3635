r"""Pre-tokenisation: where a text may be cut before any merge is looked at.

BPE never merges across a pre-token, so the pattern decides what a token can be at most (GPT-2, Radford et al. 2019,
section 2.2):

    "Hello, it's  2026"  ──gpt2──►  Hello | , | ␣it | 's | ␣ | ␣2026

A pattern is one of three names or any pattern of the `regex` library. Text that a pattern leaves out (``\p{L}+`` leaves
out spaces) becomes pre-tokens of its own, so that nothing is ever lost:

    text       a b , c                 matches   a   b       c
    pre-tokens a ␣ b ␣,␣ c             gaps        ␣   ␣,␣
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

import regex

from scratchlm.errors import UserError

# gpt2 is OpenAI's published pattern. cl100k and o200k are those of tiktoken (openai_public.py), of which cl100k, other
# than in the early days, takes white space at the very end of a text as one pre-token.
PATTERNS: dict[str, str] = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++\Z|\s*[\r\n]|\s+(?!\S)|\s",
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}

_LIKE_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Texts with a scanner (``scanner.py``) → its name. Besides the named ones: other ways to write them, and the patterns in the
# files of Llama 3 (also cl100k's of earlier days) and Qwen 2 to 3, which take digits one by one.
WITH_SCANNER: dict[str, str] = {
    **{text: name for name, text in PATTERNS.items()},
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "gpt2",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++\Z|\s+(?!\S)|\s": "gpt2",
    _LIKE_CL100K: "llama3",
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+": "llama3",
    _LIKE_CL100K.replace("{1,3}", ""): "qwen2",
}

# What the classes above hold of ASCII (`regex` counts U+001C to U+001F as no white space; the standard `re` does).
_ASCII_CLASSES = {
    r"\p{L}": "A-Za-z", r"\p{N}": "0-9", r"\s": r"\t-\r ", r"\p{Lu}": "A-Z", r"\p{Ll}": "a-z",
    r"\p{Lt}": "", r"\p{Lm}": "", r"\p{Lo}": "", r"\p{M}": "",
}  # fmt: skip


def _for_ascii(text: str) -> re.Pattern[str]:
    """A named pattern for the standard library's `re`, which finds the same in ASCII text in half the time."""
    pieces = regex.split(r"(\[[^\]]*\])", text)  # character classes stand at the odd places
    for index, piece in enumerate(pieces):
        inside = index % 2 == 1
        for name, characters in _ASCII_CLASSES.items():
            piece = piece.replace(name, characters if inside else f"[{characters}]")
        pieces[index] = piece.replace(r"\S", r"[^\t-\r ]")
    return re.compile("".join(pieces))


_SEPARATOR = re.compile(r"[ \r\n]")

# What lets a match depend on text to its left, on the absolute end, or on a search for the best of several matches.
# With any of these, a match made in a part of a text says nothing about the whole.
_CONTEXT = regex.compile(r"\(\?<[=!]|\(\*|\(\?\(|\\[bBmMAGKXRZz]|[$^]|\{[^}]*[<=eids]|\(\?[a-zA-Z]*[ebpmwx]")


def _cut_anyway(text: str, at: int) -> bool:
    """Whether each named pattern cuts before ``text[at]`` whatever stands further left or right, and cuts both sides alike
    when the other is taken away. (Python's letters are letters for `regex` too, which knows a newer Unicode.)"""
    before, behind = text[at - 1], text[at]
    if behind == " ":  # of white space, only line ends may follow in one pre-token with something else
        return not before.isspace()
    if behind in "\r\n":
        return before.isascii() and before.isalnum()
    return before == "\n" and at > 1 and not text[at - 2].isspace() and behind.isalpha()


class Pattern:
    """A compiled pre-tokenisation pattern.

    Args:
        pattern: ``gpt2``, ``cl100k``, ``o200k``, or a pattern of the `regex` library.

    Attributes:
        name: the name, or the pattern's own text when it has none.
        text: what `regex` compiles.
        local: one of the three named patterns or another with a scanner: matches depend on nothing far away.

    Raises:
        UserError: `regex` cannot compile it, it searches backwards, is empty, or a plain word that is none of the names.
    """

    def __init__(self, pattern: str) -> None:
        if not isinstance(pattern, str):
            raise UserError(f"pattern = {pattern!r}: name {', '.join(PATTERNS)} or give a regex pattern")
        # A pattern that is one plain word would cut at that word only: certainly a misspelt name.
        if pattern not in PATTERNS and regex.fullmatch(r"[A-Za-z][\w-]*", pattern):
            raise UserError(
                f"unknown pre-tokenisation pattern {pattern!r}; name {', '.join(PATTERNS)} or give a regex pattern"
            )
        self.text = PATTERNS.get(pattern, pattern)
        self.name = next((name for name, text in PATTERNS.items() if text == self.text), self.text)
        self.local = self.text in WITH_SCANNER
        if not self.text:
            raise UserError(
                "the pre-tokenisation pattern is empty; name gpt2, cl100k, o200k or give a regex pattern"
            )
        try:
            self._compiled = regex.compile(self.text)
        except (regex.error, OverflowError, RecursionError) as error:
            raise UserError(
                f"pre-tokenisation pattern {self.text!r} is none of {', '.join(PATTERNS)} and not a valid pattern "
                f"of the regex library: {error}"
            ) from error
        if self._compiled.flags & regex.REVERSE:
            raise UserError(
                f"pre-tokenisation pattern {self.text!r} searches backwards, (?r); give one that reads on"
            )

    @functools.cached_property
    def _ascii(self) -> re.Pattern[str]:
        return _for_ascii(self.text)

    def __reduce__(self) -> tuple[type[Pattern], tuple[str]]:
        return (Pattern, (self.name,))

    def split(self, text: str) -> list[str]:
        """The pre-tokens of a whole text, in order; joined they are the text."""
        if self.local:
            return (self._ascii if text.isascii() else self._compiled).findall(text)
        return list(self.pieces(text))

    def pieces(self, text: str) -> Iterator[str]:
        """The same one by one: every non-empty match and every gap between."""
        end = 0
        for match in self._compiled.finditer(text):
            if match.start() == match.end():
                continue
            if match.start() > end:
                yield text[end : match.start()]
            yield match.group()
            end = match.end()
        if end < len(text):
            yield text[end:]

    def safe_cut(self, text: str, start: int, stop: int | None = None) -> int | None:
        """The first position from `start` on (before `stop`) where `text` may be split in two and each part
        pre-tokenised alone. None where there is no such place, and for patterns without a name."""
        if not self.local:
            return None
        stop = len(text) if stop is None else stop
        for match in _SEPARATOR.finditer(text, max(start - 1, 1), stop):
            at = match.start()
            for cut in (at, at + 1):
                if start <= cut < stop and _cut_anyway(text, cut):
                    return cut
        return None

    @functools.cached_property
    def _contextual(self) -> bool:
        """Whether a match may depend on more than the text from its start on (asked only of patterns without a
        name). Escaped pairs and character classes are taken out first: [^a] and \\$ are harmless."""
        bare = regex.sub(r"\\[^bBmMAGKXRZzpP]", "", self.text)
        bare = regex.sub(r"\[\^?\]?[^\]]*\]", "", bare)
        bare = regex.sub(r"\\[pP]\{[^}]*\}", "", bare)
        risky = regex.BESTMATCH | regex.ENHANCEMATCH | regex.POSIX | regex.MULTILINE | regex.WORD
        return bool(_CONTEXT.search(bare)) or bool(self._compiled.flags & risky)

    @functools.cached_property
    def _probe(self) -> regex.Pattern:
        # The atomic group takes the pattern's own match, and what follows can never match. Asked for a *partial*
        # match, regex therefore answers if, and only if, it wanted to read past the end of the text on its way.
        return regex.compile(rf"(?>{self.text})(?s:(?=.)(?!.))")

    def settled(self, text: str) -> tuple[list[str], int]:
        """The pre-tokens at the beginning of `text` that stay the same however the text goes on.

        Returns:
            them, and where the undecided rest begins: ``"".join(pieces) == text[:rest]``.
        """
        if self.local:
            return self._settled_locally(text)
        pieces: list[str] = []
        rest = 0
        if self._contextual:
            return pieces, rest
        # From left to right: a match stands if finding it did not touch the end, a gap if no attempt in it did.
        for match in self._compiled.finditer(text):
            tried = range(rest, match.start() + 1)
            if match.start() == match.end() or any(self._touches_end(text, position) for position in tried):
                break
            if match.start() > rest:
                pieces.append(text[rest : match.start()])
            pieces.append(match.group())
            rest = match.end()
        return pieces, rest

    def _touches_end(self, text: str, position: int) -> bool:
        return self._probe.match(text, position, partial=True) is not None

    def _settled_locally(self, text: str) -> tuple[list[str], int]:
        # Named patterns look at most three characters past a pre-token ('re), or to the end of the white space that
        # follows. So walk back to a pre-token whose match did not touch the end, and four more, for safety.
        pieces = self.split(text)
        start = len(text)
        while pieces:
            start -= len(pieces.pop())
            if not self._touches_end(text, start):
                break
        for _ in range(4):
            if pieces:
                start -= len(pieces.pop())
        return pieces, start
