"""Normalisation layers, and how they are applied to queries and keys."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from scratchlm.kernels import rms_norm
from scratchlm.model import choices
from scratchlm.model.config import ModelConfig


class Norm(nn.Module):
    """What all norms share: computed in fp32 at least and returned in x's dtype; a gain and a shift if the kind has them.

    Attributes:
        scaled, shifted: whether the kind has a gain g and a shift b.
        offset: the gain is offset + weight; weights start so that it is 1.
        widens_itself: torch's fused function takes bf16 and fp16 and computes in fp32.

    Args:
        width: how many features are normed together.
        eps: ε.
        rows: None: one gain and shift, of shape (width,), for all of x; else one of its own for each of so many rows, of
            shape (rows, width), where x is (…, rows, width).
        reference: compute by the formula.
    """

    scaled: ClassVar[bool] = True
    shifted: ClassVar[bool] = False
    offset: ClassVar[float] = 0.0
    widens_itself: ClassVar[bool] = False

    def __init__(self, width: int, eps: float = 1e-5, *, rows: int | None = None, reference: bool = False) -> None:
        super().__init__()
        self.width, self.eps, self.rows, self.reference = width, eps, rows, reference
        shape = (width,) if rows is None else (rows, width)
        self.weight = nn.Parameter(torch.full(shape, 1.0 - self.offset)) if self.scaled else None
        self.bias = nn.Parameter(torch.zeros(shape)) if self.shifted else None
        for parameter, role in ((self.weight, "norm"), (self.bias, "bias")):
            if parameter is not None:
                parameter.role = role  # type: ignore[attr-defined]

    def forward(self, x: Float[Tensor, "... width"]) -> Float[Tensor, "... width"]:
        wide_enough = x.dtype in (torch.float32, torch.float64) or (self.widens_itself and not self.reference)
        plain = self.rows is None and not self.offset and wide_enough
        if plain and (self.weight is None or self.weight.dtype == x.dtype):  # nothing to widen
            return self.normalise(x, self.weight, self.bias)
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        gain = None if self.weight is None else self.weight.to(wide.dtype)
        if gain is not None and self.offset:
            gain = gain + self.offset
        shift = None if self.bias is None else self.bias.to(wide.dtype)
        if self.rows is None:
            return self.normalise(wide, gain, shift).to(x.dtype)
        normed = self.normalise(wide, None, None)  # torch's fused norms take one gain for all
        normed = normed if gain is None else normed * gain
        return (normed if shift is None else normed + shift).to(x.dtype)

    def normalise(self, x: Tensor, gain: Tensor | None, shift: Tensor | None) -> Tensor:
        raise NotImplementedError

    def num_params(self) -> int:
        return (self.rows or 1) * self.width * (self.scaled + self.shifted)

    def flops_per_token(self) -> int:
        """Only matrix products are counted, as everywhere in ScratchLM: a norm is bound by memory, not arithmetic."""
        return 0


class RMSNorm(Norm):
    """x / RMS(x) · g (Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4; Llama and nearly all since).

    RMS(x) = sqrt(mean(x²) + ε)
    """

    def forward(self, x: Float[Tensor, "... width"]) -> Float[Tensor, "... width"]:
        if self.rows is None and not self.reference and x.shape[-1] == self.width:
            if rms_norm.fits(x, self.weight):
                return rms_norm.rms_norm(x, self.weight, self.eps, self.offset)
            if rms_norm.fits_training(x, self.weight):
                return rms_norm.trained(x, self.weight, self.eps, self.offset)
        return super().forward(x)

    def normalise(self, x: Tensor, gain: Tensor | None, shift: Tensor | None) -> Tensor:
        if not self.reference:
            return F.rms_norm(x, (self.width,), gain, self.eps)
        normed = x / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + self.eps)
        return normed if gain is None else normed * gain


class RMSNormNoScale(RMSNorm):
    """x / RMS(x), nothing learned (nanochat)."""

    scaled = False


class RMSNormUnitOffset(RMSNorm):
    """x / RMS(x) · (1 + w) with w from 0: weight decay then pulls the gain towards 1 (Gemma's published code)."""

    offset = 1.0


class LayerNorm(Norm):
    """(x − mean) / sqrt(var + ε) · g + b (Ba et al. 2016, arXiv 1607.06450; the original Transformer, GPT-2)."""

    shifted = True
    widens_itself = True

    def normalise(self, x: Tensor, gain: Tensor | None, shift: Tensor | None) -> Tensor:
        if not self.reference:
            return F.layer_norm(x, (self.width,), gain, shift, self.eps)
        centred = x - x.mean(dim=-1, keepdim=True)
        normed = centred / torch.sqrt(centred.square().mean(dim=-1, keepdim=True) + self.eps)
        normed = normed if gain is None else normed * gain
        return normed if shift is None else normed + shift


class LayerNormNoBias(LayerNorm):
    """LayerNorm without the shift b (PaLM, Cohere)."""

    shifted = False


class LayerNormNoParameters(LayerNorm):
    """LayerNorm with nothing learned (OLMo 1)."""

    scaled, shifted = False, False


class NoNorm(nn.Module):
    """The identity, in a norm's place."""

    def __init__(self, width: int, eps: float = 0.0, *, rows: int | None = None, reference: bool = False) -> None:
        super().__init__()

    def forward(self, x: Float[Tensor, "... width"]) -> Float[Tensor, "... width"]:
        return x

    def num_params(self) -> int:
        return 0

    def flops_per_token(self) -> int:
        return 0


def norm_of(
    config: ModelConfig, width: int, kind: str | None = None, *, eps: float | None = None, rows: int | None = None
) -> Any:
    """A norm of the configuration's kind (or of `kind`) over `width` features, with its ε (or `eps`); `rows` as there."""
    chosen = choices.NORM.get(config.norm if kind is None else kind)
    eps = config.norm_eps if eps is None else eps
    return chosen(width, eps, rows=rows, reference=config.kernels == "reference")


def _qk_norm_of(config: ModelConfig, width: int, rows: int | None = None) -> Any:
    """A norm for queries or keys."""
    return norm_of(config, width, config.resolved_qk_norm_kind, eps=config.qk_norm_eps, rows=rows)


class NoQKNorm(nn.Module):
    """Queries or keys as they are."""

    def __init__(self, config: ModelConfig, heads: int) -> None:
        super().__init__()

    def forward(self, x: Float[Tensor, "... heads t head_dim"]) -> Float[Tensor, "... heads t head_dim"]:
        return x

    def num_params(self) -> int:
        return 0


class HeadQKNorm(nn.Module):
    """Each head's vector is normed by itself, with one gain for all heads (Henry et al. 2020, arXiv 2010.04245; Qwen3)."""

    def __init__(self, config: ModelConfig, heads: int) -> None:
        super().__init__()
        self.norm = _qk_norm_of(config, config.resolved_head_dim)

    def forward(self, x: Float[Tensor, "... heads t head_dim"]) -> Float[Tensor, "... heads t head_dim"]:
        normed: Tensor = self.norm(x)
        return normed

    def num_params(self) -> int:
        return int(self.norm.num_params())


class EachHeadQKNorm(nn.Module):
    """Each head's vector is normed by itself, with a gain of its own (Command R+, StableLM 2 12B: their published code)."""

    def __init__(self, config: ModelConfig, heads: int) -> None:
        super().__init__()
        self.norm = _qk_norm_of(config, config.resolved_head_dim, rows=heads)

    def forward(self, x: Float[Tensor, "... heads t head_dim"]) -> Float[Tensor, "... heads t head_dim"]:
        normed = self.norm(rearrange(x, "... h t d -> ... t h d"))
        return rearrange(normed, "... t h d -> ... h t d")

    def num_params(self) -> int:
        return int(self.norm.num_params())


class FullWidthQKNorm(nn.Module):
    """All heads of a token are normed together as one vector (OLMo 2, arXiv 2501.00656)."""

    def __init__(self, config: ModelConfig, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = _qk_norm_of(config, heads * config.resolved_head_dim)

    def forward(self, x: Float[Tensor, "... heads t head_dim"]) -> Float[Tensor, "... heads t head_dim"]:
        normed = self.norm(rearrange(x, "... h t d -> ... t (h d)"))
        return rearrange(normed, "... t (h d) -> ... h t d", h=self.heads)

    def num_params(self) -> int:
        return int(self.norm.num_params())
