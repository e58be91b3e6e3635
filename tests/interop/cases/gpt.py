"""The GPT era: fused weights, learned positions, ALiBi, partial RoPE, branches side by side."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from transformers_oracle import Case

from cases.dense import scaling, widths

IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def coin(rng: Random) -> bool:
    return rng.random() < 0.5


def old_widths(rng: Random, head_dim: int | None = None) -> dict[str, Any]:
    """GPT-2's names; unusual values as in `widths`."""
    heads = rng.choice([3, 4, 6])  # ALiBi's slopes are others where this is no power of two
    return IDS | {
        "vocab_size": rng.choice([83, 101, 127]),
        "n_embd": heads * (head_dim or rng.choice([5, 8])),
        "n_layer": rng.choice([2, 3]),
        "n_head": heads,
        "n_positions": 112,
        "layer_norm_epsilon": rng.choice([1e-3, 3e-4]),
        "tie_word_embeddings": coin(rng),
        "attn_pdrop": 0.2,
        "embd_pdrop": 0.3,
        "resid_pdrop": 0.25,
    }


def without(drawn: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in drawn.items() if name not in names}


def new_widths(rng: Random, *left_out: str, eps: str = "layer_norm_eps") -> dict[str, Any]:
    """Llama's names, LayerNorm's ε."""
    drawn = widths(rng, head_dim=rng.choice([8, 10]))
    return without(drawn, "rms_norm_eps", *left_out) | {eps: rng.choice([1e-3, 3e-4])}


def gpt1(rng: Random) -> dict[str, Any]:
    return old_widths(rng) | {"afn": rng.choice(["gelu", "relu", "silu"])}


def gpt2(rng: Random) -> dict[str, Any]:
    return old_widths(rng) | {
        "n_inner": rng.choice([None, 37]),
        "activation_function": rng.choice(["gelu_new", "relu", "gelu"]),
        "scale_attn_weights": coin(rng),
    }


def gpt_neo(rng: Random) -> dict[str, Any]:
    drawn = without(
        old_widths(rng), "n_embd", "n_layer", "n_head", "n_positions", "attn_pdrop", "embd_pdrop", "resid_pdrop"
    )
    heads = rng.choice([3, 4])
    types: list[Any] = rng.choice(
        [[[["global", "local"], 2]], [[["global"], 1], [["local"], 2]], [[["local", "global"], 1]]]
    )
    return drawn | {
        "hidden_size": heads * 6,
        "num_heads": heads,
        "attention_types": types,
        "num_layers": sum(len(group) * times for group, times in types),
        "window_size": rng.choice([5, 13]),
        "max_position_embeddings": 112,
        "intermediate_size": rng.choice([None, 37]),
        "activation_function": rng.choice(["gelu_new", "relu"]),
        "resid_dropout": 0.1,
        "embed_dropout": 0.2,
        "attention_dropout": 0.3,
    }


def gptj(rng: Random) -> dict[str, Any]:
    head_dim = rng.choice([6, 10])
    return old_widths(rng, head_dim) | {
        "rotary_dim": rng.choice([4, head_dim]),
        "n_inner": rng.choice([None, 37]),
        "activation_function": rng.choice(["gelu_new", "silu"]),
    }


def partial(rng: Random, default: float) -> dict[str, Any]:
    """RoPE of a part of each head, in the older keys or the newer."""
    share, theta, scaled = rng.choice([0.2, 0.4, 0.6, 1.0]), rng.choice([500.0, 77.0]), scaling(rng)
    if coin(rng):
        return {"partial_rotary_factor": share, "rope_theta": theta, "rope_scaling": scaled}
    given = {"rope_theta": theta, **(scaled or {"rope_type": "default"})}
    return {"rope_parameters": given | ({"partial_rotary_factor": share} if default != share else {})}


def neox(rng: Random) -> dict[str, Any]:
    drawn = new_widths(rng, "num_key_value_heads", "rope_theta")
    share = rng.choice([0.2, 0.6, 1.0])
    rope: dict[str, Any] = {"rotary_pct": share, "rotary_emb_base": 333, "rope_scaling": scaling(rng)}
    if coin(rng):
        given = {"rope_theta": 333.0, "partial_rotary_factor": share, **(scaling(rng) or {"rope_type": "default"})}
        rope = {"rope_parameters": given}
    drawn["hidden_size"] = drawn["num_attention_heads"] * 10
    return (
        drawn
        | rope
        | {
            "use_parallel_residual": coin(rng),
            "attention_bias": coin(rng),
            "hidden_act": rng.choice(["gelu", "gelu_new", "relu"]),
            "attention_dropout": 0.1,
            "hidden_dropout": 0.2,
        }
    )


def falcon(rng: Random) -> dict[str, Any]:
    drawn = new_widths(rng, "num_key_value_heads", "intermediate_size", eps="layer_norm_epsilon")
    return drawn | {
        "bias": coin(rng),
        "rope_scaling": scaling(rng),
        "activation": rng.choice(["gelu", "relu"]),
        "ffn_hidden_size": rng.choice([None, 53]),
        "alibi": False,
        "new_decoder_architecture": False,
        "multi_query": coin(rng),
        "parallel_attn": True,
        "attention_dropout": 0.1,
        "hidden_dropout": 0.2,
    }


def falcon_new(rng: Random) -> dict[str, Any]:
    drawn = falcon(rng)
    return drawn | {
        "num_attention_heads": 6,
        "num_kv_heads": rng.choice([1, 2, 3, 6]),
        "hidden_size": 6 * rng.choice([6, 8]),
        "new_decoder_architecture": True,
        "num_ln_in_parallel_attn": rng.choice([None, 1, 2]),
    }


