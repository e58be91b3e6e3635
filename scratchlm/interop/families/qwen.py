"""Qwen 1.5 to 2.5 (biases on q, k, v) and Qwen 3 (normed queries and keys), without their mixtures of experts."""

from __future__ import annotations

from scratchlm.interop.families.shared import (
    DROPOUT,
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
from scratchlm.interop.rules import Always, Biases, Custom, Key, Only, Reading, Values
from scratchlm.model.config import ModelConfig


def _read_windows(config: Reading) -> Values:
    """``use_sliding_window`` switches; absent ``layer_types`` have the window from layer ``max_window_layers`` on."""
    layers = config.whole("num_hidden_layers")
    window = read_window(config, 4096)
    first = config.whole("max_window_layers", default=28)
    if not config.flag("use_sliding_window", default=False):
        window = None
    late = "full_attention" if window is None else "sliding_attention"
    absent = ["full_attention" if layer < first else late for layer in range(layers)]
    return masks_of(config, read_layer_types(config, absent, layers), window)


def _write_windows(model: ModelConfig) -> Values:
    types = write_layer_types(model)
    some = "sliding_attention" in types
    first = types.index("sliding_attention") if some else model.layers
    return {
        "use_sliding_window": some,
        "sliding_window": model.window if some else None,
        "max_window_layers": first,
        "layer_types": types,
    }


WINDOWS = Custom(("mask", "window"), _read_windows, _write_windows)
QWEN = (
    *WIDTHS,
    Key("max_position_embeddings", "context_length", default=32_768),
    *rms_norm(),
    gated(),
    Rope(),
    WINDOWS,
    tied(False),
    DROPOUT,
)
"""What the generations share."""

FAMILIES = (
    Family(
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        title="Qwen 1.5, 2 and 2.5, QwQ",
        config=(
            *QWEN,
            *grouped(kv_heads=32),
            Always(attention_bias=("q", "k", "v")),
            Only("use_mrope", False, written=False),  # in files of Qwen 2.5
        ),
        weights=LLAMA_WEIGHTS,
    ),
    Family(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        title="Qwen 3",
        config=(*QWEN, *grouped(kv_heads=32, head_dim=128), Biases("attention_bias"), Always(qk_norm="head")),
        weights=(*LLAMA_WEIGHTS, *QK_NORMS),
    ),
)
