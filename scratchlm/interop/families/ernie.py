"""Baidu's ERNIE 4.5: interleaved pairs; its mixtures choose experts by probabilities with a correction bias."""

from __future__ import annotations

from scratchlm.interop.families.mixture import (
    LOSSES,
    correction,
    dense_layers,
    layers_with_experts,
    shared_experts,
    shared_weights,
    widths,
)
from scratchlm.interop.families.shared import EXPERTS, LLAMA_WEIGHTS, gated, grouped, rms_norm, tied
from scratchlm.interop.family import Family
from scratchlm.interop.rope_rules import Rope
from scratchlm.interop.rules import Always, Biases, Custom, Harmless, Inexpressible, Key, Only, Reading, Values
from scratchlm.model.config import ModelConfig

BIAS_UPDATE = 1e-3
"""γ of a model that was read: its correction bias goes on moving when it is trained on, as in its own training."""


def _read_layers(config: Reading) -> Values:
    """Every ``moe_layer_interval``-th layer from one index to another has experts."""
    layers, step = config.whole("num_hidden_layers"), config.whole("moe_layer_interval", default=1)
    if step < 1:
        raise config.wrong("moe_layer_interval", step, "a number from 1 on is needed")
    start = config.whole("moe_layer_start_index", default=1)
    end = config.whole("moe_layer_end_index", default=-1)
    last = layers - 1 if end == -1 else end
    having = [layer for layer in range(layers) if (layer + 1) % step == 0 and start <= layer <= last]
    return layers_with_experts(config, "moe_layer_start_index", having)


def _write_layers(model: ModelConfig) -> Values:
    """The interval counts from the first layer, whatever the start."""
    dense, every = dense_layers(model), model.moe.every
    if len(dense) == model.layers:
        raise Inexpressible("moe.experts")
    start = min(layer for layer in range(model.layers) if layer not in dense)
    if any((layer in dense) == ((layer + 1) % every == 0) for layer in range(start, model.layers)):
        raise Inexpressible("moe.first_dense")
    return {"moe_layer_interval": every, "moe_layer_start_index": start, "moe_layer_end_index": model.layers - 1}


_BOTH = (
    *widths(131_072),
    Key("intermediate_size", "d_ff"),
    *rms_norm(1e-5),
    gated(),
    Rope(theta=500_000.0, pairs="interleaved"),
    Harmless("attention_dropout"),  # the class has none
    tied(True),
)

FAMILIES = (
    Family(
        model_type="ernie4_5",
        architecture="Ernie4_5ForCausalLM",
        title="ERNIE 4.5 0.3B",
        config=(*_BOTH, *grouped(kv_heads=2, head_dim=128), Biases("use_bias", feedforward=True)),
        weights=LLAMA_WEIGHTS,
    ),
    Family(
        model_type="ernie4_5_moe",
        architecture="Ernie4_5_MoeForCausalLM",
        title="ERNIE 4.5 21B A3B, 300B A47B",
        config=(
            *_BOTH,
            *grouped(kv_heads=4),
            Key("moe_num_experts", "moe.experts", default=64, also=("num_experts",)),
            Key("moe_k", "moe.top_k", default=6, also=("num_experts_per_tok",)),
            Key("moe_intermediate_size", "moe.d_expert", default=1536),
            shared_experts("moe_num_shared_experts", default=2),
            Custom(("moe.first_dense", "moe.every"), _read_layers, _write_layers),
            Always(moe__router="softmax_topk", moe__normalise=True, moe__bias_update=BIAS_UPDATE),
            Only("moe_use_aux_free", True, written=False),
            Only("moe_norm_min", 1e-12, written=False),  # ours is 1e-20: the same for gates that matter
            Only("use_bias", False),  # of dense layers, shared experts and the head, but not of routed ones
            Harmless("moe_capacity", "num_nextn_predict_layers"),
            LOSSES,
        ),
        weights=(
            *LLAMA_WEIGHTS,
            *EXPERTS,
            *shared_weights(),
            correction("mlp.moe_statics.e_score_correction_bias", unsqueezed=True),
        ),
        ignored=(r"model\.mtp_.*",),
    ),
)
