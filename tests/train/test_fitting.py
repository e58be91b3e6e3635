"""Micro-batches that fit the memory: what is chosen, and that trying it changes nothing."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_run import records
from test_loop import MODEL, RandomBatches, lines, trainer
from torch import Tensor

from scratchlm.cli import main
from scratchlm.config import OptimConfig, TrainConfig
from scratchlm.data.loader import Batch
from scratchlm.errors import UserError
from scratchlm.model import ModelConfig, Transformer
from scratchlm.resources.plan import plan_of
from scratchlm.resources.step import trace_step
from scratchlm.train import fitting
from scratchlm.train.fitting import Need, Plan
from scratchlm.train.loop import Trainer
from scratchlm.train.loss import NextTokenLoss

CPU = torch.device("cpu")
AUTO = {"micro_batch": "auto"}


def simple_plan(per_sequence: int = 100, fixed: int = 1000) -> Plan:
    """Bytes along a straight line, and random batches as `RandomBatches` gives them."""

    def probe(sequences: int) -> Batch:
        ids = torch.randint(MODEL.vocab_size, (sequences, 8))
        return Batch(ids, torch.randint(MODEL.vocab_size, (sequences, 8)))

    return Plan(lambda micro_batch, parts, precision, compiled: Need(fixed + per_sequence * micro_batch), probe)


def weights(run: Trainer) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in run.model.state_dict().items()}


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


# --- arithmetic ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 300))
def test_divisors_and_the_next_smaller_one(number: int) -> None:
    expected = [n for n in range(1, number + 1) if number % n == 0]
    assert fitting.divisors(number) == expected
    for n in expected:
        below = [other for other in expected if other <= n / 2]
        assert fitting.smaller(number, n) == (below[-1] if below else None)


@given(st.integers(1, 200), st.integers(0, 500), st.integers(1, 50), st.integers(0, 12_000))
def test_the_largest_that_fits(batch_size: int, fixed: int, slope: int, budget: int) -> None:
    asked = []

    def need(micro_batch: int) -> Need:
        assert batch_size % micro_batch == 0
        asked.append(micro_batch)
        return Need(fixed + slope * micro_batch + micro_batch**2 // 100)  # convex, as peaks are

    found, needed, fits = fitting.largest(batch_size, budget, need)
    within = [n for n in range(1, batch_size + 1) if batch_size % n == 0 and need(n).peak <= budget]
    assert (found, fits) == ((max(within), True) if within else (1, False))
    assert needed == need(found)
    assert asked[0] == batch_size, "what most batches do comes first"


def test_a_memory_limit_is_a_size() -> None:
    assert TrainConfig(memory_limit="1.5 TiB").memory_limit == "1.5 TiB"
    with pytest.raises(UserError, match=r"memory_limit.*write it like 80GB"):
        TrainConfig(memory_limit="much")


def test_sizes_are_written() -> None:
    for size, text in (
        (999, "999 bytes"),
        (1500, "1.5 kB"),
        (12_345_678, "12.3 MB"),
        (80e9, "80 GB"),
        (2e12, "2,000 GB"),
    ):
        assert fitting.readable(size) == text


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({}, 1), ({"accumulation": 4}, 4), ({"micro_batch": 4}, 4), ({"micro_batch": 4, "accumulation": "auto"}, 4),
        ({"micro_batch": 4, "accumulation": 4}, 4), ({"accumulation": "auto"}, None), (AUTO, None), ({"micro_batch": 16}, 1),
        ({"micro_batch": "auto", "accumulation": "auto"}, None), ({"micro_batch": "auto", "accumulation": 8}, 8),
    ],
)  # fmt: skip
def test_what_the_recipe_demands(values: dict[str, Any], parts: int | None) -> None:
    assert TrainConfig(batch_size=16, **values).parts == parts


# --- memory of the device -----------------------------------------------------------------------------------------------


def test_memory_of_a_cpu_is_the_least_of_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    for system, group, space, expected in (
        (900, 700, 800, 750), (600, None, None, 650), (None, None, 5, 55), (None, None, None, None), (900, 0, 800, 50),
    ):  # fmt: skip
        for name, value in (("_system_left", system), ("_group_left", group), ("_address_space_left", space)):
            monkeypatch.setattr(fitting, name, lambda value=value: value)
        assert fitting.memory_budget(CPU, held=50) == expected


def test_memory_left_is_what_the_kernel_says(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text(
        "MemTotal:       24000000 kB\nMemAvailable:    7000000 kB\nHugePages_Total:       0\n"
    )
    (tmp_path / "stat").write_text("anon 5\ninactive_file 123\n")
    assert fitting._numbers(str(tmp_path / "meminfo"))["MemAvailable"] == 7_000_000
    assert fitting._numbers(str(tmp_path / "stat")) == {"anon": 5, "inactive_file": 123}
    assert fitting._numbers(str(tmp_path / "none")) == {}
    if sys.platform == "linux":
        left, total = fitting._system_left(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        assert left is not None and 0.001 * total < left <= total


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of address space is Linux's")
def test_a_cpu_refuses_memory_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the system would promise and then kill for is an error while a split is tried, and only then."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    monkeypatch.setattr(fitting, "_system_left", lambda: 100_000_000)
    monkeypatch.setattr(fitting, "_group_left", lambda: None)
    with fitting.refused_not_killed(CPU):
        torch.empty(1_000_000)
        with pytest.raises(RuntimeError) as caught:
            torch.empty(500_000_000)  # more than what tests before it may have left to the heap
    assert fitting.is_out_of_memory(caught.value)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    torch.empty(500_000_000)
    for device, left in (("cuda", 100), ("cpu", None)):
        monkeypatch.setattr(fitting, "_system_left", lambda left=left: left)
        with fitting.refused_not_killed(torch.device(device)):
            assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_memory_of_a_gpu_is_what_is_free_and_what_torch_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (300, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 40)
    assert fitting.memory_budget(torch.device("cuda"), held=30) == 340


def test_tensors_that_share_memory_are_held_once() -> None:
    base = torch.zeros(10)
    assert (
        fitting.held_bytes([base, base.view(2, 5), base[3:], torch.zeros(3), torch.zeros(9, device="meta")], CPU)
        == 52
    )


# --- the choice ---------------------------------------------------------------------------------------------------------


def test_the_choice_is_what_the_estimate_says(tmp_path: Path) -> None:
    """At nine tenths of a limit a peak still fits; a byte less, and the next divisor is taken."""
    base = TrainConfig(batch_size=6, precision="fp32")
    optim = OptimConfig()
    peaks = {
        n: trace_step(MODEL, optim, base, precision="fp32", micro_batch=n, accumulation=6 // n).trace.peak()[1]
        for n in (1, 2, 3, 6)
    }
    assert sorted(peaks.values()) == list(peaks.values())
    plan = plan_of(MODEL, optim, base)
    plan = Plan(functools.cache(plan.need), plan.probe)
    for n, less in ((6, 3), (3, 2), (2, 1)):
        for limit, expected in ((peaks[n] / 0.9 + 1, n), (peaks[n] / 0.9 - 2, less)):
            said: list[str] = []
            train = TrainConfig(batch_size=6, memory_limit=f"{int(limit)}B", **AUTO)
            found, need = fitting.choose(train, "fp32", False, CPU, 0, plan, said.append)
            assert (found, need.peak) == (expected, peaks[expected])
            assert len(said) == 1 and said[0].startswith(f"micro-batches of {expected}, {6 // expected} per step: ")
    params = sum(p.numel() for p in Transformer(MODEL, seed=0).parameters())
    assert need.state == pytest.approx(8 * params, rel=0.01), "AdamW's two moments"


def test_a_limit_that_one_sequence_exceeds(tmp_path: Path) -> None:
    train = TrainConfig(batch_size=4, memory_limit="1kB", **AUTO)
    with pytest.raises(
        UserError, match=r"train\.memory_limit = 1kB: one sequence needs 1\.1 kB, and 10% stay free"
    ):
        fitting.choose(train, "fp32", False, CPU, 0, simple_plan(), print)


def test_the_compiler_takes_its_share_of_a_cpus_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is free, not of a limit that the recipe sets: that one is for the model."""
    plan, cuda = simple_plan(), torch.device("cuda")
    monkeypatch.setattr(fitting, "memory_budget", lambda device, held: fitting.COMPILER + 1600)
    train = TrainConfig(batch_size=4, **AUTO)
    for compiled, device, expected in ((True, CPU, 4), (True, cuda, 4), (False, CPU, 4)):
        assert fitting.choose(train, "fp32", compiled, device, 0, plan, print)[0] == expected
    monkeypatch.setattr(fitting, "memory_budget", lambda device, held: fitting.COMPILER + 1300)
    for compiled, device, expected in ((True, CPU, 1), (True, cuda, 4), (False, CPU, 4)):
        assert fitting.choose(train, "fp32", compiled, device, 0, plan, print)[0] == expected
    limited = TrainConfig(batch_size=4, memory_limit="1600B", **AUTO)
    monkeypatch.setattr(fitting, "memory_budget", lambda device, held: 2 * fitting.COMPILER)
    assert fitting.choose(limited, "fp32", True, CPU, 0, plan, print)[0] == 4


