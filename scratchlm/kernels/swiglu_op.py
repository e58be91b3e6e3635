"""SwiGLU as an operation of torch: shapes without computing, the gradient, and the same in torch where neither Triton nor the kernels for CPUs run.

gate = g, up = u      out = silu(g) u,  silu(g) = g σ(g)
upstream d            d_up = d silu(g),  d_gate = d u silu'(g),  silu'(g) = σ(g) (1 + g (1 − σ(g)))
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scratchlm.kernels import rows_cpp
from scratchlm.kernels.swiglu import IN_TORCH, check_halves
from scratchlm.kernels.triton_here import computes


@torch.library.custom_op("scratchlm::swiglu", mutates_args=())
def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) ⊙ up: (…, 2·d_ff) → (…, d_ff), contiguous."""
    check_halves(gate_up)
    if computes(gate_up, IN_TORCH):
        from scratchlm.kernels.swiglu_triton import forward

        return forward(gate_up)
    if rows_cpp.computes(gate_up):
        return rows_cpp.swiglu_forward(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up).contiguous()


@swiglu.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@torch.library.custom_op("scratchlm::swiglu_backward", mutates_args=())
def swiglu_backward(d_out: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of gate‖up, contiguous: d_out (…, d_ff), gate_up (…, 2·d_ff) → (…, 2·d_ff)."""
    if computes(gate_up, IN_TORCH):
        from scratchlm.kernels.swiglu_triton import backward

        return backward(d_out, gate_up)
    if rows_cpp.computes(gate_up):
        return rows_cpp.swiglu_backward(d_out, gate_up)
    d_gate_up = gate_up.new_empty(gate_up.shape)
    gate, up = gate_up.chunk(2, dim=-1)
    d_gate, d_up = d_gate_up.chunk(2, dim=-1)
    torch.ops.aten.silu.out(gate, out=d_up).mul_(d_out)  # in place: as little memory as in Triton
    torch.mul(d_out, up, out=d_gate)
    torch.ops.aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
    return d_gate_up


def backward_formula(d_out: Tensor, gate_up: Tensor) -> Tensor:
    """The same by torch's formula, for batches of gradients."""
    wide = torch.promote_types(gate_up.dtype, torch.float32)
    gate, up = gate_up.to(wide).chunk(2, dim=-1)
    d, s = d_out.to(wide), gate.sigmoid()
    return torch.cat([d * up * s * (1 + gate * (1 - s)), d * gate * s], dim=-1).to(gate_up.dtype)


@swiglu_backward.register_fake
def _(d_out: Tensor, gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


def _setup(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, d_out: Tensor) -> Tensor:
    (gate_up,) = ctx.saved_tensors
    return swiglu_backward(d_out, gate_up)


swiglu.register_autograd(_gradient, setup_context=_setup)
