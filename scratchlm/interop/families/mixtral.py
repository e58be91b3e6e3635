"""Mixtral, and those that took its names of experts."""

from __future__ import annotations

from scratchlm.interop.families.mixture import BLOCK_SPARSE, LOSSES, counts, widths
from scratchlm.interop.families.shared import AROUND, ATTENTION, DROPOUT, PRE_NORMS, gated, grouped, rms_norm, tied
from scratchlm.interop.family import Family
from scratchlm.interop.rope_rules import Rope, Window
from scratchlm.interop.rules import Always

FAMILIES = (
    Family(
        model_type="mixtral",
        architecture="MixtralForCausalLM",
        title="Mixtral 8x7B, 8x22B",
        config=(
            *widths(131_072),
            *grouped(kv_heads=8),
            *counts(8, 2, key="num_local_experts", width="intermediate_size"),
            *rms_norm(1e-5),
            gated(),
            Rope(theta=1e6),
            Window(),
            Always(moe__router="softmax_topk", moe__normalise=True),
            LOSSES,
            tied(False),
            DROPOUT,
        ),
        weights=(*AROUND, *ATTENTION, *BLOCK_SPARSE, *PRE_NORMS),
    ),
)
