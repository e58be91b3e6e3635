"""Attention without a softmax: a state of fixed size takes the place of the growing cache.

::

    softmax attention      o_t = Σ_s softmax(q_t · k_s) v_s         every key is kept; the cost of a token grows with the past
    linear attention       S_t = S_{t−1} + φ(k_t) v_tᵀ              o_t = φ(q_t) S_t   (and divided by Σ φ(q_t) φ(k_s))
    with decay             S_t = a_t S_{t−1} + k_t v_tᵀ             a fixed per head (retention) or read from x (gla)
    delta rule             S_t = a_t (I − β_t k_t k_tᵀ) S_{t−1} + β_t k_t v_tᵀ      what k_t held before is replaced

Each has three equal forms (`kernels/linear_attention.py`, `kernels/delta_rule.py`): quadratic for reading, chunked for training,
recurrent for generating.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from scratchlm.kernels.attention import for_every_head
from scratchlm.kernels.delta_rule import delta_rule, delta_rule_flops
from scratchlm.kernels.linear_attention import State, linear_attention, linear_attention_flops
from scratchlm.model import choices
from scratchlm.model.config import ModelConfig
from scratchlm.model.context import Context
from scratchlm.model.linear import Linear
from scratchlm.model.norm import RMSNorm
from scratchlm.model.position import Positions
from scratchlm.model.short_convolution import ShortConvolution

Heads = Float[Tensor, "... heads t width"]
Form = Literal["parallel", "chunked", "recurrent"]


def elu_plus_one(x: Tensor) -> Tensor:
    """φ(x) = elu(x) + 1, positive everywhere (Katharopoulos et al. 2020, arXiv 2006.16236, eq. 7)."""
    return F.elu(x) + 1


def relu(x: Tensor) -> Tensor:
    """φ(x) = max(0, x): weights are never negative, and may all be 0."""
    return F.relu(x)


def identity(x: Tensor) -> Tensor:
    """φ(x) = x: weights of either sign, so that nothing is divided by their sum unless one asks for it."""
    return x


class LinearMixer(nn.Module):
    """What all mixers with a state share: projections, grouped keys and values, the state in the cache, the gated output.

    ::

                 ┌─ q ─ norm? ─ position ─ φ ─┐
        x ─ qkv ─┼─ k ─ norm? ─ position ─ φ ─┼─ state ─ o ─ (norm per head ⊙ SiLU(W_g x)) ─ W_o ─►
                 └─ v ────────────────────────┘
    """

    gated: ClassVar[bool] = True
    per_channel: ClassVar[bool] = False

    def __init__(self, config: ModelConfig, layer: int, positions: Positions) -> None:
        super().__init__()
        self.layer, self.heads, self.kv_heads = layer, config.heads, config.resolved_kv_heads
        self.head_dim = config.resolved_head_dim
        self.settings = config.linear
        self.reference = config.kernels == "reference"
        sizes = [self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim]
        biases = [name in config.attention_bias for name in "qkv"]
        self.qkv = Linear(config.d_model, sum(sizes), parts=sizes, bias=biases, reference=self.reference)
        self.output = Linear(
            sizes[0],
            config.d_model,
            bias="o" in config.attention_bias,
            residual_output=True,
            reference=self.reference,
        )
        norm = choices.QK_NORM.get(config.qk_norm)
        self.q_norm, self.k_norm = norm(config, self.heads), norm(config, self.kv_heads)
        self.position = positions.at(layer, self.head_dim)
        self.scale = self.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        self.has_gate = self.gated and config.linear.output_gate
        if self.has_gate:
            self.gate = Linear(config.d_model, sizes[0], reference=self.reference)
            self.output_norm = RMSNorm(self.head_dim, config.norm_eps, reference=self.reference)

    def form(self, length: int) -> Form:
        """Which of the equal forms computes a piece of `length` tokens."""
        if self.settings.form != "auto":
            return self.settings.form
        if self.reference:
            return "parallel"
        return "recurrent" if length == 1 else "chunked"

    def project(self, x: Tensor, context: Context) -> tuple[Heads, Heads, Heads]:
        """Queries, keys and values, each with all heads; padding has neither key nor value."""
        q, k, v = self.qkv(x).split(self.qkv.parts, dim=-1)
        return self.by_heads(q, k, v, context)

    def by_heads(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Heads, Heads, Heads]:
        q = rearrange(q, "... t (h d) -> ... h t d", h=self.heads)
        k = rearrange(k, "... t (h d) -> ... h t d", h=self.kv_heads)
        v = rearrange(v, "... t (h d) -> ... h t d", h=self.kv_heads)
        q = self.features(self.position(self.q_norm(q), context.positions, context.memo))
        k = self.features(self.position(self.k_norm(k), context.positions, context.memo))
        if context.valid is not None:
            valid = context.valid[:, None, :, None]
            k, v = k * valid, v * valid
        k, v = for_every_head(q, k, v)
        return q * self.scale, k, v

    def features(self, x: Heads) -> Heads:
        """φ."""
        return x

    def forward(
        self, x: Float[Tensor, "... length d_model"], context: Context
    ) -> Float[Tensor, "... length d_model"]:
        q, k, v = self.project(x, context)
        kept = {} if context.cache is None else context.cache.state(self.layer)
        before = State(kept["s"], kept.get("z")) if "s" in kept else None
        mixed, state = self.mix(x, q, k, v, context, before)
        if context.cache is not None:
            now = {"s": state.s} if state.z is None else {"s": state.s, "z": state.z}
            context.cache.replace(self.layer, {**context.cache.state(self.layer), **now})
        if self.has_gate:
            gate = rearrange(self.gate(x), "... t (h d) -> ... h t d", h=self.heads)
            mixed = self.output_norm(mixed) * F.silu(gate)
        return self.output(rearrange(mixed, "... h t d -> ... t (h d)"))

    def decay(self, x: Tensor) -> Tensor | None:
        """log a_t, broadcastable to (…, heads, t, 1) or (…, heads, t, head_dim); None: 0."""
        return None

    def mix(
        self, x: Tensor, q: Heads, k: Heads, v: Heads, context: Context, before: State | None
    ) -> tuple[Heads, State]:
        """The recurrence over all tokens, from the state before them."""
        return linear_attention(
            q,
            k,
            v,
            self.decay(x),
            normalise=self.normalises,
            documents=context.documents if before is None else None,
            state=before,
            form=self.form(x.shape[-2]),
            chunk=self.settings.chunk,
        )

    @property
    def normalises(self) -> bool:
        """Whether the weights are divided by their sum."""
        return False

    def num_params(self) -> int:
        own = self.qkv.num_params() + self.output.num_params()
        norms = self.q_norm.num_params() + self.k_norm.num_params()
        gate = self.gate.num_params() + self.output_norm.num_params() if self.has_gate else 0
        return int(own + norms + gate)

    def flops_per_token(self, length: int) -> float:
        """Projections, and the products of the form that computes `length` tokens."""
        projections = self.qkv.flops_per_token() + self.output.flops_per_token()
        gate = self.gate.flops_per_token() if self.has_gate else 0
        return projections + gate + self.heads * self.mix_flops(length) / max(1, length)

    def mix_flops(self, length: int) -> int:
        """Products of one head over `length` tokens."""
        return linear_attention_flops(
            self.form(length),
            length,
            self.head_dim,
            self.head_dim,
            self.settings.chunk,
            per_channel=self.per_channel,
        )

    @classmethod
    def cache_widths(cls, config: ModelConfig) -> int:
        """Nothing is kept per token."""
        return 0

    @classmethod
    def wide_size(cls, config: ModelConfig) -> int:
        """Numbers of the state itself, kept in fp32 at least: the matrix S of every head."""
        return config.heads * config.resolved_head_dim**2

    @classmethod
    def state_size(cls, config: ModelConfig) -> int:
        """Numbers kept per layer whatever the length."""
        return cls.wide_size(config)


class LinearAttention(LinearMixer):
    """φ(Q)(φ(K)ᵀV), divided by φ(Q) Σ φ(K) (Katharopoulos et al. 2020, eq. 4 to 6)."""

    gated = False

    def __init__(self, config: ModelConfig, layer: int, positions: Positions) -> None:
        super().__init__(config, layer, positions)
        self.feature_map = choices.FEATURE_MAP.get(config.linear.feature_map)

    def features(self, x: Heads) -> Heads:
        mapped: Tensor = self.feature_map(x)
        return mapped

    @property
    def normalises(self) -> bool:
        chosen = self.settings.normalise
        return self.settings.feature_map != "identity" if chosen is None else chosen

    @classmethod
    def wide_size(cls, config: ModelConfig) -> int:
        """S, and z where weights are divided by their sum."""
        chosen = config.linear.normalise
        normalised = config.linear.feature_map != "identity" if chosen is None else chosen
        return config.heads * config.resolved_head_dim * (config.resolved_head_dim + normalised)


class Retention(LinearMixer):
    """A fixed decay per head, 1 − 2^(−5−h): some heads forget soon, some late (RetNet: Sun et al. 2023, arXiv 2307.08621)."""

    def decay(self, x: Tensor) -> Tensor:
        heads = torch.arange(self.heads, device=x.device, dtype=torch.float32)
        return torch.log1p(-(2.0 ** (-5.0 - heads)))[:, None, None]


class GatedLinearAttention(LinearMixer):
    """A decay per head and key channel read from x: σ(W₂ W₁ x + b)^(1/16) (GLA: Yang et al. 2023, arXiv 2312.06635, section 4.4)."""

    per_channel = True
    rank, temperature = 16, 16.0

    def __init__(self, config: ModelConfig, layer: int, positions: Positions) -> None:
        super().__init__(config, layer, positions)
        self.decay_down = Linear(config.d_model, self.rank, reference=self.reference)
        self.decay_up = Linear(self.rank, self.heads * self.head_dim, bias=True, reference=self.reference)

    def decay(self, x: Tensor) -> Tensor:
        gates = rearrange(self.decay_up(self.decay_down(x)), "... t (h d) -> ... h t d", h=self.heads)
        return F.logsigmoid(gates.to(torch.promote_types(gates.dtype, torch.float32))) / self.temperature

    def num_params(self) -> int:
        return super().num_params() + self.decay_down.num_params() + self.decay_up.num_params()

    def flops_per_token(self, length: int) -> float:
        decay = self.decay_down.flops_per_token() + self.decay_up.flops_per_token()
        return super().flops_per_token(length) + decay


class GatedDeltaNet(LinearMixer):
    """The delta rule with a decay per head (Yang et al. 2024, arXiv 2412.06464, figure 1; Qwen3-Next).

    Queries, keys and values go through a short causal convolution and SiLU; queries and keys have norm 1; the decay is
    exp(−A softplus(W_a x + b)), the writing strength β = σ(W_b x).
    """

    def __init__(self, config: ModelConfig, layer: int, positions: Positions) -> None:
        super().__init__(config, layer, positions)
        self.strengths = Linear(
            config.d_model, 2 * self.heads, parts=[self.heads, self.heads], role="gate", reference=self.reference
        )
        self.decay_rate = nn.Parameter(torch.empty(self.heads))  # log A
        self.decay_bias = nn.Parameter(torch.empty(self.heads))
        for parameter in (self.decay_rate, self.decay_bias):
            parameter.role = "bias"  # type: ignore[attr-defined]
        width = config.linear.conv_width
        self.convolution = ShortConvolution(self.qkv.d_out, width) if width > 1 else None

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None) -> None:
        """A from 1 to 16 and softplus(b) from 0.001 to 0.1, both spread evenly in the logarithm (Mamba 2's)."""
        self.decay_rate.uniform_(0.0, math.log(16.0), generator=generator)
        step = self.decay_bias.uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp_()
        step.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus

    def project(self, x: Tensor, context: Context) -> tuple[Heads, Heads, Heads]:
        projected = self.qkv(x)
        if context.valid is not None:
            projected = projected * context.valid[..., None]
        if self.convolution is not None:
            projected = F.silu(self.convolution(projected, context, self.layer))
        q, k, v = projected.split(self.qkv.parts, dim=-1)
        return self.by_heads(q, k, v, context)

    def features(self, x: Heads) -> Heads:
        return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1).to(x.dtype)

    def mix(
        self, x: Tensor, q: Heads, k: Heads, v: Heads, context: Context, before: State | None
    ) -> tuple[Heads, State]:
        strengths = self.strengths(x)
        wide = torch.promote_types(strengths.dtype, torch.float32)
        step, beta = rearrange(strengths.to(wide), "... t (two h) -> two ... h t 1", two=2)
        rate, bias = self.decay_rate.to(wide).exp()[:, None, None], self.decay_bias.to(wide)[:, None, None]
        return delta_rule(
            q,
            k,
            v,
            torch.sigmoid(beta),
            -rate * F.softplus(step + bias),
            documents=context.documents if before is None else None,
            state=before,
            form=self.form(x.shape[-2]),
            chunk=self.settings.chunk,
        )

    def num_params(self) -> int:
        convolution = 0 if self.convolution is None else self.convolution.num_params()
        return super().num_params() + self.strengths.num_params() + 2 * self.heads + convolution

    def flops_per_token(self, length: int) -> float:
        return super().flops_per_token(length) + self.strengths.flops_per_token()

    def mix_flops(self, length: int) -> int:
        return delta_rule_flops(self.form(length), length, self.head_dim, self.head_dim, self.settings.chunk)

    @classmethod
    def state_size(cls, config: ModelConfig) -> int:
        """S, and the last inputs of the convolution."""
        channels = (config.heads + 2 * config.resolved_kv_heads) * config.resolved_head_dim
        return super().state_size(config) + (config.linear.conv_width - 1) * channels
