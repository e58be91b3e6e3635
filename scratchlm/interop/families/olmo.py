"""OLMo 1 (norms without parameters), OLMo 2 (norms after the branches, normed queries and keys) and OLMo 3 (with windows)."""

from __future__ import annotations

from scratchlm.interop.families.shared import (
    AROUND,
    ATTENTION,
    DROPOUT,
    GATED_MLP,
    GROUPED,
    QK_NORMS,
    REORDERED_NORMS,
    WIDTHS,
    gated,
    rms_norm,
    tied,
)
from scratchlm.interop.family import Family
from scratchlm.interop.rope_rules import LayerTypes, Rope, RopeByKind
from scratchlm.interop.rules import Always, Biases, Key

_OLMO = (*WIDTHS, *GROUPED, gated(), Biases("attention_bias"), tied(False), DROPOUT)
_REORDERED = (*rms_norm(1e-5), Always(norm_placement="reordered", qk_norm="full"))
_REORDERED_WEIGHTS = (*AROUND, *ATTENTION, *GATED_MLP, *REORDERED_NORMS, *QK_NORMS)
_EVERY_FOURTH = LayerTypes(("sliding_attention",) * 3 + ("full_attention",))

FAMILIES = (
    Family(
        model_type="olmo",
        architecture="OlmoForCausalLM",
        title="OLMo 1",
        config=(
            *_OLMO,
            Always(norm="layernorm_noparams", norm_eps=1e-5),
            Key("clip_qkv", "qkv_clip", default=None),
            Rope(),
        ),
        weights=(*AROUND, *ATTENTION, *GATED_MLP),
    ),
    Family(
        model_type="olmo2",
        architecture="Olmo2ForCausalLM",
        title="OLMo 2",
        config=(*_OLMO, *_REORDERED, Rope()),
        weights=_REORDERED_WEIGHTS,
    ),
    Family(
        model_type="olmo3",
        architecture="Olmo3ForCausalLM",
        title="OLMo 3",
        config=(*_OLMO, *_REORDERED, _EVERY_FOURTH, RopeByKind(_EVERY_FOURTH, theta=500_000.0)),
        weights=_REORDERED_WEIGHTS,
    ),
)
