"""Kernels in C++: compiled for this machine's processor at first use, a second or two, and kept on disk.

::

    sources + compiler + flags + processor ──hash──►  ~/.cache/scratchlm/kernels/<name>-<hash>.so     (may be deleted at any time)

Plain functions of addresses and sizes, called through ctypes, which lets other Python threads go on meanwhile. Parallel loops are OpenMP's: a
library loaded after torch finds torch's own threads. Where there is no compiler, or one without OpenMP, nothing of this is offered, and torch
does the work.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.autograd import forward_ad

from scratchlm.errors import UserError
from scratchlm.files import stable_hash, write_bytes
from scratchlm.kernels.triton_here import warn_once
from scratchlm.machine import cache_folder, find_compiler, processor

FLAGS = ("-O2", "-march=native", "-ffp-contract=off", "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-Wno-psabi")
"""Products and sums are only joined where a kernel says so: in x · scale − m, where m is such a product, rounded, joining would leave what rounding took."""

SWITCH = "SCRATCHLM_CPP"
"""0 in the environment: no kernel in C++ is compiled or used."""

PATIENCE = 120
"""Seconds after which a compiler is given up."""


class NoKernel(Exception):
    """Why a kernel cannot be had on this machine."""


@functools.cache
def compiler() -> str | None:
    """The compiler that builds kernels; None: there is none, it is switched off, or this is not Linux, where alone it was tried."""
    if os.environ.get(SWITCH) == "0" or sys.platform != "linux":
        return None
    return find_compiler()


def built(source: Path, defines: Sequence[str] = ()) -> ctypes.CDLL:
    """The library that a source file makes; what failed once in a process is not tried again.

    Args:
        source: one file, which may include headers that lie beside it.
        defines: names defined for its preprocessor, as ``BF16`` or ``VECTOR=4``.

    Raises:
        NoKernel: there is no compiler, it fails, or what it made cannot be loaded.
    """
    found = _tried(source, tuple(defines))
    if isinstance(found, NoKernel):
        raise found
    return found


def kernels(source: Path, dtype: torch.dtype, results: Mapping[str, Any]) -> ctypes.CDLL:
    """The library of a source file for numbers of a dtype, bf16 or fp32.

    Args:
        source: as for :func:`built`.
        dtype: bf16 defines ``BF16``.
        results: what each of its functions returns, as ctypes has it; None: nothing.

    Raises:
        NoKernel: as :func:`built`, or a function is not in it.
    """
    found = built(source, ["BF16"] if dtype == torch.bfloat16 else [])
    try:
        for name, result in results.items():
            getattr(found, name).restype = result
    except AttributeError as error:
        raise NoKernel(str(error)) from error
    return found


def is_there(library: Callable[[torch.dtype], Any], dtype: torch.dtype, otherwise: str) -> bool:
    """Whether kernels for a dtype can be had: compiled or loaded by the first question of a process. If a compiler is there and fails, a warning says once what
    happens otherwise; that there is none, a run says by itself."""
    try:
        library(dtype)
    except NoKernel as error:
        if compiler() is not None:
            warn_once(f"{otherwise}: {error}")
        return False
    return True


def is_watched(x: torch.Tensor) -> bool:
    """Whether somebody looks at torch's operations as they are called, or this is no plain tensor: then kernels are called as operations of torch."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or type(x) is not torch.Tensor
        or torch.jit.is_tracing()
    )


def is_transformed() -> bool:
    """Whether functions are mapped or differentiated by functorch, or derivatives go along (forward mode): kernels with a gradient of their own know neither."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_batch(gradient: torch.Tensor) -> bool:
    """Whether this stands for a batch of gradients (``is_grads_batched``, ``jacobian(vectorize=True)``), whose memory is not to be had."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(gradient) or functorch.is_legacy_batchedtensor(gradient)


_ONE_BY_ONE = threading.Lock()


@functools.cache
def _tried(source: Path, defines: tuple[str, ...]) -> ctypes.CDLL | NoKernel:
    try:
        with _ONE_BY_ONE:
            return _built(source, defines)
    except NoKernel as error:
        return error
    except OSError as error:  # no folder for temporary files, a compiler that is gone …
        return NoKernel(str(error))


def _built(source: Path, defines: tuple[str, ...]) -> ctypes.CDLL:
    by = compiler()
    if by is None:
        raise NoKernel("there is no C++ compiler ($CXX, g++, c++, clang++)")
    flags = [*FLAGS, *(f"-D{name}" for name in defines)]
    texts = [path.read_text(encoding="utf-8") for path in (source, *sorted(source.parent.glob("*.h")))]
    its = Path(by).stat()
    ground = [texts, by, its.st_mtime_ns, its.st_size, flags, list(processor())]
    kept = None
    with suppress(RuntimeError, OSError):  # no home, or a broken file: it is made anew
        kept = cache_folder() / "kernels" / f"{source.stem}-{stable_hash(ground)}.so"
        if kept.exists():
            return ctypes.CDLL(str(kept))
    with TemporaryDirectory() as folder:
        made = Path(folder) / "kernel.so"
        _compile([by, *flags, "-o", str(made), str(source)])
        with suppress(UserError, OSError):  # nothing can be kept: the next process makes it again
            if kept is not None:
                write_bytes(kept, made.read_bytes())
                return ctypes.CDLL(str(kept))
        return ctypes.CDLL(str(made))


def _compile(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoKernel(f"{command[0]} fails: {error}") from error
    if done.returncode:
        lines = done.stderr.splitlines()
        said = (
            [line for line in lines if "cannot find" in line]
            or [line for line in lines if "error" in line]
            or ["no message"]
        )
        raise NoKernel(f"{command[0]} fails: {said[0]}")
