"""Scaled dot-product attention: softmax(Q Kᵀ / √d) V (Vaswani et al. 2017, arXiv 1706.03762, eq. 1).

Three implementations with one signature. `mask` is True where a query may read a key; None means causal, where the last
query lines up with the last key. Keys and values may have fewer heads than queries (GQA: Ainslie et al. 2023,
arXiv 2305.13245): query head h reads key head h // (heads / kv_heads).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from scratchlm.kernels.functions import softmax

Queries = Float[Tensor, "... heads q head_dim"]
Keys = Float[Tensor, "... kv_heads k head_dim"]
Mask = Bool[Tensor, " ... #heads q k"]


def _causal(queries: int, keys: int, device: torch.device) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def reference_attention(q: Queries, k: Keys, v: Keys, mask: Mask | None = None) -> Queries:
    """The formula, with all scores in memory; a query that may read nothing gets zeros."""
    queries, keys = q.shape[-2], k.shape[-2]
    kv_heads = k.shape[-3]
    grouped = rearrange(q, "... (kv_heads group) q d -> ... kv_heads group q d", kv_heads=kv_heads)
    scores = einsum(grouped, k, "... h g q d, ... h k d -> ... h g q k") / math.sqrt(q.shape[-1])
    allowed = _causal(queries, keys, q.device) if mask is None else mask
    if mask is not None and mask.ndim > 2:
        heads_of_mask = mask.shape[-3]
        groups = 1 if heads_of_mask == 1 else heads_of_mask // kv_heads
        allowed = rearrange(mask, "... (h g) q k -> ... h g q k", g=groups)
    scores = scores.masked_fill(~allowed, float("-inf"))
    weights = softmax(scores.to(torch.promote_types(scores.dtype, torch.float32))).to(v.dtype)
    mixed = einsum(weights, v, "... h g q k, ... h k d -> ... h g q d")
    return rearrange(mixed, "... h g q d -> ... (h g) q d")


def sdpa_attention(q: Queries, k: Keys, v: Keys, mask: Mask | None = None) -> Queries:
    """torch's fused kernel: flash attention where the device has one."""
    grouped = q.shape[-3] != k.shape[-3]
    if mask is not None:
        # A row without any allowed key is undefined in some of torch's backends: give it one and clear the output.
        nothing = ~mask.any(dim=-1, keepdim=True)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | nothing, enable_gqa=grouped)
        return out.masked_fill(nothing, 0.0)
    if q.shape[-2] == k.shape[-2]:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    if q.shape[-2] == 1:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
    allowed = _causal(q.shape[-2], k.shape[-2], q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=grouped)


def blocked_causal_attention(
    q: Queries, k: Keys, v: Keys, mask: Mask | None = None, *, block: int = 128
) -> Queries:
    """Causal attention in blocks of queries, each reading only the keys up to its own end.

            keys →              With n blocks, (n + 1) / 2n of the scores are computed instead of all, in plain
        q   ■ · · ·             matmuls that a compiler fuses with the softmax. At short lengths on a CPU this beats
        ↓   ■ ■ · ·             flash attention, whose tiling pays only when the scores do not fit the cache.
            ■ ■ ■ ·
            ■ ■ ■ ■

    Other masks, and lengths of which the queries cover only the end, go to :func:`sdpa_attention`.
    """
    length = q.shape[-2]
    if mask is not None or k.shape[-2] != length or length == 0:
        return sdpa_attention(q, k, v, mask)
    if k.shape[-3] != q.shape[-3]:
        group = q.shape[-3] // k.shape[-3]
        k, v = k.repeat_interleave(group, dim=-3), v.repeat_interleave(group, dim=-3)
    scale = 1.0 / math.sqrt(q.shape[-1])
    wide = torch.promote_types(q.dtype, torch.float32)
    triangle = _causal(min(block, length), min(block, length), q.device)
    outputs = []
    for start in range(0, length, block):
        end = min(start + block, length)
        scores = (q[..., start:end, :] @ k[..., :end, :].transpose(-1, -2)).to(wide) * scale
        allowed = F.pad(triangle[: end - start, : end - start], (start, 0), value=True)
        weights = scores.masked_fill(~allowed, float("-inf")).softmax(dim=-1).to(v.dtype)
        outputs.append(weights @ v[..., :end, :])
    return torch.cat(outputs, dim=-2)


def auto_attention(q: Queries, k: Keys, v: Keys, mask: Mask | None = None) -> Queries:
    """The fastest for the place: blocks where a CPU graph is compiled and lengths are short, torch's kernel elsewhere."""
    if q.device.type == "cpu" and torch.compiler.is_compiling() and q.shape[-2] <= 1024:
        return blocked_causal_attention(q, k, v, mask)
    return sdpa_attention(q, k, v, mask)
