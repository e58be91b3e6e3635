"""DeepSeek-V2 and V3: latent attention, many small experts beside shared ones, dense first layers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from scratchlm.interop.families.mixture import (
    BEYOND,
    PREDICTION,
    FirstDense,
    correction,
    counts,
    shared_experts,
    shared_weights,
    sigmoid_router,
    widths,
)
from scratchlm.interop.families.shared import (
    AROUND,
    BLOCK,
    DROPOUT,
    EXPERTS,
    GATED_MLP,
    LAYER,
    PRE_NORMS,
    gated,
    rms_norm,
    tied,
)
from scratchlm.interop.family import Family
from scratchlm.interop.rope_rules import Rope, one_rope, unless_null, yarn_mscale
from scratchlm.interop.rules import Always, Choice, Custom, Harmless, Inexpressible, Key, Only, Reading, Values
from scratchlm.interop.weights import SOME, Map
from scratchlm.model.config import ModelConfig

_NOPE, _ROPE = 128, 64
"""What absent ``qk_nope_head_dim`` and ``qk_rope_head_dim`` stand for."""


@dataclass(frozen=True)
class LatentRope(Rope):
    """RoPE of latent attention, where YaRN's ``mscale_all_dim`` multiplies the scores (DeepSeek's published code).

    ::

        queries and keys · m(mscale) / m(mscale_all_dim)      scores · m(mscale_all_dim)²      m(w) = 0.1 w ln(factor) + 1
    """

    def read(self, config: Reading) -> Values:
        fields = super().read(config)
        weight = one_rope(config).get("mscale_all_dim")
        if fields.get("rope.scaling") == ("yarn",) and weight:
            width = config.whole("qk_nope_head_dim", default=_NOPE) + config.whole(
                "qk_rope_head_dim", default=_ROPE
            )
            fields["attention_scale"] = _scaled(width, fields["rope.factor"], weight)
        return fields

    def write(self, model: ModelConfig) -> Values:
        written = super().write(model)
        width = model.resolved_head_dim + model.latent.rope_dim
        scale, plain = model.attention_scale, width**-0.5
        if scale is None or math.isclose(scale, plain, rel_tol=1e-12):
            return written
        scaling = written.get("rope_scaling")
        if scaling is None or scaling["rope_type"] != "yarn" or scaling["factor"] <= 1:
            raise Inexpressible("attention_scale")
        factor, stretched = scaling["factor"], scaling["attention_factor"]
        exact = _weight(math.sqrt(scale / plain), factor)
        short = float(f"{exact:.12g}")  # a weight that was written with few digits comes back with them
        weight = short if _scaled(width, factor, short) == scale else exact
        scaling["mscale_all_dim"] = weight
        # Read only by code that does not know attention_factor, such as DeepSeek's own.
        scaling["mscale"] = float(f"{_weight(stretched * yarn_mscale(factor, weight), factor):.12g}")
        return written


def _scaled(width: int, factor: float, weight: float) -> float:
    """The factor of scores."""
    mscale = yarn_mscale(factor, weight)
    return width**-0.5 * mscale * mscale


def _weight(mscale: float, factor: float) -> float:
    """The inverse of :func:`~scratchlm.interop.rope_rules.yarn_mscale`."""
    return (mscale - 1.0) / (0.1 * math.log(factor))


def _read_heads(config: Reading) -> Values:
    heads = config.whole("num_attention_heads")
    if (given := config.get("num_key_value_heads", default=heads)) != heads:
        raise config.wrong("num_key_value_heads", given, "latent attention has as many as num_attention_heads")
    return {}


def _read_groups(config: Reading) -> Values:
    """``greedy`` chooses among all experts, whatever the groups."""
    method = config.get("topk_method", default="greedy")
    groups, best = config.whole("n_group", default=1), config.whole("topk_group", default=1)
    if method not in ("greedy", "group_limited_greedy"):
        raise config.wrong("topk_method", method, "known are greedy, group_limited_greedy")
    return {} if method == "greedy" else {"moe.groups": groups, "moe.top_groups": best}


def _write_groups(model: ModelConfig) -> Values:
    moe = model.moe
    method = "greedy" if moe.groups == 1 else "group_limited_greedy"
    return {"topk_method": method, "n_group": moe.groups, "topk_group": moe.top_groups or moe.groups}


LATENT: tuple[Any, ...] = (
    Always(attention=("mla",), latent__norm_eps=1e-6),
    Custom((), _read_heads, lambda model: {"num_key_value_heads": model.heads}),
    Key("q_lora_rank", "latent.q_rank", default=unless_null("q_lora_rank", 1536)),
    Key("kv_lora_rank", "latent.kv_rank", default=512),
    Key("qk_nope_head_dim", "head_dim", default=_NOPE),
    Key("qk_rope_head_dim", "latent.rope_dim", default=_ROPE),
    Key("v_head_dim", "latent.value_dim", default=128),
    Harmless("head_dim", "qk_head_dim"),  # sums of these, which newer versions write
    Only("attention_bias", False),  # of the way down, where we have none
)
"""The latent vectors' norms have an ε of their own, whatever ``rms_norm_eps`` says."""

