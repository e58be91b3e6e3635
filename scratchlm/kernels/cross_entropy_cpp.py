"""Loss and gradient of a block of logits on a CPU, in C++: `_loss_and_gradient` of `cross_entropy.py`, the gradient in the logits' place.

What `cross_entropy.cpp` does with tensors; the picture is there. What torch.compile makes of the formula goes over the block three times, and keeps
exponentials and gradient beside it; here a row comes from memory once and goes back once. For fp32 and bf16; sums are fp32, and two runs agree to
the bit, whatever the number of threads.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scratchlm.kernels import cpp_here, triton_here

if TYPE_CHECKING:
    from scratchlm.kernels.cross_entropy import HeadOptions

SOURCE = Path(__file__).with_name("cross_entropy.cpp")
OTHERWISE = "the loss's gradient is computed by torch, which is slower"
DTYPES = (torch.float32, torch.bfloat16)


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL:
    """The kernel for a dtype, compiled if need be.

    Raises:
        NoKernel: it cannot be had here.
    """
    return cpp_here.kernels(SOURCE, dtype, {"cross_entropy": ctypes.c_int64})


def is_offered(device: torch.device, dtype: torch.dtype, options: HeadOptions) -> bool:
    """Whether the kernel is for this, if it can be compiled. Nothing is compiled to find out."""
    if torch.compiler.is_compiling():  # a graph has the formula
        return False
    on_cpu = device.type == "cpu" and not triton_here.takes(device) and cpp_here.compiler() is not None
    return on_cpu and dtype in DTYPES and options.soft_cap is None and options.scale > 0


def runs(dtype: torch.dtype) -> bool:
    """Whether it is there: the first question of a process compiles or loads it, and a failure is told of once."""
    return cpp_here.is_there(library, dtype, OTHERWISE)


def loss_and_gradient(
    products: Float[Tensor, "rows vocab"],
    targets: Int[Tensor, " rows"],
    options: HeadOptions,
    *,
    wants_gradient: bool = True,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, "rows vocab"]]:
    """Objective and cross-entropy of a block of rows in fp32, and `products`, now their own gradient.

    Args:
        products: bf16 or fp32, contiguous. Overwritten.
        targets: whole numbers, (rows,) or what spreads over them; IGNORE_INDEX counts for nothing.
        options: scale and z-loss; no soft cap.
        wants_gradient: without it the logits stay.

    Raises:
        IndexError: a target is none of the vocabulary's.
        NoKernel: there is none for the dtype.
    """
    sums = _sums(products.contiguous(), targets, options.scale, options.z_loss, wants_gradient)
    loss, total = sums.sum(dim=1)
    return total, loss, products


@torch.library.custom_op("scratchlm::loss_and_gradient_", mutates_args=("products",))
def _sums(products: Tensor, targets: Tensor, scale: float, z_loss: float, wants_gradient: bool) -> Tensor:
    """Cross-entropy and objective per row, fp32, (2, rows); an operation, so that who watches sees it."""
    from scratchlm.kernels.cross_entropy import IGNORE_INDEX

    kernel = library(products.dtype).cross_entropy
    rows, vocab = products.shape
    targets = targets.to(torch.int64).expand(rows).contiguous()
    sums = products.new_empty(2, rows, dtype=torch.float32)
    threads = torch.get_num_threads()
    memory = products.new_empty(threads, (vocab + 15) // 16 * 16, dtype=torch.float32)
    numbers = ctypes.c_float(scale), ctypes.c_float(z_loss), int(wants_gradient)
    sizes = ctypes.c_int64(rows), ctypes.c_int64(vocab), ctypes.c_int64(IGNORE_INDEX)
    given = ctypes.c_void_p(products.data_ptr()), ctypes.c_void_p(targets.data_ptr())
    made = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (*sums, memory))
    strange = kernel(*given, *sizes, *numbers, *made, threads)
    if strange:
        raise IndexError(f"{strange} of {rows} targets are no tokens of the vocabulary of {vocab}")
    return sums


@_sums.register_fake
def _(products: Tensor, *_: Any) -> Tensor:
    return products.new_empty(2, products.shape[0], dtype=torch.float32)
