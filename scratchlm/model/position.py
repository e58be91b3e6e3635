"""How positions enter the model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from scratchlm.model.config import ModelConfig


class RoPE(nn.Module):
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864, eq. 15), half-split pairs.

    Dimension i of a head is paired with i + head_dim/2; the pair is turned by the angle position · θ^(−2i/head_dim):

        x'ᵢ        = xᵢ cos − xᵢ₊ₕ sin
        x'ᵢ₊ₕ      = xᵢ sin + xᵢ₊ₕ cos

    so that a query at position m and a key at position n meet in a product that depends on m − n only. The paper's
    interleaved pairs (2i, 2i+1) are the same model with the rows of the q and k projections permuted; halves keep
    memory contiguous. Angles are computed in fp32 at least, whatever the model's dtype.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim, self.theta = config.resolved_head_dim, config.rope_theta
        self.context_length = config.context_length
        self._build(torch.get_default_dtype(), None)

    def _build(self, dtype: torch.dtype, device: torch.device | None) -> None:
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device="cpu") / self.head_dim
        positions = torch.arange(self.context_length, dtype=torch.float64, device="cpu")
        angles = torch.outer(positions, self.theta**-exponents)
        table = torch.stack([angles.cos(), angles.sin()])
        self.register_buffer("table", table.to(dtype).to(device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RoPE:
        # `model.bfloat16()` would round the table too: build it anew.
        super()._apply(fn, recurse)
        table: Tensor = self.table  # type: ignore[assignment]
        self._build(table.dtype, table.device)
        return self

    def angles(
        self, length: int, positions: Int[Tensor, "... length"] | None
    ) -> tuple[Float[Tensor, "... length half"], Float[Tensor, "... length half"]]:
        """cos and sin for each position below `context_length`; `positions` None means 0 … length − 1."""
        table: Tensor = self.table  # type: ignore[assignment]
        cos, sin = table[:, :length] if positions is None else table[:, positions]
        return cos, sin

    def forward(
        self, x: Float[Tensor, "... heads length head_dim"], positions: Int[Tensor, "... length"] | None
    ) -> Float[Tensor, "... heads length head_dim"]:
        cos, sin = (part.to(x.dtype) for part in self.angles(x.shape[-2], positions))
        if cos.ndim > 2:  # positions differ between rows: line up with the heads
            cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class NoPosition(nn.Module):
    """NoPE: nothing is added; the causal mask alone tells positions apart (Kazemnejad et al. 2023, arXiv 2305.19466)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()

    def forward(
        self, x: Float[Tensor, "... heads length head_dim"], positions: Int[Tensor, "... length"] | None
    ) -> Float[Tensor, "... heads length head_dim"]:
        return x
