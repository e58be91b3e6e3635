"""Prepare the next batches in the background while the present one trains."""

from __future__ import annotations

import copy
import queue
import threading
import weakref
from typing import Any, Protocol

from scratchlm.data.loader import Batch


class Loader(Protocol):
    """What a loader is: batches without end, and a state to continue from."""

    def next_batch(self) -> Batch: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Prefetcher:
    """A loader that works ahead in a thread (gathering releases Python's lock for most of its time).

    Its state is that of the batches handed out, not of those prepared: saved and loaded, it continues with the very next
    batch. Use it as a context manager, or call `close`; a forgotten one ends with the garbage collector.

    Args:
        loader: taken over; do not use it directly meanwhile.
        depth: batches prepared ahead, at most.
    """

    def __init__(self, loader: Loader, depth: int = 2) -> None:
        self._loader = loader
        self._depth = depth
        self._state = copy.deepcopy(loader.state_dict())
        self._start()

    def _start(self) -> None:
        self._queue: queue.Queue[tuple[Batch, dict[str, Any]] | Exception] = queue.Queue(self._depth)
        self._stop = threading.Event()
        # The thread holds no reference to this object, or it would keep it alive.
        arguments = (self._loader, self._queue, self._stop)
        self._thread = threading.Thread(target=_work, args=arguments, name="prefetch", daemon=True)
        self._finalizer = weakref.finalize(self, self._stop.set)
        self._thread.start()

    def next_batch(self) -> Batch:
        """The next batch; an exception of the loader is raised here."""
        if self._stop.is_set():
            raise RuntimeError("the prefetcher is closed")
        item = self._queue.get()
        if isinstance(item, Exception):
            self.close()
            raise item
        batch, self._state = item
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The loader's state right after the last batch handed out."""
        return copy.deepcopy(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`; what was prepared is thrown away. Errors are the loader's."""
        self.close()
        try:
            self._loader.load_state_dict(state)
            self._state = copy.deepcopy(state)
        except BaseException:
            self._loader.load_state_dict(self._state)
            raise
        finally:
            self._start()

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._finalizer()
        self._thread.join()

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _work(loader: Loader, ready: queue.Queue[Any], stop: threading.Event) -> None:
    while not stop.is_set():
        item: Any
        try:
            batch = loader.next_batch()
            item = batch, copy.deepcopy(loader.state_dict())
        except Exception as error:
            item = error
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.05)
                break
            except queue.Full:
                continue
        if isinstance(item, Exception):
            return
