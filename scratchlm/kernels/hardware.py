"""What a processor computes natively. Asked of it, never timed: the same machine always gives the same answer."""

from __future__ import annotations

import functools
import platform

import torch


def _cpu_says(name: str) -> bool:
    """``torch.cpu.<name>()``, or False in a version of torch that has no such function."""
    probe = getattr(torch.cpu, name, None)
    return bool(probe()) if callable(probe) else False


def _onednn_has_bf16() -> bool:
    """Whether oneDNN would compute in bf16 here; False in a build of torch that cannot be asked."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False


def _cpu_has_bf16() -> bool:
    if not _onednn_has_bf16():  # who does the products in bf16, whatever the processor could do
        return False
    if platform.machine().lower() in ("x86_64", "amd64", "i386", "i686", "x86"):
        # oneDNN says yes to every AVX-512 processor, also where it converts to fp32 and back.
        return _cpu_says("_is_avx512_bf16_supported") or _cpu_says("_is_amx_tile_supported")
    return True  # on Arm it asks for the instructions themselves


@functools.cache
def has_native_bf16(device_type: str) -> bool:
    """Whether devices of this type multiply bfloat16 matrices natively, which is when bf16 is faster than fp32.

    On a CPU these are the instructions AVX512-BF16, AMX or Arm's BF16; on CUDA compute capability 8.0 or newer. False
    where it cannot be known, and on Apple's GPUs, which gain nothing from it.

    Args:
        device_type: ``cpu``, ``cuda`` or ``mps``.
    """
    if device_type == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return device_type == "cpu" and _cpu_has_bf16()


def has_amx() -> bool:
    """Whether the CPU multiplies whole tiles of bf16 at once (Intel's AMX)."""
    return _cpu_says("_is_amx_tile_supported")


def has_native_fp8(device: torch.device) -> bool:
    """Whether `device` multiplies 8-bit floating point natively: CUDA of compute capability 8.9 (Ada), 9.0 (Hopper) or newer."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


@functools.cache
def onednn_beats_mkl() -> bool:
    """Whether fp32 products on the CPU had better go to oneDNN than to MKL, torch's choice.

    MKL picks its code by the maker of the processor; on AMD's (measured: Zen 5, 2.2 to 3 times) it leaves half of the speed. False
    where torch was built without either, or where oneDNN's product cannot be asked for.
    """
    from llvmlite import binding

    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    if not binding.get_host_cpu_name().startswith("znver"):
        return False
    rows = torch.arange(12, dtype=torch.float32).view(3, 4)
    try:
        product = torch.ops.mkldnn._linear_pointwise(rows, rows, None, "none", [], "")
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return bool(product.equal(rows @ rows.t()))
