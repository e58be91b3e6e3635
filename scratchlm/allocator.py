"""Tell glibc to keep freed memory for the next step."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Ask glibc's malloc not to give memory back to the system between steps; call it before torch is imported.

    A training step frees and takes the same large buffers again and again. By default each goes back to the kernel and
    comes again as fresh pages, zeroed one fault at a time. The price is that resident memory stays at its peak.

    Returns:
        Whether it was done (Linux with glibc).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 1 << 30))
