"""Initialisation schemes.

    scheme             linear (d_out × d_in)                 embedding     residual outputs                      cut
    truncated_normal   N(0, 2/(d_in + d_out))                N(0, 1)       as linear                             ±3σ
    normal             N(0, 0.02²)                           as linear     as linear                             none
    gpt2               N(0, 0.02²)                           as linear     N(0, 0.02² / (2 layers))              none
    depth_scaled       N(0, 2/(d_in + d_out))                N(0, 1)       linear's σ / √(2 (layer + 1))         ±3σ

    A tied embedding, which is the head as well, starts from σ = 1 / √d_model at most, so that the first guess is near uniform.
    Norm gains start at 1, biases and sinks at 0; learned positions as the embedding; an expert as a linear of its own.
    `init_linear_std`, `init_embedding_std` and `init_output_std` (residual outputs and the head) replace a scheme's σ;
    without `init_output_std` the head is initialised as any linear.

A matrix that stores several projections (q‖k‖v, gate‖up) is initialised part by part, with each part's own d_out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from scratchlm.model.config import ModelConfig
from scratchlm.model.linear import Embedding

Sigma = Callable[[int, int], float]


def _fill(weight: Tensor, std: float, generator: torch.Generator | None, cut: bool) -> None:
    if std == 0:
        nn.init.zeros_(weight)
    elif cut:
        nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std, generator=generator)
    else:
        nn.init.normal_(weight, std=std, generator=generator)


def _layer_of(name: str, layers: int) -> int | None:
    """The number of the block a module lies in, those of the predictions after the last one; None outside of blocks."""
    found = re.match(r"(blocks|predictions)\.(\d+)\.", name)
    return int(found[2]) + (layers if found[1] == "predictions" else 0) if found else None


@torch.no_grad()
def _initialise(
    model: nn.Module,
    config: ModelConfig,
    generator: torch.Generator | None,
    *,
    linear: Sigma,
    embedding: float,
    output: Callable[[float, int], float],
    cut: bool,
) -> None:
    """Fill every weight of `model`.

    Args:
        model, config, generator: as for the schemes.
        linear: σ of a linear weight from (d_in, d_out).
        embedding: σ of embeddings.
        output: σ of the last linear of a residual branch from (σ of a linear, layer).
        cut: whether values beyond ±3σ are drawn again.
    """
    tokens = embedding
    if config.init_embedding_std is not None:
        tokens = embedding = config.init_embedding_std
    elif config.tied_embeddings:  # as a head, N(0, 1) would give logits of σ = √d_model
        tokens = min(embedding, config.d_model**-0.5)
    for name, module in model.named_modules():
        own = getattr(module, "initialise", None)
        if own is not None:  # pieces with weights of a kind that no scheme speaks of
            own(generator)
        if isinstance(module, Embedding) or getattr(getattr(module, "weight", None), "role", "") == "embedding":
            _fill(module.weight, tokens if isinstance(module, Embedding) else embedding, generator, cut)
        elif hasattr(module, "parts") and hasattr(module, "d_in"):  # Linear, and the experts' stacked ones
            for part in module.weight.split(module.parts, dim=-2):
                std = linear(module.d_in, part.shape[-2])
                std = std if config.init_linear_std is None else config.init_linear_std
                if module.residual_output:
                    layer = _layer_of(name, config.layers)
                    if config.init_output_std is not None:
                        std = config.init_output_std
                    elif layer is not None:
                        std = output(std, layer)
                _fill(part, std, generator, cut)


def _glorot(d_in: int, d_out: int) -> float:
    return math.sqrt(2.0 / (d_in + d_out))


def truncated_normal(model: nn.Module, config: ModelConfig, generator: torch.Generator | None = None) -> None:
    """Glorot's variance (Glorot & Bengio 2010, eq. 12), drawn from a normal cut at three standard deviations: the course's."""
    _initialise(model, config, generator, linear=_glorot, embedding=1.0, output=lambda std, layer: std, cut=True)


def normal(model: nn.Module, config: ModelConfig, generator: torch.Generator | None = None) -> None:
    """σ = 0.02 everywhere (GPT-1, BERT, Llama as Hugging Face builds it)."""
    _initialise(
        model,
        config,
        generator,
        linear=lambda d_in, d_out: 0.02,
        embedding=0.02,
        output=lambda std, layer: std,
        cut=False,
    )


def gpt2(model: nn.Module, config: ModelConfig, generator: torch.Generator | None = None) -> None:
    """σ = 0.02, residual outputs divided by √(2 · layers) (Radford et al. 2019, section 2.3)."""
    depth = math.sqrt(2 * max(1, config.layers))
    _initialise(
        model,
        config,
        generator,
        linear=lambda d_in, d_out: 0.02,
        embedding=0.02,
        output=lambda std, layer: std / depth,
        cut=False,
    )


def depth_scaled(model: nn.Module, config: ModelConfig, generator: torch.Generator | None = None) -> None:
    """Glorot's, with the residual outputs of layer l divided by √(2 (l + 1)): later layers start smaller, so that each adds
    its share to a stream that has grown (Zhang et al. 2019, arXiv 1908.11365; lingua)."""
    _initialise(
        model,
        config,
        generator,
        linear=_glorot,
        embedding=1.0,
        output=lambda std, layer: std / math.sqrt(2 * (layer + 1)),
        cut=True,
    )
