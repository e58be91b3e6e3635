"""From the gradients of a step to the next weights: measured, clipped, stepped, rounded into the copy that is computed with.

::

    in passes     gradients ─ widened ─ measured ─ clipped ─ optimizer ─► masters ─ rounded ─► copy
    in one        gradients ─ measured ─ ( × factor, optimizer, rounded: one kernel ) ─► masters, copy

The second, where the optimizer can (:meth:`scratchlm.optim.Optimizers.takes_one_pass`), moves 30 bytes per parameter where the first moves 52, and bf16
gradients are never widened in memory. Several micro-batches are summed in the masters' dtype all the same.
"""

from __future__ import annotations

import math

from torch import Tensor

from scratchlm.optim import Optimizers, clip_factor, clip_grad_norm, gradient_norm
from scratchlm.optim.implementation import OnePass
from scratchlm.train.working_copy import Computing


class Update:
    """What a step does with its gradients.

    Args:
        optimizers: of the masters.
        computing: what forward and backward passes compute with.
        grad_clip: largest norm of the gradient; 0: any.
    """

    def __init__(self, optimizers: Optimizers, computing: Computing, grad_clip: float) -> None:
        self.optimizers, self.computing, self.grad_clip = optimizers, computing, grad_clip
        self.parameters: list[Tensor] = list(optimizers.names.values())
        self._copies = computing.pairs()
        self.in_one_pass = optimizers.takes_one_pass()
        self._factor: Tensor | None = None

    def zero_grad(self) -> None:
        """Forget all gradients."""
        self.optimizers.zero_grad()
        self.computing.forget()

    def collect(self, *, alone: bool) -> None:
        """After a backward pass.

        Args:
            alone: there is no other in this step, so that nothing has to be added to what it leaves.
        """
        if not (alone and self.in_one_pass):
            self.computing.collect()

    def with_gradients(self) -> list[Tensor]:
        """Those that have the gradients of a step's only backward pass after :meth:`collect`."""
        return [self._copies.get(p, p) if self.in_one_pass else p for p in self.parameters]

    def clip(self) -> Tensor:
        """Bound the gradient's norm; returns what it was, a 0-dim fp32 tensor that nobody has waited for."""
        if not self.in_one_pass:
            return clip_grad_norm(self.parameters, self.grad_clip or math.inf)
        one_pass = OnePass(self._copies)
        found = [one_pass.gradient(parameter) for parameter in self.parameters]
        norm = gradient_norm([gradient for gradient in found if gradient is not None])
        self._factor = clip_factor(norm, self.grad_clip).to(self.parameters[0].device) if self.grad_clip else None
        return norm

    def apply(self, skip: Tensor | None = None) -> None:
        """Step, and round what came of it.

        Args:
            skip: as for :meth:`scratchlm.optim.Optimizers.step`.
        """
        if self.in_one_pass:
            self.optimizers.step(skip, OnePass(self._copies, self._factor))
        else:
            self.optimizers.step(skip)
            self.computing.refresh()
