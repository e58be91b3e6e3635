"""OLMoE (64 small experts, clipped queries and keys) and FlexOlmo (several owners' experts, norms after branches)."""

from __future__ import annotations

from scratchlm.interop.families.mixture import LOSSES, counts, widths
from scratchlm.interop.families.shared import (
    AROUND,
    ATTENTION,
    DROPOUT,
    EXPERTS,
    PRE_NORMS,
    QK_NORMS,
    REORDERED_NORMS,
    gated,
    head_width,
    rms_norm,
    tied,
)
from scratchlm.interop.family import Family
from scratchlm.interop.rope_rules import Rope
from scratchlm.interop.rules import Always, Biases, Custom, Inexpressible, Key, Reading, Values
from scratchlm.model.config import ModelConfig


def _read_width(config: Reading) -> Values:
    width, heads = config.whole("hidden_size"), config.whole("num_attention_heads")
    if (given := config.whole("head_dim", default=head_width)) * heads != width:
        raise config.wrong("head_dim", given, "the norm of all queries is as wide as the model")
    return {"head_dim": given}


def _write_width(model: ModelConfig) -> Values:
    if model.heads * model.resolved_head_dim != model.d_model:
        raise Inexpressible("head_dim")
    return {}


_BOTH = (
    *widths(4096),
    Key("num_key_value_heads", "kv_heads", default=lambda config: config.get("num_attention_heads")),
    Key("norm_topk_prob", "moe.normalise", default=False),
    Always(moe__router="softmax_topk", qk_norm="full"),
    gated(),
    Biases("attention_bias"),
    LOSSES,
    tied(False),
    DROPOUT,
)

FAMILIES = (
    Family(
        model_type="olmoe",
        architecture="OlmoeForCausalLM",
        title="OLMoE 1B-7B",
        config=(
            *_BOTH,
            Custom(("head_dim",), _read_width, _write_width),
            *counts(64, 8, 2048, width="intermediate_size"),
            *rms_norm(1e-5),
            Rope(),
            Key("clip_qkv", "qkv_clip", default=None),
        ),
        weights=(*AROUND, *ATTENTION, *QK_NORMS, *EXPERTS, *PRE_NORMS),
    ),
    Family(
        model_type="flex_olmo",
        architecture="FlexOlmoForCausalLM",
        title="FlexOlmo 7x7B",
        config=(
            *_BOTH,
            Key("head_dim", "head_dim", default=head_width),
            *counts(7, 5, 11_008, width="intermediate_size"),
            *rms_norm(1e-6),
            Always(norm_placement="reordered"),
            Rope(theta=500_000.0),
        ),
        weights=(*AROUND, *ATTENTION, *QK_NORMS, *EXPERTS, *REORDERED_NORMS),
        written={"pad_token_id": None},  # the class has one that small vocabularies do not reach
    ),
)
