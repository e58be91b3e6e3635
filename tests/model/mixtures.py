"""A small layer of experts with random weights, for the tests of mixtures and routers."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from scratchlm.model.config import ModelConfig
from scratchlm.model.context import Context, RouterRecord
from scratchlm.model.moe import MixtureOfExperts

D_MODEL, D_FF = 16, 32


def config(
    feedforward: str = "swiglu", feedforward_bias: bool = False, kernels: Any = "fast", **moe: Any
) -> ModelConfig:
    return ModelConfig(
        d_model=D_MODEL,
        heads=2,
        d_ff=D_FF,
        feedforward=feedforward,
        feedforward_bias=feedforward_bias,
        kernels=kernels,
        moe={"experts": 4, **moe},
    )


def mixture(seed: int = 0, **settings: Any) -> MixtureOfExperts:
    """With random weights, biases and (if there is one) correction."""
    module = MixtureOfExperts(config(**settings), layer=3)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in itertools.chain(module.parameters(), module.buffers()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * (0.1 if tensor.ndim == 1 else 0.5))
    return module


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, D_MODEL, generator=torch.Generator().manual_seed(seed))


def run(module: MixtureOfExperts, x: Tensor) -> tuple[Tensor, RouterRecord]:
    context = Context()
    y = module(x, context)
    (record,) = context.routers
    assert record.layer == 3
    return y, record
