"""Loops over rows for CPUs, compiled by Numba at first use and kept on disk: :mod:`matvec` and :mod:`rms_norm` call them.

They take addresses rather than arrays: where one token is written at a time, wrapping tensors in arrays would cost more than the
small products themselves. bf16 numbers are read as the upper halves of fp32 numbers, computed with in fp32, and rounded to the
nearest (ties to even) when written.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from types import FunctionType
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit, prange
from numba.core import types
from numba.extending import intrinsic, overload

# ---------------------------------------------------------------------------------------------------- numbers and addresses


built_in: Any = intrinsic  # for type checkers, who know nothing of the typing context that numba fills in


@built_in
def as_float(typing_context: Any, bits: Any) -> Any:
    """The fp32 number that 32 bits stand for."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@built_in
def as_bits(typing_context: Any, value: Any) -> Any:
    """The 32 bits of an fp32 number."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@built_in
def pointer(typing_context: Any, address: Any) -> Any:
    """What an address points to."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate


def widened(stored: Any) -> Any:
    """A stored number in fp32."""


def rounded(value: Any, like: Any) -> Any:
    """An fp32 number as an array like `like` stores it."""


@overload(widened, strict=False)
def _widened(stored: Any) -> Any:
    if stored == types.uint16:
        return lambda stored: as_float(np.uint32(stored) << np.uint32(16))
    return lambda stored: stored


@overload(rounded, strict=False)
def _rounded(value: Any, like: Any) -> Any:
    def to_bf16(value: Any, like: Any) -> Any:
        bits = as_bits(value)
        if bits & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000):  # NaN: rounding up could make it an infinity
            return np.uint16(0x7FC0)
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        return np.uint16((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))

    return to_bf16 if like.dtype == types.uint16 else lambda value, like: value


# ---------------------------------------------------------------------------------------------------- loops


def _matvec(weight: Any, x: Any, bias: Any, y: Any) -> None:
    """y = W x + b; a bias of length 0: none."""
    wide = np.empty(len(x), np.float32)
    for column in range(len(x)):
        wide[column] = widened(x[column])
    for row in prange(len(weight)):
        total = np.float32(0)
        for column in range(len(wide)):
            total += widened(weight[row, column]) * wide[column]
        if len(bias):
            total += widened(bias[row])
        y[row] = rounded(total, y)


def _rms_norm(x: Any, gain: Any, offset: Any, eps: Any, y: Any) -> None:
    """y = x / sqrt(mean(x²) + ε) · (offset + gain) by rows; a gain of length 0: 1."""
    for row in prange(len(x)):
        squares = np.float32(0)
        for column in range(x.shape[1]):
            value = widened(x[row, column])
            squares += value * value
        scale = np.float32(1) / np.sqrt(squares / np.float32(x.shape[1]) + eps)
        if len(gain):
            for column in range(x.shape[1]):
                y[row, column] = rounded(widened(x[row, column]) * scale * (offset + widened(gain[column])), y)
        else:
            for column in range(x.shape[1]):
                y[row, column] = rounded(widened(x[row, column]) * scale, y)


def _compiled(loop: Callable[..., None], parallel: bool) -> Callable[..., None]:
    """The loop on one thread or on several, under a name of its own: that is what numba tells kept code apart by."""
    name = loop.__name__ + ("_on_threads" if parallel else "_on_one")
    copy = FunctionType(loop.__code__, loop.__globals__, name)
    return kept(copy, parallel)


def kept(function: FunctionType, parallel: bool = False) -> Callable[..., Any]:
    """Compiled at its first call for a dtype, and kept on disk under its name."""
    function.__qualname__ = function.__name__
    # Sums in any order, so that they run side by side; NaN and infinities stay.
    options: dict[str, Any] = {
        "fastmath": {"reassoc", "contract", "nsz"},
        "nogil": True,
        "parallel": parallel,
    }
    try:
        compiled: Callable[..., Any] = njit(cache=True, **options)(function)
    except RuntimeError:  # no folder to keep it in can be written
        compiled = njit(**options)(function)
    return compiled


