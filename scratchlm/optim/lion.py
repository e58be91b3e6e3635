"""Lion: the sign of a momentum (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2).

With gradient g, decay rates β₁ and β₂, learning rate η::

    c = β₁ m + (1 − β₁) g              the direction: nearer to the present gradient than m is
    θ ← θ − η λ θ − η sign(c)          the decay λ is decoupled
    m ← β₂ m + (1 − β₂) g              what is remembered: longer, as β₂ > β₁

Every coordinate moves by η (or, where c = 0, not at all), so that the update's norm is that of a vector of ones: larger than
Adam's, for which the paper takes 3 to 10 times less η and as many times more λ. One buffer per parameter, half of Adam's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from scratchlm.optim.implementation import GroupedOptimizer, check_implementation, check_ranges


class Lion(GroupedOptimizer):
    """Lion with two equal implementations.

    Args:
        params: parameters, or parameter groups, as for any torch optimizer.
        lr: learning rate η, the size of every coordinate's step.
        betas: decay rates (β₁, β₂) of the direction and of the memory; the paper's language models have (0.95, 0.98).
        weight_decay: λ, decoupled; a step shrinks the parameter by η·λ of itself.
        implementation: ``reference`` (the formula, one tensor at a time) or ``foreach`` (multi-tensor calls); ``auto`` and
            ``fused`` mean the latter, as torch has no kernel for Lion.

    State per parameter: ``exp_avg`` (m) in its shape and dtype. A step never waits for the device.

    Raises:
        UserError: a hyperparameter out of range or an unknown implementation.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        implementation: str = "auto",
    ) -> None:
        check_ranges(lr=lr, weight_decay=weight_decay, beta1=betas[0], beta2=betas[1])
        self.implementation = check_implementation(implementation)
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def state_shapes(self, parameter: Tensor) -> dict[str, torch.Size]:
        """As for any optimizer."""
        return {"exp_avg": parameter.shape}

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
        if self.implementation == "reference":
            for parameter in parameters:
                self._reference(parameter, group)
        else:
            self._foreach(parameters, group)

    def _reference(self, parameter: Tensor, group: dict[str, Any]) -> None:
        lr, (beta1, beta2), gradient = group["lr"], group["betas"], parameter.grad
        m = self.state[parameter]["exp_avg"]
        assert gradient is not None
        direction = beta1 * m + (1 - beta1) * gradient
        parameter.mul_(1 - lr * group["weight_decay"])
        parameter.sub_(lr * direction.sign())
        m.mul_(beta2).add_((1 - beta2) * gradient)

    def _foreach(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        gradients: Any = [p.grad for p in parameters]
        m = [self.state[p]["exp_avg"] for p in parameters]
        # Not a lerp, m + (1 − β₁) (g − m): its rounding could turn the sign where the two terms nearly cancel.
        directions: Any = torch._foreach_mul(m, beta1)
        torch._foreach_add_(directions, gradients, alpha=1 - beta1)
        torch._foreach_sign_(directions)
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        torch._foreach_add_(parameters, directions, alpha=-lr)
        torch._foreach_mul_(m, beta2)
        torch._foreach_add_(m, gradients, alpha=1 - beta2)
