"""IBM's Granite 3 mixtures of experts, which stack all experts of a layer in their files."""

from __future__ import annotations

from scratchlm.interop.families.granite import MULTIPLIERS
from scratchlm.interop.families.mixture import LOSSES, counts, widths
from scratchlm.interop.families.shared import (
    AROUND,
    ATTENTION,
    BLOCK,
    DROPOUT,
    GROUPED,
    LAYER,
    PRE_NORMS,
    gated,
    rms_norm,
    tied,
)
from scratchlm.interop.family import Family
from scratchlm.interop.rope_rules import Rope
from scratchlm.interop.rules import Always, Biases
from scratchlm.interop.weights import Map

_MOE = f"{LAYER}.block_sparse_moe"

FAMILIES = (
    Family(
        model_type="granitemoe",
        architecture="GraniteMoeForCausalLM",
        title="Granite 3 1B A400M, 3B A800M, PowerMoE 3B",
        config=(
            *widths(2048),
            *GROUPED,
            *counts(8, 2, 11_008, key="num_local_experts", width="intermediate_size"),
            Always(moe__router="topk_softmax"),
            LOSSES,
            *rms_norm(),
            gated(),
            Rope(),
            MULTIPLIERS,
            Biases("attention_bias"),
            tied(False),
            DROPOUT,
        ),
        weights=(
            *AROUND,
            *ATTENTION,
            *PRE_NORMS,
            Map(f"{_MOE}.router.layer", f"{BLOCK}.feedforward.router.score"),
            Map(f"{_MOE}.input_linear", f"{BLOCK}.feedforward.up", stacked=True),
            Map(f"{_MOE}.output_linear", f"{BLOCK}.feedforward.down", stacked=True),
        ),
    ),
)
