"""Which positions may be attended to."""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from scratchlm.model.config import ModelConfig


class Mask(Protocol):
    """What a mask has to do; it is built from the configuration."""

    @property
    def is_plain_causal(self) -> bool:
        """True only where the mask is the causal triangle, for which the kernels need no matrix."""
        ...

    def allowed(self, queries: Int[Tensor, "... q"], keys: Int[Tensor, "... k"]) -> Bool[Tensor, "... q k"]:
        """True where the query at one position may read the key at another (positions within the sequence)."""
        ...


class Causal:
    """Every position sees itself and what came before it.

        keys →
    q   ■ □ □ □
    ↓   ■ ■ □ □
        ■ ■ ■ □
        ■ ■ ■ ■
    """

    is_plain_causal: ClassVar[bool] = True

    def __init__(self, config: ModelConfig) -> None:
        pass

    def allowed(self, queries: Int[Tensor, "... q"], keys: Int[Tensor, "... k"]) -> Bool[Tensor, "... q k"]:
        """True where the query at one position may read the key at another (positions within the sequence)."""
        return queries[..., :, None] >= keys[..., None, :]


def attention_mask(
    mask: Mask,
    length: int,
    *,
    documents: Int[Tensor, "... length"] | None = None,
    past: int = 0,
    key_mask: Bool[Tensor, "... total"] | None = None,
    device: torch.device | None = None,
) -> Bool[Tensor, " ... #heads length total"] | None:
    """The dense mask of a forward pass, or None where it is the plain causal triangle the kernels know themselves.

    Args:
        mask: the model's mask.
        length: number of new tokens (queries).
        documents: number of the document each token belongs to; attention stays within a document.
        past: tokens already in the cache, before the new ones.
        key_mask: False for keys that are padding, shape (batch, past + length).
        device: where to build it.
    """
    if mask.is_plain_causal and documents is None and key_mask is None and past == 0:
        return None
    total = past + length
    keys = torch.arange(total, device=device)
    allowed = mask.allowed(keys[past:], keys)
    if documents is not None:
        allowed = allowed & (documents[..., :, None] == documents[..., None, :])
    if key_mask is not None:
        allowed = allowed & key_mask[..., None, :]
    return allowed.unsqueeze(-3) if allowed.ndim > 2 else allowed
