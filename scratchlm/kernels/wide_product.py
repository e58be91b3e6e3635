"""total = a b or total += a b, products of bf16 or fp16 matrices in fp32 within the product's own kernel, as an operation of torch.

Otherwise each product is rounded to bf16, written, and read again to be widened and added. An operation of ours, since torch's `addmm` with a dtype is there for CUDA alone,
and its counter of FLOPs stumbles over it (:data:`scratchlm.resources.trace.FLOPS` has ours).
"""

from __future__ import annotations

import functools

import torch
from jaxtyping import Float
from torch import Tensor

SOME = 256
"""Rows and columns that are widened at a time, where there is no such product."""

_library = torch.library.Library("scratchlm", "FRAGMENT")
_library.define("product_(Tensor(a!) total, Tensor a, Tensor b, bool add) -> ()")


def product_(
    total: Float[Tensor, "rows columns"],
    a: Float[Tensor, "rows inner"],
    b: Float[Tensor, "inner columns"],
    *,
    add: bool,
) -> None:
    """total = a @ b, or total + a @ b, without rounding the product.

    Args:
        total: fp32, changed in place.
        a, b: bf16 or fp16.
        add: whether what is in `total` counts.
    """
    torch.ops.scratchlm.product_(total, a, b, add)


def _in_torch(total: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    if not add:
        total.zero_()
    for x, y in zip(a.split(SOME, dim=1), b.split(SOME), strict=True):
        wide = y.float()
        for part, rows in zip(total.split(SOME), x.split(SOME), strict=True):
            part.addmm_(rows.float(), wide)


def _on_cuda(total: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    torch.addmm(total, a, b, beta=int(add), out_dtype=torch.float32, out=total)


_library.impl("product_", _in_torch, "CompositeExplicitAutograd")
_library.impl("product_", _on_cuda, "CUDA")


@functools.cache
def works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has such a product of this dtype on a CUDA device, found by asking for a small one: not every version, library and maker has it."""
    try:
        ones = torch.ones(16, 16, dtype=dtype, device=device)
        total = torch.ones(16, 16, device=device)
        _on_cuda(total, ones, ones, add=True)
        return bool((total == 17).all())
    except (RuntimeError, TypeError):
        return False


@torch.library.register_fake("scratchlm::product_")
def _(total: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """Nothing comes of it but what is changed."""
