"""What a branch is multiplied by when it is added to the residual stream: x + s · branch."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from scratchlm.model.config import ModelConfig


class PlainResidual(nn.Module):
    """s = 1 (He et al. 2015, arXiv 1512.03385)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()

    def forward(self, branch: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        return branch

    def num_params(self) -> int:
        return 0


class DepthScaledResidual(nn.Module):
    """s = 1 / √(2L), two branches in each of L layers: the stream's variance does not grow with depth (GPT-2 puts the same
    factor into its initial weights: Radford et al. 2019, section 2.3; that is ``init = gpt2``)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.scale = 1 / math.sqrt(2 * max(1, config.layers))

    def forward(self, branch: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        return branch * self.scale

    def num_params(self) -> int:
        return 0


class FixedResidual(nn.Module):
    """s is `residual_init`, not learned (Granite's residual_multiplier: its published code)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.scale = config.residual_init

    def forward(self, branch: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        return branch * self.scale

    def num_params(self) -> int:
        return 0


class ScalarResidual(nn.Module):
    """s is one learned number per branch, from `residual_init` (0: ReZero, Bachlechner et al. 2020, arXiv 2003.04887)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((self.size(config),), config.residual_init))
        self.scale.role = "norm"  # type: ignore[attr-defined]  # a gain: not decayed

    @staticmethod
    def size(config: ModelConfig) -> int:
        return 1

    def forward(self, branch: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        return branch * self.scale.to(branch.dtype)

    def num_params(self) -> int:
        return self.scale.shape[0]


class VectorResidual(ScalarResidual):
    """s is one learned number per feature (LayerScale: Touvron et al. 2021, arXiv 2103.17239, eq. 5)."""

    @staticmethod
    def size(config: ModelConfig) -> int:
        return config.d_model
