"""RMSNorm, SwiGLU and rotary embedding with their gradients on a CPU, in C++: what `rows.cpp` does with tensors.

For training, and for reading much text at once, without a compiler. torch has a chain of kernels for each, eight for a norm and a dozen for its gradient; here each is one pass over memory, and keeps for
its gradient no more than what it was given (a norm: and one number per row). Who compiles gets the formulas, of which the compiler makes such a pass itself.
Sums are fp32; two runs agree to the bit, whatever the number of threads.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from scratchlm.kernels import cpp_here, triton_here
from scratchlm.kernels.attention import heads_inside
from scratchlm.kernels.derivatives import first_derivative_only
from scratchlm.kernels.hardware import has_native_bf16

SOURCE = Path(__file__).with_name("rows.cpp")
OTHERWISE = "norms, SwiGLU and rotation are computed by torch, which is slower"
DTYPES = (torch.float32, torch.bfloat16)

FEW = 2**14
"""Without a gradient, up to so many numbers torch's own kernels are left alone: text that is written token by token goes other ways."""

MOST_CHUNKS, ROWS_AT_LEAST = 64, 32
"""In how many chunks, each of how many rows, a gain's gradient is added up."""


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL:
    """The kernels for a dtype, compiled if need be.

    Raises:
        NoKernel: they cannot be had here.
    """
    names = "rms_norm", "rms_norm_backward", "swiglu", "swiglu_backward", "turn_heads"
    return cpp_here.kernels(SOURCE, dtype, dict.fromkeys(names))


def is_worth_it(dtype: torch.dtype) -> bool:
    """Whether the kernels for a dtype can be compiled, and training in it is what this processor is for. Nothing is compiled to find out."""
    if cpp_here.compiler() is None:
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and has_native_bf16("cpu"))


def runs(dtype: torch.dtype) -> bool:
    """Whether they are there: the first question of a process compiles or loads them, and a failure is told of once."""
    return is_worth_it(dtype) and cpp_here.is_there(library, dtype, OTHERWISE)


def is_offered(x: Tensor) -> bool:
    """Whether the kernels are the way for `x`: on a CPU, in a dtype of theirs, where a gradient is wanted or there are many numbers, and nobody compiles."""
    return (
        not torch.compiler.is_compiling()  # first: a size that is asked for becomes a graph's
        and (torch.is_grad_enabled() or x.numel() > FEW)
        and can_read(x)
        and not cpp_here.is_transformed()
        and runs(x.dtype)
    )


def can_read(x: Tensor) -> bool:
    """Whether `x` has numbers, on a CPU that is not Triton's, in a dtype of the kernels."""
    there = x.dtype in DTYPES and x.device.type == "cpu" and x.numel() > 0
    return there and not x.is_neg() and not triton_here.takes(x.device)


def computes(x: Tensor) -> bool:
    """The same for an operation that is called already: whether the kernels compute it."""
    return can_read(x) and runs(x.dtype)


