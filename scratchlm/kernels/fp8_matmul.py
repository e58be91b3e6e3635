"""y = W x with products in 8-bit floating point, as Hopper and newer GPUs have them (Micikevicius et al. 2022, arXiv 2209.05433).

::

    forward    x ── scale, round ──► e4m3 ─┐
                                           ├─► product, summed in fp32 ──► y   in bf16
               W ── scale, round ──► e4m3 ─┘
    backward   dy ─ scale, round ──► e5m2 ───► times W: dx,   times x: dW      (the same rounded x and W)

Numbers of 8 bits reach to 448 (e4m3: 3 bits of fraction) or 57,344 (e5m2: 2 bits), so each tensor is first multiplied by one factor that takes its largest
entry there, measured anew every time ("dynamic" scaling); the product is divided by both factors. Gradients, which spread wider, get the wider range. What is
kept for the backward pass is kept in 8 bits.

`reference_fp8_linear` rounds in the same way and multiplies in float64; `fp8_linear` asks torch's scaled product, which wants widths that are multiples of 16.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from scratchlm.kernels.derivatives import first_derivative_only

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16
"""Rows and widths of a product have to be multiples of it."""


def to_fp8(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Float[Tensor, ""]]:
    """x · factor rounded to `dtype`, and 1 / factor in fp32; the factor takes the largest |x| to the largest number that there is."""
    largest = torch.finfo(dtype).max
    factor = largest / x.detach().abs().amax().float().clamp(min=1e-12)
    return (x.float() * factor).clamp(-largest, largest).to(dtype), factor.reciprocal()


def fits(x: Float[Tensor, "... d_in"], weight: Float[Tensor, "d_out d_in"]) -> bool:
    """Whether :func:`fp8_linear` can compute this product and both of its gradients."""
    rows = x.numel() // max(1, x.shape[-1])
    return rows > 0 and all(size % MULTIPLE == 0 for size in (rows, *weight.shape))


def reference_fp8_linear(
    x: Float[Tensor, "... d_in"], weight: Float[Tensor, "d_out d_in"]
) -> Float[Tensor, "... d_out"]:
    """The product of the rounded operands, in float64."""
    (x8, x_scale), (w8, w_scale) = to_fp8(x, FORWARD), to_fp8(weight, FORWARD)
    return (x8.double() * x_scale) @ (w8.double() * w_scale).T


def _product(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
    """a bᵀ of two matrices that lie row by row, in bf16: the one layout that Hopper has."""
    # As one factor: after the first of two the sums of large entries would have overflowed.
    one = torch.ones_like(b_scale)
    return torch._scaled_mm(a, b.t(), scale_a=a_scale * b_scale, scale_b=one, out_dtype=torch.bfloat16)


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        (x8, x_scale), (w8, w_scale) = to_fp8(x, FORWARD), to_fp8(weight, FORWARD)
        ctx.save_for_backward(x8, w8, x_scale, w_scale)
        ctx.dtypes = x.dtype, weight.dtype
        return _product(x8, w8, x_scale, w_scale)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x8, w8, x_scale, w_scale = ctx.saved_tensors
        d8, d_scale = to_fp8(grad_outputs[0], BACKWARD)
        d_x = d_weight = None
        if ctx.needs_input_grad[0]:
            d_x = _product(d8, w8.t().contiguous(), d_scale, w_scale).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            d_weight = _product(d8.t().contiguous(), x8.t().contiguous(), d_scale, x_scale).to(ctx.dtypes[1])
        return d_x, d_weight


def fp8_linear(x: Float[Tensor, "... d_in"], weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "... d_out"]:
    """W x in bf16, with gradients in the dtypes of x and W; where :func:`fits`."""
    rows = x.reshape(-1, x.shape[-1])
    out: Tensor = _Fp8Linear.apply(rows, weight)
    return out.view(*x.shape[:-1], weight.shape[0])
