"""SGD with momentum and decoupled weight decay.

With gradient g, momentum μ and learning rate η::

    b ← μ b + g
    θ ← θ − η λ θ − η b                (Nesterov: g + μ b in place of b)

The decay λ is decoupled as in AdamW (Loshchilov & Hutter 2019, algorithm 1): it is not added to the gradient, so that it
does not enter the momentum. With λ = 0 this is ``torch.optim.SGD``, and with μ = 0 the two decays are the same, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from scratchlm.optim.implementation import GroupedOptimizer, check_implementation, check_ranges, is_flat, resolve


class SGD(GroupedOptimizer):
    """SGD with three equal implementations.

    Args:
        params: parameters, or parameter groups, as for any torch optimizer.
        lr: learning rate η.
        momentum: μ; 0 keeps no state.
        nesterov: look ahead along the momentum (needs momentum > 0 to differ).
        weight_decay: λ, decoupled; a step shrinks the parameter by η·λ of itself.
        implementation: ``reference``, ``foreach``, ``fused`` or ``auto``.

    State per parameter: ``momentum_buffer`` (b) in its shape and dtype, if momentum > 0.

    Raises:
        UserError: a hyperparameter out of range or an unknown implementation.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        implementation: str = "auto",
    ) -> None:
        check_ranges(lr=lr, weight_decay=weight_decay, momentum=momentum)
        self.implementation = check_implementation(implementation)
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        )

    def state_shapes(self, parameter: Tensor) -> dict[str, torch.Size]:
        """As for any optimizer, with momentum."""
        return {"momentum_buffer": parameter.shape}

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        if group["momentum"]:
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        implementation = resolve(self.implementation, parameters[0].device)
        if implementation == "reference":
            for parameter in parameters:
                self._reference(parameter, group)
        elif implementation == "foreach":
            self._foreach(parameters, group)
        else:
            buffers = [b for p in parameters for b in self.state[p].values()] if group["momentum"] else []
            if is_flat(*parameters, *buffers):
                self._fused(parameters, group)
            else:
                self._foreach(parameters, group)

    def _reference(self, parameter: Tensor, group: dict[str, Any]) -> None:
        lr, momentum, gradient = group["lr"], group["momentum"], parameter.grad
        assert gradient is not None
        update = gradient
        if momentum:
            buffer = self.state[parameter]["momentum_buffer"]
            buffer.mul_(momentum).add_(gradient)
            update = gradient + momentum * buffer if group["nesterov"] else buffer
        parameter.mul_(1 - lr * group["weight_decay"])
        parameter.sub_(lr * update)

    def _foreach(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        lr, momentum = group["lr"], group["momentum"]
        updates: Any = [p.grad for p in parameters]
        if momentum:
            buffers = [self.state[p]["momentum_buffer"] for p in parameters]
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, updates)
            updates = torch._foreach_add(updates, buffers, alpha=momentum) if group["nesterov"] else buffers
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        torch._foreach_add_(parameters, updates, alpha=-lr)

    def _fused(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        momentum = group["momentum"]
        torch._fused_sgd_(
            parameters,
            [p.grad.contiguous() for p in parameters if p.grad is not None],
            [self.state[p]["momentum_buffer"] for p in parameters] if momentum else [],
            weight_decay=0.0,  # the kernel's own would be added to the gradient
            momentum=momentum,
            lr=group["lr"],
            dampening=0.0,
            nesterov=bool(group["nesterov"] and momentum),
            maximize=False,
            is_first_step=False,  # the buffers start at zero, which is the same
        )
