"""What all layers of one forward pass share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from jaxtyping import Bool, Float, Int
from torch import Tensor

from scratchlm.kernels.visibility import Visibility


class Cache(Protocol):
    """What layers ask of a cache (the generator owns it). Rows are the batch."""

    length: int

    def append(self, layer: int, new: Mapping[str, Tensor], reach: int | None = None) -> dict[str, Tensor]:
        """Append this layer's new tensors, each (batch, …, new, width), along their second last dimension; return all so
        far, or those that a query which reads `reach` positions still may read."""
        ...

    def state(self, layer: int) -> dict[str, Tensor]:
        """What this layer keeps instead of a growing cache; empty before the first token."""
        ...

    def replace(self, layer: int, state: Mapping[str, Tensor]) -> None:
        """Keep `state` for this layer, each tensor (batch, …)."""
        ...

    def key_mask(self, batch: int, total: int) -> Tensor | None:
        """(batch, total), False for padding keys; None if there are none."""
        ...


@dataclass
class RouterRecord:
    """What one layer's router did in one forward pass.

    Attributes:
        layer: the layer it belongs to.
        loss: weighted auxiliary losses, a scalar (mean over tokens; the task's loss is a mean over tokens as well).
        load: how many (token, choice) pairs each expert was given, before any were dropped; fp32 (experts,).
        dropped: how many of them found no room; scalar.
        entropy: mean entropy of the router's distribution over experts, in nats; scalar.
        passes: how many forward passes were added up.
    """

    layer: int
    loss: Float[Tensor, ""]
    load: Float[Tensor, " experts"]
    dropped: Float[Tensor, ""]
    entropy: Float[Tensor, ""]
    passes: int = 1

    def detached(self) -> RouterRecord:
        """The same figures without their graph."""
        return self._each(Tensor.detach)

    def cloned(self) -> RouterRecord:
        """The same figures in memory of their own."""
        return self._each(Tensor.clone)

    def _each(self, change: Callable[[Tensor], Tensor]) -> RouterRecord:
        loss, load, dropped, entropy = map(change, (self.loss, self.load, self.dropped, self.entropy))
        return replace(self, loss=loss, load=load, dropped=dropped, entropy=entropy)

    def plus(self, other: RouterRecord) -> RouterRecord:
        """Both passes together: sums."""
        return replace(
            self,
            loss=self.loss + other.loss,
            load=self.load + other.load,
            dropped=self.dropped + other.dropped,
            entropy=self.entropy + other.entropy,
            passes=self.passes + other.passes,
        )


@dataclass(frozen=True)
class Context:
    """What all layers of one forward pass share.

    Attributes:
        positions: position of each token, (…, length); None: 0 … length − 1.
        visible: who may read whom, by the name of the mask; None: plain causal.
        cache: keys, values and states of earlier tokens, or None.
        documents: document number of each token, (…, length), for layers that keep a state; None: one document.
        valid: False for padding among the new tokens, (batch, length); None: there is none.
        routers: every router of the pass appends its record here; none does where there is a cache, in generation.
        memo: what positions computed for one layer and others ask for again.
        checkpointing: ``blocks``: a block keeps only its input for the backward pass, and computes the rest again there; ``selective``: it also keeps
            the results of its linear layers and of fused attention; ``none``.
    """

    positions: Int[Tensor, "... length"] | None = None
    visible: Mapping[str, Visibility | None] = field(default_factory=dict)
    cache: Cache | None = None
    documents: Int[Tensor, "... length"] | None = None
    valid: Bool[Tensor, "batch length"] | None = None
    routers: list[RouterRecord] = field(default_factory=list)
    memo: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict)
    checkpointing: str = "none"
