"""Loss and gradient of a block of logits in Triton: `_loss_and_gradient` of `cross_entropy.py`, the gradient in the logits' place.

One program per row. It reads the row twice and writes it once, and there is no second (rows × vocabulary) tensor:

::

    vocabulary →       BLOCK         BLOCK      …  the rest
    row 0        ├─────────────┼─────────────┼─────────┤       1st reading   m, the largest logit so far, and Σ exp(logit − m),
    row 1        ├─────────────┼─────────────┼─────────┤                     which shrinks by exp(m − m') when m grows to m'
    …               program i: row i, from left to right       then          the row's loss
                                                               2nd reading   ((1 + 2 z Z) p − onehot) · scale, written in place

Arithmetic is in fp32 whatever the logits' dtype, with exp(logit − m) as the formula has it: a product with log₂ e before the
difference would cost large logits their digits. Nothing is tuned by
measuring: another BLOCK adds in another order, and a resumed run is to find the same sums. Without a GPU it runs in Triton's interpreter, as
flash attention does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from scratchlm.kernels.cross_entropy import HeadOptions

BLOCK = 4096
"""Logits at a time; fewer where the vocabulary is smaller."""
WARPS = 8
"""Of a whole block: 16 logits per thread. Measured on an H200, 8,192 rows of 50,304 in bf16: 0.64 ms; with (4096, 16) 0.78, (8192, 16) 0.72, (8192, 32)
0.90, (16384, 32) 0.83, (2048, 8) 0.73; what torch.compile makes of the formula 1.04. Reading from right to left the second time: 0.67. One to eight programs
per multiprocessor that go over the rows: 0.86 to 3.1 for 10,672 rows, where one per row takes 0.82. The whole row held in registers: 6 to 8."""


@triton.jit
def logits_of(products, scale, cap, CAPPED: tl.constexpr):
    """Logits in fp32, and with a cap logit / cap, the tanh."""
    logits = products.to(tl.float32) * scale
    bent = logits
    if CAPPED:  # tanh x = 1 − 2 / (1 + exp 2x), right at ±∞ too
        bent = 1.0 - 2.0 / (1.0 + tl.exp(logits * (2.0 / cap)))
        logits = bent * cap
    return logits, bent


@triton.jit
def _loss_and_gradient(
    products_at, targets_at, objective_at, nats_at, products_row, vocab, scale, cap, z_loss,
    IGNORE: tl.constexpr, CAPPED: tl.constexpr, WRITES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # rows × vocabulary may exceed 2³¹
    products_at += row * products_row
    target = tl.load(targets_at + row)
    ignored = target == IGNORE
    known = (target >= 0) & (target < vocab)
    chosen, _of_chosen = logits_of(tl.load(products_at + tl.where(known, target, 0)), scale, cap, CAPPED)
    column = tl.arange(0, BLOCK)

    highest = float("-inf")
    total = 0.0
    for start in range(0, vocab, BLOCK):
        inside = start + column < vocab
        products = tl.load(products_at + start + column, mask=inside, other=0.0, eviction_policy="evict_last")
        logits, _ = logits_of(products, scale, cap, CAPPED)
        logits = tl.where(inside, logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing but −∞ yet
        total = total * tl.exp(highest - base) + tl.sum(tl.exp(logits - base), 0)
        highest = higher

    # A target that is no token must not pass unseen; where torch's kernels stop the process, the row becomes NaN.
    total = tl.where(known, total, float("nan"))
    normaliser = tl.log(total) + highest
    nats = tl.log(total) - (chosen - highest)
    tl.store(nats_at + row, tl.where(ignored, 0.0, nats))
    tl.store(objective_at + row, tl.where(ignored, 0.0, nats + z_loss * normaliser * normaliser))

    if WRITES:
        tl.debug_barrier()  # all threads have read `chosen`
        share = (1.0 + 2.0 * z_loss * normaliser) * scale / total
        for start in range(0, vocab, BLOCK):
            inside = start + column < vocab
            products = tl.load(products_at + start + column, mask=inside, other=0.0, eviction_policy="evict_first")
            logits, bent = logits_of(products, scale, cap, CAPPED)
            gradient = tl.exp(logits - highest) * share - tl.where(start + column == target, scale, 0.0)
            if CAPPED:
                gradient = gradient * (1.0 - bent * bent)
            gradient = tl.where(ignored, 0.0, gradient)
            tl.store(products_at + start + column, gradient.to(products_at.dtype.element_ty), mask=inside)


def tiling(vocab: int) -> dict[str, int]:
    """What the kernel is launched with for a vocabulary: a small one takes no more threads than it has work for."""
    block = min(BLOCK, triton.next_power_of_2(vocab))
    return {"BLOCK": block, "num_warps": max(1, WARPS * block // BLOCK)}


def loss_and_gradient(
    products: Float[Tensor, "rows vocab"],
    targets: Int[Tensor, " rows"],
    options: HeadOptions,
    *,
    wants_gradient: bool = True,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, "rows vocab"]]:
    """Objective and cross-entropy of a block of rows in fp32, and `products`, now their own gradient.

    Args:
        products: bf16, fp16 or fp32; each row in one piece, rows any distance apart. Overwritten.
        targets: int64; IGNORE_INDEX counts for nothing, any other that is no token makes the sums and its row NaN.
        options: scale, soft cap, z-loss.
        wants_gradient: without it the logits are read once, and stay.
    """
    from scratchlm.kernels.cross_entropy import IGNORE_INDEX

    rows, vocab = products.shape
    if products.stride(1) != 1 and rows and vocab > 1:
        raise ValueError("the kernel reads rows of logits that lie in one piece")
    sums = torch.empty(2, rows, dtype=torch.float32, device=products.device)
    if rows:
        with torch.cuda.device_of(products):
            _loss_and_gradient[(rows,)](
                *(products, targets.contiguous(), sums[0], sums[1], products.stride(0), vocab),
                *(float(options.scale), float(options.soft_cap or 0.0), float(options.z_loss)),
                IGNORE=IGNORE_INDEX,
                CAPPED=options.soft_cap is not None,
                WRITES=wants_gradient,
                **tiling(vocab),
            )
    objective, nats = sums.sum(dim=1)
    return objective, nats, products


@triton.jit
def _times(from_at, by_at, to_at, numbers, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < numbers
    product = tl.load(from_at + place, mask=inside).to(tl.float32) * tl.load(by_at).to(tl.float32)
    tl.store(to_at + place, product.to(to_at.dtype.element_ty), mask=inside)


def scaled(x: Tensor, by: Tensor, dtype: torch.dtype) -> Tensor:
    """``(x * by).to(dtype)`` in one pass; torch multiplies by a number of another dtype one entry at a time, and then casts.

    Args:
        x: fp32, bf16 or fp16, in one piece.
        by: a scalar on x's device.
        dtype: of the result.
    """
    found = torch.empty_like(x, dtype=dtype)
    if x.numel():
        with torch.cuda.device_of(x):
            _times[(triton.cdiv(x.numel(), BLOCK),)](x, by, found, x.numel(), BLOCK=BLOCK, num_warps=WARPS)
    return found
