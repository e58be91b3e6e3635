"""The small functions of the lectures, written from tensors: softmax, SiLU."""

from __future__ import annotations

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


def silu(x: Float[Tensor, " ..."]) -> Float[Tensor, " ..."]:
    """x · σ(x), also called swish (Elfwing et al. 2017, arXiv 1702.03118)."""
    return x * torch.sigmoid(x)
