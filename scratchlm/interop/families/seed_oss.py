"""ByteDance's Seed-OSS: Llama with biases on q, k, v that are switched apart from that of the output."""

from __future__ import annotations

from scratchlm.interop.families.shared import LLAMA_WEIGHTS, WIDTHS, gated, grouped, rms_norm, tied
from scratchlm.interop.family import Family
from scratchlm.interop.rope_rules import Rope
from scratchlm.interop.rules import Custom, Inexpressible, Key, Reading, Values
from scratchlm.model.config import ModelConfig


def _read_biases(config: Reading) -> Values:
    into = ("q", "k", "v") if config.flag("attention_bias", default=True) else ()
    out = ("o",) if config.flag("attention_out_bias", default=False) else ()
    return {"attention_bias": into + out}


def _write_biases(model: ModelConfig) -> Values:
    into = set(model.attention_bias) - {"o"}
    if into not in (set(), {"q", "k", "v"}):
        raise Inexpressible("attention_bias")
    return {"attention_bias": bool(into), "attention_out_bias": "o" in model.attention_bias}


FAMILIES = (
    Family(
        model_type="seed_oss",
        architecture="SeedOssForCausalLM",
        title="Seed-OSS",
        config=(
            *WIDTHS,
            Key("max_position_embeddings", "context_length", default=524_288),
            *grouped(kv_heads=8, head_dim=128),
            *rms_norm(),
            gated(),
            Rope(),
            Custom(("attention_bias",), _read_biases, _write_biases),
            Key("mlp_bias", "feedforward_bias", default=False),
            tied(False),
            Key("attention_dropout", "attention_dropout", default=0.1),
            Key("residual_dropout", "residual_dropout", default=0.1),
        ),
        weights=LLAMA_WEIGHTS,
    ),
)
