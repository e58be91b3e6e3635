"""Memory for results that is used again: the first touch of a fresh page costs more than encoding the text that fills it.

    take ──► pages ──► array ──► views that the caller keeps
              ▲                        │
              └── kept, when the last of them is gone: the system may have the pages back whenever it needs them (MADV_FREE)

Pages are asked for in sizes of which the system can make huge pages (2 MB at a time instead of 4 kB).
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
import weakref

import numpy as np

# What is kept for later, in bytes of address space; what was never touched takes no memory.
MOST_KEPT = 1 << 28
# From this size on two of the system's huge pages fit.
HUGE = 1 << 22
_FREE = getattr(mmap, "MADV_FREE", None)
_POPULATE = 23 if sys.platform == "linux" else None  # MADV_POPULATE_WRITE, which Python has no name for


def private_pages(size: int, at_once: bool = False) -> mmap.mmap:
    """`size` zero bytes in huge pages where the system has them.

    They take memory only where they are touched, or all `at_once`: then the system is not called for each page, and twice for a page
    that is read before it is written to.
    """
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return mmap.mmap(-1, size)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE") and size >= HUGE:
        pages.madvise(mmap.MADV_HUGEPAGE)
    if at_once and _POPULATE is not None:
        with contextlib.suppress(OSError):  # an older system
            pages.madvise(_POPULATE)
    return pages


class Buffers:
    """Safe to be used by several threads (and by the callbacks of a garbage collection: there is no lock to be held twice)."""

    def __init__(self) -> None:
        self._kept: list[mmap.mmap] = []
        self._out: dict[int, weakref.ref[ctypes.Array[ctypes.c_char]]] = {}

    @property
    def kept(self) -> int:
        """Bytes of address space that wait to be used again."""
        return sum(map(len, self._kept.copy()))

    def take(self, size: int, dtype: type) -> np.ndarray:
        """An array of at least `size` items, whatever is in it. When no array refers to its memory any more, it may be taken again."""
        needed = max(size, 1) * np.dtype(dtype).itemsize
        pages = self._again(needed) or private_pages(-(-needed // HUGE) * HUGE)
        owner = (ctypes.c_char * len(pages)).from_buffer(pages)
        key, kept, out = id(owner), self._kept, self._out

        def give_back(_: object) -> None:
            del out[key]
            if _FREE is not None:
                pages.madvise(_FREE)
            if sum(map(len, kept.copy())) + len(pages) <= MOST_KEPT:
                kept.append(pages)

        self._out[key] = weakref.ref(owner, give_back)
        return np.frombuffer(memoryview(owner).cast("B"), dtype)

    def _again(self, needed: int) -> mmap.mmap | None:
        """The smallest that is large enough, and not by far too large."""
        for pages in sorted(self._kept.copy(), key=len):
            if needed <= len(pages) <= max(4 * needed, HUGE):
                try:
                    self._kept.remove(pages)
                except ValueError:  # another thread was faster
                    continue
                return pages
        return None
