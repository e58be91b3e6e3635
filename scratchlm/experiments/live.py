"""A line for every run at work, and how long all of it will take."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field

from scratchlm.evaluate.report import duration
from scratchlm.experiments.plan import Plan, Trial
from scratchlm.experiments.queue import Queue, Running, work_of
from scratchlm.experiments.results import Failure, Result
from scratchlm.train.metrics import read_metrics

_REFRESH = 1.0
"""Seconds between two looks at the metrics, on a terminal; elsewhere lines are printed when something happens."""


@dataclass
class Live:
    """Pass ``Live().show`` to :class:`Queue` as its `watch`; a context manager, at whose end the lines are gone.

    On a terminal the lines are redrawn in place; elsewhere each run gets a line when it begins and one when it ends.
    """

    terminal: bool = field(default_factory=lambda: sys.stderr.isatty())
    _display: object = None
    _last: float = 0.0
    _begun: set[str] = field(default_factory=set)
    _ended: set[str] = field(default_factory=set)
    _pace: Pace = field(default_factory=lambda: Pace())

    def __enter__(self) -> Live:
        if self.terminal:
            from rich.console import Console
            from rich.live import Live as Display

            self._display = Display(console=Console(stderr=True), transient=True, auto_refresh=False)
            self._display.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._display is not None:
            self._display.stop()  # type: ignore[attr-defined]

    def show(self, queue: Queue, plan: Plan) -> None:
        """Look at the runs, at most once a second."""
        if time.monotonic() - self._last < _REFRESH and all(one.trial.key in self._begun for one in queue.running):
            return
        self._last = time.monotonic()
        lines = [line_of(one) for one in queue.running]
        summary = self._pace.summary(queue, plan)
        if self._display is not None:
            self._display.update("\n".join([*lines, summary]), refresh=True)  # type: ignore[attr-defined]
        else:
            self._print_events(queue, plan, summary)

    def _print_events(self, queue: Queue, plan: Plan, summary: str) -> None:
        for one in queue.running:
            if one.trial.key not in self._begun:
                self._begun.add(one.trial.key)
                print(f"begun      {one.trial.folder.name}", file=sys.stderr, flush=True)
        for trial in plan.trials:
            found = queue.outcome(trial)
            if found is None or trial.key in self._ended:
                continue
            self._ended.add(trial.key)
            if trial.key in self._begun:
                print(
                    f"{ending(found):<10} {trial.folder.name}{detail(found)}; {summary}",
                    file=sys.stderr,
                    flush=True,
                )


def ending(found: Result | Failure) -> str:
    """A run's end in one word."""
    return "failed" if isinstance(found, Failure) else "diverged" if found.diverged else "finished"


def detail(found: Result | Failure) -> str:
    """And in a few more."""
    return f": {found.message}" if isinstance(found, Failure) else f": loss {found.loss:.4f}"


def line_of(one: Running) -> str:
    """A run at work: step, loss, speed."""
    done, loss, speed = progress_of(one.trial)
    steps = one.trial.recipe.train.steps
    text = f"  {one.trial.folder.name:<40} step {done:>6,} of {steps:,}"
    if loss is not None:
        text += f"  loss {loss:.3f}  {speed:,.0f} tokens/s"
    return text + f"  {duration(time.monotonic() - one.started)}"


def progress_of(trial: Trial) -> tuple[int, float | None, float]:
    """Step, training loss and tokens per second of the last line of metrics; 0, None, 0 before the first one."""
    path = trial.folder / "metrics.jsonl"
    records = [record for record in (read_metrics(path) if path.exists() else []) if record.get("kind") == "train"]
    if not records:
        return 0, None, 0.0
    return int(records[-1]["step"]), float(records[-1]["loss"]), float(records[-1]["tokens_per_second"])


@dataclass
class Pace:
    """How long the rest will take: FLOPs that are left, at the pace of those that were done since the start."""

    began: float = field(default_factory=time.monotonic)
    _before: float | None = None
    _work: dict[str, float] = field(default_factory=dict)  # key → FLOPs of the whole run

    def summary(self, queue: Queue, plan: Plan) -> str:
        """``12 of 40 runs, about 35 min left``."""
        trials = {trial.key: trial for trial in plan.trials}
        for key, trial in trials.items():
            if key not in self._work:
                self._work[key] = work_of(trial)
        work = {key: self._work[key] for key in trials}
        ended = [key for key, trial in trials.items() if queue.outcome(trial) is not None]
        done = sum(work[key] for key in ended)
        for one in queue.running:
            step, *_ = progress_of(one.trial)
            done += work.get(one.trial.key, 0.0) * step / max(1, one.trial.recipe.train.steps)
        if self._before is None:
            self._before = done
        text = f"{len(ended)} of {len(trials)} runs" + ("" if plan.complete else ", more to come")
        since, spent = done - self._before, time.monotonic() - self.began
        if since > 0 and len(ended) < len(trials):
            left = max(0.0, spent * (sum(work.values()) - done) / since)
            text += f", about {duration(left)} left"
        return text
