"""The language-model loss: −log softmax(logits)[target], summed over tokens.

Two implementations of head + cross-entropy. The reference computes all logits. The chunked one walks over blocks of
rows and computes each block's loss and gradient at once, so that the (tokens × vocabulary) logits never exist as a whole
and the backward pass has nothing left to do but scale. Kernels of its own do so in place: on a GPU `cross_entropy_triton.py`, on a CPU `cross_entropy_cpp.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scratchlm.kernels import cross_entropy_cpp
from scratchlm.kernels.derivatives import first_derivative_only
from scratchlm.kernels.functions import soft_cap
from scratchlm.kernels.triton_here import DTYPES, computes, runs_on

IN_TORCH = "the loss and the logits' gradient are computed by torch's kernels"
IGNORE_INDEX = -100
"""Targets with this value count for nothing (padding, re-read context), as in torch."""


def cross_entropy(logits: Float[Tensor, "... vocab"], targets: Int[Tensor, " ..."]) -> Float[Tensor, " ..."]:
    """log Σ exp(logits) − logits[target] per token, in nats; 0 where the target is IGNORE_INDEX.

    The maximum is subtracted before exp, so that no logit is too large; half precision is widened to fp32 first.
    """
    wide = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    shifted = wide - wide.amax(dim=-1, keepdim=True).detach()
    log_total = shifted.exp().sum(dim=-1).log()
    ignored = targets == IGNORE_INDEX
    chosen = shifted.gather(-1, targets.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)
    return (log_total - chosen).masked_fill(ignored, 0.0)


@dataclass(frozen=True)
class HeadOptions:
    """What happens between the product with the head's weight and the loss.

        x · W (+ b) ── × scale ── soft cap ── softmax ──► −log p(target) + z_loss · (log Σ exp logits)²

    Attributes:
        scale: factor of the logits.
        soft_cap: c · tanh(logit / c); None: off.
        z_loss: weight of the squared log-normaliser, which keeps it near 0 (PaLM: Chowdhery et al. 2022, arXiv 2204.02311,
            section 5, with 1e-4).
    """

    scale: float = 1.0
    soft_cap: float | None = None
    z_loss: float = 0.0


PLAIN_HEAD = HeadOptions()


def reference_linear_cross_entropy(
    x: Float[Tensor, "... d_model"],
    weight: Float[Tensor, "vocab d_model"],
    targets: Int[Tensor, " ..."],
    options: HeadOptions = PLAIN_HEAD,
    *,
    bias: Float[Tensor, " vocab"] | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """All logits at once: the objective summed over tokens, and the cross-entropy alone (without gradient)."""
    products = x @ weight.T if bias is None else x @ weight.T + bias
    logits = soft_cap(products * options.scale, options.soft_cap)
    nats = cross_entropy(logits, targets).sum()
    if not options.z_loss:
        return nats, nats.detach()
    wide = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    squared = wide.logsumexp(dim=-1).square().masked_fill(targets == IGNORE_INDEX, 0.0)
    return nats + options.z_loss * squared.sum(), nats.detach()


def _loss_and_gradient(
    products: Float[Tensor, "rows vocab"], targets: Int[Tensor, " rows"], options: HeadOptions
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, "rows vocab"]]:
    """Objective and cross-entropy of a block of rows, and the gradient with respect to the products, in their dtype.

    With logits l, their log-normaliser Z and p = softmax(l): d/dl = (1 + 2 z Z) p − onehot; through the cap times
    1 − (l / c)², through the scale times it.
    """
    logits = products.float() if products.dtype in (torch.bfloat16, torch.float16) else products
    if options.scale != 1.0:
        logits = logits * options.scale
    logits = soft_cap(logits, options.soft_cap)
    highest = logits.amax(dim=-1, keepdim=True)
    shifted = logits - highest
    exponentials = shifted.exp()
    total = exponentials.sum(dim=-1, keepdim=True)
    ignored = (targets == IGNORE_INDEX).unsqueeze(-1)
    safe = targets.unsqueeze(-1).masked_fill(ignored, 0)
    losses = total.log() - shifted.gather(-1, safe)
    columns = torch.arange(logits.shape[-1], device=logits.device)
    chosen = (columns == safe).to(logits.dtype)
    nats = losses.masked_fill(ignored, 0.0).sum()
    if options.z_loss:
        normaliser = total.log() + highest
        objective = nats + options.z_loss * normaliser.square().masked_fill(ignored, 0.0).sum()
        gradient = exponentials / total * (1 + 2 * options.z_loss * normaliser) - chosen
    else:
        objective, gradient = nats.clone(), exponentials / total - chosen
    if options.soft_cap is not None:
        gradient = gradient * (1 - (logits / options.soft_cap).square())
    if options.scale != 1.0:
        gradient = gradient * options.scale
    return objective, nats, gradient.masked_fill(ignored, 0.0).to(products.dtype)


@functools.cache
def _compiled_loss_and_gradient() -> Callable[[Tensor, Tensor, HeadOptions], tuple[Tensor, Tensor, Tensor]]:
    return torch.compile(_loss_and_gradient, dynamic=False)


def _kernel_for(
    device: torch.device, dtype: torch.dtype, options: HeadOptions, compiled: bool, wants_gradient: bool
) -> Callable[[Tensor, Tensor, HeadOptions], tuple[Tensor, Tensor, Tensor]]:
    """What computes a block's loss and gradient: Triton where it runs, C++ where that is for it, whether or not the rest is compiled."""
    known = dtype in DTYPES
    if known and runs_on(device, IN_TORCH):
        from scratchlm.kernels.cross_entropy_triton import loss_and_gradient

        return functools.partial(loss_and_gradient, wants_gradient=wants_gradient)
    if wants_gradient and cross_entropy_cpp.is_offered(device, dtype, options) and cross_entropy_cpp.runs(dtype):
        return cross_entropy_cpp.loss_and_gradient
    return _compiled_loss_and_gradient() if compiled else _loss_and_gradient


