"""y = W x for one vector in fp32 or bf16 on a CPU: what writing one token at a time mostly is.

Each weight is read once and used once, so the speed is that of memory. torch's product for a single row stays below it (it is made
for many rows; in fp32 a third of what memory gives was measured); a plain loop over rows reaches it.

When it is used: :func:`scratchlm.kernels.matmul.linear`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def matvec(
    x: Float[Tensor, "... d_in"], weight: Float[Tensor, "d_out d_in"], bias: Float[Tensor, " d_out"] | None = None
) -> Float[Tensor, "... d_out"]:
    """W x + b for one vector; fp32 or bf16 in and out, summed in fp32. Without gradient.

    Args:
        x: one vector on the CPU, whatever its leading dimensions of size 1.
        weight: contiguous, in x's dtype.
        bias: in x's dtype; None: 0.
    """
    from scratchlm.kernels import compiled_rows

    d_out, d_in = weight.shape
    x = x.contiguous()
    bias = bias if bias is None else bias.contiguous()
    y = torch.empty((*x.shape[:-1], d_out), dtype=x.dtype)
    addresses = weight.data_ptr(), x.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr()
    compiled_rows.call(compiled_rows.MATVEC, *addresses, d_out, d_in, dtype=x.dtype, numbers=d_out * d_in)
    return y
