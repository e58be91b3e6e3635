"""``python -m scratchlm.model.draw [DOCS]``: renew docs/architecture.md and its pictures."""

from __future__ import annotations

import sys
from pathlib import Path

from scratchlm.errors import UserError
from scratchlm.files import write_bytes, write_text
from scratchlm.model.draw.document import filled, pictures
from scratchlm.progress import progress


def main(docs: Path) -> None:
    """Write ``architecture/*.png`` and the generated parts of ``architecture.md`` into `docs`.

    Raises:
        UserError: the page is missing or lacks a mark.
    """
    page = docs / "architecture.md"
    if not page.exists():
        raise UserError(f"{page} does not exist; run this in the repository's root, or name the folder of the page")
    write_text(page, filled(page.read_text(encoding="utf-8")))
    for picture in progress(pictures(), description="draw", unit="picture"):
        write_bytes(docs / "architecture" / f"{picture.name}.png", picture.png())


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs"))
    except UserError as error:
        sys.exit(f"error: {error}")
