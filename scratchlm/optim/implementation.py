"""What our optimizers share: the step over groups of parameters, and the choice among equal implementations."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from scratchlm.errors import UserError

IMPLEMENTATIONS = ("auto", "reference", "foreach", "fused")
SCALAR = torch.Size()


@dataclass(frozen=True)
class OnePass:
    """What a step does on its way through the parameters, where :meth:`GroupedOptimizer.takes_one_pass`.

    Attributes:
        copies: parameter → its copy in another dtype, which the new parameter is rounded into, and whose gradient, if it has one, is the
            parameter's.
        factor: of all gradients, which stay as they are (clipping): a scalar in fp32 on the device; None: 1.
    """

    copies: Mapping[Tensor, Tensor] = field(default_factory=dict)
    factor: Tensor | None = None

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """The gradient of `parameter`: that of its copy or its own."""
        copy = self.copies.get(parameter)
        return parameter.grad if copy is None or copy.grad is None else copy.grad


class GroupedOptimizer(torch.optim.Optimizer):
    """An optimizer that updates all parameters of one group, device and dtype at once, in :meth:`_update`."""

    # torch wraps these two so that their first call imports its compiler, which takes longer than a whole estimate.
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)

    skip: Tensor | None = None
    """While this is 1 (a scalar in fp32 on the parameters' device), a step leaves everything as it is; only where :meth:`skips_on_device`."""

    one_pass: OnePass = OnePass()
    """What the next steps do beside; anything but nothing only where :meth:`takes_one_pass`."""

    def skips_on_device(self) -> bool:
        """Whether :attr:`skip` is looked at, so that nobody has to wait for it before the step."""
        return False

    def takes_one_pass(self) -> bool:
        """Whether a step reads and writes everything once, and can take :attr:`one_pass`."""
        return False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; `closure` recomputes the loss, which is then returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameters in by_device_and_dtype(
                p for p in group["params"] if self.one_pass.gradient(p) is not None
            ):
                self._update(parameters, group)
        return loss

    def state_shapes(self, parameter: Tensor) -> dict[str, torch.Size]:
        """What is remembered of `parameter` once it was updated: the key in its state → the shape."""
        raise NotImplementedError

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Update `parameters`, all of which have gradients, with the settings of `group`."""
        raise NotImplementedError


def check_implementation(name: str) -> str:
    """Return `name`.

    Raises:
        UserError: it is none of :data:`IMPLEMENTATIONS`.
    """
    if name not in IMPLEMENTATIONS:
        raise UserError(f"optim.implementation = {name!r} is unknown; allowed: {', '.join(IMPLEMENTATIONS)}")
    return name


def resolve(name: str, device: torch.device) -> str:
    """What ``auto`` means for tensors on `device`: the fused kernel where torch has one, else multi-tensor calls."""
    if name != "auto":
        return name
    return "fused" if device.type in ("cpu", "cuda") else "foreach"


def by_device_and_dtype(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """Split `parameters` into lists of equal device and dtype, which is what multi-tensor kernels take at once."""
    lists: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for parameter in parameters:
        lists.setdefault((parameter.device, parameter.dtype), []).append(parameter)
    return list(lists.values())


def is_flat(*tensors: Tensor) -> bool:
    """True if all are contiguous: torch's fused CPU kernels walk raw memory and do not look at strides."""
    return all(tensor.is_contiguous() for tensor in tensors)


def check_ranges(*, lr: float, weight_decay: float, **rates: float) -> None:
    """Refuse hyperparameters with which no optimizer here makes sense.

    Args:
        lr: learning rate, ≥ 0.
        weight_decay: ≥ 0.
        rates: decay rates such as momentum or β, each in [0, 1).

    Raises:
        UserError: one is out of range; it is named.
    """
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if not value >= 0:
            raise UserError(f"{name} = {value} must be at least 0")
    for name, value in rates.items():
        if not 0 <= value < 1:
            raise UserError(f"{name} = {value} must be at least 0 and below 1")
