"""total += a b, the product of bf16 or fp16 matrices added to an fp32 one within the product's own kernel, as an operation of torch.

Otherwise each product is rounded to bf16, written, and read again to be added. An operation of ours, since torch's `addmm` with a dtype is there for CUDA alone,
and its counter of FLOPs stumbles over it (:data:`scratchlm.resources.trace.FLOPS` has ours).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

_library = torch.library.Library("scratchlm", "FRAGMENT")
_library.define("add_product_(Tensor(a!) total, Tensor a, Tensor b) -> ()")


def add_product_(
    total: Float[Tensor, "rows columns"], a: Float[Tensor, "rows inner"], b: Float[Tensor, "inner columns"]
) -> None:
    """total += a @ b, without rounding the product.

    Args:
        total: fp32, changed in place.
        a, b: bf16 or fp16.
    """
    torch.ops.scratchlm.add_product_(total, a, b)


def _in_torch(total: Tensor, a: Tensor, b: Tensor) -> None:
    total += a.float() @ b.float()


def _on_cuda(total: Tensor, a: Tensor, b: Tensor) -> None:
    torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


_library.impl("add_product_", _in_torch, "CompositeExplicitAutograd")
_library.impl("add_product_", _on_cuda, "CUDA")


@torch.library.register_fake("scratchlm::add_product_")
def _(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Nothing comes of it but what is changed."""
