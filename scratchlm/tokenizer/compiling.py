"""Compiling without surprises: a line that says why the first call takes seconds, and a compiler that is given room."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any

from tqdm import tqdm

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


def kept(function: Callable[..., Any]) -> bool:
    """Whether what Numba makes of a function lies on disk, or at least did for an earlier version or another processor."""
    from numba.core import caching

    try:
        folder = Path(caching.FunctionCache(function).cache_path)
    except RuntimeError:  # none can be written
        return False
    module, name = Path(function.__code__.co_filename).stem, function.__name__
    made = f"{module}.{name}-*.nbi", f"{module}.*.{name}-*.nbi"  # by itself, or in another function
    return any(True for pattern in made for _ in folder.glob(pattern))


def announce(first: Any, work: str, show: bool) -> None:
    """Say so if a kernel has to be compiled: nobody should watch a bar stand still without knowing why.

    Args:
        first: a kernel of those that are about to run.
        work: what they do, as in ``"the merge loop"``.
        show: False: be silent.
    """
    if show and not first.signatures and not kept(first.py_func):
        tqdm.write(f"compiling {work}: a few seconds, once per machine", file=sys.stderr)


def _call(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    return function(*arguments, **keywords)


# CPython 3.11 and later keep the frames of Python functions in chunks of 16 kB. Numba's compiler calls deeply, and wherever it goes up
# and down across the end of a chunk, each call maps one, has the system clear it, and unmaps it: an eighth of all the time it
# takes. Below a frame that asks for more than 1 MB lies a chunk of 2 MB, in which everything behind it fits. (Untouched, it costs nothing.)
with_room = FunctionType(_call.__code__.replace(co_stacksize=(1 << 17) + 1), globals(), "with_room")


def given_room(compiled: Any) -> Any:
    """The function that Numba made, `compiled`, whose compiler will run in one piece of stack."""
    compiled._compile_for_args = partial(with_room, compiled._compile_for_args)
    return compiled
