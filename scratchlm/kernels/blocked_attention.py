"""Attention in blocks of queries, each reading only the columns that its rule lets it read."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from scratchlm.kernels.attention import (
    PLAIN,
    Keys,
    Mixed,
    Queries,
    Scores,
    Values,
    causal_triangle,
    distances,
    for_every_head,
    scaled_and_capped,
    sdpa_attention,
    weights_with_sink,
)
from scratchlm.kernels.visibility import BLOCK, Span, Visibility, take


def _plan(visible: Visibility | None, length: int, block: int) -> list[Span | Tensor]:
    """Columns of each block of queries; without a plan of its own a causal row reads up to the block's end."""
    if visible is None:
        return [(0, min(start + block, length)) for start in range(0, length, block)]
    if visible.columns is None:
        return [(0, length) for _ in range(0, length, block)]
    return list(visible.columns)


def blocked_attention(
    q: Queries, k: Keys, v: Values, visible: Visibility | None = None, scores: Scores = PLAIN, *, block: int = BLOCK
) -> Mixed:
    """The same as the formula, in plain matmuls that a compiler fuses with the softmax.

    ::

            keys →              With n blocks, (n + 1) / 2n of the causal scores are computed instead of all; under a window
        q   ■ · · ·             of w positions w + block per query, whatever the length; for rules whose columns do not hang
        ↓   ■ ■ · ·             together the columns are gathered first. Memory and FLOPs follow, forward and backward.
            · ■ ■ ·             At short lengths on a CPU this beats flash attention even for the plain triangle.
            · · ■ ■

    A query that covers only the end of the keys (generation) goes to :func:`sdpa_attention`.

    Args:
        q, k, v: (…, heads, length, head_dim), (…, kv_heads, length, head_dim), (…, kv_heads, length, value_dim).
        visible: who may read whom; its own `block` holds if it has a plan.
        scores: scale, cap, ALiBi, sink, dropout.
        block: queries per block.
    """
    length = q.shape[-2]
    if k.shape[-2] != length or length == 0 or (visible is not None and visible.key_mask is not None):
        return sdpa_attention(q, k, v, visible, scores)
    if visible is not None and visible.planned:
        block = visible.block
    k, v = for_every_head(q, k, v)
    if visible is not None and visible.parts:
        return _merged([_partial(q, k, v, part, scores) for part in visible.parts], scores).to(v.dtype)
    outputs = []
    for start, columns in zip(range(0, length, block), _plan(visible, length, block), strict=True):
        rows = slice(start, min(start + block, length))
        weights = _weights(q[..., rows, :], take(k, columns, -2), visible, scores, rows, columns)
        outputs.append(F.dropout(weights, scores.dropout).to(v.dtype) @ take(v, columns, -2))
    return torch.cat(outputs, dim=-2)


def _weights(
    q: Tensor, k: Tensor, visible: Visibility | None, scores: Scores, rows: slice, columns: Span | Tensor
) -> Tensor:
    raw = _scores(q, k, visible, scores, rows, columns)
    if scores.sinks is not None:
        return weights_with_sink(raw, scores.sinks)
    return raw.softmax(dim=-1)  # no row is empty: every position may read itself


def _scores(
    q: Tensor, k: Tensor, visible: Visibility | None, scores: Scores, rows: slice, columns: Span | Tensor
) -> Tensor:
    """Everything up to the softmax, −inf where nothing may be read."""
    raw = scaled_and_capped(q @ k.transpose(-1, -2), scores, q.shape[-1])
    sizes = rows.stop - rows.start, rows.stop  # without a rule the block reads up to its own end
    if scores.slopes is not None:
        away = distances(*sizes, q.device) if visible is None else visible.distance(rows, columns)
        raw = raw - scores.slopes.to(raw.dtype)[:, None, None] * away
    allowed = causal_triangle(*sizes, q.device) if visible is None else visible.tile(rows, columns)
    # In place where nothing is learnt: nobody else holds the scores.
    hide = raw.masked_fill if torch.is_grad_enabled() else raw.masked_fill_
    return hide(~allowed, float("-inf"))


Partial = tuple[Tensor, Tensor, Tensor]
"""A part's Σ exp(score − m) · value (…, heads, length, value_dim), Σ exp(score − m) and m (…, heads, length, 1)."""


def _partial(q: Tensor, k: Tensor, v: Tensor, part: Visibility, scores: Scores) -> Partial:
    """One part's sums, computed in the part's order and put back."""
    if part.order is not None:
        q, k, v = (x.index_select(-2, part.order) for x in (q, k, v))
    pieces: list[Partial] = []
    length = q.shape[-2]
    assert part.columns is not None
    for start, columns in zip(range(0, length, part.block), part.columns, strict=True):
        rows = slice(start, min(start + part.block, length))
        raw = _scores(q[..., rows, :], take(k, columns, -2), part, scores, rows, columns)
        if raw.shape[-1] == 0:  # this block reads nothing here
            nothing = raw.new_zeros(*raw.shape[:-1], v.shape[-1])
            pieces.append((nothing, nothing[..., :1], nothing[..., :1] + LOWEST))
            continue
        highest = raw.detach().amax(dim=-1, keepdim=True).clamp(min=LOWEST)
        exponentials = torch.exp(raw - highest)
        kept = F.dropout(exponentials, scores.dropout).to(v.dtype)
        pieces.append((kept @ take(v, columns, -2), exponentials.sum(dim=-1, keepdim=True), highest))
    mixed, total, highest = (torch.cat(parts, dim=-2) for parts in zip(*pieces, strict=True))
    if part.order is not None:
        back = torch.argsort(part.order)
        mixed, total, highest = (x.index_select(-2, back) for x in (mixed, total, highest))
    return mixed, total, highest


LOWEST = -1e30
"""Stands for the maximum of a row without any score: exp of −inf minus it is still 0."""


def _merged(parts: list[Partial], scores: Scores) -> Tensor:
    """The softmax over all parts together: each part's sums brought to the common maximum (as flash attention does)."""
    highest = parts[0][2]
    for _, _, other in parts[1:]:
        highest = torch.maximum(highest, other)
    if scores.sinks is not None:
        highest = torch.maximum(highest, scores.sinks.detach().to(highest.dtype)[:, None, None])
    mixed, total = torch.zeros_like(parts[0][0], dtype=highest.dtype), torch.zeros_like(highest)
    if scores.sinks is not None:
        total = total + torch.exp(scores.sinks.to(highest.dtype)[:, None, None] - highest)
    for values, sums, own in parts:
        factor = torch.exp(own - highest)
        mixed, total = mixed + values * factor, total + sums * factor
    return mixed / total
