"""Position-wise feed-forward networks: plain and gated, one line per activation.

::

    plain:    x ── up ── f ── down ──►                  d_ff = 4 · d_model
                   ┌── gate ── f ──┐
    gated:    x ───┤               ⊙ ── down ──►        d_ff = 8/3 · d_model: the parameters of a plain one
                   └── up ─────────┘
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from scratchlm.kernels import functions, swiglu
from scratchlm.model.config import ModelConfig
from scratchlm.model.context import Context
from scratchlm.model.linear import Linear

Activation = Callable[..., Tensor]


class FeedForward(nn.Module):
    """What all feed-forwards share. A subclass says whether it is gated and names its function twice.

    Attributes:
        gated: whether a second projection is multiplied by the activated one.
        default_ratio: d_ff / d_model where the configuration does not say.
        fast: f by torch's own function.
        formula: f by the lecture's formula.
    """

    gated: ClassVar[bool] = False
    default_ratio: ClassVar[float] = 4.0
    fast: ClassVar[Callable[..., Tensor]]
    formula: ClassVar[Callable[..., Tensor]]

    def __init__(self, config: ModelConfig, d_ff: int | None = None) -> None:
        """`d_ff`: the inner width; None: the configuration's."""
        super().__init__()
        d_ff = config.resolved_d_ff if d_ff is None else d_ff
        self.reference = config.kernels == "reference"
        bias = config.feedforward_bias
        if self.gated:  # one matrix, so that one matmul computes both
            self.gate_up = Linear(config.d_model, 2 * d_ff, parts=[d_ff, d_ff], bias=bias, reference=self.reference)
        else:
            self.up = Linear(config.d_model, d_ff, bias=bias, reference=self.reference)
        self.down = Linear(d_ff, config.d_model, bias=bias, residual_output=True, reference=self.reference)

    @classmethod
    def activate(cls, projected: Float[Tensor, "... inner"], reference: bool = False) -> Float[Tensor, "... d_ff"]:
        """f(up), or f(gate) ⊙ up of the two halves gate‖up; used by the experts of a mixture, too."""
        function = cls.formula if reference else cls.fast
        if not cls.gated:
            return function(projected)
        gate, up = projected.chunk(2, dim=-1)
        return cls.combine(function, gate, up)

    @classmethod
    def combine(cls, function: Activation, gate: Tensor, up: Tensor) -> Tensor:
        """f(gate) ⊙ up."""
        return function(gate) * up

    def forward(self, x: Float[Tensor, "... d_model"], context: Context) -> Float[Tensor, "... d_model"]:
        inner = self.gate_up if self.gated else self.up
        return self.down(self.activate(inner(x), self.reference))

    def num_params(self) -> int:
        inner = self.gate_up if self.gated else self.up
        return inner.num_params() + self.down.num_params()

    def num_active_params(self) -> int:
        """All of them: no token is spared."""
        return self.num_params()

    def flops_per_token(self, length: int) -> int:
        inner = self.gate_up if self.gated else self.up
        return inner.flops_per_token() + self.down.flops_per_token()


class ReLU(FeedForward):
    """W_down max(0, W_up x) (Vaswani et al. 2017, eq. 2)."""

    fast, formula = staticmethod(F.relu), staticmethod(functions.relu)


class SquaredReLU(FeedForward):
    """W_down max(0, W_up x)² (Primer: So et al. 2021, arXiv 2109.08668)."""

    fast, formula = staticmethod(lambda x: F.relu(x).square()), staticmethod(functions.squared_relu)


class GELU(FeedForward):
    """W_down GELU(W_up x), with the exact Φ (Hendrycks & Gimpel 2016; BERT, GPT-NeoX)."""

    fast, formula = staticmethod(F.gelu), staticmethod(functions.gelu)


class GELUTanh(FeedForward):
    """W_down GELU(W_up x), with the tanh approximation (GPT-2, GPT-3)."""

    fast, formula = staticmethod(lambda x: F.gelu(x, approximate="tanh")), staticmethod(functions.gelu_tanh)


class SiLU(FeedForward):
    """W_down SiLU(W_up x): SwiGLU without the gate, what the course compares it with."""

    fast, formula = staticmethod(F.silu), staticmethod(functions.silu)


class Gated(FeedForward):
    """W_down (f(W_gate x) ⊙ W_up x) (Dauphin et al. 2017; Shazeer 2020, arXiv 2002.05202, eq. 5 and 6)."""

    gated, default_ratio = True, 8 / 3


class GLU(Gated):
    """f = σ: the first gated linear unit (Dauphin et al. 2017, arXiv 1612.08083)."""

    fast, formula = staticmethod(torch.sigmoid), staticmethod(functions.sigmoid)


class ReGLU(Gated):
    """f = ReLU (Shazeer 2020)."""

    fast, formula = staticmethod(F.relu), staticmethod(functions.relu)


class GeGLU(Gated):
    """f = GELU (Shazeer 2020; T5 v1.1)."""

    fast, formula = staticmethod(F.gelu), staticmethod(functions.gelu)


class GeGLUTanh(Gated):
    """f = GELU by tanh (Gemma)."""

    fast, formula = staticmethod(lambda x: F.gelu(x, approximate="tanh")), staticmethod(functions.gelu_tanh)


class SwiGLU(Gated):
    """f = SiLU (Shazeer 2020; PaLM, Llama and nearly all since)."""

    fast, formula = staticmethod(F.silu), staticmethod(functions.silu)

    @classmethod
    def activate(cls, projected: Float[Tensor, "... inner"], reference: bool = False) -> Float[Tensor, "... d_ff"]:
        """By one kernel, and one for the gradient, where there is one."""
        if not reference and swiglu.fits(projected):
            return swiglu.swiglu(projected)
        return super().activate(projected, reference)


class ClampedSwiGLU(Gated):
    """g σ(1.702 g) ⊙ (u + 1) with g = min(gate, 7), u = up within ±7 (gpt-oss, arXiv 2508.10925, and its published code)."""

    limit, alpha = 7.0, 1.702
    fast = staticmethod(lambda gate: gate * torch.sigmoid(1.702 * gate))
    formula = staticmethod(lambda gate: gate * functions.sigmoid(1.702 * gate))

    @classmethod
    def combine(cls, function: Activation, gate: Tensor, up: Tensor) -> Tensor:
        return function(gate.clamp(max=cls.limit)) * (up.clamp(-cls.limit, cls.limit) + 1)
