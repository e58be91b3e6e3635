"""What the room's compiled loops share: the decorator, and the line that says why the first call takes seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from tqdm import tqdm


def kernel(function: Callable[..., Any]) -> Any:
    """``njit`` without Python's lock and with its disk cache, or without that where no folder for it can be written."""
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:
        return numba.njit(nogil=True)(function)


_PART: dict[str, Any] = {"nogil": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def part(function: Callable[..., Any]) -> Any:
    """A function that only kernels call: without what Python would need to call it, which halves its compile time."""
    return numba.njit(**_PART)(function)


def announce(first: Any, work: str, show: bool) -> None:
    """Say so if a kernel has to be compiled: nobody should watch a bar stand still without knowing why.

    Args:
        first: a kernel of those that are about to run.
        work: what they do, as in ``"the merge loop"``.
        show: False: be silent.
    """
    folder = getattr(first.stats, "cache_path", None)
    kept = folder and any(Path(folder).glob(f"{first.__module__.rpartition('.')[2]}.{first.__name__}-*.nbi"))
    if show and not first.signatures and not kept:
        tqdm.write(f"compiling {work}: a few seconds, once per machine", file=sys.stderr)
