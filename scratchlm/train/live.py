"""What a run can tell about itself while it runs: speed, model FLOPs utilisation, memory.

The formulas are those of :mod:`scratchlm.resources`: FLOPs per token of the model's own products (forward once, backward
twice), and MFU = FLOPs per second / peak of the device.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from scratchlm.errors import UserError

Utilisation = Callable[[float, str], float | None]
"""(FLOP/s, precision) → share of the device's peak; None: nobody knows the peak. A UserError: the peak is wrong.
Such as :func:`scratchlm.resources.utilisation.mfu_on`, which the loop is given."""


def memory_in_use(device: torch.device) -> int | None:
    """Bytes: on CUDA the most that tensors have held so far, on Metal what they hold, on a CPU resident memory.

    Resident memory stays at its peak (:mod:`scratchlm.allocator`). None where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    with suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    with suppress(ImportError):
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else 1024 * most
    return None


@dataclass
class Live:
    """Speed since the last line of metrics, and what follows from it.

    Args:
        flops_per_token: of the model in training.
        utilisation: FLOP/s as a share of the device's peak; None: not shown.
        memory: bytes in use.
        clock: seconds.
    """

    flops_per_token: float = 0.0
    utilisation: Utilisation | None = None
    memory: Callable[[], int | None] = lambda: None
    clock: Callable[[], float] = time.perf_counter
    _since: float = field(init=False)
    _tokens: int = field(init=False)
    _positions: int = field(init=False)

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """The interval begins now: what was done before does not count."""
        self._since, self._tokens, self._positions = self.clock(), 0, 0

    def add(self, tokens: int, positions: int) -> None:
        """A step was made, of so many targets at so many places: a place without a target is computed as well."""
        self._tokens += tokens
        self._positions += positions

    def speeds(self) -> tuple[float, float]:
        """Targets and FLOPs per second."""
        seconds = max(self.clock() - self._since, 1e-9)
        return self._tokens / seconds, self.flops_per_token * self._positions / seconds

    def figures(self, precision: str) -> tuple[dict[str, Any], str | None]:
        """For a line of metrics.

        Returns:
            ``tokens_per_second``, ``flops_per_second``, ``mfu`` (if the peak is known and right) and ``memory_bytes``;
            and what is wrong with the peak. It is said once: afterwards no ``mfu`` is given.
        """
        tokens, flops = self.speeds()
        found: dict[str, Any] = {"tokens_per_second": tokens, "flops_per_second": flops}
        complaint = None
        try:
            share = self.utilisation(flops, precision) if self.utilisation is not None else None
        except UserError as error:
            share, complaint, self.utilisation = None, f"no utilisation is shown: {error}", None
        if share is not None:
            found["mfu"] = share
        if (memory := self.memory()) is not None:
            found["memory_bytes"] = memory
        return found, complaint

    def postfix(self, precision: str) -> dict[str, str]:
        """For the bar."""
        tokens, flops = self.speeds()
        shown = {"tok_s": f"{tokens:,.0f}"}
        with suppress(UserError):  # one step's time is noisy: the next line of metrics judges
            share = self.utilisation(flops, precision) if self.utilisation is not None else None
            if share is not None:
                shown["mfu"] = f"{100 * share:.1f}%"
        if (memory := self.memory()) is not None:
            shown["mem"] = f"{memory / 1e9:.2f}GB"
        return shown
