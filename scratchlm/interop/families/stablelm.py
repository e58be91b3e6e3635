"""StableLM 3B to 2: Llama with LayerNorm, partial RoPE, and in the 12B both branches behind one norm."""

from __future__ import annotations

from scratchlm.interop.families.gpt import layer_norm
from scratchlm.interop.families.shared import (
    BLOCK,
    DROPOUT,
    LAYER,
    LLAMA_WEIGHTS,
    WIDTHS,
    gated,
    tied,
)
from scratchlm.interop.family import Family
from scratchlm.interop.rope_rules import Rope
from scratchlm.interop.rules import Always, Biases, Choice, Key
from scratchlm.interop.weights import Map

FAMILIES = (
    Family(
        model_type="stablelm",
        architecture="StableLmForCausalLM",
        title="StableLM 3B to 2",
        config=(
            *WIDTHS,
            Key("num_key_value_heads", "kv_heads", default=32),
            *layer_norm("layer_norm_eps"),
            gated(),
            Rope(fraction="partial_rotary_factor", fraction_default=0.25),
            Choice("use_parallel_residual", "block", {False: "serial", True: "parallel_shared"}, default=False),
            Choice("qk_layernorm", "qk_norm", {False: "none", True: "each"}, default=False),
            Always(qk_norm_kind="layernorm_nobias"),
            Biases("use_qkv_bias", projections="qkv"),
            DROPOUT,
            Key("hidden_dropout", "residual_dropout", default=0.0),
            tied(False),
        ),
        weights=(
            *LLAMA_WEIGHTS,
            Map(f"{LAYER}.self_attn.q_layernorm.norms.{{index}}", f"{BLOCK}.attention.q_norm.norm"),
            Map(f"{LAYER}.self_attn.k_layernorm.norms.{{index}}", f"{BLOCK}.attention.k_norm.norm"),
        ),
    ),
)
