"""Utilisation: a ratio that is never clipped, of peaks that are named."""

from __future__ import annotations

import pytest

from scratchlm.errors import UserError
from scratchlm.resources.devices import Device, find
from scratchlm.resources.utilisation import NOISE, Utilisation, mfu


def test_palm_540b() -> None:
    """PaLM's table 3: 46.2 % on 6,144 TPU v4 chips of 275 TFLOP/s at 238.3 thousand tokens/s. Appendix B: 6N + 12·L·H·Q·T per token."""
    per_token = 6 * 540.35e9 + 12 * 118 * 48 * 256 * 2048
    assert mfu(per_token * 238.3e3, 6144 * 275e12) == pytest.approx(0.462, abs=0.002)


def test_noise_above_one_is_returned_and_more_is_refused() -> None:
    assert NOISE == 0.02
    assert mfu(1.015e12, 1e12) == 1.015
    assert mfu(1.02e12, 1e12) == 1.02
    with pytest.raises(UserError) as refused:
        mfu(1.04e12, 1e12, of="an H100 in bf16", name="datasheet")
    message = str(refused.value)
    assert message.startswith(
        "model FLOPs utilisation of 104 %: the datasheet peak of 1 TFLOP/s of an H100 in bf16 is wrong"
    )
    assert message.endswith("measure it with `scratchlm resources measure`")
    assert "up to 2 % above" in message
    with pytest.raises(UserError, match="101 %"):
        mfu(1.01e12, 1e12, tolerance=0.0)


@pytest.mark.parametrize("peak", [0.0, -1.0, float("inf"), float("nan")])
def test_a_peak_that_is_none(peak: float) -> None:
    with pytest.raises(UserError, match="which is none"):
        mfu(1.0, peak)


@pytest.mark.parametrize("speed", [-1.0, float("inf"), float("nan")])
def test_a_speed_that_is_none(speed: float) -> None:
    with pytest.raises(UserError, match="no speed"):
        mfu(speed, 1.0)


def test_of_a_known_device() -> None:
    found = Utilisation.on(find("a100"), "bf16", 156e12)
    assert (found.measured_peak, found.datasheet_peak) == (None, 312e12)
    assert (found.of_measured, found.of_datasheet) == (None, 0.5)
    assert found.describe() == "50.0 % of the datasheet peak of 312 TFLOP/s in bf16"


def measured(**peaks: float) -> Device:
    return Device(
        name="a100-80gb", title="NVIDIA A100-SXM4-80GB", kind="cuda", peak_flops=peaks, measured="2026-11-21"
    )


def test_a_measured_machine_has_both_peaks() -> None:
    found = Utilisation.on(measured(bf16=260e12), "bf16", 130e12)
    assert (found.of_measured, found.of_datasheet) == (0.5, pytest.approx(130 / 312))
    assert found.describe() == (
        "50.0 % of the measured peak of 260 TFLOP/s in bf16, 41.7 % of the datasheet peak of 312 TFLOP/s in bf16"
    )
    only_printed = Utilisation.on(measured(bf16=260e12), "tf32", 78e12)
    assert (only_printed.of_measured, only_printed.of_datasheet) == (None, 0.5)


def test_noise_is_said() -> None:
    assert (
        "no more than the 2 % that timings vary" in Utilisation.on(measured(bf16=100e12), "bf16", 101e12).describe()
    )


def test_a_wrong_measurement_is_refused() -> None:
    found = Utilisation.on(measured(bf16=100e12), "bf16", 110e12)
    with pytest.raises(UserError, match="110 %: the measured peak of 100 TFLOP/s of NVIDIA A100-SXM4-80GB in bf16"):
        _ = found.of_measured


def test_without_any_peak() -> None:
    with pytest.raises(
        UserError, match="peak of a CPU, not yet measured in bf16 is unknown; run `scratchlm resources measure`"
    ):
        Utilisation.on(find("cpu"), "bf16", 1e9)
    unknown = Device(name="cpu", title="mine", kind="cpu", peak_flops={"fp32": 1e9}, measured="2026-11-21")
    assert Utilisation.on(unknown, "fp32", 5e8).datasheet_peak is None
    assert "no peak of mine in fp32" in Utilisation(1.0, "fp32", "mine").describe()