_matvec_on_one, _matvec_on_threads = _compiled(_matvec, False), _compiled(_matvec, True)
_rms_norm_on_one, _rms_norm_on_threads = _compiled(_rms_norm, False), _compiled(_rms_norm, True)


# Addresses become arrays in a function of their own: of arrays made inside a parallel loop numba believes that nobody sees
# what is written to them, and leaves the writing out.


def _matvec_at_one(weight: Any, x: Any, bias: Any, y: Any, rows: Any, columns: Any, like: Any) -> None:
    _matvec_on_one(
        carray(pointer(weight), (rows, columns), like.dtype),
        carray(pointer(x), columns, like.dtype),
        carray(pointer(bias), rows if bias else 0, like.dtype),
        carray(pointer(y), rows, like.dtype),
    )


def _matvec_at_threads(weight: Any, x: Any, bias: Any, y: Any, rows: Any, columns: Any, like: Any) -> None:
    _matvec_on_threads(
        carray(pointer(weight), (rows, columns), like.dtype),
        carray(pointer(x), columns, like.dtype),
        carray(pointer(bias), rows if bias else 0, like.dtype),
        carray(pointer(y), rows, like.dtype),
    )


def _rms_norm_at_one(x: Any, gain: Any, offset: Any, eps: Any, y: Any, rows: Any, columns: Any, like: Any) -> None:
    _rms_norm_on_one(
        carray(pointer(x), (rows, columns), like.dtype),
        carray(pointer(gain), columns if gain else 0, like.dtype),
        np.float32(offset),
        np.float32(eps),
        carray(pointer(y), (rows, columns), like.dtype),
    )


def _rms_norm_at_threads(
    x: Any, gain: Any, offset: Any, eps: Any, y: Any, rows: Any, columns: Any, like: Any
) -> None:
    _rms_norm_on_threads(
        carray(pointer(x), (rows, columns), like.dtype),
        carray(pointer(gain), columns if gain else 0, like.dtype),
        np.float32(offset),
        np.float32(eps),
        carray(pointer(y), (rows, columns), like.dtype),
    )


MATVEC = _compiled(_matvec_at_one, False), _compiled(_matvec_at_threads, False)
"""y = W x + b of addresses (weight, x, bias or 0, y) and W's rows and columns: on one thread, and on several."""

RMS_NORM = _compiled(_rms_norm_at_one, False), _compiled(_rms_norm_at_threads, False)
"""Rows of x normed: addresses (x, gain or 0), offset, ε, address y, rows and columns: on one thread, and on several."""


# ---------------------------------------------------------------------------------------------------- threads


LIKE = {torch.float32: np.empty(0, np.float32), torch.bfloat16: np.empty(0, np.uint16)}
"""How numbers of a dtype are stored."""

_process = os.getpid()
_entered = threading.Lock()
"""Not every threading layer of numba may be entered twice at once, and none by the child of a fork."""


def call(loops: tuple[Callable[..., None], ...], *arguments: Any, dtype: torch.dtype, numbers: int) -> None:
    """Call a loop on as many threads as torch has, on one where there is little to do.

    Args:
        loops: :data:`MATVEC` or :data:`RMS_NORM`.
        arguments: of the loop; everything they point to is contiguous and of one dtype.
        dtype: fp32 or bf16.
        numbers: how many numbers the loop reads.
    """
    one, several = loops
    threads = min(torch.get_num_threads(), _MOST_THREADS)
    if numbers < FEW or threads == 1 or os.getpid() != _process or not _entered.acquire(blocking=False):
        one(*arguments, LIKE[dtype])
        return
    try:
        numba.set_num_threads(threads)
        several(*arguments, LIKE[dtype])
    finally:
        _entered.release()


FEW = 8192
"""Below this a second thread takes longer to wake up than to help."""

_MOST_THREADS = int(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
