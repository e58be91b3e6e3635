"""Looking at a tokenizer: what its vocabulary holds, and how it cuts a text.

    text = "the theory"

    id    token      bytes
    262   the        74 68 65
    4583  ␣theory    20 74 68 65 6f 72 79       2 tokens, 10 bytes: 5.00 bytes per token

and how the merges of a word go on, one by one:

    merge                    ␣│t│h│e│o│r│y
       1   h + e             ␣│t│he│o│r│y
      33   ␣ + t             ␣t│he│o│r│y          …

`inspect` and `merge_steps` give plain data, which JSON can hold; `render` and `render_steps` draw it for a terminal, `inspect_page.py` as
a page.
"""

from __future__ import annotations

import functools
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from scratchlm.tokenizer.patterns import Pattern
from scratchlm.tokenizer.stream import SpecialSplitter
from scratchlm.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, Group, RenderResult
    from rich.table import Table

LONGEST = 10
"""How many of the longest tokens are listed unless the caller says otherwise."""


# Bytes of a token that a table shows; the data holds all.
_SHOWN = 12
# Tokens of a text that a table lists.
_LISTED = 200
# Dark letters on light grounds read on terminals of either kind; neighbours differ.
_GROUNDS = ("#9fd0ff", "#ffd59b", "#b5e6b0", "#e9c3f2")
_SPECIAL = "bold #ffffff on #a3262e"


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


@dataclass(frozen=True)
class MergeStep:
    """One merge within a word.

    Attributes:
        rank: the merge's place in the order they were learnt; the lowest of all that were possible.
        left, right: the pair.
        pieces: the whole word afterwards.
    """

    rank: int
    left: TokenView
    right: TokenView
    pieces: list[TokenView]


@dataclass(frozen=True)
class WordView:
    """A pre-token and its merges.

    Attributes:
        hex, printable: the word.
        pieces: its single bytes, before any merge.
        steps: the merges, in order.
        whole: it is a token as a whole and taken so before any merge (`ignore_merges`); there are no steps then.
        ids: what it becomes.
    """

    hex: str
    printable: str
    pieces: list[TokenView]
    steps: list[MergeStep]
    whole: bool
    ids: list[int]


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
    view = _viewer(tokenizer)
    ordinary = [index for index in sorted(tokenizer.vocab) if index not in special]
    ordinary.sort(key=lambda index: -len(tokenizer.vocab[index]))
    lengths = Counter(len(tokenizer.vocab[index]) for index in ordinary)
    tokens = None
    if text is not None:
        ids = tokenizer.encode(text)
        size = len(text.encode("utf-8") if isinstance(text, str) else text)
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


def _viewer(tokenizer: Tokenizer) -> Callable[[int], TokenView]:
    special = set(tokenizer.special_tokens.values())

    @functools.cache
    def view(index: int) -> TokenView:
        token = tokenizer.vocab[index]
        return TokenView(index, token.hex(), printable(token), index in special)

    return view


def merge_steps(tokenizer: Tokenizer, text: str) -> list[WordView]:
    """The merges of every distinct pre-token of `text`, as they come; special tokens are passed over.

    Args:
        tokenizer: any.
        text: usually one word. O(n²) in the length of its longest pre-token.

    Raises:
        UserError: `text` holds a lone surrogate.
    """
    tokenizer.encode(text)  # refuses what cannot be encoded
    ids = {token: index for index, token in tokenizer.vocab.items()}
    ranks = {(ids[left], ids[right]): rank for rank, (left, right) in enumerate(tokenizer.merges)}
    special = set(tokenizer.special_tokens.values())
    view = _viewer(tokenizer)
    pattern = Pattern(tokenizer.pattern)

    def walk(word: bytes) -> WordView:
        pieces = [ids[word[place : place + 1]] for place in range(len(word))]
        whole = tokenizer.ignore_merges and word in ids and ids[word] not in special
        first = [view(index) for index in pieces]
        steps = []
        while not whole:
            known = [(ranks[pair], place) for place, pair in enumerate(pairwise(pieces)) if pair in ranks]
            if not known:
                break
            rank, place = min(known)
            left, right = pieces[place : place + 2]
            pieces[place : place + 2] = [ids[tokenizer.vocab[left] + tokenizer.vocab[right]]]
            steps.append(MergeStep(rank, view(left), view(right), [view(index) for index in pieces]))
        return WordView(word.hex(), printable(word), first, steps, whole, [ids[word]] if whole else pieces)

    words: dict[str, None] = {}
    for part in SpecialSplitter(tokenizer.special_tokens).split(text)[::2]:
        if tokenizer.normalizer is not None:
            part = unicodedata.normalize(tokenizer.normalizer, part)
        words |= dict.fromkeys(pattern.split(part))
    return [walk(word.encode("utf-8")) for word in words]


