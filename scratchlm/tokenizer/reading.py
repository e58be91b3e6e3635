"""Reading a tokenizer's files: whatever cannot be one is refused before it fills the memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from scratchlm import files
from scratchlm.errors import UserError

LARGEST = 1 << 30
"""Bytes; the largest vocabularies in use take some 30 MB."""


def _check(path: Path, what: str) -> None:
    if path.is_dir():
        raise UserError(f"{what} {path} is a folder, not a file")
    if not path.exists():
        raise UserError(f"{what} {path} does not exist")
    if not path.is_file():
        raise UserError(f"{what} {path} is no regular file")
    if (size := path.stat().st_size) > LARGEST:
        raise UserError(f"{what} {path} has {size / 2**30:.1f} GiB; no tokenizer's file is that large")


def read_file(path: str | os.PathLike[str], what: str) -> bytes:
    """The content of a file.

    Raises:
        UserError: it is missing, a folder, unreadable or over :data:`LARGEST`; `what` names it in the message.
    """
    path = Path(path)
    try:
        _check(path, what)
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {what} {path}: {error.strerror}") from error


def read_json(path: str | os.PathLike[str], what: str) -> Any:
    """The value in a JSON file.

    Raises:
        UserError: as for :func:`read_file`, or it is no JSON.
    """
    path = Path(path)
    try:
        _check(path, what)
    except OSError as error:
        raise UserError(f"cannot read {what} {path}: {error.strerror}") from error
    return files.read_json(path, what)