def rows_for(vocab: int, *, compiled: bool, device_type: str = "cpu") -> int:
    """Tokens per block. On a GPU, which few large products fill: the power of two of at most 2²⁹ logits, from 1,024 to 16,384.

    (16,384 tokens of a 124M model on an H200, a vocabulary of 50,304: 37.6 ms per step with 1,024 rows, 35.3 with 4,096, 35.2 with 8,192, 34.8
    with 16,384.) Elsewhere 1,024, where the pointwise part is one pass; where it leaves copies behind, fewer for a large vocabulary, whose block then
    has at most 2²⁵ logits, but 128 at least.
    """

    def power_of_two(logits: int) -> int:
        return 1 << (logits // vocab).bit_length() >> 1

    if device_type == "cuda":
        return max(1024, min(16384, power_of_two(2**29)))
    return 1024 if compiled else max(128, min(1024, power_of_two(2**25)))


def blocks_of(tokens: int, rows: int) -> list[slice]:
    """Which tokens' logits are there together, one block after the other."""
    return [slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows)]


def multiplies_wide(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of bf16 (`dtype`) come in fp32, and are added up there, within their kernels."""
    if device.type != "cuda":
        return False
    from scratchlm.kernels.wide_product import works

    return works(device, dtype)


def _plus_product(total: Tensor | None, a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """a b in `wide`, added to `total`, if there is one, in its place."""
    if a.dtype != wide == torch.float32 and multiplies_wide(a.device, a.dtype):
        from scratchlm.kernels.wide_product import product_

        result = a.new_empty(a.shape[0], b.shape[1], dtype=wide) if total is None else total
        product_(result, a, b, add=total is not None)
        return result
    if total is None:
        return (a @ b).to(wide)
    total += a @ b
    return total


def _scaled(x: Tensor, by: Tensor, dtype: torch.dtype) -> Tensor:
    """x times a scalar, in `dtype`."""
    if dtype in DTYPES and x.is_contiguous() and computes(x, IN_TORCH):
        from scratchlm.kernels.cross_entropy_triton import scaled

        return scaled(x, by, dtype)
    return (x * by).to(dtype)


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        options: HeadOptions,
        rows: int,
        compiled: bool,
        wants_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        ctx.dtypes = (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        kernel = _kernel_for(x.device, dtype, options, compiled, wants_gradient)
        wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
        objective = torch.zeros((), dtype=wide, device=x.device)
        nats = torch.zeros((), dtype=wide, device=x.device)
        d_x = torch.empty_like(x) if wants_gradient else None
        d_weight: Tensor | None = None
        d_bias = (
            torch.zeros(bias.shape, dtype=wide, device=x.device) if wants_gradient and bias is not None else None
        )
        for block in blocks_of(x.shape[0], rows):
            products = x[block] @ weight.T if bias is None else torch.addmm(bias, x[block], weight.T)
            block_objective, block_nats, gradient = kernel(products, targets[block], options)
            objective += block_objective
            nats += block_nats
            if d_x is not None:
                torch.mm(gradient, weight, out=d_x[block])
                d_weight = _plus_product(d_weight, gradient.T, x[block], wide)
            if d_bias is not None:
                d_bias += gradient.sum(dim=0, dtype=wide)
            del products, gradient  # else they were still there while the next block's come to be
        if wants_gradient:
            if d_weight is None:  # no tokens
                d_weight = torch.zeros(weight.shape, dtype=wide, device=x.device)
            ctx.save_for_backward(d_x, d_weight, d_bias)
        ctx.mark_non_differentiable(nats)
        return objective, nats

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        upstream = grad_outputs[0]
        given = (
            None if found is None else _scaled(found, upstream, dtype)
            for found, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*given, None, None, None, None, None)


def chunked_linear_cross_entropy(
    x: Float[Tensor, "... d_model"],
    weight: Float[Tensor, "vocab d_model"],
    targets: Int[Tensor, " ..."],
    options: HeadOptions = PLAIN_HEAD,
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    rows: int | None = None,
    compiled: bool = False,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Same sums as :func:`reference_linear_cross_entropy`, `rows` tokens at a time, gradients computed in the forward.

        x ─┬─ block 0 ─► logits ─► loss, softmax − onehot ─► d_x block, d_weight +=        peak: rows × vocabulary
           ├─ block 1 ─► …                                                                 instead of tokens × vocabulary
           └─ …

    Where Triton runs, or a kernel in C++, a block's logits become their gradient in place: the peak is one block in the products' dtype.

    Args:
        x: last hidden states; computed in autocast's dtype where autocast is on.
        weight, bias: the head's.
        targets: int64; IGNORE_INDEX counts for nothing.
        options: scale, soft cap, z-loss.
        rows: tokens per block; None: :func:`rows_for`.
        compiled: run the pointwise part through torch.compile, where it is not Triton's.

    Returns:
        The objective summed over tokens, and the cross-entropy alone, which has no gradient.
    """
    if rows is None:
        # Large blocks where the kernel works in place; torch's own would hold each several times, in fp32.
        whose = "cuda" if x.device.type == "cuda" and runs_on(x.device, IN_TORCH) else "cpu"
        rows = rows_for(weight.shape[0], compiled=compiled, device_type=whose)
    flat = x.reshape(-1, x.shape[-1])
    # Asked here: inside the function gradients are always off, and `needs_input_grad` does not look at no_grad.
    asking = any(given.requires_grad for given in (x, weight, bias) if given is not None)
    wants_gradient = torch.is_grad_enabled() and asking
    objective, nats = _ChunkedLinearCrossEntropy.apply(
        flat, weight, bias, targets.reshape(-1), options, rows, compiled, wants_gradient
    )
    return objective, nats
