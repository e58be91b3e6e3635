"""The block: where norms, attention, feed-forward and the residual stream meet.

The layout (serial, parallel) and the places of the norms are two axes; a block knows the first, a `Placement` the second.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from scratchlm.model import choices
from scratchlm.model.config import ModelConfig
from scratchlm.model.context import Context
from scratchlm.model.moe import MixtureOfExperts
from scratchlm.model.norm import NoNorm, norm_of
from scratchlm.model.position import Positions
from scratchlm.model.residual import PlainResidual


@dataclass(frozen=True)
class Placement:
    """Where the norms of a branch f stand.

    Attributes:
        before: the branch reads norm(x).
        after: the branch's output is normed before it is added.
        on_stream: the sum is normed: the residual stream itself.
    """

    before: bool = False
    after: bool = False
    on_stream: bool = False


PRE = Placement(before=True)
"""x ──┬───────────────(+)──►      the stream is never normed (Xiong et al. 2020, arXiv 2002.04745; GPT-2, Llama)
       └─ norm ── f ────┘"""

POST = Placement(on_stream=True)
"""x ──┬───────(+)── norm ──►      the original (Vaswani et al. 2017): needs a warm-up, unstable when deep
       └─ f ────┘"""

REORDERED = Placement(after=True)
"""x ──┬───────────────(+)──►      the branch's output is normed (Swin v2, arXiv 2111.09883; OLMo 2, arXiv 2501.00656)
       └─ f ── norm ────┘"""

DOUBLE = Placement(before=True, after=True)
"""x ──┬───────────────────────(+)──►      before and after (Grok, Gemma 2, arXiv 2408.00118), the sandwich
       └─ norm ── f ── norm ────┘"""

NOWHERE = Placement()
"""x ──┬───────(+)──►      no norm in the blocks
       └─ f ────┘"""


def feedforward_of(config: ModelConfig, layer: int) -> nn.Module:
    """The layer's feed-forward: dense, or a mixture of experts."""
    if config.has_experts(layer):
        return MixtureOfExperts(config, layer)
    feedforward: nn.Module = choices.FEEDFORWARD.get(config.feedforward)(config)
    return feedforward


class Block(nn.Module):
    """Two branches with their norms and residual scales; a subclass says how they are joined."""

    def __init__(self, config: ModelConfig, layer: int, positions: Positions) -> None:
        super().__init__()
        self.placement: Placement = choices.NORM_PLACEMENT.get(config.norm_placement)
        self.attention = choices.ATTENTION.get(config.attention_at(layer))(config, layer, positions)
        self.feedforward = feedforward_of(config, layer)
        residual = choices.RESIDUAL.get(config.residual)
        self.attention_scale, self.feedforward_scale = residual(config), residual(config)
        self.dropout = nn.Dropout(config.residual_dropout)
        # Steps that do nothing are not called: where a token is written at a time, calls are most of the time.
        self.scaled = not isinstance(self.attention_scale, PlainResidual)
        self.normed_after, self.dropped = self.placement.after, config.residual_dropout > 0
        self._place_norms(config)

    def _place_norms(self, config: ModelConfig) -> None:
        def norm(wanted: bool) -> nn.Module:
            return norm_of(config, config.d_model) if wanted else NoNorm(config.d_model)

        after = self.placement.after or self.placement.on_stream
        self.attention_norm, self.attention_post_norm = norm(self.placement.before), norm(after)
        self.feedforward_norm, self.feedforward_post_norm = norm(self.placement.before), norm(after)

    def _join(self, x: Tensor, branch: Tensor, post_norm: nn.Module, scale: nn.Module) -> Tensor:
        """The stream after one branch."""
        if self.normed_after:
            branch = post_norm(branch)
        if self.dropped:
            branch = self.dropout(branch)
        x = x + (scale(branch) if self.scaled else branch)
        return post_norm(x) if self.placement.on_stream else x

    def pieces(self) -> list[nn.Module]:
        """Everything with parameters of its own."""
        return [
            self.attention_norm,
            self.attention,
            self.attention_post_norm,
            self.attention_scale,
            self.feedforward_norm,
            self.feedforward,
            self.feedforward_post_norm,
            self.feedforward_scale,
        ]

    def num_params(self) -> int:
        return sum(piece.num_params() for piece in self.pieces())  # type: ignore[operator]

    def num_active_params(self) -> int:
        """Parameters that one token meets."""
        spared: int = self.feedforward.num_params() - self.feedforward.num_active_params()  # type: ignore[operator]
        return self.num_params() - spared

    def flops_per_token(self, length: int) -> float:
        return self.attention.flops_per_token(length) + self.feedforward.flops_per_token(length)  # type: ignore[operator]


class SerialBlock(Block):
    """Attention, then feed-forward, which reads what attention wrote (Vaswani et al. 2017).

    ::

        x ──┬──────────────────────(+)──┬────────────────────────(+)──►
            └─ norm ── attention ───┘   └─ norm ── feed-forward ──┘
    """

    def forward(
        self, x: Float[Tensor, "... length d_model"], context: Context
    ) -> Float[Tensor, "... length d_model"]:
        branch = self.attention(self.attention_norm(x), context)
        x = self._join(x, branch, self.attention_post_norm, self.attention_scale)
        branch = self.feedforward(self.feedforward_norm(x), context)
        return self._join(x, branch, self.feedforward_post_norm, self.feedforward_scale)


class ParallelBlock(Block):
    """Both branches read the same stream (GPT-J; PaLM, arXiv 2204.02311, section 2): their matmuls need not wait.

    ::

            ┌─ norm ── attention ─────┐
        x ──┼────────────────────────(+)──►      norm_placement = post norms the stream once, after the sum
            └─ norm ── feed-forward ──┘
    """

    def _place_norms(self, config: ModelConfig) -> None:
        super()._place_norms(config)
        if self.placement.on_stream:  # the stream is normed once, by `attention_post_norm`
            self.feedforward_post_norm = NoNorm(config.d_model)

    def forward(
        self, x: Float[Tensor, "... length d_model"], context: Context
    ) -> Float[Tensor, "... length d_model"]:
        attended = self.attention(self.attention_norm(x), context)
        fed = self.feedforward(self.feedforward_norm(x), context)
        if self.placement.on_stream:
            x = x + self.feedforward_scale(self.dropout(fed))
            return self._join(x, attended, self.attention_post_norm, self.attention_scale)
        x = self._join(x, attended, self.attention_post_norm, self.attention_scale)
        return self._join(x, fed, self.feedforward_post_norm, self.feedforward_scale)


class ParallelSharedBlock(ParallelBlock):
    """Both branches read the same normed stream (GPT-J, PaLM, Cohere).

    ::

                        ┌─ attention ─────┐
        x ──┬── norm ───┤                 │
            │           └─ feed-forward ──┤
            └────────────────────────────(+)──►
    """

    def _place_norms(self, config: ModelConfig) -> None:
        super()._place_norms(config)
        self.feedforward_norm = NoNorm(config.d_model)

    def forward(
        self, x: Float[Tensor, "... length d_model"], context: Context
    ) -> Float[Tensor, "... length d_model"]:
        normed = self.attention_norm(x)
        attended, fed = self.attention(normed, context), self.feedforward(normed, context)
        x = self._join(x, attended, self.attention_post_norm, self.attention_scale)
        return self._join(x, fed, self.feedforward_post_norm, self.feedforward_scale)
