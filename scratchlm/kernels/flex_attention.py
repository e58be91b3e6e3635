"""Attention through torch's FlexAttention: one fused kernel generated from the rule, which skips blocks it leaves out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention

from scratchlm.kernels.attention import PLAIN, Keys, Mixed, Queries, Scores, Values, sdpa_attention
from scratchlm.kernels.blocked_attention import blocked_attention
from scratchlm.kernels.visibility import Visibility


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(torch_flex_attention, dynamic=False)


def _call(q: Tensor) -> Callable[..., Any]:
    """Outside a compiled graph the fused kernel must be compiled; on a CPU torch computes it by the formula, which is exact."""
    if torch.compiler.is_compiling() or q.device.type == "cpu":
        return torch_flex_attention
    return _compiled()


def _block_mask(visible: Visibility | None, q: Tensor, keys: int) -> BlockMask:
    """The rule as FlexAttention asks for it: pair by pair, on places in the sequence."""
    batch, length = q.shape[0], q.shape[-2]
    past = keys - length

    def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i + past >= j

    def ruled(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        assert visible is not None
        queries = visible.queries.expand(batch, -1)[b, i]
        seen = visible.keys.expand(batch, -1)[b, j]
        prefix = visible.prefix
        if isinstance(prefix, Tensor):
            prefix = prefix.reshape(-1, 1, 1).expand(batch, 1, 1)[b]
        allowed = visible.rule.allowed(queries.reshape(1), seen.reshape(1), prefix).reshape(())
        if visible.query_documents is not None and visible.key_documents is not None:
            allowed = allowed & (
                visible.query_documents.expand(batch, -1)[b, i] == visible.key_documents.expand(batch, -1)[b, j]
            )
        return allowed

    rows = batch if visible is not None and _differs_by_row(visible) else None
    return create_block_mask(causal if visible is None else ruled, rows, None, length, keys, device=str(q.device))


def _differs_by_row(visible: Visibility) -> bool:
    tensors = (visible.queries, visible.keys, visible.query_documents, visible.prefix)
    return any(isinstance(t, Tensor) and t.ndim > 1 for t in tensors)


def flex_attention(
    q: Queries, k: Keys, v: Values, visible: Visibility | None = None, scores: Scores = PLAIN
) -> Mixed:
    """FlexAttention (Dong et al. 2024, arXiv 2412.05496), with cap and ALiBi as changes of the score.

    The sink is applied afterwards: with L = log Σ exp(scores), the output times σ(L − sink) is what a softmax with one more
    term would have given. Dropout, padding keys and inputs that are not (batch, heads, length, width) go to
    :func:`~scratchlm.kernels.attention.sdpa_attention`. On a CPU torch has no backward and computes the formula without saving
    anything: there training goes to :func:`~scratchlm.kernels.blocked_attention.blocked_attention`.
    """
    padded = visible is not None and visible.key_mask is not None
    if q.ndim != 4 or scores.dropout or padded or 0 in q.shape:
        return sdpa_attention(q, k, v, visible, scores)
    if q.device.type == "cpu" and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return blocked_attention(q, k, v, visible, scores)
    past = k.shape[-2] - q.shape[-2]
    batch = q.shape[0]

    def changed(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if scores.soft_cap is not None:
            score = scores.soft_cap * torch.tanh(score / scores.soft_cap)
        if scores.slopes is not None:
            if visible is None:
                away = i + past - j
            else:
                away = (visible.queries.expand(batch, -1)[b, i] - visible.keys.expand(batch, -1)[b, j]).abs()
            score = score - scores.slopes[h] * away
        return score

    unchanged = scores.soft_cap is None and scores.slopes is None
    result = _call(q)(
        q,
        k,
        v,
        score_mod=None if unchanged else changed,
        block_mask=_block_mask(visible, q, k.shape[-2]),
        scale=scores.scale_of(q.shape[-1]),
        enable_gqa=q.shape[-3] != k.shape[-3],
        return_aux=None if scores.sinks is None else AuxRequest(lse=True),
    )
    if scores.sinks is None:
        mixed: Tensor = result
        return mixed
    mixed, aux = result
    share = torch.sigmoid(aux.lse - scores.sinks.to(aux.lse.dtype)[:, None])
    return mixed * share.unsqueeze(-1).to(mixed.dtype)