def test_memory_that_is_free_is_tried_even_if_the_estimate_says_no(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(fitting, "memory_budget", lambda device, held: 1000 + held)
    assert (
        fitting.choose(TrainConfig(batch_size=4, **AUTO), "fp32", False, CPU, 0, simple_plan(), said.append)[0] == 1
    )
    assert said.pop().endswith("1.1 kB of 1 kB by the estimate, to be tried")
    assert (
        fitting.choose(TrainConfig(batch_size=4, **AUTO), "fp32", False, CPU, 600, simple_plan(), said.append)[0]
        == 4
    )
    monkeypatch.setattr(fitting, "memory_budget", lambda device, held: None)
    assert (
        fitting.choose(TrainConfig(batch_size=4, **AUTO), "fp32", False, CPU, 0, simple_plan(), said.append)[0] == 4
    )
    assert "does not tell" in said[-1]


def test_the_probe_is_shaped_as_the_loaders_batches() -> None:
    for boundaries in (False, True):
        train = TrainConfig(document_boundaries=boundaries)
        batch = plan_of(MODEL, OptimConfig(), train).probe(3)
        assert batch.inputs.shape == batch.targets.shape == (3, MODEL.context_length)
        assert set(batch.inputs.flatten().tolist()) <= set(range(MODEL.vocab_size))
        if boundaries:
            assert batch.positions[2].tolist() == list(range(8)) and batch.documents.shape == (3, 8)
        else:
            assert batch.positions is batch.documents is None


# --- trying it changes nothing ------------------------------------------------------------------------------------------

MODELS = {
    "dense": MODEL,
    "dropout": MODEL.model_copy(update={"residual_dropout": 0.3, "embedding_dropout": 0.1}),
    "experts that move biases": ModelConfig(
        **MODEL.model_dump(include={"vocab_size", "context_length", "d_model", "layers", "heads"}),
        moe={"experts": 4, "top_k": 2, "bias_update": 0.1},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_verification_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    config = MODELS[name]
    model = Transformer(config, seed=0)
    run = trainer(tmp_path / "auto", model, plan=simple_plan(), train={**AUTO, "memory_limit": "1500B"})
    calls: list[int] = []
    gradients = Trainer._gradients

    def counted(self: Trainer, micro_batches: list[Any], tokens: int) -> Tensor:
        calls.append(len(micro_batches[0].inputs))
        return gradients(self, micro_batches, tokens)

    monkeypatch.setattr(Trainer, "_gradients", counted)
    monkeypatch.setattr(Trainer, "_run", lambda self: None)
    before = weights(run)
    run.fit()
    assert calls == [2], "one step was tried"
    after = torch.get_rng_state()
    torch.manual_seed(run.seed)
    assert torch.equal(after, torch.get_rng_state())
    assert_equal(weights(run), before)
    assert run.optimizers.named_state() == {}
    assert all(p.grad is None for p in model.parameters())
    assert run.loss.extra() is None and run.loader.place == 0  # type: ignore[attr-defined]
    assert lines(tmp_path / "auto", "event") == []


@pytest.mark.parametrize("name", MODELS)
def test_a_fitted_run_is_the_run_with_that_number(tmp_path: Path, name: str) -> None:
    ends = {}
    for folder, train in (("auto", {**AUTO, "memory_limit": "1400B"}), ("number", {"accumulation": 2})):
        run = trainer(tmp_path / folder, Transformer(MODELS[name], seed=0), plan=simple_plan(), train=train)
        run.fit()
        assert run.parts == 2
        ends[folder] = weights(run)
    assert_equal(ends["auto"], ends["number"])
    assert records(tmp_path / "auto") == records(tmp_path / "number")


def test_the_verified_step_finds_the_optimizers_room_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    plan = simple_plan()
    with_state = Plan(lambda *given: Need(plan.need(*given).peak, 12_345), plan.probe)
    monkeypatch.setattr(fitting, "occupied", lambda size, device: asked.append(size))
    trainer(tmp_path, plan=with_state, train={**AUTO, "memory_limit": "1MB", "steps": 1}).fit()
    assert asked == [12_345]
    monkeypatch.undo()
    assert fitting.occupied(1000, CPU).nbytes == 1000
    assert fitting.occupied(1000, CPU).count_nonzero() == 1000, "written: pages of zeros are only promised"
    with pytest.raises(UserError, match=r"the optimizer's state of 36,028,797 GB does not fit the memory of cpu"):
        fitting.occupied(2**55, CPU)


# --- the whole of it ----------------------------------------------------------------------------------------------------


def test_the_command_line_fits_by_the_estimate(small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "small.toml", "--train.steps", "3", "--train.micro_batch", "auto", "--out", "whole"]) == 0
    shown = capfd.readouterr().out
    found = re.search(r"micro-batches of 4, 1 per step: ([\d.]+) MB of .* by the estimate", shown)
    assert found, shown
    limit = f"{float(found[1]) / 0.9 - 0.02:.3f}MB"  # a little less than all four need
    arguments = ["--train.steps", "3", "--train.accumulation", "auto", "--train.memory_limit", limit]
    assert main(["train", "small.toml", *arguments, "--out", "fitted"]) == 0
    assert "micro-batches of 2, 2 per step" in capfd.readouterr().out
    assert main(["train", "small.toml", "--train.steps", "3", "--train.micro_batch", "2", "--out", "number"]) == 0
    assert records(small / "fitted") == records(small / "number")


LIMITED = """
import resource, sys
from pathlib import Path
from test_fitting import limited_run
from scratchlm.train.fitting import _address_space

folder, extra, micro_batch = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
limited_run(folder / "warm", 1).fit()  # what is imported and started on the way is there before the limit
resource.setrlimit(resource.RLIMIT_AS, (_address_space() + extra,) * 2)
run = limited_run(folder / "run", micro_batch if micro_batch == "auto" else int(micro_batch))
run.fit()
print("parts", run.parts)
"""
LARGE = ModelConfig(vocab_size=12288, context_length=128, d_model=16, layers=1, heads=1)
LARGE_OPTIM = OptimConfig(warmup_steps=0)
LARGE_TRAIN = TrainConfig(steps=1, batch_size=32, precision="fp32", compile="off", loss_kernel="reference")


def limited_run(folder: Path, micro_batch: Any) -> Trainer:
    """One step of 32 sequences, whose logits are nearly all of its memory."""
    train = LARGE_TRAIN.model_copy(update={"micro_batch": micro_batch})
    plan = plan_of(LARGE, LARGE_OPTIM, train)

    class Loader(RandomBatches):
        def next_batch(self) -> Batch:
            batch: Batch = plan.probe(32)
            return batch

    model = Transformer(LARGE, seed=0)
    loss = NextTokenLoss(model, "reference")
    options = {"config": train, "optim": LARGE_OPTIM, "plan": plan, "say": lambda line: print(line, flush=True)}
    run = trainer(folder, model, loss=loss, loader=Loader())
    return dataclasses.replace(run, **options)


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of address space is Linux's")
def test_under_a_real_limit_the_choice_runs_and_its_double_does_not(tmp_path: Path) -> None:
    plan = plan_of(LARGE, LARGE_OPTIM, LARGE_TRAIN)
    eight, sixteen = (plan.need(n, 32 // n, "fp32", False).peak for n in (8, 16))
    limit = int(1.35 * eight)
    assert eight < 0.9 * limit and limit < sixteen
    root = Path(__file__).parent
    paths = os.pathsep.join(map(str, (root, root.parent, root.parent.parent)))
    processes = {
        micro_batch: subprocess.Popen(
            [sys.executable, "-c", LIMITED, tmp_path / micro_batch, str(limit), micro_batch],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        )
        for micro_batch in ("auto", "16")
    }  # fmt: skip
    (auto, auto_error), (_, double_error) = (process.communicate(timeout=120) for process in processes.values())
    assert processes["auto"].returncode == 0, auto_error
    assert "micro-batches of 8, 4 per step" in auto and auto.splitlines()[-1] == "parts 4", auto
    assert processes["16"].returncode == 1
    assert "out of memory at step 1 with 16 sequences at once: set train.micro_batch = auto" in double_error
