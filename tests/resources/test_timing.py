"""Times: of products, passes and attention, on a made-up machine whose figures are round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from scratchlm.cli import main
from scratchlm.config import OptimConfig, TrainConfig
from scratchlm.model import ModelConfig
from scratchlm.resources import devices, measurement
from scratchlm.resources.devices import Device
from scratchlm.resources.measurement import Measurement
from scratchlm.resources.step import trace_step
from scratchlm.resources.timing import Datasheet, Measured, moved_by, product_shape, seconds_by_phase, stretches
from scratchlm.resources.trace import Operation, Storage, Trace

ROUND = Device(
    name="round",
    title="Round",
    kind="cuda",
    peak_flops={"fp32": 1e12, "bf16": 1e13},
    memory_bytes=1e10,
    memory_bandwidth=1e11,
)


def operation(name: str = "mm", flops: int = 0, moved: int = 0, **more: Any) -> Operation:
    given: dict[str, Any] = {"phase": "forward", "module": "", "shapes": (), "dtype": torch.bfloat16} | more
    return Operation(name, flops=flops, read=moved // 2, written=moved - moved // 2, **given)


def test_a_datasheet_by_hand() -> None:
    machine = Datasheet(ROUND, product_share=0.5, attention_share=0.25, bandwidth_share=0.8, launch=1e-6)
    product = machine.of(operation(flops=10**12, moved=10**6))
    assert product.seconds == pytest.approx(10**12 / 5e12) and product.bound == "compute"
    thin = machine.of(operation(flops=10**6, moved=8 * 10**8))
    assert thin.seconds == pytest.approx(0.01) and thin.bound == "memory"
    flash = machine.of(operation("_scaled_dot_product_flash_attention", flops=10**12))
    assert flash.seconds == pytest.approx(10**12 / 2.5e12)
    fp32 = machine.of(operation(flops=10**12, dtype=torch.float32))
    assert fp32.seconds == pytest.approx(2.0)
    assert machine.of(operation("add", moved=8 * 10**8)).seconds == pytest.approx(0.01)
    trace = Trace([operation("add", moved=8) for _ in range(1000)])
    assert seconds_by_phase(trace, machine, compiled=False)["forward"] == pytest.approx(1e-3)  # a thousand launches


@pytest.mark.parametrize(("printed", "missing"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_a_peak_that_is_not_printed_is_that_of_the_other_dtype_and_said(printed: str, missing: str) -> None:
    """TPUs multiply fp32 in bf16, GPUs without bf16 compute in fp32: some product of a step is always in the other."""
    machine = Datasheet(ROUND.model_copy(update={"peak_flops": {printed: 1e12}}), product_share=0.5)
    for dtype in (torch.float32, torch.bfloat16):
        assert machine.of(operation(flops=10**12, dtype=dtype)).seconds == pytest.approx(2.0)
    assert f"multiplied in {missing} takes the peak of {printed}" in machine.assumptions[-1]
    assert not any("takes the peak" in line for line in Datasheet(ROUND).assumptions)


def test_shapes_of_products() -> None:
    def shape(name: str, *shapes: tuple[int, ...]) -> Any:
        return product_shape(operation(name, shapes=shapes))

    assert shape("mm", (3, 4), (4, 5)) == (3, 5, 4)
    assert shape("addmm", (5,), (3, 4), (4, 5)) == (3, 5, 4)
    assert shape("bmm", (2, 3, 4), (2, 4, 5)) == (6, 5, 4)
    assert shape("grouped_product", (7, 4), (3, 5, 4), (3,)) == (7, 5, 4)
    assert shape("add", (3, 4), (3, 4)) is None


def storage(size: int, born: int, died: int | None, number: int) -> Storage:
    return Storage(size, born, "forward", "", "", died, number=number)


def test_what_a_compiler_need_not_write() -> None:
    """x → a → b, then a product of b: of the stretch of two passes only x is read and b written."""
    trace = Trace(
        [
            operation("mul", moved=20, inputs=(0,), outputs=(1,)),
            operation("exp", moved=20, inputs=(1,), outputs=(2,)),
            operation("mm", flops=8, moved=30, inputs=(2,), outputs=(3,)),
        ],
        [storage(10, 0, None, 0), storage(10, 0, 2, 1), storage(10, 1, None, 2), storage(10, 2, None, 3)],
    )
    trace.storages[0].born = -1
    parts = list(stretches(trace))
    assert [[op.name for op in part] for part in parts] == [["mul", "exp"], ["mm"]]
    assert moved_by(parts[0], trace, 1) == 20
    trace.storages[1].died = None  # kept for the backward pass: written after all
    assert moved_by(parts[0], trace, 1) == 30
    machine = Datasheet(ROUND, bandwidth_share=1.0, launch=0.0)
    eager, fused = (seconds_by_phase(trace, machine, compiled)["forward"] for compiled in (False, True))
    assert eager - fused == pytest.approx((40 - 30) / 1e11)


def measured(**more: Any) -> Measurement:
    timing = {"spread": 0.0, "rounds": 3}
    given: dict[str, Any] = {
        "machine": "Round",
        "device": "cpu",
        "date": "2026-01-01T00:00:00",
        "quick": True,
        "seconds": 1.0,
        "threads": 2,
        "memory_bytes": 1e10,
        "caches": None,
        "call_seconds": 1e-6,
        "products": [
            {
                "m": m,
                "n": n,
                "k": 64,
                "dtype": "fp32",
                "routine": "torch",
                "seconds": 2 * m * n * 64 / 1e11,
                **timing,
            }
            for m in (64, 1024)
            for n in (64, 1024)
        ],
        "transfers": [
            {"operation": "copy", "working_set": size, "moved": size, "seconds": size / 1e10, **timing}
            for size in (10**5, 10**8)
        ],
        "elementwise": [
            {
                "operation": name,
                "dtype": "fp32",
                "tensor_bytes": size,
                "moved": size,
                "seconds": size / rate,
                **timing,
            }
            for name, rate in (("add", 1e10), ("silu", 5e9), ("softmax", 2e9), ("layer_norm", 1e9), ("exp", 5e9))
            for size in (10**5, 10**8)
        ],
        "attention": [
            {
                "length": 256,
                "head_dim": 64,
                "heads": 8,
                "dtype": "fp32",
                "direction": direction,
                "seconds": s,
                **timing,
            }
            for direction, s in (("forward", 1e-2), ("forward+backward", 4e-2))
        ],
        "environment": {},
    }
    return Measurement(**(given | more))


def test_a_measured_machine_by_hand() -> None:
    machine = Measured(measured())

    def seconds(name: str, **given: Any) -> float:
        return machine.of(operation(name, dtype=torch.float32, **given)).seconds

    assert seconds("mm", flops=1, shapes=((64, 64), (64, 1024))) == pytest.approx(2 * 64 * 64 * 1024 / 1e11)
    assert seconds("add", moved=2 * 10**6) == pytest.approx(2e-4 + 1e-6)
    assert seconds("silu", moved=2 * 10**6) == pytest.approx(4e-4 + 1e-6)
    assert seconds("_softmax", moved=2 * 10**6) == pytest.approx(1e-3 + 1e-6)
    assert seconds("native_layer_norm", moved=2 * 10**6) == pytest.approx(2e-3 + 1e-6)
    compared = machine.of(operation("eq", moved=2 * 10**6, dtype=torch.bool)).seconds
    assert compared == pytest.approx(1.2e-3 + 1e-6), "a million comparisons, as a million additions"
    work = 4 * 8 * 256**2 * 64
    shapes = ((1, 8, 256, 64),)
    flash = "_scaled_dot_product_flash_attention_for_cpu"
    assert seconds(flash, flops=work, shapes=shapes) == pytest.approx(1e-2, rel=1e-3)
    assert seconds(f"{flash}_backward", flops=5 * work // 2, shapes=shapes) == pytest.approx(3e-2, rel=1e-3)
    assert machine.of(operation("add", moved=8, dtype=torch.float32)).bound == "calls"


def test_a_measured_gpu_is_handed_its_calls_ahead_of_the_work() -> None:
    """A step takes as long as the calls or as the work, whichever is longer; on a CPU as both."""
    adding = operation("add", moved=2 * 10**6, dtype=torch.float32)
    cpu, gpu = (Measured(measured(device=device, call_seconds=1e-4)) for device in ("cpu", "cuda"))
    assert cpu.of(adding).seconds == pytest.approx(2e-4 + 1e-4) and gpu.of(adding).seconds == pytest.approx(2e-4)
    assert cpu.of_pass(2 * 10**6, 3).seconds - gpu.of_pass(2 * 10**6, 3).seconds == pytest.approx(1e-4)
    small = Trace([operation("add", moved=8, dtype=torch.float32) for _ in range(1000)])
    assert seconds_by_phase(small, gpu, compiled=False)["forward"] == pytest.approx(0.1)
    assert (cpu.of_calls(7), gpu.of_calls(7)) == (0.0, pytest.approx(7e-4))


def test_a_whole_step_takes_longer_with_more_of_everything() -> None:
    base: dict[str, Any] = {"vocab_size": 300, "context_length": 64, "d_model": 64, "layers": 2, "heads": 4}
    machine = Measured(measured())

    def total(rows: int = 2, compiled: bool = False, **changes: Any) -> float:
        config = ModelConfig(**(base | changes))
        step = trace_step(config, OptimConfig(), TrainConfig(), precision="fp32", micro_batch=rows)
        return sum(seconds_by_phase(step.trace, machine, compiled).values())

    plain = total()
    assert plain < total(rows=4) < total(rows=8)
    assert plain < total(layers=4) and plain < total(d_model=128) and plain < total(context_length=256)
    assert total(compiled=True) < plain


def test_a_measurement_without_passes_or_attention_still_tells_times() -> None:
    bare = measured(attention=[], elementwise=[])
    machine = Measured(bare)
    assert machine.of(operation("add", moved=10**9, dtype=torch.float32)).seconds >= 10**9 / bare.bandwidth
    attention = operation(
        "_scaled_dot_product_flash_attention_for_cpu", flops=10**9, shapes=((1, 2, 64, 16),), dtype=torch.float32
    )
    assert machine.of(attention).seconds >= 10**9 / bare.ceiling("fp32")


def test_what_was_not_measured_has_no_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On this machine, of which fp32 alone was measured."""
    monkeypatch.setattr(measurement, "load_measurement", lambda *_: measured())
    here = devices.this_machine

    def as_measured(device: torch.device) -> Device:
        return here(device).model_copy(update={"measured": True})

    monkeypatch.setattr(devices, "this_machine", as_measured)
    recipe = tmp_path / "tiny.toml"
    recipe.write_text("[model]\nvocab_size = 300\nd_model = 16\nlayers = 1\nheads = 2\ncontext_length = 32\n")
    answers = []
    for dtype in ("fp32", "bf16"):
        assert main(["resources", str(recipe), "--device", "cpu", "--dtype", dtype, "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0]["time"]["step"] > 0 and answers[1]["time"] is None
    assert "bf16 was not measured here" in answers[1]["target"]["notes"][0]
