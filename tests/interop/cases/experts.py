"""Mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from transformers_oracle import Case

from cases.dense import scaling, widths
from cases.modern import coin, kinds, window, without


def experts(rng: Random, multiple: int = 1) -> dict[str, Any]:
    """Numbers of experts, all names of them: few enough that each gets tokens, more than a token goes to."""
    return {
        "num_experts": multiple * rng.choice([5, 6, 7]),
        "num_experts_per_tok": rng.choice([1, 2, 3]),
        "router_aux_loss_coef": 0.3,
    }


def local(drawn: dict[str, Any]) -> dict[str, Any]:
    """The number of experts under its other name."""
    return without(drawn, "num_experts") | {"num_local_experts": drawn["num_experts"]}


def mixtral(rng: Random) -> dict[str, Any]:
    # transformers' YaRN needs head_dim here, where the class leaves it null
    heads = {"head_dim": 10, "rope_scaling": scaling(rng)} if coin(rng) else {"head_dim": None}
    return (
        local(widths(rng) | experts(rng))
        | heads
        | {
            "sliding_window": rng.choice([None, window(rng)]),
            "hidden_act": rng.choice(["silu", "gelu"]),
            "router_jitter_noise": rng.choice([0.0, 0.1]),
        }
    )


def some_layers(rng: Random) -> dict[str, Any]:
    """Layers with experts: all, every other one, or all but the first."""
    return rng.choice(
        [
            {"num_hidden_layers": 2},
            {"num_hidden_layers": 4, "decoder_sparse_step": 2},
            {"num_hidden_layers": 3, "mlp_only_layers": [0]},
            {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [1, 2]},
        ]
    )


def qwen2_moe(rng: Random) -> dict[str, Any]:
    drawn = widths(rng) | experts(rng) | some_layers(rng)
    windows: dict[str, Any] = rng.choice(
        [
            {"use_sliding_window": False},
            {
                "use_sliding_window": True,
                "sliding_window": window(rng),
                "max_window_layers": rng.choice([1, 2, 28]),
            },
            {
                "use_sliding_window": True,
                "sliding_window": window(rng),
                "layer_types": kinds(rng, drawn["num_hidden_layers"]),
            },
        ]
    )
    return (
        drawn
        | windows
        | {
            "rope_scaling": scaling(rng),
            "moe_intermediate_size": rng.choice([11, 18]),
            "shared_expert_intermediate_size": rng.choice([13, 36]),
            "norm_topk_prob": coin(rng),
            "qkv_bias": coin(rng),
            "hidden_act": rng.choice(["silu", "gelu"]),
        }
    )


def qwen3_moe(rng: Random) -> dict[str, Any]:
    windows: dict[str, Any] = rng.choice(
        [{}, {"use_sliding_window": True, "sliding_window": window(rng)}, {"sliding_window": 3}]
    )
    return (
        widths(rng)
        | experts(rng)
        | some_layers(rng)
        | windows
        | {
            "head_dim": rng.choice([6, 10]),
            "rope_scaling": scaling(rng),
            "moe_intermediate_size": rng.choice([11, 18]),
            "norm_topk_prob": coin(rng),
            "attention_bias": coin(rng),
            "hidden_act": rng.choice(["silu", "relu"]),
        }
    )


def olmoe(rng: Random) -> dict[str, Any]:
    return (
        widths(rng)
        | experts(rng)
        | {
            "rope_scaling": scaling(rng),
            "norm_topk_prob": coin(rng),
            "attention_bias": coin(rng),
            "clip_qkv": rng.choice([None, 0.7]),
            "hidden_act": rng.choice(["silu", "gelu"]),
        }
    )


def latent(rng: Random) -> dict[str, Any]:
    """Latent attention and DeepSeek's experts."""
    drawn = widths(rng)
    yarn = {"rope_type": "yarn", "factor": 6.0, "original_max_position_embeddings": 20, "beta_fast": 6.0}
    layers, first = rng.choice([(2, 0), (3, 1), (4, 2)])
    groups = rng.choice([2, 3])
    return drawn | {
        "num_key_value_heads": drawn["num_attention_heads"],
        "rope_scaling": rng.choice(
            [
                scaling(rng),
                yarn | {"mscale": 0.707, "mscale_all_dim": 0.707},
                yarn | {"mscale": 1.0, "mscale_all_dim": 0.4},
                yarn | {"mscale_all_dim": 0.8},
                yarn | {"attention_factor": 1.3, "mscale_all_dim": 1.0},
            ]
        ),
        "num_hidden_layers": layers,
        "first_k_dense_replace": first,
        "q_lora_rank": rng.choice([None, 9]),
        "kv_lora_rank": rng.choice([7, 12]),
        "qk_nope_head_dim": rng.choice([5, 8]),
        "qk_rope_head_dim": rng.choice([4, 6]),
        "v_head_dim": rng.choice([3, 7]),
        "n_routed_experts": groups * rng.choice([3, 4]),
        "num_experts_per_tok": rng.choice([1, 2, 3]),
        "n_group": groups,
        "topk_group": rng.choice([1, groups]),
        "moe_intermediate_size": rng.choice([11, 18]),
        "n_shared_experts": rng.choice([1, 2]),
        "routed_scaling_factor": rng.choice([1.0, 2.3]),
        "hidden_act": rng.choice(["silu", "gelu"]),
    }


