"""Device, precision and compiler: found by looking, said with a reason, refused in one line."""

from __future__ import annotations

import pytest
import torch

from scratchlm.errors import UserError
from scratchlm.train import precision
from scratchlm.train.precision import (
    COMPILE_PAYS_AFTER_STEPS,
    autocast,
    choose_compile,
    choose_device,
    choose_precision,
    cpu_bf16_speedup,
    find_compiler,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(("speedup", "expected"), [(0.4, "fp32"), (1.0, "fp32"), (3.0, "bf16")])
def test_auto_takes_bf16_only_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, speedup: float, expected: str
) -> None:
    monkeypatch.setattr(precision, "cpu_bf16_speedup", lambda: speedup)
    decision = choose_precision("auto", CPU)
    assert decision.value == expected
    assert f"{speedup:.1f}x" in decision.reason


def test_the_speedup_is_measured() -> None:
    assert 0.01 < cpu_bf16_speedup() < 100


@pytest.mark.parametrize("wanted", ["fp32", "bf16"])
def test_a_demand_is_followed(wanted: str) -> None:
    assert choose_precision(wanted, CPU).value == wanted


def test_compile_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision.shutil, "which", lambda _: None)
    assert find_compiler() is None
    assert choose_compile("auto", CPU, 10_000).value == "off"
    assert "no C++ compiler" in choose_compile("auto", CPU, 10_000).reason
    with pytest.raises(UserError, match=r"train.compile = on, but no C\+\+ compiler was found"):
        choose_compile("on", CPU, 10_000)


def test_compile_only_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision.shutil, "which", lambda name: f"bin/{name}")
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
