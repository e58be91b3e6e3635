"""Speed, utilisation and memory while a run goes on."""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_loop import MODEL, LossThat, RandomBatches, lines, trainer

from scratchlm.cli import main
from scratchlm.data.loader import Batch
from scratchlm.errors import UserError
from scratchlm.model import Transformer
from scratchlm.resources import measurement as measurement_module
from scratchlm.resources import utilisation
from scratchlm.resources.devices import Device, find
from scratchlm.resources.utilisation import mfu_on
from scratchlm.train.checkpoint import save_checkpoint
from scratchlm.train.live import Live, memory_in_use
from scratchlm.train.metrics import read_metrics

CPU = torch.device("cpu")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def device(measured: str | None = None, **peaks: float) -> Device:
    return Device(name="box", title="A Box", kind="cpu", peak_flops=peaks, measured=measured)


# --- by hand ------------------------------------------------------------------------------------------------------------


def test_speeds_are_those_of_the_interval() -> None:
    clock = Clock()
    live = Live(flops_per_token=5e6, memory=lambda: 7, clock=clock)
    clock.now += 1.0
    live.add(tokens=999, positions=999)
    live.restart()
    live.add(tokens=30, positions=40)
    clock.now += 2.0
    live.add(tokens=10, positions=40)
    clock.now += 2.0
    found, complaint = live.figures("fp32")
    assert found == {"tokens_per_second": 10.0, "flops_per_second": 5e6 * 20, "memory_bytes": 7}
    assert complaint is None
    assert live.postfix("fp32") == {"tok_s": "10", "mem": "0.00GB"}


def test_utilisation_is_flops_over_the_peak_of_the_precision() -> None:
    clock = Clock()
    peaks = {"bf16": 1e9, "fp32": 1e8}
    live = Live(1e6, lambda flops, precision: flops / peaks[precision], lambda: 1_234_567_890, clock)
    live.add(100, 100)
    clock.now += 10.0
    assert live.figures("bf16")[0]["mfu"] == pytest.approx(0.01)
    assert live.figures("fp32")[0]["mfu"] == pytest.approx(0.1)
    assert live.postfix("fp32") == {"tok_s": "10", "mfu": "10.0%", "mem": "1.23GB"}


def test_a_peak_that_nobody_knows_leaves_it_out() -> None:
    live = Live(1e6, lambda flops, precision: None, lambda: None)
    live.add(1, 1)
    assert live.figures("fp32")[0].keys() == {"tokens_per_second", "flops_per_second"}
    assert live.postfix("fp32").keys() == {"tok_s"}


# --- the peak -----------------------------------------------------------------------------------------------------------


def test_the_measured_peak_comes_before_the_printed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utilisation, "this_machine", lambda _: device("2026-01-01", fp32=4e9))
    monkeypatch.setattr("scratchlm.resources.utilisation.known", lambda: {"box": device(fp32=8e9, bf16=16e9)})
    share = mfu_on(CPU)
    assert share(1e9, "fp32") == pytest.approx(0.25)
    assert share(1e9, "bf16") == pytest.approx(1 / 16), "not measured, but printed"
    assert share(4.05e9, "fp32") == pytest.approx(4.05 / 4), "noise is not clipped"
    with pytest.raises(UserError, match=r"of 200 %: the measured peak of 0\.004 TFLOP/s of A Box in fp32 is wrong"):
        share(8e9, "fp32")
    with pytest.raises(UserError, match="the datasheet peak"):
        share(1e12, "bf16")


def test_a_known_device_has_its_makers_peak_and_an_unknown_one_none(monkeypatch: pytest.MonkeyPatch) -> None:
    h100 = find("h100-sxm")
    monkeypatch.setattr(utilisation, "this_machine", lambda _: h100)
    assert mfu_on(CPU)(1e14, "bf16") == pytest.approx(1e14 / h100.peak("bf16"))
    monkeypatch.setattr(utilisation, "this_machine", lambda _: device())
    assert mfu_on(CPU)(1e14, "bf16") is None


def test_the_machine_is_asked_once_per_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(utilisation, "this_machine", lambda given: asked.append(given) or device(fp32=1e9))
    share = mfu_on(CPU)
    assert [share(speed, "fp32") for speed in (1e8, 2e8, 3e8)] == pytest.approx([0.1, 0.2, 0.3])
    assert share(1.0, "bf16") is None and share(2.0, "bf16") is None
    assert asked == [CPU, CPU]


# --- in a run -----------------------------------------------------------------------------------------------------------


def test_lines_of_a_run_hold_them(tmp_path: Path) -> None:
    model = Transformer(MODEL, seed=0)
    run = trainer(tmp_path, model, utilisation=lambda flops, precision: flops / 1e15, train={"log_interval": 2})
    run.fit()
    found = [record for record in read_metrics(tmp_path / "metrics.jsonl") if record["kind"] == "train"]
    per_token = model.training_flops_per_token(MODEL.context_length)
    assert len(found) == 3
    for record in found:
        assert record["flops_per_second"] == pytest.approx(per_token * record["tokens_per_second"])
        assert record["mfu"] == pytest.approx(record["flops_per_second"] / 1e15)
        assert isinstance(record["memory_bytes"], int) and record["memory_bytes"] > 10_000_000


