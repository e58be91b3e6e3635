"""Phi-3 and Phi-4 of Microsoft, where they do not use LongRoPE: q, k and v in one matrix, gate and up in another."""

from __future__ import annotations

from scratchlm.interop.families.shared import (
    AROUND,
    BLOCK,
    DROPOUT,
    FUSED_MLP,
    GROUPED,
    LAYER,
    PRE_NORMS,
    WIDTHS,
    gated,
    rms_norm,
    tied,
)
from scratchlm.interop.family import Family
from scratchlm.interop.rope_rules import Rope, Window
from scratchlm.interop.rules import Harmless, Key, Only
from scratchlm.interop.weights import Map

FAMILIES = (
    Family(
        model_type="phi3",
        architecture="Phi3ForCausalLM",
        title="Phi-3 mini and medium (4k), Phi-4",
        written={"pad_token_id": None},  # the class has one that small vocabularies do not reach
        config=(
            *WIDTHS,
            Key("max_position_embeddings", "context_length", default=4096),
            *GROUPED,
            *rms_norm(1e-5),
            gated(),
            Rope(fraction="partial_rotary_factor", kinds=()),
            Window(),
            tied(False),
            DROPOUT,
            Key("resid_pdrop", "residual_dropout", default=0.0),
            Key("embd_pdrop", "embedding_dropout", default=0.0),
            Only("attention_bias", False, written=False),
            Harmless("original_max_position_embeddings"),  # LongRoPE's
        ),
        weights=(
            *AROUND,
            Map(f"{LAYER}.self_attn.qkv_proj", f"{BLOCK}.attention.qkv"),
            Map(f"{LAYER}.self_attn.o_proj", f"{BLOCK}.attention.output"),
            *FUSED_MLP,
            *PRE_NORMS,
        ),
    ),
)