def bloom(rng: Random) -> dict[str, Any]:
    drawn = old_widths(rng)
    width = drawn["n_embd"]
    return without(drawn, "n_positions", "n_embd", "attn_pdrop", "embd_pdrop", "resid_pdrop") | {
        rng.choice(["hidden_size", "n_embed"]): width,
        "attention_dropout": 0.1,
        "hidden_dropout": 0.2,
        "seq_length": 112,
    }


def mpt(rng: Random) -> dict[str, Any]:
    heads = rng.choice([3, 4, 6])
    attention = {"attn_pdrop": 0, "clip_qkv": rng.choice([None, 0.6]), "softmax_scale": rng.choice([None, 0.7])}
    return IDS | {
        "vocab_size": rng.choice([83, 101]),
        "d_model": heads * rng.choice([5, 8]),
        "n_heads": heads,
        "n_layers": rng.choice([2, 3]),
        "max_seq_len": 112,
        "layer_norm_epsilon": rng.choice([1e-3, 3e-4]),
        "tie_word_embeddings": coin(rng),
        "attn_config": attention | {"alibi": True},
    }


def phi(rng: Random) -> dict[str, Any]:
    drawn = new_widths(rng, "rope_theta") | partial(rng, default=0.5)
    drawn["hidden_size"] = drawn["num_attention_heads"] * 10
    return drawn | {
        "qk_layernorm": coin(rng),
        "hidden_act": rng.choice(["gelu_new", "gelu"]),
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.2,
        "attention_dropout": 0.3,
    }


def bigcode(rng: Random) -> dict[str, Any]:
    return old_widths(rng) | {
        "multi_query": coin(rng),
        "n_inner": rng.choice([None, 37]),
        "activation_function": rng.choice(["gelu_pytorch_tanh", "gelu"]),
        "scale_attn_weights": coin(rng),
    }


def starcoder2(rng: Random) -> dict[str, Any]:
    return new_widths(rng, eps="norm_epsilon") | {
        "use_bias": coin(rng),
        "sliding_window": rng.choice([None, 7, 16]),
        "rope_scaling": scaling(rng),
        "hidden_act": rng.choice(["gelu_pytorch_tanh", "relu"]),
        "residual_dropout": 0.1,
        "embedding_dropout": 0.2,
        "attention_dropout": 0.3,
    }


def stablelm(rng: Random) -> dict[str, Any]:
    drawn = new_widths(rng, "rope_theta") | partial(rng, default=0.25)
    drawn["hidden_size"] = drawn["num_attention_heads"] * 20
    return drawn | {
        "use_qkv_bias": coin(rng),
        "qk_layernorm": coin(rng),
        "use_parallel_residual": coin(rng),
        "hidden_act": rng.choice(["silu", "gelu"]),
        "attention_dropout": 0.1,
        "hidden_dropout": 0.2,
    }


def fixed(draw: Callable[[Random], dict[str, Any]], **values: Any) -> Callable[[Random], dict[str, Any]]:
    """As `draw`, but for these: what a few seeds may miss."""
    return lambda rng: draw(rng) | values


CASES = [
    Case("openai-gpt", gpt1),
    Case("openai-gpt", fixed(gpt1, afn="gelu"), title="released"),
    Case("gpt2", gpt2),
    Case("gpt2", fixed(gpt2, n_inner=None, activation_function="gelu_new"), title="released"),
    Case("gpt_neo", gpt_neo),
    Case(
        "gpt_neo",
        fixed(gpt_neo, attention_types=[[["global", "local"], 2]], num_layers=4, intermediate_size=37),
        title="alternating",
    ),
    Case("gptj", gptj),
    Case("gptj", fixed(gptj, rotary_dim=4, n_inner=None), title="released"),
    Case("gpt_neox", neox),
    Case(
        "gpt_neox",
        fixed(neox, use_parallel_residual=True, attention_bias=True, hidden_act="gelu"),
        title="released",
    ),
    Case("falcon", fixed(falcon, multi_query=True), title="7b"),
    Case("falcon", fixed(falcon, multi_query=False), title="full"),
    Case("falcon", fixed(falcon, parallel_attn=False), title="serial"),
    Case("falcon", fixed(falcon, parallel_attn=False, multi_query=True), title="serial-7b"),
    Case("falcon", falcon_new, title="new"),
    Case("falcon", fixed(falcon_new, num_ln_in_parallel_attn=None, num_kv_heads=2, bias=True), title="40b"),
    Case("falcon", fixed(falcon_new, num_ln_in_parallel_attn=1, num_kv_heads=3), title="11b"),
    # Its own GELU has √(2/π) and the constants of its gradient to eight digits.
    Case("bloom", bloom, tolerance=1e-7),
    Case("mpt", mpt),
    Case("mpt", fixed(mpt, tie_word_embeddings=True), title="released"),
    Case("phi", phi),
    Case("gpt_bigcode", bigcode),
    Case("gpt_bigcode", fixed(bigcode, multi_query=True, n_inner=None), title="released"),
    Case("starcoder2", starcoder2),
    Case("starcoder2", fixed(starcoder2, use_bias=True, sliding_window=7), title="released"),
    Case("stablelm", stablelm),
    Case("stablelm", fixed(stablelm, use_parallel_residual=True, qk_layernorm=True), title="12b"),
]
