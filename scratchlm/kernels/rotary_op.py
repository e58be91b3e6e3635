"""Splitting q‖k‖v and rotating as an operation of torch: shapes without computing, the gradient, the same in torch where neither Triton nor the kernels for CPUs run.

    pair (a, b) of q and k      a' = a cos − b sin,  b' = a sin + b cos
    upstream (d_a', d_b')       d_a = d_a' cos + d_b' sin,  d_b = d_b' cos − d_a' sin:  the rotation by the negative angle

Only cos and sin are kept for the gradient, not the projection.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scratchlm.kernels import rows_cpp
from scratchlm.kernels.attention import heads_inside
from scratchlm.kernels.rotary import IN_TORCH, check_tables, width_of_heads
from scratchlm.kernels.triton_here import computes


@torch.library.custom_op("scratchlm::turn_heads", mutates_args=())
def turn_heads(
    projected: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, interleaved: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """q (batch, heads, length, head_dim), k and v (batch, kv_heads, length, head_dim) of `projected` (batch, length, …)."""
    head_dim = width_of_heads(projected, cos, sin, heads, kv_heads)
    if computes(projected, IN_TORCH):
        from scratchlm.kernels.rotary_triton import forward

        return forward(projected, cos, sin, heads, kv_heads, interleaved)
    if rows_cpp.computes(projected):
        return rows_cpp.turn_forward(projected, cos, sin, heads, kv_heads, interleaved)
    qk, v = projected.unflatten(-1, (-1, head_dim)).split([heads + kv_heads, kv_heads], dim=-2)
    q, k = _turned(qk, cos, sin, interleaved).split([heads, kv_heads], dim=-2)
    # Copies: the results of an operation share no memory, and lie as promised.
    return tuple(part.clone(memory_format=torch.contiguous_format).transpose(1, 2) for part in (q, k, v))


@turn_heads.register_fake
def _(
    projected: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, interleaved: bool
) -> tuple[Tensor, Tensor, Tensor]:
    length, width = projected.shape[1:]
    head_dim = width // (heads + 2 * kv_heads)
    return tuple(heads_inside(projected, n, length, head_dim) for n in (heads, kv_heads, kv_heads))  # type: ignore[return-value]


@torch.library.custom_op("scratchlm::turn_heads_backward", mutates_args=())
def turn_heads_backward(
    d_q: Tensor, d_k: Tensor, d_v: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> Tensor:
    """The gradient of the projection, (batch, length, (heads + 2 kv_heads) · head_dim), contiguous."""
    batch, _, length, head_dim = d_q.shape
    check_tables(batch, length, head_dim, cos, sin)
    if computes(d_q, IN_TORCH):
        from scratchlm.kernels.rotary_triton import backward

        return backward(d_q, d_k, d_v, cos, sin, interleaved)
    if rows_cpp.computes(d_q):
        return rows_cpp.turn_backward(d_q, d_k, d_v, cos, sin, interleaved)
    return backward_formula(d_q, d_k, d_v, cos, sin, interleaved).contiguous()


def backward_formula(d_q: Tensor, d_k: Tensor, d_v: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The same by torch."""
    d_qk = torch.cat([d_q, d_k], dim=1).transpose(1, 2)
    d_heads = torch.cat([_turned(d_qk, cos, -sin, interleaved), d_v.transpose(1, 2)], dim=-2)
    return d_heads.reshape(*d_heads.shape[:-2], -1)


@turn_heads_backward.register_fake
def _(d_q: Tensor, d_k: Tensor, d_v: Tensor, *_: Any) -> Tensor:
    batch, heads, length, head_dim = d_q.shape
    return d_q.new_empty(batch, length, (heads + 2 * d_k.shape[1]) * head_dim)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, cos, sin, _, _, ctx.interleaved = inputs
    ctx.save_for_backward(cos, sin)


def _gradients(ctx: Any, d_q: Tensor, d_k: Tensor, d_v: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin = ctx.saved_tensors
    return turn_heads_backward(d_q, d_k, d_v, cos, sin, ctx.interleaved), *([None] * 5)


turn_heads.register_autograd(_gradients, setup_context=_setup)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (batch, length, heads, head_dim), each pair rotated, in its dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    x_wide = x.to(wide)
    a, b = (x_wide[..., 0::2], x_wide[..., 1::2]) if interleaved else x_wide.chunk(2, dim=-1)
    turned = a * cos - b * sin, a * sin + b * cos
    return (torch.stack(turned, -1).reshape(x.shape) if interleaved else torch.cat(turned, -1)).to(x.dtype)
