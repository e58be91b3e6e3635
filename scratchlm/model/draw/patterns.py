"""Which attention, mask, position and feed-forward each layer has, as coloured strips."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from scratchlm.model.config import ModelConfig
from scratchlm.model.draw.style import COLOURS, HUES, Picture, Theme, dress, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def kinds_by_layer(config: ModelConfig) -> dict[str, list[str]]:
    """axis → its value in each layer."""
    layers = range(config.layers)

    def position(layer: int) -> str:
        name, rope = config.position_at(layer), config.rope
        if name != "rope":
            return name
        scaling = rope.scaling[layer % len(rope.scaling)]
        stretched = "" if scaling == "none" else f", {scaling} × {rope.factor:g}"
        return f"rope θ {rope.theta[layer % len(rope.theta)]:,.0f}{stretched}"

    def feedforward(layer: int) -> str:
        if not config.has_experts(layer):
            return f"{config.feedforward}, {config.resolved_d_ff:,}"
        return f"{config.active_experts} of {config.n_experts} experts, {config.resolved_d_expert:,}"

    windows = {
        "sliding_window": f" {config.window:,}",
        "strided": f" {config.stride:,}",
        "fixed": f" {config.stride:,}",
    }
    return {
        "attention": [config.attention_at(layer) for layer in layers],
        "mask": [config.mask_at(layer) + windows.get(config.mask_at(layer), "") for layer in layers],
        "position": [position(layer) for layer in layers],
        "feed-forward": [feedforward(layer) for layer in layers],
    }


def pattern_picture(configs: Mapping[str, ModelConfig], name: str = "layers") -> Picture:
    """Strips for one model or several, one above the other."""

    def paint(theme: Theme) -> Figure:
        figure = new_figure(theme, 10.0, 2.3 * len(configs) + 0.1)
        panels = figure.subplots(len(configs), 1, squeeze=False).ravel()
        for axes, (title, config) in zip(panels, configs.items(), strict=True):
            layers = max(1, config.layers)
            for row, (axis, values) in enumerate(kinds_by_layer(config).items()):
                names = list(dict.fromkeys(values))
                hue = {one: HUES[theme][index % len(HUES[theme])] for index, one in enumerate(names)}
                for layer, value in enumerate(values):
                    axes.barh(-row, 1, left=layer - 0.5, height=0.7, color=hue[value],
                              edgecolor=COLOURS[theme]["back"], linewidth=0.6 if layers <= 64 else 0)  # fmt: skip
                axes.text(
                    -0.5 - 0.012 * layers,
                    -row,
                    axis,
                    ha="right",
                    va="center",
                    fontsize=8.5,
                    color=COLOURS[theme]["ink"],
                )
                where = layers - 0.5 + 0.015 * layers
                for index, one in enumerate(names[:4]):
                    text = f"{one} ×{values.count(one)}" if len(names) > 1 else one
                    # Names of one row stand below each other, in their colours.
                    height = -row + 0.17 * (min(len(names), 4) - 1) - 0.34 * index
                    axes.text(where, height, text, va="center", fontsize=8, color=hue[one])
            axes.set_xlim(-0.5 - 0.13 * layers, layers - 0.5 + 0.36 * layers)
            axes.set_ylim(-3.6, 0.6)
            dress(axes, theme, f"{title} · {config.layers} layers")
            axes.set_yticks([])
            ticks = list(range(0, layers, max(1, -(-layers // 16))))
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            for spine in axes.spines.values():
                spine.set_visible(False)
        return figure

    return Picture(
        name,
        "Layers",
        "What each layer has, first layer left. Colours tell the values of one strip apart.",
        paint,
    )
