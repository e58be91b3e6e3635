"""A tokenizer and a text cut by it as one HTML page that needs nothing but itself."""

from __future__ import annotations

import os

from scratchlm.files import write_text
from scratchlm.tokenizer.inspect import Inspection, TokenView, WordView, laid_out, printable

# Words whose merges the page holds: enough to look at, and the page stays light.
_WORDS = 200


def _spaced(token: TokenView) -> str:
    return bytes.fromhex(token.hex).hex(" ")


def page(name: str, inspection: Inspection, words: list[WordView]) -> str:
    """The page.

    Args:
        name: of the tokenizer; the title.
        inspection: what to show; its text's tokens in alternating colours, with id and bytes where the pointer rests.
        words: words whose merges are shown step by step; of many, the first 200.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("scratchlm.tokenizer", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals.update(spaced=_spaced, laid_out=laid_out)
    most = max(inspection.lengths.values(), default=1)
    return environment.get_template("tokens.html").render(
        name=name,
        inspection=inspection,
        text=inspection.text,
        specials=[(printable(special.encode()), index) for special, index in inspection.special_tokens.items()],
        bars=[(length, number, max(0.4, 100 * number / most)) for length, number in inspection.lengths.items()],
        words=words[:_WORDS],
        left_out=max(0, len(words) - _WORDS),
    )


def save_page(path: str | os.PathLike[str], name: str, inspection: Inspection, words: list[WordView]) -> None:
    """Write :func:`page`, atomically."""
    write_text(path, page(name, inspection, words))
