"""Qwen's mixtures of experts: 1.5 and 2 (a shared expert behind a gate), 3 (none, normed queries and keys)."""

from __future__ import annotations

from typing import Any

from scratchlm.interop.families.mixture import (
    LOSSES,
    counts,
    dense_layers,
    layers_with_experts,
    shared_of_width,
    shared_weights,
)
from scratchlm.interop.families.shared import (
    BLOCK,
    DROPOUT,
    EXPERTS,
    LAYER,
    LLAMA_WEIGHTS,
    QK_NORMS,
    WIDTHS,
    gated,
    grouped,
    rms_norm,
    tied,
)
from scratchlm.interop.family import Family
from scratchlm.interop.rope_rules import Rope, masks_of, read_layer_types, read_window, write_layer_types
from scratchlm.interop.rules import Always, Biases, Custom, Inexpressible, Key, Reading, Values, per_layer
from scratchlm.interop.weights import Map
from scratchlm.model.config import ModelConfig


def _read_layers(config: Reading) -> Values:
    """Every ``decoder_sparse_step``-th layer has experts, but those of ``mlp_only_layers``."""
    step, dense = config.whole("decoder_sparse_step", default=1), config.get("mlp_only_layers", default=[])
    if step < 1:
        raise config.wrong("decoder_sparse_step", step, "a number from 1 on is needed")
    if not isinstance(dense, list) or any(type(layer) is not int for layer in dense):
        raise config.wrong("mlp_only_layers", dense, "a list of numbers of layers is needed")
    dense, layers = set(dense), config.whole("num_hidden_layers")
    having = [layer for layer in range(step - 1, layers, step) if layer not in dense]
    return layers_with_experts(config, "mlp_only_layers", having)


def _write_layers(model: ModelConfig) -> Values:
    if model.moe.first_dense:
        return {"decoder_sparse_step": 1, "mlp_only_layers": dense_layers(model)}
    return {"decoder_sparse_step": model.moe.every, "mlp_only_layers": []}


def _read_windows_2(config: Reading) -> Values:
    """Absent ``layer_types``: with ``use_sliding_window`` every other layer below ``max_window_layers`` has it."""
    layers = config.whole("num_hidden_layers")
    window = read_window(config, 4096)
    below = config.whole("max_window_layers", default=28)
    if not config.flag("use_sliding_window", default=False):
        window = None
    absent = [
        "full_attention" if window is None or layer % 2 or layer >= below else "sliding_attention"
        for layer in range(layers)
    ]
    return masks_of(config, read_layer_types(config, absent, layers), window)


def _write_windows_2(model: ModelConfig) -> Values:
    types = write_layer_types(model)
    some = "sliding_attention" in types
    return {"use_sliding_window": some, "sliding_window": model.window if some else None, "layer_types": types}


def _read_window_3(config: Reading) -> Values:
    """One window for all layers; earlier versions began at layer ``max_window_layers``, so only 0 means one thing."""
    window, first = read_window(config, 4096), config.whole("max_window_layers", default=0)
    if not config.flag("use_sliding_window", default=False) or window is None:
        return {}
    if first:
        raise config.wrong(
            "max_window_layers", first, "with use_sliding_window only 0 is, the same window in all layers"
        )
    return {"mask": ("sliding_window",), "window": window}


def _write_window_3(model: ModelConfig) -> Values:
    kinds = set(per_layer(model, "mask"))
    if kinds - {"causal"} and kinds != {"sliding_window"}:
        raise Inexpressible("mask")
    some = kinds == {"sliding_window"}
    return {"use_sliding_window": some, "sliding_window": model.window if some else None, "max_window_layers": 0}


_BOTH: tuple[Any, ...] = (
    *WIDTHS,
    Key("max_position_embeddings", "context_length", default=32_768),
    Custom(("moe.first_dense", "moe.every"), _read_layers, _write_layers),
    Key("norm_topk_prob", "moe.normalise", default=False),
    Always(moe__router="softmax_topk"),
    *rms_norm(),
    gated(),
    Rope(),
    LOSSES,
    tied(False),
    DROPOUT,
)

FAMILIES = (
    Family(
        model_type="qwen2_moe",
        architecture="Qwen2MoeForCausalLM",
        title="Qwen 1.5 MoE A2.7B, Qwen 2 57B A14B",
        config=(
            *_BOTH,
            *grouped(kv_heads=16),
            *counts(60, 4, 1408),
            shared_of_width("shared_expert_intermediate_size", 5632),
            Always(moe__shared_gate=True),
            Custom(("mask", "window"), _read_windows_2, _write_windows_2),
            Biases("qkv_bias", projections="qkv", default=True),
        ),
        weights=(
            *LLAMA_WEIGHTS,
            *EXPERTS,
            *shared_weights("mlp.shared_expert"),
            Map(f"{LAYER}.mlp.shared_expert_gate", f"{BLOCK}.feedforward.shared_gate"),
        ),
    ),
    Family(
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        title="Qwen 3 30B A3B, 235B A22B, and their Coders",
        config=(
            *_BOTH,
            *grouped(kv_heads=4),
            *counts(128, 8, 768),
            Custom(("mask", "window"), _read_window_3, _write_window_3),
            Biases("attention_bias"),
            Always(qk_norm="head"),
        ),
        weights=(*LLAMA_WEIGHTS, *QK_NORMS, *EXPERTS),
    ),
)