class Coloured:
    """A text whose tokens have alternating grounds, special tokens their own; where there are no colours (NO_COLOR, a
    file), a bar stands between tokens and angle quotes around special ones. For `rich.print`.

    A line end is shown as ⏎ and breaks the line.
    """

    def __init__(self, view: TextView) -> None:
        self._tokens = view.tokens

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        colours = console.color_system is not None and not console.no_color
        text = Text()
        for place, token in enumerate(self._tokens):
            shown = laid_out(token)
            if colours:
                style = _SPECIAL if token.special else f"#101418 on {_GROUNDS[place % len(_GROUNDS)]}"
                text.append(shown, style)
                continue
            if place and not text.plain.endswith("\n"):
                text.append("│")
            text.append(f"«{shown}»" if token.special else shown)
        yield text


def laid_out(token: TokenView) -> str:
    """A token as it stands in a text: spaces as they are, line ends as ⏎ and a new line, what does not print as escapes."""
    lines = bytes.fromhex(token.hex).split(b"\n")
    return "⏎\n".join(" ".join(printable(word) for word in line.split(b" ")) for line in lines)


def render_steps(words: list[WordView]) -> Group:
    """A table per word for `rich.print`: every merge, its rank, its pair, and the word afterwards."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    def joined(pieces: list[TokenView]) -> Text:
        return Text("│".join(piece.printable for piece in pieces))

    tables = []
    for word in words:
        table = Table("step", "merge", "pair", "pieces", title=Text(word.printable), title_justify="left")
        table.add_row("", "", "", joined(word.pieces))
        for number, step in enumerate(word.steps, 1):
            pair = Text(f"{step.left.printable} + {step.right.printable}")
            table.add_row(str(number), f"{step.rank:,}", pair, joined(step.pieces))
        if word.whole:
            table.add_row("", "", "is a token as a whole", Text(word.printable))
        table.caption = Text(f"ids: {' '.join(map(str, word.ids))}")
        table.caption_justify = "left"
        tables.append(table)
    return Group(*tables)


def render(inspection: Inspection) -> Group:
    """For `rich.print`: a summary, the longest tokens, the lengths as bars, the text in colours, and its tokens."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    summary = Table(title="tokenizer", title_justify="left", show_header=False)
    summary.add_row("vocabulary", f"{inspection.vocab_size:,} ids, {inspection.merges:,} merges")
    # Text, not str: rich would read [brackets] of a pattern or token as markup.
    summary.add_row("pattern", Text(inspection.pattern))
    specials = ", ".join(f"{name} = {index}" for name, index in inspection.special_tokens.items())
    summary.add_row("special tokens", Text(specials or "none"))
    shown: list[Table | Text | Coloured] = [summary, _token_table("longest tokens", inspection.longest)]

    histogram = Table("bytes", "tokens", "", title="token lengths", title_justify="left")
    most = max(inspection.lengths.values(), default=1)
    for length, number in inspection.lengths.items():
        histogram.add_row(str(length), f"{number:,}", "█" * max(1, round(40 * number / most)))
    shown.append(histogram)

    if inspection.text is not None:
        text = inspection.text
        shown.append(Coloured(text))
        shown.append(_token_table("text", text.tokens[:_LISTED]))
        if len(text.tokens) > _LISTED:
            shown.append(Text(f"… the first {_LISTED} tokens"))
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
