"""Phi-1 to Phi-2: both branches behind one norm, partial RoPE, a bias everywhere."""

from __future__ import annotations

from scratchlm.interop.families.gpt import BIASED, layer_norm
from scratchlm.interop.families.shared import ATTENTION, BLOCK, DROPOUT, LAYER, WIDTHS, plain, tied
from scratchlm.interop.family import Family
from scratchlm.interop.rope_rules import Rope
from scratchlm.interop.rules import Always, Choice, Key
from scratchlm.interop.weights import Map

FAMILIES = (
    Family(
        model_type="phi",
        architecture="PhiForCausalLM",
        title="Phi-1 to Phi-2",
        config=(
            *WIDTHS,
            Key("num_key_value_heads", "kv_heads", default=lambda config: config.get("num_attention_heads")),
            *layer_norm("layer_norm_eps"),
            plain(),
            Rope(fraction="partial_rotary_factor", fraction_default=0.5),
            Choice("qk_layernorm", "qk_norm", {False: "none", True: "head"}, default=False),
            Always(block="parallel_shared", head_bias=True),
            BIASED,
            DROPOUT,
            Key("embd_pdrop", "embedding_dropout", default=0.0),
            Key("resid_pdrop", "residual_dropout", default=0.0),
            tied(False),
        ),
        weights=(
            Map("model.embed_tokens", "embedding"),
            Map("model.final_layernorm", "norm"),
            Map("lm_head", "head"),
            Map(f"{LAYER}.input_layernorm", f"{BLOCK}.attention_norm"),
            *ATTENTION[:3],
            Map(f"{LAYER}.self_attn.dense", f"{BLOCK}.attention.output"),
            Map(f"{LAYER}.self_attn.q_layernorm", f"{BLOCK}.attention.q_norm.norm"),
            Map(f"{LAYER}.self_attn.k_layernorm", f"{BLOCK}.attention.k_norm.norm"),
            Map(f"{LAYER}.mlp.fc1", f"{BLOCK}.feedforward.up"),
            Map(f"{LAYER}.mlp.fc2", f"{BLOCK}.feedforward.down"),
        ),
    ),
)
