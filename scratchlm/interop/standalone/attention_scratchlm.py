"""Attention of every kind, with the positions and masks it reads by.

Written to be read, not to be fast: softmax attention computes all scores (a sliding window saves nothing), gla and gated_delta
go token by token. Shapes in comments: b batch, t new tokens, n all tokens (those in the cache and the new ones), h heads,
d width of a head.
"""

# mypy: disable-error-code="arg-type, attr-defined"

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from .configuration_scratchlm import SOFTMAX
from .layers_scratchlm import Norm, QKNorm, at, linear, soft_cap, widened


def frequencies(c: SimpleNamespace, theta: float, scaling: str, width: int) -> tuple[Tensor, float]:
    """Radians per position of each pair of dimensions, in fp64, and a factor for queries and keys."""
    rope, exponents = c.rope, torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width
    f = theta**-exponents
    if scaling == "linear":
        return f / rope.factor, 1.0
    if scaling == "ntk":
        return (theta * rope.factor ** (width / max(1, width - 2))) ** -exponents, 1.0
    if scaling == "llama3":
        turns = rope.original_context * f / (2 * math.pi)
        kept = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
        return (1 - kept) * f / rope.factor + kept * f, 1.0
    if scaling == "yarn":

        def pair(turns: float) -> float:  # whose wave turns this often in the original context
            return width * math.log(rope.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = pair(rope.beta_fast), pair(rope.beta_slow)
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(0, low), min(width - 1, high)
        places = torch.arange(width // 2, dtype=torch.float64, device="cpu")
        stretched = ((places - low) / (high - low or 0.001)).clamp(0, 1)
        factor = rope.attention_factor
        factor = 0.1 * math.log(rope.factor) + 1.0 if factor is None else factor
        return stretched * f / rope.factor + (1 - stretched) * f, factor
    return f, 1.0


def rotate(x: Tensor, cos: Tensor, sin: Tensor, pairs: str) -> Tensor:
    """Each pair of dimensions turned; half: i with i + width/2, interleaved: 2i with 2i + 1."""
    if pairs == "half":
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


class Learned(nn.Module):
    """A learned vector per position, added to the embedding."""

    def __init__(self, c: SimpleNamespace) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(c.context_length, c.d_model))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        if int(positions.max()) >= len(self.weight):
            raise ValueError(f"the model has learned {len(self.weight)} positions; a longer sequence has no others")
        return x + self.weight[positions]


class Sinusoidal(nn.Module):
    """Sines and cosines of the position, added to the embedding."""

    def __init__(self, c: SimpleNamespace) -> None:
        super().__init__()

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        width = x.shape[-1]
        waves = 10_000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width)
        angles = positions.cpu().double()[..., None] * waves
        rows = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)[..., :width]
        return x + rows.to(widened(x).dtype).to(x)


def alibi_slopes(heads: int) -> list[float]:
    whole = 2 ** math.floor(math.log2(heads))
    first = [2 ** (-8 * (i + 1) / whole) for i in range(whole)]
    return (first + [2 ** (-8 * (i + 1) / (2 * whole)) for i in range(0, 2 * whole, 2)])[:heads]


