"""Normalisation layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / RMS(x) · g, computed in fp32 and returned in x's dtype (Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4).

    RMS(x) = sqrt(mean(x²) + ε)
    """

    def __init__(self, width: int, eps: float = 1e-5, *, reference: bool = False) -> None:
        super().__init__()
        self.width, self.eps = width, eps
        self.reference = reference
        self.weight = nn.Parameter(torch.ones(width))
        self.weight.role = "norm"  # type: ignore[attr-defined]

    def forward(self, x: Float[Tensor, "... width"]) -> Float[Tensor, "... width"]:
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        if self.reference:
            rms = torch.sqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
            return (wide / rms * self.weight).to(x.dtype)
        return F.rms_norm(wide, (self.width,), self.weight.to(wide.dtype), self.eps).to(x.dtype)

    def num_params(self) -> int:
        return self.width

    def flops_per_token(self) -> int:
        """Only matrix products are counted, as everywhere in ScratchLM: a norm is bound by memory, not arithmetic."""
        return 0


class NoNorm(nn.Module):
    """The identity, in a norm's place."""

    def __init__(self, width: int, eps: float = 0.0, *, reference: bool = False) -> None:
        super().__init__()

    def forward(self, x: Float[Tensor, "... width"]) -> Float[Tensor, "... width"]:
        return x

    def num_params(self) -> int:
        return 0

    def flops_per_token(self) -> int:
        return 0
