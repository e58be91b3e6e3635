"""A training step in its phases: a clock that knows which phase it is in, and a trainer that tells it.

::

    ─ loader ─┬─ other ─┬─ forward ─┬─ backward ─┬─ (forward, backward: accumulation) ─┬─ optimizer ─►
              next      split,      model and    gradients                             clip, update
              batch     count       loss

The phases follow each other without a gap, so that they add up to the step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from scratchlm.optim import build_optimizers
from scratchlm.train.loop import Trainer
from scratchlm.train.outcome import Outcome
from scratchlm.train.precision import Decision, choose_compile, choose_precision
from scratchlm.train.task import Loader

PHASES = ("loader", "other", "forward", "backward", "optimizer")
"""Waiting for a batch; what stands between (splitting it, counting targets, forgetting gradients); the batch to the device,
model and loss; gradients; clipping and update."""


class Ranges(Protocol):
    """What opens and closes named ranges, properly nested: ``torch.cuda.nvtx``, or the profiler's."""

    def range_push(self, name: str) -> Any: ...
    def range_pop(self) -> Any: ...


@dataclass(frozen=True)
class Statistics:
    """Of one duration over the timed steps, in seconds; percentiles interpolate between neighbours."""

    mean: float
    std: float
    min: float
    p10: float
    p50: float
    p90: float
    p99: float
    max: float

    @staticmethod
    def of(seconds: Sequence[float]) -> Statistics:
        """Of at least one duration; `std` is the sample's (divided by n − 1), 0 for a single one."""
        values = np.asarray(seconds, dtype=np.float64)
        p10, p50, p90, p99 = (float(p) for p in np.percentile(values, (10, 50, 90, 99)))
        std = float(values.std(ddof=1)) if len(values) > 1 else 0.0
        return Statistics(float(values.mean()), std, float(values.min()), p10, p50, p90, p99, float(values.max()))


class PhaseClock:
    """Adds up how long a step is in each phase.

    Args:
        clock: seconds, never running backwards.
        wait: called before the clock is read, so that the device has done what it was given; None: nothing to wait for.
    """

    def __init__(
        self, clock: Callable[[], float] = time.perf_counter, wait: Callable[[], None] | None = None
    ) -> None:
        self._clock, self.wait = clock, wait
        self.observers: list[Callable[[str | None], None]] = []
        """Told of every phase that begins, and None when the step ends."""
        self._phase: str | None = None
        self._since = 0.0
        self._spent: dict[str, float] = {}

    def enter(self, phase: str) -> None:
        """The present phase ends, `phase` begins."""
        self._turn(phase)

    def leave(self) -> dict[str, float]:
        """The step ends. Returns the seconds of every phase, and of all as ``step``."""
        self._turn(None)
        spent, self._spent = self._spent, {}
        found = {phase: spent.get(phase, 0.0) for phase in PHASES}
        return {**found, "step": sum(found.values())}

    def _turn(self, phase: str | None) -> None:
        if self.wait is not None:
            self.wait()
        now = self._clock()
        if self._phase is not None:
            self._spent[self._phase] = self._spent.get(self._phase, 0.0) + now - self._since
        for observer in self.observers:
            observer(phase)
        self._phase = phase
        # What the observers did is no part of the step.
        self._since = self._clock() if self.observers else now


def phase_ranges(ranges: Ranges, name: Callable[[str], str]) -> Callable[[str | None], None]:
    """An observer that opens a range for every phase and closes the one before."""
    is_open = False

    def observe(phase: str | None) -> None:
        nonlocal is_open
        if is_open:
            ranges.range_pop()
        is_open = phase is not None
        if phase is not None:
            ranges.range_push(name(phase))

    return observe


class _Around:
    """A loader around another one, whose place is that one's."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def state_dict(self) -> dict[str, Any]:
        return self._loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loader.load_state_dict(state)


class TimedLoader(_Around):
    """A loader whose batches are timed where they are made: in its own thread, if it works ahead."""

    def __init__(self, loader: Loader) -> None:
        super().__init__(loader)
        self.seconds: list[float] = []

    def next_batch(self) -> Any:
        started = time.perf_counter()
        batch = self._loader.next_batch()
        self.seconds.append(time.perf_counter() - started)
        return batch


class _Announced(_Around):
    """A loader that says when the batch is there."""

    def __init__(self, loader: Loader, clock: PhaseClock) -> None:
        super().__init__(loader)
        self._phases = clock

    def next_batch(self) -> Any:
        batch = self._loader.next_batch()
        self._phases.enter("other")
        return batch


class SteppingTrainer(Trainer):
    """The training loop, one step at a time and without its folder: no metrics, no checkpoints, no validation.

    A step is the loop's own. Arguments as for :class:`scratchlm.train.loop.Trainer`, of which `folder` is not touched.
    """

    clock: PhaseClock
    non_finite = 0
    """Steps so far whose loss or gradient was not finite: counted, and never a reason to stop, since the time is the same."""
    _unread: Outcome | None = None

    def prepare(self, clock: PhaseClock) -> tuple[Decision, Decision]:
        """Model to the device, optimizers, precision, compiler and micro-batches as a run that begins chooses them.

        Returns:
            The choices of precision and of torch.compile.

        Raises:
            UserError: the recipe demands what the machine lacks.
        """
        self.clock = clock
        self.loader = _Announced(self.loader, clock)
        self.model.to(self.device)
        self.optimizers = build_optimizers(self.model, self.optim)
        torch.manual_seed(self.seed)
        precision = choose_precision(self.config.precision, self.device)
        compiling = choose_compile(self.config.compile, self.device, self.config.steps)
        self._compute(precision.value, compiling.value)
        self._look_ahead()
        if self.config.parts is None:
            self._fit_memory(as_before=None)
            clock.leave()  # that trial is no part of a step
        return precision, compiling

    def step(self) -> tuple[dict[str, float], int]:
        """One step. Returns the seconds of each phase (with ``step``, their sum), and the number of targets."""
        self.clock.enter("loader")
        outcome = self._step()
        seconds = self.clock.leave()
        self.state.step += 1
        waiting, self._unread = (self._unread, outcome) if self._ahead else (outcome, None)
        if waiting is not None:  # a device that runs ahead is not waited for
            self.non_finite += not waiting.is_finite()
        return seconds, outcome.tokens

    def _begins(self, phase: str) -> None:
        self.clock.enter(phase)

    def _record(self, record: dict[str, Any]) -> None:
        """There are no metrics."""
