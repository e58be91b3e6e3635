"""How torch's threads on a CPU wait for each other, and all that is to be settled before torch is imported."""

from __future__ import annotations

import os

from scratchlm.allocator import keep_freed_memory
from scratchlm.processes import cores

SPINS = 2000
"""How often a waiting thread looks before it sleeps: some tens of microseconds. GNU's own number is 300,000, milliseconds."""

FEW = 4
"""Up to so many cores, waking sleepers is cheap; for more it was not measured."""


def wait_briefly() -> bool:
    """Let waiting OpenMP threads sleep soon; call it before torch is imported.

    A thread that spins takes a core away from whoever has work: beside another busy process, on two cores, a training step took 1.4 s instead of 1.0;
    alone it is no slower (docs/log.md, 28 November). What the user set, `GOMP_SPINCOUNT` or `OMP_WAIT_POLICY`, stays.

    Returns:
        Whether it was done.
    """
    if cores() > FEW or {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        return False
    os.environ["GOMP_SPINCOUNT"] = str(SPINS)
    return True


def before_torch() -> None:
    """What every command that trains or measures does before it imports torch: see :func:`scratchlm.allocator.keep_freed_memory` and :func:`wait_briefly`."""
    keep_freed_memory()
    wait_briefly()