def may_read(c: SimpleNamespace, mask: str, q: Tensor, k: Tensor, prefix: Tensor) -> Tensor:
    """True where the query at position q may read the key at position k; (b, t, 1) and (b, 1, n) → (b, t, n)."""
    causal = q >= k
    if mask == "sliding_window":
        return causal & (q - k < c.window)
    if mask == "strided":
        return causal & ((q - k < c.stride) | ((q - k) % c.stride == 0))
    if mask == "fixed":
        return causal & ((q // c.stride == k // c.stride) | (k % c.stride >= c.stride - c.stride_summary))
    if mask == "block_sparse":
        return causal & ((q // c.mask_block - k // c.mask_block < c.mask_local_blocks) | (k < c.global_tokens))
    if mask == "prefix_lm":
        return causal | (k < prefix)
    return causal


class Pass:
    """What the layers of one forward pass share.

    Attributes:
        positions: of the new tokens, (b, t): what rotates queries and keys, or is added to the embedding.
        valid: False for padding, (b, n); None: there is none.
        cache: what earlier tokens left, or None.
    """

    def __init__(
        self,
        c: SimpleNamespace,
        length: int,
        device: torch.device,
        cache: DynamicCache | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        prompt_length: int | None,
    ) -> None:
        past = 0 if cache is None else cache.get_seq_length()
        self.c, self.cache, self.past, self.valid = c, cache, past, None
        places = torch.arange(past + length, device=device)[None]  # a token's place among those that are no padding
        if attention_mask is not None:
            if attention_mask.shape[1:] != (past + length,):
                raise ValueError(
                    f"attention_mask has shape {tuple(attention_mask.shape)}; it must be (batch, {past + length}): one "
                    "column for each token, those in the cache included"
                )
            self.valid = attention_mask.to(device).bool()
            places = (self.valid.long().cumsum(dim=-1) - 1).clamp(min=0)
        self.q, self.k = places[:, past:, None], places[:, None, :]
        self.positions = places[:, past:] if position_ids is None else position_ids.view(-1, length)
        self.prefix = torch.full((1, 1, 1), c.prefix_length, device=device)
        if past:  # the prefix was the first piece: what comes later is causal
            self.prefix = torch.zeros_like(self.prefix)
        elif prompt_length is not None:
            shorter = 0 if self.valid is None else (~self.valid[:, :prompt_length]).sum(dim=-1).view(-1, 1, 1)
            self.prefix = prompt_length - shorter + torch.zeros_like(self.prefix)
        self._known: dict[Any, Any] = {}

    def allowed(self, mask: str) -> Tensor:
        """Who may read whom, (b, 1, t, n)."""
        if mask not in self._known:
            allowed = may_read(self.c, mask, self.q, self.k, self.prefix)
            self._known[mask] = (allowed if self.valid is None else allowed & self.valid[:, None])[:, None]
        return self._known[mask]

    def angles(self, theta: float, scaling: str, width: int) -> tuple[Tensor, Tensor]:
        """cos and sin for every new token, (b, 1, t, width / 2), in fp64 on the CPU: no device rounds them."""
        key = (theta, scaling, width)
        if key not in self._known:
            radians, factor = frequencies(self.c, *key)
            turned = self.positions.cpu().double()[:, None, :, None] * radians
            self._known[key] = turned.cos() * factor, turned.sin() * factor
        return self._known[key]

    def padded(self, x: Tensor) -> Tensor:
        """x (b, t, …) with zeros where a new token is padding."""
        return x if self.valid is None else x * self.valid[:, self.past :, None].to(x.device)


class StateCache(DynamicCache):
    """The cache of a model with linear attention: a state per such layer, keys and values as usual for the others.

    It can be reordered (beam search), but not cut: a state cannot forget its last tokens.
    """

    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self.states: dict[int, dict[str, Tensor]] = {}
        self.tokens = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.tokens

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        for state in self.states.values():
            state.update({name: kept.index_select(0, beam_idx.to(kept.device)) for name, kept in state.items()})

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        for state in self.states.values():
            state.update({name: kept.repeat_interleave(repeats, dim=0) for name, kept in state.items()})

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        for state in self.states.values():
            state.update({name: kept[indices] for name, kept in state.items()})

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("linear attention keeps a state, from which no token can be taken away again")


# ------------------------------------------------------------------------------------------------------------ attention


class Attention(nn.Module):
    """What all attention shares: how positions enter queries and keys."""

    def __init__(self, c: SimpleNamespace, layer: int) -> None:
        super().__init__()
        self.c, self.layer, self.kind = c, layer, at(c.attention, layer)
        self.mask, self.position = at(c.mask, layer), at(c.position, layer)
        kinds = [at(c.attention, before) for before in range(layer)]
        self.softmax_layer = sum(kind in SOFTMAX for kind in kinds)  # its number among those with keys and values

    def turn(self, x: Tensor, run: Pass) -> Tensor:
        """RoPE on queries or keys (b, h, t, d), or on the first part of their dimensions."""
        if self.position != "rope":
            return x
        rope = self.c.rope
        width = x.shape[-1] if self.kind == "mla" else int(x.shape[-1] * rope.fraction + 1e-6)
        table = run.angles(at(rope.theta, self.layer), at(rope.scaling, self.layer), width)
        cos, sin = (part.to(widened(x).dtype).to(x) for part in table)
        return torch.cat([rotate(x[..., :width], cos, sin, rope.pairs), x[..., width:]], dim=-1)


class SoftmaxAttention(Attention):
    """softmax(mask(cap(q · k · scale) − slope · distance)) v, with a sink that takes weight and gives nothing."""

    def __init__(self, c: SimpleNamespace, layer: int) -> None:
        super().__init__(c, layer)
        self.sinks = nn.Parameter(torch.zeros(c.heads)) if c.attention_sinks else None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, run: Pass) -> Tensor:
        """q (b, h, t, d), k and v (b, kv_heads, n, ·) → (b, t, h · value_dim)."""
        group, scale = q.shape[1] // k.shape[1], self.c.attention_scale or q.shape[-1] ** -0.5
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores = soft_cap(widened(q @ k.mT) * scale, self.c.attention_soft_cap)
        if self.position == "alibi":
            slopes = scores.new_tensor(alibi_slopes(self.c.heads))[:, None, None]
            scores = scores - slopes * (run.q - run.k).abs()[:, None].to(scores.device)
        # The lowest number and not −∞, so that a row of padding, which may read nothing, is no NaN.
        forbidden = ~run.allowed(self.mask).to(scores.device)
        scores = scores.masked_fill(forbidden, torch.finfo(scores.dtype).min)
        if self.sinks is not None:
            sinks = self.sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
            weights = torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]
        else:
            weights = scores.softmax(dim=-1)
        weights = F.dropout(weights, self.c.attention_dropout, self.training)
        return (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)


class MultiHeadAttention(SoftmaxAttention):
    """Queries, keys and values per head; fewer key/value heads than query heads make it grouped."""

    def __init__(self, c: SimpleNamespace, layer: int) -> None:
        super().__init__(c, layer)
        self.widths = [c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim]
        self.qkv = linear(c.d_model, *self.widths, bias=[name in c.attention_bias for name in "qkv"])
        self.output = linear(self.widths[0], c.d_model, bias="o" in c.attention_bias)
        self.q_norm, self.k_norm = QKNorm(c, c.heads), QKNorm(c, c.kv_heads)

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        q, k, v = (part.unflatten(-1, (-1, self.c.head_dim)) for part in self.qkv(x).split(self.widths, dim=-1))
        q, k, v = (part.transpose(1, 2) for part in (self.q_norm(q), self.k_norm(k), v))
        if self.c.qkv_clip is not None:
            q, k, v = (part.clamp(-self.c.qkv_clip, self.c.qkv_clip) for part in (q, k, v))
        q, k = self.turn(q, run), self.turn(k, run)
        if run.cache is not None:
            k, v = run.cache.update(k, v, self.softmax_layer)
        return self.output(self.attend(q, k, v, run))


class LatentAttention(SoftmaxAttention):
    """MLA: the cache holds one normed latent vector and one rotated key per token, from which all heads read."""

    def __init__(self, c: SimpleNamespace, layer: int) -> None:
        super().__init__(c, layer)
        latent, heads = c.latent, c.heads
        kind = "rmsnorm" if c.norm == "none" else c.norm
        self.q_widths = [heads * c.head_dim, heads * latent.rope_dim]
        self.kv_widths = [heads * c.head_dim, heads * latent.value_dim]
        self.down_widths = [latent.q_rank or sum(self.q_widths), latent.kv_rank, latent.rope_dim]
        has_q, has_k, has_v, has_o = (name in c.attention_bias for name in "qkvo")
        self.down = linear(c.d_model, *self.down_widths, bias=[has_q and not latent.q_rank, False, False])
        self.q_norm = Norm(kind, latent.q_rank, eps=latent.norm_eps) if latent.q_rank else None
        self.q_up = linear(latent.q_rank, *self.q_widths, bias=has_q) if latent.q_rank else None
        self.kv_norm = Norm(kind, latent.kv_rank, eps=latent.norm_eps)
        self.kv_up = linear(latent.kv_rank, *self.kv_widths, bias=[has_k, has_v])
        self.output = linear(self.kv_widths[1], c.d_model, bias=has_o)

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        def heads(x: Tensor) -> Tensor:  # (b, t, h · d) → (b, h, t, d)
            return x.unflatten(-1, (self.c.heads, -1 if x.shape[-1] else 0)).transpose(1, 2)

        queries, latent, rope = self.down(x).split(self.down_widths, dim=-1)
        if self.q_norm is not None and self.q_up is not None:
            queries = self.q_up(self.q_norm(queries))
        plain, turned = map(heads, queries.split(self.q_widths, dim=-1))
        latent, rope = self.kv_norm(latent)[:, None], self.turn(rope[:, None], run)  # one head for all
        if run.cache is not None:
            latent, rope = run.cache.update(latent, rope, self.softmax_layer)
        k, v = map(heads, self.kv_up(latent[:, 0]).split(self.kv_widths, dim=-1))
        q = torch.cat([plain, self.turn(turned, run)], dim=-1)
        k = torch.cat([k, rope.expand(-1, self.c.heads, -1, -1)], dim=-1)
        return self.output(self.attend(q, k, v, run))


def fixed_decay(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """o_t = q_t S_t with S_t = a S_{t−1} + k_t v_tᵀ, all t at once, with one log a per head; s is the state before."""
    t = torch.arange(q.shape[2], device=q.device, dtype=q.dtype)
    away, log_a = (t[:, None] - t).clamp(min=0), log_a[:, None, None]
    scores = (q @ k.mT) * (log_a * away).exp().tril()
    out = scores @ v + (q * (log_a * (t + 1)[:, None]).exp()) @ s
    later = (log_a * (len(t) - 1 - t)[:, None]).exp()
    return out, (log_a * len(t)).exp() * s + (k * later).mT @ v


def recurrence(q: Tensor, k: Tensor, v: Tensor, a: Tensor, beta: Tensor | None, s: Tensor) -> tuple[Tensor, Tensor]:
    """S_t = a_t S_{t−1} + k_t u_tᵀ, o_t = S_tᵀ q_t; u is v, or with the delta rule β (v − what k finds in a_t S_{t−1})."""
    out = []
    for t in range(q.shape[2]):
        s = a[:, :, t, :, None] * s
        key, u = k[:, :, t, None], v[:, :, t, None]
        if beta is not None:
            u = beta[:, :, t, None] * (u - key @ s)
        s = s + key.mT @ u
        out.append(q[:, :, t, None] @ s)
    return torch.cat(out, dim=2) if out else v, s


class LinearAttention(Attention):
    """Attention without a softmax: a state S per head that every token decays, adds to and reads.

    linear      φ(q) S / φ(q) z, nothing is forgotten
    retention   a fixed decay per head
    gla         a decay per head and channel, read from x
    gated_delta a decay per head read from x, and each value replaces what its key held; short convolution before
    """

    def __init__(self, c: SimpleNamespace, layer: int) -> None:
        super().__init__(c, layer)
        inner = c.heads * c.head_dim
        self.widths = [inner, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim]
        self.qkv = linear(c.d_model, *self.widths, bias=[name in c.attention_bias for name in "qkv"])
        self.output = linear(inner, c.d_model, bias="o" in c.attention_bias)
        self.q_norm, self.k_norm = QKNorm(c, c.heads), QKNorm(c, c.kv_heads)
        self.gated = self.kind != "linear" and c.linear.output_gate
        if self.gated:
            self.gate = linear(c.d_model, inner)
            self.output_norm = Norm("rmsnorm", c.head_dim, eps=c.norm_eps)
        if self.kind == "gla":
            self.decay_down, self.decay_up = linear(c.d_model, 16), linear(16, inner, bias=True)
        if self.kind == "gated_delta":
            self.strengths = linear(c.d_model, 2 * c.heads)
            self.decay_rate = nn.Parameter(torch.zeros(c.heads))
            self.decay_bias = nn.Parameter(torch.zeros(c.heads))
            if c.linear.conv_width > 1:
                self.convolution = ShortConvolution(sum(self.widths), c.linear.conv_width)

    def features(self, x: Tensor) -> Tensor:
        """φ."""
        if self.kind == "gated_delta":
            return F.normalize(widened(x), dim=-1).to(x.dtype)
        if self.kind != "linear" or self.c.linear.feature_map == "identity":
            return x
        return F.elu(x) + 1 if self.c.linear.feature_map == "elu1" else F.relu(x)

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        c, state = self.c, {} if run.cache is None else run.cache.states.setdefault(self.layer, {})
        projected = self.qkv(x)
        if self.kind == "gated_delta" and c.linear.conv_width > 1:
            projected = F.silu(self.convolution(run.padded(projected), state))
        q, k, v = (part.unflatten(-1, (-1, c.head_dim)) for part in projected.split(self.widths, dim=-1))
        q = self.features(self.turn(self.q_norm(q).transpose(1, 2), run)) * (c.attention_scale or c.head_dim**-0.5)
        k = self.features(self.turn(self.k_norm(k).transpose(1, 2), run)).transpose(1, 2)
        k, v = (
            run.padded(part.flatten(2)).view_as(part).transpose(1, 2) for part in (k, v)
        )  # padding adds nothing
        group = c.heads // c.kv_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        with torch.autocast(x.device.type, enabled=False):
            out = self.mix(x, widened(q), widened(k), widened(v), state)
        out = out.to(x.dtype).transpose(1, 2)
        if self.gated:
            out = self.output_norm(out) * F.silu(self.gate(x).unflatten(-1, (c.heads, -1)))
        return self.output(out.flatten(2))

    def mix(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, state: dict[str, Tensor]) -> Tensor:
        """The states over the new tokens, from `state`, which is replaced by the last."""

        def heads(x: Tensor) -> Tensor:  # (b, t, h · d) → (b, h, t, d), in q's dtype
            return x.unflatten(-1, (self.c.heads, -1)).transpose(1, 2).to(q.dtype)

        normalised = self.kind == "linear" and self.c.linear.normalise
        if normalised:  # a value that is always 1 sums up the weights
            v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
        s = state.get("s", q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3]))
        if self.kind == "gla":
            decay = (F.logsigmoid(heads(self.decay_up(self.decay_down(x)))) / 16.0).exp()
            out, state["s"] = recurrence(q, k, v, decay, None, s)
        elif self.kind == "gated_delta":
            step, strength = map(heads, self.strengths(x).chunk(2, dim=-1))
            rate, bias = (p.to(q.dtype)[:, None, None] for p in (self.decay_rate, self.decay_bias))
            decay = (-rate.exp() * F.softplus(step + bias)).exp()
            out, state["s"] = recurrence(q, k, v, decay, strength.sigmoid(), s)
        else:
            places = torch.arange(self.c.heads, device=q.device, dtype=torch.float32)
            log_a = torch.log1p(-(2.0 ** (-5.0 - places))) if self.kind == "retention" else torch.zeros_like(places)
            out, state["s"] = fixed_decay(q, k, v, log_a.to(q.dtype), s)
        return out[..., :-1] / (out[..., -1:] + 1e-6) if normalised else out


class ShortConvolution(nn.Module):
    """y_t = Σ_j w_j x_{t−j}, channel by channel; `state` keeps the last inputs."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, width))

    def forward(self, x: Tensor, state: dict[str, Tensor]) -> Tensor:
        reach = self.weight.shape[1] - 1
        longer = torch.cat([state.get("inputs", x.new_zeros(x.shape[0], reach, x.shape[2])), x], dim=1)
        state["inputs"] = longer[:, longer.shape[1] - reach :]
        return F.conv1d(longer.mT, self.weight.flip(-1)[:, None], groups=len(self.weight)).mT
