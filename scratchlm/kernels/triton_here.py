"""Whether Triton's kernels run where a tensor is: asked by everything that has one, answered once per process and device."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch

INTERPRETED = False
"""Whether Triton's kernels take tensors on the CPU, which its interpreter can (TRITON_INTERPRET=1), slowly: for tests."""


DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What Triton's kernels here read and write; they compute in fp32."""


def takes(device: torch.device) -> bool:
    """Whether tensors there go to Triton's kernels if these run at all: without finding out whether they do."""
    return device.type == "cuda" or INTERPRETED


def runs_on(device: torch.device, otherwise: str) -> bool:
    """Whether Triton's kernels run there; if they should and do not, a warning says what happens otherwise and why, once."""
    if not takes(device):
        return False
    reason = trouble(device)
    if reason is not None:
        warn_once(f"{otherwise}, which is slower: {reason}")
    return reason is None


def computes(x: torch.Tensor, otherwise: str) -> bool:
    """Whether Triton's kernels take `x`: of one of their dtypes, where they run; says so as :func:`runs_on` does."""
    return x.dtype in DTYPES and runs_on(x.device, otherwise)


def is_offered(x: torch.Tensor, otherwise: str) -> bool:
    """The same for who chooses an operation that computes it. While a graph is traced it is not asked whether Triton runs: then the operation computes by torch."""
    return x.dtype in DTYPES and takes(x.device) and (torch.compiler.is_compiling() or runs_on(x.device, otherwise))


@functools.cache
def trouble(device: torch.device) -> str | None:
    """What keeps Triton from running on the device, found by running a kernel of one line."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    try:
        from scratchlm.kernels.triton_probe import probe

        probe(device)
    except Exception as error:  # Triton fails in many ways: no C compiler, no driver, no headers, a wrong version
        said = str(error).strip().splitlines()
        return f"triton does not run here ({type(error).__name__}{': ' + said[0] if said else ''})"
    return None


Asked = TypeVar("Asked", bound=Callable[..., Any])


def constant_in_graphs(function: Asked) -> Asked:
    """A function of constants that a graph, while it is traced, calls once: ``torch.compiler.assume_constant_result``, which imports the whole compiler
    to leave the same mark."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@functools.cache
def warn_once(what: str) -> None:
    """A warning, the first time in a process."""
    warnings.warn(what, stacklevel=4)
