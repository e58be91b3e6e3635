"""The residual stream of a block: its forward pass is traced, and the graph that comes out is drawn.

The trace sees every norm, branch, scale and addition that the block's own code runs, in its order; what does nothing (no
norm, a plain residual, no dropout) is left out of the drawing. A new block is drawn the day it is written.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from scratchlm.evaluate.report import amount
from scratchlm.model.config import ModelConfig
from scratchlm.model.draw.style import COLOURS, HUES, Picture, Theme, layers_in_words, new_figure
from scratchlm.model.norm import NoNorm
from scratchlm.model.residual import PlainResidual
from scratchlm.model.transformer import Transformer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BOX, BOX_COLUMN, SIGN_COLUMN = 1.16, 1.36, 0.62
"""Inches: width of a box, of a column with boxes, of one with x or + alone."""
LANE = 1.0
MOST_BLOCKS = 5
_TAIL = 0.75


@dataclass
class Step:
    """Something a block does.

    Attributes:
        name: of the module in the block, or ``x``, ``+``.
        label: what is written in its box.
        inputs: the steps it reads, the stream first.
        column, lane: where it is drawn; lane 0 is the residual stream.
        x: the column's middle.
    """

    name: str
    label: str
    inputs: list[Step] = field(default_factory=list)
    column: int = 0
    lane: int = 0
    x: float = 0.0

    @property
    def is_sign(self) -> bool:
        return len(self.name) == 1


class _ByPieces(fx.Tracer):
    """Everything a block calls is one step."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _does_nothing(module: Any) -> bool:
    return isinstance(module, NoNorm | PlainResidual) or (isinstance(module, nn.Dropout) and module.p == 0)


def steps_of(block: nn.Module, config: ModelConfig, layer: int) -> list[Step]:
    """Trace `block`; the first step is x, the last what comes out. Columns and lanes are set."""
    steps: dict[fx.Node, Step] = {}
    order: list[Step] = []
    for node in _ByPieces().trace(block).nodes:
        if node.op == "placeholder" and node.name != "x":
            continue  # the context
        if node.op == "output":
            break
        inputs = [steps[argument] for argument in node.all_input_nodes if argument in steps]
        if node.op == "placeholder":
            step = Step("x", "x")
        elif node.op == "call_module":
            module = block.get_submodule(str(node.target))
            if _does_nothing(module):
                steps[node] = inputs[0]
                continue
            step = Step(str(node.target), _label(str(node.target), module, config, layer), inputs)
        else:
            sign = {operator.add: "+", operator.mul: "×"}.get(node.target, node.name)
            step = Step(sign, sign, inputs)
        steps[node] = step
        order.append(step)
    _place(order)
    return order


def _label(name: str, module: Any, config: ModelConfig, layer: int) -> str:
    kind = type(module).__name__
    size = module.num_params() if hasattr(module, "num_params") else 0
    weights = f"\n{amount(size)} weights" if size else ""
    if name == "attention":
        shared = "" if config.resolved_kv_heads == config.heads else f", {config.resolved_kv_heads} kv"
        return f"attention\n{config.attention_at(layer)}\n{config.heads} heads{shared}{weights}"
    if name == "feedforward":
        if config.has_experts(layer):
            shared = f" + {config.moe.shared}" if config.moe.shared else ""
            what = f"{config.active_experts} of {config.n_experts}{shared} experts"
            return f"{what}\n{config.feedforward} {config.resolved_d_expert}{weights}"
        return f"feed-forward\n{config.feedforward} {config.resolved_d_ff}{weights}"
    if isinstance(module, nn.Dropout):
        return f"dropout\n{module.p:g}"
    return f"{_broken(kind)}{weights}"


def _broken(kind: str) -> str:
    """A long name in two lines, cut before a capital: ``LayerNorm`` / ``NoBias``."""
    cuts = [at for at in range(1, len(kind)) if kind[at].isupper() and not kind[at - 1].isupper()]
    if len(kind) <= 15 or not cuts:
        return kind
    middle = min(cuts, key=lambda at: abs(at - len(kind) / 2))
    return f"{kind[:middle]}\n{kind[middle:]}"


def _place(steps: Sequence[Step]) -> None:
    """Columns by the longest way from x; the stream in lane 0, branches below, a second one beside the first elsewhere."""
    for step in steps:
        step.column = 1 + max((read.column for read in step.inputs), default=-1)
    edge = 0.0
    for column in range(steps[-1].column + 1):
        inside = [step for step in steps if step.column == column]
        width = SIGN_COLUMN if all(step.is_sign for step in inside) else BOX_COLUMN
        for step in inside:
            step.x = edge + width / 2
        edge += width
    stream = [steps[-1]]
    while stream[-1].inputs:
        stream.append(stream[-1].inputs[0])
    placed = {id(step) for step in stream}
    taken: dict[int, list[tuple[int, int]]] = {}
    for join in reversed(stream):
        for branch in join.inputs[1:]:
            chain = [branch]
            while id(chain[-1]) not in placed and chain[-1].inputs:
                chain.append(chain[-1].inputs[0])
            start = chain.pop()
            if not chain:
                continue
            first, last = start.column, join.column
            lanes = (-1, 1, -2, 2) if start in stream else (-2, -1, 2, 1)
            free = [lane for lane in lanes if all(last <= a or b <= first for a, b in taken.get(lane, []))]
            lane = free[0] if free else max(taken) + 1
            taken.setdefault(lane, []).append((first, last))
            for step in chain:
                step.lane = lane
                placed.add(id(step))


