"""A running average of the weights, beside those that are trained (Polyak & Juditsky 1992; exponential, as in Adam).

After step t = 1, 2, … has made the weights θ, with decay d::

    w = (1 − d) / (1 − dᵗ)
    a ← a + w (θ − a)

which is m̂ of Adam with θ in the place of the gradient: the weights of the steps fall off as d, d², …, and always sum to one, so
that a is θ after the first step and the random weights before it never enter. It spans about 1 / (1 − d) steps, the warm-up's
among them if they are so near.

What is averaged away is the noise of single steps at a high learning rate: the average of a run in the middle of its schedule is
about as good as the weights after a decay of the learning rate. Nothing of the training depends on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from scratchlm.errors import UserError


class WeightAverage:
    """The average of a model's trained parameters.

    Args:
        parameters: name → parameter, in fp32 or fp64: in half precision a small step towards θ is rounded away.
        decay: d, between 0 and 1.

    Attributes:
        averages: name → a, in the parameter's shape and dtype and on its device; empty before the first update.

    Raises:
        UserError: a decay out of range, a parameter in half precision.
    """

    PREFIX = "ema"
    COUNT = "ema.updates.all"
    """Name of t in :meth:`named_state`; those of the averages are ``ema.average.<parameter>``."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        if not 0 < decay < 1:
            raise UserError(f"optim.ema = {decay} must be above 0 and below 1")
        for name, parameter in parameters.items():
            if parameter.dtype not in (torch.float32, torch.float64):
                raise UserError(f"optim.ema: {name} is {parameter.dtype}, too coarse for an average; train in fp32")
        self.parameters, self.decay = dict(parameters), decay
        self.averages: dict[str, Tensor] = {}
        self._updates = 0
        self._skipped: Tensor | None = None  # how many of them were none, as only the device knows

    @property
    def updates(self) -> int:
        """t, the steps averaged so far; waits for the device if steps were left out there."""
        return self._updates if self._skipped is None else self._updates - int(self._skipped)

    @torch.no_grad()
    def update(self, skip: Tensor | None = None) -> None:
        """Take in the weights as they are now, after a step.

        Args:
            skip: 1 if it was none, so that nothing changes: a scalar in fp32 on the parameters' device, which is not waited for.
        """
        if not self.averages:
            self.averages = {name: torch.zeros_like(parameter) for name, parameter in self.parameters.items()}
        self._updates += 1
        if skip is None and self._skipped is None:
            weight = (1 - self.decay) / (1 - self.decay**self._updates)
            torch._foreach_lerp_(list(self.averages.values()), list(self.parameters.values()), weight)
        else:
            self._update_unless(
                torch.zeros((), device=next(iter(self.averages.values())).device) if skip is None else skip
            )

    def _update_unless(self, skip: Tensor) -> None:
        """As above, with t and w numbers on the device."""
        self._skipped = skip.double() + (0 if self._skipped is None else self._skipped)
        t = (self._updates - self._skipped).clamp(min=1)
        weight = (1 - skip) * (1 - self.decay) / (1 - torch.exp(t * math.log(self.decay)))
        weights = {dtype: weight.to(dtype) for dtype in {average.dtype for average in self.averages.values()}}
        for average, parameter in zip(self.averages.values(), self.parameters.values(), strict=True):
            average.lerp_(parameter, weights[average.dtype])

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the model has the averaged weights; afterwards its own, bit for bit. Before the first update: its own.

        The two change places tensor by tensor, so that no third copy of the model is needed. Do not train inside.
        """
        if not self.updates:  # all of them were skipped, or there was none
            yield
            return
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, average in self.averages.items():
            own = self.parameters[name].clone()
            self.parameters[name].copy_(average)
            average.copy_(own)

    def named_state(self) -> dict[str, Tensor]:
        """``ema.average.<parameter>`` → a itself, and :data:`COUNT` → t; empty before the first update."""
        if not self.updates:
            return {}
        named = {f"{self.PREFIX}.average.{name}": average for name, average in self.averages.items()}
        return {**named, self.COUNT: torch.tensor(self.updates)}

    def checked(self, named: Mapping[str, Tensor]) -> tuple[int, dict[str, Tensor]]:
        """Copies of what :meth:`named_state` gave, on the parameters' devices: t and the averages; none: 0 and none.

        Raises:
            UserError: they are those of another model, or some are missing.
        """
        if not named:
            return 0, {}
        wanted = {f"{self.PREFIX}.average.{name}": parameter for name, parameter in self.parameters.items()}
        for full in sorted(named.keys() ^ {*wanted, self.COUNT}):
            said = "has" if full in named else "lacks"
            raise UserError(
                f"the saved optimizer state {said} {full}, unlike this model's average; resume with the model and optim "
                "settings it was saved with"
            )
        averages = {}
        for name, (full, parameter) in zip(self.parameters, wanted.items(), strict=True):
            if named[full].shape != parameter.shape:
                raise UserError(
                    f"the saved optimizer state {full} has shape {tuple(named[full].shape)}, the parameter "
                    f"{tuple(parameter.shape)}; resume with the model it was saved with"
                )
            averages[name] = torch.empty_like(parameter, requires_grad=False).copy_(named[full])
        return int(named[self.COUNT]), averages

    def load(self, state: tuple[int, dict[str, Tensor]]) -> None:
        """Go on from what :meth:`checked` found."""
        (self._updates, self.averages), self._skipped = state, None
