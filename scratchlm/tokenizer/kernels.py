"""What training's compiled loops share: how their parts are compiled, and the line that says why the first call takes seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from tqdm import tqdm

_PART: dict[str, Any] = {"nogil": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def part(function: Callable[..., Any]) -> Any:
    """A function that only kernels call: without what Python would need to call it, and inlined only where LLVM thinks it
    pays, since every copy costs compile time."""
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