def deepseek_v2(rng: Random) -> dict[str, Any]:
    # transformers views pairs as complex numbers, for which rows must start at even places
    even = {"kv_lora_rank": rng.choice([8, 12]), "qk_nope_head_dim": rng.choice([4, 8])}
    return latent(rng) | even | {"topk_method": "greedy", "topk_group": 1}


def deepseek_v3(rng: Random) -> dict[str, Any]:
    return latent(rng) | {"norm_topk_prob": coin(rng), "rope_interleave": coin(rng)}


def dense_latent(rng: Random) -> dict[str, Any]:
    """No layer has experts."""
    return deepseek_v3(rng) | {"first_k_dense_replace": 4}


def gpt_oss(rng: Random) -> dict[str, Any]:
    drawn = local(widths(rng) | experts(rng))
    layers = rng.choice([2, 3])
    return drawn | {
        "num_hidden_layers": layers,
        "head_dim": rng.choice([6, 10]),
        "rope_scaling": rng.choice(
            [
                {"rope_type": "default"},
                {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "beta_fast": 8.0,
                    "beta_slow": 1.0,
                    "truncate": coin(rng),
                    "original_max_position_embeddings": 28,
                },
                None,
            ]
        ),
        "sliding_window": window(rng),
        "layer_types": rng.choice([None, kinds(rng, layers)]),
        "attention_bias": coin(rng),
    }


def flex_olmo(rng: Random) -> dict[str, Any]:
    return without(olmoe(rng), "clip_qkv") | {"pad_token_id": None, "head_dim": rng.choice([6, 10])}


def granitemoe(rng: Random) -> dict[str, Any]:
    return local(widths(rng) | experts(rng)) | {
        "rope_scaling": scaling(rng),
        "attention_bias": coin(rng),
        "embedding_multiplier": rng.choice([1.0, 12.0, 0.3]),
        "attention_multiplier": rng.choice([1.0, 0.11]),
        "residual_multiplier": rng.choice([1.0, 0.22]),
        "logits_scaling": rng.choice([1.0, 0.7, 3.0]),
        "hidden_act": rng.choice(["silu", "gelu"]),
    }


def sigmoid(rng: Random) -> dict[str, Any]:
    """Experts as DeepSeek-V3 has them, attention as usual."""
    groups = rng.choice([1, 2, 3])
    return widths(rng) | {
        "head_dim": rng.choice([6, 10]),
        "rope_scaling": scaling(rng),
        "n_routed_experts": groups * rng.choice([3, 4]),
        "num_experts_per_tok": rng.choice([1, 2, 3]),
        "n_group": groups,
        "topk_group": rng.choice([1, groups]),
        "moe_intermediate_size": rng.choice([11, 18]),
        "n_shared_experts": rng.choice([1, 2]),
        "routed_scaling_factor": rng.choice([1.0, 2.3]),
        "norm_topk_prob": coin(rng),
        "attention_bias": coin(rng),
        "hidden_act": rng.choice(["silu", "gelu"]),
    }


def first_dense(rng: Random) -> dict[str, Any]:
    layers, first = rng.choice([(2, 0), (3, 1), (4, 2)])
    return {"num_hidden_layers": layers, "first_k_dense_replace": first}


def dots1(rng: Random) -> dict[str, Any]:
    drawn = sigmoid(rng) | first_dense(rng)
    windows: dict[str, Any] = rng.choice(
        [
            {"sliding_window": None},
            {"sliding_window": window(rng), "max_window_layers": rng.choice([0, 1, 28])},
            {"sliding_window": window(rng), "layer_types": kinds(rng, drawn["num_hidden_layers"])},
        ]
    )
    return drawn | windows


def glm4_moe(rng: Random) -> dict[str, Any]:
    share = rng.choice([{}, {"partial_rotary_factor": 1.0}])
    return sigmoid(rng) | first_dense(rng) | share | {"head_dim": rng.choice([8, 12]), "use_qk_norm": coin(rng)}


def solar_open(rng: Random) -> dict[str, Any]:
    return without(sigmoid(rng), "intermediate_size")


