"""Gemma 1, 2 and 3 (its text model alone): unit-offset norms, scaled embeddings, from 2 on norms on both sides."""

from __future__ import annotations

from scratchlm.interop.families.shared import (
    AROUND,
    ATTENTION,
    BLOCK,
    DROPOUT,
    GATED_ACTIVATIONS,
    GATED_MLP,
    HEADS_DIVIDE,
    LAYER,
    LLAMA_WEIGHTS,
    QK_NORMS,
    WIDTHS,
    gated,
    grouped,
    tied,
)
from scratchlm.interop.family import Family
from scratchlm.interop.rope_rules import LayerTypes, Rope, RopeByKind, unless_null
from scratchlm.interop.rules import (
    Always,
    Biases,
    Custom,
    Harmless,
    Inexpressible,
    Key,
    Only,
    Reading,
    Rule,
    Values,
)
from scratchlm.interop.weights import Map
from scratchlm.model.config import ModelConfig

_NAMES = {**GATED_ACTIVATIONS, "gelu": "geglu_tanh"}


def _read_activation(config: Reading) -> Values:
    """Gemma 1's first files say ``gelu`` and mean the approximation by tanh; a later key says it again."""
    said = [config.get("hidden_act", default="gelu_pytorch_tanh"), config.get("hidden_activation", default=None)]
    for key, value in zip(("hidden_act", "hidden_activation"), said, strict=True):
        if value is not None and (not isinstance(value, str) or value not in _NAMES):
            raise config.wrong(key, value, f"known are {', '.join(_NAMES)}")
    if said[1] is not None and _NAMES[said[0]] != _NAMES[said[1]]:
        raise config.wrong("hidden_activation", said[1], f"hidden_act = {said[0]!r} says otherwise")
    return {"feedforward": _NAMES[said[0]]}


def _write_activation(model: ModelConfig) -> Values:
    for theirs, ours in GATED_ACTIVATIONS.items():
        if ours == model.feedforward and theirs != "gelu":
            return {"hidden_act": theirs, "hidden_activation": theirs}
    raise Inexpressible("feedforward")


def _read_scale(config: Reading) -> Values:
    width = config.number("query_pre_attn_scalar", default=256)
    if width <= 0:
        raise config.wrong("query_pre_attn_scalar", width, "a positive number is needed")
    return {"attention_scale": width**-0.5}


def _write_scale(model: ModelConfig) -> Values:
    scale = model.attention_scale or model.resolved_head_dim**-0.5
    if round(scale**-2) < 1 or abs(round(scale**-2) ** -0.5 / scale - 1) > 1e-12:
        raise Inexpressible("attention_scale")  # the class takes whole numbers only
    return {"query_pre_attn_scalar": round(scale**-2)}


SCALE = Custom(("attention_scale",), _read_scale, _write_scale)


def _gemma(kv_heads: int, context: int) -> tuple[Rule, ...]:
    """What the generations share."""
    return (
        *WIDTHS,
        Key("max_position_embeddings", "context_length", default=context),
        *grouped(kv_heads=kv_heads, head_dim=256),
        Always(norm="rmsnorm_unit_offset", embedding_scale="sqrt_d_model"),
        Key("rms_norm_eps", "norm_eps", default=1e-6),
        Biases("attention_bias"),
        tied(True),
        DROPOUT,
        Only("use_bidirectional_attention", False, written=False),
        Harmless("cache_implementation"),
    )


_SANDWICH = (
    gated("hidden_activation", "gelu_pytorch_tanh"),
    Harmless("hidden_act", "sliding_window_size"),  # in files, and not read
    Always(norm_placement="double"),
    SCALE,
    HEADS_DIVIDE,
)
_SANDWICH_WEIGHTS = (
    *AROUND,
    *ATTENTION,
    *GATED_MLP,
    Map(f"{LAYER}.input_layernorm", f"{BLOCK}.attention_norm"),
    Map(f"{LAYER}.post_attention_layernorm", f"{BLOCK}.attention_post_norm"),
    Map(f"{LAYER}.pre_feedforward_layernorm", f"{BLOCK}.feedforward_norm"),
    Map(f"{LAYER}.post_feedforward_layernorm", f"{BLOCK}.feedforward_post_norm"),
)
_EVERY_SIXTH = LayerTypes(pattern_key="sliding_window_pattern", pattern_default=6)

FAMILIES = (
    Family(
        model_type="gemma",
        architecture="GemmaForCausalLM",
        title="Gemma 1, CodeGemma",
        config=(
            *_gemma(kv_heads=16, context=8192),
            Custom(("feedforward",), _read_activation, _write_activation),
            Rope(),
        ),
        weights=LLAMA_WEIGHTS,
    ),
    Family(
        model_type="gemma2",
        architecture="Gemma2ForCausalLM",
        title="Gemma 2",
        config=(
            *_gemma(kv_heads=4, context=8192),
            *_SANDWICH,
            Rope(),
            LayerTypes(("sliding_attention", "full_attention")),
            Key("attn_logit_softcapping", "attention_soft_cap", unless_null("attn_logit_softcapping", 50.0)),
            Key("final_logit_softcapping", "logit_soft_cap", unless_null("final_logit_softcapping", 30.0)),
        ),
        weights=_SANDWICH_WEIGHTS,
    ),
    Family(
        model_type="gemma3_text",
        architecture="Gemma3ForCausalLM",
        title="Gemma 3 (text)",
        config=(
            *_gemma(kv_heads=4, context=131_072),
            *_SANDWICH,
            _EVERY_SIXTH,
            RopeByKind(_EVERY_SIXTH, theta=1_000_000.0, local_theta=10_000.0, local_key="rope_local_base_freq"),
            Always(qk_norm="head"),
            Only("attn_logit_softcapping", None),  # the class has it, and no layer reads it
            Key("final_logit_softcapping", "logit_soft_cap", default=None),
        ),
        weights=(*_SANDWICH_WEIGHTS, *QK_NORMS),
    ),
)
