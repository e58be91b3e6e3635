"""Position-wise feed-forward networks."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from scratchlm.kernels.functions import silu
from scratchlm.model.config import ModelConfig
from scratchlm.model.linear import Linear


class SwiGLU(nn.Module):
    """W_down (SiLU(W_gate x) ⊙ W_up x) (Shazeer 2020, arXiv 2002.05202, eq. 6).

            ┌── gate ── SiLU ──┐
        x ──┤                  ⊙ ── down ──►      d_ff = 8/3 · d_model keeps the parameters of a plain 4 · d_model
            └── up ────────────┘

    gate and up are the two halves of one matrix, so that one matmul computes both.
    """

    default_ratio = 8 / 3

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d_ff = config.resolved_d_ff
        self.reference = config.kernels == "reference"
        self.gate_up = Linear(config.d_model, 2 * d_ff, parts=[d_ff, d_ff], reference=self.reference)
        self.down = Linear(d_ff, config.d_model, residual_output=True, reference=self.reference)

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        activated = silu(gate) if self.reference else F.silu(gate)
        return self.down(activated * up)

    def num_params(self) -> int:
        return self.gate_up.num_params() + self.down.num_params()

    def flops_per_token(self) -> int:
        return self.gate_up.flops_per_token() + self.down.flops_per_token()


class SquaredReLU(nn.Module):
    """W_down max(0, W_up x)² (Primer: So et al. 2021, arXiv 2109.08668)."""

    default_ratio = 4.0

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d_ff = config.resolved_d_ff
        reference = config.kernels == "reference"
        self.up = Linear(config.d_model, d_ff, reference=reference)
        self.down = Linear(d_ff, config.d_model, residual_output=True, reference=reference)

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        return self.down(self.up(x).relu().square())

    def num_params(self) -> int:
        return self.up.num_params() + self.down.num_params()

    def flops_per_token(self) -> int:
        return self.up.flops_per_token() + self.down.flops_per_token()
