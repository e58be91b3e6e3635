"""benchmarks/resources_cuda.py does what it says; here on a CPU, where torch's CUDA allocator is a made-up one."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from scratchlm.resources.measure import Plan, measure
from scratchlm.resources.measurement import store

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CPU = torch.device("cpu")
TINY: dict[str, Any] = {"vocab_size": 64, "context_length": 16, "d_model": 16, "layers": 1, "heads": 2}
PLAN = Plan(((8, 8, 8), (16, 16, 16)), (2**12, 2**13), (2**12,), (8,), 8, 1, 1.0, 1.0, 1e-5)


class Allocator:
    """Every phase takes 1,000 bytes more than the one before; 500 were out before."""

    def __init__(self) -> None:
        self.peak, self.resets = 500, 0

    def max_memory_allocated(self, device: Any) -> int:
        self.peak += 1000
        return self.peak

    def memory_allocated(self, device: Any) -> int:
        self.peak = 500
        return 500

    def memory_stats(self, device: Any) -> dict[str, int]:
        return {"requested_bytes.all.peak": self.peak - 100, "requested_bytes.all.current": 400}

    def reset_peak_memory_stats(self, device: Any) -> None:
        self.resets += 1


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("resources_cuda")
    allocator = Allocator()
    for name in ("max_memory_allocated", "memory_allocated", "memory_stats", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, getattr(allocator, name))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return module


@pytest.mark.slow
def test_a_run_on_a_made_up_gpu(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = {
        "dense": bench.gpu("bf16", 2, model=TINY),
        "broken": bench.gpu("bf16", 2, model=TINY | {"heads": 3}),
        "accumulation": bench.gpu("fp32", 2, model=TINY, train={"accumulation": 2}),
        "compiled": bench.gpu("fp32", 2, model=TINY, compile=True),
    }
    monkeypatch.setattr(bench, "CASES", cases)
    monkeypatch.setattr(bench, "TIMED", ["dense", "broken"])
    stored = tmp_path / "measured.json"
    store(measure(CPU, ["fp32", "bf16"], PLAN), stored)
    bench.main(["--device", "cpu", "--eager", "--steps", "2", "--measurement", str(stored), "--out", str(tmp_path)])
    memory, times = (json.loads((tmp_path / f"cuda-{what}.json").read_text()) for what in ("memory", "time"))
    assert [row["case"] for row in memory["results"]] == ["dense", "broken", "accumulation"]
    dense, broken, accumulation = memory["results"]
    assert dense["first"] == 3000 and dense["measured"] == 9000 and dense["requested"] == 9000, (
        "steps of three phases"
    )
    assert set(dense["phases"]) == {"forward", "backward", "optimizer"}
    assert dense["phases"]["backward"]["measured"] == 8000
    assert dense["error"] == dense["predicted"] / 9000 - 1
    assert sum(dense["at_peak"].values()) == dense["predicted"] and dense["configuration"] == cases["dense"]
    assert accumulation["measured"] == 15000, "two micro-batches a step"
    assert "heads" in broken["failed"] and "error" not in broken
    assert (
        memory["command"].startswith("python benchmarks/resources_cuda.py --device cpu") and memory["environment"]
    )
    assert [row["case"] for row in times["results"]] == ["dense", "broken"]
    row = times["results"][0]
    assert 0 < row["spread"][0] <= row["measured"] <= row["spread"][1] and row["predicted"] > 0
    assert list(row["by"]) == ["measured"] == list(times["machines"])
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["memory"]["cases"] == 3 and summary["memory"]["failed"] == 1
    assert summary["time"]["cases"] == 2 and summary["time"]["median_error"] >= 0


def test_after_its_time_it_begins_nothing(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(["--device", "cpu", "--what", "memory", "--only", "dense bf16", "wide", "--budget", "0"])
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary == {"memory": {"cases": 2, "failed": 2}}


def test_a_machine_that_was_not_measured_is(bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "QUICK", PLAN)
    nowhere = tmp_path / "none.json"
    assert list(bench.machines_of(CPU, nowhere, tmp_path)) == ["measured"]
    first = (tmp_path / "cuda-device.json").read_bytes()
    assert list(bench.machines_of(CPU, nowhere, tmp_path)) == ["measured"]
    assert (tmp_path / "cuda-device.json").read_bytes() == first, "the second time it was there"
    monkeypatch.setattr(bench, "measure", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(
        bench, "match", lambda *_: importlib.import_module("scratchlm.resources.devices").find("h200")
    )
    assert list(bench.machines_of(CPU, nowhere, None)) == ["datasheet"]


def test_the_configurations(bench: Any) -> None:
    """They are legal, their names are unique to one list, and the compiled ones come last."""
    from resources import sections  # type: ignore[import-not-found]

    for given in bench.CASES.values():
        sections(given)
    compiled = [given["compile"] for given in bench.CASES.values()]
    assert compiled == sorted(compiled) and sum(compiled) >= 3 and len(compiled) >= 18
    assert set(bench.TIMED) <= set(bench.CASES) and len(bench.TIMED) >= 8


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main([])
    assert "no CUDA device" in capsys.readouterr().err
