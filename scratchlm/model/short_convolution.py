"""A short causal convolution over time, one filter per channel (H3, Mamba; Yang et al. 2024, arXiv 2412.06464)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from scratchlm.model.context import Context


class ShortConvolution(nn.Module):
    """y_t = Σ_j w_j x_{t−j} for j = 0 … width − 1, channel by channel; never across a document's start.

    Args:
        channels: features of x.
        width: taps.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.channels, self.width = channels, width
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.weight.role = "convolution"  # type: ignore[attr-defined]

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None) -> None:
        """Uniform within ±1/√width."""
        bound = self.width**-0.5
        self.weight.uniform_(-bound, bound, generator=generator)

    def forward(
        self, x: Float[Tensor, "... length channels"], context: Context, layer: int
    ) -> Float[Tensor, "... length channels"]:
        """`layer` finds the inputs before the first token in the cache, where there is one."""
        length, reach = x.shape[-2], self.width - 1
        before = None
        if context.cache is not None:
            before = context.cache.state(layer).get("inputs")
        if before is None:
            before = x.new_zeros(*x.shape[:-2], reach, self.channels)
        longer = torch.cat([before, x], dim=-2)
        if context.cache is not None:
            kept = longer[..., longer.shape[-2] - reach :, :]
            context.cache.replace(layer, {**context.cache.state(layer), "inputs": kept})
        y = x * self.weight[:, 0]
        for back in range(1, self.width):
            earlier = longer[..., reach - back : reach - back + length, :]
            if context.documents is not None:  # never behind a filled cache
                documents = F.pad(context.documents, (back, 0), value=-1)[..., :length]
                earlier = earlier * (documents == context.documents)[..., None]
            y = y + earlier * self.weight[:, back]
        return y

    def num_params(self) -> int:
        return self.channels * self.width
