"""The small functions of the lectures, written from tensors: softmax, the activations, the soft cap."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def softmax(x: Float[Tensor, " ..."], dim: int = -1) -> Float[Tensor, " ..."]:
    """exp(x) / Σ exp(x) along `dim`, with the maximum subtracted first so that exp never overflows.

    A row that is −inf throughout (nothing may be attended to) gives zeros rather than NaN.
    """
    if x.numel() == 0:  # no maximum to take
        return x
    highest = x.amax(dim=dim, keepdim=True)
    highest = torch.where(highest == float("-inf"), torch.zeros_like(highest), highest)
    exponentials = torch.exp(x - highest)
    total = exponentials.sum(dim=dim, keepdim=True)
    return exponentials / torch.where(total == 0, torch.ones_like(total), total)


def relu(x: Float[Tensor, " ..."]) -> Float[Tensor, " ..."]:
    """max(0, x)."""
    return x.clamp(min=0)


def squared_relu(x: Float[Tensor, " ..."]) -> Float[Tensor, " ..."]:
    """max(0, x)² (Primer: So et al. 2021, arXiv 2109.08668)."""
    return relu(x) ** 2


def sigmoid(x: Float[Tensor, " ..."]) -> Float[Tensor, " ..."]:
    """1 / (1 + exp(−x)): the softmax of x beside 0, so that exp never overflows, which would make the gradient NaN."""
    return softmax(torch.stack([x, torch.zeros_like(x)], dim=-1))[..., 0]


def silu(x: Float[Tensor, " ..."]) -> Float[Tensor, " ..."]:
    """x · σ(x), also called swish (Elfwing et al. 2017, arXiv 1702.03118)."""
    return x * torch.sigmoid(x)


def gelu(x: Float[Tensor, " ..."]) -> Float[Tensor, " ..."]:
    """x · Φ(x) with the normal distribution's Φ (Hendrycks & Gimpel 2016, arXiv 1606.08415)."""
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def gelu_tanh(x: Float[Tensor, " ..."]) -> Float[Tensor, " ..."]:
    """x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³))): the same paper's approximation, GPT-2's choice."""
    return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def soft_cap(x: Float[Tensor, " ..."], cap: float | None) -> Float[Tensor, " ..."]:
    """cap · tanh(x / cap): near x where x is small, never beyond ±cap (Gemma 2, arXiv 2408.00118, section 2); None: x."""
    return x if cap is None else torch.tanh(x / cap) * cap
