"""How evenly the experts of a mixture were used over a run, from its metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from scratchlm.model.draw.style import HUES, Picture, Theme, colour_bar, dress, legend, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_LAYERS, MOST_STEPS = 6, 400


def router_records(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The lines of a run that tell about its routers, at most :data:`MOST_STEPS` of them, evenly spread."""
    telling = [record for record in records if record.get("kind") == "train" and record.get("expert_load")]
    if telling:  # a resumed run with another number of experts would be another run: keep what is alike
        shape = [len(load) for load in telling[-1]["expert_load"]]
        telling = [record for record in telling if [len(load) for load in record["expert_load"]] == shape]
    if len(telling) <= MOST_STEPS:
        return telling
    return [telling[index] for index in np.linspace(0, len(telling) - 1, MOST_STEPS).round().astype(int)]


def router_picture(
    records: Sequence[Mapping[str, Any]], layers: Sequence[int], name: str = "routers"
) -> Picture | None:
    """Heat maps of the experts' loads, and how the worst of them and the routers' entropy went; None without such lines.

    Args:
        records: lines of metrics.jsonl.
        layers: numbers of the layers with experts, in the order of ``expert_load``.
        name: of the file.
    """
    telling = router_records(records)
    if not telling:
        return None
    steps = np.array([record["step"] for record in telling], dtype=float)
    loads = [
        np.array([record["expert_load"][at] for record in telling], dtype=float).T
        for at in range(len(telling[0]["expert_load"]))
    ]
    shares = [load / np.clip(load.mean(axis=0), 1e-9, None) for load in loads]
    chosen = np.unique(np.linspace(0, len(shares) - 1, min(MOST_LAYERS, len(shares))).round().astype(int))

    def paint(theme: Theme) -> Figure:
        columns = min(3, len(chosen) + 1)
        rows = -(-(len(chosen) + 1) // columns)
        figure = new_figure(theme, 3.5 * columns + 0.6, 2.7 * rows)
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, at in zip(panels, chosen, strict=False):
            extent = (steps[0], max(steps[-1], steps[0] + 1), len(shares[at]) - 0.5, -0.5)
            image = axes.imshow(
                shares[at], aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest", extent=extent
            )
            title = f"layer {layers[at]}" if at < len(layers) else f"prediction {at - len(layers) + 1}"
            dress(axes, theme, title, x="step", y="expert")
            axes.locator_params(nbins=5, integer=True)
        curves = panels[len(chosen)]
        marker = "o" if len(steps) == 1 else None
        worst = np.array([record.get("expert_max_over_mean", np.nan) for record in telling], dtype=float)
        entropy = np.array([record.get("router_entropy", np.nan) for record in telling], dtype=float)
        curves.plot(steps, worst, color=HUES[theme][1], label="fullest expert / mean", marker=marker)
        curves.plot(
            steps,
            entropy / np.log(max(2, len(shares[0]))),
            color=HUES[theme][0],
            label="entropy / ln experts",
            marker=marker,
        )
        curves.axhline(1, color=HUES[theme][2], linewidth=0.8, linestyle=":")
        curves.set_ylim(bottom=0)
        dress(curves, theme, "all layers", x="step", grid=True)
        legend(curves, theme, loc="best")
        for axes in panels[len(chosen) + 1 :]:
            axes.set_axis_off()
        colour_bar(figure, image, panels[: len(chosen)].tolist(), theme, "load / mean load")
        return figure

    return Picture(
        name,
        "Routers",
        "How many tokens each expert was given at each logged step, over the mean of its layer: white is even, blue idle, red "
        "twice its share or more. The curves are those of the worst layer, and of the mean entropy of the routers.",
        paint,
    )
