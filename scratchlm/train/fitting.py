"""How many sequences at once: the largest micro-batch that divides the batch and fits the device's memory.

The mathematics stay the batch's: a smaller micro-batch is the same sum of gradients in more parts.

::

    largest divisor of batch_size          one step on random ids           every later step
    whose traced peak ≤ 0.9 · budget  ──►  out of memory? next divisor ──►  out of memory? next divisor, same batch again
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scratchlm.config import TrainConfig
from scratchlm.errors import UserError
from scratchlm.kernels.cross_entropy import IGNORE_INDEX
from scratchlm.machine import COMPILER
from scratchlm.sizes import parse_bytes
from scratchlm.train.checkpoint import generator_states, restore_generators

MARGIN = 0.1
"""Share of the memory that an estimate leaves free: for the allocator's gaps and the libraries' own buffers."""

_MESSAGES = (
    "can't allocate memory",  # torch's allocator on a CPU
    "not enough memory",  # the same on Windows
    "out of memory",  # CUDA's and Metal's libraries
    "std::bad_alloc",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


@dataclass(frozen=True)
class Need:
    """Bytes of a training step.

    Attributes:
        peak: the most that lives at once, weights included.
        state: of these the optimizer's, which is not there before the first step.
    """

    peak: int
    state: int = 0


@dataclass(frozen=True)
class Plan:
    """What a task knows about its memory before it runs.

    Attributes:
        need: (sequences at once, micro-batches per step, precision, whether the blocks are compiled) → bytes.
        probe: that many sequences of random ids, shaped as the loader's batches.
    """

    need: Callable[[int, int, str, bool], Need]
    probe: Callable[[int], Any]


def divisors(number: int) -> list[int]:
    """All of them, ascending."""
    low = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return low + [number // n for n in reversed(low) if n * n != number]


def smaller(batch_size: int, micro_batch: int) -> int | None:
    """The largest divisor of `batch_size` that is at most half of `micro_batch`; None below one sequence."""
    return max((n for n in divisors(batch_size) if 2 * n <= micro_batch), default=None)


def largest(batch_size: int, budget: float, need: Callable[[int], Need]) -> tuple[int, Need, bool]:
    """The largest divisor of `batch_size` whose peak is within `budget`, by bisection; a larger one never needs less.

    Args:
        batch_size: sequences per optimizer step.
        budget: bytes.
        need: micro-batch → bytes.

    Returns:
        The micro-batch, what it needs, and whether that is within the budget: if not, it is one sequence.
    """
    sizes = divisors(batch_size)
    needs: dict[int, Need] = {}
    low, high = 0, len(sizes) - 1
    at = high  # most batches fit whole
    while low <= high:
        needs[sizes[at]] = need(sizes[at])
        if needs[sizes[at]].peak <= budget:
            low = at + 1
        else:
            high = at - 1
        at = (low + high) // 2
    found = sizes[max(high, 0)]
    if found not in needs:
        needs[found] = need(found)
    return found, needs[found], needs[found].peak <= budget


def readable(size: float) -> str:
    """``1.23 GB``; powers of 1000."""
    for unit, power in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= power:
            return f"{size / power:.3g} {unit}" if size < 1000 * power else f"{size / power:,.0f} {unit}"
    return f"{size:.0f} bytes"


# --- what the device has ------------------------------------------------------------------------------------------------


def held_bytes(tensors: Iterable[Tensor], device: torch.device) -> int:
    """Bytes of the storages that these tensors have on `device`, each once."""
    storages = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if t.device.type == device.type
    }
    return sum(storages.values())


def memory_budget(device: torch.device, held: int) -> int | None:
    """Bytes that a training step may take in all; None where the system does not tell.

    Args:
        device: where it runs.
        held: what the model and the optimizer have taken of it already.
    """
    if device.type == "cuda":  # what torch keeps for itself is free to it
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    left = [size for size in (_system_left(), _group_left(), _address_space_left()) if size is not None]
    return min(left) + held if left else None


def _numbers(path: str) -> dict[str, int]:
    """``name number`` per line, as the kernel writes it; empty where there is no such file."""
    with contextlib.suppress(OSError, ValueError):
        lines = Path(path).read_text(encoding="ascii").splitlines()
        pairs = [re.split(r":?\s+", line) for line in lines]
        return {pair[0]: int(pair[1]) for pair in pairs if len(pair) > 1 and pair[1].isdecimal()}
    return {}


def _system_left() -> int | None:
    kilobytes = _numbers("/proc/meminfo").get("MemAvailable")
    if kilobytes is not None:
        return 1024 * kilobytes
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _group_left() -> int | None:
    """What a container leaves: its limit is kept by killing, not by an error that could be caught."""
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        folder = Path("/sys/fs/cgroup")
        limit = int((folder / "memory.max").read_text(encoding="ascii"))
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        return max(0, limit - used + _numbers(str(folder / "memory.stat")).get("inactive_file", 0))
    return None


def _address_space_left() -> int | None:
    """Under ``ulimit -v``."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        taken = _address_space()
        if limit != resource.RLIM_INFINITY and taken is not None:
            return max(0, limit - taken)
    return None