def _address(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def _numbers(*values: int) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


# --- RMSNorm --------------------------------------------------------------------------------------------------------------


def _rows(x: Tensor) -> Tensor | None:
    """x as (·, ·, ·, width), its rows contiguous; None: it cannot be seen so without a copy."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        return None
    if x.ndim <= 4:
        return x[(None,) * (4 - x.ndim)]
    try:
        return x.view(-1, *x.shape[-3:])
    except RuntimeError:
        return None


def _seen(x: Tensor) -> Tensor:
    """The same of a copy, where need be."""
    found = _rows(x)
    if found is None:
        found = _rows(x.contiguous())
    assert found is not None
    return found


def _put(made: Tensor, to: Tensor) -> Tensor:
    """`to`, with the numbers of `made`, which mostly is its own memory."""
    return to if made.data_ptr() == to.data_ptr() else to.copy_(made.view(to.shape))


def norm_forward(
    x: Float[Tensor, "... width"], gain: Float[Tensor, " width"] | None, eps: float
) -> tuple[Float[Tensor, "... width"], Float[Tensor, ...]]:
    """x / RMS(x) · gain in x's dtype, laid out like x, and 1/RMS(x), fp32; RMS(x) = sqrt(mean(x²) + ε).

    Args:
        x: fp32 or bf16 on a CPU, not empty.
        gain: fp32, contiguous, beside x, and as wide (nobody checks here); or None.
        eps: ε.

    Raises:
        NoKernel: there is none for the dtype.
    """
    y = torch.empty_like(x)
    rows, made = _seen(x), _seen(y)  # a copy of y, where rows do not lie in one piece
    inverses = x.new_empty(x.shape[:-1], dtype=torch.float32)
    library(x.dtype).rms_norm(
        _address(rows),
        _address(gain),
        _address(made),
        _address(inverses),
        _numbers(*rows.shape),
        _numbers(*rows.stride()[:3], *made.stride()[:3]),
        ctypes.c_float(eps),
        torch.get_num_threads(),
    )
    return _put(made, y), inverses


def norm_backward(
    d_y: Float[Tensor, "... width"],
    x: Float[Tensor, "... width"],
    gain: Float[Tensor, " width"] | None,
    inverses: Float[Tensor, ...],
    *,
    wants_gain: bool = True,
) -> tuple[Float[Tensor, "... width"], Float[Tensor, " width"] | None]:
    """Gradients of x, in its dtype and laid out like it, and of the gain, fp32, if it is wanted; arguments as for and from :func:`norm_forward`.

    Raises:
        NoKernel: there is none for the dtype.
    """
    d_x = torch.empty_like(x)
    rows, upstream, made = _seen(x), _seen(d_y), _seen(d_x)
    count, width = inverses.numel(), x.shape[-1]
    chunks = max(1, min(MOST_CHUNKS, count // ROWS_AT_LEAST))
    d_gains = x.new_empty(chunks, width, dtype=torch.float32) if gain is not None and wants_gain else None
    library(x.dtype).rms_norm_backward(
        _address(upstream),
        _address(rows),
        _address(gain),
        _address(inverses),
        _address(made),
        _address(d_gains),
        ctypes.c_int64(chunks),
        _numbers(*rows.shape),
        _numbers(*upstream.stride()[:3], *rows.stride()[:3], *made.stride()[:3]),
        torch.get_num_threads(),
    )
    return _put(made, d_x), None if d_gains is None else d_gains.sum(dim=0)


# --- SwiGLU ---------------------------------------------------------------------------------------------------------------


def swiglu_forward(gate_up: Float[Tensor, "... 2*d_ff"]) -> Float[Tensor, "... d_ff"]:
    """silu(gate) ⊙ up of the two halves gate‖up, contiguous; fp32 or bf16 on a CPU, not empty.

    Raises:
        NoKernel: there is none for the dtype.
    """
    gate_up = gate_up.contiguous()
    *rows, both = gate_up.shape
    out = gate_up.new_empty(*rows, both // 2)
    sizes = ctypes.c_int64(gate_up.numel() // both), ctypes.c_int64(both // 2)
    library(gate_up.dtype).swiglu(_address(gate_up), _address(out), *sizes, torch.get_num_threads())
    return out


def swiglu_backward(
    d_out: Float[Tensor, "... d_ff"], gate_up: Float[Tensor, "... 2*d_ff"]
) -> Float[Tensor, "... 2*d_ff"]:
    """The gradient of gate‖up, contiguous.

    Raises:
        NoKernel: there is none for the dtype.
    """
    d_out, gate_up = d_out.contiguous(), gate_up.contiguous()
    both = gate_up.shape[-1]
    d_gate_up = torch.empty_like(gate_up)
    sizes = ctypes.c_int64(gate_up.numel() // both), ctypes.c_int64(both // 2)
    given = _address(d_out), _address(gate_up), _address(d_gate_up)
    library(gate_up.dtype).swiglu_backward(*given, *sizes, torch.get_num_threads())
    return d_gate_up


# --- RoPE -----------------------------------------------------------------------------------------------------------------


def _turn(
    sources: Sequence[Tensor],
    targets: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    *,
    turned: int,
    back: bool,
) -> None:
    """Heads (batch, heads, length, head_dim) from one place to another, the first `turned` of the tensors turned on their way."""
    there = [n for n, target in enumerate(targets) if target.numel()]
    turned = sum(n < turned for n in there)
    sources = [sources[n] if sources[n].stride(-1) == 1 else sources[n].contiguous() for n in there]
    targets = [targets[n] for n in there]
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    batch, _, length, width = targets[0].shape
    library(targets[0].dtype).turn_heads(
        len(there),
        (ctypes.c_void_p * len(there))(*(a.data_ptr() for a in sources)),
        (ctypes.c_void_p * len(there))(*(b.data_ptr() for b in targets)),
        _numbers(*(s for a, b in zip(sources, targets, strict=True) for s in (*a.stride()[:3], *b.stride()[:3]))),
        _numbers(*(b.shape[1] for b in targets)),
        turned,
        _address(cos),
        _address(sin),
        _numbers(batch, length, width // 2, cos.shape[0] if cos.ndim == 3 else 1),
        int(interleaved),
        int(back),
        torch.get_num_threads(),
    )


def _heads(projected: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, ...]:
    """q, k and v of (batch, length, width), as they lie there."""
    parts = projected.unflatten(-1, (heads + 2 * kv_heads, -1)).transpose(1, 2)
    return parts.split([heads, kv_heads, kv_heads], dim=1)


def turn_forward(
    projected: Float[Tensor, "batch length width"],
    cos: Float[Tensor, "... length half"],
    sin: Float[Tensor, "... length half"],
    heads: int,
    kv_heads: int,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`scratchlm.kernels.rotary.turn_heads`.

    Raises:
        NoKernel: there is none for the dtype.
    """
    sources = _heads(projected, heads, kv_heads)
    q, k, v = (heads_inside(projected, *source.shape[1:]) for source in sources)
    _turn(sources, (q, k, v), cos, sin, interleaved, turned=2, back=False)
    return q, k, v


def turn_backward(d_q: Tensor, d_k: Tensor, d_v: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The gradient of the projection, (batch, length, (heads + 2 kv_heads) · head_dim), contiguous.

    Raises:
        NoKernel: there is none for the dtype.
    """
    batch, heads, length, width = d_q.shape
    kv_heads = d_k.shape[1]
    d_projected = d_q.new_empty(batch, length, (heads + 2 * kv_heads) * width)
    _turn((d_q, d_k, d_v), _heads(d_projected, heads, kv_heads), cos, sin, interleaved, turned=2, back=True)
    return d_projected


# --- past torch's dispatcher ----------------------------------------------------------------------------------------------
# An operation of torch's own kind costs more than the work on a small model; who watches operations gets one all the same.


class RMSNorm(torch.autograd.Function):
    """Under this name a profile shows it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
        y, inverses = norm_forward(x, gain, eps)
        ctx.save_for_backward(x, gain, inverses)
        return y

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, inverses = ctx.saved_tensors
        if cpp_here.is_batch(grad_outputs[0]):
            from scratchlm.kernels.rms_norm_op import backward_formula

            return *backward_formula(grad_outputs[0], x, gain, inverses), None
        wanted = bool(ctx.needs_input_grad[1])
        return *norm_backward(grad_outputs[0], x, gain, inverses, wants_gain=wanted), None


class SwiGLU(torch.autograd.Function):
    """Under this name a profile shows it."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return swiglu_forward(gate_up)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        if cpp_here.is_batch(grad_outputs[0]):
            from scratchlm.kernels.swiglu_op import backward_formula

            return backward_formula(grad_outputs[0], gate_up)
        return swiglu_backward(grad_outputs[0], gate_up)


class TurnHeads(torch.autograd.Function):
    """Under this name a profile shows it."""

    @staticmethod
    def forward(
        ctx: Any, projected: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, interleaved: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return turn_forward(projected, cos, sin, heads, kv_heads, interleaved)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        d_q, d_k, d_v = grad_outputs
        cos, sin = ctx.saved_tensors
        if any(map(cpp_here.is_batch, grad_outputs)):
            from scratchlm.kernels.rotary_op import backward_formula

            return backward_formula(d_q, d_k, d_v, cos, sin, ctx.interleaved), *([None] * 5)
        return turn_backward(d_q, d_k, d_v, cos, sin, ctx.interleaved), *([None] * 5)
