"""Sizes in bytes, as people write them."""

from __future__ import annotations

import re

from scratchlm.errors import UserError

_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(?:e(\d{1,2}))?\s*(?:([kmgt])(i?))?b?", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_bytes(text: str) -> int:
    """``"80GB"`` → 80 · 10⁹, ``"24 GiB"`` → 24 · 2³⁰, ``"8e10"``; a number alone is bytes.

    Raises:
        UserError: it is no size, or none at all.
    """
    match = _SIZE.fullmatch(text.strip()) if len(text) <= 40 else None
    if match is None:
        raise UserError(f"memory {text[:40]!r} is no size; write it like 80GB, 512MiB or a number of bytes")
    number, exponent, prefix, binary = match.groups()
    unit = (1024 if binary else 1000) ** _POWERS[(prefix or "").lower()]
    size = int(float(number) * 10.0 ** int(exponent or 0) * unit)
    if not size:
        raise UserError(f"memory {text!r}: nothing fits in that; write it like 80GB, 512MiB or a number of bytes")
    return size
