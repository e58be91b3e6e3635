"""Dense families after Llama: windows, positions that differ between layers, norms in other places, multipliers."""

from __future__ import annotations

from random import Random
from typing import Any

from transformers_oracle import Case

from cases.dense import scaling, widths


def coin(rng: Random) -> bool:
    return rng.random() < 0.5


def kinds(rng: Random, layers: int) -> list[str]:
    """Layers with and without a window, at least one of each."""
    drawn = ["sliding_attention", "full_attention"] + [
        rng.choice(["sliding_attention", "full_attention"]) for _ in range(layers - 2)
    ]
    rng.shuffle(drawn)
    return drawn


def window(rng: Random) -> int:
    """Shorter than the test's texts. Not 1: transformers' cache then keeps the last 0 keys, which is all of them."""
    return rng.choice([2, 5, 9, 17])


def without(drawn: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in drawn.items() if key not in keys}


def mistral(rng: Random) -> dict[str, Any]:
    return widths(rng) | {
        "head_dim": rng.choice([None, 10]),
        "rope_scaling": scaling(rng),
        "sliding_window": rng.choice([None, window(rng)]),
        "hidden_act": rng.choice(["silu", "gelu"]),
    }


def ministral(rng: Random) -> dict[str, Any]:
    drawn = widths(rng)
    return drawn | {
        "head_dim": rng.choice([6, 10]),  # the class does not fill it in
        "rope_scaling": scaling(rng),
        "sliding_window": window(rng),  # null, which the class allows, fails when it makes its masks
        "layer_types": rng.choice([None, kinds(rng, drawn["num_hidden_layers"])]),
    }


def qwen2(rng: Random) -> dict[str, Any]:
    drawn = widths(rng)
    return drawn | {
        "rope_scaling": scaling(rng),
        "use_sliding_window": coin(rng),
        "sliding_window": window(rng),
        "max_window_layers": rng.choice([0, 1, 28]),
        "hidden_act": rng.choice(["silu", "gelu_pytorch_tanh"]),
    }


def qwen2_layer_types(rng: Random) -> dict[str, Any]:
    drawn = widths(rng)
    more = {"layer_types": kinds(rng, drawn["num_hidden_layers"]), "head_dim": rng.choice([6, 10])}
    return drawn | more | {"use_sliding_window": True, "sliding_window": window(rng)}


def qwen3(rng: Random) -> dict[str, Any]:
    more = {"head_dim": rng.choice([6, 10]), "attention_bias": coin(rng)}
    return (qwen2 if coin(rng) else qwen2_layer_types)(rng) | more


def gemma(rng: Random) -> dict[str, Any]:
    return widths(rng) | {
        "head_dim": rng.choice([6, 10]),
        "rope_scaling": scaling(rng),
        "attention_bias": coin(rng),
        "hidden_act": rng.choice(["gelu", "gelu_pytorch_tanh", "silu"]),
    }


def gemma2(rng: Random) -> dict[str, Any]:
    drawn = widths(rng)
    return drawn | {
        "head_dim": rng.choice([6, 10]),
        "rope_scaling": scaling(rng),
        "attention_bias": coin(rng),
        "hidden_activation": rng.choice(["gelu", "gelu_pytorch_tanh", "silu"]),
        "query_pre_attn_scalar": rng.choice([3, 11, 144]),
        "attn_logit_softcapping": rng.choice([None, 2.0]),
        "final_logit_softcapping": rng.choice([None, 1.5]),
        "sliding_window": window(rng),
        "layer_types": rng.choice([None, kinds(rng, drawn["num_hidden_layers"])]),
    }


def gemma3(rng: Random) -> dict[str, Any]:
    drawn = without(gemma2(rng), "attn_logit_softcapping")
    every = {} if drawn["layer_types"] else {"sliding_window_pattern": rng.choice([2, 3])}
    return drawn | every | {"rope_local_base_freq": rng.choice([33.0, 900.0])}


def gemma3_by_kind(rng: Random) -> dict[str, Any]:
    """What only the newer dialect says: scaled layers with a window."""
    drawn = without(gemma3(rng), "rope_scaling", "rope_theta", "rope_local_base_freq")
    scaled: dict[str, Any] = {"rope_type": "linear", "factor": 3.0}
    full = rng.choice([scaled, {"rope_type": "default"}])
    return drawn | {
        "rope_parameters": {
            "full_attention": {**full, "rope_theta": 700.0},
            "sliding_attention": {**scaled, "rope_theta": 55.0},
        }
    }


def olmo(rng: Random) -> dict[str, Any]:
    return without(widths(rng), "rms_norm_eps") | {
        "rope_scaling": scaling(rng),
        "attention_bias": coin(rng),
        "clip_qkv": rng.choice([None, 0.7]),
    }


def olmo2(rng: Random) -> dict[str, Any]:
    return widths(rng) | {
        "rope_scaling": scaling(rng),
        "attention_bias": coin(rng),
        "hidden_act": rng.choice(["silu", "relu"]),
    }


def olmo3(rng: Random) -> dict[str, Any]:
    # In the older dialect transformers 5 gives sliding layers its default θ, whatever rope_theta says: it takes the key out
    # for the full layers first. Files say 500000, which is the default.
    drawn = without(olmo2(rng), "rope_theta")
    layers = rng.choice([3, 5])
    return drawn | {
        "num_hidden_layers": layers,
        "sliding_window": window(rng),
        "layer_types": rng.choice([None, kinds(rng, layers)]),
    }


