"""What this machine has, without asking torch, whose import takes longer than most questions."""

from __future__ import annotations

import os
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
