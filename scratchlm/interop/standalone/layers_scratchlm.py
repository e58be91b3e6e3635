"""What the model's other pages are made of: small functions, linear layers, norms."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def widened(x: Tensor) -> Tensor:
    """x in fp32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """c · tanh(x / c): near x where x is small, never beyond ±c."""
    return x if cap is None else cap * torch.tanh(x / cap)


def at(pattern: list[Any], layer: int) -> Any:
    """A pattern of values is repeated over the layers."""
    return pattern[layer % len(pattern)]


class PartlyBiasedLinear(nn.Linear):
    """Several projections in one matrix, of which only some have a bias; only theirs is stored."""

    def __init__(self, d_in: int, parts: list[int], biased: list[bool]) -> None:
        super().__init__(d_in, sum(parts), bias=False)
        self.sizes, self.biased = parts, biased
        self.bias = nn.Parameter(torch.zeros(sum(size for size, has in zip(parts, biased, strict=True) if has)))

    def forward(self, x: Tensor) -> Tensor:
        stored = iter(self.bias.split([size for size, has in zip(self.sizes, self.biased, strict=True) if has]))
        rows = [
            next(stored) if has else self.bias.new_zeros(size)
            for size, has in zip(self.sizes, self.biased, strict=True)
        ]
        return F.linear(x, self.weight, torch.cat(rows))


def linear(d_in: int, *parts: int, bias: bool | list[bool] = False) -> nn.Linear:
    """A linear layer whose rows are several projections, all, none or some of them with a bias."""
    biased = [bias] * len(parts) if isinstance(bias, bool) else bias
    if any(biased) and not all(biased):
        return PartlyBiasedLinear(d_in, list(parts), biased)
    return nn.Linear(d_in, sum(parts), bias=any(biased))


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dimension, computed in fp32 at least."""

    def __init__(self, kind: str, *shape: int, eps: float) -> None:
        super().__init__()
        self.eps, self.centred = eps, kind.startswith("layernorm")
        self.offset = 1.0 if kind == "rmsnorm_unit_offset" else 0.0
        self.start = 1.0 - self.offset
        scaled = kind in ("rmsnorm", "rmsnorm_unit_offset", "layernorm", "layernorm_nobias")
        self.weight = nn.Parameter(torch.full(shape, self.start)) if scaled else None
        self.bias = nn.Parameter(torch.zeros(shape)) if kind == "layernorm" else None

    def forward(self, x: Tensor) -> Tensor:
        y = widened(x)
        if self.centred:
            y = y - y.mean(dim=-1, keepdim=True)
        y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + self.eps)
        if self.weight is not None:
            y = y * (self.weight.to(y.dtype) + self.offset)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.to(x.dtype)


def norm(c: SimpleNamespace, width: int) -> nn.Module:
    """The model's own kind of norm."""
    return nn.Identity() if c.norm == "none" else Norm(c.norm, width, eps=c.norm_eps)


class QKNorm(nn.Module):
    """Queries or keys (b, t, h, d) normed per head, with one gain for all or each its own, or over all heads together."""

    def __init__(self, c: SimpleNamespace, heads: int) -> None:
        super().__init__()
        self.kind = c.qk_norm
        shape = {"head": (c.head_dim,), "each": (heads, c.head_dim), "full": (heads * c.head_dim,)}.get(self.kind)
        self.norm = Norm(c.qk_norm_kind, *shape, eps=c.qk_norm_eps) if shape else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(-2)).view_as(x) if self.kind == "full" else self.norm(x)
