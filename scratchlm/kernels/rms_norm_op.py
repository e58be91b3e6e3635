"""RMSNorm as an operation of torch: shapes without computing, the gradient, and the same in torch where the kernels for CPUs do not run.

r = 1/rms = 1 / sqrt(mean(x²) + ε)      y = x r g
upstream dy, d = dy g                   dx = r (d − x r² mean(d x)),  dg = Σ dy x r over all rows

x and one number per row are kept for the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scratchlm.kernels import rows_cpp
from scratchlm.kernels.rms_norm import check_gain


@torch.library.custom_op("scratchlm::rms_norm", mutates_args=())
def rms_norm(x: Tensor, gain: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """y of x (…, width) and a gain in fp32 (width,), in x's dtype and laid out like it; and r, fp32, (…)."""
    check_gain(x, gain)
    if rows_cpp.computes(x):
        return rows_cpp.norm_forward(x, gain, eps)
    wide = x.float()
    inverses = (wide.square().mean(dim=-1) + eps).rsqrt()
    y = wide * inverses.unsqueeze(-1)
    y = y if gain is None else y * gain
    return torch.empty_like(x).copy_(y), inverses


@rms_norm.register_fake
def _(x: Tensor, gain: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("scratchlm::rms_norm_backward", mutates_args=())
def rms_norm_backward(d_y: Tensor, x: Tensor, gain: Tensor | None, inverses: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x, laid out like it, and of the gain, fp32 (an empty one without a gain)."""
    if rows_cpp.computes(x):
        d_x, d_gain = rows_cpp.norm_backward(d_y, x, gain, inverses)
        return d_x, inverses.new_empty(0) if d_gain is None else d_gain
    d_x, d_gain = backward_formula(d_y, x, gain, inverses)
    return torch.empty_like(x).copy_(d_x), inverses.new_empty(0) if d_gain is None else d_gain


def backward_formula(d_y: Tensor, x: Tensor, gain: Tensor | None, inverses: Tensor) -> tuple[Tensor, Tensor | None]:
    """The gradients of x, in its dtype, and of the gain, by torch."""
    upstream, wide, r = d_y.float(), x.float(), inverses.unsqueeze(-1)
    d = upstream if gain is None else upstream * gain
    d_x = r * (d - wide * r.square() * (d * wide).mean(dim=-1, keepdim=True))
    d_gain = None if gain is None else (upstream * wide * r).reshape(-1, x.shape[-1]).sum(dim=0)
    return d_x.to(x.dtype), d_gain


@rms_norm_backward.register_fake
def _(d_y: Tensor, x: Tensor, gain: Tensor | None, inverses: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), inverses.new_empty(0 if gain is None else x.shape[-1])


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor | None, float], output: tuple[Tensor, Tensor]) -> None:
    x, gain, _ = inputs
    ctx.save_for_backward(x, gain, output[1])


def _gradients(ctx: Any, d_y: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, gain, inverses = ctx.saved_tensors
    d_x, d_gain = rms_norm_backward(d_y, x, gain, inverses)
    return d_x, None if gain is None else d_gain, None


rms_norm.register_autograd(_gradients, setup_context=_setup)
