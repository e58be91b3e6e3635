"""Works off an experiment's runs, some at once, each in a process of its own.

::

    plan ──► runs not finished ──► slot 1: a process (trial.py) ──► result.json │ failure.json
      ▲                            slot 2: …                                      │
      └───────────────────────────────────────────────────────────────────────────┘

The queue keeps nothing in memory that is not on disk: whoever kills it loses nothing, and the same command goes on. Processes end with
the queue, after writing a checkpoint if they are given the time.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

from scratchlm.config import save_recipe
from scratchlm.errors import UserError
from scratchlm.experiments.budget import flops_per_token
from scratchlm.experiments.plan import Plan, Planner, Trial
from scratchlm.experiments.results import FAILURE, Failure, Result
from scratchlm.processes import cores

_POLL = 0.2
_PROCESS = "import sys; from scratchlm.experiments.trial import main; sys.exit(main())"  # -m warns of a module imported twice
_GRACE = 60.0
"""Seconds that a run has to write its checkpoint when the queue is stopped."""


class Stopped(Exception):
    """SIGINT or SIGTERM ended the queue."""

    def __init__(self, signal_number: int, finished: int, known: int) -> None:
        name = signal.Signals(signal_number).name
        super().__init__(
            f"{name}: stopped with {finished} of {known} runs finished; the same command goes on from there"
        )
        self.signal_number = signal_number


@dataclass
class Running:
    """A process at work."""

    trial: Trial
    process: subprocess.Popen[bytes]
    slot: int
    log: BinaryIO
    started: float = field(default_factory=time.monotonic)


@dataclass
class Queue:
    """See above.

    Args:
        planner: says what is to be run.
        folder: the experiment's: recipes and logs of the runs lie in ``trials/``.
        jobs: processes at once.
        gpus: how many there are to be dealt out; 0: none.
        retry: run again what failed before.
        watch: called a few times a second while runs are at work.
    """

    planner: Planner
    folder: Path
    jobs: int = 1
    gpus: int = 0
    retry: bool = False
    watch: Callable[[Queue, Plan], None] = lambda queue, plan: None
    running: list[Running] = field(default_factory=list)
    _outcomes: dict[str, Result | Failure] = field(default_factory=dict)
    _signal: int | None = None

    def outcome(self, trial: Trial) -> Result | Failure | None:
        """What became of a trial: from its folder, read once."""
        key = trial.key
        if key not in self._outcomes:
            found = trial.outcome()
            if isinstance(found, Failure) and self.retry:
                (trial.folder / FAILURE).unlink(missing_ok=True)  # it has this one chance
                found = None
            if found is None:
                return None
            self._outcomes[key] = found
        return self._outcomes[key]

    def run(self) -> Plan:
        """Work off everything.

        Raises:
            Stopped: by a signal; the runs have written their checkpoints.
        """
        (self.folder / "trials").mkdir(parents=True, exist_ok=True)
        with self._signals():
            try:
                while True:
                    plan = self.planner.plan(self.outcome)
                    waiting = self._waiting(plan)
                    if not waiting and not self.running:
                        return plan
                    for trial in waiting[: self.jobs - len(self.running)]:
                        self._start(trial)
                    self._wait_for_one(plan)
                    if self._signal is not None:
                        known = {trial.key for trial in plan.trials}
                        raise Stopped(self._signal, sum(key in self._outcomes for key in known), len(known))
            finally:
                self._stop_all()

    def _waiting(self, plan: Plan) -> list[Trial]:
        """Runs to be started, each once, however many purposes it has."""
        busy = {one.trial.key for one in self.running}
        waiting = {trial.key: trial for trial in plan.trials if self.outcome(trial) is None}
        return [trial for key, trial in waiting.items() if key not in busy]

    def _start(self, trial: Trial) -> None:
        slot = min(set(range(self.jobs)) - {one.slot for one in self.running})
        place = self.folder / "trials" / trial.folder.name
        save_recipe(trial.recipe, place.with_name(f"{place.name}.toml"))
        environment = dict(os.environ)
        if self.jobs > 1 and trial.recipe.threads is None:
            threads = str(max(1, cores() // self.jobs))
            environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), threads)
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self._gpu(slot)
        # This very package, whatever the working folder holds.
        root = str(Path(__file__).resolve().parents[2])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        log = place.with_name(f"{place.name}.log").open("ab")
        own_group: dict[str, Any] = (
            {"process_group": 0} if os.name == "posix" else {}
        )  # Ctrl-C reaches the queue alone
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", _PROCESS, f"{place}.toml", trial.key],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                **own_group,
            )
        except OSError as error:
            log.close()
            raise UserError(f"cannot start a run ({error.strerror}); try fewer --jobs") from error
        self.running.append(Running(trial, process, slot, log))

    def _gpu(self, slot: int) -> str:
        """The slot's device, among those this process may see."""
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
        names = visible or [str(number) for number in range(self.gpus)]
        return names[slot % len(names)]

    def _wait_for_one(self, plan: Plan) -> None:
        """Return when a run has ended, or a signal came."""
        while self._signal is None:
            ended = [one for one in self.running if one.process.poll() is not None]
            for one in ended:
                self._collect(one)
            self.watch(self, plan)
            if ended:
                return
            time.sleep(_POLL)

    def _collect(self, one: Running) -> None:
        """What an ended process left; one that was killed is a failure, too."""
        self.running.remove(one)
        one.log.close()
        status = one.process.returncode
        self._outcomes.pop(one.trial.key, None)
        found = one.trial.outcome()
        if (
            found is None
            and status in (128 + signal.SIGTERM, -signal.SIGTERM, 128 + signal.SIGINT)
            and self._signal
        ):
            return  # stopped by us; it goes on the next time
        if found is None:
            why = f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
            if status == -signal.SIGKILL:
                why += "; is memory short?"
            log = self.folder / "trials" / f"{one.trial.folder.name}.log"
            found = Failure(one.trial.key, f"the run was {why}" if status < 0 else f"the run {why}: see {log.name}")
            one.trial.folder.mkdir(parents=True, exist_ok=True)
            found.save(one.trial.folder)
        self._outcomes[one.trial.key] = found

    def _stop_all(self) -> None:
        """Let every process write its checkpoint and leave."""
        for one in self.running:
            with contextlib.suppress(ProcessLookupError):
                one.process.terminate()
        deadline = time.monotonic() + _GRACE
        for one in list(self.running):
            try:
                one.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                one.process.kill()
                one.process.wait()
            except KeyboardInterrupt:  # a second Ctrl-C: now
                deadline = 0.0
                one.process.kill()
                one.process.wait()
            self.running.remove(one)
            one.log.close()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM for the length of a ``with`` block (where that is possible: in the main thread)."""

        def note(number: int, frame: FrameType | None) -> None:
            if self._signal is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._signal = number

        before: dict[int, Any] = {}
        with contextlib.suppress(ValueError):
            for number in (signal.SIGINT, signal.SIGTERM):
                before[int(number)] = signal.signal(number, note)
        try:
            yield
        finally:
            for taken, handler in before.items():
                signal.signal(taken, handler)


def work_of(trial: Trial) -> float:
    """FLOPs of a whole run, by which the time left is estimated."""
    return trial.recipe.tokens * flops_per_token(trial.recipe)
