"""Llama and its kin."""

from __future__ import annotations

from random import Random
from typing import Any

from transformers_oracle import Case


def widths(rng: Random, *, head_dim: int | None = None) -> dict[str, Any]:
    """Unusual widths: odd vocabulary, heads ≠ kv_heads, d_ff no multiple of anything, ε and θ off their defaults."""
    kv_heads = rng.choice([1, 2, 3])
    heads = kv_heads * rng.choice([2, 3])
    return {
        "vocab_size": rng.choice([83, 101, 127]),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": heads * (head_dim or rng.choice([6, 8])),
        "intermediate_size": rng.choice([37, 53]),
        "num_hidden_layers": rng.choice([2, 3]),
        "max_position_embeddings": 112,
        "rms_norm_eps": rng.choice([1e-3, 3e-4]),
        "rope_theta": rng.choice([500.0, 77.0]),
        "tie_word_embeddings": rng.random() < 0.4,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def scaling(rng: Random) -> dict[str, Any] | None:
    """One of the kinds of RoPE scaling."""
    return rng.choice(
        [
            None,
            {"rope_type": "linear", "factor": 3.0},
            {
                "rope_type": "llama3",
                "factor": 4.0,
                "original_max_position_embeddings": 24,
                "low_freq_factor": 1.0,
                "high_freq_factor": 3.0,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 28, "beta_fast": 8.0},
        ]
    )


def llama(rng: Random) -> dict[str, Any]:
    drawn = widths(rng)
    return drawn | {
        "head_dim": rng.choice([None, 10]),
        "rope_scaling": scaling(rng),
        "attention_bias": rng.random() < 0.5,
        "mlp_bias": rng.random() < 0.5,
        "hidden_act": rng.choice(["silu", "gelu"]),
    }


def arcee(rng: Random) -> dict[str, Any]:
    return llama(rng) | {"hidden_act": rng.choice(["relu2", "gelu_new"])}


CASES = [Case("llama", llama), Case("arcee", arcee)]
