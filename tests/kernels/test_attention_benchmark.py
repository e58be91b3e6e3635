"""benchmarks/attention.py and benchmarks/gpu.sh do what they say, at sizes that take a second."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def run(*options: str, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "benchmarks" / "attention.py", "--device", "cpu", "--out", out, *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_a_small_grid(tmp_path: Path) -> None:
    sizes = "--widths", "8", "16", "--lengths", "32", "64", "--dtypes", "fp32", "bf16"
    done = run(
        *sizes, "--rounds", "2", "--least", "0", "--memory-gib", "0.00005", "--remark", "A test.", out=tmp_path
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["cases"] == 2 * 2 * (2 * 4 - 1) and summary["left_out"] == 2 * 2, "the formula's scores at 64"
    found = json.loads((tmp_path / "results.json").read_text())
    measured = [row for row in found["results"] if "seconds" in row]
    assert {row["kernel"] for row in measured} == {"naive", "sdpa", "flash (ours)", "blocked (ours)"}
    for row in measured:
        assert set(row["seconds"]) == {"forward", "backward", "both"}
        assert all(len(times) == 2 and min(times) > 0 for times in row["seconds"].values())
    worst = {
        dtype: max(
            max(row[name] for name in ("out", "d_q", "d_k", "d_v"))
            for row in found["errors"]
            if row["dtype"] == dtype
        )
        for dtype in ("fp32", "bf16")
    }
    assert 0 < worst["fp32"] < 1e-5 < worst["bf16"] < 5e-2
    text = (tmp_path / "README.md").read_text()
    assert "A test." in text and "its scores do not fit" in text and "| fp32 | 16 | 64 | flash (ours) |" in text


def test_what_it_cannot_do_it_says(tmp_path: Path) -> None:
    done = run("--lengths", "0", out=tmp_path)
    assert done.returncode == 2 and "must be at least 1" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_set_for_a_gpu_says_that_there_is_none(tmp_path: Path) -> None:
    environment = {**os.environ, "OUT": str(tmp_path / "out"), "PYTHON": sys.executable}
    done = subprocess.run([ROOT / "benchmarks" / "gpu.sh"], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "no CUDA device" in done.stderr
