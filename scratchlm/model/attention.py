"""Multi-head attention with grouped keys and values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from scratchlm.kernels.attention import auto_attention
from scratchlm.model import choices
from scratchlm.model.config import ModelConfig
from scratchlm.model.linear import Linear


class Cache(Protocol):
    """What attention asks of a key/value cache (the generator owns it)."""

    length: int

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append this layer's new keys and values (batch, kv_heads, new, head_dim); return all so far."""
        ...

    def key_mask(self, batch: int, total: int) -> Tensor | None:
        """(batch, total), False for padding keys; None if there are none."""
        ...


@dataclass(frozen=True)
class Context:
    """What all layers of one forward pass share.

    Attributes:
        positions: position of each token, (…, length); None: 0 … length − 1.
        mask: dense mask (…, 1, length, total), or None for plain causal.
        cache: keys and values of earlier tokens, or None.
    """

    positions: Int[Tensor, "... length"] | None = None
    mask: Bool[Tensor, " ... #heads q k"] | None = None
    cache: Cache | None = None


def attention_kernel(config: ModelConfig) -> Callable[..., Tensor]:
    """The implementation that the configuration names."""
    if config.attention_kernel == "auto":
        if config.kernels == "reference":
            return choices.ATTENTION_KERNEL.get("reference")
        return auto_attention
    return choices.ATTENTION_KERNEL.get(config.attention_kernel)


class MultiHeadAttention(nn.Module):
    """softmax(Q Kᵀ / √d) V per head, then mixed by W_o (Vaswani et al. 2017, section 3.2.2).

             ┌─ q ─ norm? ─ RoPE ─┐
    x ─ qkv ─┼─ k ─ norm? ─ RoPE ─┼─ attention ─ W_o ─►      heads = 8, kv_heads = 8: MHA
             └─ v ────────────────┘                                    kv_heads = 2: GQA, four queries share a key
                                                                       kv_heads = 1: MQA
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads = config.heads, config.resolved_kv_heads
        self.head_dim = config.resolved_head_dim
        reference = config.kernels == "reference"
        sizes = [self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim]
        self.qkv = Linear(config.d_model, sum(sizes), parts=sizes, reference=reference)
        self.output = Linear(sizes[0], config.d_model, residual_output=True, reference=reference)
        norm = choices.QK_NORM.get(config.qk_norm)
        self.q_norm = norm(self.head_dim, config.norm_eps, reference=reference)
        self.k_norm = norm(self.head_dim, config.norm_eps, reference=reference)
        self.position = choices.POSITION.get(config.position)(config)
        self.kernel = attention_kernel(config)

    def forward(
        self, x: Float[Tensor, "... length d_model"], context: Context
    ) -> Float[Tensor, "... length d_model"]:
        q, k, v = self.qkv(x).split(self.qkv.parts, dim=-1)
        q = rearrange(q, "... t (h d) -> ... h t d", h=self.heads)
        k = rearrange(k, "... t (h d) -> ... h t d", h=self.kv_heads)
        v = rearrange(v, "... t (h d) -> ... h t d", h=self.kv_heads)
        q = self.position(self.q_norm(q), context.positions)
        k = self.position(self.k_norm(k), context.positions)
        if context.cache is not None:
            k, v = context.cache.update(self.layer, k, v)
        mixed = self.kernel(q, k, v, context.mask)
        return self.output(rearrange(mixed, "... h t d -> ... t (h d)"))

    def num_params(self) -> int:
        norms = self.q_norm.num_params() + self.k_norm.num_params()
        return self.qkv.num_params() + self.output.num_params() + norms

    def flops_per_token(self, length: int) -> int:
        """Projections, and scores and mixture over all `length` keys (no discount for the causal half)."""
        scores_and_mixture = 2 * 2 * length * self.heads * self.head_dim
        return self.qkv.flops_per_token() + self.output.flops_per_token() + scores_and_mixture
