"""How positions enter the model: added to the embedding, turned into queries and keys, or taken from the scores.

::

                    sinusoidal, learned          RoPE                     ALiBi
    ids ─ embedding ────(+)──► … q, k ──── rotated by position ── q · k ── − slope · distance ── softmax …

One class has all three hooks, so that a layer asks no names. The rotation itself is in `rope.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from scratchlm.model import choices
from scratchlm.model.config import ModelConfig

Memo = dict[Any, tuple[Tensor, Tensor]]
"""What one forward pass has computed already."""


class Position(nn.Module):
    """No position at all; each kind replaces the hook it acts through.

    Args:
        config: the architecture.
        layer: the layer whose attention asks (the pattern's place).
        width: width of the queries and keys that are to be rotated.

    Attributes:
        slopes: ALiBi's slope per head, or None.
        at_embedding: whether `embed` does anything: such a position is added once, at the bottom.
    """

    slopes: Tensor | None = None
    at_embedding = False

    def __init__(self, config: ModelConfig, layer: int, width: int) -> None:
        super().__init__()

    def embed(
        self, x: Float[Tensor, "... length d_model"], positions: Int[Tensor, "... length"] | None
    ) -> Float[Tensor, "... length d_model"]:
        """Add the position to the embedding."""
        return x

    def forward(
        self,
        x: Float[Tensor, "... heads length head_dim"],
        positions: Int[Tensor, "... length"] | None,
        memo: Memo | None = None,
    ) -> Float[Tensor, "... heads length head_dim"]:
        """Put the position into queries or keys.

        Args:
            x: queries or keys.
            positions: position of each token; None: 0 … length − 1.
            memo: of one forward pass: what all its layers ask for is computed once.
        """
        return x

    def turn_heads(
        self,
        projected: Float[Tensor, "... length width"],
        heads: int,
        kv_heads: int,
        positions: Int[Tensor, "... length"] | None,
        memo: Memo | None = None,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Split q‖k‖v into heads and put the position into queries and keys, all by one kernel; None: there is none for this.

        Args:
            projected: width = (heads + 2 kv_heads) · head_dim.
            heads, kv_heads: of the queries; of the keys, and as many of the values.
            positions, memo: as for `forward`.

        Returns:
            q (…, heads, length, head_dim), k and v (…, kv_heads, length, head_dim).
        """
        return None

    def num_params(self) -> int:
        return 0


class NoPosition(Position):
    """NoPE: nothing is added; the causal mask alone tells positions apart (Kazemnejad et al. 2023, arXiv 2305.19466)."""


class TablePosition(Position):
    """A position that reads a table computed from its formula, one row per position below `context_length`.

    The table is kept in fp32 at least and built in fp64: a model that is cast does not round it.
    """

    table: Tensor

    def __init__(self, config: ModelConfig, layer: int, width: int) -> None:
        super().__init__(config, layer, width)
        self.context_length = config.context_length

    def compute(self) -> Float[Tensor, "context ..."]:
        """The table, in fp64 on the CPU."""
        raise NotImplementedError

    def _build(self, dtype: torch.dtype, device: torch.device | None) -> None:
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.register_buffer("table", self.compute().to(dtype).to(device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TablePosition:
        # `model.bfloat16()` would round the table too: build it anew. (Layers share it: this is called once for each.)
        before = self.table.dtype
        super()._apply(fn, recurse)
        if self.table.dtype != before:
            self._build(self.table.dtype, self.table.device)
        return self


def sinusoids(length: int, width: int, base: float = 10_000.0) -> Float[Tensor, "length width"]:
    """PE(p, 2i) = sin(p / base^(2i/width)), PE(p, 2i + 1) = cos of the same (Vaswani et al. 2017, section 3.5), in fp64."""
    frequencies = base ** (-torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width)
    angles = torch.outer(torch.arange(length, dtype=torch.float64, device="cpu"), frequencies)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width]


class Sinusoidal(TablePosition):
    """Sines and cosines of geometric wavelengths, added to the embedding (Vaswani et al. 2017, section 3.5)."""

    at_embedding = True

    def __init__(self, config: ModelConfig, layer: int, width: int) -> None:
        super().__init__(config, layer, width)
        self.d_model = config.d_model
        self._build(torch.get_default_dtype(), None)

    def compute(self) -> Tensor:
        return sinusoids(self.context_length, self.d_model)

    def embed(
        self, x: Float[Tensor, "... length d_model"], positions: Int[Tensor, "... length"] | None
    ) -> Float[Tensor, "... length d_model"]:
        rows = self.table[: x.shape[-2]] if positions is None else self.table[positions]
        return x + rows.to(x.dtype)


class Learned(Position):
    """A learned vector per position, added to the embedding (GPT-1 to GPT-3): none beyond `context_length`."""

    at_embedding = True

    def __init__(self, config: ModelConfig, layer: int, width: int) -> None:
        super().__init__(config, layer, width)
        self.reference = config.kernels == "reference"
        self.weight = nn.Parameter(torch.empty(config.context_length, config.d_model))
        self.weight.role = "embedding"  # type: ignore[attr-defined]

    def embed(
        self, x: Float[Tensor, "... length d_model"], positions: Int[Tensor, "... length"] | None
    ) -> Float[Tensor, "... length d_model"]:
        if positions is None:
            return x + self.weight[: x.shape[-2]]
        return x + (self.weight[positions] if self.reference else F.embedding(positions, self.weight))

    def num_params(self) -> int:
        return self.weight.numel()


def alibi_slopes(heads: int) -> Float[Tensor, " heads"]:
    """2^(−8/n), 2^(−16/n), … for n heads (Press et al. 2021, arXiv 2108.12409, section 3).

    Where n is no power of two, those of the largest power of two below it come first, and then every other one of twice that
    power, as in the authors' code.
    """
    whole = 2 ** math.floor(math.log2(heads))
    first = [2 ** (-8 * (i + 1) / whole) for i in range(whole)]
    between = [2 ** (-8 * (i + 1) / (2 * whole)) for i in range(0, 2 * whole, 2)]
    return torch.tensor((first + between)[:heads], dtype=torch.float64, device="cpu")


class ALiBi(TablePosition):
    """Each head takes slope · distance from its scores (Press et al. 2021): near is liked, far beyond training still works."""

    def __init__(self, config: ModelConfig, layer: int, width: int) -> None:
        super().__init__(config, layer, width)
        self.heads = config.heads
        self._build(torch.get_default_dtype(), None)

    def compute(self) -> Tensor:
        return alibi_slopes(self.heads)

    @property
    def slopes(self) -> Tensor:  # type: ignore[override]
        return self.table


class Positions:
    """The positions of all layers: what is equal between layers is built once and shared.

    Args:
        config: the architecture.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._built: dict[tuple[object, ...], Position] = {}

    def _shared(self, key: tuple[object, ...], kind: type[Position], layer: int, width: int) -> Position:
        if key not in self._built:
            self._built[key] = kind(self.config, layer, width)
        return self._built[key]

    def at(self, layer: int, width: int) -> Position:
        """What one layer's attention does to queries and keys of `width`, and to their scores."""
        rope, name = self.config.rope, self.config.position_at(layer)
        kind = choices.POSITION.get(name)
        if kind.at_embedding:  # it is in the stream already
            return self._shared(("in the stream",), NoPosition, layer, width)
        latent = self.config.attention_at(layer) == "mla"
        settings = (rope.theta[layer % len(rope.theta)], rope.scaling[layer % len(rope.scaling)], latent)
        return self._shared((name, width, settings), kind, layer, width)

    def at_embedding(self) -> list[Position]:
        """What is added to the embedding, each once."""
        names = dict.fromkeys(self.config.position_at(layer) for layer in range(max(1, self.config.layers)))
        kinds = [choices.POSITION.get(name) for name in names]
        return [kind(self.config, 0, 0) for kind in kinds if kind.at_embedding]
