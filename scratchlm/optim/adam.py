"""Adam: a step per coordinate, scaled by running moments of its gradient (Kingma & Ba 2015, algorithm 1).

With gradient g, step t = 1, 2, … and learning rate η::

    g ← g + λ θ                        L2 regularisation, if any: it passes through the moments
    m ← β₁ m + (1 − β₁) g              first moment: a running mean of the gradient
    v ← β₂ v + (1 − β₂) g²             second moment: a running mean of its square
    m̂ = m / (1 − β₁ᵗ)                  both start at zero; this undoes the bias
    v̂ = v / (1 − β₂ᵗ)
    θ ← θ − η m̂ / (√v̂ + ε)

A coordinate's step hardly depends on the size of its gradient. So it hardly depends on λ either, once g is small beside λ θ:
this is why :mod:`~scratchlm.optim.adamw` takes the decay out of the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from scratchlm.errors import UserError
from scratchlm.kernels import adam
from scratchlm.optim.implementation import (
    SCALAR,
    GroupedOptimizer,
    check_implementation,
    check_ranges,
    is_flat,
    resolve,
)


class Adam(GroupedOptimizer):
    """Adam with three equal implementations.

    Args:
        params: parameters, or parameter groups, as for any torch optimizer.
        lr: learning rate η.
        betas: decay rates (β₁, β₂) of the two moments.
        eps: ε, added to √v̂.
        weight_decay: λ, the weight of ½ λ ‖θ‖² in what is minimised.
        implementation: ``reference`` (the formula above, one tensor at a time), ``foreach`` (multi-tensor calls),
            ``fused`` (one pass over memory) or ``auto``.

    State per parameter: ``exp_avg`` (m) and ``exp_avg_sq`` (v) in the parameter's shape and dtype, ``step`` (t), a number,
    or for the fused kernel a 0-dim float32. A step never waits for the device.

    Raises:
        UserError: a hyperparameter out of range or an unknown implementation.
    """

    decoupled: ClassVar[bool] = False
    """Whether the decay goes to the parameter itself (AdamW) rather than through the gradient and its moments."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        implementation: str = "auto",
    ) -> None:
        check_ranges(lr=lr, weight_decay=weight_decay, beta1=betas[0], beta2=betas[1])
        if not eps >= 0:
            raise UserError(f"eps = {eps} must be at least 0")
        self.implementation = check_implementation(implementation)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def state_shapes(self, parameter: Tensor) -> dict[str, torch.Size]:
        """As for any optimizer."""
        return {"step": SCALAR, "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}

    def skips_on_device(self) -> bool:
        """True on CUDA with the fused kernel, which can be told not to write."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        return all(
            p.device.type == "cuda" and resolve(self.implementation, p.device) == "fused" and is_flat(p)
            for p in parameters
        )

    def takes_one_pass(self) -> bool:
        """True with the fused kernel, where Triton runs (:mod:`scratchlm.kernels.adam`)."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        return resolve(self.implementation, parameters[0].device) == "fused" and adam.fits(parameters)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        implementation = resolve(self.implementation, parameters[0].device)
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            # The fused kernel counts steps on the device; elsewhere the count is a number, read without waiting.
            if implementation == "fused":
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=parameter.device)
            else:
                state["step"] = int(state["step"])
        moments = [self.state[p][key] for p in parameters for key in ("exp_avg", "exp_avg_sq")]
        if implementation == "fused" and adam.fits([*parameters, *moments]):
            self._one_pass(parameters, group)
            return
        if self.one_pass.copies or self.one_pass.factor is not None:
            raise RuntimeError(
                "a step in one pass was promised, but parameters or moments are not what its kernel takes"
            )
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
        state, gradient, decay = self.state[parameter], parameter.grad, group["weight_decay"]
        lr, (beta1, beta2) = group["lr"], group["betas"]
        m, v = state["exp_avg"], state["exp_avg_sq"]
        assert gradient is not None
        if self.decoupled:
            parameter.mul_(1 - lr * decay)
        else:
            gradient = gradient + decay * parameter
        state["step"] += 1
        t = state["step"]
        if isinstance(t, Tensor):
            t = t.double()  # in float32, 1 − 0.999ᵗ is off in its fifth digit at first
        m.mul_(beta1).add_((1 - beta1) * gradient)
        v.mul_(beta2).add_((1 - beta2) * gradient**2)
        m_hat = m / (1 - beta1**t)
        v_hat = v / (1 - beta2**t)
        parameter.sub_(lr * m_hat / (v_hat.sqrt() + group["eps"]))

    def _foreach(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        states = [self.state[p] for p in parameters]
        gradients: Any = [p.grad for p in parameters]
        m = [state["exp_avg"] for state in states]
        v = [state["exp_avg_sq"] for state in states]
        for state in states:
            state["step"] += 1
        steps = [state["step"] for state in states]
        if self.decoupled:
            torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        elif group["weight_decay"]:
            gradients = torch._foreach_add(gradients, parameters, alpha=group["weight_decay"])
        torch._foreach_lerp_(m, gradients, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, gradients, gradients, 1 - beta2)
        root = torch._foreach_sqrt(v)
        torch._foreach_div_(root, [math.sqrt(1 - beta2**t) for t in steps])
        torch._foreach_add_(root, group["eps"])
        torch._foreach_addcdiv_(parameters, m, root, [-lr / (1 - beta1**t) for t in steps])

    def _one_pass(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """As :meth:`_fused`; gradients may be another dtype's."""
        with_gradients: dict[tuple[torch.dtype, bool], list[tuple[Tensor, Tensor]]] = {}
        for parameter in parameters:
            gradient = self.one_pass.gradient(parameter)
            assert gradient is not None
            kind = gradient.dtype, parameter in self.one_pass.copies
            with_gradients.setdefault(kind, []).append((parameter, gradient))
        for (_, copied), pairs in with_gradients.items():
            alike = [parameter for parameter, _ in pairs]
            states = [self.state[parameter] for parameter in alike]
            adam.step_(
                alike,
                [gradient for _, gradient in pairs],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [state["step"] for state in states],
                [self.one_pass.copies[parameter] for parameter in alike] if copied else [],
                self.one_pass.factor,
                self.skip,
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                decay=group["weight_decay"],
                decoupled=self.decoupled,
            )

    def _fused(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        states = [self.state[p] for p in parameters]
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        kernel = torch._fused_adamw_ if self.decoupled else torch._fused_adam_
        kernel(
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
            found_inf=self.skip,
        )
        if self.skip is not None:
            torch._foreach_sub_(steps, [self.skip] * len(steps))
