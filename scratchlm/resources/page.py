"""An estimate as one HTML page that needs nothing but itself: roofline, memory over a step, tables.

The pictures are SVG with the page's own colour variables in the place of fixed colours, so that they turn dark with it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scratchlm.files import write_text
from scratchlm.model.draw.style import COLOURS, HUES, dress, legend, new_figure
from scratchlm.pages import page_templates
from scratchlm.resources import tables
from scratchlm.resources.tables import Target, seconds, si

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from scratchlm.resources.answer import Estimate, OperationGroup

KINDS = ("weights", "optimizer state", "gradients", "activations", "temporaries", "batch and tables")
"""From the bottom of the picture to its top: what stays first."""

PHASES = ("forward", "backward", "optimizer")
LABELLED = 10
MOMENTS = 400
"""More than the picture has columns only makes the file long."""

_WIDE = 9.6  # inches


def thinned(live: Sequence[int], most: int = MOMENTS) -> list[int]:
    """At most `most` moments, evenly spread, of each stretch the one with most bytes: the peak is among them."""
    edges = np.linspace(0, len(live), min(most, len(live)) + 1).astype(int)
    return [int(low + np.argmax(live[low:high])) for low, high in itertools.pairwise(edges) if high > low]


def memory_figure(estimate: Estimate, target: Target) -> Figure:
    """Bytes by kind over the operations of a micro-batch and the optimizer, phases shaded, the peak marked."""
    colours, hues = COLOURS["light"], HUES["light"]
    figure = new_figure("light", _WIDE, 4.2)
    axes = figure.add_subplot()
    phases = [phase for phase, _ in estimate.memory.timeline]
    live = [size for _, size in estimate.memory.timeline]
    by_kind = estimate.memory.by_kind
    top = max(live)
    unit, prefix = next(((size, name) for size, name in tables._PREFIXES if top >= size), (1.0, ""))
    shown = thinned(live)
    height = 1.22 * top / unit
    for number, phase in enumerate(dict.fromkeys(phases)):
        first = phases.index(phase)
        last = len(phases) - phases[::-1].index(phase)
        if number % 2:
            axes.axvspan(first, last, color=colours["line"], alpha=0.5, linewidth=0)
        narrow = last == len(phases) and last - first < 0.12 * len(phases)
        axes.text(
            last if narrow else (first + last) / 2,
            0.985 * height,
            f"{phase} " if narrow else phase,
            ha="right" if narrow else "center",
            va="top",
            fontsize=9,
            color=colours["ink"],
        )
    kinds = [kind for kind in KINDS if any(by_kind[kind])]
    layers = [[by_kind[kind][moment] / unit for moment in shown] for kind in kinds]
    paint = [hues[KINDS.index(kind)] for kind in kinds]
    axes.stackplot(shown, *layers, labels=kinds, colors=paint, step="post", linewidth=0)
    moment = int(np.argmax(live))
    right = moment < len(live) / 2
    axes.plot([moment], [top / unit], marker="v", markersize=7, color=colours["ink"], linestyle="none")
    axes.annotate(
        f"peak {si(top, 'B')}",
        (moment, top / unit),
        xytext=(9 if right else -9, 3),
        textcoords="offset points",
        ha="left" if right else "right",
        fontsize=9,
        color=colours["ink"],
    )
    if target.memory_bytes is not None and target.memory_bytes < height * unit:
        limit = target.memory_bytes / unit
        axes.axhline(limit, color=colours["ink"], linewidth=1, linestyle=(0, (5, 3)))
        axes.text(
            0.995 * len(live),
            limit + 0.012 * height,
            f"{si(target.memory_bytes, 'B')} on the device",
            ha="right",
            va="bottom",
            fontsize=8,
            color=colours["ink"],
            bbox={"facecolor": colours["back"], "alpha": 0.85, "linewidth": 0, "pad": 2},
        )
    axes.set_xlim(0, max(1, len(live)))
    axes.set_ylim(0, height)
    dress(axes, "light", x="operations of a micro-batch, then of the optimizer", y=f"{prefix}B alive", grid=True)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(
        handles[::-1], names[::-1], loc="outside right upper", fontsize=8, labelcolor=colours["ink"], frameon=False
    )
    return figure


def roofline_groups(estimate: Estimate) -> list[OperationGroup]:
    """What has a place in the picture: groups with products and a time, costliest first."""
    return [group for group in estimate.operations if group.flops and group.seconds]


def label(group: OperationGroup) -> str:
    """What a point is called."""
    name = "fused attention" if "scaled_dot_product" in group.name else group.name
    return f"{group.component or group.phase} · {name}"


def roofline_figure(estimate: Estimate, target: Target) -> Figure | None:
    """Intensity against FLOP/s of every group of products, under the roofs of the device; None without times or roofs."""
    groups = roofline_groups(estimate)
    bandwidth = target.bandwidth
    roofs = {dtype: peak for dtype in ("bf16", "fp32") if (peak := target.peak(dtype))}
    if not groups or not bandwidth or not roofs:
        return None
    colours, hues = COLOURS["light"], HUES["light"]
    figure = new_figure("light", _WIDE, 5.0)
    axes = figure.add_subplot()
    whole = sum(group.seconds or 0.0 for group in estimate.operations)
    intensities = [group.intensity for group in groups]
    rates = [group.flops / (group.seconds or 1.0) for group in groups]
    low = min(*intensities, min(roofs.values()) / bandwidth) / 2.5
    high = max(*intensities, max(roofs.values()) / bandwidth) * 2.5
    bottom, top = min(*rates, low * bandwidth * 2) / 2, max(*roofs.values(), *rates) * 2.2
    for number, (dtype, peak) in enumerate(roofs.items()):
        bend = peak / bandwidth
        axes.plot(
            [bend, high],
            [peak, peak],
            color=colours["ink"],
            linewidth=1.4,
            linestyle=("-", (0, (4, 2)))[number % 2],
        )
        axes.text(
            high / 1.05, peak * 1.06, f"{dtype}: {si(peak, 'FLOP/s')}", ha="right", fontsize=8, color=colours["ink"]
        )
    highest = max(roofs.values())
    axes.plot([low, highest / bandwidth], [low * bandwidth, highest], color=colours["ink"], linewidth=1.4)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(bottom, top))
    for number, phase in enumerate(PHASES):
        found = [at for at, group in enumerate(groups) if group.phase == phase]
        axes.scatter(
            [intensities[at] for at in found],
            [rates[at] for at in found],
            s=[18 + 900 * (groups[at].seconds or 0.0) / whole for at in found],
            color=hues[number],
            alpha=0.75,
            linewidth=0,
            label=phase,
        )
    dress(axes, "light", x="FLOP per byte moved", y="FLOP/s", grid=True)
    named = groups[:LABELLED]
    lines = [f"{at + 1}  {_shortened(label(group))}" for at, group in enumerate(named)]
    shares = [f"{(group.seconds or 0.0) / whole:.1%}" for group in named]
    text = "\n".join(f"{line}, {share}" for line, share in zip(lines, shares, strict=True))
    axes.text(
        1.02, 0.0, text, transform=axes.transAxes, fontsize=7.5, va="bottom", linespacing=1.6, color=colours["ink"]
    )
    figure.draw_without_rendering()  # the layout is needed to place numbers and words
    _slope_text(axes, low, bandwidth, highest)
    _numbers(axes, [(intensities[at], rates[at]) for at in range(len(named))])
    handles, names = axes.get_legend_handles_labels()
    present = {group.phase for group in groups}
    drawn = [pair for pair in zip(handles, names, strict=True) if pair[1] in present]
    legend(axes, "light", handles=[one for one, _ in drawn], labels=[name for _, name in drawn], loc="upper left")
    shown: Any = axes.get_legend()
    for handle in shown.legend_handles:
        handle.set_sizes([40])
    return figure


def _slope_text(axes: Axes, low: float, bandwidth: float, highest: float) -> None:
    """The memory's roof is named along its slope."""
    x = np.exp((2 * np.log(low) + np.log(highest / bandwidth)) / 3)
    (x0, y0), (x1, y1) = axes.transData.transform([(x, x * bandwidth), (2 * x, 2 * x * bandwidth)])
    angle = float(np.degrees(np.arctan2(y1 - y0, x1 - x0)))
    axes.annotate(
        f"memory: {si(bandwidth, 'B/s')}",
        (x, x * bandwidth),
        xytext=(-7, 5),
        textcoords="offset points",
        rotation=angle,
        rotation_mode="anchor",
        fontsize=8,
        color=COLOURS["light"]["ink"],
    )


