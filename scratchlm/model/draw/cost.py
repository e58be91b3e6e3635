"""What a model costs: parameters and FLOPs by component, bytes kept while generating, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from scratchlm.evaluate.report import amount
from scratchlm.model import choices
from scratchlm.model.config import ModelConfig
from scratchlm.model.draw.style import COLOURS, HUES, Picture, Theme, dress, legend, new_figure
from scratchlm.model.mask import window_slots
from scratchlm.model.transformer import Transformer

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Component:
    """A part of a model, over all layers.

    Attributes:
        name: what it is.
        params: its parameters.
        active: those one token meets.
        flops: of a forward pass, per token.
    """

    name: str
    params: int
    active: int
    flops: float


def components(model: Transformer, length: int) -> list[Component]:
    """The parts of a model; parameters and FLOPs add up to the model's own counts (FLOPs without multi-token prediction).

    Args:
        model: the modules that are asked.
        length: of the sequences, for the FLOPs of scores.
    """
    blocks: list[Any] = list(model.blocks)
    pieces: list[Any] = [model.embedding, *model.embedding_positions]
    attention, feedforward = [b.attention for b in blocks], [b.feedforward for b in blocks]
    dense = [f for f in feedforward if not hasattr(f, "router")]
    sparse = [f for f in feedforward if hasattr(f, "router")]
    norms: list[Any] = [model.embedding_norm, model.norm]
    for block in blocks:
        norms += [piece for piece in block.pieces() if piece not in (block.attention, block.feedforward)]
    projections = sum(layer.flops_per_token(0) for layer in attention)
    shared = [f.shared for f in sparse if f.shared is not None]
    routers = [f.router for f in sparse] + [f.shared_gate for f in sparse if f.shared_gate is not None]
    experts = sum(f.up.num_params() + f.down.num_params() for f in sparse)
    used = sum(f.k * (f.up.params_per_expert() + f.down.params_per_expert()) for f in sparse)
    expert_flops = sum(f.k * (f.up.flops_per_token() + f.down.flops_per_token()) for f in sparse)
    head: Any = model.head
    mtp: list[Any] = list(model.predictions)

    def params(of: Sequence[Any]) -> int:
        return int(sum(piece.num_params() for piece in of))

    def same(name: str, of: Sequence[Any], flops: float = 0) -> Component:
        return Component(name, params(of), params(of), flops)

    head_params = model.head_params()
    found = [
        same("embedding", pieces),
        same("attention", attention, projections),
        Component("scores, states", 0, 0, sum(layer.flops_per_token(length) for layer in attention) - projections),
        same("feed-forward", dense, sum(f.flops_per_token(length) for f in dense)),
        Component("experts", experts, used, expert_flops),
        same("shared experts", shared, sum(f.flops_per_token(length) for f in shared)),
        same("routers", routers, sum(r.flops_per_token() for r in routers)),
        same("norms, scales", norms),
        Component("head", head_params, head_params, head.flops_per_token()),
        Component("prediction", params(mtp), int(sum(m.num_active_params() for m in mtp)), 0),
    ]
    return [one for one in found if one.params or one.flops]


def _share(part: float) -> str:
    return f"{part:.1%}" if part >= 0.0005 else "< 0.1%"


def cost_picture(model: Transformer, length: int, name: str = "costs") -> Picture:
    """Bars of parameters and FLOPs by component."""
    parts = components(model, length)[::-1]

    def paint(theme: Theme) -> Figure:
        figure = new_figure(theme, 10.0, 0.34 * len(parts) + 1.1)
        weights, work = figure.subplots(1, 2, sharey=True)
        rows = np.arange(len(parts))
        spared = any(part.active != part.params for part in parts)
        if spared:
            weights.barh(rows, [p.params for p in parts], color=HUES[theme][0], alpha=0.35, label="all")
        weights.barh(rows, [p.active for p in parts], color=HUES[theme][0], label="met by one token")
        work.barh(rows, [p.flops for p in parts], color=HUES[theme][1])
        total, flops = sum(p.params for p in parts), sum(p.flops for p in parts)
        for row, part in zip(rows, parts, strict=True):
            for axes, value, whole in ((weights, part.params, total), (work, part.flops, flops)):
                text = f" {amount(value)} · {_share(value / whole)}" if value and whole else ""
                axes.text(value, row, text, va="center", fontsize=8, color=COLOURS[theme]["ink"])
        for axes, title, most in (
            (weights, f"parameters: {amount(total)}", max(p.params for p in parts)),
            (work, f"FLOPs per token at length {length:,}: {amount(flops)}", max(p.flops for p in parts)),
        ):
            dress(axes, theme, title)
            axes.set_xlim(0, 1.45 * most or 1)
            axes.set_xticks([])
            axes.tick_params(left=False)
            for side in ("top", "right", "bottom"):
                axes.spines[side].set_visible(False)
        weights.set_yticks(rows, [p.name for p in parts])
        if spared:
            legend(weights, theme, loc="lower right")
        return figure

    return Picture(
        name,
        "Parameters and FLOPs",
        "By component, over all layers. FLOPs are those of the matrix products of a forward pass; those of attention are split "
        "into projections and the work that depends on the length. A tied head has no matrix of its own.",
        paint,
    )


@dataclass(frozen=True)
class Kept:
    """What a layer keeps while generating, in numbers.

    Attributes:
        per_token: for every token it keeps.
        state: whatever the length.
        tokens: how many it keeps at most (of a window all but the query itself); None: all.
        wide: how many numbers of `state` are fp32 at least.
    """

    per_token: int
    state: int
    tokens: int | None = None
    wide: int = 0

    def bytes(self, length: int, itemsize: int) -> int:
        """After `length` tokens; states are fp32 at least."""
        return itemsize * self.numbers(length) + max(0, 4 - itemsize) * self.wide

    def bounded_bytes(self, itemsize: int) -> int:
        """Of what does not grow with the length, once a window is full."""
        return itemsize * self.bounded + max(0, 4 - itemsize) * self.wide

    def numbers(self, length: int) -> int:
        """After `length` tokens."""
        return self.state + self.per_token * (length if self.tokens is None else min(length, self.tokens))

    @property
    def growing(self) -> int:
        """Numbers per token that never stop to be added."""
        return self.per_token if self.tokens is None else 0

    @property
    def bounded(self) -> int:
        """Numbers that do not grow with the length, once a window is full."""
        return self.state + (0 if self.tokens is None else self.per_token * self.tokens)


def kept_by(config: ModelConfig) -> list[Kept]:
    """What each layer keeps."""
    layers = []
    for layer in range(config.layers):
        kind = choices.ATTENTION.get(config.attention_at(layer))
        reach = choices.MASK.get(config.mask_at(layer)).of(config).reach
        tokens = None if reach is None else window_slots(reach)
        layers.append(Kept(kind.cache_widths(config), kind.state_size(config), tokens, kind.wide_size(config)))
    return layers


def cache_bytes(config: ModelConfig, length: int, itemsize: int = 2) -> int:
    """Memory of one sequence of `length` tokens, over all layers, with so many bytes a number."""
    return sum(layer.bytes(length, itemsize) for layer in kept_by(config))


def growing_and_bounded_bytes(config: ModelConfig, itemsize: int = 2) -> tuple[int, int]:
    """Bytes per token without end, and bytes of states and full windows, over all layers."""
    layers = kept_by(config)
    return itemsize * sum(one.growing for one in layers), sum(one.bounded_bytes(itemsize) for one in layers)


def cache_picture(configs: dict[str, ModelConfig], name: str = "cache", itemsize: int = 2) -> Picture:
    """Left (of the first) what each layer keeps, right how the memory grows with the length.

    Args:
        configs: label → architecture; the first is the model.
        name: of the file.
        itemsize: bytes per number; 2 is bfloat16.
    """
    model = next(iter(configs.values()))
    layers = kept_by(model)
    longest = max(config.context_length for config in configs.values())

    def paint(theme: Theme) -> Figure:
        figure = new_figure(theme, 10.0, 3.3)
        by_layer, growth = figure.subplots(1, 2)
        numbers = np.arange(len(layers))
        tokens = np.array([layer.growing * itemsize for layer in layers], dtype=float)
        states = np.array([layer.bounded_bytes(itemsize) for layer in layers], dtype=float)
        if tokens.any() or not states.any():
            by_layer.bar(numbers, tokens, color=HUES[theme][0], width=0.8)
            dress(by_layer, theme, "bytes per token, by layer", x="layer", grid=True)
        if states.any():
            axes = by_layer.twinx() if tokens.any() else by_layer
            axes.bar(numbers, states / 1024, color=HUES[theme][1], width=0.8)
            title = (
                "per token (bytes, blue), per sequence (KiB, orange)"
                if tokens.any()
                else "KiB per sequence, by layer"
            )
            dress(axes, theme, "", grid=not tokens.any())
            by_layer.set_title(title, fontsize=10, loc="left", color=COLOURS[theme]["ink"])
            if not tokens.any():
                axes.set_xlabel("layer", fontsize=9, color=COLOURS[theme]["ink"])
        by_layer.locator_params(axis="x", integer=True)
        by_layer.ticklabel_format(axis="y", style="plain")
        lengths = np.unique(np.geomspace(1, longest, 60).round().astype(int))
        for (label, config), hue in zip(configs.items(), HUES[theme] * len(configs), strict=False):
            sizes = [cache_bytes(config, int(length), itemsize) / 2**20 for length in lengths]
            main = config is model
            growth.loglog(lengths, sizes, color=hue, label=label, linewidth=2.2 if main else 1.4,
                          linestyle="-" if main else "--")  # fmt: skip
        dress(growth, theme, "MiB of one sequence, by length", x="tokens", grid=True)
        legend(growth, theme, loc="upper left")
        return figure

    return Picture(
        name,
        "Cache",
        f"What is kept while generating, at {itemsize} bytes a number (states 4): keys and values (or the latent vector) for every token, "
        "and what does not grow with the length: states, and windows, of which a layer keeps no more than it reads.",
        paint,
    )


def beside_it(config: ModelConfig) -> dict[str, ModelConfig]:
    """The model's cache, and for comparison the same with plain causal attention and a key for every head."""
    plain = config.model_copy(update={"attention": ("mha",), "kv_heads": config.heads, "mask": ("causal",)})
    same = kept_by(plain) == kept_by(config)
    return {"this model": config} if same else {"this model": config, "plain MHA": plain}
