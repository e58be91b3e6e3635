"""A killed run goes on as if nothing had happened, to the last digit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kill_points import KILL_POINTS
from safetensors.torch import load_file
from small_run import last_checkpoint, records

SCRIPT = Path(__file__).with_name("kill_points.py")
STEPPED = [name for name in KILL_POINTS if not name.startswith("after 0")]
TIMED = [name for name in KILL_POINTS if name.startswith("after 0")]


def kill_and_resume(folder: Path, names: list[str], *arguments: str) -> dict:
    result = folder / "result.json"
    subprocess.run(
        [sys.executable, SCRIPT, folder, result, *names, "--", *arguments],
        check=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return json.loads(result.read_text())


def assert_same_run(whole: Path, resumed: Path) -> None:
    assert records(resumed) == records(whole)
    first, second = last_checkpoint(whole), last_checkpoint(resumed)
    assert first.name == second.name
    for name in ("model.safetensors", "optimizer.safetensors"):
        left, right = load_file(first / name), load_file(second / name)
        assert left.keys() == right.keys()
        for key in left:
            assert left[key].equal(right[key]), key
    assert not [path for path in (resumed / "checkpoints").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--train.loader", "random", "--optim.optimizer", "adamw", "--train.accumulation", "2"),
        pytest.param(
            ("--train.document-boundaries", "True", "--optim.optimizer", "sgd", "--train.precision", "bf16"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["epoch-muon", "random-adamw-accumulation", "boundaries-sgd-bf16"],
)
def test_killed_at_any_point_the_run_goes_on_bit_for_bit(small: Path, arguments: tuple[str, ...]) -> None:
    names = STEPPED if not arguments else ["between checkpoints", "writing a checkpoint's optimizer"]
    results = kill_and_resume(small, names, *arguments)
    assert results.pop("uninterrupted") == 0
    for name, result in results.items():
        assert result["first"] == -signal.SIGKILL, name
        assert result["second"] == 0, f"{name}: {(small / 'output.txt').read_text()[-2000:]}"
        assert_same_run(small / "runs/whole", small / result["out"])


def test_killed_by_the_clock_the_run_goes_on_bit_for_bit(small: Path) -> None:
    results = kill_and_resume(small, TIMED)
    results.pop("uninterrupted")
    for name, result in results.items():
        assert result["first"] in (-signal.SIGKILL, 0), name
        assert result["second"] == 0, name
        assert_same_run(small / "runs/whole", small / result["out"])
    assert any(result["first"] == -signal.SIGKILL for result in results.values())


@pytest.mark.slow
def test_a_compiled_bf16_run_resumes_bit_for_bit(small: Path) -> None:
    results = kill_and_resume(small, ["between checkpoints"], "--train.compile", "on", "--train.precision", "bf16")
    assert results["between checkpoints"]["second"] == 0
    assert_same_run(small / "runs/whole", small / "runs/0")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_training_with_a_checkpoint_and_a_message(small: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "scratchlm", "train", "small.toml", "--train.steps", "100000"]
    metrics = small / "runs/small/metrics.jsonl"
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert f"{number.name}: stopped after step" in errors.splitlines()[-1]
    assert ("Ctrl-C again stops at once" in errors) == (number == signal.SIGINT)
    step = int(last_checkpoint(small / "runs/small").name.removeprefix("step-"))
    assert f"stopped after step {step:,} of 100,000" in errors
    state = json.loads((last_checkpoint(small / "runs/small") / "state.json").read_text())
    assert state["progress"]["step"] == step
