"""Multi-head latent attention: the cache holds one small vector per token, from which all heads read keys and values."""

from __future__ import annotations

from dataclasses import replace

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from scratchlm.kernels.attention import Scores
from scratchlm.kernels.visibility import Visibility
from scratchlm.model.attention import SoftmaxAttention, scores_per_query
from scratchlm.model.config import ModelConfig
from scratchlm.model.context import Context
from scratchlm.model.linear import Linear
from scratchlm.model.norm import norm_of
from scratchlm.model.position import Positions

Plain = Float[Tensor, "... heads new head_dim"]
Turned = Float[Tensor, "... heads new rope_dim"]
Latent = Float[Tensor, "... total kv_rank"]
RopeKey = Float[Tensor, "... total rope_dim"]
Mixed = Float[Tensor, "... heads new value_dim"]


class LatentAttention(SoftmaxAttention):
    """MLA (DeepSeek-V2, arXiv 2405.04434, section 2.1, eq. 9–19, and appendix C; DeepSeek-V3, arXiv 2412.19437, eq. 1–11).

    ::

               ┌─ c_Q ─── norm ─ up ─┬─ q, head_dim ─────────────┐
               │  q_rank             └─ q, rope_dim ── RoPE ─────┤
               │                                                 │
        x ─ down ─ c_KV ─ norm ─■─ up ─┬─ k, head_dim ───────────┼─ attention ─ W_o ─►
               │  kv_rank              └─ v, value_dim ──────────┤
               │                                                 │
               └─ k_R ─── RoPE ─■─ the same for every head ──────┘
                  rope_dim
                                ■ what the cache holds: kv_rank + rope_dim numbers per token, however many heads

    A rotated key could not be read from the latent vector by a fixed matrix, so position has dimensions of its own. Without
    `q_rank` the queries are read from x directly. The latent vectors are normed (section 3.1.2) by the model's kind of norm,
    RMSNorm where it has none. Scores are divided by √(head_dim + rope_dim).

    The same function in two forms (section 2.1.2):

        materialised    k = W_uk c, v = W_uv c for all tokens, then attention per head
        absorbed        q · W_uk c = (W_ukᵀ q) · c and Σ w W_uv c = W_uv Σ w c: attention reads the cached vectors as they are,
                        one key head for all queries (MQA)

    Args:
        config: the architecture; `latent`, `heads` and `head_dim` give the widths.
        layer: the layer's number.
        positions: gives the rotation of queries and keys, or ALiBi's slopes.
    """

    def __init__(self, config: ModelConfig, layer: int, positions: Positions) -> None:
        super().__init__(config, layer)
        self._config = config
        latent, heads = config.latent, self.heads
        self.head_dim, self.value_dim = config.resolved_head_dim, config.resolved_value_dim
        self.kv_rank, self.rope_dim = latent.kv_rank, latent.rope_dim
        self.q_widths = [heads * self.head_dim, heads * self.rope_dim]
        self.kv_widths = [heads * self.head_dim, heads * self.value_dim]
        self.down_widths = [latent.q_rank or sum(self.q_widths), self.kv_rank, self.rope_dim]
        reference = config.kernels == "reference"
        biased = {name: name in config.attention_bias for name in "qkvo"}

        def projection(d_in: int, parts: list[tuple[int, bool]]) -> Linear:
            parts = [part for part in parts if part[0]]  # rope_dim may be 0
            sizes, biases = [size for size, _ in parts], [bias for _, bias in parts]
            return Linear(d_in, sum(sizes), parts=sizes, bias=biases, reference=reference)

        kind = "rmsnorm" if config.norm == "none" else config.norm
        queries = [(size, biased["q"]) for size in self.q_widths]
        reads = queries if latent.q_rank is None else [(latent.q_rank, False)]
        self.down = projection(config.d_model, [*reads, (self.kv_rank, False), (self.rope_dim, False)])
        self.q_norm = None if latent.q_rank is None else norm_of(config, latent.q_rank, kind, eps=latent.norm_eps)
        self.q_up = None if latent.q_rank is None else projection(latent.q_rank, queries)
        self.kv_norm = norm_of(config, self.kv_rank, kind, eps=latent.norm_eps)
        self.kv_up = projection(self.kv_rank, list(zip(self.kv_widths, (biased["k"], biased["v"]), strict=True)))
        self.output = Linear(
            self.kv_widths[1], config.d_model, bias=biased["o"], residual_output=True, reference=reference
        )
        self.position = positions.at(layer, self.rope_dim)

    def forward(
        self, x: Float[Tensor, "... length d_model"], context: Context
    ) -> Float[Tensor, "... length d_model"]:
        queries, latent, rope = self.down(x).split(self.down_widths, dim=-1)
        if self.q_up is not None and self.q_norm is not None:
            queries = self.q_up(self.q_norm(queries))
        plain, turned = queries.split(self.q_widths, dim=-1)
        plain = rearrange(plain, "... t (h d) -> ... h t d", h=self.heads, d=self.head_dim)
        turned = rearrange(turned, "... t (h d) -> ... h t d", h=self.heads, d=self.rope_dim)
        turned = self.position(turned, context.positions, context.memo)
        latent = self.kv_norm(latent)
        rope = self.position(rope.unsqueeze(-3), context.positions, context.memo).squeeze(-3)
        form = self.materialised
        if context.cache is not None:
            cached = context.cache.append(self.layer, {"latent": latent, "rope": rope}, self.reach)
            latent, rope = cached["latent"], cached["rope"]
            if self.absorbs(x.shape[-2], latent.shape[-2]):
                form = self.absorbed
        visible, scores = self.visible(context, latent.shape[-2]), self.scores(self.position.slopes)
        mixed = form(plain, turned, latent, rope, visible, scores)
        return self.output(rearrange(mixed, "... h t d -> ... t (h d)"))

    def materialised(
        self,
        plain: Plain,
        turned: Turned,
        latent: Latent,
        rope: RopeKey,
        visible: Visibility | None,
        scores: Scores,
    ) -> Mixed:
        """Keys and values of every head, then attention as usual.

        Args:
            plain, turned: the queries' two parts, the second with its position in it.
            latent, rope: c_KV after its norm and the shared key, of all tokens so far.
            visible: who may read whom.
            scores: scale, cap, ALiBi, sink, dropout; without a scale 1 / √(head_dim + rope_dim).
        """
        k, v = self.kv_up(latent).split(self.kv_widths, dim=-1)
        k = rearrange(k, "... t (h d) -> ... h t d", h=self.heads)
        v = rearrange(v, "... t (h d) -> ... h t d", h=self.heads)
        shared = rope.unsqueeze(-3).expand(*k.shape[:-1], self.rope_dim)
        return self.kernel(torch.cat([plain, turned], dim=-1), torch.cat([k, shared], dim=-1), v, visible, scores)

    def absorbed(
        self,
        plain: Plain,
        turned: Turned,
        latent: Latent,
        rope: RopeKey,
        visible: Visibility | None,
        scores: Scores,
    ) -> Mixed:
        """The queries brought to the latent vectors, and the mixture brought back; arguments as :meth:`materialised`.

        A key bias adds q · b to all scores of a query, which the softmax does not see; a value bias is added once, as weights
        sum to one. Where that is not so, :meth:`absorbs` says no.
        """
        up_k, up_v = self.kv_up.weight.split(self.kv_widths)
        up_k = rearrange(up_k, "(h d) rank -> h d rank", h=self.heads)
        up_v = rearrange(up_v, "(h d) rank -> h d rank", h=self.heads)
        q = torch.cat([einsum(plain, up_k, "... h t d, h d rank -> ... h t rank"), turned], dim=-1)
        kept = torch.cat([latent, rope], dim=-1).unsqueeze(-3)
        scores = replace(scores, scale=scores.scale_of(self.head_dim + self.rope_dim))
        # The values are c_KV alone; mixing the shared key as well is cheap, and fused kernels want keys as wide as values.
        mixed = self.kernel(q, kept, kept, visible, scores)[..., : self.kv_rank]
        mixed = einsum(mixed, up_v, "... h t rank, h d rank -> ... h t d")
        if self.kv_up.biased[1]:
            bias = self.kv_up.full_bias()
            assert bias is not None
            mixed = mixed + rearrange(bias[self.kv_widths[0] :], "(h d) -> h 1 d", h=self.heads)
        return mixed

    def absorbs(self, new: int, total: int) -> bool:
        """Whether `new` queries over `total` tokens in the cache take the absorbed form: if it multiplies less.

        Per head, the materialised form brings every token's vector up and compares in few dimensions; the absorbed one brings
        only the queries over, and compares in many. So one new token is absorbed at any length that matters, a prompt is not:
        with DeepSeek's widths the two meet near 150 new tokens behind a long cache.

        Biases that have no place in the absorbed form (see there) are materialised: of keys where a cap or a sink makes the
        softmax see a constant, of values where a sink or dropout takes away from the sum of weights.
        """
        key_bias, value_bias = self.kv_up.biased
        sinks, dropout = self.sinks is not None, self.training and self.dropout > 0
        if (key_bias and (sinks or self.soft_cap is not None)) or (value_bias and (sinks or dropout)):
            return False
        up = self.kv_rank * (self.head_dim + self.value_dim)
        wide, narrow = 2 * (self.kv_rank + self.rope_dim), self.head_dim + self.rope_dim + self.value_dim
        return new * (up + total * wide) < total * up + new * total * narrow

    def num_params(self) -> int:
        pieces = (self.down, self.q_norm, self.q_up, self.kv_norm, self.kv_up, self.output)
        sinks = 0 if self.sinks is None else self.heads
        return sinks + sum(int(piece.num_params()) for piece in pieces if piece is not None)

    def flops_per_token(self, length: int) -> float:
        """Materialised: projections, and scores and mixture over the keys that are computed."""
        projections = (self.down, self.q_up, self.kv_up, self.output)
        keys = scores_per_query(self._config, self.layer, length)
        scores_and_mixture = 2 * keys * self.heads * (self.head_dim + self.rope_dim + self.value_dim)
        return scores_and_mixture + sum(piece.flops_per_token() for piece in projections if piece is not None)

    @staticmethod
    def cache_widths(config: ModelConfig) -> int:
        """Numbers kept per token and layer while generating: the latent vector and the shared rotated key."""
        return config.latent.kv_rank + config.latent.rope_dim

    @staticmethod
    def state_size(config: ModelConfig) -> int:
        """Numbers kept per layer whatever the length."""
        return 0

    @staticmethod
    def wide_size(config: ModelConfig) -> int:
        """How many of those are fp32 at least."""
        return 0
