"""Looking at a tokenizer: what its vocabulary holds, and how it cuts a text.

    text = "the theory"

    id    token      bytes
    262   the        74 68 65
    4583  ␣theory    20 74 68 65 6f 72 79       2 tokens, 10 bytes: 5.00 bytes per token

`inspect` gives plain data, which JSON can hold; `render` draws it as tables for a terminal.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scratchlm.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

LONGEST = 10
"""How many of the longest tokens are listed unless the caller says otherwise."""


# Bytes of a token that a table shows; the data holds all.
_SHOWN = 12


@dataclass(frozen=True)
class TokenView:
    """One token: its id, its bytes as hex digits, its printable form, and whether it is a special token."""

    id: int
    hex: str
    printable: str
    special: bool


@dataclass(frozen=True)
class TextView:
    """A text as tokens.

    Attributes:
        tokens: one entry per token, in order.
        bytes: length of the text in UTF-8 bytes.
        characters: its length in characters (code points).
    """

    tokens: list[TokenView]
    bytes: int
    characters: int

    @property
    def bytes_per_token(self) -> float:
        """The compression ratio; 0.0 for an empty text."""
        return self.bytes / len(self.tokens) if self.tokens else 0.0


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    Attributes:
        vocab_size: ids in all.
        merges: merges learnt.
        pattern: name of the pre-tokenisation pattern, or its text.
        special_tokens: special token → id.
        lengths: length in bytes → number of ordinary tokens of that length, ascending.
        longest: the longest ordinary tokens, longest first, of equals the lower id first.
        text: the text that was given, as tokens.
    """

    vocab_size: int
    merges: int
    pattern: str
    special_tokens: dict[str, int]
    lengths: dict[int, int]
    longest: list[TokenView]
    text: TextView | None


def printable(token: bytes) -> str:
    r"""A token as one visible line: space ␣, bytes outside UTF-8 and what does not print as escapes (\n, \xe2, \u200b).

    A backslash is written twice, so an escape is never mistaken for text.
    """
    shown = []
    for character in token.decode("utf-8", "surrogateescape"):
        code = ord(character)
        if character == " ":
            shown.append("␣")
        elif 0xDC80 <= code <= 0xDCFF:  # a byte that is no UTF-8 by itself, as surrogateescape keeps it
            shown.append(f"\\x{code - 0xDC00:02x}")
        elif character != "\\" and character.isprintable():
            shown.append(character)
        elif code < 0x80:
            shown.append(character.encode("unicode_escape").decode("ascii"))
        else:
            shown.append(f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}")
    return "".join(shown)


def inspect(tokenizer: Tokenizer, text: str | bytes | None = None, longest: int = LONGEST) -> Inspection:
    """Describe `tokenizer`, and how it cuts `text`.

    Args:
        tokenizer: any.
        text: special tokens in it are recognised, as by `Tokenizer.encode`.
        longest: how many of the longest tokens to list.

    Raises:
        UserError: `text` cannot be encoded (a lone surrogate).
    """
    special = set(tokenizer.special_tokens.values())

    def view(index: int) -> TokenView:
        token = tokenizer.vocab[index]
        return TokenView(index, token.hex(), printable(token), index in special)

    ordinary = [index for index in sorted(tokenizer.vocab) if index not in special]
    ordinary.sort(key=lambda index: -len(tokenizer.vocab[index]))
    lengths = Counter(len(tokenizer.vocab[index]) for index in ordinary)
    tokens = None
    if text is not None:
        ids = tokenizer.encode(text)
        size = sum(len(tokenizer.vocab[index]) for index in ids)
        characters = len(text if isinstance(text, str) else text.decode("utf-8", "replace"))
        tokens = TextView([view(index) for index in ids], size, characters)
    return Inspection(
        vocab_size=tokenizer.vocab_size,
        merges=len(tokenizer.merges),
        pattern=tokenizer.pattern,
        special_tokens=dict(tokenizer.special_tokens),
        lengths=dict(sorted(lengths.items())),
        longest=[view(index) for index in ordinary[:longest]],
        text=tokens,
    )


def render(inspection: Inspection) -> Group:
    """Tables for `rich.print`: a summary, the longest tokens, the lengths as bars, and the text's tokens."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    summary = Table(title="tokenizer", title_justify="left", show_header=False)
    summary.add_row("vocabulary", f"{inspection.vocab_size:,} ids, {inspection.merges:,} merges")
    # Text, not str: rich would read [brackets] of a pattern or token as markup.
    summary.add_row("pattern", Text(inspection.pattern))
    specials = ", ".join(f"{name} = {index}" for name, index in inspection.special_tokens.items())
    summary.add_row("special tokens", Text(specials or "none"))
    shown: list[Table | Text] = [summary, _token_table("longest tokens", inspection.longest)]

    histogram = Table("bytes", "tokens", "", title="token lengths", title_justify="left")
    most = max(inspection.lengths.values(), default=1)
    for length, number in inspection.lengths.items():
        histogram.add_row(str(length), f"{number:,}", "█" * max(1, round(40 * number / most)))
    shown.append(histogram)

    if inspection.text is not None:
        text = inspection.text
        shown.append(_token_table("text", text.tokens))
        shown.append(
            Text(
                f"{len(text.tokens):,} tokens, {text.bytes:,} bytes, {text.characters:,} characters: "
                f"{text.bytes_per_token:.2f} bytes per token"
            )
        )
    return Group(*shown)


def _token_table(title: str, tokens: list[TokenView]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table("id", "token", "bytes", title=title, title_justify="left")
    for token in tokens:
        spaced = bytes.fromhex(token.hex[: 2 * _SHOWN]).hex(" ")
        if len(token.hex) > 2 * _SHOWN:
            spaced += f" … ({len(token.hex) // 2} bytes)"
        table.add_row(str(token.id), Text(token.printable, style="bold" if token.special else ""), spaced)
    return table
