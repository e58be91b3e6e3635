"""An estimate's parts: plain values, for whoever prints, draws or keeps them. Nothing here needs torch."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from typing import Literal

Bound = Literal["compute", "memory", "calls"]

HEAD = "head and loss"
"""The component of what no other module did."""


@functools.lru_cache(maxsize=10_000)
def collapsed(path: str) -> str:
    """A module's path with ``*`` for numbers; what no module did is the head's and the loss's."""
    place = re.sub(r"\.\d+(?=\.|$)", ".*", path)
    return HEAD if place in ("", "head") else place


@dataclass
class Component:
    """A module, over all layers it is repeated in.

    Attributes:
        path: its dotted name, ``*`` for the number of the layer.
        copies: how many modules it stands for.
        params: its own parameters (not those of modules inside), all copies together.
        active: those of them that one token meets.
        weights, gradients, state: bytes of its parameters, of their gradients and of what the optimizer remembers of them.
        forward, backward: FLOPs of its products per trained token.
        kept: bytes of activations that its forward pass leaves for the backward pass.
    """

    path: str
    copies: int = 0
    params: int = 0
    active: int = 0
    weights: int = 0
    gradients: int = 0
    state: int = 0
    forward: float = 0.0
    backward: float = 0.0
    kept: int = 0


@dataclass
class OperationGroup:
    """Equal operations of one phase and component."""

    phase: str
    component: str
    name: str
    calls: int
    flops: int
    moved: int
    seconds: float | None
    bound: Bound | None

    @property
    def intensity(self) -> float:
        return self.flops / max(1, self.moved)


@dataclass
class Memory:
    """Bytes of one step.

    Attributes:
        peak: the most that lives at once.
        moment: what runs then.
        at_peak: kind → bytes.
        by_component: component → bytes of activations and temporaries at the peak.
        timeline: (phase, live bytes) at every operation.
        by_kind: kind → live bytes at every operation.
    """

    peak: int
    moment: str
    at_peak: dict[str, int]
    by_component: dict[str, int]
    timeline: list[tuple[str, int]] = field(repr=False, default_factory=list)
    by_kind: dict[str, list[int]] = field(repr=False, default_factory=dict)


@dataclass
class Time:
    """Seconds of a step and what follows from them."""

    machine: str
    assumptions: tuple[str, ...]
    compiled: bool
    by_phase: dict[str, float]
    step: float
    tokens_per_second: float
    model_flops_per_second: float
    total: float
    price: float | None


@dataclass
class Estimate:
    """All of it; see :func:`scratchlm.resources.estimate.estimate`."""

    name: str
    precision: str
    compiled: bool
    micro_batch: int
    accumulation: int
    length: int
    steps: int
    tokens: int
    params: int
    active_params: int
    embedding_params: int
    forward_flops: float
    backward_flops: float
    model_flops: int | float
    six_n: int
    components: list[Component]
    operations: list[OperationGroup]
    memory: Memory
    fixed_bytes: float
    bytes_per_sequence: float
    largest_micro_batch: int | None
    cache_bytes_per_token: int
    cache_bytes_bounded: int
    savings: dict[str, int]
    time: Time | None

    def flops_per_token(self, group: OperationGroup) -> float:
        """Of equal operations, per trained token: the optimizer works once a step, all else once a micro-batch."""
        batches = self.accumulation if group.phase == "optimizer" else 1
        return group.flops / (batches * self.micro_batch * self.length)
