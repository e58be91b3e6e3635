"""A kernel of one line, to find out whether Triton runs at all."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _one(at):
    tl.store(at, 1)


def probe(device: torch.device) -> None:
    """Compile and run a kernel of one line there: raises whatever keeps Triton from it."""
    found = torch.zeros(1, dtype=torch.int32, device=device)
    with torch.cuda.device_of(found):
        _one[(1,)](found)
    if found.item() != 1:
        raise RuntimeError("a kernel that stores a one did not")
