"""Every architectural choice as a small configuration, read from the registry: a new choice is tested the day it is added."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from scratchlm.model import ModelConfig, Transformer, choices

SMALL: dict[str, Any] = {
    "vocab_size": 37,
    "context_length": 24,
    "d_model": 24,
    "layers": 2,
    "heads": 4,
    "d_ff_multiple": 8,
}

NEEDS: dict[str, dict[str, Any]] = {
    "mask = sliding_window": {"window": 5},
    "mask = strided": {"stride": 4},
    "mask = fixed": {"stride": 4, "stride_summary": 2},
    "mask = block_sparse": {"mask_block": 4, "mask_local_blocks": 1, "global_tokens": 2},
    "mask = prefix_lm": {"prefix_length": 5},
    "rope.scaling = linear": {"rope": {"scaling": "linear", "factor": 4.0}},
    "rope.scaling = ntk": {"rope": {"scaling": "ntk", "factor": 4.0}},
    "rope.scaling = yarn": {"rope": {"scaling": "yarn", "factor": 4.0}},
    "rope.scaling = llama3": {"rope": {"scaling": "llama3", "factor": 4.0, "original_context": 12}},
    "attention = mla": {"latent": {"kv_rank": 10, "rope_dim": 4}},
    "residual = scalar": {"residual_init": 0.5},
    "residual = fixed": {"residual_init": 0.5},
    "block = parallel_shared": {},
}
"""What a choice needs beside its name so that it differs from the default."""

LINEAR = ("linear", "retention", "gla", "gated_delta")


def changes_of(axis: str, name: str) -> dict[str, Any]:
    """The fields that set one axis to one name, with what makes the choice visible."""
    section, _, field = axis.rpartition(".")
    fields: dict[str, Any] = {section: {field: name}} if section else {field: name}
    if section == "moe":
        fields["moe"] |= {"experts": 4, "top_k": 2, "router_z_loss": 0.01}
    if section == "linear":
        fields["attention"] = "linear"
    if axis == "attention" and name in LINEAR:
        fields["linear"] = {"chunk": 8}
    return fields | NEEDS.get(f"{axis} = {name}", {})


BESIDE_THE_AXES: dict[str, dict[str, Any]] = {
    "gqa": {"kv_heads": 2},
    "mqa": {"kv_heads": 1},
    "mqa, qk_norm": {"kv_heads": 1, "qk_norm": "head"},
    "tied": {"tied_embeddings": True, "init_embedding_std": 0.1},
    "head_dim": {"head_dim": 10},
    "head_dim, gqa, blocked": {"head_dim": 2, "kv_heads": 2, "attention_kernel": "blocked"},
    "one head": {"heads": 1},
    "d_ff": {"d_ff": 19},
    "d_ff_ratio": {"d_ff_ratio": 1.5},
    "one layer": {"layers": 1},
    "no layers": {"layers": 0},
    "init": {"init_linear_std": 0.3, "init_output_std": 0.2, "init_embedding_std": 0.5},
    "final_norm off": {"final_norm": False},
    "post, final norm": {"norm_placement": "post", "final_norm": True},
    "embedding_norm": {"embedding_norm": True},
    "qk_norm full, layernorm": {"qk_norm": "full", "norm": "layernorm", "kv_heads": 2},
    "qk_norm each, layernorm, gqa": {
        "qk_norm": "each",
        "qk_norm_kind": "layernorm",
        "qk_norm_eps": 0.01,
        "kv_heads": 2,
    },
    "qk_norm each, gated delta": {"qk_norm": "each", "attention": "gated_delta mha", "linear": {"chunk": 8}},
    "qk_norm, no norm": {"qk_norm": "head", "norm": "none"},
    "parallel, post": {"block": "parallel", "norm_placement": "post"},
    "parallel, double, vector": {"block": "parallel", "norm_placement": "double", "residual": "vector"},
    "parallel_shared, double": {"block": "parallel_shared", "norm_placement": "double"},
    "biases": {"attention_bias": "q k v o", "feedforward_bias": True},
    "qv biases": {"attention_bias": "q v", "kv_heads": 2},
    "gated biases": {"feedforward": "swiglu_clamped", "feedforward_bias": True},
    "qkv_clip, gqa": {"qkv_clip": 0.8, "kv_heads": 2},
    "qkv_clip, qk_norm, linear": {
        "qkv_clip": 1.2,
        "qk_norm": "head",
        "attention": "linear mha",
        "linear": {"chunk": 8},
    },
    "rope fraction": {"rope": {"fraction": 0.34}, "head_dim": 12},
    "rope interleaved, yarn": {
        "rope": {"pairs": "interleaved", "scaling": "yarn", "factor": 2.0, "fraction": 0.5},
        "head_dim": 12,
    },
    "yarn, between pairs": {"rope": {"scaling": "yarn", "factor": 4.0, "theta": 100.0, "truncate": False}},
    "every other layer nope": {"position": "rope none"},
    "local and global theta": {
        "rope": {"theta": "100 10000"},
        "mask": "sliding_window causal",
        "window": 4,
    },
    "rope above learned": {"position": "learned rope"},
    "scale, cap, sinks": {"attention_scale": 0.7, "attention_soft_cap": 2.0, "attention_sinks": True},
    "sinks, gqa, window": {
        "attention_sinks": True,
        "kv_heads": 2,
        "mask": "sliding_window causal",
        "window": 4,
    },
    "alibi, sinks, cap": {"position": "alibi", "attention_sinks": True, "attention_soft_cap": 3.0, "heads": 3},
    "alibi, window": {"position": "alibi", "mask": "sliding_window", "window": 6, "heads": 6},
    "blocked, sinks, cap": {
        "attention_sinks": True,
        "attention_soft_cap": 2.0,
        "attention_kernel": "blocked",
        "position": "alibi",
    },
    "flex, sinks, cap": {
        "attention_sinks": True,
        "attention_soft_cap": 2.0,
        "attention_kernel": "flex",
        "position": "alibi",
        "mask": "sliding_window",
        "window": 6,
        "kv_heads": 2,
    },
    "flash, sinks, cap": {
        "attention_sinks": True,
        "attention_soft_cap": 2.0,
        "attention_kernel": "flash",
        "position": "alibi",
        "mask": "sliding_window",
        "window": 6,
        "kv_heads": 2,
    },
    "flash, mla": {
        "attention": "mla",
        "latent": {"kv_rank": 10, "rope_dim": 4, "value_dim": 5},
        "attention_kernel": "flash",
        "mask": "strided causal",
        "stride": 4,
    },
    "three linear, one full": {"layers": 4, "attention": "linear linear linear mha", "linear": {"chunk": 8}},
    "delta and window": {
        "attention": "gated_delta mha",
        "mask": "causal sliding_window",
        "window": 5,
        "linear": {"chunk": 8, "conv_width": 3},
        "kv_heads": 2,
    },
    "gla, no gate, gqa": {"attention": "gla", "kv_heads": 2, "linear": {"chunk": 4, "output_gate": False}},
    "linear recurrent": {"attention": "linear", "linear": {"form": "recurrent"}},
    "delta recurrent, no convolution": {
        "attention": "gated_delta",
        "linear": {"form": "recurrent", "conv_width": 1},
    },
    "mla, q_rank, value_dim": {
        "attention": "mla",
        "latent": {"q_rank": 12, "kv_rank": 10, "rope_dim": 4, "value_dim": 5},
    },
    "mla, eps of its own": {
        "attention": "mla",
        "latent": {"q_rank": 12, "kv_rank": 10, "rope_dim": 4, "norm_eps": 0.03},
    },
    "mla, nope, biases": {"attention": "mla", "position": "none", "attention_bias": "q k v o"},
    "mla and mha": {"attention": "mla mha", "latent": {"kv_rank": 8, "rope_dim": 2}},
    "moe": {"moe": {"experts": 4}},
    "moe, fine-grained, shared": {
        "moe": {"experts": 4, "fine_grained": 2, "shared": 2, "shared_gate": True, "first_dense": 1},
        "feedforward": "relu2",
    },
    "moe, shared width": {"moe": {"experts": 4, "shared": 2, "d_shared": 11}},
    "moe, sigmoid, groups": {
        "moe": {
            "experts": 8,
            "router": "sigmoid",
            "groups": 4,
            "top_groups": 2,
            "bias_update": 0.01,
            "normalise": False,
            "gate_scale": 2.5,
            "every": 2,
        }
    },
    "moe, biases": {"moe": {"experts": 4, "router_bias": True}, "feedforward_bias": True},
    "moe, parallel": {"moe": {"experts": 3, "top_k": 1}, "block": "parallel"},
    "embedding scale": {"embedding_scale": "sqrt_d_model", "logit_scale": 0.25, "logit_soft_cap": 5.0},
    "head bias": {"head_bias": True, "logit_scale": 0.5},
    "head bias, tied, mtp": {
        "head_bias": True,
        "tied_embeddings": True,
        "init_embedding_std": 0.1,
        "mtp_depth": 1,
        "logit_soft_cap": 3.0,
    },
    "mtp": {"mtp_depth": 2, "tied_embeddings": True, "init_embedding_std": 0.1},
}

VARIANTS: dict[str, ModelConfig] = {
    f"{axis.axis} = {name}": ModelConfig(**{**SMALL, **changes_of(axis.axis, name)})
    for axis in choices.AXES
    for name in axis.names
} | {name: ModelConfig(**{**SMALL, **changes}) for name, changes in BESIDE_THE_AXES.items()}


def changed(config: ModelConfig, **changes: Any) -> ModelConfig:
    """The same architecture with other values, checked anew."""
    return ModelConfig(**{**config.model_dump(), **changes})


def reference_of(config: ModelConfig) -> ModelConfig:
    """The same architecture by the lecture's formulas."""
    linear = {**config.linear.model_dump(), "form": "auto"}
    moe = {**config.moe.model_dump(), "dispatch": "auto"}
    return changed(config, kernels="reference", attention_kernel="auto", linear=linear, moe=moe)


@torch.no_grad()
def build(config: ModelConfig, seed: int = 0) -> Transformer:
    """A model in which no parameter is at a value that would hide it (gains, biases and sinks are drawn, too)."""
    model = Transformer(config, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in model.named_parameters():
        role = getattr(parameter, "role", "")
        if role == "norm":
            offset = 0.0 if config.norm == "rmsnorm_unit_offset" and "scale" not in name else 1.0
            parameter.copy_(offset + 0.3 * torch.randn(parameter.shape, generator=generator))
        elif role == "bias" and "decay" not in name:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def random_ids(config: ModelConfig, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def some_now(variants: Mapping[str, ModelConfig], every: int) -> list[Any]:
    """All of them as parameters: one of so many in `make test`, the others in `make test-slow`."""
    return [
        pytest.param(config, id=name, marks=() if number % every == 0 else pytest.mark.slow)
        for number, (name, config) in enumerate(variants.items())
    ]
