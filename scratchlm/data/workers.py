"""Tokenising processes: text goes out in chunks, ids come back in the same order.

Each worker is a fresh interpreter on the other end of two pipes. That is plainer than ``multiprocessing`` where it matters
here: nothing is forked (torch's threads may be running in this process), a script needs no ``__main__`` guard, a
worker that dies closes its pipe and is noticed at once, and when this process is killed the workers read the end of
their input and leave too.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from scratchlm.errors import UserError

if TYPE_CHECKING:
    from scratchlm.tokenizer import Tokenizer

IN_FLIGHT = 3  # chunks per worker on their way: one at work, one waiting for it, one waiting for its turn


@dataclass(slots=True)
class Encoded:
    """The tokens of some documents in a row.

    Attributes:
        ids: all ids, each document's followed by the separator, shape (sum of counts,), uint16 or uint32.
        counts: tokens of each document, separator included.
        sizes: UTF-8 bytes of each document.
    """

    ids: np.ndarray
    counts: np.ndarray
    sizes: np.ndarray


class Encoder:
    """Documents to ids. Text that looks like a special token is ordinary text: a corpus cannot forge a separator."""

    def __init__(self, tokenizer: Tokenizer, separator_id: int, dtype: str) -> None:
        self.tokenizer = tokenizer
        self.separator_id = separator_id
        self.dtype = dtype

    def __call__(self, documents: list[bytes]) -> Encoded:
        dtype = np.dtype(self.dtype).newbyteorder("<")
        separator = np.array([self.separator_id], dtype=dtype)
        parts = []
        counts = np.empty(len(documents), dtype=np.int64)
        for index, document in enumerate(documents):
            ids = self.tokenizer.encode_array(document, allowed_special=())
            parts += [ids.astype(dtype, copy=False), separator]
            counts[index] = len(ids) + 1
        sizes = np.array([len(document) for document in documents], dtype=np.int64)
        return Encoded(np.concatenate(parts), counts, sizes)


def encode_all(encoder: Encoder, chunks: Iterable[list[bytes]], workers: int) -> Generator[Encoded, None, None]:
    """Encode `chunks`, in their order, in `workers` processes (1: in this one).

    At most ``IN_FLIGHT`` chunks per worker are held in memory.

    Raises:
        UserError: the one a worker raised; or a worker died.
        Exception: any other exception of a worker, with its traceback as a note.
    """
    if workers == 1:
        yield from map(encoder, chunks)
        return
    with contextlib.ExitStack() as stack:
        idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        pool = stack.enter_context(ThreadPoolExecutor(workers, thread_name_prefix="tokenise"))
        # Undone in reverse order: the workers end first, which frees every thread that waits for one.
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        for _ in range(workers):
            worker = _Worker(encoder)
            stack.callback(worker.kill)
            idle.put(worker)

        def ask(chunk: list[bytes]) -> Encoded:
            worker = idle.get()
            try:
                return worker.ask(chunk)
            finally:
                idle.put(worker)

        pending: deque[Future[Encoded]] = deque()
        for chunk in chunks:
            pending.append(pool.submit(ask, chunk))
            if len(pending) >= IN_FLIGHT * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


class _Worker:
    """The parent's end of one worker."""

    def __init__(self, encoder: Encoder) -> None:
        path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
        one_thread = dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from scratchlm.data.workers import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **one_thread, "PYTHONPATH": path},
        )
        self._first: Encoder | None = encoder  # sent with the first chunk, by the thread that waits for it

    def ask(self, chunk: list[bytes]) -> Encoded:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            if self._first is not None:
                _send(self._process.stdin, self._first)
                self._first = None
            _send(self._process.stdin, chunk)
            answer = _receive(self._process.stdout)
        except (EOFError, BrokenPipeError) as error:
            code = self._process.wait()
            raise UserError(
                f"a tokenising process ended with status {code}"
                + (" (killed; is memory short?)" if code == -signal.SIGKILL else "")
                + "; run again to go on from the last finished shard, with a smaller data.workers if it happens again"
            ) from error
        if isinstance(answer, BaseException):
            raise answer
        assert isinstance(answer, Encoded)
        return answer

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError, ValueError):
                if pipe is not None:
                    pipe.close()


def serve() -> None:
    """The worker's side: an encoder, then chunks, on standard input; an answer to each on standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it ends this process
    source = sys.stdin.buffer
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints goes to standard error, not between the answers
    failure: BaseException | None = None
    encoder: Any = None
    try:
        encoder = _receive(source)
    except EOFError:
        return
    except Exception as error:
        failure = _portable(error)
    while True:
        try:
            chunk = _receive(source)
        except EOFError:
            return
        answer: Any
        try:
            answer = failure or encoder(chunk)
        except Exception as error:
            answer = _portable(error)
        try:
            _send(sink, answer)
        except BrokenPipeError:
            return


def _portable(error: Exception) -> BaseException:
    """`error`, or a stand-in where it cannot be pickled, with the worker's traceback as a note."""
    trace = "".join(traceback.format_exception(error))
    try:
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error)
    except Exception:
        copy = RuntimeError(f"{type(error).__name__} in a tokenising process: {error}")
    copy.add_note(f"in a tokenising process:\n{trace}")
    return copy


def _send(pipe: Any, value: Any) -> None:
    data = pickle.dumps(value, protocol=5)
    pipe.write(struct.pack("<Q", len(data)))
    pipe.write(data)
    pipe.flush()


def _receive(pipe: BinaryIO | Any) -> Any:
    return pickle.loads(_read(pipe, struct.unpack("<Q", _read(pipe, 8))[0]))


def _read(pipe: Any, size: int) -> bytes:
    data = pipe.read(size)
    if len(data) != size:
        raise EOFError
    return data
