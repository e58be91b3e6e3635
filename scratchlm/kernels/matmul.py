"""y = W x + b by the fastest routine for the place.

::

    where                                   who computes it
    CPU, one vector, fp32 or bf16           `matvec`: a loop over rows at memory's speed
    CPU, rows in fp32, processor by AMD     oneDNN; F.linear would call MKL, whose fp32 products are made for Intel's
    elsewhere                               F.linear

The first two have no gradient and are for reading and writing text; whoever watches (autograd, autocast, a compiler, tracer or
counter) gets F.linear.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from scratchlm.kernels.cpp_here import is_transformed, is_watched
from scratchlm.kernels.hardware import onednn_beats_mkl
from scratchlm.kernels.matvec import matvec


def linear(
    x: Float[Tensor, "... d_in"], weight: Float[Tensor, "d_out d_in"], bias: Float[Tensor, " d_out"] | None = None
) -> Float[Tensor, "... d_out"]:
    """W x + b, as ``torch.nn.functional.linear``; rows of x may be added up in another order."""
    if torch.is_grad_enabled() or not is_plain(x, weight):
        return F.linear(x, weight, bias)
    if x.numel() == x.shape[-1]:
        return matvec(x, weight, bias if bias is None else bias.to(x.dtype))
    if x.dtype == torch.float32 and onednn_beats_mkl():
        bias = bias if bias is None else bias.to(x.dtype)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def is_plain(x: Tensor, weight: Tensor) -> bool:
    """Whether this is a product of rows by a matrix in one dtype, fp32 or bf16, on the CPU, and nobody but autograd watches."""
    return (
        x.dtype in (torch.float32, torch.bfloat16)
        and weight.dtype == x.dtype
        and x.device.type == weight.device.type == "cpu"
        and weight.ndim == 2
        and x.ndim > 0
        and x.shape[-1] == weight.shape[-1]
        and x.numel() > 0 < weight.numel()
        and weight.is_contiguous()
        and nobody_watches(x, weight)
    )


def nobody_watches(x: Tensor, weight: Tensor | None) -> bool:
    """Whether no autocast, compiler, tracer, counter or kind of tensor wants to see torch's own operations on these two."""
    return (
        not is_watched(x)
        and (weight is None or type(weight) in (Tensor, nn.Parameter))
        and not torch.is_autocast_enabled("cpu")
        and not is_transformed()
        and not x.is_neg()
        and (weight is None or not weight.is_neg())
    )