def olmo3_by_kind(rng: Random) -> dict[str, Any]:
    drawn = without(olmo3(rng), "rope_scaling")
    yarn: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 28,
        "beta_fast": 8.0,
    }
    return drawn | {
        "rope_parameters": {
            "full_attention": {**rng.choice([yarn, {"rope_type": "default"}]), "rope_theta": 700.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": rng.choice([700.0, 55.0])},
        }
    }


def phi3(rng: Random) -> dict[str, Any]:
    drawn = widths(rng, head_dim=8)
    return (
        drawn
        | rng.choice([{}, {"head_dim": 16}])
        | {
            "partial_rotary_factor": rng.choice([1.0, 0.75, 0.5]),
            "sliding_window": rng.choice([None, window(rng)]),
            "resid_pdrop": rng.choice([0.0, 0.1]),
            "embd_pdrop": rng.choice([0.0, 0.2]),
        }
    )


def cohere(rng: Random) -> dict[str, Any]:
    drawn = without(widths(rng), "rms_norm_eps")
    return drawn | {
        "layer_norm_eps": rng.choice([1e-3, 3e-4]),
        "rope_scaling": scaling(rng),
        "attention_bias": coin(rng),
        "use_qk_norm": coin(rng),
        "logit_scale": rng.choice([0.3, 1.0, 2.5]),
    }


def cohere2(rng: Random) -> dict[str, Any]:
    layers = rng.choice([3, 5])
    options: list[dict[str, Any]] = [{"layer_types": kinds(rng, layers)}, {"sliding_window_pattern": 2}, {}]
    every = rng.choice(options)
    return (
        without(cohere(rng), "use_qk_norm") | every | {"num_hidden_layers": layers, "sliding_window": window(rng)}
    )


def smollm3(rng: Random) -> dict[str, Any]:
    layers = rng.choice([3, 5])
    turned = [1, 0] + [rng.choice([0, 1]) for _ in range(layers - 2)]
    positions: list[dict[str, Any]] = [{"no_rope_layers": turned}, {"no_rope_layer_interval": 2}, {}]
    windows: list[dict[str, Any]] = [
        {"use_sliding_window": True, "sliding_window": window(rng)},
        {"use_sliding_window": True, "sliding_window": window(rng), "layer_types": kinds(rng, layers)},
        {"sliding_window": 5},
        {},
    ]
    more = {"rope_scaling": scaling(rng), "attention_bias": coin(rng), "mlp_bias": coin(rng)}
    return widths(rng) | rng.choice(positions) | rng.choice(windows) | more | {"num_hidden_layers": layers}


def granite(rng: Random) -> dict[str, Any]:
    return widths(rng) | {
        "rope_scaling": scaling(rng),
        "attention_bias": coin(rng),
        "mlp_bias": coin(rng),
        "embedding_multiplier": rng.choice([1.0, 12.0, 0.3]),
        "attention_multiplier": rng.choice([1.0, 0.11]),
        "residual_multiplier": rng.choice([1.0, 0.22]),
        "logits_scaling": rng.choice([1.0, 0.7, 3.0]),
    }


def glm(rng: Random) -> dict[str, Any]:
    return widths(rng) | {
        "head_dim": rng.choice([8, 12]),
        "partial_rotary_factor": rng.choice([0.5, 1.0]),
        "rope_scaling": scaling(rng),
        "attention_bias": coin(rng),
        "hidden_act": rng.choice(["silu", "gelu"]),
    }


def seed_oss(rng: Random) -> dict[str, Any]:
    return widths(rng) | {
        "head_dim": rng.choice([None, 10]),
        "rope_scaling": scaling(rng),
        "attention_bias": coin(rng),
        "attention_out_bias": coin(rng),
        "mlp_bias": coin(rng),
        "residual_dropout": rng.choice([0.0, 0.2]),
    }


def exaone4(rng: Random) -> dict[str, Any]:
    layers = rng.choice([3, 5])
    options: list[dict[str, Any]] = [
        {"sliding_window": window(rng), "layer_types": kinds(rng, layers), "sliding_window_pattern": "LLLG"},
        {"sliding_window": window(rng), "sliding_window_pattern": 2},
        {"sliding_window": None, "layer_types": ["full_attention"] * layers},
    ]
    return widths(rng) | rng.choice(options) | {"num_hidden_layers": layers, "rope_scaling": scaling(rng)}


def helium(rng: Random) -> dict[str, Any]:
    drawn = widths(rng)
    return drawn | {
        "head_dim": drawn["hidden_size"] // drawn["num_attention_heads"],
        "rope_scaling": scaling(rng),
        "attention_bias": coin(rng),
        "mlp_bias": coin(rng),
    }


CASES = [
    Case("mistral", mistral),
    Case("ministral", ministral),
    Case("qwen2", qwen2),
    Case("qwen2", qwen2_layer_types, "layer types"),
    Case("qwen3", qwen3),
    Case("gemma", gemma),
    Case("gemma2", gemma2),
    Case("gemma3_text", gemma3),
    Case("gemma3_text", gemma3_by_kind, "by kind"),
    Case("olmo", olmo),
    Case("olmo2", olmo2),
    Case("olmo3", olmo3),
    Case("olmo3", olmo3_by_kind, "by kind"),
    Case("phi3", phi3),
    Case("cohere", cohere),
    Case("cohere2", cohere2),
    Case("smollm3", smollm3),
    Case("granite", granite),
    Case("glm", glm),
    Case("glm4", glm),
    Case("seed_oss", seed_oss),
    Case("exaone4", exaone4),
    Case("helium", helium),
]
