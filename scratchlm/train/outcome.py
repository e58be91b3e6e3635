"""What a step came to, while it is still on its way from the device."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Outcome:
    """Loss and gradient norm of one step.

    On a GPU they are copied to the host as soon as they are there, and :meth:`read` waits for that alone: whatever was launched afterwards goes on.

    Args:
        step: its number, from 1.
        total: the summed cross-entropy of its targets, in nats; a scalar on the device.
        norm: of its gradient before clipping; likewise.
        tokens: its targets.
    """

    step: int
    total: Tensor
    norm: Tensor
    tokens: int
    _there: Tensor = field(init=False)
    _event: torch.cuda.Event | None = None

    def __post_init__(self) -> None:
        both = torch.stack([self.total.detach(), self.norm.detach().to(self.total.dtype)])
        self._there = both.to("cpu", non_blocking=both.is_cuda)
        if both.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(both.device))

    def failed(self) -> Tensor:
        """1 if either is not finite, else 0: a scalar in fp32 on the device, without waiting."""
        return 1.0 - (self.total.isfinite() & self.norm.isfinite()).float()

    def read(self) -> tuple[float, float]:
        """The loss per token and the gradient norm; waits for them."""
        if self._event is not None:
            self._event.synchronize()
        total, norm = self._there.tolist()
        return total / max(self.tokens, 1), norm

    def is_finite(self) -> bool:
        """Whether both are; waits for them."""
        return all(math.isfinite(value) for value in self.read())
