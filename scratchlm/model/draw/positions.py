"""Positions as the modules compute them: RoPE's tables and wavelengths, sinusoids, ALiBi's biases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from scratchlm.model import choices
from scratchlm.model.config import ModelConfig
from scratchlm.model.draw.style import (
    COLOURS,
    HUES,
    Picture,
    Theme,
    colour_bar,
    dress,
    layers_in_words,
    legend,
    new_figure,
)
from scratchlm.model.position import ALiBi, Positions, Sinusoidal
from scratchlm.model.rope import RoPE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 256
"""Positions of a table that are drawn."""
ALIBI_SIDE = 48
MOST_ROPES, MOST_HEADS = 6, 8


@dataclass(frozen=True)
class Rope:
    """One RoPE of a model.

    Attributes:
        title: its base, scaling and layers.
        module: with a table of the first positions only.
        context: the length the model is made for.
        original: the length before stretching.
    """

    title: str
    module: RoPE
    context: int
    original: float


def shortened(config: ModelConfig, positions: int) -> ModelConfig:
    """The same architecture with short tables; RoPE's scaling still knows the context it is made for."""
    original = config.rope.original_context or max(1, round(config.context_length / config.rope.factor))
    rope = config.rope.model_copy(update={"original_context": original})
    return config.model_copy(update={"context_length": min(positions, config.context_length), "rope": rope})


def ropes_of(config: ModelConfig, positions_shown: int = SHOWN) -> list[Rope]:
    """Every RoPE of a model that differs in its table."""
    short = shortened(config, positions_shown)
    positions = Positions(short)
    found: dict[int, tuple[RoPE, list[int]]] = {}
    for layer in range(config.layers):
        if config.position_at(layer) == "rope":
            latent = config.attention_at(layer) == "mla"
            module = positions.at(layer, config.latent.rope_dim if latent else config.resolved_head_dim)
            assert isinstance(module, RoPE)
            found.setdefault(id(module), (module, []))[1].append(layer)
    ropes = []
    for module, layers in found.values():
        scaling = "" if module.scaling == "none" else f", {module.scaling} × {config.rope.factor:g}"
        title = f"θ = {module.theta:,.0f}{scaling}; {layers_in_words(layers)}"
        ropes.append(Rope(title, module, config.context_length, short.rope.original_context or 1))
    return ropes


def rope_picture(ropes: Sequence[Rope], name: str = "rope") -> Picture:
    """Left the table of cosines, right the wavelengths."""
    shown = ropes[:MOST_ROPES]

    def paint(theme: Theme) -> Figure:
        figure = new_figure(theme, 10.0, 2.2 * len(shown) + 0.3)
        panels = figure.subplots(len(shown), 2, squeeze=False, width_ratios=(1.5, 1))
        for (table, waves), rope in zip(panels, shown, strict=True):
            cosines = rope.module.table[0].T.numpy()
            extent = (-0.5, cosines.shape[1] - 0.5, cosines.shape[0] - 0.5, -0.5)
            image = table.imshow(
                cosines, aspect="auto", cmap="RdBu", vmin=-1, vmax=1, interpolation="nearest", extent=extent
            )
            dress(table, theme, rope.title, x="position", y="pair")
            colour_bar(figure, image, table, theme, "cos")
            frequencies, _ = rope.module.frequencies()
            unscaled = rope.module.theta ** -(torch.arange(len(frequencies)).double() / len(frequencies))
            pairs = np.arange(len(frequencies))
            if rope.module.scaling != "none":
                waves.semilogy(
                    pairs,
                    2 * math.pi / unscaled.numpy(),
                    color=COLOURS[theme]["faint"],
                    label="unscaled",
                    linestyle="--",
                )
            waves.semilogy(
                pairs, 2 * math.pi / frequencies.numpy(), color=HUES[theme][0], label="wavelength", linewidth=1.8
            )
            lengths = {"context": float(rope.context), "before stretching": rope.original}
            for (label, length), style in zip(lengths.items(), ("-", ":"), strict=True):
                if label == "context" or rope.module.scaling != "none":
                    waves.axhline(length, color=HUES[theme][1], linestyle=style, linewidth=1.2, label=label)
            dress(waves, theme, "", x="pair", y="positions per turn", grid=True)
            legend(waves, theme, loc="lower right")
        return figure

    first = ropes[0].module.table.shape[1]
    return Picture(
        name,
        "RoPE",
        f"Left: the table of cosines that queries and keys are multiplied by (times the scaling's factor), first {first} positions; every row is one pair of "
        "a head's dimensions. Right: after how many positions a pair has turned once. Pairs above the line of the context never "
        "turn fully in it and tell far from near." + (" More in the model." if len(ropes) > MOST_ROPES else ""),
        paint,
    )


