"""y = W x for one vector in bf16 on a CPU: what writing one token at a time mostly is.

Each weight is read once and used once, so the speed is that of memory. torch's bf16 product for a single row stays below it (it
is made for many rows); this one widens each weight to fp32 on the way, a shift by 16 bits, and adds up in fp32.

Where it does not apply (more rows, other dtypes and devices, gradients wanted, inside a compiler) torch's own is called.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


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
    """Whether the kernel computes this product: one plain bf16 vector on the CPU, and nobody watches (no gradient, no autocast,
    no compiler, tracer or counter)."""
    return (
        x.dtype == torch.bfloat16
        and weight.dtype == torch.bfloat16
        and x.numel() == x.shape[-1] == weight.shape[-1] > 0
        and weight.ndim == 2
        and x.device.type == weight.device.type == "cpu"
        and weight.is_contiguous()
        and type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and not (x.is_neg() or weight.is_neg())
    )


_process = os.getpid()
_parallel = threading.Lock()
"""Not every threading layer of numba may be entered twice at once, and none by the child of a fork."""


def matvec(x: Float[Tensor, "... d_in"], weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "... d_out"]:
    """W x for one vector; bf16 in and out, summed in fp32. See :func:`fits` for when it may be called."""
    y = np.empty(weight.shape[0], np.float32)
    one, several = _kernels()
    arrays = weight.detach().view(torch.uint16).numpy(), x.detach().float().flatten().numpy(), y
    threads = min(torch.get_num_threads(), _most_threads())
    if threads > 1 and os.getpid() == _process and _parallel.acquire(blocking=False):
        try:
            import numba

            numba.set_num_threads(threads)
            several(*arrays)
        finally:
            _parallel.release()
    else:
        one(*arrays)
    return torch.from_numpy(y).to(torch.bfloat16).view(*x.shape[:-1], len(y))


def linear(
    x: Float[Tensor, "... d_in"], weight: Float[Tensor, "d_out d_in"], bias: Float[Tensor, " d_out"] | None = None
) -> Float[Tensor, "... d_out"]:
    """W x + b by the fastest kernel for the place."""
    if x.dtype == torch.bfloat16 and fits(x, weight):
        y = matvec(x, weight)
        return y if bias is None else y + bias.to(y.dtype)
    return F.linear(x, weight, bias)
