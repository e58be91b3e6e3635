"""Scaled dot-product attention: softmax(Q Kᵀ / √d) V (Vaswani et al. 2017, arXiv 1706.03762, eq. 1).

Implementations with one signature: the formula here, torch's fused kernel here, blocks in `blocked_attention`, FlexAttention
in `flex_attention`. `visible` says which key a query may read; None means causal, where the last query lines up with the last
key. Keys and values may have fewer heads than queries (GQA: Ainslie et al. 2023, arXiv 2305.13245): query head h reads key
head h // (heads / kv_heads).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from scratchlm.kernels.functions import soft_cap, softmax
from scratchlm.kernels.visibility import Visibility

Queries = Float[Tensor, "... heads q head_dim"]
Keys = Float[Tensor, "... kv_heads k head_dim"]
Values = Float[Tensor, "... kv_heads k value_dim"]
Mixed = Float[Tensor, "... heads q value_dim"]


@dataclass(frozen=True)
class Scores:
    """What happens to the scores between the product q · k and the mixture of values.

        q · k ── × scale ── soft cap ── − slope · distance ── mask ── softmax (with sink) ── dropout ──►

    Attributes:
        scale: factor of the products; None: 1 / √head_dim.
        soft_cap: c · tanh(score / c) (Gemma 2, arXiv 2408.00118); None: off.
        slopes: ALiBi's slope per head, (heads,), times the distance is subtracted (Press et al. 2021, arXiv 2108.12409).
        sinks: a score per head, (heads,), that takes its share of the softmax and adds nothing to the mixture (gpt-oss;
            Xiao et al. 2023, arXiv 2309.17453, section 3.3).
        dropout: share of the softmax's weights set to zero, the rest scaled up.
    """

    scale: float | None = None
    soft_cap: float | None = None
    slopes: Float[Tensor, " heads"] | None = None
    sinks: Float[Tensor, " heads"] | None = None
    dropout: float = 0.0

    def scale_of(self, head_dim: int) -> float:
        return 1.0 / math.sqrt(head_dim) if self.scale is None else self.scale


PLAIN = Scores()


def causal_triangle(queries: int, keys: int, device: torch.device) -> Bool[Tensor, "q k"]:
    """True where key ≤ query, the last query lined up with the last key."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def distances(queries: int, keys: int, device: torch.device) -> Tensor:
    """|query − key| in positions, the last query lined up with the last key, (q, k)."""
    places = torch.arange(keys, device=device)
    return (places[keys - queries :, None] - places).abs()


def weights_with_sink(
    scores: Float[Tensor, "... heads q k"], sinks: Float[Tensor, " heads"] | None
) -> Float[Tensor, "... heads q k"]:
    """The softmax over keys and, if there is one, the head's sink; the sink's own share is left out."""
    if sinks is None:
        return softmax(scores)
    column = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
    return softmax(torch.cat([scores, column], dim=-1))[..., :-1]


def reference_attention(
    q: Queries, k: Keys, v: Values, visible: Visibility | None = None, scores: Scores = PLAIN
) -> Mixed:
    """The formula, with all scores in memory; a query that may read nothing gets zeros."""
    group = q.shape[-3] // k.shape[-3]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=-3), v.repeat_interleave(group, dim=-3)
    raw = einsum(q, k, "... h q d, ... h k d -> ... h q k")
    raw = raw.to(torch.promote_types(raw.dtype, torch.float32)) * scores.scale_of(q.shape[-1])
    raw = soft_cap(raw, scores.soft_cap)
    sizes = q.shape[-2], k.shape[-2]
    if scores.slopes is not None:
        away = distances(*sizes, q.device) if visible is None else visible.distance(*visible.everything)
        raw = raw - scores.slopes.to(raw.dtype)[:, None, None] * away
    allowed = causal_triangle(*sizes, q.device) if visible is None else visible.matrix()
    raw = raw.masked_fill(~allowed, float("-inf"))
    weights = F.dropout(weights_with_sink(raw, scores.sinks), scores.dropout).to(v.dtype)
    return einsum(weights, v, "... h q k, ... h k d -> ... h q d")


