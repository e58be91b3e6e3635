"""Weights in bf16 to compute with, beside the fp32 ones that are trained (mixed precision with master weights: Micikevicius et al. 2018,
arXiv 1710.03740, section 3.1).

::

    masters  fp32 ──── rounded after every step ────►  copy  bf16 ── forward, backward ──► gradients  bf16
       ▲                                                                                       │
       └── optimizer ◄── gradients fp32, summed over micro-batches ◄────── widened ────────────┘

Beside autocast, which rounds each weight anew wherever it is used and keeps the residual stream in fp32, everything between two steps is bf16: half the
bytes for each pass over activations. A step that is too small for bf16 is not lost, since the masters keep it. On a GPU a step of one micro-batch widens no gradient
and rounds within the optimizer's own pass (:mod:`scratchlm.train.update`).
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from torch import Tensor

from scratchlm.model.transformer import Transformer
from scratchlm.train.precision import autocast


class WorkingCopy:
    """A copy of a model in a narrower dtype, and the way between the two.

    Tied weights stay tied. Buffers and what modules keep besides (tables of angles, a router's biases) are the master's own, in its dtype.

    Args:
        masters: the model that is trained, checkpointed, averaged and evaluated.
        dtype: of the copy.

    Attributes:
        model: the copy.
    """

    def __init__(self, masters: Transformer, dtype: torch.dtype = torch.bfloat16) -> None:
        kept = [masters.buffers(), *(vars(module).values() for module in masters.modules())]
        shared = {id(value): value for some in kept for value in some if isinstance(value, Tensor)}
        self.model = copy.deepcopy(masters, shared)
        pairs = list(zip(masters.parameters(), self.model.parameters(), strict=True))
        for _, parameter in pairs:
            parameter.data = parameter.data.to(dtype)
            parameter.grad = None
        trained = [pair for pair in pairs if pair[0].requires_grad]
        self._masters: list[Tensor] = [master for master, _ in trained]
        self._copies: list[Tensor] = [parameter for _, parameter in trained]

    @torch.no_grad()
    def collect(self) -> None:
        """Add the copy's gradients to the masters', and forget them."""
        with_gradients: Any = [
            (master, parameter)
            for master, parameter in zip(self._masters, self._copies, strict=True)
            if parameter.grad is not None
        ]
        first: Any = [(master, parameter) for master, parameter in with_gradients if master.grad is None]
        further: Any = [(master, parameter) for master, parameter in with_gradients if master.grad is not None]
        if first:
            for master, _ in first:
                master.grad = torch.empty_like(master)
            torch._foreach_copy_([master.grad for master, _ in first], [parameter.grad for _, parameter in first])
        for master, parameter in further:
            master.grad.add_(parameter.grad)
        self.forget()

    def forget(self) -> None:
        """Drop the copy's gradients."""
        for parameter in self._copies:
            parameter.grad = None

    def pairs(self) -> dict[Tensor, Tensor]:
        """Each parameter that is trained → its copy."""
        return dict(zip(self._masters, self._copies, strict=True))

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the masters, which have been updated, into the copy."""
        torch._foreach_copy_(self._copies, self._masters)


class Computing:
    """What a step computes with: the model itself, under autocast if products are in bf16, or a copy of it in bf16, which needs none.

    Args:
        masters: the model that is trained.
        precision: ``bf16`` or ``fp32``.
        weights: as ``train.weights``; in fp32 there is no copy.
        device: where it is computed.

    Attributes:
        copy: None, where the model itself is computed with.
        model: the copy, or the model.
    """

    def __init__(self, masters: Transformer, precision: str, weights: str, device: torch.device) -> None:
        self._precision, self._device = precision, device
        self.copy = WorkingCopy(masters) if (precision, weights) == ("bf16", "bf16") else None
        self.model = masters if self.copy is None else self.copy.model

    def context(self) -> contextlib.AbstractContextManager[None]:
        """Where the forward pass is computed."""
        return autocast(self._precision, self._device) if self.copy is None else contextlib.nullcontext()

    def collect(self) -> None:
        """After a backward pass: its gradients are the model's."""
        if self.copy is not None:
            self.copy.collect()

    def forget(self) -> None:
        """A backward pass does not count."""
        if self.copy is not None:
            self.copy.forget()

    def refresh(self) -> None:
        """After an update of the model."""
        if self.copy is not None:
            self.copy.refresh()

    def copied(self) -> list[Tensor]:
        """Parameters that there are beside the model's."""
        return [] if self.copy is None else list(self.copy.model.parameters())

    def pairs(self) -> dict[Tensor, Tensor]:
        """Each parameter that is trained → its copy, where there is one."""
        return {} if self.copy is None else self.copy.pairs()
