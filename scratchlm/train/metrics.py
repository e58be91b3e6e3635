"""metrics.jsonl: one JSON object per line, appended while training, readable at any moment.

Three kinds of lines, told apart by ``kind``::

    {"kind": "train", "step", "loss", "lr", "grad_norm", "tokens", "seconds", "tokens_per_second", "flops_per_second",
     "mfu", "memory_bytes"}
        and, with experts, "expert_load" (a list per layer), "expert_max_over_mean", "expert_dropped", "router_entropy",
        "router_loss", all of the step that is logged
    {"kind": "validation", "step", "loss", "perplexity", "bits_per_byte", "tokens", "seconds"}
        and, with ``optim.ema``, "loss_ema", "perplexity_ema", "bits_per_byte_ema" of the averaged weights
    {"kind": "event", "step", "message"}

Losses are in nats per token; ``tokens`` and ``seconds`` (training wall-clock) are cumulative, also over resumes. Speeds are
those since the last line, validations and checkpoints not counted: tokens are targets, FLOPs those of the model's own
products, forward and backward. ``mfu`` is their share of the device's peak (measured on this machine, else its maker's) and is
missing where no peak is known. ``memory_bytes`` is what is in use: :func:`scratchlm.train.live.memory_in_use`.

JSON has no NaN and no infinity, and a diverged run needs both. They are written as the strings ``"NaN"``,
``"Infinity"`` and ``"-Infinity"`` (null would forget which of the three it was), so that every line is JSON which any
parser takes, and :func:`read_metrics` turns them back into floats. Text fields (``kind``, ``message``) stay text.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from scratchlm.errors import UserError
from scratchlm.files import disk_errors, write_bytes

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_TEXT_FIELDS = frozenset({"kind", "message"})


def _writable(value: Any) -> Any:
    """A number, text, list or dict as strict JSON holds it; 0-d tensors and numpy scalars become Python numbers."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): _writable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_writable(item) for item in value]
    return value


def _readable(value: Any) -> Any:
    """The inverse of :func:`_writable` for everything but text fields."""
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: item if key in _TEXT_FIELDS else _readable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_readable(item) for item in value]
    return value


def _format(record: Mapping[str, Any]) -> bytes:
    line = json.dumps(_writable(record), ensure_ascii=False, allow_nan=False) + "\n"
    return line.encode("utf-8", "backslashreplace")  # a lone surrogate in a message must not stop a training run


def _parse(line: bytes) -> dict[str, Any] | None:
    """One record, or None where the line is not a JSON object."""
    try:
        record = json.loads(line)
    except ValueError:  # both a JSON and a UTF-8 error are one
        return None
    return _readable(record) if isinstance(record, dict) else None


def _read(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """All whole records, and whether the file ends as it should (every line whole, the last one ended)."""
    content = path.read_bytes()
    lines = content.split(b"\n")
    whole = lines.pop() == b""  # what follows the last line end: nothing, or the beginning of a line
    if not whole and content[content.rfind(b"\n") + 1 :].strip(b"\0 \r"):
        last = _parse(content[content.rfind(b"\n") + 1 :])
        if last is not None:  # everything but the line end was written
            lines.append(content[content.rfind(b"\n") + 1 :])
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record = _parse(line)
        if record is not None:
            records.append(record)
        elif number == len(lines):
            whole = False
        else:
            raise UserError(f"metrics file {path}, line {number} is not a JSON object; mend or remove that line")
    return records, whole


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read every record, in the order of the file.

    A torn last line, left by a process killed in mid-write, is passed over; an empty file has no records.

    Raises:
        UserError: the file is missing or unreadable, or a line other than the last is not a JSON object.
    """
    path = Path(path)
    try:
        return _read(path)[0]
    except FileNotFoundError as error:
        raise UserError(f"metrics file {path} does not exist; training writes it") from error
    except OSError as error:
        raise UserError(f"cannot read metrics file {path}: {error.strerror}") from error


class MetricsFile:
    """Append-only JSON lines: each record reaches the operating system before :meth:`log` returns.

    Killing the process therefore loses at most the line being written. Opening an existing file removes such a torn
    last line, so that what is appended never sticks to it.

    Args:
        path: the file; it and its folder are created where missing.

    Raises:
        UserError: the place cannot be written, the disk is full, or a line other than the last is not JSON.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file: FileIO | None = None
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                records, whole = _read(self.path)
                if not whole:
                    self._replace(records)
        self._open()

    def _open(self) -> None:
        with disk_errors(self.path):
            # Unbuffered: one write per line, nothing left behind in this process.
            self._file = self.path.open("ab", buffering=0)

    def _replace(self, records: Iterable[Mapping[str, Any]]) -> None:
        write_bytes(self.path, b"".join(_format(record) for record in records))

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one record.

        Args:
            record: ``kind``, ``step`` and what belongs to the kind; values are numbers, 0-d tensors, text.

        Raises:
            ValueError: ``kind`` or ``step`` is missing, or the file was closed.
            UserError: the disk is full.
        """
        if "kind" not in record or "step" not in record:
            raise ValueError(f"a metrics record needs kind and step: {dict(record)}")
        if self._file is None:
            raise ValueError(f"{self.path} is closed")
        line = memoryview(_format(record))
        with disk_errors(self.path):
            while line:  # a full disk may take a part first and refuse the rest
                line = line[self._file.write(line) :]

    def truncate_after(self, step: int) -> None:
        """Atomically drop every record with a step greater than `step`.

        A run resumed from the checkpoint of `step` does those steps again; without this its file would hold them
        twice. Afterwards it equals that of an uninterrupted run in everything but the measured times.

        Raises:
            UserError: the disk is full; the file is then as it was.
        """
        self.close()
        try:
            records, whole = _read(self.path)
            kept = [record for record in records if record.get("step", 0) <= step]
            if len(kept) < len(records) or not whole:
                self._replace(kept)
        finally:
            self._open()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
