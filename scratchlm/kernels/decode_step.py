"""One token through a whole Llama-like model, in one compiled function on a CPU.

Written one at a time, tokens leave each weight one multiplication, so that memory sets the pace; below it, a small model is held up by everything
around the products: some hundred calls from Python per token. Here is nothing around them. Weights lie where torch has them (their addresses come in),
sums are fp32 throughout, also where weights and cache are bf16.

::

    x ◄─ embedding[token]
    per layer   norm ─ qkv ─ (norms of heads) ─ rotate ─ write k, v ─ scores, softmax, mixture over the cache ─ output ─ x +=
                norm ─ gate‖up ─ f(gate) · up ─ down ─ x +=
    logits ◄─ head · norm(x)

Compiled by Numba at first use (some seconds) and kept on disk. Who may call it: :mod:`scratchlm.generate.fused_step`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8
from numba import carray, prange
from torch import Tensor

from scratchlm.kernels import compiled_rows
from scratchlm.kernels.compiled_rows import kept, pointer, rounded, widened

matvec_on_one = compiled_rows._matvec_on_one
matvec_on_threads = compiled_rows._matvec_on_threads

WEIGHTS = (
    "attention_norm",
    "qkv",
    "q_norm",
    "k_norm",
    "output",
    "feedforward_norm",
    "inner",
    "down",
    "keys",
    "values",
)
"""Columns of the table of addresses, a row per layer; 0: there is none."""

GROUP = 128
"""Numbers of a row that share a scale in int8."""

ACTIVATIONS = ("silu", "relu", "relu2", "gelu", "gelu_tanh", "sigmoid")
"""By their numbers in the loop."""


_OF = hashlib.blake2b(Path(compiled_rows.__file__).read_bytes(), digest_size=4).hexdigest()
"""Numba keeps code apart by names and by the date of the function's own file; here it holds that of another file, too."""


def _kept(function: Callable[..., Any]) -> Callable[..., Any]:
    """As :func:`scratchlm.kernels.compiled_rows.kept`, under a name with :data:`_OF`."""
    return kept(FunctionType(function.__code__, function.__globals__, f"{function.__name__}_{_OF}"))


@_kept
def _normed(x: Any, gain: Any, offset: Any, eps: Any, y: Any) -> None:
    """y = x / RMS(x) · (offset + gain); a gain of length 0: 1. x and y may be one array."""
    squares = np.float32(0)
    for i in range(len(x)):
        squares += x[i] * x[i]
    scale = np.float32(1) / np.sqrt(squares / np.float32(len(x)) + eps)
    if len(gain):
        for i in range(len(x)):
            y[i] = x[i] * scale * (offset + widened(gain[i]))
    else:
        for i in range(len(x)):
            y[i] = x[i] * scale


@_kept
def _rotate(x: Any, cos: Any, sin: Any, interleaved: Any) -> None:
    """The first 2 · len(cos) numbers of a head, in pairs (i, i + half) or (2i, 2i + 1)."""
    half = len(cos)
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        first, second = x[a], x[b]
        x[a] = first * cos[i] - second * sin[i]
        x[b] = first * sin[i] + second * cos[i]


@_kept
def _activate(inner: Any, gated: Any, activation: Any) -> None:
    """f(gate) · up of gate‖up, or f(up), into the front of `inner`."""
    width = len(inner) // 2 if gated else len(inner)
    one, half = np.float32(1), np.float32(0.5)
    for i in range(width):
        x = inner[i]
        if activation == 0:
            f = x / (one + np.exp(-x))
        elif activation == 1:
            f = max(x, np.float32(0))
        elif activation == 2:
            f = max(x, np.float32(0)) * max(x, np.float32(0))
        elif activation == 3:
            f = half * x * (one + np.float32(math.erf(x * np.float32(0.7071067811865476))))
        elif activation == 4:
            f = half * x * (one + np.tanh(np.float32(0.7978845608028654) * (x + np.float32(0.044715) * x * x * x)))
        else:
            f = one / (one + np.exp(-x))
        inner[i] = f * inner[i + width] if gated else f


