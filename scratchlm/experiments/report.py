"""report.html: the comparison as one page that needs nothing but itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from scratchlm.evaluate.plots import png_bytes
from scratchlm.evaluate.report import amount
from scratchlm.experiments import pictures
from scratchlm.experiments.comparison import Comparison, cells, sentences, shown_columns
from scratchlm.experiments.critical_batch import CriticalBatch, fit_critical_batch, tokens_to
from scratchlm.experiments.plan import Outcomes, Plan
from scratchlm.experiments.results import curve_of
from scratchlm.files import write_bytes, write_text
from scratchlm.pages import page_templates
from scratchlm.resources.page import svg, variables

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def batch_points(comparison: Comparison, plan: Plan) -> list[tuple[float, list[float]]]:
    """Tokens per step and, by seed, tokens to the target, of every variant at its own rate; empty without a target."""
    target = comparison.experiment.spec.target_bits_per_byte
    if target is None:
        return []
    points = []
    for variant in comparison.experiment.variants:
        choice = plan.choices.get(variant.name)
        if choice is None:
            continue
        curves = [curve_of(trial.folder) for trial in plan.of(variant.name, choice.factor)]
        found = [tokens_to(curve["tokens"], curve["bits_per_byte"], target) for curve in curves]
        points.append((float(variant.recipe.train.batch_size * variant.recipe.model.context_length), found))
    return points


def critical_batch(points: Sequence[tuple[float, Sequence[float]]]) -> CriticalBatch | None:
    """The critical batch size, where the variants differ in their batches."""
    if len({size for size, _ in points}) < 3:
        return None
    return fit_critical_batch([size for size, _ in points], [found for _, found in points])


def batch_sentence(
    points: Sequence[tuple[float, Sequence[float]]], fitted: CriticalBatch | None, target: float
) -> str:
    """What the batch sizes came to."""
    reached = sum(any(math.isfinite(value) for value in found) for _, found in points)
    text = f"{reached} of {len(points)} variants reached {target:g} bits per byte."
    if fitted is None:
        return text + " A critical batch size needs three batch sizes that do."
    if math.isinf(fitted.critical):
        return text + " Larger batches needed no more tokens: the critical batch size lies beyond those tried."
    spread = (
        f" (90 % of bootstrap draws: {amount(fitted.low)} to {amount(fitted.high)})"
        if math.isfinite(fitted.low)
        else ""
    )
    return (
        f"{text} The critical batch size is about {amount(fitted.critical)} tokens{spread}; the fewest tokens to the target, with tiny batches, are "
        f"{amount(fitted.least_tokens)}."
    )


TITLES = {
    "differences": "Differences",
    "sweep": "What was swept",
    "curves": "Validation loss, mean and range of the seeds",
    "costs": "What it costs",
    "rates": "Learning rates",
    "batches": "Batch sizes",
}
"""A picture's name and its heading in the report."""


def draw(comparison: Comparison, plan: Plan, outcome: Outcomes) -> dict[str, Figure]:
    """The pictures that there is something to draw for, by their names in :data:`TITLES`."""
    points = batch_points(comparison, plan)
    order = [variant.name for variant in comparison.experiment.variants]
    drawn = {
        "differences": pictures.differences_figure(comparison),
        "sweep": pictures.sweep_figure(comparison),
        "curves": pictures.curves_figure(comparison, outcome),
        "costs": pictures.pareto_figure(comparison),
        "rates": pictures.rates_figure(plan.choices, order),
        "batches": pictures.batch_figure(points, critical_batch(points)),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def write_pictures(comparison: Comparison, plan: Plan, outcome: Outcomes, folder: Path) -> None:
    """Write ``<name>.png`` for each of them, atomically; of the names in :data:`TITLES`, none is left that there is no picture for now."""
    drawn = draw(comparison, plan, outcome)
    for name in TITLES:
        path = folder / f"{name}.png"
        if name in drawn:
            write_bytes(path, png_bytes(drawn[name]))
        else:
            path.unlink(missing_ok=True)


def render_report(comparison: Comparison, plan: Plan, outcome: Outcomes) -> str:
    """The page's HTML.

    Args:
        comparison: its rows.
        plan: the runs behind it.
        outcome: what became of a trial.
    """
    spec = comparison.experiment.spec
    points = batch_points(comparison, plan)
    fitted = critical_batch(points)
    drawn = draw(comparison, plan, outcome)
    finished = sum(outcome(trial) is not None for trial in plan.trials)
    columns = shown_columns(comparison)
    return (
        page_templates("scratchlm.experiments")
        .get_template("experiment.html")
        .render(
            name=comparison.experiment.name,
            question=spec.question,
            light=variables("light"),
            dark=variables("dark"),
            unfinished=""
            if plan.complete and finished == len(plan.trials)
            else f"{finished} of {len(plan.trials)} runs are finished.",
            headers=[title for _, title in columns],
            rows=[([cells(row)[name] for name, _ in columns], row) for row in comparison.rows],
            text_columns={"variant", "verdict", "learning rate"},
            sentences=sentences(comparison),
            batches=batch_sentence(points, fitted, spec.target_bits_per_byte)
            if spec.target_bits_per_byte and points
            else "",
            pictures={TITLES[name]: svg(figure, f"p{n}") for n, (name, figure) in enumerate(drawn.items())},
            changes=[
                (
                    variant.name,
                    ", ".join(f"{path} = {value}" for path, value in variant.changes.items())
                    or "the recipe as it is",
                )
                for variant in comparison.experiment.variants
            ],
            rates=[
                (name, f"×{choice.factor:g}", ", ".join(f"×{f:g}: {loss:.4f}" for f, loss in choice.losses.items()))
                for name, choice in plan.choices.items()
                if choice.losses
            ],
        )
    )


def write_report(comparison: Comparison, plan: Plan, outcome: Outcomes, path: Path) -> None:
    """Write the page, atomically."""
    write_text(path, render_report(comparison, plan, outcome).encode("utf-8", "replace").decode("utf-8"))
