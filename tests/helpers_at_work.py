"""Handlers for the tests of helper processes; importable in them."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from scratchlm.tokenizer.counting import Documents, WordCounter


class Named:
    """Sleeps as long as a job says; counts jobs."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.jobs = 0

    def __call__(self, job: float | bytes) -> tuple[str, float | bytes]:
        if isinstance(job, float):
            time.sleep(job)
        self.jobs += 1
        return self.name, job

    def finish(self) -> tuple[int, int]:
        return self.jobs, os.getpid()


class Broken:
    def __call__(self, job: Any) -> Any:
        if isinstance(job, Exception):
            raise job
        if job == "odd":

            class Odd(Exception):
                pass

            raise Odd("local")
        if job == "lambda":
            return lambda: None
        if job == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if job == "exit":
            os._exit(3)
        if job == "print":
            print("not an answer")
        return job


class SlowCounter(WordCounter):
    """Takes its time, so that a test can interrupt it in the middle."""

    def __call__(self, job: Documents) -> int:  # type: ignore[override]
        time.sleep(0.5)
        return super().__call__(job)
