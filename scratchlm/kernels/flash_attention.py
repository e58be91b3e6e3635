"""FlashAttention-2 (Dao 2023, arXiv 2307.08691): attention in tiles, whose scores never exist as a whole.

::

              keys, in tiles →
    queries,  ◣ · · ·      ◣  the diagonal: computed, then masked           one row of tiles, from left to right, holds
    in        ■ ◣ · ·      ■  all of it may be read: no mask                    m  the largest score so far      (rows, 1)
    tiles     ■ ■ ◣ ·      ·  nothing may be read: never computed               l  Σ exp(score − m)              (rows, 1)
    ↓         ■ ■ ■ ◣                                                           o  Σ exp(score − m) · value      (rows, value_dim)

    A tile that raises m to m' first shrinks what was summed before:            l ← l · exp(m − m') + Σ exp(score − m')
    Out come o / l and L = m + log l. The way back has q, k, v, o / l and L, and needs no more: exp(score − L) is the
    softmax again, tile by tile, and the gradient of a score is P ∘ (dO Vᵀ − D) with D = rowsum(dO ∘ O).

Here the algorithm in torch, on any device and in any dtype, as the lecture draws it; its fast twins are `flash_attention_triton.py` for
CUDA and `flash_attention_cpp.py` for CPUs. :func:`flash_attention` takes a twin where it can.

A NaN in a query, key or value that is looked at comes out as NaN; a score of −∞ weighs nothing, as one that is masked.
On a CPU two runs agree to the bit, and so they do on CUDA but for masks whose columns are gathered (`index_add_`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from scratchlm.kernels import flash_attention_cpp
from scratchlm.kernels import flash_attention_op as fused
from scratchlm.kernels.attention import (
    PLAIN,
    Keys,
    Mixed,
    Queries,
    Scores,
    Values,
    auto_attention,
    sdpa_attention,
)
from scratchlm.kernels.blocked_attention import blocked_attention
from scratchlm.kernels.derivatives import first_derivative_only
from scratchlm.kernels.functions import soft_cap
from scratchlm.kernels.visibility import BLOCK, Span, Visibility, take

LogSums = Float[Tensor, "... heads q 1"]


def flash_attention(
    q: Queries,
    k: Keys,
    v: Values,
    visible: Visibility | None = None,
    scores: Scores = PLAIN,
    *,
    tile: int = BLOCK,
) -> Mixed:
    """FlashAttention-2: by Triton on CUDA, on a CPU in C++ where that knows how (:mod:`~scratchlm.kernels.flash_attention_cpp`), elsewhere by
    :func:`tiled_attention`.

    What is no matter of tiles goes elsewhere: the newest token alone and dropout to
    :func:`~scratchlm.kernels.attention.sdpa_attention`, a mask in parts to
    :func:`~scratchlm.kernels.blocked_attention.blocked_attention`; on CUDA, what the Triton kernels do not do
    (:func:`~scratchlm.kernels.flash_attention_op.supports` says why) to
    :func:`~scratchlm.kernels.attention.auto_attention`. An option that the kernels lack, or a machine on which they do not run, is
    told of once, as a warning. Under autocast everything is computed in its dtype.

    Args:
        q, k, v: (…, heads, queries, head_dim), (…, kv_heads, keys, head_dim), (…, kv_heads, keys, value_dim).
        visible: who may read whom; None: causal, the last query lined up with the last key.
        scores: scale, cap, ALiBi, sinks, dropout.
        tile: queries and keys of a tile of :func:`tiled_attention`; the Triton kernels choose theirs.
    """
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if q.shape[-2] == 1 or 0 in q.shape or 0 in k.shape or 0 in v.shape:
        return sdpa_attention(q, k, v, visible, scores)
    if scores.dropout:
        fused.say_once("attention_kernel = flash has no dropout; torch's attention computes it")
        return sdpa_attention(q, k, v, visible, scores)
    on_cuda = q.device.type == "cuda"
    if not on_cuda and flash_attention_cpp.computes(q, k, v, visible, scores):
        return fused.fused_attention(q, k, v, visible, scores)
    if not on_cuda and not torch.compiler.is_compiling():
        return tiled_attention(q, k, v, visible, scores, tile=tile)
    reason = fused.supports(visible, scores, q, k, v)
    if (
        reason is None
    ):  # in a compiled graph on a CPU, too: one operation instead of a copy of the loop's body for each tile
        return fused.fused_attention(q, k, v, visible, scores)
    if not on_cuda:
        return tiled_attention(q, k, v, visible, scores, tile=tile)
    fused.say_once(f"attention_kernel = flash leaves attention to another kernel: {reason}")
    return auto_attention(q, k, v, visible, scores)


def tiled_attention(
    q: Queries,
    k: Keys,
    v: Values,
    visible: Visibility | None = None,
    scores: Scores = PLAIN,
    *,
    tile: int = BLOCK,
) -> Mixed:
    """The algorithm in torch, for every rule; a query that may read nothing gets zeros, and no gradient.

    Products and sums are in fp32 at least. Under a mask with a plan only the plan's columns are visited (tiles of queries are then
    the plan's blocks), under the plain triangle none beyond the diagonal.

    Args:
        q, k, v, visible, scores: as in :func:`flash_attention`; `scores.dropout` must be 0.
        tile: queries and keys of a tile.
    """
    assert not scores.dropout
    if visible is not None and visible.parts:
        return blocked_attention(q, k, v, visible, scores)
    sheet = Sheet.of(q, k, visible, scores.scale_of(q.shape[-1]), scores.soft_cap, tile)
    mixed: Tensor = _Tiled.apply(q, k, v, scores.slopes, scores.sinks, sheet)
    return mixed


class _Tiled(torch.autograd.Function):
    """The two walks over the tiles as one differentiable function: kept are q, k, v, the output and L, no scores."""

    @staticmethod
    def forward(
        ctx: Any, q: Queries, k: Keys, v: Values, slopes: Tensor | None, sinks: Tensor | None, sheet: Sheet
    ) -> Mixed:
        out, log_sums = walk_forward(q, k, v, slopes, sinks, sheet)
        ctx.save_for_backward(q, k, v, slopes, sinks, out, log_sums)
        ctx.sheet = sheet
        return out

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, d_out: Mixed) -> tuple[Tensor | None, ...]:
        q, k, v, slopes, sinks, out, log_sums = ctx.saved_tensors
        d_q, d_k, d_v, d_slopes, delta = walk_backward(d_out, q, k, v, slopes, out, log_sums, ctx.sheet)
        d_sinks = None if sinks is None else gradient_of_sinks(sinks, log_sums, delta)
        return d_q, d_k, d_v, d_slopes, d_sinks, None


def walk_forward(
    q: Queries, k: Keys, v: Values, slopes: Tensor | None, sinks: Tensor | None, sheet: Sheet
) -> tuple[Mixed, LogSums]:
    """Algorithm 1: the output, in the dtype of v, and L, in fp32 at least; +inf where nothing is read."""
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        heads = q.unflatten(-3, (-1, sheet.group)), k.unsqueeze(-3), v.unsqueeze(-3)
        per_head = None if slopes is None else _grouped(slopes, sheet, wide)
        sunk = None if sinks is None else _grouped(sinks, sheet, wide)[..., None, None]
        outputs, sums = [], []
        for rows, tiles in sheet.rows():
            queries = heads[0][..., rows, :].to(wide)
            # A sink is a score whose value is zero: it is there before the first tile.
            m = queries.new_full((*queries.shape[:-1], 1), float("-inf")) if sunk is None else sunk
            m = m.expand(*queries.shape[:-1], 1)
            l = torch.zeros_like(m) if sunk is None else torch.ones_like(m)
            o = queries.new_zeros(*queries.shape[:-1], v.shape[-1])
            for columns in tiles:
                keys, values = (take(x, columns, -2).to(wide) for x in heads[1:])
                found, _ = sheet.scores(queries, keys, per_head, rows, columns)
                higher = torch.maximum(m, found.amax(dim=-1, keepdim=True))
                base = higher.masked_fill(higher == float("-inf"), 0.0)  # a row that has read nothing yet
                weights, shrink = torch.exp(found - base), torch.exp(m - base)
                l = l * shrink + weights.sum(dim=-1, keepdim=True)
                o = o * shrink + weights @ values
                m = higher
            empty = l == 0
            outputs.append(o / l.masked_fill(empty, 1.0))
            sums.append((m + torch.log(l)).masked_fill(empty, float("inf")))  # exp(score − ∞) = 0: no gradient
        return torch.cat(outputs, dim=-2).to(v.dtype).flatten(-4, -3), torch.cat(sums, dim=-2).flatten(-4, -3)


def walk_backward(
    d_out: Mixed,
    q: Queries,
    k: Keys,
    v: Values,
    slopes: Tensor | None,
    out: Mixed,
    log_sums: LogSums,
    sheet: Sheet,
) -> tuple[Queries, Keys, Values, Tensor | None, LogSums]:
    """Algorithm 2 with its loops exchanged, queries outside and keys inside: the gradients of q, k, v and the slopes, and D."""
    wide = log_sums.dtype
    with torch.autocast(q.device.type, enabled=False):
        heads = q.unflatten(-3, (-1, sheet.group)), k.unsqueeze(-3), v.unsqueeze(-3)
        per_head = None if slopes is None else _grouped(slopes, sheet, wide)
        d_slopes = None if per_head is None else torch.zeros_like(per_head)
        d_out = d_out.to(wide)
        delta = (d_out * out.to(wide)).sum(dim=-1, keepdim=True)
        by_group = [x.unflatten(-3, (-1, sheet.group)) for x in (d_out, delta, log_sums)]
        d_q, d_k, d_v = [], torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        for rows, tiles in sheet.rows():
            queries = heads[0][..., rows, :].to(wide)
            d_o, of_delta, of_sums = (x[..., rows, :] for x in by_group)
            d_rows = torch.zeros_like(queries)
            for columns in tiles:
                keys, values = (take(x, columns, -2).to(wide) for x in heads[1:])
                found, capped = sheet.scores(queries, keys, per_head, rows, columns)
                p = torch.exp(found - of_sums)
                _add(d_v, columns, (p.transpose(-1, -2) @ d_o).sum(dim=-3))
                d_scores = p * (d_o @ values.transpose(-1, -2) - of_delta)
                if d_slopes is not None:
                    each = (d_scores * sheet.distance(rows, columns)).sum(dim=(-2, -1))
                    d_slopes = d_slopes - each.reshape(-1, *each.shape[-2:]).sum(dim=0)
                if sheet.cap is not None:
                    d_scores = d_scores * (1 - (capped / sheet.cap) ** 2)
                d_rows = d_rows + d_scores @ keys
                _add(d_k, columns, (d_scores.transpose(-1, -2) @ queries).sum(dim=-3))
            d_q.append(d_rows * sheet.scale)
        d_queries = torch.cat(d_q, dim=-2).flatten(-4, -3).to(q.dtype)
        if d_slopes is not None and slopes is not None:
            d_slopes = d_slopes.flatten().to(slopes.dtype)
    return d_queries, (d_k * sheet.scale).to(k.dtype), d_v.to(v.dtype), d_slopes, delta


def gradient_of_sinks(sinks: Float[Tensor, " heads"], log_sums: LogSums, delta: LogSums) -> Float[Tensor, " heads"]:
    """The sink's share of the softmax times (0 − D), for its value is zero."""
    share = torch.exp(sinks.to(log_sums.dtype)[:, None, None] - log_sums)
    return -(share * delta).sum(dim=(-2, -1)).reshape(-1, len(sinks)).sum(dim=0).to(sinks.dtype)


