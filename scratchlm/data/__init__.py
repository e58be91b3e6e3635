"""Corpora → token shards → batches.

``open_corpus`` reads text from where it lies, ``prepare`` tokenises and saves it, ``TokenData`` maps it back, the loaders
turn it into batches. Only the loaders need torch, which is imported when the first of them is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from scratchlm.data.corpus import Corpus, Document, open_corpus
from scratchlm.data.shards import prepare
from scratchlm.data.tokens import Manifest, TokenData, Tokens

if TYPE_CHECKING:
    from scratchlm.data.loader import (
        IGNORE_INDEX,
        Batch,
        EpochLoader,
        RandomLoader,
        evaluation_windows,
        get_batch,
    )
    from scratchlm.data.prefetch import Prefetcher

__all__ = [
    "IGNORE_INDEX",
    "Batch",
    "Corpus",
    "Document",
    "EpochLoader",
    "Manifest",
    "Prefetcher",
    "RandomLoader",
    "TokenData",
    "Tokens",
    "evaluation_windows",
    "get_batch",
    "open_corpus",
    "prepare",
]

_LOADERS = ("IGNORE_INDEX", "Batch", "EpochLoader", "RandomLoader", "evaluation_windows", "get_batch")


def __getattr__(name: str) -> Any:
    if name in _LOADERS:
        return getattr(importlib.import_module("scratchlm.data.loader"), name)
    if name == "Prefetcher":
        return importlib.import_module("scratchlm.data.prefetch").Prefetcher
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
