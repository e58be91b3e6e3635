"""Rotary position embedding."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scratchlm.kernels import rotary
from scratchlm.model import choices
from scratchlm.model.config import ModelConfig
from scratchlm.model.position import Memo, TablePosition


def half_split_pairs(
    x: Float[Tensor, "... width"], cos: Float[Tensor, "... half"], sin: Float[Tensor, "... half"]
) -> Float[Tensor, "... width"]:
    """Dimension i is paired with i + width/2 (GPT-NeoX, Llama as Hugging Face stores it)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def interleaved_pairs(
    x: Float[Tensor, "... width"], cos: Float[Tensor, "... half"], sin: Float[Tensor, "... half"]
) -> Float[Tensor, "... width"]:
    """Dimension 2i is paired with 2i + 1, as in the paper (GPT-J, Llama as Meta stores it)."""
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2)


class RoPE(TablePosition):
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864, eq. 15).

    The rotated dimensions form pairs (a, b); pair i is turned by the angle position · θ^(−2i/width):

        a' = a cos − b sin
        b' = a sin + b cos

    so that a query at position m and a key at position n meet in a product that depends on m − n only. Which dimensions form
    a pair (`rope.pairs`) is the same model with the rows of the q and k projections permuted; halves keep memory contiguous.
    With `rope.fraction` below 1 only the first dimensions are rotated and the rest carry no position (GPT-NeoX: 0.25). Angles
    are computed in fp64 and kept in fp32 at least, whatever the model's dtype. In latent attention the whole of the separate
    rotated part is turned.
    """

    def __init__(self, config: ModelConfig, layer: int, width: int) -> None:
        super().__init__(config, layer, width)
        rope = config.rope
        self.theta = rope.theta[layer % len(rope.theta)]
        self.scaling = rope.scaling[layer % len(rope.scaling)]
        self.width = width if config.attention_at(layer) == "mla" else config.rotated_dims
        self.pairs = choices.ROPE_PAIRS.get(rope.pairs)
        self.interleaved = self.pairs is interleaved_pairs
        self.in_kernel = config.kernels == "fast" and (self.interleaved or self.pairs is half_split_pairs)
        self._config = config
        self._build(torch.get_default_dtype(), None)

    def frequencies(self) -> tuple[Float[Tensor, " half"], float]:
        """Radians per position of each pair, and the factor that queries and keys are multiplied by; fp64."""
        exponents = torch.arange(0, self.width, 2, dtype=torch.float64, device="cpu") / self.width
        scale = choices.ROPE_SCALING.get(self.scaling)
        changed: tuple[Tensor, float] = scale(self.theta**-exponents, self.theta, self._config)
        return changed

    def compute(self) -> Float[Tensor, "2 context half"]:
        frequencies, factor = self.frequencies()
        positions = torch.arange(self.context_length, dtype=torch.float64, device="cpu")
        angles = torch.outer(positions, frequencies)
        return torch.stack([angles.cos(), angles.sin()]) * factor

    def angles(
        self, length: int, positions: Int[Tensor, "... length"] | None
    ) -> tuple[Float[Tensor, "... length half"], Float[Tensor, "... length half"]]:
        """cos and sin for each position below `context_length`; `positions` None means 0 … length − 1."""
        cos, sin = self.table[:, :length] if positions is None else self.table[:, positions]
        return cos, sin

    def _angles_for(
        self, dtype: torch.dtype, length: int, positions: Int[Tensor, "... length"] | None, memo: Memo | None
    ) -> tuple[Tensor, Tensor]:
        """cos and sin in a dtype; in one pass all layers ask for the same."""
        key = (self, dtype, length, positions)  # tensors are told apart by identity
        if memo is not None and key in memo:
            return memo[key]
        cos, sin = (part.to(dtype) for part in self.angles(length, positions))
        if memo is not None and not torch.compiler.is_compiling():
            memo[key] = cos, sin
        return cos, sin

    def forward(
        self,
        x: Float[Tensor, "... heads length head_dim"],
        positions: Int[Tensor, "... length"] | None,
        memo: Memo | None = None,
    ) -> Float[Tensor, "... heads length head_dim"]:
        if self.width == x.shape[-1] and self.in_kernel and rotary.fits_heads(x):
            return rotary.turn(x, *self._angles_for(torch.float32, x.shape[-2], positions, memo), self.interleaved)
        cos, sin = self._angles_for(x.dtype, x.shape[-2], positions, memo)
        if cos.ndim > 2:  # positions differ between rows: line up with the heads
            cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)
        if self.width == x.shape[-1]:
            return self.pairs(x, cos, sin)
        turned = self.pairs(x[..., : self.width], cos, sin)
        return torch.cat([turned, x[..., self.width :]], dim=-1)

    def turn_heads(
        self,
        projected: Float[Tensor, "... length width"],
        heads: int,
        kv_heads: int,
        positions: Int[Tensor, "... length"] | None,
        memo: Memo | None = None,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        whole = self.width * (heads + 2 * kv_heads) == projected.shape[-1]  # all of a head is rotated
        if not (whole and self.in_kernel and rotary.fits(projected)):
            return None
        angles = self._angles_for(torch.float32, projected.shape[-2], positions, memo)
        return rotary.turn_heads(projected, *angles, heads, kv_heads, self.interleaved)
