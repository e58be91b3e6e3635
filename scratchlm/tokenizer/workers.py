"""Helper processes for work that Python's lock would serialise.

    caller ──► thread 1 ──pipe──► process 1: handler = factory(*arguments); handler(job) → result
           ──► thread 2 ──pipe──► process 2: …

Each helper is a fresh interpreter fed through pipes. Unlike `multiprocessing` it neither forks a process that has
threads (torch has, and a forked lock stays locked for ever) nor imports the caller's script again (so a script needs
no ``if __name__ == "__main__"``). A helper whose caller is gone reads the end of its pipe and leaves.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_START = "import sys; sys.path[:0] = {paths!r}; from scratchlm.tokenizer.workers import serve; serve()"


def cores() -> int:
    """Processor cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def serve() -> None:
    """The life of a helper process: build the handler, answer jobs, leave at the end of the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's to handle
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a stray print must not get between the answers
    handler: Any = None
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            kind, payload = pickle.load(requests)
            answer: tuple[str, Any]
            try:
                if kind == "start":
                    module, name, arguments = payload
                    handler = getattr(importlib.import_module(module), name)(*arguments)
                    answer = ("ok", None)
                elif kind == "job":
                    answer = ("ok", handler(payload))
                else:
                    answer = ("ok", handler.finish())
            except Exception as error:
                answer = ("error", error)
            try:
                message = pickle.dumps(answer, pickle.HIGHEST_PROTOCOL)
            except Exception:  # an exception that cannot travel
                message = pickle.dumps(("error", RuntimeError(repr(answer[1]))))
            answers.write(message)
            answers.flush()


class _Helper:
    def __init__(self, module: str, name: str, arguments: tuple[Any, ...]) -> None:
        paths = [str(Path(__file__).resolve().parents[2])]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START.format(paths=paths)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._start = (module, name, arguments)
        self._started = False

    def ask(self, kind: str, payload: Any = None) -> Any:
        if not self._started:
            self._started = True
            self.ask("start", self._start)
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            pickle.dump((kind, payload), self.process.stdin, pickle.HIGHEST_PROTOCOL)
            self.process.stdin.flush()
            status, answer = pickle.load(self.process.stdout)
        except (EOFError, BrokenPipeError, ValueError, pickle.UnpicklingError) as error:
            raise RuntimeError(
                f"a helper process ended unexpectedly (status {self.process.poll()}); was it killed for its memory?"
            ) from error
        if status == "error":
            raise answer
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError, ValueError):
                if pipe is not None:
                    pipe.close()


class Workers:
    """A few helper processes, each with its own handler.

    Args:
        factory: a function or class at the top level of a module of this package; called in each helper with
            `arguments`, it returns what is then called with each job.
        arguments: anything that can be pickled.
        number: how many processes.
    """

    def __init__(self, factory: Callable[..., Any], arguments: tuple[Any, ...], number: int) -> None:
        self._helpers = [_Helper(factory.__module__, factory.__qualname__, arguments) for _ in range(number)]

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for helper in self._helpers:
            helper.close()

    def map(self, jobs: Iterable[Any], done: Callable[[Any], object] = lambda job: None) -> list[Any]:
        """The handler's results, in the order of `jobs`, which are taken only as fast as they are worked on.

        `done` is called after each job, by one thread at a time.
        """
        source: Iterator[tuple[int, Any]] = enumerate(jobs)
        taking, reporting = threading.Lock(), threading.Lock()
        stopped = threading.Event()
        results: dict[int, Any] = {}

        def work(helper: _Helper) -> None:
            try:
                while not stopped.is_set():
                    with taking:
                        index, job = next(source, (-1, None))
                    if index < 0:
                        return
                    results[index] = helper.ask("job", job)
                    with reporting:
                        done(job)
            except BaseException:
                stopped.set()
                raise

        self._in_threads(work)
        return [results[index] for index in range(len(results))]

    def finish(self) -> list[Any]:
        """``handler.finish()`` of every helper."""
        results: list[Any] = []
        self._in_threads(lambda helper: results.append(helper.ask("finish")))
        return results

    def _in_threads(self, work: Callable[[_Helper], None]) -> None:
        with ThreadPoolExecutor(len(self._helpers)) as threads:
            futures = [threads.submit(work, helper) for helper in self._helpers]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                self.close()  # wakes the threads that wait for an answer
                raise