def _add(total: Tensor, columns: Span | Tensor, part: Tensor) -> None:
    """total[…, columns, :] += part."""
    if isinstance(columns, Tensor):
        total.index_add_(-2, columns, part)
    else:
        total.narrow(-2, columns[0], columns[1] - columns[0]).add_(part)


@dataclass(frozen=True)
class Sheet:
    """All of the problem that is no tensor to differentiate: sizes, masks, and which tiles there are."""

    queries: int
    keys: int
    group: int
    scale: float
    cap: float | None
    visible: Visibility | None
    tile: int
    device: torch.device

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        visible: Visibility | None,
        scale: float,
        cap: float | None,
        tile: int = BLOCK,
    ) -> Sheet:
        return cls(q.shape[-2], k.shape[-2], q.shape[-3] // k.shape[-3], scale, cap, visible, tile, q.device)

    def rows(self) -> Iterator[tuple[slice, list[Span | Tensor]]]:
        """Each tile of queries with the tiles of keys that some of its queries may read."""
        planned = self.visible is not None and self.visible.columns is not None
        height = self.visible.block if self.visible is not None and planned else self.tile
        for number, start in enumerate(range(0, self.queries, height)):
            end = min(start + height, self.queries)
            columns: Span | Tensor = (0, self.keys)
            if self.visible is None:
                columns = (0, end + self.keys - self.queries)
            elif self.visible.columns is not None:
                columns = self.visible.columns[number]
            yield slice(start, end), _cut(columns, self.tile)

    def allowed(self, rows: slice, columns: Span | Tensor) -> Bool[Tensor, "... q k"] | None:
        """Who may read whom within a tile, with dimensions of 1 for the heads of a group; None: everybody."""
        if self.visible is not None:
            mask = self.visible.tile(rows, columns)
            return mask.unsqueeze(-3) if mask.ndim > 2 else mask
        assert not isinstance(columns, Tensor)
        if columns[1] - 1 <= rows.start + self.keys - self.queries:
            return None
        return self._places(rows)[:, None] >= torch.arange(*columns, device=self.device)

    def distance(self, rows: slice, columns: Span | Tensor) -> Tensor:
        """How far each key of a tile is from each query, likewise."""
        if self.visible is not None:
            away = self.visible.distance(rows, columns)
            return away.unsqueeze(-3) if away.ndim > 2 else away
        assert not isinstance(columns, Tensor)
        return (self._places(rows)[:, None] - torch.arange(*columns, device=self.device)).abs()

    def _places(self, rows: slice) -> Tensor:
        """The keys beside which these queries stand."""
        past = self.keys - self.queries
        return torch.arange(rows.start + past, rows.stop + past, device=self.device)

    def scores(
        self, q: Tensor, k: Tensor, slopes: Tensor | None, rows: slice, columns: Span | Tensor
    ) -> tuple[Float[Tensor, "... q k"], Tensor]:
        """A tile's scores, −inf where nothing may be read, and beside them those before ALiBi and the mask."""
        capped = soft_cap(q @ k.transpose(-1, -2) * self.scale, self.cap)
        found = capped
        if slopes is not None:
            found = found - slopes[..., None, None] * self.distance(rows, columns)
        allowed = self.allowed(rows, columns)
        return found if allowed is None else found.masked_fill(~allowed, float("-inf")), capped


def _cut(columns: Span | Tensor, tile: int) -> list[Span | Tensor]:
    if isinstance(columns, Tensor):
        return list(columns.split(tile)) if len(columns) else []
    return [(start, min(start + tile, columns[1])) for start in range(columns[0], columns[1], tile)]


def _grouped(per_head: Float[Tensor, " heads"], sheet: Sheet, dtype: torch.dtype) -> Tensor:
    """One number per head, shaped to stand before the rows and columns of a tile: (kv_heads, group)."""
    return per_head.to(dtype).unflatten(0, (-1, sheet.group))
