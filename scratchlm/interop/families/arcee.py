"""Arcee's AFM: Llama with a plain feed-forward of squared ReLU."""

from __future__ import annotations

from scratchlm.interop.families.shared import (
    AROUND,
    ATTENTION,
    BLOCK,
    DROPOUT,
    GROUPED,
    HEADS_DIVIDE,
    LAYER,
    PRE_NORMS,
    WIDTHS,
    plain,
    rms_norm,
    tied,
)
from scratchlm.interop.family import Family
from scratchlm.interop.rope_rules import Rope
from scratchlm.interop.rules import Biases, Key
from scratchlm.interop.weights import Map

FAMILIES = (
    Family(
        model_type="arcee",
        architecture="ArceeForCausalLM",
        title="Arcee AFM",
        config=(
            *WIDTHS,
            *GROUPED,
            HEADS_DIVIDE,
            *rms_norm(1e-5),
            plain(default="relu2"),
            Rope(),
            Biases("attention_bias"),
            Key("mlp_bias", "feedforward_bias", default=False),
            tied(False),
            DROPOUT,
        ),
        weights=(
            *AROUND,
            *ATTENTION,
            *PRE_NORMS,
            Map(f"{LAYER}.mlp.up_proj", f"{BLOCK}.feedforward.up"),
            Map(f"{LAYER}.mlp.down_proj", f"{BLOCK}.feedforward.down"),
        ),
    ),
)
