"""gpt-oss: sinks, biases everywhere, a clamped SwiGLU, windows in every other layer.

Its files stack all experts of a layer, inputs first, gate and up in turns: (experts, d_model, gate up gate up …).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from scratchlm.interop.families.mixture import LOSSES, counts, widths
from scratchlm.interop.families.shared import (
    AROUND,
    ATTENTION,
    BLOCK,
    DROPOUT,
    LAYER,
    PRE_NORMS,
    grouped,
    rms_norm,
    tied,
)
from scratchlm.interop.family import Family
from scratchlm.interop.rope_rules import LayerTypes, Rope, one_rope
from scratchlm.interop.rules import Always, Biases, Harmless, Only, Reading, Values
from scratchlm.interop.weights import Map
from scratchlm.model.config import ModelConfig

_SCALING = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
_STACKED: dict[str, Any] = {"transposed": True, "stacked": True, "suffixes": {"weight": "", "bias": "_bias"}}


@dataclass(frozen=True)
class _GptOssRope(Rope):
    """Files that say nothing of scaling mean that of the release; so none is written as such."""

    def read(self, config: Reading) -> Values:
        if one_rope(config):
            return super().read(config)
        scaled = Reading({**config.values, "rope_scaling": _SCALING}, config.where, config.family)
        fields = super().read(scaled)
        config.asked |= scaled.asked
        return fields

    def write(self, model: ModelConfig) -> Values:
        return {"rope_scaling": {"rope_type": "default"}, **super().write(model)}


FAMILIES = (
    Family(
        model_type="gpt_oss",
        architecture="GptOssForCausalLM",
        title="gpt-oss 20B, 120B",
        quantised=("mxfp4",),
        config=(
            *widths(131_072),
            *grouped(kv_heads=8, head_dim=64),
            *counts(128, 4, 2880, key="num_local_experts", width="intermediate_size"),
            Always(feedforward="swiglu_clamped", feedforward_bias=True, attention_sinks=True),
            Always(moe__router="topk_softmax", moe__router_bias=True),
            Only("hidden_act", "silu"),
            Only("swiglu_alpha", 1.702),
            Only("swiglu_limit", 7.0),
            *rms_norm(1e-5),
            _GptOssRope(theta=150_000.0),
            LayerTypes(("sliding_attention", "full_attention"), window=128),
            Biases("attention_bias", default=True),
            LOSSES,
            Harmless("experts_per_token", "initial_context_length"),  # said again under other names
            tied(False),
            DROPOUT,
        ),
        weights=(
            *AROUND,
            *ATTENTION,
            Map(f"{LAYER}.self_attn.sinks", f"{BLOCK}.attention.sinks"),
            *PRE_NORMS,
            Map(f"{LAYER}.mlp.router", f"{BLOCK}.feedforward.router.score"),
            Map(
                f"{LAYER}.mlp.experts.gate_up_proj",
                f"{BLOCK}.feedforward.up",
                grouped="moe.d_expert",
                **_STACKED,
            ),
            Map(f"{LAYER}.mlp.experts.down_proj", f"{BLOCK}.feedforward.down", **_STACKED),
        ),
    ),
)
