"""Llama 1 to 3.3, and the many models that took its format."""

from __future__ import annotations

from scratchlm.interop.families.shared import (
    DROPOUT,
    GROUPED,
    HEADS_DIVIDE,
    LLAMA_WEIGHTS,
    WIDTHS,
    gated,
    rms_norm,
    tied,
)
from scratchlm.interop.family import Family
from scratchlm.interop.rope_rules import Rope
from scratchlm.interop.rules import Biases, Key

FAMILIES = (
    Family(
        model_type="llama",
        architecture="LlamaForCausalLM",
        title="Llama 1 to 3.3",
        config=(
            *WIDTHS,
            *GROUPED,
            HEADS_DIVIDE,
            *rms_norm(),
            gated(),
            Rope(),
            Biases("attention_bias"),
            Key("mlp_bias", "feedforward_bias", default=False),
            tied(False),
            DROPOUT,
        ),
        weights=LLAMA_WEIGHTS,
    ),
)
