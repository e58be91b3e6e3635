"""Which learning rates work: one run in which the rate rises from far too small to far too large.

::

    loss │‾‾‾‾‾‾╲                     ╱        first nothing is learnt, then more and more per step,
         │       ╲                   ╱         and from some rate on the run breaks: that edge is what one
         │        ╲______________ __╱          wants to know, and to stay below
         └───────────────────────────── rate (log)
               steepest     least  edge

(Smith 2017, "Cyclical learning rates", arXiv 1506.01186, §3.3.) It is an ordinary run with ``optim.schedule = rise``. A rate read off it is a place to
start from, not the best one: that takes whole runs (`scratchlm ablate` with ``[rates]``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scratchlm.config import Recipe
from scratchlm.errors import UserError
from scratchlm.files import write_bytes, write_json
from scratchlm.train.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMOOTHING = 0.9
"""Of the running mean of the losses, whose beginning is corrected as Adam's moments are."""
BROKEN = 0.25
"""A run has broken when the smoothed loss has given back so much of what it had gained."""


@dataclass(frozen=True)
class Found:
    """What a rising run shows; rates are ``optim.lr``, the others rise with it in proportion.

    Attributes:
        steepest: where the smoothed loss falls most per factor of the rate.
        least: where it is least.
        edge: the first rate after that at which training is broken; None: it never was.
        non_finite: it ended in a loss or gradient that is not finite.
        suggested: a third of the edge, at most `least`; without an edge `least`.
    """

    steepest: float
    least: float
    edge: float | None
    non_finite: bool
    suggested: float


def rising(recipe: Recipe, low: float, high: float, steps: int) -> Recipe:
    """The run: every learning rate of `recipe` from `low` to `high` times its value, by equal factors, in `steps` steps.

    Raises:
        UserError: `low` is not below `high`, or a rate becomes larger than a recipe may have.
    """
    if not 0 < low < high:
        raise UserError(f"--low {low:g} must be above 0 and below --high {high:g}")
    from scratchlm.experiments.plan import scaled_rates

    optim = scaled_rates(recipe, high).optim
    values = optim.model_dump() | {"schedule": "rise", "warmup_steps": 0, "min_lr_ratio": low / high}
    if max(optim.lr, optim.muon_lr) > 1000:
        raise UserError(
            f"--high {high:g} makes a learning rate of {max(optim.lr, optim.muon_lr):g}; the most there is is 1000"
        )
    train = recipe.train.model_copy(
        update={
            "steps": steps,
            "log_interval": 1,
            "eval_interval": steps,
            "checkpoint_interval": steps,
            "max_non_finite": 0,
        }
    )
    out = recipe.out if recipe.out is not None else Path("runs") / f"{recipe.name}-lr"
    return recipe.model_copy(update={"optim": type(optim)(**values), "train": train, "out": out})


def smoothed(losses: Sequence[float]) -> np.ndarray:
    """Running mean, float64, unbiased from the first value on."""
    mean, found = 0.0, []
    for count, loss in enumerate(losses, start=1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        found.append(mean / (1 - SMOOTHING**count))
    return np.array(found)


def read_off(records: Sequence[Mapping[str, Any]]) -> Found:
    """What the metrics of a rising run show.

    Raises:
        UserError: there are too few steps to see anything.
    """
    training = [record for record in records if record.get("kind") == "train"]
    rates = np.array([record["lr"] for record in training])
    losses = smoothed([record["loss"] for record in training])
    non_finite = any(record.get("kind") == "event" and "skipped" in record.get("message", "") for record in records)
    if len(rates) < 10:
        raise UserError(f"only {len(rates)} steps before training broke: begin lower, with a smaller --low")
    at = int(np.argmin(losses))
    gained = max(losses[0] - losses[at], 1e-12)
    above = np.flatnonzero(losses[at:] > losses[at] + BROKEN * gained)
    edge: float | None = float(rates[at + above[0]]) if len(above) else None
    if edge is None and non_finite:
        edge = float(rates[-1])
    slopes = np.gradient(losses, np.log(rates))
    steepest = float(rates[int(np.argmin(slopes[: at + 1]))])
    least = float(rates[at])
    return Found(steepest, least, edge, non_finite, least if edge is None else min(edge / 3, least))


def find_learning_rate(recipe: Recipe, say: Any = print, show_progress: bool = True) -> Found:
    """Make the run (or go on with it, or take it as it is), and leave lr.json and lr.png in its folder.

    Args:
        recipe: from :func:`rising`.

    Raises:
        UserError: as training does, except that a loss that is not finite is what was looked for.
    """
    from scratchlm.pipeline import Pipeline

    pipeline = Pipeline(recipe, say=say, show_progress=show_progress)
    metrics = pipeline.folder / "metrics.jsonl"
    if not _broke(metrics):
        try:
            pipeline.run(until="train")
        except UserError:
            if not _broke(metrics):
                raise
    records = read_metrics(metrics)
    found = read_off(records)
    write_json(pipeline.folder / "lr.json", asdict(found))
    from scratchlm.evaluate.plots import png_bytes

    write_bytes(pipeline.folder / "lr.png", png_bytes(rates_figure(records, found)))
    return found


def _broke(metrics: Path) -> bool:
    """Whether the run has ended in a step that was skipped."""
    records = read_metrics(metrics) if metrics.exists() else []
    return bool(records) and records[-1].get("kind") == "event" and "skipped" in records[-1].get("message", "")


def rates_figure(records: Sequence[Mapping[str, Any]], found: Found) -> Figure:
    """Loss against the rate, with what was read off."""
    from scratchlm.model.draw.style import COLOURS, HUES, dress, legend, new_figure

    training = [record for record in records if record.get("kind") == "train"]
    rates, losses = [record["lr"] for record in training], [record["loss"] for record in training]
    mean = smoothed(losses)
    figure = new_figure("light", 9.6, 4.4)
    axes = figure.add_subplot()
    axes.plot(rates, losses, color=HUES["light"][0], alpha=0.4, linewidth=0.8)
    axes.plot(rates, mean, color=HUES["light"][0], linewidth=1.8, label="training loss, smoothed")
    marks = {"steepest": found.steepest, "suggested": found.suggested, "least": found.least, "edge": found.edge}
    for number, (name, rate) in enumerate(marks.items(), start=1):
        if rate is not None:
            axes.axvline(
                rate, color=HUES["light"][number], linewidth=1.3, linestyle="--", label=f"{name}: {rate:.3g}"
            )
    axes.set_xscale("log")
    low, high = float(mean.min()), float(mean[0])
    axes.set_ylim(low - 0.1 * (high - low) - 0.05, high + 0.6 * (high - low) + 0.05)
    dress(
        axes,
        "light",
        x="optim.lr (all learning rates rise together)",
        y="training loss (nats per token)",
        grid=True,
    )
    legend(axes, "light", loc="upper left")
    axes.tick_params(colors=COLOURS["light"]["ink"])
    return figure


def in_words(found: Found) -> list[str]:
    """What to tell the user."""
    lines = [f"loss falls most per factor at optim.lr = {found.steepest:.3g}, and is least at {found.least:.3g}"]
    if found.edge is None:
        lines.append("training did not break: raise --high to see where it does")
    else:
        how = "ended in a loss that is not finite" if found.non_finite else "lost a quarter of what it had gained"
        lines.append(f"training {how} from {found.edge:.3g} on")
    lines.append(f"to start from: optim.lr = {found.suggested:.3g} (the other learning rates in proportion)")
    return lines
