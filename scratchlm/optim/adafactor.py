"""Adafactor: Adam's second moment from its row and column means (Shazeer & Stern 2018, arXiv 1804.04235, algorithms 4–6).

With gradient G of shape (rows, columns), step t = 1, 2, … and learning rate η::

    β̂₂ = 1 − tᵝ                         β = −0.8: the first step has 0, so that no bias is to be undone
    R ← β̂₂ R + (1 − β̂₂) · mean of (G² + ε₁) over each row
    C ← β̂₂ C + (1 − β̂₂) · mean of (G² + ε₁) over each column
    V̂ = R Cᵀ / mean(R)                  the matrix of rank one with these means; of a vector: V̂ itself is kept
    U = G / √V̂
    Û = U / max(1, RMS(U) / d)          an update out of proportion is one that V̂ has not caught up with
    ρ = η, or min(η, 1/√t)              the latter: relative step
    α = ρ, or max(ε₂, RMS(θ)) ρ         the latter: relative to the parameter's own scale
    θ ← θ − η λ θ − α Û

The paper sums where this averages: the factors cancel in V̂. Its own setting is η = 0.01 with both options, and no schedule.
For a matrix the state is rows + columns numbers, where Adam has twice rows × columns; there is no first moment.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from scratchlm.errors import UserError
from scratchlm.optim.implementation import SCALAR, GroupedOptimizer, check_implementation, check_ranges


class Adafactor(GroupedOptimizer):
    """Adafactor with two equal implementations.

    Args:
        params: parameters, or parameter groups. What has two dimensions or more is factored over its last two: each of
            stacked matrices (experts) has row and column means of its own. RMS is taken over a whole parameter.
        lr: learning rate η.
        decay: β < 0; nearer to 0, the second moment remembers longer.
        eps: (ε₁, ε₂): added to the squared gradient; the least scale of a parameter.
        clip: d ≥ 1, the largest RMS of an update before the learning rate.
        relative_step: ρ = min(η, 1/√t).
        scale_parameter: α = max(ε₂, RMS(θ)) ρ.
        weight_decay: λ, decoupled; a step shrinks the parameter by η·λ of itself.
        implementation: ``reference`` (the formula, one tensor at a time) or ``foreach`` (multi-tensor calls); ``auto`` and
            ``fused`` mean the latter, as torch has no kernel for Adafactor.

    State per parameter, in its dtype: of (..., rows, columns) ``row_mean`` (R), shape (..., rows), and ``column_mean`` (C),
    shape (..., columns); of a vector or scalar ``exp_avg_sq`` (V̂) in its shape; ``step`` (t), a number. A step never waits
    for the device.

    Raises:
        UserError: a hyperparameter out of range or an unknown implementation.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.01,
        decay: float = -0.8,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip: float = 1.0,
        relative_step: bool = True,
        scale_parameter: bool = True,
        weight_decay: float = 0.0,
        implementation: str = "auto",
    ) -> None:
        check_ranges(lr=lr, weight_decay=weight_decay)
        if not decay < 0:
            raise UserError(f"decay = {decay} must be below 0")
        if not clip >= 1:
            raise UserError(f"clip = {clip} must be at least 1")
        if not min(eps) > 0:
            raise UserError(f"eps = {eps} must both be above 0")
        self.implementation = check_implementation(implementation)
        options = {"relative_step": relative_step, "scale_parameter": scale_parameter, "weight_decay": weight_decay}
        super().__init__(params, {"lr": lr, "decay": decay, "eps": eps, "clip": clip, **options})

    def state_shapes(self, parameter: Tensor) -> dict[str, torch.Size]:
        """As for any optimizer; a matrix's second moment is its row and column means."""
        shape = parameter.shape
        if parameter.ndim < 2:
            return {"step": SCALAR, "exp_avg_sq": shape}
        return {"step": SCALAR, "row_mean": shape[:-1], "column_mean": shape[:-2] + shape[-1:]}

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                shapes = self.state_shapes(parameter).items()
                state.update({key: parameter.new_zeros(shape) for key, shape in shapes if key != "step"}, step=0)
            state["step"] = int(state["step"]) + 1  # a number on the host: reading it waits for nothing
        if self.implementation == "reference":
            for parameter in parameters:
                self._reference(parameter, group)
        else:
            self._foreach([p for p in parameters if p.ndim > 1], group)
            self._foreach([p for p in parameters if p.ndim < 2], group)

    @staticmethod
    def _step_size(t: int, group: dict[str, Any]) -> float:
        """ρ of step t."""
        lr: float = group["lr"]
        return min(lr, t**-0.5) if group["relative_step"] else lr

    def _reference(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        eps1, eps2 = group["eps"]
        assert gradient is not None
        t = state["step"]
        beta2 = 1 - t ** group["decay"]
        squared = gradient**2 + eps1
        if parameter.ndim > 1:
            r, c = state["row_mean"], state["column_mean"]
            r.mul_(beta2).add_((1 - beta2) * squared.mean(-1))
            c.mul_(beta2).add_((1 - beta2) * squared.mean(-2))
            # √V̂ as a product of roots: R Cᵀ of squares as small as ε₁ would be 0.
            root = (r / r.mean(-1, keepdim=True)).sqrt()[..., :, None] * c.sqrt()[..., None, :]
        else:
            v = state["exp_avg_sq"]
            v.mul_(beta2).add_((1 - beta2) * squared)
            root = v.sqrt()
        update = gradient / root
        update = update / (_rms(update) / group["clip"]).clamp(min=1)
        scale = _rms(parameter).clamp(min=eps2) if group["scale_parameter"] else 1.0
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(scale * self._step_size(t, group) * update)

    def _foreach(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """`parameters` are all factored, or none is."""
        if not parameters:
            return
        states = [self.state[p] for p in parameters]
        eps1, eps2 = group["eps"]
        gradients: Any = [p.grad for p in parameters]
        fresh = [state["step"] ** group["decay"] for state in states]  # 1 − β̂₂
        squared: Any = torch._foreach_mul(gradients, gradients)
        torch._foreach_add_(squared, eps1)

        def remember(key: str, means: Any) -> list[Tensor]:
            moments = [state[key] for state in states]
            torch._foreach_lerp_(moments, means, fresh)
            return moments

        if parameters[0].ndim > 1:
            rows: Any = remember("row_mean", [s.mean(-1) for s in squared])
            columns = remember("column_mean", [s.mean(-2) for s in squared])
            del squared
            rows = torch._foreach_div(rows, [r.mean(-1, keepdim=True) for r in rows])
            torch._foreach_sqrt_(rows)
            updates = torch._foreach_div(gradients, [r[..., :, None] for r in rows])
            torch._foreach_div_(updates, [c[..., None, :] for c in torch._foreach_sqrt(columns)])
        else:
            updates = torch._foreach_div(gradients, torch._foreach_sqrt(remember("exp_avg_sq", squared)))
        # The factor of each update, −α / max(1, RMS(U) / d), is computed where the tensors are: the host does not read it.
        roots = [p.numel() ** 0.5 for p in parameters]
        factors: Any = torch._foreach_norm(updates)
        torch._foreach_div_(factors, [group["clip"] * root for root in roots])
        torch._foreach_clamp_min_(factors, 1.0)
        torch._foreach_reciprocal_(factors)
        if group["scale_parameter"]:
            scales: Any = torch._foreach_norm(parameters)
            torch._foreach_div_(scales, roots)
            torch._foreach_clamp_min_(scales, eps2)
            torch._foreach_mul_(factors, scales)
        torch._foreach_mul_(factors, [-self._step_size(state["step"], group) for state in states])
        torch._foreach_mul_(updates, factors)
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, updates)


def _rms(values: Tensor) -> Tensor:
    """Root of the mean square, 0-dim."""
    return values.square().mean().sqrt()
