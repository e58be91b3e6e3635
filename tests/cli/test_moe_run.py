"""A run of a mixture of experts, end to end: what is logged and shown about its experts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scratchlm.cli import main
from scratchlm.interop import load


def test_a_mixture_trains_and_says_what_its_experts_do(small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fields = ["--model.moe.experts", "4", "--model.moe.top-k", "1", "--model.moe.bias-update", "0.01"]
    fields += [
        "--model.mtp-depth",
        "1",
        "--train.z-loss",
        "1e-4",
        "--train.steps",
        "6",
        "--train.log-interval",
        "2",
    ]
    assert main(["run", "small.toml", *fields]) == 0
    said = capfd.readouterr().out
    folder = small / "runs/small"
    model, _ = load(folder)
    layers, active = model.config.layers, model.num_active_params()
    assert f"{model.num_params():,} parameters, {active:,} active per token" in said
    assert json.loads((folder / "environment.json").read_text())["active_parameters"] == active
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in trained] == [2, 4, 6]
    for line in trained:
        assert len(line["expert_load"]) == layers + 1, "every layer's router and that of the prediction module"
        for load_of_layer in line["expert_load"]:
            assert len(load_of_layer) == 4 and sum(load_of_layer) == sum(line["expert_load"][0])
        worst = max(max(loads) * 4 / sum(loads) for loads in line["expert_load"])
        assert line["expert_max_over_mean"] == pytest.approx(worst, rel=1e-5)
        assert line["expert_dropped"] == 0 and 0 < line["router_entropy"] <= 1.3863
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert f"{active:,} per token" in page and "Busiest expert" in page
    corrections = [m.correction for m in model.modules() if getattr(m, "correction", None) is not None]
    assert len(corrections) == layers + 1
    assert all(c.any() and float(c.abs().max()) <= 0.06 + 1e-6 for c in corrections), "six steps of ±0.01"
