"""Loss curves: training and validation, against steps and against wall-clock, in nats per token and bits per byte."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from scratchlm.files import write_bytes
from scratchlm.train.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Theme = Literal["light", "dark"]
Layout = Literal["wide", "tall"]

# Training and validation differ in hue and in lightness, so that they do so in grey and to colour-blind eyes as well.
_COLOURS: dict[Theme, dict[str, str]] = {
    "light": {"back": "#ffffff", "ink": "#1f2328", "faint": "#8b929a", "train": "#2f6fb4", "validation": "#d1570a"},
    "dark": {"back": "#14181d", "ink": "#e4e7ea", "faint": "#808892", "train": "#6cb0f5", "validation": "#ffa04d"},
}

_MOST_POINTS = 2000  # more than the picture has columns only costs time


def _series(records: Iterable[Mapping[str, Any]], kind: str, x: str) -> tuple[np.ndarray, np.ndarray]:
    """Finite (x, loss) pairs of one kind of record, two float64 arrays of equal length."""
    pairs = [
        (record[x], record["loss"])
        for record in records
        if record.get("kind") == kind
        and all(
            isinstance(record.get(field), int | float) and math.isfinite(record[field]) for field in (x, "loss")
        )
    ]
    table = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def smooth(values: Sequence[float] | np.ndarray, window: int | None = None) -> np.ndarray:
    """Centred running median, then centred running mean.

    The median takes out a lone spike altogether, where an average would smear it into a hill; centred, the curve does
    not lag behind a steep beginning. Towards both ends the window shrinks, staying symmetric.

    Args:
        values: length n.
        window: values looked at around each one; None: n / 25, at least 1 (which changes nothing).

    Returns:
        Float64 array of length n.
    """
    smoothed = np.asarray(values, dtype=np.float64)
    half = (len(smoothed) // 25 if window is None else window) // 2
    for centre in (np.median, np.mean):
        reach = [min(half, index, len(smoothed) - 1 - index) for index in range(len(smoothed))]
        smoothed = np.array([centre(smoothed[i - r : i + r + 1]) for i, r in enumerate(reach)], dtype=np.float64)
    return smoothed


def bits_per_byte_per_nat(records: Iterable[Mapping[str, Any]]) -> float | None:
    """How many bits per byte one nat per token is on this validation text, from its records; None without any."""
    ratios = [
        record["bits_per_byte"] / record["loss"]
        for record in records
        if record.get("kind") == "validation" and record.get("loss") and record.get("bits_per_byte")
    ]
    finite = [ratio for ratio in ratios if math.isfinite(ratio) and ratio > 0]
    return float(np.median(finite)) if finite else None


def _limits(curves: Sequence[tuple[np.ndarray, np.ndarray]], lines: Sequence[float]) -> tuple[float, float] | None:
    """Where to look: the curves without their steep first 8 %, and the yardsticks. None where there is nothing.

    With the beginning in view, the part in which runs differ would be a flat line at the bottom.
    """
    end = max((float(x[-1]) for x, _ in curves if len(x)), default=0.0)
    late = [y[x >= 0.08 * end] if len(y) > 1 else y for x, y in curves]
    shown = np.concatenate([*late, np.asarray(lines, dtype=np.float64)])
    if not len(shown):
        return None
    low, high = float(shown.min()), float(shown.max())
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin


def _draw(
    axes: Axes,
    records: Sequence[Mapping[str, Any]],
    x: str,
    label: str,
    scale: float,
    yardsticks: Mapping[str, float],
    ratio: float | None,
    colours: Mapping[str, str],
) -> None:
    """One panel. `yardsticks` are in bits per byte, `ratio` converts nats per token to them."""
    train_x, train = _series(records, "train", x)
    validation_x, validation = _series(records, "validation", x)
    train_x, validation_x = train_x / scale, validation_x / scale
    step = max(1, math.ceil(len(train) / _MOST_POINTS))
    train_x, train = train_x[::-1][::step][::-1], train[::-1][::step][::-1]  # the newest one stays
    many = len(train) > 2
    smoothed = smooth(train)
    if len(train):
        raw: dict[str, Any] = {"alpha": 0.4, "linewidth": 0.8} if many else {"marker": "o", "markersize": 5}
        axes.plot(train_x, train, color=colours["train"], label=None if many else "training", **raw)
        if many:
            axes.plot(train_x, smoothed, color=colours["train"], linewidth=1.8, label="training (smoothed)")
    if len(validation):
        # Markers melt into a band when there are many; one point alone needs one.
        marker: dict[str, Any] = {"marker": "o", "markersize": 4.5} if len(validation) <= 30 else {}
        best = float(validation.min())
        text = f"validation: best {best:.3f}" + (f" = {ratio * best:.3f} bits/byte" if ratio else "")
        axes.plot(validation_x, validation, color=colours["validation"], linewidth=1.8, label=text, **marker)
    levels = {name: bits / ratio for name, bits in yardsticks.items() if math.isfinite(bits)} if ratio else {}
    for (name, level), style in zip(levels.items(), [":", "--", "-."] * len(levels), strict=False):
        axes.axhline(
            level,
            color=colours["faint"],
            linestyle=style,
            linewidth=1.3,
            label=f"{name}: {yardsticks[name]:.2f} bits/byte",
        )
    if limits := _limits([(train_x, smoothed), (validation_x, validation)], list(levels.values())):
        axes.set_ylim(*limits)
    if len(train) + len(validation):
        legend = axes.legend(loc="upper right", fontsize=9, labelcolor=colours["ink"])
        legend.get_frame().set(facecolor=colours["back"], edgecolor="none", alpha=0.85)
    else:
        axes.text(0.5, 0.5, "nothing logged yet", transform=axes.transAxes, ha="center", color=colours["faint"])
    axes.set_xlabel(label)
    axes.set_ylabel("loss (nats per token)")
    axes.grid(color=colours["faint"], alpha=0.25, linewidth=0.6)
    axes.spines["top"].set_visible(False)
    axes.spines["right"].set_visible(False)
    if ratio is not None:
        second = axes.secondary_yaxis(
            "right", functions=(partial(np.multiply, ratio), partial(np.multiply, 1 / ratio))
        )
        second.set_ylabel("validation text: bits per byte", color=colours["ink"])
        second.tick_params(colors=colours["ink"])
        for spine in second.spines.values():
            spine.set_color(colours["faint"])
    axes.set_facecolor(colours["back"])
    axes.tick_params(colors=colours["ink"])
    for words in (axes.xaxis.label, axes.yaxis.label):
        words.set_color(colours["ink"])
    for spine in axes.spines.values():
        spine.set_color(colours["faint"])


def _time_unit(seconds: float) -> tuple[str, float]:
    """The unit in which a duration reads well, and its length in seconds."""
    if seconds < 180:
        return "seconds", 1.0
    return ("minutes", 60.0) if seconds < 3 * 3600 else ("hours", 3600.0)


def loss_figure(
    records: Sequence[Mapping[str, Any]],
    yardsticks: Mapping[str, float] | None = None,
    *,
    theme: Theme = "light",
    layout: Layout = "wide",
    title: str | None = None,
    placed_as: Figure | None = None,
) -> Figure:
    """Draw the two panels.

    Args:
        records: lines of metrics.jsonl; non-finite losses are left out.
        yardsticks: name → bits per byte, drawn as horizontal lines once a validation record tells what a nat is worth.
        theme: colours for a light or a dark page.
        layout: panels side by side, or one above the other for narrow screens.
        title: above both.
        placed_as: the same in another theme, drawn already: where things lie need not be worked out again, which takes half of the time.
    """
    from matplotlib.figure import Figure  # here, because it takes a second

    colours = _COLOURS[theme]
    rows, columns, size = (1, 2, (12.0, 4.6)) if layout == "wide" else (2, 1, (4.7, 7.6))
    # A Figure of its own, not pyplot's: no global state, no display, safe in threads.
    engine: Literal["constrained"] | None = "constrained" if placed_as is None else None
    figure = Figure(figsize=size, layout=engine, facecolor=colours["back"])
    ratio = bits_per_byte_per_nat(records)
    longest = max((float(record.get("seconds") or 0) for record in records), default=0.0)
    unit, scale = _time_unit(longest if math.isfinite(longest) else 0.0)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, x, label, divisor in (
        (panels[0], "step", "optimizer steps", 1.0),
        (panels[1], "seconds", f"training time ({unit})", scale),
    ):
        heading = f"Loss by {'step' if x == 'step' else 'wall-clock'}"
        axes.set_title(heading, fontsize=11, loc="left", color=colours["ink"])
        _draw(axes, records, x, label, divisor, yardsticks or {}, ratio, colours)
    if title:
        figure.suptitle(title, color=colours["ink"], fontsize=12)
    for axes, other in zip(figure.axes, [] if placed_as is None else placed_as.axes, strict=False):
        axes.set_position(other.get_position())
    return figure


def png_bytes(figure: Figure, dpi: int = 130) -> bytes:
    """The picture as a PNG file's content."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=dpi, facecolor=figure.get_facecolor())
    return buffer.getvalue()


def plot_loss(
    metrics_path: str | os.PathLike[str],
    png_path: str | os.PathLike[str],
    yardsticks: Mapping[str, float] | None = None,
    *,
    title: str | None = None,
) -> None:
    """Draw the curves of a metrics file; the picture is written atomically.

    Args:
        metrics_path: metrics.jsonl, with any number of records.
        png_path: the picture.
        yardsticks: name → bits per byte of the validation text, e.g. of compressors.
        title: above the panels.

    Raises:
        UserError: the metrics file is missing or broken, or the picture cannot be written.
    """
    write_bytes(png_path, png_bytes(loss_figure(read_metrics(metrics_path), yardsticks, title=title)))