def _address_space() -> int | None:
    """Bytes of address space that this process has taken; None where there is no /proc."""
    with contextlib.suppress(OSError, ValueError):
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")
    return None


# --- the choice ---------------------------------------------------------------------------------------------------------


def choose(
    train: TrainConfig,
    precision: str,
    compiled: bool,
    device: torch.device,
    held: int,
    plan: Plan,
    say: Callable[[str], None],
) -> tuple[int, Need]:
    """The micro-batch to begin with, said with its reason.

    Args:
        train: batch_size is split; memory_limit bounds the memory.
        precision: ``bf16`` or ``fp32``.
        compiled: whether torch.compile will work.
        device: where training will run.
        held: see :func:`memory_budget`.
        plan: knows the bytes.
        say: receives one line.

    Raises:
        UserError: not even one sequence fits train.memory_limit.
    """
    batch_size = train.batch_size

    def need(micro_batch: int) -> Need:
        return plan.need(micro_batch, batch_size // micro_batch, precision, compiled)

    limit = None if train.memory_limit is None else parse_bytes(train.memory_limit)
    free = memory_budget(device, held)
    if free is not None and compiled and device.type == "cpu":
        free = max(0, free - COMPILER)
    known = [size for size in (free, limit) if size is not None]
    if not known:
        say(f"micro-batches of {batch_size}, to be tried: the system does not tell how much memory is free")
        return batch_size, Need(0)
    budget = min(known)
    micro_batch, found, fits = largest(batch_size, (1 - MARGIN) * budget, need)
    if not fits and budget == limit:
        raise UserError(
            f"train.memory_limit = {train.memory_limit}: one sequence needs {readable(found.peak)}, and {MARGIN:.0%} stay "
            "free; raise it, or lower model.context_length or the model's size"
        )
    reason = f"{readable(found.peak)} of {readable(budget)} by the estimate"
    say(
        f"micro-batches of {micro_batch}, {batch_size // micro_batch} per step: {reason}"
        + ("" if fits else ", to be tried")
    )
    return micro_batch, found


@contextlib.contextmanager
def untouched_generators(device: torch.device) -> Iterator[None]:
    """torch's random generators are afterwards as they were."""
    states = generator_states(device)
    try:
        yield
    finally:
        restore_generators(states, device)


# --- running out of it --------------------------------------------------------------------------------------------------


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a computation failed for want of memory, on whatever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)


@contextlib.contextmanager
def refused_not_killed(device: torch.device) -> Iterator[None]:
    """A CPU's memory is promised beyond what there is, and who takes it is killed: here it is refused, as on a GPU.

    The heap has gaps between its tensors: a step may need more than twice what lives in it.
    """
    left = [size for size in (_system_left(), _group_left()) if size is not None]
    size = _address_space()
    if device.type != "cpu" or size is None or not left:
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = [size + min(left), *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def occupied(size: int, device: torch.device) -> Tensor:
    """So many bytes of memory, really taken: a page that was never written is not.

    Raises:
        UserError: they are not there.
    """
    try:
        return torch.ones(size, dtype=torch.uint8, device=device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"the optimizer's state of {readable(size)} does not fit the memory of {device.type}: choose a smaller model, "
            "optim.optimizer = sgd, or another device"
        ) from error


def release(device: torch.device) -> None:
    """Give back what a failed computation has left, after its exception is gone."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)


def split(batch: Any, sequences: int) -> list[Any]:
    """A batch in micro-batches of `sequences`, a divisor of its own."""
    parts = batch.inputs.shape[0] // sequences
    if parts == 1:
        return [batch]
    names = ("inputs", "targets", "positions", "documents")
    pieces = {
        name: [None] * parts if getattr(batch, name) is None else getattr(batch, name).split(sequences)
        for name in names
    }
    return [type(batch)(**{name: pieces[name][i] for name in names}) for i in range(parts)]


def count_targets(targets: Tensor) -> int:
    """How many targets a mean is taken over."""
    return int((targets != IGNORE_INDEX).sum())
