"""What the hardware multiplies natively: every kind of machine pretended, and the one at hand against Linux's list."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from scratchlm.kernels import hardware
from scratchlm.kernels.hardware import has_native_bf16
from scratchlm.optim.newton_schulz import fast_dtype


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    has_native_bf16.cache_clear()
    yield
    has_native_bf16.cache_clear()


def pretend(
    monkeypatch: pytest.MonkeyPatch, machine: str, *, onednn: bool, avx512_bf16: bool = False, amx: bool = False
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(hardware, "_onednn_has_bf16", lambda: onednn)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)


@pytest.mark.parametrize(
    ("machine", "found", "native"),
    [
        ("x86_64", {"onednn": True, "avx512_bf16": True}, True),
        ("AMD64", {"onednn": True, "amx": True}, True),
        ("x86_64", {"onednn": True}, False),  # AVX-512 without the instructions: emulated, slower
        ("AMD64", {"onednn": False}, False),
        ("x86_64", {"onednn": False, "avx512_bf16": True}, False),  # a build of torch without oneDNN
        ("aarch64", {"onednn": True}, True),
        ("aarch64", {"onednn": False}, False),
        ("arm64", {"onednn": False}, False),
    ],
)
def test_a_cpu_is_native_only_with_the_instructions(
    monkeypatch: pytest.MonkeyPatch, machine: str, found: dict[str, bool], native: bool
) -> None:
    pretend(monkeypatch, machine, **found)
    assert has_native_bf16("cpu") is native
    assert fast_dtype("cpu") == (torch.bfloat16 if native else torch.float32)  # Muon decides by the same


def test_what_cannot_be_asked_is_not_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(hardware, "_onednn_has_bf16", lambda: True)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)  # another version of torch
    assert not has_native_bf16("cpu")


def test_a_torch_without_onednn_is_not_native(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing:
        pass

    monkeypatch.setattr(torch, "ops", Nothing())
    assert not hardware._onednn_has_bf16() and not has_native_bf16("cpu")


def test_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_native_bf16("mps")
    if not torch.cuda.is_available():
        assert not has_native_bf16("cuda")
    has_native_bf16.cache_clear()
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: asked.append(including_emulation) or True
    )
    assert has_native_bf16("cuda") and asked == [False]


@pytest.mark.skipif(platform.system() != "Linux" or platform.machine() != "x86_64", reason="reads Linux's list")
def test_this_machine_is_what_linux_says_it_is() -> None:
    flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("flags")[2].split("\n")[0].split())
    listed = bool({"avx512_bf16", "amx_bf16"} & flags)
    assert has_native_bf16("cpu") == (listed and hardware._onednn_has_bf16())
