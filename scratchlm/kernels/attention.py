"""Scaled dot-product attention: softmax(Q Kᵀ / √d) V (Vaswani et al. 2017, arXiv 1706.03762, eq. 1).

Implementations with one signature: the formula here, torch's fused kernel here, blocks in `blocked_attention`, FlexAttention
in `flex_attention`. `visible` says which key a query may read; None means causal, where the last query lines up with the last
key. Keys and values may have fewer heads than queries (GQA: Ainslie et al. 2023, arXiv 2305.13245): query head h reads key
head h // (heads / kv_heads).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
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


def heads_inside(like: Tensor, heads: int, length: int, width: int) -> Tensor:
    """A new (batch, heads, length, width) whose heads stand side by side in memory, so that joining them is free."""
    return like.new_empty(like.shape[0], length, heads, width).transpose(1, 2)


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


def for_every_head(q: Queries, k: Keys, v: Values) -> tuple[Keys, Values]:
    """Keys and values that groups of query heads share, repeated for each of them."""
    group = q.shape[-3] // k.shape[-3]
    return (k, v) if group == 1 else (k.repeat_interleave(group, dim=-3), v.repeat_interleave(group, dim=-3))


def scaled_and_capped(raw: Tensor, scores: Scores, head_dim: int) -> Tensor:
    """Products q · k, which nobody else holds, as scores in fp32 at least; in place where no gradient is wanted."""
    raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
    scale = scores.scale_of(head_dim)
    if torch.is_grad_enabled():
        return soft_cap(raw * scale, scores.soft_cap)
    if scores.soft_cap is None:
        return raw.mul_(scale)
    return raw.mul_(scale / scores.soft_cap).tanh_().mul_(scores.soft_cap)


def reference_attention(
    q: Queries, k: Keys, v: Values, visible: Visibility | None = None, scores: Scores = PLAIN
) -> Mixed:
    """The formula, with all scores in memory; a query that may read nothing gets zeros."""
    k, v = for_every_head(q, k, v)
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
    if q.shape[-1] != v.shape[-1] and q.shape[-2] > 1:
        # Latent attention: torch's fused kernels want keys and values of one width, and zeros change neither.
        width = max(q.shape[-1], v.shape[-1])
        scores = replace(scores, scale=scores.scale_of(q.shape[-1]))
        wide = [t if t.shape[-1] == width else F.pad(t, (0, width - t.shape[-1])) for t in (q, k, v)]
        return sdpa_attention(wide[0], wide[1], wide[2], visible, scores)[..., : v.shape[-1]]
    queries, keys = q.shape[-2], k.shape[-2]
    if queries > 1 and not shares_keys(q):
        k, v = for_every_head(q, k, v)
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
        allowed, nothing = _allowed(queries, keys, visible, q.device)
        if nothing is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, **options)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed | nothing, **options)
        return out.masked_fill(nothing, 0.0)
    if not scores.dropout:
        if queries == 1:
            return _newest_token(q, k, v, visible, scores)
        if queries == keys and _flash_tells_sums(q, k, v, visible, scores):
            return _flash_with_sinks(q, k, v, visible, scores)
    return _with_additive_mask(q, k, v, visible, scores, options)


def shares_keys(q: Tensor) -> bool:
    """Whether torch's fused kernels read shared keys and values by themselves: asked to in fp32 on CUDA, it falls back to all scores."""
    return q.device.type != "cuda" or q.dtype != torch.float32


def _allowed(
    queries: int, keys: int, visible: Visibility | None, device: torch.device
) -> tuple[Bool[Tensor, "... q k"], Bool[Tensor, "... q 1"] | None]:
    """The dense mask, and which rows are empty, None where none can be: every position may read itself but for padding.

    An empty row is undefined in some of torch's backends: whoever calls gives it keys and clears the output.
    """
    if visible is None:
        return causal_triangle(queries, keys, device), None
    allowed = visible.matrix()
    if visible.key_mask is None and visible.queries is visible.keys:
        return allowed, None
    return allowed, visible.kept("nothing", lambda: ~allowed.any(dim=-1, keepdim=True))


def _flash_tells_sums(q: Tensor, k: Tensor, v: Tensor, visible: Visibility | None, scores: Scores) -> bool:
    """Whether sinks alone are asked for, and torch's flash attention can be asked for log Σ exp(score) beside its output: on
    CPUs, without gradients."""
    return (
        q.device.type == "cpu"
        and scores.sinks is not None
        and scores.slopes is None
        and scores.soft_cap is None
        and (visible is None or (visible.key_mask is None and visible.queries is visible.keys))
        and q.ndim == 4
        and q.shape[-1] == v.shape[-1]
        and q.numel() > 0
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
    )


def _flash_with_sinks(q: Queries, k: Keys, v: Values, visible: Visibility | None, scores: Scores) -> Mixed:
    """A sink takes exp(sink) / (exp(sink) + Σ exp(score)) of the softmax: what is left of the output is σ(log Σ − sink)."""
    assert scores.sinks is not None
    length = q.shape[-2]
    k, v = for_every_head(q, k, v)
    mask = None
    if visible is not None:
        key = "added", None, q.dtype
        mask = visible.kept(key, lambda: _added(length, length, visible, None, q.dtype, q.device))
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))  # the kernel does not ask
    out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, mask is None, attn_mask=mask, scale=scores.scale_of(q.shape[-1])
    )
    left = torch.sigmoid(log_sum - scores.sinks.to(log_sum.dtype)[:, None])
    return (out * left.unsqueeze(-1)).to(out.dtype)


