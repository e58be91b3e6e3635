"""One step of Adam or AdamW for all parameters in one kernel that reads and writes everything once.

::

    parameters   w₀ ├────────┼────────┼──┤   w₁ ├────┤   w₂ ├────────┼───┤  …      a chunk: at most CHUNK numbers of one parameter
    programs         0        1        2       3          4        5                from the table: which parameter, and where

    each:  gradient × factor ──┐
           m, v ───────────────┼─► m, v, w ─► and w, rounded, into its bf16 copy

Bytes per parameter with bf16 gradients and a bf16 copy: 2 + 3 · 4 read, 3 · 4 + 2 written, 28, beside the 2 that the gradient's norm has read before. One
operation after the other (gradient widened, clipped, torch's fused Adam, the copy rounded) moves 50.

Addresses of gradients are new in every step, so that the table of addresses is sent along with each; which chunks there are is known from the sizes. Arithmetic
is in fp32; 1 − β comes from the host and 1 − βᵗ is computed in fp64, since both cancel.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 1024
"""Numbers per program; on an H200 0.84 ms for 124 million parameters, as with 512 and 2,048."""
WARPS = 4
POINTERS = tl.constexpr(6)
"""Addresses per parameter: gradient, parameter, m, v, count of steps, copy."""


@triton.jit
def _one_step(
    factor, w, g, m, v, beta1, rest1, beta2, rest2, eps, decay, shrink, rate, root_of_unbias, DECOUPLED: tl.constexpr,
):  # fmt: skip
    g = g.to(tl.float32) * factor
    if DECOUPLED:
        w = w * shrink
    else:
        g = g + decay * w
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    w = w - rate * m / (tl.sqrt(v) / root_of_unbias + eps)
    return w, m, v


@triton.jit
def _adam(
    addresses_at, sizes_at, owners_at, starts_at, factor_at, skip_at,
    lr, beta1, rest1, log_beta1, beta2, rest2, log_beta2, eps, decay, shrink,
    GRADIENT: tl.constexpr, COPY: tl.constexpr, SCALED: tl.constexpr, SKIPS: tl.constexpr, DECOUPLED: tl.constexpr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    factor = 1.0
    if SCALED:
        factor = tl.load(factor_at)
    chunk = tl.program_id(0)
    owner = tl.load(owners_at + chunk)
    start = tl.load(starts_at + chunk)
    left = tl.load(sizes_at + owner) - start
    if SKIPS:  # nothing is left to do
        left = tl.where(tl.load(skip_at) != 0.0, 0, left)
    addresses_at += owner.to(tl.int64) * POINTERS
    gradient_at = tl.load(addresses_at).to(tl.pointer_type(GRADIENT))
    parameter_at = tl.load(addresses_at + 1).to(tl.pointer_type(tl.float32))
    first_at = tl.load(addresses_at + 2).to(tl.pointer_type(tl.float32))
    second_at = tl.load(addresses_at + 3).to(tl.pointer_type(tl.float32))
    steps_at = tl.load(addresses_at + 4).to(tl.pointer_type(tl.float32))
    copy_at = tl.load(addresses_at + 5).to(tl.pointer_type(GRADIENT if COPY is None else COPY))
    if ALIGNED:
        gradient_at = tl.multiple_of(gradient_at, 16)
        parameter_at = tl.multiple_of(parameter_at, 16)
        first_at = tl.multiple_of(first_at, 16)
        second_at = tl.multiple_of(second_at, 16)
        copy_at = tl.multiple_of(copy_at, 16)
    start = tl.multiple_of(start, CHUNK)
    gradient_at += start
    parameter_at += start
    first_at += start
    second_at += start
    copy_at += start

    step = (tl.load(steps_at) + 1.0).to(tl.float64)
    rate = (lr / (1.0 - tl.exp(step * log_beta1))).to(tl.float32)
    root_of_unbias = tl.sqrt(1.0 - tl.exp(step * log_beta2)).to(tl.float32)

    place = tl.arange(0, CHUNK)
    if left >= CHUNK:  # without a mask, whose end nobody knows to be aligned, 16 bytes are read at once
        w, m, v = _one_step(
            factor, tl.load(parameter_at + place), tl.load(gradient_at + place), tl.load(first_at + place),
            tl.load(second_at + place), beta1, rest1, beta2, rest2, eps, decay, shrink, rate, root_of_unbias, DECOUPLED,
        )  # fmt: skip
        tl.store(parameter_at + place, w)
        tl.store(first_at + place, m)
        tl.store(second_at + place, v)
        if COPY is not None:
            tl.store(copy_at + place, w.to(COPY))
    else:
        inside = place < left
        w, m, v = _one_step(
            factor, tl.load(parameter_at + place, mask=inside, other=0.0),
            tl.load(gradient_at + place, mask=inside, other=0.0), tl.load(first_at + place, mask=inside, other=0.0),
            tl.load(second_at + place, mask=inside, other=0.0),
            beta1, rest1, beta2, rest2, eps, decay, shrink, rate, root_of_unbias, DECOUPLED,
        )  # fmt: skip
        tl.store(parameter_at + place, w, mask=inside)
        tl.store(first_at + place, m, mask=inside)
        tl.store(second_at + place, v, mask=inside)
        if COPY is not None:
            tl.store(copy_at + place, w.to(COPY), mask=inside)


@functools.lru_cache(maxsize=8)
def _chunks(sizes: tuple[int, ...], chunk: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The sizes, and of every chunk its parameter and where in it it begins."""
    counts = torch.tensor([-(-size // chunk) for size in sizes])
    owners = torch.arange(len(sizes), dtype=torch.int32).repeat_interleave(counts)
    first = counts.cumsum(0) - counts
    starts = (torch.arange(int(counts.sum())) - first.repeat_interleave(counts)) * chunk
    return torch.tensor(sizes).to(device), owners.to(device), starts.to(device)


def _addresses(columns: Sequence[Sequence[Tensor] | None], device: torch.device) -> tuple[Tensor, bool]:
    """A row of addresses per parameter, and whether 16 divides all but those of counts. Sent without waiting for the device."""
    rows = [[0] * len(columns[0]) if tensors is None else [t.data_ptr() for t in tensors] for tensors in columns]  # type: ignore[arg-type]
    aligned = all(address % 16 == 0 for place, row in enumerate(rows) if place != 4 for address in row)
    table = torch.tensor(rows, dtype=torch.int64).t().contiguous()
    if device.type == "cuda":  # pinned memory is not given away again before it has been read
        table = table.pin_memory().to(device, non_blocking=True)
    return table, aligned


def _of(beta: float) -> tuple[float, float, float]:
    """β, 1 − β, ln β."""
    return beta, 1.0 - beta, math.log(beta) if beta else -math.inf


def step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    steps: list[Tensor],
    copies: Sequence[Tensor],
    factor: Tensor | None,
    skip: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    decoupled: bool,
) -> None:
    """The operation ``scratchlm::adam_step_``; see :func:`scratchlm.kernels.adam.step_`."""
    device = parameters[0].device
    sizes, owners, starts = _chunks(tuple(p.numel() for p in parameters), CHUNK, device)
    gradients = [gradient.contiguous() for gradient in gradients]
    addresses, aligned = _addresses((gradients, parameters, first, second, steps, copies or None), device)
    if len(owners):  # else all of them are empty
        with torch.cuda.device_of(parameters[0]):
            _adam[(len(owners),)](
                *(addresses, sizes, owners, starts, factor, skip),
                *(lr, *_of(beta1), *_of(beta2), eps, decay, 1.0 - lr * decay),
                GRADIENT=_NAMES[gradients[0].dtype],
                COPY=_NAMES[copies[0].dtype] if copies else None,
                SCALED=factor is not None,
                SKIPS=skip is not None,
                DECOUPLED=decoupled,
                ALIGNED=aligned,
                CHUNK=CHUNK,
                num_warps=WARPS,
            )
    # Afterwards: all programs have read them.
    if skip is None:
        torch._foreach_add_(steps, 1)
    else:
        torch._foreach_add_(steps, [1.0 - skip] * len(steps))


_NAMES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
