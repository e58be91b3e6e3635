"""report.html: a run on one page that needs nothing but itself.

The page holds its pictures and its style, asks no server for anything, and reads in light and dark, on a screen and on
a phone. It is put together from whatever the run's folder has; what is missing is left out.
"""

from __future__ import annotations

import base64
import math
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from scratchlm.errors import UserError
from scratchlm.evaluate.metrics import Evaluation
from scratchlm.evaluate.plots import Layout, Theme, loss_figure, png_bytes
from scratchlm.evaluate.samples import read_samples
from scratchlm.files import read_json, write_text
from scratchlm.pages import page_templates
from scratchlm.train.metrics import read_metrics

_PREFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_MOST_ROWS = 40  # of the table of evaluations; the rest is in metrics.jsonl


def _number(value: Any) -> float | None:
    """A finite number, also from the strings that stand for NaN and infinity; None for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return None if math.isnan(number) else number


def decimals(value: Any, places: int = 3) -> str:
    """A figure with fixed decimals, large ones with thousands separators; "—" where there is none."""
    number = _number(value)
    if number is None:
        return "—"
    if math.isinf(number):
        return "∞" if number > 0 else "−∞"
    return f"{number:,.{places if abs(number) < 1000 else 0}f}"


def duration(value: Any) -> str:
    """Seconds as a person says them: 0.4 s, 2 min 05 s, 3 h 10 min."""
    seconds = _number(value)
    if seconds is None or math.isinf(seconds):
        return "—"
    if seconds < 60:
        return f"{seconds:.1f}\u00a0s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}\u00a0min {whole % 60:02d}\u00a0s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,}\u00a0h {minutes % 60:02d}\u00a0min"


def amount(value: Any) -> str:
    """A count with a unit prefix and three digits: 950, 14.5 M, 1.28 B."""
    number = _number(value)
    if number is None or math.isinf(number):
        return "—"
    if abs(number) < 1e4:
        return f"{number:,.0f}"
    number = float(f"{number:.3g}")  # first, or 999,999 would become 1000 k
    size, prefix = next((size, prefix) for size, prefix in _PREFIXES if abs(number) >= size)
    scaled = number / size
    return f"{scaled:,.{max(0, 2 - int(math.log10(abs(scaled))))}f}\u00a0{prefix}"


def _load(folder: Path, name: str) -> dict[str, Any]:
    """A JSON file of the run as a dict; empty where it is missing."""
    path = folder / name
    if not path.exists():
        return {}
    value = read_json(path, "run file")
    if not isinstance(value, dict):
        raise UserError(f"run file {path} is not a JSON object; remove it and run that step again")
    return value


def _bars(model: float | None, yardsticks: Mapping[str, float]) -> list[dict[str, Any]]:
    """Bits per byte of the model and beside it the compressors, each with a width in per cent of the longest."""
    values = {"this model": model, **yardsticks}
    longest = (
        max((bits for bits in values.values() if bits is not None and math.isfinite(bits)), default=0.0) or 1.0
    )
    return [
        {"name": name, "bits": bits, "width": f"{100 * min(bits or 0.0, longest) / longest:.2f}"}
        for name, bits in values.items()
    ]


def _pictures(records: Sequence[Mapping[str, Any]], yardsticks: Mapping[str, float]) -> dict[str, str]:
    """The loss curves as base64 PNGs: for light and dark pages, for wide and narrow screens."""
    pictures = {}
    themes: tuple[Theme, ...] = ("light", "dark")
    layouts: tuple[Layout, ...] = ("wide", "tall")
    for layout in layouts:
        figure = None
        for theme in themes:
            figure = loss_figure(records, yardsticks, theme=theme, layout=layout, placed_as=figure)
            pictures[f"{theme}_{layout}"] = base64.b64encode(png_bytes(figure)).decode("ascii")
    return pictures


def _thinned(rows: Sequence[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """At most `most` rows, evenly spread, first and last among them."""
    if len(rows) <= most:
        return list(rows)
    return [rows[round(index * (len(rows) - 1) / (most - 1))] for index in range(most)]


def _recipe_rows(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Dotted field → value, in the file's order."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += _recipe_rows(value, f"{prefix}{key}.")
        else:
            rows.append((prefix + key, value if isinstance(value, str) else repr(value)))
    return rows


def _recipe(folder: Path) -> dict[str, Any]:
    path = folder / "recipe.toml"
    if not path.exists():
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} is not valid TOML: {error}") from error


def _experts(training: list[dict[str, Any]]) -> dict[str, float] | None:
    """The routers' figures at the end of training; None for a dense model."""
    if not training or "expert_max_over_mean" not in training[-1]:
        return None
    names = ("expert_max_over_mean", "expert_dropped", "router_entropy")
    return {name: value for name in names if (value := _number(training[-1].get(name))) is not None}


