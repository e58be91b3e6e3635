"""What several commands need."""

from __future__ import annotations

import sys
from pathlib import Path

from tqdm import tqdm

from scratchlm.config import CorpusConfig
from scratchlm.errors import UserError


def say(message: str) -> None:
    """One line on standard output, above a progress bar if one is on the screen."""
    tqdm.write(message, file=sys.stdout)
    sys.stdout.flush()


def write(text: str) -> None:
    """Text on standard output as UTF-8, whatever the terminal's encoding, at once."""
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode("utf-8", "replace"))
    sys.stdout.buffer.flush()


def refuse_existing(path: Path | None, overwrite: bool) -> None:
    """Nothing is replaced unasked.

    Raises:
        UserError: `path` exists and `overwrite` is False.
    """
    if path is not None and path.exists() and not overwrite:
        raise UserError(f"{path} exists; choose another --out, or --overwrite True")


def corpus_of_files(files: list[str], like: CorpusConfig | None = None) -> CorpusConfig:
    """All documents of text, JSON-lines or parquet files (which, their names say); none: the embedded corpus.

    Args:
        files: paths or globs.
        like: how a run reads its text: where documents end, which field is the text, what becomes of bytes that are no UTF-8.

    Raises:
        UserError: files of several kinds.
    """
    if not files:
        return CorpusConfig(kind="python-stdlib", validation_fraction=0.0)

    def kind_of(name: str) -> str:
        if name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
            return "jsonl"
        return "parquet" if name.endswith(".parquet") else "text"

    kinds = {kind_of(name): name for name in files}
    if len(kinds) > 1:
        first, second = list(kinds.values())[:2]
        raise UserError(f"{first} and {second} are of different kinds; name files of one kind at a time")
    how = {} if like is None else like.model_dump(include={"separator", "text_field", "encoding_errors"})
    return CorpusConfig(kind=next(iter(kinds)), paths=files, validation_fraction=0.0, **how)


def take_preset(arguments: list[str]) -> str | None:
    """Take ``--model.preset NAME`` out of a recipe's options: it is no field, but stands for many.

    Raises:
        UserError: the name is missing.
    """
    option = "--model.preset"
    for at, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name != option:
            continue
        if not equals and at + 1 == len(arguments):
            raise UserError(f"{option}: which one? `scratchlm model list` shows them all")
        taken = [arguments.pop(at) for _ in range(1 if equals else 2)]
        return value if equals else taken[1]
    return None
