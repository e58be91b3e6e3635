"""A line that says why the first call takes seconds."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# Loading what was compiled before takes well under this many seconds.
_PATIENCE = 1.5


@contextmanager
def compiling(what: str) -> Iterator[None]:
    """Around a first call of compiled functions: if it takes long, say on standard error that Numba is at work."""

    def say() -> None:
        print(f"compiling {what} for this machine (once; some seconds) …", file=sys.stderr, flush=True)

    timer = threading.Timer(_PATIENCE, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
