"""What one run came to: read from its metrics, kept beside them as ``result.json``; or why it failed, as ``failure.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from scratchlm.errors import UserError
from scratchlm.files import read_json, write_json
from scratchlm.train.metrics import read_metrics

RESULT, FAILURE = "result.json", "failure.json"

SPIKE_WINDOW, SPIKE_DEVIATIONS, SPIKE_AT_LEAST = 8, 6.0, 0.1
"""A spike is a logged training loss above the median of those `SPIKE_WINDOW` before it by `SPIKE_DEVIATIONS` robust standard
deviations of such rises in this run, and by `SPIKE_AT_LEAST` nats."""


@dataclass(frozen=True)
class Result:
    """Of a finished run.

    Attributes:
        key: hash of the recipe's fields that it depends on.
        loss, bits_per_byte: of the validation after the last step; per token, and per byte of text (NaN without text).
        best_loss: the least of all validations.
        steps, tokens: optimizer steps, and targets trained on.
        seconds: of training, validations and compiling included.
        tokens_per_second: median over the lines of metrics.
        parameters, active_parameters: in all, and those that one token meets.
        flops_per_token: of training, forward and backward.
        cache_bytes_per_token, cache_bytes_bounded: of keys and values in generation, in 16 bits.
        peak_memory: bytes; on a CPU resident, the interpreter's included, on CUDA of tensors.
        spikes: see :data:`SPIKE_DEVIATIONS`.
        skipped: steps whose loss or gradient was not finite.
        grad_norm_median, grad_norm_max: before clipping, of the steps that were logged.
    """

    key: str
    loss: float
    bits_per_byte: float
    best_loss: float
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    parameters: int
    active_parameters: int
    flops_per_token: float
    cache_bytes_per_token: int
    cache_bytes_bounded: int
    peak_memory: int
    spikes: int
    skipped: int
    grad_norm_median: float
    grad_norm_max: float

    @property
    def diverged(self) -> bool:
        """The last validation has no finite loss."""
        return not math.isfinite(self.loss)

    def save(self, folder: Path) -> None:
        """Write ``result.json``, atomically; a failure of before is forgotten."""
        values = {
            name: (value if not isinstance(value, float) or math.isfinite(value) else str(value))
            for name, value in asdict(self).items()
        }
        write_json(folder / RESULT, values)
        (folder / FAILURE).unlink(missing_ok=True)


@dataclass(frozen=True)
class Failure:
    """Of a run that ended in an error."""

    key: str
    message: str

    def save(self, folder: Path) -> None:
        """Write ``failure.json``, atomically."""
        write_json(folder / FAILURE, asdict(self))


def load_outcome(folder: Path, key: str) -> Result | Failure | None:
    """What became of the run of this key in `folder`; None: it is not finished, or another one lies there.

    Raises:
        UserError: a file is damaged.
    """
    for name, kind in ((RESULT, Result), (FAILURE, Failure)):
        path = folder / name
        if not path.exists():
            continue
        values = read_json(path, "result of a run")
        names = {field.name for field in fields(kind)}
        if not isinstance(values, dict) or set(values) != names:
            raise UserError(f"{path} is damaged or of another version; delete it, the run is then looked at anew")
        if values["key"] == key:
            numbers: dict[str, Any] = {
                name: float(value) if name not in ("key", "message") and isinstance(value, str) else value
                for name, value in values.items()
            }
            return kind(**numbers)
    return None


def figures_of(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The fields of :class:`Result` that are in the metrics.

    Raises:
        UserError: no validation was recorded.
    """
    training = [record for record in records if record.get("kind") == "train"]
    judged = [record for record in records if record.get("kind") == "validation"]
    if not judged:
        raise UserError(
            "the run has no validation to be compared by; hold out some text (corpus.validation_fraction)"
        )
    norms = [record["grad_norm"] for record in training]
    finite = [norm for norm in norms if math.isfinite(norm)]
    last = judged[-1]
    speeds = [record["tokens_per_second"] for record in training]
    return {
        "loss": last["loss"],
        "bits_per_byte": last.get("bits_per_byte", math.nan),
        "best_loss": min((record["loss"] for record in judged if math.isfinite(record["loss"])), default=math.nan),
        "steps": last["step"],
        "tokens": last["tokens"],
        "seconds": last["seconds"],
        "tokens_per_second": float(np.median(speeds)) if speeds else math.nan,
        "spikes": count_spikes([record["loss"] for record in training]),
        "grad_norm_median": float(np.median(finite)) if finite else math.nan,
        "grad_norm_max": max(norms, default=math.nan) if len(finite) == len(norms) else math.inf,
    }


def count_spikes(losses: Sequence[float]) -> int:
    """How often the training loss jumped (see :data:`SPIKE_DEVIATIONS`); a jump that lasts counts once.

    Args:
        losses: of the lines of metrics, in order; one that is not finite is a spike.
    """
    rises = [
        loss - float(np.median(before)) if (before := _finite(losses[max(0, at - SPIKE_WINDOW) : at])) else 0.0
        for at, loss in enumerate(losses)
    ]
    known = np.array([rise for rise in rises if math.isfinite(rise)])
    if not len(known):
        return int(bool(len(losses)))
    spread = 1.4826 * float(np.median(np.abs(known - np.median(known))))
    limit = max(SPIKE_DEVIATIONS * spread, SPIKE_AT_LEAST)
    above = [not math.isfinite(loss) or rise > limit for loss, rise in zip(losses, rises, strict=True)]
    return sum(now and not before for before, now in zip([False, *above], above, strict=False))


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def curve_of(folder: Path, kind: str = "validation") -> dict[str, np.ndarray]:
    """A run's curve: ``step``, ``tokens``, ``seconds``, ``loss`` and, of validations, ``bits_per_byte``; float64 arrays."""
    names = ["step", "tokens", "seconds", "loss"] + (["bits_per_byte"] if kind == "validation" else [])
    path = folder / "metrics.jsonl"
    records = [r for r in read_metrics(path) if r.get("kind") == kind] if path.exists() else []
    return {name: np.array([float(record.get(name, math.nan)) for record in records]) for name in names}
