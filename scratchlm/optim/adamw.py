"""AdamW: Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2).

With gradient g, step t = 1, 2, … and learning rate η::

    m ← β₁ m + (1 − β₁) g              first moment: a running mean of the gradient
    v ← β₂ v + (1 − β₂) g²             second moment: a running mean of its square
    m̂ = m / (1 − β₁ᵗ)                  both start at zero; this undoes the bias
    v̂ = v / (1 − β₂ᵗ)
    θ ← θ − η λ θ − η m̂ / (√v̂ + ε)     the decay λ does not pass through the moments
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from scratchlm.errors import UserError
from scratchlm.optim.implementation import GroupedOptimizer, check_implementation, check_ranges, is_flat, resolve


class AdamW(GroupedOptimizer):
    """AdamW with three equal implementations.

    Args:
        params: parameters, or parameter groups, as for any torch optimizer.
        lr: learning rate η.
        betas: decay rates (β₁, β₂) of the two moments.
        eps: ε, added to √v̂.
        weight_decay: λ; a step shrinks the parameter by η·λ of itself.
        implementation: ``reference`` (the formula above, one tensor at a time), ``foreach`` (multi-tensor calls),
            ``fused`` (one pass over memory) or ``auto``.

    State per parameter: ``exp_avg`` (m) and ``exp_avg_sq`` (v) in the parameter's shape and dtype, ``step`` (t) as a
    0-dim float32. A step never waits for the device.

    Raises:
        UserError: a hyperparameter out of range or an unknown implementation.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        implementation: str = "auto",
    ) -> None:
        check_ranges(lr=lr, weight_decay=weight_decay, beta1=betas[0], beta2=betas[1])
        if not eps >= 0:
            raise UserError(f"eps = {eps} must be at least 0")
        self.implementation = check_implementation(implementation)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        implementation = resolve(self.implementation, parameters[0].device)
        # The fused kernel counts steps on the device; elsewhere the count stays on the host, where reading it is free.
        step_device = parameters[0].device if implementation == "fused" else torch.device("cpu")
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=step_device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            elif state["step"].device != step_device:
                state["step"] = state["step"].to(step_device)
        if implementation == "fused":
            flat = [p for p in parameters if is_flat(p, *(self.state[p][key] for key in ("exp_avg", "exp_avg_sq")))]
            if flat:
                self._fused(flat, group)
            chosen = {id(p) for p in flat}
            parameters = [p for p in parameters if id(p) not in chosen]
        if implementation == "foreach":
            self._foreach(parameters, group)
        else:
            for parameter in parameters:
                self._reference(parameter, group)

    def _reference(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        lr, (beta1, beta2) = group["lr"], group["betas"]
        m, v = state["exp_avg"], state["exp_avg_sq"]
        assert gradient is not None
        state["step"] += 1
        t = state["step"].double()  # in float32, 1 − 0.999ᵗ is off in its fifth digit at first
        m.mul_(beta1).add_((1 - beta1) * gradient)
        v.mul_(beta2).add_((1 - beta2) * gradient**2)
        m_hat = m / (1 - beta1**t)
        v_hat = v / (1 - beta2**t)
        parameter.mul_(1 - lr * group["weight_decay"])
        parameter.sub_(lr * m_hat / (v_hat.sqrt() + group["eps"]))

    def _foreach(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        states = [self.state[p] for p in parameters]
        gradients: Any = [p.grad for p in parameters]
        m = [state["exp_avg"] for state in states]
        v = [state["exp_avg_sq"] for state in states]
        torch._foreach_add_([state["step"] for state in states], 1)
        steps = [float(state["step"]) for state in states]  # on the host: no wait
        torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        torch._foreach_lerp_(m, gradients, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, gradients, gradients, 1 - beta2)
        root = torch._foreach_sqrt(v)
        torch._foreach_div_(root, [math.sqrt(1 - beta2**t) for t in steps])
        torch._foreach_add_(root, group["eps"])
        torch._foreach_addcdiv_(parameters, m, root, [-lr / (1 - beta1**t) for t in steps])

    def _fused(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        states = [self.state[p] for p in parameters]
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        torch._fused_adamw_(
            parameters,
            [p.grad.contiguous() for p in parameters if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],  # the running maximum of AMSGrad, which is off
            steps,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
