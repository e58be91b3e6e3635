"""Cohere's Command R and Aya (parallel blocks, interleaved pairs), and Command R7B and A (with windows, and NoPE without)."""

from __future__ import annotations

from scratchlm.interop.families.shared import (
    AROUND,
    ATTENTION,
    BLOCK,
    DROPOUT,
    GATED_MLP,
    GROUPED,
    LAYER,
    QK_NORMS,
    WIDTHS,
    gated,
    tied,
)
from scratchlm.interop.family import Family
from scratchlm.interop.rope_rules import LayerTypes, Rope
from scratchlm.interop.rules import (
    Always,
    Biases,
    Choice,
    Custom,
    Harmless,
    Inexpressible,
    Key,
    Only,
    Reading,
    Values,
    per_layer,
)
from scratchlm.interop.weights import Map
from scratchlm.model.config import ModelConfig

_COHERE = (
    *WIDTHS,
    Key("max_position_embeddings", "context_length", default=8192),
    *GROUPED,
    Always(norm="layernorm_nobias", block="parallel_shared"),
    Key("layer_norm_eps", "norm_eps", default=1e-5),
    Key("logit_scale", "logit_scale", default=0.0625),
    gated(),
    Biases("attention_bias"),
    tied(True),
    DROPOUT,
    Harmless("cache_implementation", "use_parallel_embedding"),
)
_WEIGHTS = (*AROUND, *ATTENTION, *GATED_MLP, Map(f"{LAYER}.input_layernorm", f"{BLOCK}.attention_norm"))
_EVERY_FOURTH = LayerTypes(pattern_key="sliding_window_pattern", pattern_default=4)


def _read_positions(config: Reading) -> Values:
    """RoPE where there is a window, no position elsewhere."""
    masks = _EVERY_FOURTH.read(config)["mask"]
    return {"position": tuple("rope" if mask == "sliding_window" else "none" for mask in masks)}


def _write_positions(model: ModelConfig) -> Values:
    pairs = zip(per_layer(model, "mask"), per_layer(model, "position"), strict=True)
    if any((mask == "sliding_window") != (position == "rope") for mask, position in pairs):
        raise Inexpressible("position")
    return {}


FAMILIES = (
    Family(
        model_type="cohere",
        architecture="CohereForCausalLM",
        title="Command R and R+, Aya",
        config=(
            *_COHERE,
            Rope(theta=500_000.0, pairs="interleaved"),
            Choice("use_qk_norm", "qk_norm", {True: "each", False: "none"}, default=False),
        ),
        weights=(*_WEIGHTS, *QK_NORMS),
    ),
    Family(
        model_type="cohere2",
        architecture="Cohere2ForCausalLM",
        title="Command R7B, Command A",
        config=(
            *_COHERE,
            Rope(pairs="interleaved"),
            _EVERY_FOURTH,
            Custom(("position",), _read_positions, _write_positions),
            # the first files repeat in words of their own what the class does
            Only("layer_switch", 4, written=False),
            Only("order_of_interleaved_layers", "local_attn_first", written=False),
            Only("position_embedding_type", "rope_gptj", written=False),
            Only("rotary_pct", 1.0, written=False),
            Only("use_embedding_sharing", True, written=False),
            Only("use_gated_activation", True, written=False),
            Only("use_parallel_block", True, written=False),
            Only("use_qk_norm", False, written=False),
        ),
        weights=_WEIGHTS,
    ),
)