def sdpa_attention(
    q: Queries, k: Keys, v: Values, visible: Visibility | None = None, scores: Scores = PLAIN
) -> Mixed:
    """torch's fused kernel: flash attention where the device has one. A soft cap, which it lacks, goes to the formula.

    ALiBi and the mask become one additive matrix; a sink becomes one more key of zeros whose additive score it is.
    """
    if scores.soft_cap is not None:
        return reference_attention(q, k, v, visible, scores)
    queries, keys = q.shape[-2], k.shape[-2]
    options: dict[str, Any] = {
        "scale": scores.scale_of(q.shape[-1]),
        "enable_gqa": q.shape[-3] != k.shape[-3],
        "dropout_p": scores.dropout,
    }
    if scores.slopes is None and scores.sinks is None:
        if visible is None and queries == 1 < keys and options["enable_gqa"]:
            # The newest token alone: the query heads of a group are queries of one head, and each key is read once.
            grouped = q.unflatten(-3, (k.shape[-3], -1)).squeeze(-2)
            options["enable_gqa"] = False
            return F.scaled_dot_product_attention(grouped, k, v, **options).flatten(-3, -2).unsqueeze(-2)
        if visible is None and (queries == keys or queries == 1):
            return F.scaled_dot_product_attention(q, k, v, is_causal=queries == keys, **options)
        allowed = causal_triangle(queries, keys, q.device) if visible is None else visible.matrix()
        # A row without any allowed key is undefined in some of torch's backends: give it one and clear the output.
        nothing = ~allowed.any(dim=-1, keepdim=True)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed | nothing, **options)
        return out.masked_fill(nothing, 0.0)
    if queries == 1 and not scores.dropout:
        return _newest_token(q, k, v, visible, scores)
    return _with_additive_mask(q, k, v, visible, scores, options)


def _newest_token(q: Queries, k: Keys, v: Values, visible: Visibility | None, scores: Scores) -> Mixed:
    """One query with sinks or ALiBi by the formula, grouped: nothing is added to the cached keys, and each is read once."""
    grouped = q.unflatten(-3, (k.shape[-3], -1)).squeeze(-2)
    raw = (grouped @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) * scores.scale_of(
        q.shape[-1]
    )
    raw = raw.flatten(-3, -2).unsqueeze(-2)  # (…, heads, 1, keys)
    if scores.slopes is not None:
        away = distances(1, k.shape[-2], q.device) if visible is None else visible.distance(*visible.everything)
        raw = raw - scores.slopes.to(raw.dtype)[:, None, None] * away
    if visible is not None:
        raw = raw.masked_fill(~visible.matrix(), float("-inf"))
    weights = weights_with_sink(raw, scores.sinks).to(v.dtype)
    return (weights.squeeze(-2).unflatten(-2, (k.shape[-3], -1)) @ v).flatten(-3, -2).unsqueeze(-2)


def _with_additive_mask(
    q: Queries, k: Keys, v: Values, visible: Visibility | None, scores: Scores, options: dict[str, Any]
) -> Mixed:
    queries, keys = q.shape[-2], k.shape[-2]
    allowed = causal_triangle(queries, keys, q.device) if visible is None else visible.matrix()
    nothing = ~allowed.any(dim=-1, keepdim=True)
    added = torch.zeros(allowed.shape, dtype=q.dtype, device=q.device).masked_fill(~allowed, float("-inf"))
    if scores.slopes is not None:
        away = distances(queries, keys, q.device) if visible is None else visible.distance(*visible.everything)
        added = added - (scores.slopes[:, None, None] * away).to(q.dtype)
    added = added.masked_fill(nothing, 0.0)
    if scores.sinks is not None:
        heads = q.shape[-3]
        added = (
            added.expand(*added.shape[:-3], heads, queries, keys) if added.ndim > 2 else added.expand(heads, -1, -1)
        )
        column = scores.sinks.to(q.dtype)[:, None, None].expand(*added.shape[:-1], 1)
        added = torch.cat([added, column], dim=-1)
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=added, **options)
    return out.masked_fill(nothing, 0.0)


def auto_attention(
    q: Queries, k: Keys, v: Values, visible: Visibility | None = None, scores: Scores = PLAIN
) -> Mixed:
    """The fastest for the place.

    Blocks where they leave out work (a mask with a plan), where torch's kernel cannot go (a soft cap) or is slower (a short
    compiled sequence on a CPU); torch's kernel elsewhere.
    """
    from scratchlm.kernels.blocked_attention import blocked_attention

    whole = q.shape[-2] == k.shape[-2]
    sparse = visible is not None and visible.planned and not visible.rule.is_plain_causal
    short_on_cpu = q.device.type == "cpu" and torch.compiler.is_compiling() and q.shape[-2] <= 1024
    if whole and (sparse or short_on_cpu or scores.soft_cap is not None):
        return blocked_attention(q, k, v, visible, scores)
    return sdpa_attention(q, k, v, visible, scores)
