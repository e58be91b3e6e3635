"""y = W x for one vector in bf16 on a CPU: what writing one token at a time mostly is.

Each weight is read once and used once, so the speed is that of memory. torch's bf16 product for a single row stays below it (it
is made for many rows); this one widens each weight to fp32 on the way, a shift by 16 bits, and adds up in fp32.

Where it does not apply (more rows, other dtypes and devices, gradients wanted, inside a compiler) torch's own is called.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


@functools.cache
def _kernels() -> tuple[Callable[..., None], Callable[..., None]]:
    """The loop over rows, on one thread and on several; compiled when first needed."""
    import numba
    from llvmlite import ir
    from numba.core import types
    from numba.extending import intrinsic

    @intrinsic
    def as_float(typing_context: Any, bits: Any) -> Any:
        """The fp32 number that 32 bits stand for."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], ir.FloatType())

        return types.float32(types.uint32), generate

    def rows(weight: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
        for row in numba.prange(weight.shape[0]):
            total = np.float32(0)
            for column in range(weight.shape[1]):
                bits = np.uint32(weight[row, column]) << np.uint32(16)
                total += as_float(bits) * x[column]  # type: ignore[call-arg]
            y[row] = total

    orderless = {"reassoc", "contract", "nsz"}  # sums in any order, so that they run side by side; NaN and ∞ stay
    return (
        numba.njit(fastmath=orderless, nogil=True)(rows),
        numba.njit(fastmath=orderless, nogil=True, parallel=True)(rows),
    )


@functools.cache
def _most_threads() -> int:
    """How many threads numba was started with."""
    import numba

    return int(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel computes this product: one bf16 vector on the CPU, and no gradient is wanted."""
    return (
        x.dtype == torch.bfloat16
        and weight.dtype == torch.bfloat16
        and x.numel() == x.shape[-1] > 0
        and x.device.type == "cpu"
        and weight.is_contiguous()
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def matvec(x: Float[Tensor, "... d_in"], weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "... d_out"]:
    """W x for one vector; bf16 in and out, summed in fp32. See :func:`fits` for when it may be called."""
    y = np.empty(weight.shape[0], np.float32)
    one, several = _kernels()
    threads = torch.get_num_threads()
    kernel = one
    if threads > 1:
        import numba

        numba.set_num_threads(min(threads, _most_threads()))
        kernel = several
    kernel(weight.detach().view(torch.uint16).numpy(), x.detach().float().flatten().numpy(), y)
    return torch.from_numpy(y).to(torch.bfloat16).view(*x.shape[:-1], len(y))


def linear(
    x: Float[Tensor, "... d_in"], weight: Float[Tensor, "d_out d_in"], bias: Float[Tensor, " d_out"] | None = None
) -> Float[Tensor, "... d_out"]:
    """W x + b by the fastest kernel for the place."""
    if x.dtype == torch.bfloat16 and fits(x, weight):
        y = matvec(x, weight)
        return y if bias is None else y + bias
    return F.linear(x, weight, bias)
