"""SwiGLU in Triton, forward and backward: the operations of `swiglu_op.py`.

One program per row and block of columns. Each number is read once and written once:

::

    d_ff →            BLOCK      BLOCK     the rest
    gate ‖ up   ├───────────┼───────────┼──────┤ ‖ ├───────────┼───────────┼──────┤
                      │ g                                │ u
                      └────────────── program ───────────┘          forward    out = g σ(g) u
                                  │ out, or d                       backward   d_gate and d_up from d, g and u, to the same places
    out         ├───────────┼───────────┼──────┤                               of the gradient

Arithmetic is in fp32 whatever the dtype. What torch.compile makes of the formula reads g and u a second time in the backward pass, one of its
kernels for each half of the gradient. Without a GPU it runs in Triton's interpreter, as flash attention does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

BLOCK = 2048
"""Most columns at a time."""
OF_WARP = 256
"""Columns of a warp: eight numbers per thread, 16 bytes in half precision, the widest that a thread loads at once."""


@triton.jit
def _place(gate_up_at, width, BLOCK: tl.constexpr):
    """This program's row, where its block of the gate lies in gate‖up, and which of its columns there are."""
    row = tl.program_id(0).to(tl.int64)  # rows × columns may exceed 2³¹
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    return row, column, gate_up_at + row * (2 * width) + column, column < width


@triton.jit
def _forward(gate_up_at, out_at, width, BLOCK: tl.constexpr):
    row, column, gate_at, inside = _place(gate_up_at, width, BLOCK)
    gate = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_at + width, mask=inside, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_at + row * width + column, out.to(out_at.dtype.element_ty), mask=inside)


@triton.jit
def _backward(d_out_at, gate_up_at, d_gate_up_at, width, BLOCK: tl.constexpr):
    row, column, gate_at, inside = _place(gate_up_at, width, BLOCK)
    d_out = tl.load(d_out_at + row * width + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_at + width, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    d_up = d_out * gate * share
    d_gate = d_out * up * share * (1.0 + gate * (1.0 - share))
    d_gate_at = d_gate_up_at + row * (2 * width) + column
    tl.store(d_gate_at, d_gate.to(d_gate_up_at.dtype.element_ty), mask=inside)
    tl.store(d_gate_at + width, d_up.to(d_gate_up_at.dtype.element_ty), mask=inside)


def tiling(width: int) -> dict[str, int]:
    """What the kernels are launched with for d_ff: the largest block that leaves the fewest threads idle in the last one."""
    whole = triton.next_power_of_2(width)
    sizes = [min(whole, BLOCK >> halvings) for halvings in range(3)]
    block = min(sizes, key=lambda size: triton.cdiv(width, size) * size)
    return {"BLOCK": block, "num_warps": max(1, block // OF_WARP)}


def forward(gate_up: Float[Tensor, "... 2*d_ff"]) -> Float[Tensor, "... d_ff"]:
    """The operation ``scratchlm::swiglu``: bf16, fp16 or fp32."""
    gate_up = gate_up.contiguous()
    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], width)
    if out.numel():
        chosen = tiling(width)
        with torch.cuda.device_of(gate_up):
            _forward[out.numel() // width, triton.cdiv(width, chosen["BLOCK"])](gate_up, out, width, **chosen)
    return out


def backward(d_out: Float[Tensor, "... d_ff"], gate_up: Float[Tensor, "... 2*d_ff"]) -> Float[Tensor, "... 2*d_ff"]:
    """The operation ``scratchlm::swiglu_backward``: both of one dtype, bf16, fp16 or fp32."""
    d_out, gate_up = d_out.contiguous(), gate_up.contiguous()
    width = d_out.shape[-1]
    d_gate_up = torch.empty_like(gate_up)
    if d_out.numel():
        chosen = tiling(width)
        with torch.cuda.device_of(gate_up):
            _backward[d_out.numel() // width, triton.cdiv(width, chosen["BLOCK"])](
                d_out, gate_up, d_gate_up, width, **chosen
            )
    return d_gate_up
