"""AdamW: Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2).

With learning rate η and the bias-corrected moments m̂ and v̂ of :mod:`~scratchlm.optim.adam`, taken of the gradient alone::

    θ ← θ − η λ θ − η m̂ / (√v̂ + ε)     the decay λ does not pass through the moments
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from scratchlm.optim.adam import Adam


class AdamW(Adam):
    """AdamW with three equal implementations: Adam, its decay decoupled.

    Args:
        params: parameters, or parameter groups, as for any torch optimizer.
        lr: learning rate η.
        betas: decay rates (β₁, β₂) of the two moments.
        eps: ε, added to √v̂.
        weight_decay: λ; a step shrinks the parameter by η·λ of itself.
        implementation: as for :class:`~scratchlm.optim.adam.Adam`, whose state it has, too.

    Raises:
        UserError: a hyperparameter out of range or an unknown implementation.
    """

    decoupled = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        implementation: str = "auto",
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, implementation)