LATENT_WEIGHTS = (
    Map(f"{LAYER}.self_attn.q_proj", f"{BLOCK}.attention.down", (0, 1), "heads", when=("latent.q_rank", (None,))),
    Map(f"{LAYER}.self_attn.q_a_proj", f"{BLOCK}.attention.down", (0,), when=("latent.q_rank", SOME)),
    Map(f"{LAYER}.self_attn.q_a_layernorm", f"{BLOCK}.attention.q_norm"),
    Map(f"{LAYER}.self_attn.q_b_proj", f"{BLOCK}.attention.q_up", grouped="heads"),
    Map(f"{LAYER}.self_attn.kv_a_proj_with_mqa", f"{BLOCK}.attention.down", (-2, -1)),
    Map(f"{LAYER}.self_attn.kv_a_layernorm", f"{BLOCK}.attention.kv_norm"),
    Map(f"{LAYER}.self_attn.kv_b_proj", f"{BLOCK}.attention.kv_up", grouped="heads"),
    Map(f"{LAYER}.self_attn.o_proj", f"{BLOCK}.attention.output"),
)

_BOTH: tuple[Any, ...] = (
    Key("intermediate_size", "d_ff"),
    *LATENT,
    *rms_norm(),
    gated(),
    Only("moe_layer_freq", 1),
    Key("aux_loss_alpha", "moe.balance_loss", default=0.001),  # α E Σ f P, as ours
    Choice("seq_aux", "moe.balance_over", {True: "sequence", False: "batch"}, default=True),
    Harmless("ep_size"),
    tied(False),
    DROPOUT,
)
_WEIGHTS = (*AROUND, *LATENT_WEIGHTS, *GATED_MLP, *EXPERTS, *shared_weights(), *PRE_NORMS)

FAMILIES = (
    Family(
        model_type="deepseek_v2",
        architecture="DeepseekV2ForCausalLM",
        title="DeepSeek-V2, V2 Lite, V2.5, Coder V2",
        config=(
            *widths(2048),
            *_BOTH,
            LatentRope(pairs="interleaved"),
            *counts(64, d_expert=1407, key="n_routed_experts"),
            shared_experts(default=2),
            Key("routed_scaling_factor", "moe.gate_scale", default=1.0),
            Custom(("moe.groups", "moe.top_groups"), _read_groups, _write_groups),
            Always(moe__router="softmax_topk", moe__normalise=False),
            Only("norm_topk_prob", False),
            Only("scoring_func", "softmax"),
            Only("mlp_bias", False),  # of dense layers and shared experts, but not of routed ones
            FirstDense(),
        ),
        weights=_WEIGHTS,
    ),
    Family(
        model_type="deepseek_v3",
        architecture="DeepseekV3ForCausalLM",
        title="DeepSeek-V3, R1, V3.1, Moonlight, Kimi K2, without multi-token prediction",
        config=(
            *widths(4096),
            *_BOTH,
            LatentRope(),
            Choice("rope_interleave", "rope.pairs", {True: "interleaved", False: "half"}, default=True),
            *counts(256, 8, 2048, key="n_routed_experts"),
            shared_experts(default=1),
            *sigmoid_router(8, 4, 2.5),
            PREDICTION,
            FirstDense(default=3),
        ),
        weights=(*_WEIGHTS, correction()),
        ignored=(BEYOND,),
        alias=("kimi_k2",),
        written={"num_nextn_predict_layers": 0, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    ),
)