def test_the_command_line_shows_them(
    small: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(utilisation, "this_machine", lambda _: device("2026-01-01", fp32=1e13))
    assert main(["train", "small.toml", "--train.steps", "4"]) == 0
    (record,) = lines(small / "runs/small", "train")
    assert record["mfu"] == pytest.approx(record["flops_per_second"] / 1e13)
    bar = capfd.readouterr().err.replace("\r", "\n").splitlines()[-1]
    assert re.search(r"loss=\d\.\d+, lr=\S+, mem=\d\.\d\dGB, mfu=\d+\.\d%, tok_s=[\d,]+\]", bar), bar


def test_places_without_targets_are_computed_as_well(tmp_path: Path) -> None:
    model = Transformer(MODEL, seed=0)
    trainer(tmp_path, model, loader=RandomBatches(ignored=True), train={"steps": 3}).fit()
    share = (8 + 6 + 4 + 2) / 32
    for record in lines(tmp_path, "train"):
        per_place = model.training_flops_per_token(MODEL.context_length)
        assert record["flops_per_second"] * share == pytest.approx(per_place * record["tokens_per_second"])


def test_the_speed_of_a_line_is_that_of_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step takes two seconds of a pretended clock; validations and checkpoints take a hundred and do not count."""
    clock = Clock()

    class Slow(RandomBatches):
        def next_batch(self) -> Batch:
            clock.now += 2.0
            return super().next_batch()

    def validate() -> dict[str, float]:
        clock.now += 100.0
        return {"loss": 1.0}

    def save(*given: Any) -> None:
        clock.now += 100.0
        save_checkpoint(*given)

    monkeypatch.setattr("scratchlm.train.loop.save_checkpoint", save)
    monkeypatch.setattr("scratchlm.train.loop.Live", lambda *given: Live(*given, clock=clock))
    # Step 8 is validated and, being no better, not saved; step 10 is saved and not validated.
    train = {"log_interval": 2, "eval_interval": 4, "checkpoint_interval": 10, "steps": 14}
    run = trainer(tmp_path, loader=Slow(), validate=validate, train=train)
    run.fit()
    assert [record["tokens_per_second"] for record in lines(tmp_path, "train")] == pytest.approx([16.0] * 7)


def test_an_impossible_utilisation_is_one_event_and_the_run_goes_on(tmp_path: Path) -> None:
    message = "model FLOPs utilisation of 300 %: the measured peak is wrong"
    asked: list[float] = []

    def wrong(flops: float, precision: str) -> float:
        asked.append(flops)
        if len(asked) > 4:
            raise UserError(message)
        return 0.5

    said: list[str] = []
    state = trainer(tmp_path, utilisation=wrong, said=said, train={"steps": 6}).fit()
    assert state.step == 6 and state.skipped == 0
    events = lines(tmp_path, "event")
    assert [event["message"] for event in events] == [f"no utilisation is shown: {message}"]
    assert [line for line in said if message in line] == [events[0]["message"]]
    with_it = [record["step"] for record in lines(tmp_path, "train") if "mfu" in record]
    assert with_it == [1, 2] and events[0]["step"] == 3
    assert len(asked) == 6, "asked in the bar and at the line, until it was found wrong"


def test_a_bar_says_nothing_of_a_wrong_peak() -> None:
    def wrong(flops: float, precision: str) -> float:
        raise UserError("wrong")

    live = Live(1e6, wrong, lambda: None)
    assert live.postfix("fp32").keys() == {"tok_s"} and live.utilisation is wrong
    assert live.figures("fp32")[1] == "no utilisation is shown: wrong"
    assert live.figures("fp32")[1] is None


def test_a_damaged_measurement_does_not_stop_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "device.json").write_text("{")
    monkeypatch.setattr(measurement_module, "default_path", lambda: tmp_path / "device.json")
    trainer(tmp_path, utilisation=mfu_on(CPU)).fit()
    (event,) = lines(tmp_path, "event")
    assert str(tmp_path / "device.json") in event["message"]
    assert all("mfu" not in record for record in lines(tmp_path, "train"))


def test_speed_is_finite_and_json_whatever_happens(tmp_path: Path) -> None:
    model = Transformer(MODEL, seed=0)
    trainer(tmp_path, model, loss=LossThat(model, {2, 3}), train={"log_interval": 1}).fit()
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert record["kind"] != "train" or 0 < record["flops_per_second"] < math.inf


# --- memory -------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_memory_of_a_cpu_is_the_resident_set() -> None:
    before = memory_in_use(CPU)
    block = mmap.mmap(-1, 200_000_000)
    block.write(bytes(200_000_000))  # until then they are only promised
    after = memory_in_use(CPU)
    assert before is not None and after is not None
    assert 190e6 < after - before < 230e6
    assert after < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    block.close()


def test_memory_of_a_gpu_is_what_torch_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 123)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 45)
    assert memory_in_use(torch.device("cuda")) == 123
    assert memory_in_use(torch.device("mps")) == 45
