"""Every architectural choice as a small configuration, read from the registry: a new choice is tested the day it is added."""

from __future__ import annotations

from typing import Any

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

BESIDE_THE_AXES: dict[str, dict[str, Any]] = {
    "gqa": {"kv_heads": 2},
    "mqa": {"kv_heads": 1},
    "mqa, qk_norm": {"kv_heads": 1, "qk_norm": "rmsnorm"},
    "tied": {"tied_embeddings": True, "init_embedding_std": 0.1},
    "head_dim": {"head_dim": 10},
    "head_dim, gqa, blocked": {"head_dim": 2, "kv_heads": 2, "attention_kernel": "blocked"},
    "one head": {"heads": 1},
    "d_ff": {"d_ff": 19},
    "d_ff_ratio": {"d_ff_ratio": 1.5},
    "one layer": {"layers": 1},
    "no layers": {"layers": 0},
    "init": {"init_linear_std": 0.3, "init_output_std": 0.2, "init_embedding_std": 0.5},
}

VARIANTS: dict[str, ModelConfig] = {
    f"{axis.axis} = {name}": ModelConfig(**{**SMALL, axis.axis: name})
    for axis in choices.AXES
    for name in axis.names
} | {name: ModelConfig(**{**SMALL, **changes}) for name, changes in BESIDE_THE_AXES.items()}


def reference_of(config: ModelConfig) -> ModelConfig:
    """The same architecture by the lecture's formulas."""
    return ModelConfig(**{**config.model_dump(), "kernels": "reference", "attention_kernel": "auto"})


@torch.no_grad()
def build(config: ModelConfig, seed: int = 0) -> Transformer:
    """A model in which no parameter is at a value that would hide it (norm gains are drawn, too)."""
    model = Transformer(config, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def random_ids(config: ModelConfig, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