@_kept
def _attend(q: Any, keys: Any, values: Any, count: Any, scale: Any, mixed: Any) -> None:
    """Each query head over the first `count` slots of its key/value head; (heads, width), (kv_heads, slots, width)."""
    heads, width = q.shape
    group = heads // len(keys)
    weights = np.empty(count, np.float32)
    for head in range(heads):
        k, v = keys[head // group], values[head // group]
        most = np.float32(-np.inf)
        for slot in range(count):
            score = np.float32(0)
            for i in range(width):
                score += q[head, i] * widened(k[slot, i])
            weights[slot] = score * scale
            most = max(most, weights[slot])
        total = np.float32(0)
        for slot in range(count):
            weights[slot] = np.exp(weights[slot] - most)
            total += weights[slot]
        for i in range(width):
            mixed[head, i] = np.float32(0)
        for slot in range(count):
            share = weights[slot] / total
            for i in range(width):
                mixed[head, i] += share * widened(v[slot, i])


@_kept
def _product_on_one(weight: Any, x: Any, y: Any, like: Any) -> None:
    """y = W x of the weight at this address."""
    matvec_on_one(carray(pointer(weight), (len(y), len(x)), like.dtype), x, np.empty(0, np.float32), y)


@_kept
def _product_on_threads(weight: Any, x: Any, y: Any, like: Any) -> None:
    """The same, rows dealt out."""
    matvec_on_threads(carray(pointer(weight), (len(y), len(x)), like.dtype), x, np.empty(0, np.float32), y)


def _matvec_int8(weight: Any, scales: Any, x: Any, y: Any) -> None:
    """y = W x of whole numbers with a scale for each :data:`GROUP` of a row."""
    whole = len(x) // GROUP
    for row in prange(len(weight)):
        total = np.float32(0)
        for group in range(whole):  # slices, as indices that might be negative are no vector's
            numbers = weight[row, group * GROUP : group * GROUP + GROUP]
            factors = x[group * GROUP : group * GROUP + GROUP]
            part = np.float32(0)
            for i in range(GROUP):
                part += np.float32(numbers[i]) * factors[i]
            total += part * scales[row, group]
        if whole < scales.shape[1]:
            numbers, factors = weight[row, whole * GROUP :], x[whole * GROUP :]
            part = np.float32(0)
            for i in range(len(factors)):
                part += np.float32(numbers[i]) * factors[i]
            total += part * scales[row, whole]
        y[row] = total


_matvec_int8_on_one, _matvec_int8_on_threads = (
    compiled_rows._compiled(_matvec_int8, parallel) for parallel in (False, True)
)


@_kept
def _int8_matrix(weight: Any, rows: Any, columns: Any) -> Any:
    """Numbers and scales of what :func:`packed_int8` made."""
    behind = (rows * columns + 63) // 64 * 64
    scales = carray(pointer(weight + behind), (rows, (columns + GROUP - 1) // GROUP), np.float32)
    return carray(pointer(weight), (rows, columns), np.int8), scales


@_kept
def _product_int8_on_one(weight: Any, x: Any, y: Any, like: Any) -> None:
    numbers, scales = _int8_matrix(weight, len(y), len(x))
    _matvec_int8_on_one(numbers, scales, x, y)


@_kept
def _product_int8_on_threads(weight: Any, x: Any, y: Any, like: Any) -> None:
    numbers, scales = _int8_matrix(weight, len(y), len(x))
    _matvec_int8_on_threads(numbers, scales, x, y)


_product = _product_on_one
"""In the loop below; the copy for several threads has the other one in its place. (One function with both would start numba's
threads, and with them change torch's number of threads, also where one is wanted.)"""


def _step(
    table: Any,
    ends: Any,
    sizes: Any,
    numbers: Any,
    cos: Any,
    sin: Any,
    token: Any,
    place: Any,
    logits: Any,
    like: Any,
) -> None:
    """See the head of this file.

    Args:
        table: int64 (layers, 10): addresses, see :data:`WEIGHTS`.
        ends: int64 (3): addresses of embedding, last norm's gain and head.
        sizes: int64: heads, kv_heads, head_dim, inner width (gate and up together), slots of the cache; whether gated; the activation's number; whether heads
            are normed; whether rotated pairs are interleaved; d_model.
        numbers: fp32: ε, offset of the gains, ε and offset of the heads' norms, scale of scores.
        cos, sin: fp32, of this position; empty: nothing is rotated.
        token: id.
        place: slot to write to; all before it are read.
        logits: fp32 (vocab), written.
        like: an empty array of the dtype of weights and cache.
    """
    heads, kv_heads, width, inner_width, slots = sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]
    gated, activation, normed_heads, interleaved, d = sizes[5], sizes[6], sizes[7], sizes[8], sizes[9]
    eps, offset, head_eps, head_offset, scale = numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]
    row = carray(pointer(ends[0] + token * d * like.itemsize), d, like.dtype)
    x, y, branch = np.empty(d, np.float32), np.empty(d, np.float32), np.empty(d, np.float32)
    for i in range(d):
        x[i] = widened(row[i])
    qkv = np.empty((heads + 2 * kv_heads) * width, np.float32)
    by_head = qkv.reshape(heads + 2 * kv_heads, width)
    mixed = np.empty((heads, width), np.float32)
    inner = np.empty(inner_width, np.float32)
    for layer in range(len(table)):
        at = table[layer]
        _normed(x, carray(pointer(at[0]), d if at[0] else 0, like.dtype), offset, eps, y)
        _product(at[1], y, qkv, like)
        for head in range(heads + kv_heads):
            if normed_heads:
                gain = at[2] if head < heads else at[3]
                _normed(
                    by_head[head],
                    carray(pointer(gain), width if gain else 0, like.dtype),
                    head_offset,
                    head_eps,
                    by_head[head],
                )
            _rotate(by_head[head], cos, sin, interleaved)
        keys = carray(pointer(at[8]), (kv_heads, slots, width), like.dtype)
        values = carray(pointer(at[9]), (kv_heads, slots, width), like.dtype)
        for head in range(kv_heads):
            for i in range(width):
                keys[head, place, i] = rounded(by_head[heads + head, i], keys)
                values[head, place, i] = rounded(by_head[heads + kv_heads + head, i], values)
        _attend(by_head[:heads], keys, values, place + 1, scale, mixed)
        _product(at[4], mixed.reshape(heads * width), branch, like)
        for i in range(d):
            x[i] += branch[i]
        _normed(x, carray(pointer(at[5]), d if at[5] else 0, like.dtype), offset, eps, y)
        _product(at[6], y, inner, like)
        _activate(inner, gated, activation)
        _product(at[7], inner[: inner_width // 2] if gated else inner, branch, like)
        for i in range(d):
            x[i] += branch[i]
    _normed(x, carray(pointer(ends[1]), d if ends[1] else 0, like.dtype), offset, eps, y)
    _product(ends[2], y, logits, like)


def _copy(suffix: str, product: Any) -> Callable[..., None]:
    """The loop with this product, under a name of its own: that is what numba tells kept code apart by."""
    return _kept(FunctionType(_step.__code__, {**globals(), "_product": product}, f"_step{suffix}"))


STEP = _copy("_on_one", _product_on_one), _copy("_on_threads", _product_on_threads)
"""For :func:`scratchlm.kernels.compiled_rows.call`."""

STEP_INT8 = _copy("_int8_on_one", _product_int8_on_one), _copy("_int8_on_threads", _product_int8_on_threads)
"""The same with matrices of :func:`packed_int8`."""


def quantised_int8(
    weight: Float[Tensor, "rows columns"],
) -> tuple[Int8[Tensor, "rows columns"], Float[Tensor, "rows groups"]]:
    """Whole numbers from −127 to 127 and fp32 scales, one for each :data:`GROUP` numbers of a row: the largest of them is 127 times its scale."""
    rows, columns = weight.shape
    groups = -(-columns // GROUP)
    wide = F.pad(weight.detach().float(), (0, groups * GROUP - columns)).view(rows, groups, GROUP)
    scales = (wide.abs().amax(dim=-1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    numbers = (wide / scales[..., None]).round().to(torch.int8)
    return numbers.view(rows, -1)[:, :columns].contiguous(), scales


def restored_int8(weight: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """What is left of a matrix after :func:`quantised_int8`, in its own dtype: to measure what that costs."""
    numbers, scales = quantised_int8(weight)
    return (numbers.float() * scales.repeat_interleave(GROUP, dim=1)[:, : weight.shape[1]]).to(weight.dtype)


def packed_int8(weight: Float[Tensor, "rows columns"]) -> Int8[Tensor, " bytes"]:
    """Numbers, and behind them (at a multiple of 64 bytes) the scales, as :data:`STEP_INT8` reads them at one address."""
    numbers, scales = quantised_int8(weight)
    behind = (numbers.numel() + 63) // 64 * 64
    packed = torch.empty(behind + 4 * scales.numel(), dtype=torch.int8, device="cpu")
    packed[: numbers.numel()] = numbers.flatten()
    packed[behind:] = scales.flatten().view(torch.int8)
    return packed
