"""DeepSeek-V3's router with the usual attention: dots.llm1, GLM-4.5, Solar Open, K-EXAONE, MiniMax-M2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scratchlm.interop.families.exaone4 import LAYERS as EXAONE_LAYERS
from scratchlm.interop.families.mixture import (
    BEYOND,
    BLOCK_SPARSE,
    LOSSES,
    PREDICTION,
    FirstDense,
    correction,
    counts,
    dense_layers,
    layers_with_experts,
    shared_experts,
    shared_weights,
    sigmoid_router,
    widths,
)
from scratchlm.interop.families.shared import (
    AROUND,
    ATTENTION,
    DROPOUT,
    EXPERTS,
    GATED_MLP,
    PRE_NORMS,
    QK_NORMS,
    gated,
    grouped,
    rms_norm,
    tied,
)
from scratchlm.interop.family import Family
from scratchlm.interop.rope_rules import Rope, masks_of, one_rope, read_layer_types, read_window, write_layer_types
from scratchlm.interop.rules import Always, Biases, Choice, Custom, Harmless, Key, Only, Reading, Values
from scratchlm.model.config import ModelConfig


def _read_dots_windows(config: Reading) -> Values:
    """Absent ``layer_types`` have the window from layer ``max_window_layers`` on."""
    layers = config.whole("num_hidden_layers")
    window = read_window(config, 4096)
    first = config.whole("max_window_layers", default=62)
    late = "full_attention" if window is None else "sliding_attention"
    absent = ["full_attention" if layer < first else late for layer in range(layers)]
    return masks_of(config, read_layer_types(config, absent, layers), window)


def _write_dots_windows(model: ModelConfig) -> Values:
    types = write_layer_types(model)
    some = "sliding_attention" in types
    first = types.index("sliding_attention") if some else model.layers
    return {"layer_types": types, "sliding_window": model.window if some else None, "max_window_layers": first}


def _read_exaone_experts(config: Reading) -> Values:
    """``mlp_layer_types``, or all layers but the first ``first_k_dense_replace``."""
    layers, first = config.whole("num_hidden_layers"), config.whole("first_k_dense_replace", default=1)
    absent = ["dense" if layer < first else "sparse" for layer in range(layers)]
    types = config.get("mlp_layer_types", default=absent)
    if (
        not isinstance(types, list)
        or len(types) != layers
        or any(kind not in ("dense", "sparse") for kind in types)
    ):
        raise config.wrong("mlp_layer_types", types, f"a list of {layers} times dense or sparse is needed")
    return layers_with_experts(
        config, "mlp_layer_types", [layer for layer in range(layers) if types[layer] == "sparse"]
    )


def _write_exaone_experts(model: ModelConfig) -> Values:
    dense = dense_layers(model)
    return {"mlp_layer_types": ["dense" if layer in dense else "sparse" for layer in range(model.layers)]}


@dataclass(frozen=True)
class _RotaryDim(Rope):
    """The rotated share as a number of dimensions, ``rotary_dim``."""

    def fields(self) -> Sequence[str]:
        return (*super().fields(), "rope.fraction")

    def read(self, config: Reading) -> Values:
        given, width = one_rope(config), config.whole("head_dim", default=128)
        share = given.pop("partial_rotary_factor", None)
        inner = Reading(
            {**config.values, "rope_parameters": given, "rope_scaling": None}, config.where, config.family
        )
        fields = super().read(inner)
        config.asked |= inner.asked
        if width < 1:
            raise config.wrong("head_dim", width, "a positive number is needed")
        turned = config.whole("rotary_dim", default=width)
        if share is None:
            share = config.number("partial_rotary_factor", default=turned / width)
        return fields | {"rope.fraction": share}

    def write(self, model: ModelConfig) -> Values:
        return {
            **super().write(model),
            "rotary_dim": model.rotated_dims,
            "partial_rotary_factor": model.rope.fraction,
        }


_DENSE_TOO = Key("intermediate_size", "d_ff")
_WEIGHTS = (*AROUND, *ATTENTION, *EXPERTS, *PRE_NORMS, *shared_weights())

FAMILIES = (
    Family(
        model_type="dots1",
        architecture="Dots1ForCausalLM",
        title="dots.llm1",
        config=(
            *widths(2048),
            _DENSE_TOO,
            *grouped(kv_heads=32),
            *counts(d_expert=1408, key="n_routed_experts"),
            shared_experts(),
            *sigmoid_router(normalise=False),
            FirstDense(),
            Only("moe_layer_freq", 1, written=False),
            Harmless("ep_size", "use_sliding_window", "aux_loss_alpha", "seq_aux"),
            *rms_norm(),
            Always(qk_norm="head"),
            gated(),
            Rope(),
            Custom(("mask", "window"), _read_dots_windows, _write_dots_windows),
            Biases("attention_bias"),
            tied(False),
            DROPOUT,
        ),
        weights=(*_WEIGHTS, *GATED_MLP, *QK_NORMS, correction()),
    ),
    Family(
        model_type="glm4_moe",
        architecture="Glm4MoeForCausalLM",
        title="GLM-4.5, 4.5 Air, 4.6",
        config=(
            *widths(131_072),
            _DENSE_TOO,
            *grouped(kv_heads=8),
            *counts(128, 8, 1408, key="n_routed_experts"),
            shared_experts(default=1),
            *sigmoid_router(),
            FirstDense(default=1),
            PREDICTION,
            *rms_norm(1e-5),
            Choice("use_qk_norm", "qk_norm", {False: "none", True: "head"}, default=False),
            gated(),
            Rope(fraction="partial_rotary_factor", fraction_default=0.5),
            Biases("attention_bias", "qkv"),
            tied(False),
            DROPOUT,
        ),
        weights=(*_WEIGHTS, *GATED_MLP, *QK_NORMS, correction()),
        ignored=(BEYOND,),
        written={"num_nextn_predict_layers": 0},
    ),
    Family(
        model_type="solar_open",
        architecture="SolarOpenForCausalLM",
        title="Solar Open 100B",
        config=(
            *widths(131_072),
            *grouped(kv_heads=8, head_dim=128),
            *counts(128, 8, 1280, key="n_routed_experts"),
            shared_experts(default=1),
            *sigmoid_router(),
            Only("first_k_dense_replace", 0, written=False),
            Only("use_qk_norm", False, written=False),
            Harmless("intermediate_size"),
            *rms_norm(1e-5),
            gated(),
            Rope(theta=1e6),
            Only("partial_rotary_factor", 1.0, written=False),
            Biases("attention_bias", "qkv"),
            tied(False),
            DROPOUT,
        ),
        weights=(*_WEIGHTS, correction()),
    ),
    Family(
        model_type="exaone_moe",
        architecture="ExaoneMoeForCausalLM",
        title="K-EXAONE",
        config=(
            *widths(2048),
            _DENSE_TOO,
            *grouped(kv_heads=32),
            *counts(64, 8, 1024),
            shared_experts("num_shared_experts", default=1),
            *sigmoid_router(scale=2.5),
            Custom(("moe.first_dense", "moe.every"), _read_exaone_experts, _write_exaone_experts),
            PREDICTION,
            *rms_norm(1e-5),
            Always(qk_norm="head"),
            gated(),
            Rope(),
            EXAONE_LAYERS,
            tied(False),
            DROPOUT,
        ),
        weights=(*_WEIGHTS, *GATED_MLP, *QK_NORMS, correction("mlp.e_score_correction_bias")),
        ignored=(r"mtp\..*", BEYOND),
    ),
    Family(
        model_type="minimax_m2",
        architecture="MiniMaxM2ForCausalLM",
        title="MiniMax-M2, in bf16",
        config=(
            *widths(196_608),
            *grouped(kv_heads=8, head_dim=128),
            *counts(256, 8, 1536, key="num_local_experts", width="intermediate_size"),
            Always(moe__router="sigmoid", moe__normalise=True, qk_norm="full"),
            Only("scoring_func", "sigmoid", written=False),
            Only("use_qk_norm", True, written=False),
            Only("qk_norm_type", "per_layer", written=False),
            Only("use_routing_bias", True, written=False),
            Only("shared_intermediate_size", 0, written=False),
            Harmless("num_mtp_modules", "use_mtp", "mtp_transformer_layers"),
            LOSSES,
            *rms_norm(),
            gated(),
            _RotaryDim(theta=5e6),
            tied(False),
            DROPOUT,
        ),
        weights=(
            *AROUND,
            *ATTENTION,
            *BLOCK_SPARSE,
            *PRE_NORMS,
            *QK_NORMS,
            correction("block_sparse_moe.e_score_correction_bias"),
        ),
    ),
)
