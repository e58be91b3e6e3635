"""GLM-4 9B (half of each head rotated, in interleaved pairs) and GLM-4-0414 (norms on both sides of the branches)."""

from __future__ import annotations

from scratchlm.interop.families.shared import (
    AROUND,
    ATTENTION,
    BLOCK,
    DROPOUT,
    FUSED_MLP,
    LAYER,
    PRE_NORMS,
    WIDTHS,
    gated,
    grouped,
    rms_norm,
    tied,
)
from scratchlm.interop.family import Family
from scratchlm.interop.rope_rules import Rope
from scratchlm.interop.rules import Always, Biases, Key
from scratchlm.interop.weights import Map

_GLM = (
    *WIDTHS,
    Key("max_position_embeddings", "context_length", default=131_072),
    *grouped(kv_heads=2, head_dim=128),
    *rms_norm(1.5625e-7),
    gated(),
    Rope(fraction="partial_rotary_factor", fraction_default=0.5, pairs="interleaved"),
    Biases("attention_bias", "qkv", default=True),
    tied(False),
    DROPOUT,
)
_WEIGHTS = (*AROUND, *ATTENTION, *FUSED_MLP, *PRE_NORMS)

FAMILIES = (
    Family(
        model_type="glm",
        architecture="GlmForCausalLM",
        title="GLM-4 9B, GLM-Edge",
        written={"pad_token_id": None},  # the class has one that small vocabularies do not reach
        config=_GLM,
        weights=_WEIGHTS,
    ),
    Family(
        model_type="glm4",
        architecture="Glm4ForCausalLM",
        title="GLM-4-0414, GLM-Z1",
        written={"pad_token_id": None},  # the class has one that small vocabularies do not reach
        config=(*_GLM, Always(norm_placement="double")),
        weights=(
            *_WEIGHTS,
            Map(f"{LAYER}.post_self_attn_layernorm", f"{BLOCK}.attention_post_norm"),
            Map(f"{LAYER}.post_mlp_layernorm", f"{BLOCK}.feedforward_post_norm"),
        ),
    ),
)
