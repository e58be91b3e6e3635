"""Device, precision and compiler: found by looking, said with a reason, refused in one line."""

from __future__ import annotations

import time

import pytest
import torch

from scratchlm import machine
from scratchlm.errors import UserError
from scratchlm.kernels.hardware import has_native_bf16
from scratchlm.train import precision
from scratchlm.train.precision import (
    COMPILE_PAYS_AFTER_STEPS,
    Decision,
    autocast,
    choose_compile,
    choose_device,
    choose_precision,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize("native", [True, False])
def test_auto_takes_bf16_only_where_it_is_native(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr(precision, "has_native_bf16", lambda device_type: native and device_type == "cpu")
    decision = choose_precision("auto", CPU)
    assert decision.value == ("bf16" if native else "fp32")
    assert "bf16" in decision.reason
    assert choose_precision("auto", torch.device("mps")).value == "fp32"


@pytest.mark.parametrize("slow", [torch.float32, torch.bfloat16])
def test_the_clock_has_no_say(monkeypatch: pytest.MonkeyPatch, slow: torch.dtype) -> None:
    """On a busy machine any product may take long: the decision stays."""
    before = choose_precision("auto", CPU)
    has_native_bf16.cache_clear()
    original = torch.Tensor.__matmul__

    def delayed(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        if left.dtype == slow:
            time.sleep(0.2)
        return original(left, right)

    monkeypatch.setattr(torch.Tensor, "__matmul__", delayed)
    assert choose_precision("auto", CPU) == before


def test_cuda_is_asked_for_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(precision, "has_native_bf16", lambda device_type: True)
    assert choose_precision("auto", torch.device("cuda")) == Decision("bf16", "a card")
    monkeypatch.setattr(precision, "has_native_bf16", lambda device_type: False)
    assert choose_precision("auto", torch.device("cuda")).value == "fp32"
    with pytest.raises(UserError, match=r"train.precision = bf16, but a card has no bf16"):
        choose_precision("bf16", torch.device("cuda"))


@pytest.mark.parametrize("wanted", ["fp32", "bf16"])
def test_a_demand_is_followed(wanted: str) -> None:
    assert choose_precision(wanted, CPU).value == wanted


def test_compile_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.shutil, "which", lambda _: None)
    assert machine.find_compiler() is None
    assert choose_compile("auto", CPU, 10_000).value == "off"
    assert "no C++ compiler" in choose_compile("auto", CPU, 10_000).reason
    with pytest.raises(UserError, match=r"train.compile = on, but no C\+\+ compiler was found"):
        choose_compile("on", CPU, 10_000)


def test_compile_only_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.shutil, "which", lambda name: f"bin/{name}")
    assert choose_compile("auto", CPU, COMPILE_PAYS_AFTER_STEPS - 1).value == "off"
    assert choose_compile("auto", CPU, COMPILE_PAYS_AFTER_STEPS).value == "on"
    assert choose_compile("on", CPU, 1).value == "on"
    assert choose_compile("off", CPU, 10_000).value == "off"


def test_a_device_that_is_not_there_is_refused() -> None:
    assert choose_device("cpu") == CPU
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="device cuda:3 is not available"):
            choose_device("cuda:3")
    if not torch.backends.mps.is_available():
        with pytest.raises(UserError, match="mps is not available"):
            choose_device("mps")


def test_autocast_computes_products_in_bf16_and_only_when_asked() -> None:
    a = torch.ones(2, 2)
    with autocast("bf16", CPU):
        assert (a @ a).dtype == torch.bfloat16
    with autocast("fp32", CPU):
        assert (a @ a).dtype == torch.float32
