"""What this machine has, without asking torch, whose import takes longer than most questions."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import sys
from contextlib import suppress
from pathlib import Path

COMPILER = 1_000_000_000
"""Bytes of main memory that torch.compile takes for itself on a CPU while it works: its own modules and graphs (kept), and a C++ compiler per
thread (for a moment)."""

_DRIVERS = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/kfd")
"""Where Linux shows NVIDIA's devices (under Windows' own Linux the third) and AMD's."""


def find_compiler() -> str | None:
    """Path of the C++ compiler that torch.compile would use on a CPU, or None."""
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    return None


def cache_folder() -> Path:
    """Where things are kept that can be made again: ``~/.cache/scratchlm``, or under ``$XDG_CACHE_HOME``.

    Raises:
        RuntimeError: this user has no home.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(given) if given and Path(given).is_absolute() else Path.home() / ".cache"
    return folder / "scratchlm"


PROCESSOR = Path("/proc/cpuinfo")


@functools.cache
def processor() -> tuple[str, ...]:
    """What the first processor says of itself: name and instructions; little where there is no ``/proc/cpuinfo``."""
    with suppress(OSError):
        first, _, _ = PROCESSOR.read_text(encoding="utf-8", errors="replace").partition("\n\n")
        lines = first.splitlines()
        return tuple(sorted(line for line in lines if line.startswith(("model name", "flags", "Features", "CPU "))))
    return platform.machine(), platform.processor()


def main_memory() -> float | None:
    """Bytes of main memory that this process may have, also in a container; None where unknown."""
    sizes: list[float] = []
    with suppress(OSError, ValueError, AttributeError):
        sizes.append(float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")))
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # "max": no limit
            sizes.append(float(Path(limit).read_text(encoding="ascii")))
    return min(sizes) if sizes else None


def surely_no_accelerator() -> bool:
    """Whether torch could only find a CPU here: on Linux without any driver's device. False where that cannot be known."""
    return sys.platform == "linux" and not any(map(os.path.exists, _DRIVERS))
