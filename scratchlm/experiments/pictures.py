"""The report's pictures: curves with the band of the seeds, differences with their intervals, loss against what was swept, speed and memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from scratchlm.experiments.comparison import Comparison, Row
from scratchlm.experiments.critical_batch import CriticalBatch
from scratchlm.experiments.plan import Choice, Outcomes, Trial
from scratchlm.experiments.results import Result, curve_of
from scratchlm.experiments.spec import Variant, flattened_lists
from scratchlm.model.draw.style import COLOURS, HUES, dress, new_figure
from scratchlm.section import flat_fields

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDE = 9.6  # inches
_STYLES = ("-", (0, (4, 2)), (0, (1, 1.5)))
_GRID = 200
"""Places along a curve at which seeds are averaged."""

Curve = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""x, mean, least, greatest over seeds."""


def colour(number: int) -> str:
    """Of the variant at this place."""
    return HUES["light"][number % len(HUES["light"])]


def style(number: int) -> object:
    """Its line: dashes where the colours begin anew."""
    return _STYLES[number // len(HUES["light"]) % len(_STYLES)]


def band(trials: Sequence[Trial], x: str, outcome: Outcomes, unit: str) -> Curve | None:
    """The validation losses of a row's runs over a common axis, where all of them have been; None without a curve.

    Args:
        trials: of one row.
        x: ``tokens``, ``flops``, or ``seconds`` at the speed of the fastest seed: without compiling, validations and what else the machine did.
        outcome: what became of a trial.
        unit: "bits per byte", else nats per token are drawn.
    """
    curves = []
    speed = max((one.tokens_per_second for t in trials if isinstance(one := outcome(t), Result)), default=math.nan)
    for trial in trials:
        found = outcome(trial)
        curve = curve_of(trial.folder)
        losses = curve["bits_per_byte" if unit == "bits per byte" else "loss"]
        if not isinstance(found, Result) or not len(losses):
            continue
        scale = {"tokens": 1.0, "flops": found.flops_per_token, "seconds": 1 / speed}[x]
        along = curve["tokens"] * scale
        finite = np.isfinite(losses)
        if finite.any():
            curves.append((along[finite], losses[finite]))
    if not curves:
        return None
    first, last = max(along[0] for along, _ in curves), min(along[-1] for along, _ in curves)
    if first >= last:  # a single validation
        ends = np.array([losses[-1] for _, losses in curves])
        return np.array([last]), ends.mean(keepdims=True), ends.min(keepdims=True), ends.max(keepdims=True)
    places = np.linspace(first, last, _GRID)
    values = np.stack([np.interp(places, along, losses) for along, losses in curves])
    return places, values.mean(0), values.min(0), values.max(0)


def curves_figure(comparison: Comparison, outcome: Outcomes) -> Figure | None:
    """Validation loss against tokens, FLOPs and seconds; None before any run has a curve."""
    figure = new_figure("light", _WIDE, 4.4)
    panels = figure.subplots(1, 3, sharey=True)
    labels = {
        "tokens": "tokens",
        "flops": "training FLOPs",
        "seconds": "training seconds (at the fastest seed's speed)",
    }
    drawn = False
    shown: list[np.ndarray] = []
    for axes, (x, label) in zip(panels, labels.items(), strict=True):
        for number, (row, trials) in enumerate(zip(comparison.rows, comparison.trials, strict=True)):
            curve = band(trials, x, outcome, comparison.unit)
            if curve is None:
                continue
            places, mean, low, high = curve
            drawn = True
            marker = "o" if len(places) == 1 else None
            axes.plot(
                places,
                mean,
                color=colour(number),
                linestyle=style(number),
                linewidth=1.6,
                label=label_of(row),
                marker=marker,
            )
            axes.fill_between(places, low, high, color=colour(number), alpha=0.2, linewidth=0)
            shown.append(mean[len(mean) // 5 :])
        dress(axes, "light", x=label, y=comparison.unit if axes is panels[0] else "", grid=True)
    if not drawn:
        return None
    values = np.concatenate(shown)
    margin = 0.08 * (values.max() - values.min()) or 0.1
    panels[0].set_ylim(values.min() - margin, values.max() + margin)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(
        handles,
        names,
        loc="outside lower center",
        ncols=min(4, len(names)),
        fontsize=8,
        frameon=False,
        labelcolor=COLOURS["light"]["ink"],
    )
    return figure


def label_of(row: Row) -> str:
    """A row's name in pictures."""
    return f"{row.variant} ×{row.factor:g}" if row.rate else row.variant


def differences_figure(comparison: Comparison) -> Figure | None:
    """Each row's difference to the reference with its interval, zero marked; None without any."""
    rows = [row for row in comparison.rows if row.difference is not None and math.isfinite(row.difference.mean)]
    if not rows:
        return None
    ink, faint = COLOURS["light"]["ink"], COLOURS["light"]["faint"]
    figure = new_figure("light", _WIDE, 0.9 + 0.32 * len(rows))
    axes = figure.add_subplot()
    hue = {"better": HUES["light"][2], "worse": HUES["light"][7]}
    means = [row.difference.mean for row in rows if row.difference is not None]
    halves = [(d.high - d.low) / 2 for row in rows if (d := row.difference) is not None and math.isfinite(d.low)]
    reach = max([*map(abs, means), float(np.median(halves)) if halves else 0.0]) or 1e-3
    for place, row in enumerate(reversed(rows)):
        d = row.difference
        assert d is not None
        paint = hue.get(row.verdict, faint)
        low, high = (
            max(d.low, d.mean - 4 * reach),
            min(d.high, d.mean + 4 * reach),
        )  # a wild one must not flatten the others
        if math.isfinite(d.low):
            axes.plot([low, high], [place, place], color=paint, linewidth=2)
            for end, whole, arrow in ((low, d.low, "<"), (high, d.high, ">")):
                if end != whole:  # it goes on
                    axes.plot([end], [place], marker=arrow, markersize=6, color=paint)
        axes.plot([d.mean], [place], marker="o", markersize=5, color=paint)
    axes.axvline(0, color=ink, linewidth=1)
    axes.set_yticks(range(len(rows)), [label_of(row) for row in reversed(rows)])
    axes.set_ylim(-0.6, len(rows) - 0.4)  # room for the first and the last
    dress(
        axes,
        "light",
        x=f"{comparison.unit} more than {comparison.experiment.spec.reference} (left is better)",
        grid=True,
    )
    return figure


def pareto_figure(comparison: Comparison) -> Figure | None:
    """Loss against speed, and against peak memory: what is on the line is not beaten in both by another; None without two points."""
    rows = [(number, row) for number, row in enumerate(comparison.rows) if row.figures and math.isfinite(row.loss)]
    if len(rows) < 2:
        return None
    figure = new_figure("light", _WIDE, 4.2)
    panels = figure.subplots(1, 2, sharey=True)
    losses = [row.bits if comparison.unit == "bits per byte" else row.loss for _, row in rows]
    for axes, (name, label, sign) in zip(
        panels,
        (("tokens_per_second", "tokens per second", -1), ("peak_memory", "peak memory, GB", 1)),
        strict=True,
    ):
        unit = 1e9 if name == "peak_memory" else 1.0
        xs = [row.figures[name] / unit for _, row in rows]
        for (number, row), x, loss in zip(rows, xs, losses, strict=True):
            axes.plot([x], [loss], marker="o", color=colour(number))
            axes.annotate(
                label_of(row),
                (x, loss),
                xytext=(5, 4),
                textcoords="offset points",
                fontsize=8,
                color=COLOURS["light"]["ink"],
            )
        line = frontier([(sign * x, loss) for x, loss in zip(xs, losses, strict=True)])
        axes.plot(
            [sign * x for x, _ in line],
            [y for _, y in line],
            color=COLOURS["light"]["faint"],
            linewidth=1,
            zorder=0,
        )
        axes.margins(x=0.18, y=0.12)
        dress(axes, "light", x=label, y=comparison.unit if axes is panels[0] else "", grid=True)
    return figure


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no other point beats in one coordinate without being worse in the other; less is better in both. Sorted by the first."""
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def sweep_figure(comparison: Comparison) -> Figure | None:
    """Validation loss against a swept number, a line for each combination of the other swept fields; None without three values of one.

    Rows without a loss are crosses at the upper edge. The recipe as it is belongs to the line whose other fields it shares. Points that no two of
    which share a line, as of random draws, are drawn without lines.
    """
    if comparison.experiment.spec.sweep is None:
        return None
    paths = list(flattened_lists(comparison.experiment.spec.sweep.fields))
    variants = {v.name: v for v in comparison.experiment.variants if not v.changes or list(v.changes) == paths}
    rows: dict[str, Row] = {}
    for row in comparison.rows:  # of a variant's two the first, at its own rate
        if row.variant in variants:
            rows.setdefault(row.variant, row)
    settings = {name: {path: _setting(variants[name], path) for path in paths} for name in rows}
    across, most = "", 2
    for path in paths:
        numbers = {setting[path] for setting in settings.values() if type(setting[path]) in (int, float)}
        named = [setting[path] for name, setting in settings.items() if variants[name].changes]
        if len(numbers) > most and all(type(value) in (int, float) for value in named):
            across, most = path, len(numbers)
    if not across:
        return None
    # The recipe as it is may have no number there, such as a width that follows from another.
    rows = {name: row for name, row in rows.items() if type(settings[name][across]) in (int, float)}
    lines: dict[str, list[tuple[float, Row]]] = {}
    for name, row in rows.items():
        rest = [f"{path.rpartition('.')[2]} = {settings[name][path]}" for path in paths if path != across]
        lines.setdefault(", ".join(rest), []).append((float(settings[name][across]), row))
    linked = any(len(points) > 1 for points in lines.values())
    if not linked:
        lines = {"": [point for points in lines.values() for point in points]}

    figure = new_figure("light", _WIDE, 3.8)
    axes = figure.add_subplot()
    in_bits = comparison.unit == "bits per byte"
    lost = False
    for number, (label, points) in enumerate(lines.items()):
        points.sort(key=lambda point: point[0])
        places = [x for x, _ in points]
        losses = [row.bits if in_bits else row.loss for _, row in points]
        errors = np.nan_to_num([row.bits_error if in_bits else row.error for _, row in points])
        axes.errorbar(
            places,
            losses,
            errors,
            color=colour(number),
            linestyle=style(number) if linked else "none",
            marker="o",
            markersize=5,
            capsize=3,
            label=label,
        )
        gone = [x for x, loss in zip(places, losses, strict=True) if not math.isfinite(loss)]
        lost |= _crosses(axes, gone, number)
    places_of_all = {float(settings[name][across]) for name in rows}
    positive = sorted(x for x in places_of_all if x > 0)
    if positive and positive[-1] >= 8 * positive[0]:
        if len(positive) == len(places_of_all):
            axes.set_xscale("log")
        else:
            axes.set_xscale("symlog", linthresh=positive[0])
    dress(axes, "light", x=across + " (×: diverged or failed)" * lost, y=comparison.unit, grid=True)
    if len(lines) > 1:
        _legend_outside(figure, axes)
    return figure


def _setting(variant: Variant, path: str) -> Any:
    """What a variant says of a field: in its changes, else in its recipe (of a preset, none)."""
    return variant.changes.get(path, flat_fields(variant.recipe).get(path))


def _crosses(axes: Axes, places: Sequence[float], number: int) -> bool:
    """What has no loss, at the upper edge; whether there is any."""
    axes.plot(places, [0.97] * len(places), "x", color=colour(number), transform=axes.get_xaxis_transform())
    return bool(places)


def rates_figure(choices: Mapping[str, Choice], order: Sequence[str]) -> Figure | None:
    """Validation loss against the factor of the learning rates, a line per variant; what broke is a cross at the upper edge. None without a sweep of rates."""
    swept = [name for name in order if name in choices and choices[name].losses]
    if not swept:
        return None
    figure = new_figure("light", _WIDE, 3.8)
    axes = figure.add_subplot()
    lost = False
    for number, name in enumerate(swept):
        losses = {f: loss for f, loss in choices[name].losses.items() if math.isfinite(loss)}
        axes.plot(
            list(losses),
            list(losses.values()),
            marker="o",
            color=colour(number),
            linestyle=style(number),
            label=name,
        )
        broken = [f for f, loss in choices[name].losses.items() if not math.isfinite(loss)]
        # Side by side where several break at one rate.
        lost |= _crosses(axes, [f * 2 ** (0.03 * number) for f in broken], number)
        best = choices[name].factor
        if best in losses:
            axes.plot([best], [losses[best]], marker="o", markersize=11, fillstyle="none", color=colour(number))
    axes.set_xscale("log", base=2)
    dress(
        axes,
        "light",
        x="learning rates, times the recipe's (circled: the best tried" + "; ×: broken" * lost + ")",
        y="validation loss",
        grid=True,
    )
    _legend_outside(figure, axes)
    return figure


def batch_figure(points: Sequence[tuple[float, Sequence[float]]], fitted: CriticalBatch | None) -> Figure | None:
    """Tokens to the target against tokens per step, with the fitted line and its critical batch; None without a point."""
    known = [(size, value) for size, values in points for value in values if math.isfinite(value)]
    if not known:
        return None
    figure = new_figure("light", _WIDE, 3.8)
    axes = figure.add_subplot()
    axes.plot([size for size, _ in known], [value for _, value in known], "o", color=colour(0), label="runs")
    if fitted is not None:
        sizes = np.geomspace(min(size for size, _ in known) / 1.5, max(size for size, _ in known) * 1.5, 100)
        axes.plot(
            sizes,
            fitted.least_tokens * (1 + sizes / fitted.critical),
            color=colour(1),
            label="E = E_min (1 + B / B_crit)",
        )
        if math.isfinite(fitted.critical):
            axes.axvline(fitted.critical, color=COLOURS["light"]["faint"], linewidth=1, label="critical batch size")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    dress(axes, "light", x="tokens per step", y="tokens to the target", grid=True)
    _legend_outside(figure, axes)
    return figure


def _legend_outside(figure: Figure, axes: Axes) -> None:
    handles, names = axes.get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside right upper", fontsize=8, frameon=False, labelcolor=COLOURS["light"]["ink"]
    )
