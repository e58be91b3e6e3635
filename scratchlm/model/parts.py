"""The sections inside ``[model]``: what only some choices read (RoPE, latent attention, linear attention, experts)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field

from scratchlm.model import choices
from scratchlm.section import Section

if TYPE_CHECKING:  # a type checker wants literals spelled out; pydantic and tyro read the table
    RopePairsName = str
    RopeScalingName = str
    FeatureMapName = str
    RouterName = str
    DispatchName = str
else:
    RopePairsName = Literal[choices.ROPE_PAIRS.names]
    RopeScalingName = Literal[choices.ROPE_SCALING.names]
    FeatureMapName = Literal[choices.FEATURE_MAP.names]
    RouterName = Literal[choices.ROUTER.names]
    DispatchName = Literal[("auto", *choices.DISPATCH.names)]

Value = TypeVar("Value")


def _words(value: Any) -> Any:
    """``"local local global"`` and ``1e6`` are patterns, too."""
    if isinstance(value, str):
        return tuple(value.split())
    return tuple(value) if isinstance(value, Iterable) else (value,)


Pattern = Annotated[tuple[Value, ...], Field(min_length=1), BeforeValidator(_words)]
"""One value per layer, repeated from the start when the layers outnumber them; one value alone is for all layers."""

Names = Annotated[tuple[Value, ...], BeforeValidator(_words)]
"""Any number of names, also none."""

PositiveFloat = Annotated[float, Field(gt=0, le=1e15)]


class RopeConfig(Section):
    """Rotary positions: wavelengths, pairs, and how a trained model is stretched to longer contexts."""

    theta: Pattern[PositiveFloat] = Field(
        default=(10_000.0,), description="Base of the wavelengths; several: per layer, repeated."
    )
    fraction: float = Field(
        default=1.0, gt=0, le=1, description="Share of each head's dimensions that is rotated (the first ones)."
    )
    pairs: RopePairsName = Field(
        default="half", description="half: i with i + d/2 (Llama, NeoX); interleaved: 2i with 2i + 1 (GPT-J, PaLM)."
    )
    scaling: Pattern[RopeScalingName] = Field(
        default=("none",), description="How wavelengths are stretched; several: per layer, repeated."
    )
    factor: float = Field(default=1.0, ge=1, le=1e6, description="By how much a scaling stretches the context.")
    original_context: int | None = Field(
        default=None, ge=1, le=2**31, description="Context before stretching; None: context_length / factor."
    )
    low_freq_factor: float = Field(
        default=1.0, gt=0, le=1e6, description="llama3: waves longer than original_context / this are stretched."
    )
    high_freq_factor: float = Field(
        default=4.0, gt=0, le=1e6, description="llama3: waves shorter than original_context / this are kept."
    )
    beta_fast: float = Field(default=32.0, gt=0, le=1e6, description="yarn: turns above which a wave is kept.")
    beta_slow: float = Field(default=1.0, gt=0, le=1e6, description="yarn: turns below which it is stretched.")
    truncate: bool = Field(
        default=True,
        description="yarn: the ramp between those two starts and ends at whole pairs (gpt-oss: false).",
    )
    attention_factor: float | None = Field(
        default=None, gt=0, le=1e6, description="yarn: queries and keys times this; None: 0.1 ln(factor) + 1."
    )


class LatentConfig(Section):
    """Multi-head latent attention (attention = mla): keys and values are read from one small vector per token."""

    q_rank: int | None = Field(
        default=None,
        ge=1,
        le=2**20,
        description="Width of the queries' latent vector; None: queries are not compressed.",
    )
    kv_rank: int = Field(default=64, ge=1, le=2**20, description="Width of the latent vector of keys and values.")
    rope_dim: int = Field(
        default=16,
        ge=0,
        le=2**16,
        description="Extra dimensions per head that carry the position; their key is shared.",
    )
    value_dim: int | None = Field(
        default=None, ge=1, le=2**16, description="Width of a head's values; None: head_dim."
    )
    norm_eps: float | None = Field(
        default=None, gt=0, le=1, description="ε of the latent vectors' norms; None: the model's norm_eps."
    )


class LinearAttentionConfig(Section):
    """Linear attention (attention = linear, retention, gla, gated_delta): a state instead of a growing cache."""

    feature_map: FeatureMapName = Field(
        default="elu1", description="φ of attention = linear; the others leave queries and keys as they are."
    )
    normalise: bool | None = Field(
        default=None,
        description="attention = linear: divide by Σ φ(q)φ(k); None: yes, except for the identity, whose sum may vanish.",
    )
    form: Literal["auto", "parallel", "chunked", "recurrent"] = Field(
        default="auto", description="Which of the equal forms computes it; auto: chunked, one token recurrent."
    )
    chunk: int = Field(default=64, ge=1, le=4096, description="Tokens per chunk of the chunked form.")
    conv_width: int = Field(
        default=4, ge=1, le=64, description="gated_delta: width of the short convolution before q, k, v; 1: none."
    )
    output_gate: bool = Field(
        default=True,
        description="retention, gla, gated_delta: the output is normed per head and gated by SiLU(W x).",
    )


class MoEConfig(Section):
    """Mixture of experts in place of a layer's feed-forward. 0 experts: none."""

    experts: int = Field(default=0, ge=0, le=2**16, description="Routed experts before they are split; 0: dense.")
    top_k: int = Field(default=2, ge=1, le=2**16, description="Experts per token before they are split.")
    fine_grained: int = Field(
        default=1,
        ge=1,
        le=2**10,
        description="m: every expert is split into m of width d_ff / m, and a token goes to m · top_k of them.",
    )
    d_expert: int | None = Field(
        default=None, ge=1, le=2**24, description="Inner width of one expert; None: d_ff / fine_grained."
    )
    shared: int = Field(
        default=0, ge=0, le=2**10, description="Experts (of the split width) every token goes through."
    )
    d_shared: int | None = Field(
        default=None,
        ge=1,
        le=2**24,
        description="Inner width of all shared experts together; None: shared · d_expert.",
    )
    shared_gate: bool = Field(
        default=False, description="The shared experts' output is multiplied by σ(w · x) (Qwen2-MoE)."
    )
    first_dense: int = Field(default=0, ge=0, le=10_000, description="The first layers that stay dense.")
    every: int = Field(default=1, ge=1, le=10_000, description="After those, every n-th layer has experts.")
    router: RouterName = Field(
        default="softmax_topk", description="From scores u · e to the chosen experts' gates."
    )
    router_bias: bool = Field(default=False, description="A learned bias on the scores (gpt-oss).")
    normalise: bool = Field(default=True, description="The chosen gates are divided by their sum.")
    gate_scale: float = Field(default=1.0, gt=0, le=1e6, description="All gates times this.")
    groups: int = Field(
        default=1, ge=1, le=2**10, description="Experts stand in this many groups (DeepSeek: one per machine)."
    )
    top_groups: int | None = Field(
        default=None, ge=1, le=2**10, description="A token's experts come from this many groups; None: from all."
    )
    jitter: float = Field(
        default=0.0, ge=0, lt=1, description="In training the router's input is multiplied by U(1 − j, 1 + j)."
    )
    balance_loss: float = Field(
        default=0.01, ge=0, le=1e3, description="Weight of the load-balancing loss (Switch); 0: none."
    )
    balance_over: Literal["batch", "sequence"] = Field(
        default="batch", description="Whether that loss balances the load of a batch or of each sequence."
    )
    router_z_loss: float = Field(
        default=0.0, ge=0, le=1e3, description="Weight of mean (log Σ exp scores)²; 0: none."
    )
    bias_update: float = Field(
        default=0.0,
        ge=0,
        le=1.0,
        description="γ of balancing without a loss: after each step an expert's bias moves by ±γ against its load; 0: off.",
    )
    capacity_factor: float | None = Field(
        default=None,
        gt=0,
        le=1e6,
        description="In training an expert takes this times its even share of a batch's tokens and drops the rest; None: "
        "nothing is dropped.",
    )
    dispatch: DispatchName = Field(default="auto", description="How tokens reach experts; auto: grouped.")
