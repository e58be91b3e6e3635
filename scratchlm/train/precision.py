"""What the machine is good at: device, bf16, compiler. Decided by looking, and said in the log."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Literal

import torch

from scratchlm.errors import UserError
from scratchlm.kernels.hardware import has_native_bf16, has_native_fp8
from scratchlm.machine import find_compiler

Precision = Literal["fp32", "bf16"]


def choose_device(name: str) -> torch.device:
    """``auto`` is cuda, then mps, then cpu.

    Raises:
        UserError: the device asked for is not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        if torch.backends.mps.is_available():
            return torch.device("mps")
        return torch.device("cpu")
    device = torch.device(name)
    if device.type == "cuda" and (
        not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()
    ):
        raise UserError(
            f"device {name} is not available: torch sees {torch.cuda.device_count()} CUDA devices; use cpu"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device mps is not available on this machine; use cpu")
    return device


@dataclass(frozen=True)
class Decision:
    """A choice the program made for the user, and why."""

    value: str
    reason: str


def choose_precision(wanted: str, device: torch.device) -> Decision:
    """bf16 where the hardware multiplies it natively (:func:`scratchlm.kernels.hardware.has_native_bf16`).

    Never by a timing: a busy machine must not train in another precision than an idle one, with the same seed.

    Raises:
        UserError: bf16 is demanded of a device that does not have it.
    """
    if wanted == "fp32":
        return Decision("fp32", "the recipe says so")
    if device.type == "cuda":
        capable, name = has_native_bf16("cuda"), torch.cuda.get_device_name(device)
        if wanted == "bf16" and not capable:
            raise UserError(f"train.precision = bf16, but {name} has no bf16; use fp32")
        return Decision("bf16" if capable else "fp32", name)
    if wanted == "bf16":
        return Decision("bf16", "the recipe says so")
    if device.type == "mps":
        return Decision("fp32", "bf16 is not faster on mps")
    if has_native_bf16(device.type):
        return Decision("bf16", "this CPU multiplies bf16 natively")
    return Decision("fp32", "this CPU does not multiply bf16 natively, as far as torch can tell")


def check_fp8(precision: str, device: torch.device) -> None:
    """Refuse ``train.fp8`` where it cannot be had.

    Raises:
        UserError: the device multiplies no fp8, or the run is in fp32.
    """
    if not has_native_fp8(device):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        raise UserError(f"train.fp8 = true, but {name} does not multiply fp8; leave it out")
    if precision != "bf16":
        raise UserError(
            f"train.fp8 = true, but the run is in {precision}: set train.precision = bf16, or leave fp8 out"
        )


COMPILE_PAYS_AFTER_STEPS = 100
"""Compiling costs 10–40 s cold: shorter runs start eager. A fixed number, never a timing, so that a resumed run decides
as the first one did."""


def choose_compile(wanted: str, device: torch.device, steps: int) -> Decision:
    """Whether to use torch.compile.

    Raises:
        UserError: it is demanded where there is no C++ compiler.
    """
    if wanted == "off":
        return Decision("off", "the recipe says so")
    compiler = find_compiler()
    if device.type == "cpu" and compiler is None:
        if wanted == "on":
            raise UserError(
                "train.compile = on, but no C++ compiler was found ($CXX, g++, c++, clang++): install one, or use auto"
            )
        return Decision("off", "no C++ compiler found: running eager, slower")
    if wanted == "on":
        return Decision("on", "the recipe says so")
    if device.type == "mps":
        return Decision("off", "not on mps")
    if steps < COMPILE_PAYS_AFTER_STEPS:
        return Decision("off", f"{steps} steps are over before compiling would pay")
    return Decision("on", compiler or device.type)


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Matmuls in bf16, weights and reductions in fp32; nothing at all for fp32."""
    if precision == "bf16":
        context: contextlib.AbstractContextManager[None] = torch.autocast(device.type, dtype=torch.bfloat16)
        return context
    return contextlib.nullcontext()


def is_compiler_error(error: Exception) -> bool:
    """Whether torch.compile itself failed, as opposed to the computation."""
    module = type(error).__module__
    return module.startswith(("torch._dynamo", "torch._inductor"))
