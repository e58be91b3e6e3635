"""The block: where norms, attention, feed-forward and the residual stream meet."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from scratchlm.model import choices
from scratchlm.model.attention import Context
from scratchlm.model.config import ModelConfig


class PreNormBlock(nn.Module):
    """Norms inside the branches; the residual stream itself is never normalised (Xiong et al. 2020, arXiv 2002.04745).

    x ──┬────────────────────────(+)──┬────────────────────────────(+)──►
        └─ norm ── attention ─────┘   └─ norm ── feed-forward ──────┘
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        reference = config.kernels == "reference"
        norm = choices.NORM.get(config.norm)
        self.attention_norm = norm(config.d_model, config.norm_eps, reference=reference)
        self.attention = choices.ATTENTION.get(config.attention)(config, layer)
        self.feedforward_norm = norm(config.d_model, config.norm_eps, reference=reference)
        self.feedforward = choices.FEEDFORWARD.get(config.feedforward)(config)

    def forward(
        self, x: Float[Tensor, "... length d_model"], context: Context
    ) -> Float[Tensor, "... length d_model"]:
        x = x + self.attention(self.attention_norm(x), context)
        return x + self.feedforward(self.feedforward_norm(x))

    def num_params(self) -> int:
        pieces = (self.attention_norm, self.attention, self.feedforward_norm, self.feedforward)
        return sum(piece.num_params() for piece in pieces)

    def flops_per_token(self, length: int) -> int:
        return self.attention.flops_per_token(length) + self.feedforward.flops_per_token()
