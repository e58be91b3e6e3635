"""Multi-head attention with grouped keys and values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from scratchlm.kernels.attention import Scores, auto_attention
from scratchlm.kernels.visibility import Visibility, scores_computed
from scratchlm.model import choices
from scratchlm.model.config import ModelConfig
from scratchlm.model.context import Context
from scratchlm.model.linear import Linear
from scratchlm.model.position import Positions


def attention_kernel(config: ModelConfig) -> Callable[..., Tensor]:
    """The implementation that the configuration names."""
    if config.attention_kernel == "auto":
        if config.kernels == "reference":
            return choices.ATTENTION_KERNEL.get("reference")
        return auto_attention
    return choices.ATTENTION_KERNEL.get(config.attention_kernel)


def scores_per_query(config: ModelConfig, layer: int, length: int) -> float:
    """How many keys a query of this layer is multiplied with, on average over a sequence of `length`.

    All of them where the kernel computes the whole square, as is the convention for the plain causal triangle too; under any
    other mask and a kernel in blocks, those of the blocks that are computed.
    """
    kernel = config.attention_kernel
    if kernel == "auto" and config.kernels == "reference":
        kernel = "reference"
    rule = choices.MASK.get(config.mask_at(layer)).of(config)
    if kernel in ("reference", "sdpa") or rule.is_plain_causal or not length:
        return length
    return scores_computed(rule, length, prefix=config.prefix_length) / length


def split_heads(x: Float[Tensor, "... length width"], heads: int) -> Float[Tensor, "... heads length head_dim"]:
    """Each token's row in `heads` pieces, heads before tokens; a view."""
    return x.view(*x.shape[:-1], heads, x.shape[-1] // heads).transpose(-3, -2)


def join_heads(x: Float[Tensor, "... heads length head_dim"]) -> Float[Tensor, "... length width"]:
    """The inverse of :func:`split_heads`."""
    return x.transpose(-3, -2).flatten(-2)


class SoftmaxAttention(nn.Module):
    """What attention with scores shares: mask, kernel, scale, cap, sinks, ALiBi, dropout."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.mask = layer, config.mask_at(layer)
        self.reach: int | None = choices.MASK.get(self.mask).of(config).reach
        self.heads = config.heads
        self.kernel = attention_kernel(config)
        self.scale, self.soft_cap, self.dropout = (
            config.attention_scale,
            config.attention_soft_cap,
            config.attention_dropout,
        )
        self.sinks = nn.Parameter(torch.zeros(config.heads)) if config.attention_sinks else None
        if self.sinks is not None:
            self.sinks.role = "bias"  # type: ignore[attr-defined]

    def visible(self, context: Context, keys: int) -> Visibility | None:
        """Who may read whom among the `keys` that there are (a cache of a window holds the last ones)."""
        visible = context.visible.get(self.mask)
        if visible is None:
            return None
        visible = visible.last(keys)
        return None if visible.is_triangle else visible

    def scores(self, slopes: Tensor | None) -> Scores:
        """What is done to this layer's scores."""
        dropout = self.dropout if self.training else 0.0
        return Scores(self.scale, self.soft_cap, slopes, self.sinks, dropout)


class MultiHeadAttention(SoftmaxAttention):
    """softmax(Q Kᵀ / √d) V per head, then mixed by W_o (Vaswani et al. 2017, section 3.2.2).

             ┌─ q ─ norm? ─ RoPE ─┐
    x ─ qkv ─┼─ k ─ norm? ─ RoPE ─┼─ attention ─ W_o ─►      heads = 8, kv_heads = 8: MHA
             └─ v ────────────────┘                                    kv_heads = 2: GQA, four queries share a key
                                                                       kv_heads = 1: MQA

    With `qkv_clip` all three are cut to ±c, queries and keys between norm and RoPE (DBRX's and OLMo's published code).
    """

    def __init__(self, config: ModelConfig, layer: int, positions: Positions) -> None:
        super().__init__(config, layer)
        self._config = config
        self.kv_heads, self.head_dim = config.resolved_kv_heads, config.resolved_head_dim
        reference = config.kernels == "reference"
        sizes = [self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim]
        biases = [name in config.attention_bias for name in "qkv"]
        self.qkv = Linear(config.d_model, sum(sizes), parts=sizes, bias=biases, reference=reference)
        self.output = Linear(
            sizes[0],
            config.d_model,
            bias="o" in config.attention_bias,
            residual_output=True,
            reference=reference,
        )
        norm = choices.QK_NORM.get(config.qk_norm)
        self.q_norm, self.k_norm = norm(config, self.heads), norm(config, self.kv_heads)
        self.unnormed = config.qk_norm == "none"
        self.clip = config.qkv_clip
        self.position = positions.at(layer, self.head_dim)

    def forward(
        self, x: Float[Tensor, "... length d_model"], context: Context
    ) -> Float[Tensor, "... length d_model"]:
        q, k, v = self._heads(self.qkv(x), context)
        if context.cache is not None:
            cached = context.cache.append(self.layer, {"k": k, "v": v}, self.reach)
            k, v = cached["k"], cached["v"]
        mixed = self.kernel(q, k, v, self.visible(context, k.shape[-2]), self.scores(self.position.slopes))
        return self.output(join_heads(mixed))

    def _heads(
        self, projected: Float[Tensor, "... length width"], context: Context
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, ready to meet."""
        if self.unnormed and self.clip is None and context.cache is None:
            given = self.heads, self.kv_heads, context.positions, context.memo
            if (turned := self.position.turn_heads(projected, *given)) is not None:
                return turned
        if self.clip is not None and self.unnormed:
            projected = projected.clamp(-self.clip, self.clip)
        heads = split_heads(projected, self.heads + 2 * self.kv_heads)
        if self.unnormed:  # queries and keys lie side by side: one rotation turns both
            qk, v = heads.split([self.heads + self.kv_heads, self.kv_heads], dim=-3)
            q, k = self.position(qk, context.positions, context.memo).split([self.heads, self.kv_heads], dim=-3)
        else:
            q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=-3)
            q, k = self.q_norm(q), self.k_norm(k)
            if self.clip is not None:
                q, k, v = (part.clamp(-self.clip, self.clip) for part in (q, k, v))
            q, k = (
                self.position(q, context.positions, context.memo),
                self.position(k, context.positions, context.memo),
            )
        return q, k, v

    def num_params(self) -> int:
        norms = self.q_norm.num_params() + self.k_norm.num_params()
        sinks = 0 if self.sinks is None else self.heads
        return int(self.qkv.num_params() + self.output.num_params() + norms + sinks)

    def flops_per_token(self, length: int) -> float:
        """Projections, and scores and mixture over the keys that are computed (:func:`scores_per_query`)."""
        keys = scores_per_query(self._config, self.layer, length)
        scores_and_mixture = 2 * 2 * keys * self.heads * self.head_dim
        return self.qkv.flops_per_token() + self.output.flops_per_token() + scores_and_mixture

    @staticmethod
    def cache_widths(config: ModelConfig) -> int:
        """Numbers kept per token and layer while generating: a key and a value of every key/value head."""
        return 2 * config.resolved_kv_heads * config.resolved_head_dim

    @staticmethod
    def state_size(config: ModelConfig) -> int:
        """Numbers kept per layer whatever the length."""
        return 0

    @staticmethod
    def wide_size(config: ModelConfig) -> int:
        """How many of those are fp32 at least."""
        return 0
