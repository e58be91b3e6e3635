"""SmolLM3: Llama in which every fourth layer has no position."""

from __future__ import annotations

from scratchlm.interop.families.shared import DROPOUT, LLAMA_WEIGHTS, WIDTHS, gated, grouped, rms_norm, tied
from scratchlm.interop.family import Family
from scratchlm.interop.rope_rules import Rope, masks_of, read_layer_types, read_window, write_layer_types
from scratchlm.interop.rules import (
    Biases,
    Custom,
    Harmless,
    Inexpressible,
    Key,
    Reading,
    Values,
    per_layer,
    shortest_pattern,
)
from scratchlm.model.config import ModelConfig


def _read_layers(config: Reading) -> Values:
    """``no_rope_layers`` has a 1 for every layer with RoPE; where windows are used, layers without RoPE have them."""
    layers = config.whole("num_hidden_layers")
    every = config.whole("no_rope_layer_interval", default=4)
    turned = config.get(
        "no_rope_layers", default=[int(every < 1 or (layer + 1) % every != 0) for layer in range(layers)]
    )
    if not isinstance(turned, list) or len(turned) < layers:
        raise config.wrong("no_rope_layers", turned, f"a list of {layers} is needed, one per layer")
    turned = [config.as_flag("no_rope_layers", has) for has in turned[:layers]]
    window = read_window(config, None)
    if not config.flag("use_sliding_window", default=False):
        window = None
    absent = ["full_attention" if window is None or has else "sliding_attention" for has in turned]
    positions = shortest_pattern(["rope" if has else "none" for has in turned])
    return {"position": positions, **masks_of(config, read_layer_types(config, absent, layers), window)}


def _write_layers(model: ModelConfig) -> Values:
    positions, types = per_layer(model, "position"), write_layer_types(model)
    if set(positions) - {"rope", "none"}:
        raise Inexpressible("position")
    some = "sliding_attention" in types
    return {
        "no_rope_layers": [int(position == "rope") for position in positions],
        "use_sliding_window": some,
        "sliding_window": model.window if some else None,
        "layer_types": types,
    }


FAMILIES = (
    Family(
        model_type="smollm3",
        architecture="SmolLM3ForCausalLM",
        title="SmolLM3",
        written={"pad_token_id": None},  # the class has one that small vocabularies do not reach
        config=(
            *WIDTHS,
            Key("max_position_embeddings", "context_length", default=32_768),
            *grouped(kv_heads=4),
            *rms_norm(),
            gated(),
            Rope(theta=2_000_000.0),
            Custom(("position", "mask", "window"), _read_layers, _write_layers),
            Biases("attention_bias"),
            Key("mlp_bias", "feedforward_bias", default=False),
            tied(True),
            DROPOUT,
            Harmless("max_window_layers"),  # in files, and not read
        ),
        weights=LLAMA_WEIGHTS,
    ),
)
