"""The language-model loss: −log softmax(logits)[target], summed over tokens.

Two implementations of head + cross-entropy. The reference computes all logits. The chunked one walks over blocks of
rows and computes each block's loss and gradient at once, so that the (tokens × vocabulary) logits never exist as a whole
and the backward pass has nothing left to do but scale.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

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


def reference_linear_cross_entropy(
    x: Float[Tensor, "... d_model"], weight: Float[Tensor, "vocab d_model"], targets: Int[Tensor, " ..."]
) -> Float[Tensor, ""]:
    """Sum over tokens of the cross-entropy of ``x @ weight.T``: all logits at once."""
    return cross_entropy(x @ weight.T, targets).sum()


def _loss_and_gradient(
    logits: Float[Tensor, "rows vocab"], targets: Int[Tensor, " rows"]
) -> tuple[Float[Tensor, ""], Float[Tensor, "rows vocab"]]:
    """Summed loss of a block of rows, and its gradient softmax(logits) − onehot(target), in the logits' dtype."""
    wide = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    shifted = wide - wide.amax(dim=-1, keepdim=True)
    exponentials = shifted.exp()
    total = exponentials.sum(dim=-1, keepdim=True)
    ignored = (targets == IGNORE_INDEX).unsqueeze(-1)
    safe = targets.unsqueeze(-1).masked_fill(ignored, 0)
    losses = total.log() - shifted.gather(-1, safe)
    columns = torch.arange(logits.shape[-1], device=logits.device)
    gradient = exponentials / total - (columns == safe).to(wide.dtype)
    return losses.masked_fill(ignored, 0.0).sum(), gradient.masked_fill(ignored, 0.0).to(logits.dtype)


@functools.cache
def _compiled_loss_and_gradient() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return torch.compile(_loss_and_gradient, dynamic=False)


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, rows: int, compiled: bool, wants_gradient: bool
    ) -> Tensor:
        kernel = _compiled_loss_and_gradient() if compiled else _loss_and_gradient
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        ctx.dtypes = (x.dtype, weight.dtype)
        x, weight = x.to(dtype), weight.to(dtype)
        wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
        total = torch.zeros((), dtype=wide, device=x.device)
        d_x = torch.empty_like(x) if wants_gradient else None
        d_weight = torch.zeros(weight.shape, dtype=wide, device=x.device) if wants_gradient else None
        for start in range(0, x.shape[0], rows):
            block = slice(start, start + rows)
            loss, gradient = kernel(x[block] @ weight.T, targets[block])
            total += loss
            if d_x is not None and d_weight is not None:
                torch.mm(gradient, weight, out=d_x[block])
                d_weight += gradient.T @ x[block]
        if wants_gradient:
            ctx.save_for_backward(d_x, d_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        d_x, d_weight = ctx.saved_tensors
        (upstream,) = grad_outputs
        x_dtype, weight_dtype = ctx.dtypes
        return (d_x * upstream).to(x_dtype), (d_weight * upstream).to(weight_dtype), None, None, None, None


def chunked_linear_cross_entropy(
    x: Float[Tensor, "... d_model"],
    weight: Float[Tensor, "vocab d_model"],
    targets: Int[Tensor, " ..."],
    *,
    rows: int = 1024,
    compiled: bool = False,
) -> Float[Tensor, ""]:
    """Same sum as :func:`reference_linear_cross_entropy`, `rows` tokens at a time, gradients computed in the forward.

        x ─┬─ block 0 ─► logits ─► loss, softmax − onehot ─► d_x block, d_weight +=        peak: rows × vocabulary
           ├─ block 1 ─► …                                                                 instead of tokens × vocabulary
           └─ …

    Args:
        x: last hidden states; computed in autocast's dtype where autocast is on.
        weight: the head's weight.
        targets: int64; IGNORE_INDEX counts for nothing.
        rows: tokens per block.
        compiled: run the pointwise part through torch.compile.
    """
    flat = x.reshape(-1, x.shape[-1])
    # Asked here: inside the function gradients are always off, and `needs_input_grad` does not look at no_grad.
    wants_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    result: Tensor = _ChunkedLinearCrossEntropy.apply(
        flat, weight, targets.reshape(-1), rows, compiled, wants_gradient
    )
    return result