def exaone_moe(rng: Random) -> dict[str, Any]:
    drawn = sigmoid(rng) | first_dense(rng)
    layers = drawn["num_hidden_layers"]
    dense: dict[str, Any] = rng.choice([{}, {"mlp_layer_types": ["dense"] * (layers - 1) + ["sparse"]}])
    windows: dict[str, Any] = rng.choice([{"sliding_window_pattern": 2}, {"layer_types": kinds(rng, layers)}])
    names = {"num_experts": drawn["n_routed_experts"], "num_shared_experts": drawn["n_shared_experts"]}
    drawn = without(drawn, "n_routed_experts", "n_shared_experts", "attention_bias")
    return drawn | names | dense | windows | {"sliding_window": window(rng)}


def minimax_m2(rng: Random) -> dict[str, Any]:
    share = rng.choice([{}, {"rotary_dim": 4}])
    return (
        local(widths(rng) | experts(rng))
        | share
        | {
            "head_dim": rng.choice([6, 10]),
            "rope_scaling": scaling(rng),
            "hidden_act": rng.choice(["silu", "gelu"]),
        }
    )


def ernie4_5(rng: Random) -> dict[str, Any]:
    return widths(rng) | {
        "head_dim": rng.choice([6, 10]),
        "rope_scaling": scaling(rng),
        "use_bias": coin(rng),
        "hidden_act": rng.choice(["silu", "gelu"]),
    }


def ernie4_5_moe(rng: Random) -> dict[str, Any]:
    where: dict[str, Any] = rng.choice(
        [
            {"num_hidden_layers": 2, "moe_layer_start_index": 0},
            {"num_hidden_layers": 3},
            {"num_hidden_layers": 4, "moe_layer_interval": 2, "moe_layer_start_index": 2, "moe_layer_end_index": 3},
            {"num_hidden_layers": 4, "moe_layer_interval": 2, "moe_layer_start_index": 0},
        ]
    )
    drawn = without(ernie4_5(rng), "use_bias", "head_dim")
    return (
        drawn
        | where
        | {
            "rope_scaling": None,
            "moe_num_experts": rng.choice([5, 6, 7]),
            "moe_k": rng.choice([1, 2, 3]),
            "moe_num_shared_experts": rng.choice([1, 2]),
            "moe_intermediate_size": rng.choice([11, 18]),
            "router_aux_loss_coef": 0.3,
        }
    )


def but(draw: Callable[[Random], dict[str, Any]], **more: Any) -> Callable[[Random], dict[str, Any]]:
    """The same, with some values given."""
    return lambda rng: draw(rng) | more


YARN = {"rope_type": "yarn", "factor": 6.0, "original_max_position_embeddings": 20, "beta_fast": 6.0}
GROUPS: dict[str, Any] = {"n_routed_experts": 12, "n_group": 3, "topk_group": 2, "num_experts_per_tok": 3}

CASES = [
    Case("mixtral", mixtral),
    Case("mixtral", but(mixtral, sliding_window=None, head_dim=10, rope_scaling=YARN), "full"),
    Case("qwen2_moe", qwen2_moe),
    Case("qwen2_moe", but(qwen2_moe, use_sliding_window=False, layer_types=None, norm_topk_prob=False), "full"),
    Case("qwen3_moe", qwen3_moe),
    Case("qwen3_moe", but(qwen3_moe, norm_topk_prob=True, attention_bias=False), "normalised"),
    Case("olmoe", olmoe),
    Case("flex_olmo", flex_olmo),
    Case("deepseek_v2", deepseek_v2),
    Case("deepseek_v2", but(deepseek_v2, topk_method="group_limited_greedy", **GROUPS), "groups"),
    Case("deepseek_v3", deepseek_v3),
    Case(
        "deepseek_v3",
        but(
            deepseek_v3,
            rope_interleave=True,
            norm_topk_prob=False,
            rope_scaling={**YARN, "mscale": 1.0, "mscale_all_dim": 0.4},
            **GROUPS,
        ),
        "groups",
    ),
    Case("deepseek_v3", dense_latent, "dense"),
    Case("gpt_oss", gpt_oss),
    Case("gpt_oss", but(gpt_oss, rope_scaling={**YARN, "truncate": False}, attention_bias=True), "yarn"),
    Case("granitemoe", granitemoe),
    Case("dots1", dots1),
    Case("dots1", but(dots1, attention_bias=False, norm_topk_prob=True, **GROUPS), "groups"),
    Case("glm4_moe", glm4_moe),
    Case(
        "glm4_moe", but(glm4_moe, attention_bias=False, use_qk_norm=False, norm_topk_prob=False, **GROUPS), "groups"
    ),
    Case("solar_open", solar_open),
    Case("solar_open", but(solar_open, attention_bias=False, **GROUPS), "groups"),
    Case("exaone_moe", exaone_moe),
    Case("minimax_m2", minimax_m2),
    Case("ernie4_5", ernie4_5),
    Case("ernie4_5", but(ernie4_5, use_bias=False), "unbiased"),
    Case("ernie4_5_moe", ernie4_5_moe),
]