def _facts(folder: Path, parameters: int | None) -> dict[str, Any]:
    """Everything the template shows, read from the run's folder."""
    records = read_metrics(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else []
    has_evaluation = (folder / "evaluation.json").exists()
    evaluation = Evaluation.load(folder / "evaluation.json").model_dump() if has_evaluation else {}
    timings = _load(folder, "timings.json")
    if not all(isinstance(step, dict) for step in timings.values()):
        raise UserError(f"run file {folder / 'timings.json'}: every step needs an object with seconds and action")
    environment, recipe = _load(folder, "environment.json"), _recipe(folder)
    if parameters is None:
        parameters = environment.pop("parameters", None)
    else:
        environment.pop("parameters", None)
    active = environment.pop("active_parameters", None)
    training = [record for record in records if record.get("kind") == "train"]
    validations = [record for record in records if record.get("kind") == "validation"]
    # A run cut off before its final evaluation still has the last one made while training.
    figures = evaluation or (validations[-1] if validations else {})
    compressors = evaluation.get("compressors", {})
    yardsticks = {name: bits for name, one in compressors.items() if (bits := _number(one["bits_per_byte"]))}
    speeds = [speed for record in training if (speed := _number(record.get("tokens_per_second")))]
    losses = [(loss, row.get("step")) for row in validations if (loss := _number(row.get("loss"))) is not None]
    return {
        "name": recipe.get("name") or folder.resolve().name,
        "figures": figures,
        "final": bool(evaluation),
        "compressors": compressors,
        "yardsticks": yardsticks,
        "bars": _bars(_number(figures.get("bits_per_byte")), yardsticks),
        "tokens_per_second": median(speeds) if speeds else None,
        "trained_tokens": training[-1].get("tokens") if training else None,
        "training_seconds": training[-1].get("seconds") if training else None,
        "steps": training[-1].get("step") if training else None,
        "parameters": parameters,
        "active_parameters": active,
        "experts": _experts(training),
        "timings": timings,
        "total_seconds": sum(_number(step.get("seconds")) or 0.0 for step in timings.values()),
        "pictures": _pictures(records, yardsticks) if training or validations else None,
        "validations": _thinned(validations, _MOST_ROWS),
        "validations_left_out": max(0, len(validations) - _MOST_ROWS),
        "best_step": min(losses, key=lambda pair: pair[0])[1] if losses else None,
        "events": [record for record in records if record.get("kind") == "event"],
        "samples": read_samples(folder / "samples.txt") if (folder / "samples.txt").exists() else [],
        "recipe": _recipe_rows(recipe),
        "environment": environment,
    }


def render_report(run_folder: str | os.PathLike[str], parameters: int | None = None) -> str:
    """The report's HTML. Arguments and errors are those of :func:`write_report`."""
    folder = Path(run_folder)
    if not folder.is_dir():
        raise UserError(f"run folder {folder} does not exist; scratchlm run makes one")
    environment = page_templates("scratchlm.evaluate")
    environment.filters.update(decimals=decimals, duration=duration, amount=amount)
    return environment.get_template("report.html").render(_facts(folder, parameters))


def write_report(run_folder: str | os.PathLike[str], parameters: int | None = None) -> Path:
    """Write ``report.html`` into a run's folder, atomically.

    Read, each only if it is there: ``recipe.toml``, ``metrics.jsonl``, ``evaluation.json``, ``samples.txt``,
    ``timings.json`` ({step: {"seconds", "action"}}), ``environment.json``.

    Args:
        run_folder: the run's folder.
        parameters: the model's parameter count; None: ``parameters`` of environment.json, if it has that.

    Returns:
        Path of the page.

    Raises:
        UserError: the folder does not exist, one of its files is broken, or the page cannot be written.
    """
    page = render_report(run_folder, parameters)
    path = Path(run_folder) / "report.html"
    write_text(path, page.encode("utf-8", "replace").decode("utf-8"))
    return path