def sinusoid_picture(config: ModelConfig, name: str = "sinusoids") -> Picture:
    """The table that is added to the embedding."""
    table = Sinusoidal(shortened(config, SHOWN), 0, 0).table.T.numpy()

    def paint(theme: Theme) -> Figure:
        figure = new_figure(theme, 10.0, 3.0)
        panels = figure.subplots(1, 2)
        for axes, first, title in zip(
            panels, (0, 1), ("sines: features 0, 2, 4 …", "cosines: features 1, 3, 5 …"), strict=True
        ):
            half = table[first::2]
            image = axes.imshow(half, aspect="auto", cmap="RdBu", vmin=-1, vmax=1, interpolation="nearest")
            dress(axes, theme, title, x="position", y="pair")
        colour_bar(figure, image, panels.tolist(), theme, "added")
        return figure

    return Picture(
        name,
        "Sinusoids",
        "What is added to the embedding: features 2i and 2i + 1 are sine and cosine of one wavelength, from 2π positions at the top "
        "to nearly 10,000 times that at the bottom.",
        paint,
    )


def alibi_picture(config: ModelConfig, name: str = "alibi") -> Picture:
    """What each head adds to its scores."""
    slopes = ALiBi(shortened(config, 1), 0, 0).slopes.double()
    side = min(ALIBI_SIDE, config.context_length)
    chosen = np.unique(np.linspace(0, len(slopes) - 1, min(MOST_HEADS, len(slopes))).round().astype(int))
    places = torch.arange(side)
    visible = choices.MASK.get("causal").of(config).allowed(places, places)
    away = (places[:, None] - places).abs()

    def paint(theme: Theme) -> Figure:
        columns = min(4, len(chosen))
        rows = -(-len(chosen) // columns)
        figure = new_figure(theme, 2.2 * columns + 0.9, 2.35 * rows + 0.3)
        panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
        for axes, head in zip(panels, chosen, strict=False):
            biases = (-slopes[head] * away).masked_fill(~visible, math.nan).numpy()
            image = axes.imshow(biases, cmap="viridis", vmin=-8, vmax=0, interpolation="nearest")
            dress(axes, theme, f"head {head}: slope {float(slopes[head]):.3g}")
        for axes in panels[len(chosen) :]:
            axes.set_axis_off()
        colour_bar(figure, image, panels.tolist(), theme, "added to the score")
        return figure

    return Picture(
        name,
        "ALiBi",
        "What is added to the score of each query (down) and key (right): −slope · distance, cut at −8 in the colours. Steep heads "
        "read the last few positions, flat ones all.",
        paint,
    )


def position_pictures(config: ModelConfig) -> list[Picture]:
    """Pictures of every kind of position the model has a formula for; learned ones have none."""
    kinds = {config.position_at(layer) for layer in range(config.layers)}
    pictures = [rope_picture(ropes_of(config))] if "rope" in kinds else []
    if "sinusoidal" in kinds:
        pictures.append(sinusoid_picture(config))
    if "alibi" in kinds:
        pictures.append(alibi_picture(config))
    return pictures
