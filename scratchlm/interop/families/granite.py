"""IBM's Granite 3: Llama with four multipliers (embeddings, scores, branches, logits)."""

from __future__ import annotations

import math

from scratchlm.interop.families.shared import DROPOUT, GROUPED, LLAMA_WEIGHTS, WIDTHS, gated, rms_norm, tied
from scratchlm.interop.family import Family
from scratchlm.interop.rope_rules import Rope
from scratchlm.interop.rules import Biases, Custom, Inexpressible, Key, Reading, Values
from scratchlm.model.config import ModelConfig


def _read_multipliers(config: Reading) -> Values:
    divisor = config.number("logits_scaling", default=1.0)
    if divisor <= 0:
        raise config.wrong("logits_scaling", divisor, "a positive number is needed")
    residual = config.number("residual_multiplier", default=1.0)
    return {
        "embedding_scale": float(config.number("embedding_multiplier", default=1.0)),
        "attention_scale": float(config.number("attention_multiplier", default=1.0)),
        "logit_scale": 1 / divisor,
        **({"residual": "plain"} if residual == 1 else {"residual": "fixed", "residual_init": float(residual)}),
    }


def inverse(scale: float) -> float:
    """The roundest number whose inverse is `scale` to the last bit, or nearly so."""
    short = float(f"{1 / scale:.14g}")
    return short if 1 / short == scale else 1 / scale


def _write_multipliers(model: ModelConfig) -> Values:
    if model.residual not in ("plain", "fixed"):
        raise Inexpressible("residual")
    scale = model.embedding_scale
    return {
        "embedding_multiplier": math.sqrt(model.d_model) if scale == "sqrt_d_model" else scale,
        "attention_multiplier": model.attention_scale or model.resolved_head_dim**-0.5,
        "logits_scaling": inverse(model.logit_scale),
        "residual_multiplier": model.residual_init if model.residual == "fixed" else 1.0,
    }


MULTIPLIERS = Custom(
    ("embedding_scale", "attention_scale", "logit_scale", "residual"), _read_multipliers, _write_multipliers
)

FAMILIES = (
    Family(
        model_type="granite",
        architecture="GraniteForCausalLM",
        title="Granite 3",
        config=(
            *WIDTHS,
            *GROUPED,
            *rms_norm(),
            gated(),
            Rope(),
            MULTIPLIERS,
            Biases("attention_bias"),
            Key("mlp_bias", "feedforward_bias", default=False),
            tied(False),
            DROPOUT,
        ),
        weights=LLAMA_WEIGHTS,
    ),
)
