"""Masks as grids: what `Rule.allowed` says of every pair of positions, and what a blocked kernel computes for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from scratchlm.kernels.visibility import BLOCK, Rule, columns_per_block, parts_worth_taking, scores_computed
from scratchlm.model import choices
from scratchlm.model.config import ModelConfig
from scratchlm.model.draw.style import COLOURS, HUES, Picture, Theme, dress, layers_in_words, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CELLS = 256
"""At most so many rows and columns are drawn; a cell then stands for several positions."""
SHORTEST, LONGEST = 512, 8192
"""Between these lengths one is chosen at which a mask's shape shows."""


SIZES = {"sliding_window": "window", "strided": "stride", "fixed": "stride", "block_sparse": "block"}
"""The field of a rule that its title names."""


@dataclass(frozen=True)
class Grid:
    """A mask over a sequence.

    Attributes:
        title: what is written above it.
        rule: the mask.
        length: positions in the sequence.
        block: queries per block of the blocked kernel.
        prefix: as in :class:`~scratchlm.kernels.visibility.Visibility`.
    """

    title: str
    rule: Rule
    length: int
    block: int = BLOCK
    prefix: int = 0

    @property
    def side(self) -> int:
        """Positions per cell."""
        return max(1, -(-self.length // CELLS))

    @property
    def parts(self) -> tuple[Rule, ...]:
        """The rule's parts, if the blocked kernel takes it in parts at this length."""
        return parts_worth_taking(self.rule, self.length, self.block, self.prefix)

    def coverage(self) -> tuple[np.ndarray, np.ndarray]:
        """Which share of each cell may be read, and how often a blocked kernel computes it: two float arrays (cells, cells).

        A rule in parts has a pair computed twice where blocks of two parts meet.
        """
        positions = torch.arange(self.length)
        plans = [self._computed_rows(part) for part in self.parts or (self.rule,)]
        allowed, computed = [], []
        for start in range(0, self.length, self.side):
            rows = positions[start : start + self.side]
            allowed.append(self.rule.allowed(rows, positions, self.prefix).float().mean(dim=0))
            of_parts = [columns[block_of[rows]].mean(dim=0) for columns, block_of in plans]
            computed.append(torch.stack(of_parts).sum(dim=0))
        return self._by_cells(allowed), self._by_cells(computed)

    def _computed_rows(self, rule: Rule) -> tuple[torch.Tensor, torch.Tensor]:
        """For each block of the plan 1 at the positions it reads (blocks, length), and the block of each position (length,)."""
        plan = columns_per_block(rule, self.length, self.block, self.prefix)
        columns = torch.zeros(len(plan), self.length)
        for row, spans in zip(columns, plan, strict=True):
            for start, end in spans:
                row[start:end] = 1
        order = rule.order(self.length)
        place = torch.arange(self.length) if order is None else order.argsort()
        return columns[:, place], place // self.block

    def _by_cells(self, rows: Sequence[torch.Tensor]) -> np.ndarray:
        cells: np.ndarray = torch.stack(
            [torch.stack([c.mean(-1) for c in row.split(self.side)]) for row in rows]
        ).numpy()
        return cells

    def shares(self) -> tuple[float, float]:
        """Of all length² scores: how many may be read, and how many a blocked kernel computes."""
        area = self.length**2
        return (
            allowed_pairs(self.rule, self.length, self.prefix) / area,
            scores_computed(self.rule, self.length, self.block, self.prefix) / area,
        )


def allowed_pairs(rule: Rule, length: int, prefix: int = 0) -> int:
    """How many (query, key) pairs of a sequence may be read."""
    positions = torch.arange(length)
    return sum(int(rule.allowed(rows, positions, prefix).sum()) for rows in positions.split(512))


def telling_length(rule: Rule, context: int, prefix: int = 0) -> int:
    """A length up to `context` at which the mask looks unlike the plain triangle: half of it is left out, or more is in it."""
    length = min(context, SHORTEST)
    while length < min(context, LONGEST) and not rule.is_plain_causal:
        share = allowed_pairs(rule, length, prefix) / (length * (length + 1) / 2)
        if share < 0.5 or share > 1:
            break
        length = min(2 * length, context, LONGEST)
    return length


def grids_of(config: ModelConfig, length: int | None = None) -> list[Grid]:
    """One grid per mask of the configuration, titled by the layers that have it.

    Args:
        config: the architecture.
        length: positions drawn; None: :func:`telling_length`.
    """
    by_name: dict[str, list[int]] = {}
    for layer in range(config.layers):
        by_name.setdefault(config.mask_at(layer), []).append(layer)
    grids = []
    for name, layers in by_name.items():
        rule, prefix = choices.MASK.get(name).of(config), config.prefix_length
        chosen = telling_length(rule, config.context_length, prefix) if length is None else length
        size = getattr(rule, SIZES.get(name, ""), None)
        title = name if size is None else f"{name} {size:,}"
        grids.append(Grid(f"{title}\n{layers_in_words(layers)}", rule, chosen, prefix=prefix))
    return grids


def mask_picture(grids: Sequence[Grid], name: str = "masks") -> Picture:
    """All grids beside each other."""
    blocks = " or ".join(str(block) for block in sorted({grid.block for grid in grids}))
    twice = " Darker: computed twice, where two parts of a rule meet." if any(grid.parts for grid in grids) else ""

    def paint(theme: Theme) -> Figure:
        columns = min(3, len(grids))
        rows = -(-len(grids) // columns)
        figure = new_figure(theme, 3.6 * columns, 3.9 * rows)
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, grid in zip(panels, grids, strict=False):
            _paint_grid(axes, grid, theme)
        for axes in panels[len(grids) :]:
            axes.set_axis_off()
        return figure

    return Picture(
        name,
        "Masks",
        "Blue: the query of this row may read the key of this column. Orange: a kernel in blocks computes the score all the "
        f"same, because some query of its block of rows may read that key.{twice} The rest is never computed. The blocks and the "
        f"shares of all scores are those of the code, in blocks of {blocks} queries; queries go down, keys go right.",
        paint,
    )


def _paint_grid(axes: Axes, grid: Grid, theme: Theme) -> None:
    from matplotlib.colors import to_rgb

    allowed, computed = (part[..., None] for part in grid.coverage())
    blue, tint, back = (
        np.array(to_rgb(colour)) for colour in (HUES[theme][0], COLOURS[theme]["tint"], COLOURS[theme]["back"])
    )
    wasted = np.clip(computed - allowed, 0, 1 - allowed)
    image = allowed * blue + wasted * tint + (1 - allowed - wasted) * back
    image = image * (1 - 0.35 * np.clip(computed - 1, 0, 1))
    end = grid.length - 0.5
    axes.imshow(np.clip(image, 0, 1), interpolation="nearest", extent=(-0.5, end, end, -0.5))
    visible, done = grid.shares()
    dress(axes, theme, grid.title, x=f"{visible:.1%} visible, {done:.1%} computed", y="query")
    if grid.length <= 48:
        ticks = np.arange(-0.5, grid.length)
        axes.set_xticks(ticks, minor=True)
        axes.set_yticks(ticks, minor=True)
        axes.grid(which="minor", color=COLOURS[theme]["line"], linewidth=0.7)
        axes.tick_params(which="minor", length=0)
    axes.locator_params(nbins=5, integer=True)
    axes.xaxis.tick_top()
    axes.tick_params(top=True, bottom=False)
