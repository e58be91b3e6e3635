"""Multi-token prediction: modules that foretell the tokens after the next one (DeepSeek-V3, arXiv 2412.19437, section 2.2)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from scratchlm.model import choices
from scratchlm.model.config import ModelConfig
from scratchlm.model.context import Context
from scratchlm.model.linear import Linear
from scratchlm.model.norm import norm_of
from scratchlm.model.position import Positions


class PredictionModule(nn.Module):
    """One step further: from what is known at position i and the token at i + depth + 1 to the token after that.

    ::

        hidden of depth k−1 at i ── norm ─┐
                                          ├─ ‖ ─ M ─ block ─ norm ─ (the model's head) ─►  token i + k + 1
        embedding of token i + k ── norm ─┘

    (eq. 21 to 23; embedding and head are the model's own.) Used in training; generation leaves it out.

    Args:
        config: the architecture; the block is the one its patterns give the layer after the last.
        depth: 0 for the first module.
        positions: shared positions.
    """

    def __init__(self, config: ModelConfig, depth: int, positions: Positions) -> None:
        super().__init__()
        reference = config.kernels == "reference"
        self.depth = depth
        self.hidden_norm, self.token_norm = norm_of(config, config.d_model), norm_of(config, config.d_model)
        self.project = Linear(2 * config.d_model, config.d_model, reference=reference)
        self.block = choices.BLOCK.get(config.block)(config, config.layers + depth, positions)
        self.norm = norm_of(config, config.d_model)

    def forward(
        self,
        hidden: Float[Tensor, "... length d_model"],
        embedded: Float[Tensor, "... length d_model"],
        context: Context,
    ) -> Float[Tensor, "... length d_model"]:
        """Hidden states of this depth; the head reads :attr:`norm` of them.

        Args:
            hidden: of the depth before (for the first what the model's own head reads), at positions 0 … length − 1.
            embedded: of the tokens that much further on.
            context: of the pass, over `length` positions.
        """
        joined = torch.cat([self.hidden_norm(hidden), self.token_norm(embedded)], dim=-1)
        x: Tensor = self.block(self.project(joined), context)
        return x

    def num_params(self) -> int:
        norms = self.hidden_norm.num_params() + self.token_norm.num_params() + self.norm.num_params()
        return int(norms + self.project.num_params() + self.block.num_params())

    def num_active_params(self) -> int:
        spared = self.block.num_params() - self.block.num_active_params()
        return int(self.num_params() - spared)

    def flops_per_token(self, length: int) -> float:
        return float(self.project.flops_per_token() + self.block.flops_per_token(length))