def _newest_token(q: Queries, k: Keys, v: Values, visible: Visibility | None, scores: Scores) -> Mixed:
    """One query with sinks or ALiBi by the formula, grouped: nothing is added to the cached keys, and each is read once."""
    grouped = q.unflatten(-3, (k.shape[-3], -1)).squeeze(-2)
    raw = (grouped @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) * scores.scale_of(
        q.shape[-1]
    )
    raw = raw.flatten(-3, -2).unsqueeze(-2)  # (…, heads, 1, keys)
    if visible is not None or scores.slopes is not None:

        def compute() -> Tensor:
            return _added(1, k.shape[-2], visible, scores.slopes, raw.dtype, q.device)

        key = "added", scores.slopes, raw.dtype
        raw = raw + (compute() if visible is None else visible.kept(key, compute))
    if scores.sinks is None:
        weights = raw.softmax(dim=-1).to(v.dtype)
    else:
        column = scores.sinks.to(raw.dtype)[:, None, None].expand(*raw.shape[:-1], 1)
        weights = torch.cat([raw, column], dim=-1).softmax(dim=-1)[..., :-1].to(v.dtype)
    nothing = _allowed(1, k.shape[-2], visible, q.device)[1]
    weights = weights if nothing is None else weights.masked_fill(nothing, 0.0)
    return (weights.squeeze(-2).unflatten(-2, (k.shape[-3], -1)) @ v).flatten(-3, -2).unsqueeze(-2)


def _with_additive_mask(
    q: Queries, k: Keys, v: Values, visible: Visibility | None, scores: Scores, options: dict[str, Any]
) -> Mixed:
    queries, keys = q.shape[-2], k.shape[-2]
    nothing = _allowed(queries, keys, visible, q.device)[1]

    def compute() -> Tensor:
        return _added(queries, keys, visible, scores.slopes, q.dtype, q.device)

    added = compute() if visible is None else visible.kept(("added", scores.slopes, q.dtype), compute)
    if scores.sinks is not None:
        heads = q.shape[-3]
        added = (
            added.expand(*added.shape[:-3], heads, queries, keys) if added.ndim > 2 else added.expand(heads, -1, -1)
        )
        column = scores.sinks.to(q.dtype)[:, None, None].expand(*added.shape[:-1], 1)
        added = torch.cat([added, column], dim=-1)
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    if added.ndim == 3 and q.ndim == 4:
        added = added.unsqueeze(0)  # torch's fused kernel on CPUs knows masks of two and four dimensions
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=added, **options)
    return out if nothing is None else out.masked_fill(nothing, 0.0)


def _added(
    queries: int,
    keys: int,
    visible: Visibility | None,
    slopes: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Float[Tensor, "... q k"]:
    """What is added to the scores: 0 or −inf, minus slope · distance."""
    allowed, nothing = _allowed(queries, keys, visible, device)
    added = torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill(~allowed, float("-inf"))
    if slopes is not None:
        away = distances(queries, keys, device) if visible is None else visible.distance(*visible.everything)
        added = added - (slopes[:, None, None] * away).to(dtype)
    return added if nothing is None else added.masked_fill(nothing, 0.0)


SHORT = 512
"""Up to this length a mask costs less than the operations of attention in blocks."""


SHORT_COMPILED = 1024
"""On a CPU, up to this length, attention in blocks is faster inside torch.compile than torch's kernel."""

SHORT_TRAINED = 256
"""And up to this one also without the compiler, in bf16, whose backward pass in torch's kernel is slow: 3.9 times at 32 tokens, 2.6 at 64, 1.1
at 128, 1.6 at 256. (1.2 at 512, but there the scores that blocks keep weigh more than that.)"""


def goes_by_blocks(q: Queries) -> bool:
    """Whether blocks are faster than torch's kernel for a sequence without a mask: on a CPU a short one that is compiled, or a shorter one in bf16
    that has a backward pass."""
    return q.device.type == "cpu" and (
        (torch.compiler.is_compiling() and q.shape[-2] <= SHORT_COMPILED)
        or (q.dtype == torch.bfloat16 and q.requires_grad and q.shape[-2] <= SHORT_TRAINED)
    )


def auto_attention(
    q: Queries, k: Keys, v: Values, visible: Visibility | None = None, scores: Scores = PLAIN
) -> Mixed:
    """The fastest for the place.

    On a CPU our kernel in C++ where a gradient is wanted and it knows how
    (:func:`~scratchlm.kernels.flash_attention_cpp.is_the_way`); on CUDA our kernels in Triton for whatever is no plain causal attention
    (:func:`~scratchlm.kernels.flash_attention_op.is_the_way`). Otherwise blocks where they leave out work (a mask with a plan), where torch's kernel
    cannot go (a soft cap) or is slower (:func:`goes_by_blocks`); torch's kernel elsewhere, also for sinks in a short text that is only read.
    """
    from scratchlm.kernels import flash_attention_cpp, flash_attention_op
    from scratchlm.kernels.blocked_attention import blocked_attention

    whole = q.shape[-2] == k.shape[-2]
    sparse = visible is not None and visible.planned and not visible.rule.is_plain_causal
    ways = flash_attention_cpp, flash_attention_op
    if whole and any(way.is_the_way(q, k, v, visible, scores) for way in ways):
        return flash_attention_op.fused_attention(q, k, v, visible, scores)
    if whole and q.shape[-2] <= SHORT and not scores.dropout and _flash_tells_sums(q, k, v, visible, scores):
        return sdpa_attention(q, k, v, visible, scores)
    if whole and (sparse or goes_by_blocks(q) or scores.soft_cap is not None):
        return blocked_attention(q, k, v, visible, scores)
    return sdpa_attention(q, k, v, visible, scores)