def _numbers(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    """A number at each point; where points meet, the numbers are put side by side below them."""
    taken: list[tuple[float, float]] = []
    for at, (point, (x, y)) in enumerate(zip(points, axes.transData.transform(points), strict=True)):
        place = next(
            (x + dx, y + dy)
            for dy in range(-16, -400, -11)
            for dx in (0, 13, -13, 26, -26)
            if all(abs(x + dx - a) > 12 or abs(y + dy - b) > 10 for a, b in taken)
        )
        taken.append(place)
        axes.annotate(
            str(at + 1),
            point,
            xytext=((place[0] - x) * 72 / 100, (place[1] - y) * 72 / 100),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8,
            color=COLOURS["light"]["ink"],
        )


def _shortened(name: str, most: int = 44) -> str:
    return name if len(name) <= most else f"…{name[1 - most :]}"


def variables(theme: str) -> str:
    """The theme's colours as CSS variables, under the names that :func:`svg` writes."""
    colours = COLOURS["dark" if theme == "dark" else "light"]
    hues = HUES["dark" if theme == "dark" else "light"]
    named = {f"--{name}": value for name, value in colours.items()}
    return " ".join(
        f"{name}: {value};" for name, value in (named | {f"--hue{n}": h for n, h in enumerate(hues)}).items()
    )


def svg(figure: Figure, name: str) -> str:
    """A figure as SVG to be put into a page: no addresses, names of its own, the page's colours."""
    import matplotlib

    buffer = StringIO()
    unasked = {"Creator": None, "Date": None, "Format": None, "Type": None}
    options: Any = {"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}
    with matplotlib.rc_context(options):
        figure.savefig(buffer, format="svg", metadata=unasked)
    text = buffer.getvalue()
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text[text.index("<svg") :])
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = text.replace("xlink:href", "href")
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font: \1 var(--font)", text)
    light = {value: f"var(--{key})" for key, value in COLOURS["light"].items()}
    light |= {value: f"var(--hue{number})" for number, value in enumerate(HUES["light"])}
    return re.sub(r"#[0-9a-f]{6}\b", lambda colour: light.get(colour[0], colour[0]), text)


def render_page(estimate: Estimate, target: Target) -> str:
    """The page's HTML.

    Args:
        estimate: from :func:`scratchlm.resources.estimate.estimate`.
        target: what it was made for.
    """
    environment = page_templates("scratchlm.resources")
    roofline = roofline_figure(estimate, target)
    return environment.get_template("resources.html").render(
        name=estimate.name,
        light=variables("light"),
        dark=variables("dark"),
        figures=_figures(estimate, target),
        summary=tables.summary(estimate, target),
        roofline=None if roofline is None else svg(roofline, "roofline"),
        without_products=_without_products(estimate),
        memory=svg(memory_figure(estimate, target), "memory"),
        moment=estimate.memory.moment,
        counts=tables.component_rows(estimate, lambda figures: figures.counts_something),
        sizes=tables.component_rows(estimate, lambda figures: figures.takes_memory),
        kinds=tables.memory_rows(estimate),
        headers=tables.operation_headers(estimate),
        operations=tables.operation_rows(estimate, target, most=25),
        savings=tables.saving_rows(estimate),
        remarks=tables.remarks(estimate, target),
    )


def _without_products(estimate: Estimate) -> str:
    """The share of the time that has no place under the roofs."""
    whole = sum(group.seconds or 0.0 for group in estimate.operations)
    passing = sum(group.seconds or 0.0 for group in estimate.operations if not group.flops)
    return f"{passing / whole:.0%}" if whole else ""


def _figures(e: Estimate, target: Target) -> list[tuple[str, str, str]]:
    """The large figures at the top: (what, figure, words below it)."""
    found: list[tuple[str, str, Any]] = [
        ("Parameters", si(e.params).replace(" G", " B"), f"{e.params:,}"),
        ("FLOPs per token", si(e.forward_flops + e.backward_flops), "forward and backward"),
        ("Peak memory", si(e.memory.peak, "B"), e.memory.moment),
    ]
    if e.largest_micro_batch is not None and target.memory_bytes is not None:
        found.append(
            ("Largest micro-batch", f"{e.largest_micro_batch:,}", f"sequences in {si(target.memory_bytes, 'B')}")
        )
    if e.time is not None:
        found += [
            ("Step", seconds(e.time.step), "compiled" if e.time.compiled else "eager"),
            ("Speed", si(e.time.tokens_per_second), "tokens per second"),
            ("Whole run", seconds(e.time.total), f"{si(e.tokens)} tokens"),
        ]
        if e.time.price is not None and target.price_per_hour is not None:
            found.append(
                ("USD", tables.money(e.time.price).removesuffix(" USD"), f"at {target.price_per_hour:g} per hour")
            )
    return found


def write_page(estimate: Estimate, target: Target, path: Path) -> None:
    """Write the page, whole or not at all.

    Raises:
        UserError: it cannot be written there.
    """
    page = render_page(estimate, target)
    write_text(path, page.encode("utf-8", "replace").decode("utf-8"))