def blocks_of(model: Transformer) -> list[tuple[str, list[Step]]]:
    """One graph per kind of layer (attention, dense or experts), titled by its layers."""
    config = model.config
    kinds: dict[tuple[str, bool], list[int]] = {}
    for layer in range(config.layers):
        kinds.setdefault((config.attention_at(layer), config.has_experts(layer)), []).append(layer)
    return [
        (layers_in_words(layers), steps_of(model.blocks[layers[0]], config, layers[0]))
        for layers in list(kinds.values())[:MOST_BLOCKS]
    ]


def block_picture(blocks: Sequence[tuple[str, list[Step]]], name: str = "block", columns: int = 1) -> Picture:
    """Graphs of blocks, one above the other."""

    def paint(theme: Theme) -> Figure:
        rows = [range(start, min(start + columns, len(blocks))) for start in range(0, len(blocks), columns)]
        # A row is as high as its highest graph.
        spans = [_span([step for index in row for step in blocks[index][1]]) for row in rows]
        heights = [top - bottom for bottom, top in spans]
        widest = max(steps[-1].x for _, steps in blocks) + _TAIL
        figure = new_figure(theme, columns * (widest + 0.1), sum(heights) * LANE + 0.3 * len(rows))
        panels = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
        for row, span, line in zip(rows, spans, panels, strict=True):
            for axes in line:
                axes.set_axis_off()
            for axes, index in zip(line, row, strict=False):
                title, steps = blocks[index]
                axes.set_title(title, fontsize=10, loc="left", color=COLOURS[theme]["ink"])
                axes.set_xlim(0, widest)
                axes.set_ylim(*span)
                _paint_steps(axes, steps, theme)
        return figure

    return Picture(
        name,
        "Block",
        "The block's own forward pass, traced: the straight line is the residual stream, circles add to it.",
        paint,
    )


def _span(steps: Sequence[Step]) -> tuple[float, float]:
    """What a graph covers from bottom to top."""
    edges = [
        (step.lane - reach, step.lane + reach) for step in steps for reach in (0.25 if step.is_sign else 0.42,)
    ]
    return min(bottom for bottom, _ in edges), max(top for _, top in edges)


def _paint_steps(axes: Axes, steps: Sequence[Step], theme: Theme) -> None:
    ink = COLOURS[theme]["ink"]
    line: dict[str, Any] = {"color": ink, "linewidth": 1.2, "zorder": 1}
    for step in steps:
        for read in step.inputs:
            way = [(read.x, float(read.lane)), (step.x, float(step.lane))]
            tip, back = (step.x - _half(step), float(step.lane)), (-0.05, 0.0)
            if read.lane != step.lane and step.is_sign:  # along its lane, then to the stream
                way.insert(1, (step.x, float(read.lane)))
                side = _half(step) if read.lane > step.lane else -_half(step)
                tip, back = (step.x, step.lane + side), (0.0, 0.05 if side > 0 else -0.05)
            elif read.lane != step.lane:  # leaves behind its source
                tap = read.x + _half(read) + (0.14 if read.is_sign else (BOX_COLUMN - BOX) / 2)
                way[1:1] = [(tap, float(read.lane)), (tap, float(step.lane))]
                axes.plot([tap], [read.lane], marker="o", markersize=3.5, color=ink, zorder=2)
            axes.plot(*zip(*way, strict=True), **line)
            _arrow(axes, (tip[0] + back[0], tip[1] + back[1]), tip, ink)
    last = steps[-1]
    _arrow(axes, (last.x + _half(last), last.lane), (last.x + _TAIL, last.lane), ink)
    for step in steps:
        _paint_step(axes, step, theme)


def _arrow(axes: Axes, begin: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    shape = {"arrowstyle": "-|>", "color": colour, "shrinkA": 0, "shrinkB": 0, "linewidth": 1.2}
    axes.annotate("", end, begin, arrowprops=shape)


def _half(step: Step) -> float:
    """From a step's middle to its edge."""
    return 0.15 if step.is_sign else BOX / 2


def _paint_step(axes: Axes, step: Step, theme: Theme) -> None:
    from matplotlib.patches import FancyBboxPatch

    colours, hues = COLOURS[theme], HUES[theme]
    text: dict[str, Any] = {"ha": "center", "va": "center", "color": colours["ink"], "zorder": 4}
    if step.is_sign:
        edge = colours["back"] if step.name == "x" else colours["ink"]
        axes.plot(
            [step.x], [step.lane], marker="o", markersize=17, color=colours["back"], markeredgecolor=edge, zorder=3
        )
        axes.text(step.x, step.lane, step.label, fontsize=11, **text)
        return
    kinds = {"attention": hues[0], "feedforward": hues[2], "dropout": colours["faint"]}
    colour = kinds.get(step.name, hues[1] if "norm" in step.name else hues[3])
    corner = step.x - BOX / 2 + 0.05, step.lane - 0.31
    box = FancyBboxPatch(
        corner,
        BOX - 0.1,
        0.62,
        boxstyle="round,pad=0.05",
        facecolor=colours["back"],
        edgecolor=colour,
        linewidth=1.8,
        zorder=3,
    )
    axes.add_patch(box)
    axes.text(step.x, step.lane, step.label, fontsize=7.5, linespacing=1.3, **text)
