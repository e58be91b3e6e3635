"""Hashes of content: has a file changed, is this corpus that corpus?

xxHash3 with 128 bits keeps up with memory (10 GB/s on one core, where BLAKE2b has 0.85), so that data can be checked wherever it
passes by. It finds every kind of accident. It does not stand against somebody who forges content on purpose; nothing here
is trusted because of it.
"""

from __future__ import annotations

import hashlib
from typing import Any

import xxhash

# What is written today. Folders of before carry BLAKE2b (128 bits) and can still be read.
ALGORITHM = "xxh3_128"
BEFORE = "blake2b"


def new(algorithm: str = ALGORITHM) -> Any:
    """An object with ``update`` and ``hexdigest``, as of hashlib.

    Raises:
        ValueError: the algorithm is unknown.
    """
    if algorithm == ALGORITHM:
        return xxhash.xxh3_128()
    if algorithm == BEFORE:
        return hashlib.blake2b(digest_size=16)
    raise ValueError(f"unknown hash algorithm {algorithm!r}")


def named(digest: Any, algorithm: str = ALGORITHM) -> str:
    """The digest as text that tells what it is: ``"xxh3_128:…"``."""
    return f"{algorithm}:{digest.hexdigest()}"
