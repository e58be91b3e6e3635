"""FlashAttention-2 on a CPU, forward and backward, in C++: what `flash_attention.cpp` does with tensors.

Its picture and its tiling are there. It is for what training mostly is, causal attention or a window over whole sequences in fp32 or, where one
instruction multiplies pairs of them (AVX512-BF16), in bf16; :func:`objection` says what it leaves to others. Sums are fp32; two runs agree to
the bit, whatever the number of threads. Memory besides: 12 bytes · keys · head_dim + 8 · keys · value_dim, and some, per thread, backward. Compared with a compiled graph of products and softmax it writes no scores to memory, computes none
beyond a tile's diagonal, and reads queries, keys and values wherever they lie.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scratchlm.kernels import cpp_here, triton_here
from scratchlm.kernels.attention import Keys, Mixed, Queries, Scores, Values, heads_inside
from scratchlm.kernels.derivatives import first_derivative_only
from scratchlm.kernels.hardware import has_amx, has_native_bf16
from scratchlm.kernels.triton_here import constant_in_graphs
from scratchlm.kernels.visibility import Visibility

SOURCE = Path(__file__).with_name("flash_attention.cpp")
OTHERWISE = "attention is computed by torch, which is slower"


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL:
    """The kernels for a dtype, compiled if need be.

    Raises:
        NoKernel: they cannot be had here.
    """
    results = {"attention_forward": None, "attention_backward": None, "attention_workspace": ctypes.c_int64}
    return cpp_here.kernels(SOURCE, dtype, results)


def is_worth_it(dtype: torch.dtype) -> bool:
    """Whether the kernels for a dtype would be fast on this processor, if they can be compiled. Nothing is compiled to find out.

    For bf16 that is AVX512-BF16 without AMX, whose products in torch are some times as fast as what AVX-512 can do.
    """
    if cpp_here.compiler() is None:
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and has_native_bf16("cpu") and not has_amx())


@constant_in_graphs
def runs(dtype: torch.dtype) -> bool:
    """Whether the kernels are fast and there: the first question of a process compiles or loads them, and a failure is told of once."""
    if not is_worth_it(dtype) or not cpp_here.is_there(library, dtype, OTHERWISE):
        return False
    return dtype != torch.bfloat16 or multiplies_bf16()


def multiplies_bf16() -> bool:
    """Whether the compiler, too, knows the instruction for pairs of bf16 numbers."""
    return bool(library(torch.bfloat16).multiplies_bf16())


def misfit(q: Queries, k: Keys, v: Values) -> str | None:
    """What of these tensors the kernels cannot read, or None: they can read them."""
    if {q.device.type, k.device.type, v.device.type} != {"cpu"} or not q.ndim == k.ndim == v.ndim == 4:
        return "not four dimensions on a CPU"
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.float32, torch.bfloat16):
        return f"the dtypes are {q.dtype}, {k.dtype}, {v.dtype}"
    if not q.shape[0] == k.shape[0] == v.shape[0] or k.shape[1:3] != v.shape[1:3] or q.shape[-1] != k.shape[-1]:
        return "the shapes do not fit each other"
    if 0 in q.shape or 0 in k.shape or 0 in v.shape or q.shape[1] % k.shape[1]:
        return "there is nothing to compute, or heads without keys"
    if q.dtype == torch.bfloat16 and (q.shape[-1] % 2 or v.shape[-1] % 2):
        return "the width of a head is odd"
    return None


def objection(q: Queries, k: Keys, v: Values, visible: Visibility | None, scores: Scores) -> str | None:
    """Why the kernels cannot compute this, or None: they can."""
    if reason := misfit(q, k, v):
        return reason
    if triton_here.takes(q.device):
        return "Triton's interpreter is asked for"
    if not torch.compiler.is_compiling() and cpp_here.is_transformed():
        return "it is mapped over, or differentiated by functorch or forwards"
    if scores.soft_cap is not None or scores.slopes is not None or scores.sinks is not None or scores.dropout:
        return "the scores are changed, or weights dropped out"
    if scores.scale_of(q.shape[-1]) <= 0:
        return "the scale is not positive"
    if visible is None:
        return None
    rule = visible.rule
    if not (rule.is_plain_causal or rule.reads_all_in_reach) or visible.parts:
        return f"the mask is {type(rule).__name__}"
    if visible.key_mask is not None or visible.query_documents is not None:
        return "there are documents or padding"
    if visible.queries.ndim > 1 or visible.keys.ndim > 1:
        return "positions differ between the rows of the batch"
    if visible.queries.shape[-1] != q.shape[-2] or visible.keys.shape[-1] != k.shape[-2]:
        return "the mask is of another length"
    return None


def computes(q: Queries, k: Keys, v: Values, visible: Visibility | None, scores: Scores) -> bool:
    """Whether the kernels can do this, are there, and are fast."""
    return objection(q, k, v, visible, scores) is None and runs(q.dtype)


def is_the_way(q: Queries, k: Keys, v: Values, visible: Visibility | None, scores: Scores) -> bool:
    """Whether whole sequences had better go through the kernels: they can, a gradient is wanted, and no thread is left without a head of keys.

    (Two threads of a Zen 3, fp32, forward and backward together: 26 ms where torch's kernel takes 42 and compiled blocks 56 for 16 × 4 heads of 64 at 256 tokens; 46,
    89, 91 at 512; 153, 185, 313 at 2,048; 555 and 587 at 8,192.)
    """
    if torch.is_autocast_enabled("cpu") and q.dtype != torch.get_autocast_dtype("cpu"):
        return False
    wanted = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return wanted and q.shape[0] * k.shape[1] >= _threads() and computes(q, k, v, visible, scores)


@constant_in_graphs
def _threads() -> int:
    return torch.get_num_threads()


def _laid(x: Tensor) -> Tensor:
    """x, or a copy, whose rows are contiguous, begin at whole words, and stand in memory."""
    words = 4 // x.element_size()
    whole = all(stride % words == 0 for stride in x.stride()[:-1]) and x.storage_offset() % words == 0
    return x if x.stride(-1) == 1 and whole and x.data_ptr() % 4 == 0 else x.contiguous()


def _given(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> ctypes.Array[ctypes.c_int64]:
    """batch, heads, kv_heads, queries, keys, width, value_width, window."""
    sizes = q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3], window or 0
    return (ctypes.c_int64 * 8)(*sizes)


def _places(*tensors: Tensor) -> tuple[ctypes.Array[ctypes.c_void_p], ctypes.Array[ctypes.c_int64]]:
    """Addresses, and strides of batch, head and token."""
    addresses = (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
    strides = [stride for tensor in tensors for stride in tensor.stride()[:3]]
    return addresses, (ctypes.c_int64 * len(strides))(*strides)


def workspace(keys: int, width: int, value_width: int, *, back: bool) -> int:
    """Bytes that one thread needs besides, all but what does not grow with the keys: fp32 copies of a head's keys and values, and backward of its keys
    as columns, and of both gradients.

    Args:
        keys: how many.
        width, value_width: of a key and of a value.
        back: for the backward pass.
    """
    return 4 * keys * (3 * width + 2 * value_width if back else width + value_width)


def _memory(
    kernels: ctypes.CDLL, sizes: ctypes.Array[ctypes.c_int64], *, back: bool
) -> tuple[Tensor, ctypes.c_void_p]:
    """A workspace for each thread: torch's, so that it comes from where all else comes from and goes back there. (Threads that take their own leave as
    much behind in their arenas as several workspaces.)"""
    each = kernels.attention_workspace(sizes, int(back))
    held = torch.empty(each * torch.get_num_threads() + 64, dtype=torch.uint8, device="cpu")
    return held, ctypes.c_void_p((held.data_ptr() + 63) // 64 * 64)


def forward(q: Queries, k: Keys, v: Values, scale: float, window: int | None) -> tuple[Mixed, Tensor]:
    """softmax(scale · q kᵀ) v under the causal triangle, and per query L in units of log 2.

    Args:
        q, k, v: (batch, heads, queries, head_dim), (batch, kv_heads, keys, head_dim), (batch, kv_heads, keys, value_dim) on a CPU, all fp32
            or all bf16, with any strides; the last query stands beside the last key.
        scale: factor of the products, positive.
        window: each query reads so many keys, itself the last; None: all before it.

    Returns:
        (batch, heads, queries, value_dim), laid out as by ``heads_inside``, and fp32 (batch, heads, queries), +inf where nothing is read.

    Raises:
        NoKernel: there is none for the dtype.
    """
    kernels = library(q.dtype)
    q, k, v = _laid(q), _laid(k), _laid(v)
    out = heads_inside(q, q.shape[1], q.shape[2], v.shape[3])
    log_sums = q.new_empty(q.shape[:-1], dtype=torch.float32)
    addresses, strides = _places(q, k, v, out)
    sizes, threads = _given(q, k, v, window), torch.get_num_threads()
    sums = ctypes.c_void_p(log_sums.data_ptr())
    _held, memory = _memory(kernels, sizes, back=False)
    kernels.attention_forward(sizes, ctypes.c_float(scale), addresses, strides, sums, memory, threads)
    return out, log_sums


def backward(
    d_out: Mixed, q: Queries, k: Keys, v: Values, out: Mixed, log_sums: Tensor, scale: float, window: int | None
) -> tuple[Queries, Keys, Values, Tensor]:
    """Gradients of q, k and v from that of the output, and D = rowsum(dO ∘ O), fp32, (batch, heads, queries); arguments as for and from :func:`forward`.

    Raises:
        NoKernel: there is none for the dtype.
    """
    kernels = library(q.dtype)
    d_out, q, k, v, out = (_laid(x) for x in (d_out, q, k, v, out))
    d_q, d_k, d_v = (heads_inside(x, *x.shape[1:]) for x in (q, k, v))
    delta = torch.empty_like(log_sums)
    addresses, strides = _places(d_out, q, k, v, out, d_q, d_k, d_v)
    sizes, threads = _given(q, k, v, window), torch.get_num_threads()
    log_sums = log_sums.contiguous()
    sums, rest = ctypes.c_void_p(log_sums.data_ptr()), ctypes.c_void_p(delta.data_ptr())
    _held, memory = _memory(kernels, sizes, back=True)
    kernels.attention_backward(sizes, ctypes.c_float(scale), addresses, strides, sums, rest, memory, threads)
    return d_q, d_k, d_v, delta


class FlashAttention(torch.autograd.Function):
    """Under this name a profile shows it."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        out, log_sums = forward(q, k, v, scale, window)
        ctx.save_for_backward(q, k, v, out, log_sums)
        ctx.numbers = scale, window
        return out

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        d_q, d_k, d_v, _ = backward(grad_outputs[0], *ctx.saved_tensors, *ctx.numbers)
        return d_q, d_k, d_v, None, None


def attention(q: Queries, k: Keys, v: Values, scale: float, window: int | None) -> Mixed:
    """:func:`forward` with its gradient, past torch's dispatcher: of some hundred microseconds per layer that an operation of its own costs there, a small
    model notices each. Who watches operations (a graph, a counter of FLOPs, selective checkpointing) must take the operation. The gradient itself has none, and
    is not for batches of output gradients.

    Raises:
        NoKernel: there is none for the dtype.
    """
    mixed: Tensor = FlashAttention.apply(q, k, v, scale, window)
    return mixed
