"""Helper processes for work that Python's lock would serialise: jobs go out, results come back in the same order.

    caller ──► thread 1 ──pipe──► process 1: handler = factory(*arguments); handler(job) → result
           ──► thread 2 ──pipe──► process 2: …

Each helper is a fresh interpreter on the other end of two pipes. That is plainer than `multiprocessing` where it matters
here: nothing is forked (torch's threads may be running in this process, and a forked lock stays locked for ever), a script
needs no ``if __name__ == "__main__"``, and whoever dies closes a pipe. So the caller notices a killed helper at once, and
a helper whose caller is gone reads the end of its input and leaves, also in the middle of a job. Ctrl-C reaches the caller
alone: helpers are in process groups of their own.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from scratchlm.errors import UserError

MAX_WORKERS = 1024
IN_FLIGHT = 3  # jobs per helper on their way: one at work, one waiting for it, one waiting for its turn

# This very package first, whatever else goes by its name; then all that the caller can import.
_START = """\
import sys
sys.path[:] = {root!r}, *{path!r}
import scratchlm
del sys.path[0]
from scratchlm.processes import _serve
_serve()
"""


def cores() -> int:
    """Logical processor cores this process may use (fewer than the machine has, under taskset or in a container)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Workers:
    """A few helper processes, each with its own handler; a context manager, at whose end they are gone.

    Args:
        factory: a function or class at the top level of a module, called in each helper with `arguments`. It returns what
            is then called with each job, and may have a method ``finish()``.
        arguments: anything that can be pickled.
        number: how many processes.
        advice: what the user can do when a helper was killed; the end of that sentence.

    Raises:
        UserError: the system refuses to start a process.
    """

    def __init__(
        self,
        factory: Callable[..., Any],
        arguments: tuple[Any, ...],
        number: int,
        advice: str = "run again with fewer processes",
    ) -> None:
        start = pickle.dumps((factory, arguments), protocol=5)
        self._helpers: list[_Helper] = []
        self._idle: queue.SimpleQueue[_Helper] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(number, thread_name_prefix="helper")
        try:
            for _ in range(number):
                helper = _Helper(start, advice)
                self._helpers.append(helper)
                self._idle.put(helper)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        for helper in self._helpers:
            helper.kill()  # frees the thread that waits for it
        self._threads.shutdown(cancel_futures=True)
        for helper in self._helpers:
            helper.close()

    def map(self, jobs: Iterable[Any]) -> Iterator[Any]:
        """The handler's results, in the order of `jobs`; at most ``IN_FLIGHT`` jobs per helper are on their way.

        Raises:
            UserError: the one a handler raised; or a helper was killed or has no memory left.
            Exception: any other exception of a handler, with its traceback as a note.
        """
        pending: deque[Future[Any]] = deque()
        for job in jobs:
            pending.append(self._threads.submit(self._ask_idle, job))
            if len(pending) >= IN_FLIGHT * len(self._helpers):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def _ask_idle(self, job: Any) -> Any:
        helper = self._idle.get()
        try:
            return helper.ask("job", job)
        finally:
            self._idle.put(helper)

    def finish(self) -> list[Any]:
        """``handler.finish()`` of every helper, after the results of `map` were all taken."""
        return list(self._threads.map(lambda helper: helper.ask("finish"), self._helpers))


class _Helper:
    """The caller's end of one helper process."""

    def __init__(self, start: bytes, advice: str) -> None:
        root = str(Path(__file__).resolve().parents[1])
        # An empty entry stands for the working folder of an interactive session. It comes last: a stray regex.py lying
        # there is not what the caller, who has its modules already, has imported.
        path = [entry for entry in sys.path if isinstance(entry, str) and entry]
        if "" in sys.path:
            path.append(str(Path.cwd()))
        one_thread = dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        own_group: dict[str, Any] = {"process_group": 0} if os.name == "posix" else {}
        self._advice = advice
        self._start: bytes | None = start  # sent with the first job, by the thread that waits for it
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _START.format(root=root, path=path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, **one_thread},
                **own_group,
            )
        except OSError as error:
            if error.errno not in (errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE):
                raise
            raise UserError(f"cannot start a helper process ({error.strerror}); {advice}") from error

    def ask(self, kind: str, payload: Any = None) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        message = pickle.dumps((kind, payload), protocol=5)
        try:
            if self._start is not None:
                _send(self._process.stdin, self._start)
                self._start = None
            _send(self._process.stdin, message)
            answer, result = pickle.loads(_receive(self._process.stdout))
        except (EOFError, BrokenPipeError) as error:
            code = self._process.wait()
            why = " (killed; is memory short?)" if code == -signal.SIGKILL else ""
            raise UserError(f"a helper process ended with status {code}{why}; {self._advice}") from error
        if answer == "result":
            return result
        if isinstance(result, MemoryError):
            raise UserError(f"a helper process has no memory left; {self._advice}") from result
        raise result

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError, ValueError):
                if pipe is not None:
                    pipe.close()


def _serve() -> None:
    """The life of a helper: build the handler, answer jobs, leave when the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # interrupting is the caller's business
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # whatever prints goes to standard error, not between the answers
    messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def read() -> None:
        try:
            while True:
                messages.put(_receive(source))
        except EOFError:
            os._exit(0)  # the caller is gone: nobody waits for what is being done

    threading.Thread(target=read, daemon=True).start()
    handler: Any = None
    failure: BaseException | None = None
    try:
        factory, arguments = pickle.loads(messages.get())
        handler = factory(*arguments)
    except Exception as error:
        failure = _portable(error)  # the answer to every job
    while True:
        answer: tuple[str, Any]
        try:
            kind, payload = pickle.loads(messages.get())
            if failure is not None:
                answer = ("error", failure)
            else:
                answer = ("result", handler.finish() if kind == "finish" else handler(payload))
            data = pickle.dumps(answer, protocol=5)
        except Exception as error:
            data = pickle.dumps(("error", _portable(error)), protocol=5)
        try:
            _send(sink, data)
        except BrokenPipeError:
            os._exit(0)


def _portable(error: Exception) -> BaseException:
    """`error`, or a stand-in where it cannot be pickled, with the helper's traceback as a note."""
    trace = "".join(traceback.format_exception(error))
    try:
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error)
    except Exception:
        copy = RuntimeError(f"{type(error).__name__} in a helper process: {error}")
    copy.add_note(f"in a helper process:\n{trace}")
    return copy


def _send(pipe: Any, data: bytes) -> None:
    pipe.write(struct.pack("<Q", len(data)))
    pipe.write(data)
    pipe.flush()


def _receive(pipe: BinaryIO | Any) -> bytes:
    """One message.

    Raises:
        EOFError: the other side is gone, perhaps in the middle of it.
    """
    return _read(pipe, struct.unpack("<Q", _read(pipe, 8))[0])


def _read(pipe: Any, size: int) -> bytes:
    data = pipe.read(size)
    if len(data) != size:
        raise EOFError
    return data
