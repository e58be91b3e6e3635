"""Answers kept for the next time the same is asked.

An estimate takes a second or two, more than half of which is torch's import. The same question about the same model has the same answer, as long as
nothing changed of what it rests on: all of that is in the answer's name. So a wrong name finds nothing, never something wrong::

    the recipe with all its fields ──┐
    device, dtype, memory, price …   │
    every source file of the package ├──► hash ──► ~/.cache/scratchlm/answers/<hash>.json.gz
    torch, Python, processor, memory │
    the stored measurement ──────────┘

Nothing is kept with ``SCRATCHLM_KEEP_ANSWERS=0`` in the environment, and the folder may be deleted at any time.
"""

from __future__ import annotations

import gzip
import importlib.util
import os
import platform
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

import scratchlm
from scratchlm.config import Recipe
from scratchlm.errors import UserError
from scratchlm.files import file_hash, stable_hash, write_bytes
from scratchlm.machine import find_compiler, main_memory, processor, surely_no_accelerator
from scratchlm.processes import cores
from scratchlm.resources.answer import Estimate
from scratchlm.resources.measurement import default_path
from scratchlm.resources.tables import Target

FORMAT = 1
MOST = 100
"""How many answers are kept; those not asked for the longest go first."""

SWITCH = "SCRATCHLM_KEEP_ANSWERS"
_ENVIRONMENT = ("SCRATCHLM_", "TORCH", "PYTORCH", "OMP_", "MKL_", "ONEDNN_", "DNNL_", "CUDA_")
"""Variables that may have a say in what torch does begin with these."""


@dataclass
class Answer:
    """What :func:`scratchlm.resources.estimate.estimate` found, and what it was asked for."""

    estimate: Estimate
    target: Target


def folder() -> Path:
    """Where answers lie."""
    return default_path().parent / "answers"


def name_of(recipe: Recipe, options: Mapping[str, Any], here: str | None) -> str | None:
    """The name under which the answer to a question is kept; None: it is not kept.

    Args:
        recipe: with everything that the user changed.
        options: what was asked besides, as JSON values.
        here: the device, if it is one of this machine: ``auto``, ``cpu``, ``cuda:0`` …; None: one from a datasheet.
    """
    if os.environ.get(SWITCH) == "0":
        return None
    if recipe.tokenizer.path is not None and not recipe.model.vocab_size:
        return None  # its file says how large the vocabulary is
    if here is not None and here != "cpu" and not surely_no_accelerator():
        return None  # what there is, only torch knows
    try:
        folder()
    except RuntimeError:  # who has no home has no place for answers
        return None
    question = {"recipe": recipe.model_dump(mode="json"), "options": dict(options), "here": here}
    ground = {"format": FORMAT, "question": question, "surroundings": list(_surroundings())}
    return stable_hash(ground, 32)


def _surroundings() -> Iterator[Any]:
    """Everything besides the question that an answer rests on."""
    yield [sys.version, sys.platform, platform.machine(), cores(), main_memory(), find_compiler()]
    root = Path(scratchlm.__file__).parent
    yield sorted((str(path.relative_to(root)), _content(path)) for path in _sources(root))
    torch = importlib.util.find_spec("torch")
    if torch is not None and torch.origin is not None:
        yield [torch.origin, _content(Path(torch.origin).with_name("version.py"))]
    yield processor()
    with suppress(OSError):
        yield default_path().read_text(encoding="utf-8", errors="replace")
    yield sorted(pair for pair in os.environ.items() if pair[0].startswith(_ENVIRONMENT))


def _sources(root: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name != "__pycache__"]
        yield from (Path(place, name) for name in names if name.endswith((".py", ".cpp", ".h", ".toml", ".json")))


def _content(path: Path) -> str:
    """A hash of it; empty for what cannot be read, such as an editor's lock."""
    try:
        return file_hash(path)
    except OSError:
        return ""


def find(name: str) -> Answer | None:
    """The answer kept under a name; None: there is none, or none that can be read."""
    path = folder() / f"{name}.json.gz"
    try:
        found = _adapter().validate_json(gzip.decompress(path.read_bytes()))
    except (OSError, EOFError, zlib.error, ValidationError):
        return None
    with suppress(OSError):
        os.utime(path)  # the last to be thrown away
    return found


def keep(name: str, answer: Answer) -> Answer:
    """Keep an answer, if the disk lets us, and give it back as :func:`find` will: numbers of one kind, so that both print the same.

    One that JSON has no words for, such as an infinite price, is not kept.
    """
    try:
        text = _adapter().dump_json(answer)
        same = _adapter().validate_json(text)
    except ValueError:  # pydantic's, of both directions
        return answer
    if same != answer:
        return answer
    with suppress(OSError, UserError):
        folder().mkdir(parents=True, exist_ok=True)
        write_bytes(folder() / f"{name}.json.gz", gzip.compress(text, compresslevel=1))
        _throw_away()
    return same


def _throw_away() -> None:
    """All but the newest; others may do so at the same time."""
    by_age = sorted(folder().glob("*.json.gz"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in by_age[MOST:]:
        path.unlink(missing_ok=True)


def _adapter() -> TypeAdapter[Answer]:
    return TypeAdapter(Answer)
