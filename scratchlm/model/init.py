"""Initialisation schemes.

    scheme             linear (d_out × d_in)                 embedding     norm    residual outputs, head
    truncated_normal   N(0, 2/(d_in + d_out)), cut at ±3σ    N(0, 1), ±3σ  1       as linear, or `init_output_std`

A matrix that stores several projections (q‖k‖v, gate‖up) is initialised part by part, with each part's own d_out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from scratchlm.model.config import ModelConfig
from scratchlm.model.linear import Embedding, Linear


def _fill(weight: Tensor, std: float, generator: torch.Generator | None) -> None:
    if std == 0:
        nn.init.zeros_(weight)
    else:
        nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std, generator=generator)


@torch.no_grad()
def truncated_normal(model: nn.Module, config: ModelConfig, generator: torch.Generator | None = None) -> None:
    """Glorot's variance (Glorot & Bengio 2010, eq. 12), drawn from a normal cut at three standard deviations."""
    for module in model.modules():
        if isinstance(module, Linear):
            for part in module.weight.split(module.parts):
                std = config.init_linear_std
                if module.residual_output and config.init_output_std is not None:
                    std = config.init_output_std
                if std is None:
                    std = math.sqrt(2.0 / (module.d_in + part.shape[0]))
                _fill(part, std, generator)
        elif isinstance(module, Embedding):
            _fill(module.weight, config.init_embedding_std, generator)
