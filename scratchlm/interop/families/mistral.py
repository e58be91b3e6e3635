"""Mistral 7B, Nemo, Small and Large without their vision towers, and Ministral with full layers among those with a window."""

from __future__ import annotations

from scratchlm.interop.families.shared import DROPOUT, LLAMA_WEIGHTS, WIDTHS, gated, grouped, rms_norm, tied
from scratchlm.interop.family import Family
from scratchlm.interop.rope_rules import Rope, Window, masks_of, read_layer_types, read_window, write_layer_types
from scratchlm.interop.rules import Custom, Key, Reading, Values
from scratchlm.model.config import ModelConfig


def _read_windows(config: Reading) -> Values:
    """Absent ``layer_types`` are all of one kind: with a window if there is one."""
    window = read_window(config, 4096)
    full, sliding = "full_attention", "sliding_attention"
    layers = config.whole("num_hidden_layers")
    types = read_layer_types(config, [full if window is None else sliding] * layers, layers)
    return masks_of(config, types, window)


def _write_windows(model: ModelConfig) -> Values:
    types = write_layer_types(model)  # the class wants a window even where no layer has it
    return {"layer_types": types, "sliding_window": model.window if "sliding_attention" in types else 4096}


_SHARED = (
    *WIDTHS,
    Key("max_position_embeddings", "context_length", default=131_072),
    *grouped(kv_heads=8),
    *rms_norm(),
    gated(),
    Rope(),
    tied(False),
    DROPOUT,
)

FAMILIES = (
    Family(
        model_type="mistral",
        architecture="MistralForCausalLM",
        title="Mistral 7B, Nemo 12B, Small 24B, Large 123B",
        config=(*_SHARED, Window(default=4096)),
        weights=LLAMA_WEIGHTS,
    ),
    Family(
        model_type="ministral",
        architecture="MinistralForCausalLM",
        title="Ministral 8B",
        config=(*_SHARED, Custom(("mask", "window"), _read_windows, _write_windows)),
        weights=LLAMA_WEIGHTS,
    ),
)
