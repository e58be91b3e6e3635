"""Muon: momentum, orthogonalised (Keller Jordan et al. 2024).

For a hidden matrix θ of shape (rows, columns) with gradient g, momentum μ, learning rate η::

    b ← μ b + (1 − μ) g
    u = (1 − μ) g + μ b                (Nesterov; else u = b)
    θ ← θ − η λ θ − η √max(1, rows / columns) · NewtonSchulz(u)

Orthogonalising gives every direction of the update the same size: rare directions, which a plain step would drown, count as
much as the loud ones. The factor √max(1, rows / columns) is the original one: a weight acts as x ↦ θ x, and a matrix taller
than wide with unit singular values would otherwise change its output entries less than a square one does.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from scratchlm.errors import UserError
from scratchlm.optim import newton_schulz
from scratchlm.optim.implementation import GroupedOptimizer, check_implementation, check_ranges
from scratchlm.optim.newton_schulz import alike, newton_schulz_reference, orthogonalise_alike


def split_sizes(parameter: Tensor) -> list[int]:
    """Rows of each part of `parameter` that is orthogonalised by itself.

    A parameter that holds several matrices one below the other (queries, keys and values; gate and up) says so by an
    attribute ``muon_split``: a number of equal blocks, or the list of their rows.

    Raises:
        UserError: the blocks do not add up to the parameter's rows.
    """
    rows = parameter.shape[-2]
    split: int | list[int] = getattr(parameter, "muon_split", 1)
    if isinstance(split, int):
        if split < 1 or rows % split:
            raise UserError(
                f"muon_split = {split} does not divide the {rows} rows of a {tuple(parameter.shape)} matrix"
            )
        return [rows // split] * split
    sizes = list(split)
    if sum(sizes) != rows or any(size < 1 for size in sizes):
        raise UserError(
            f"muon_split = {sizes} does not add up to the {rows} rows of a {tuple(parameter.shape)} matrix"
        )
    return sizes


def matrices_of(parameter: Tensor, values: Tensor) -> list[Tensor]:
    """`values`, shaped as `parameter` (..., rows, columns), as views of the matrices to orthogonalise."""
    sizes = split_sizes(parameter)
    stacked = values.reshape(-1, *values.shape[-2:])
    return [part for matrix in stacked.unbind() for part in matrix.split(sizes)]


class Muon(GroupedOptimizer):
    """Muon for matrices; give embeddings, heads, norms and biases to AdamW (:func:`~scratchlm.optim.build_optimizers`).

    Args:
        params: parameters of at least two dimensions, or groups of them. Leading dimensions beyond two (experts, say) are
            a batch of matrices. See :func:`split_sizes` for matrices stored in one parameter.
        lr: learning rate η.
        momentum: μ.
        nesterov: look ahead along the momentum.
        weight_decay: λ, decoupled; a step shrinks the parameter by η·λ of itself.
        implementation: ``reference`` (float32, one matrix after the other) or ``foreach`` (batched by shape, bfloat16 where
            the hardware is fast with it); ``auto`` and ``fused`` mean the latter.
        dtype: dtype of the batched iteration; None: bfloat16 where the hardware is fast with it.

    State per parameter: ``momentum_buffer`` (b) in its shape and dtype. A step never waits for the device.

    Raises:
        UserError: a parameter with fewer than two dimensions, a split that does not fit, a hyperparameter out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        implementation: str = "auto",
        dtype: torch.dtype | None = None,
    ) -> None:
        check_ranges(lr=lr, weight_decay=weight_decay, momentum=momentum)
        self.implementation = check_implementation(implementation)
        self.dtype = dtype
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        )
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim < 2:
                    raise UserError(
                        f"Muon takes matrices, not a parameter of shape {tuple(parameter.shape)}; give it to AdamW"
                    )
                split_sizes(parameter)

    def state_shapes(self, parameter: Tensor) -> dict[str, torch.Size]:
        """As for any optimizer."""
        return {"momentum_buffer": parameter.shape}

    def skips_on_device(self) -> bool:
        """True on CUDA, in batches. The gradients of a step that is left out are zero afterwards."""
        devices = {p.device.type for group in self.param_groups for p in group["params"]}
        return devices == {"cuda"} and self.implementation != "reference"

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        if self.implementation == "reference":
            for parameter in parameters:
                self._reference(parameter, group)
        else:
            self._batched(parameters, group)

    def _reference(self, parameter: Tensor, group: dict[str, Any]) -> None:
        lr, momentum, gradient = group["lr"], group["momentum"], parameter.grad
        assert gradient is not None
        buffer = self.state[parameter]["momentum_buffer"]
        buffer.mul_(momentum).add_((1 - momentum) * gradient)
        update = (1 - momentum) * gradient + momentum * buffer if group["nesterov"] else buffer
        parameter.mul_(1 - lr * group["weight_decay"])
        for part, change in zip(matrices_of(parameter, parameter), matrices_of(parameter, update), strict=True):
            rows, columns = part.shape
            part.sub_(lr * max(1, rows / columns) ** 0.5 * newton_schulz_reference(change))

    def _batched(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        lr, momentum, shrink = group["lr"], group["momentum"], 1 - group["lr"] * group["weight_decay"]
        gradients: Any = [p.grad for p in parameters]
        buffers = [self.state[p]["momentum_buffer"] for p in parameters]
        if self.skip is None:
            torch._foreach_lerp_(buffers, gradients, 1 - momentum)
            if group["weight_decay"]:
                torch._foreach_mul_(parameters, shrink)
        else:  # what is not finite becomes zero, and all factors 1 or 0
            skipped = self.skip != 0
            for gradient in gradients:
                gradient.masked_fill_(skipped, 0.0)
            torch._foreach_mul_(buffers, torch.where(skipped, 1.0, momentum))
            torch._foreach_add_(buffers, gradients, alpha=1 - momentum)
            if group["weight_decay"]:
                torch._foreach_mul_(parameters, torch.where(skipped, 1.0, shrink))
        updates: Any = torch._foreach_lerp(gradients, buffers, momentum) if group["nesterov"] else buffers
        parts = [m for p in parameters for m in matrices_of(p, p)]
        changes = [m for p, update in zip(parameters, updates, strict=True) for m in matrices_of(p, update)]
        for batch in alike(changes):
            turned = orthogonalise_alike([changes[index] for index in batch], self.dtype)
            if self.skip is not None:
                torch._foreach_mul_(turned, (1 - self.skip).to(turned[0].dtype))
            self._apply([parts[index] for index in batch], turned, lr)
            del turned  # before the next batch

    def _apply(self, parts: list[Tensor], changes: list[Tensor], lr: float) -> None:
        if not newton_schulz.in_batches(parts[0].device):
            for part, change in zip(parts, changes, strict=True):
                part.add_(change, alpha=-lr * _factor(part))
            return
        for factor in dict.fromkeys(
            map(_factor, parts)
        ):  # one launch for those of one factor, which takes one dtype
            some = [n for n, part in enumerate(parts) if _factor(part) == factor]
            own = torch.stack([changes[n] for n in some]).to(parts[0].dtype)
            torch._foreach_add_([parts[n] for n in some], own.unbind(), alpha=-lr * factor)


def _factor(matrix: Tensor) -> float:
    """√max(1, rows / columns)."""
    rows, columns = matrix.shape
    return float(max(1, rows / max(1, columns)) ** 0.5)
