"""What our HTML pages share: one look (``templates/page.css``) and one way to fill a template."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jinja2


def page_templates(package: str) -> jinja2.Environment:
    """The templates of a package, each of which may include ``page.css``.

    The style takes its colours from the page: ``--page``, ``--back`` (of its cards), ``--ink``, ``--soft``, ``--line``.
    What is filled in is escaped: names are text from elsewhere and may hold markup.
    """
    import jinja2

    return jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(package), jinja2.PackageLoader("scratchlm")]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
