"""Unicode normalisation before anything else is looked at (Qwen's tokenizers: NFC).

    raw text        e ◌́ <|im_end|> ◌́ x        special tokens are found in the raw text …
    between them    e ◌́      │      ◌́ x        … and what lies between is normalised, each part by itself
    normalised      é        │      ◌́ x

The forms are those of Unicode Standard Annex 15, by Python's `unicodedata`. Where characters are newer than its tables, other
programs may normalise what this one leaves alone. ``decode(encode(text))`` is the normalised text.

Text that arrives in chunks may be cut before a character that begins anew (no combining mark, nor a second half such
as a Hangul vowel): nothing to its left can change any more.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from typing import Literal

from scratchlm.errors import UserError
from scratchlm.tokenizer.stream import BLOCK, SpecialSplitter

Form = Literal["NFC", "NFD", "NFKC", "NFKD"]
FORMS: tuple[Form, ...] = ("NFC", "NFD", "NFKC", "NFKD")


def check_form(normalizer: str | None) -> Form | None:
    """The name of a normalisation form, or None.

    Raises:
        UserError: it is neither.
    """
    form = next((form for form in FORMS if form == normalizer), None)
    if form is None and normalizer is not None:
        raise UserError(f"normalizer = {normalizer!r}: name {', '.join(FORMS)}, or None for text as it is")
    return form


def begins_anew(character: str) -> bool:
    """Whether text before `character` is normalised in the same way with and without it (False where unsure).

    ASCII and Latin letters, Han, white space and punctuation: none of them combines with what precedes it.
    """
    return (
        character < "\u0300"
        or "\u3400" <= character <= "\u9fff"
        or unicodedata.category(character)[0] in "ZP"  # separators, punctuation
    )


def normalised(chunks: Iterable[str], form: Form) -> Iterator[str]:
    """Walk over `chunks` as one text; the pieces joined are ``unicodedata.normalize(form, "".join(chunks))``.

    What is held back is a block, or the longest stretch without a character that begins anew.
    """
    waiting, length = [], 0
    enough = BLOCK
    for chunk in chunks:
        waiting.append(chunk)
        length += len(chunk)
        if length < enough:
            continue
        text = "".join(waiting)
        cut = next((place for place in range(len(text) - 1, 0, -1) if begins_anew(text[place])), 0)
        if cut:
            yield unicodedata.normalize(form, text[:cut])
        waiting, length = [text[cut:]], len(text) - cut
        enough = max(BLOCK, 2 * length)
    yield unicodedata.normalize(form, "".join(waiting))


def raw_parts(chunks: Iterable[str], splitter: SpecialSplitter) -> Iterator[tuple[str, str | None]]:
    """Walk over `chunks` as one text: pieces of text in order, each with the special token that follows it, if one does.

    The text between two special tokens may come in many pieces; after the last one comes the end of the text.
    """
    waiting = ""
    for chunk in chunks:
        waiting += chunk
        start = 0
        while True:
            match = splitter.search(waiting, start)
            doubtful = splitter.possible_start(waiting, start)
            if match is None or match.start() >= doubtful:
                break
            yield waiting[start : match.start()], match.group()
            start = match.end()
        yield waiting[start:doubtful], None
        waiting = waiting[doubtful:]
    *parts, last = splitter.split(waiting)
    yield from zip(parts[::2], parts[1::2], strict=True)
    yield last, None
