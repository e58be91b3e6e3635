"""LG's EXAONE 4: norms after the branches, normed queries and keys; layers with windows have RoPE, the others no position."""

from __future__ import annotations

from scratchlm.interop.families.shared import (
    AROUND,
    ATTENTION,
    DROPOUT,
    GATED_MLP,
    QK_NORMS,
    REORDERED_NORMS,
    WIDTHS,
    gated,
    grouped,
    rms_norm,
    tied,
)
from scratchlm.interop.family import Family
from scratchlm.interop.rope_rules import Rope, masks_of, read_layer_types, read_window, write_layer_types
from scratchlm.interop.rules import Always, Custom, Inexpressible, Reading, Values, per_layer, shortest_pattern
from scratchlm.model.config import ModelConfig


def _read_layers(config: Reading) -> Values:
    """Without ``sliding_window`` all layers are full and rotated; with one, full layers have no position."""
    layers = config.whole("num_hidden_layers")
    window = read_window(config, 4096)
    every = config.get("sliding_window_pattern", default=4)
    absent = ["full_attention"] * layers
    if window is not None and config.get("layer_types", default=None) is None:
        if type(every) is not int or every < 1:  # "LLLG" is in files, always beside layer_types
            raise config.wrong("sliding_window_pattern", every, "without layer_types it must be a number from 1 on")
        absent = ["full_attention" if (layer + 1) % every == 0 else "sliding_attention" for layer in range(layers)]
    types = read_layer_types(config, absent, layers)
    positions = ["rope" if window is None or kind == "sliding_attention" else "none" for kind in types]
    return {"position": shortest_pattern(positions), **masks_of(config, types, window)}


def _write_layers(model: ModelConfig) -> Values:
    types, positions = write_layer_types(model), per_layer(model, "position")
    if set(types) == {"full_attention"} and set(positions) == {"rope"}:
        return {"layer_types": types, "sliding_window": None}
    if positions != ["rope" if kind == "sliding_attention" else "none" for kind in types]:
        raise Inexpressible("position")
    return {"layer_types": types, "sliding_window": model.window}


LAYERS = Custom(("position", "mask", "window"), _read_layers, _write_layers)

FAMILIES = (
    Family(
        model_type="exaone4",
        architecture="Exaone4ForCausalLM",
        title="EXAONE 4",
        config=(
            *WIDTHS,
            *grouped(kv_heads=32),
            *rms_norm(1e-5),
            Always(norm_placement="reordered", qk_norm="head"),
            gated(),
            Rope(),
            LAYERS,
            tied(False),
            DROPOUT,
        ),
        weights=(*AROUND, *ATTENTION, *GATED_MLP, *REORDERED_NORMS, *QK_NORMS),
    ),
)
