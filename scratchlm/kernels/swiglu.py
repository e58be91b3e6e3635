"""silu(gate) ⊙ up as one operation whose gradient is one pass, too (SwiGLU: Shazeer 2020, arXiv 2002.05202): when, and the way there.

The operation itself is in `swiglu_op.py`, which is not read before it is wanted; its kernels are in `swiglu_triton.py` and `rows.cpp`. The formula it is
held equal to: :class:`scratchlm.model.feedforward.SwiGLU`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from scratchlm.kernels import rows_cpp, triton_here
from scratchlm.kernels.cpp_here import is_watched

IN_TORCH = "SwiGLU and its gradient are computed by torch's kernels"


def fits(gate_up: Tensor) -> bool:
    """Whether :func:`swiglu` is the way: half or single precision where Triton's kernels run and a gradient is wanted, or where those for CPUs do.

    Without a gradient torch.compile makes one pass of the formula as well; and where a token is written at a time, the call of an operation
    of our own takes longer than the two of torch.
    """
    in_triton = torch.is_grad_enabled() and triton_here.is_offered(gate_up, IN_TORCH)
    return in_triton or rows_cpp.is_offered(gate_up)


def swiglu(gate_up: Float[Tensor, "... 2*d_ff"]) -> Float[Tensor, "... d_ff"]:
    """silu(gate) ⊙ up of the two halves gate‖up, in fp32 at least; returned in the dtype of `gate_up`, which alone is kept for the gradient.

    Raises:
        ValueError: there are no two halves.
    """
    out: Tensor
    if not is_watched(gate_up) and rows_cpp.is_offered(gate_up):
        check_halves(gate_up)
        out = rows_cpp.SwiGLU.apply(gate_up)
        return out
    from scratchlm.kernels import swiglu_op

    out = swiglu_op.swiglu(gate_up)
    return out


def check_halves(gate_up: Tensor) -> None:
    """Raises a ValueError for an odd width."""
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate‖up are two halves, but their width is {gate_up.shape[-1]}")
