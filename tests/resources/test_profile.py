"""Profiling a training step: phases against a clock of our own, tables against the model."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from profile_recipes import MODEL, Batches, recipe
from torch import Tensor, nn

from scratchlm.model import ModelConfig, Transformer
from scratchlm.model.feedforward import FeedForward
from scratchlm.resources import profile as profile_module
from scratchlm.resources.profile import profile
from scratchlm.resources.profile_table import (
    HEAD_AND_LOSS,
    MODULE,
    MarkedLoss,
    ModuleRow,
    by_place,
    marked_modules,
    module_rows,
)
from scratchlm.resources.profile_timing import PHASES, PhaseClock, Statistics, SteppingTrainer, phase_ranges
from scratchlm.train.loop import Trainer
from scratchlm.train.loss import NextTokenLoss


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """One profile that several tests look at."""
    out = tmp_path_factory.mktemp("profiles") / "one"
    return profile(recipe(), out, steps=4, warmup=1, say=lambda line: None), out


# --- time ------------------------------------------------------------------------------------------------------------


def test_percentiles_are_those_of_known_durations() -> None:
    found = Statistics.of([5.0, 1.0, 4.0, 2.0, 3.0])
    assert (found.mean, found.min, found.p50, found.max) == (3.0, 1.0, 3.0, 5.0)
    assert found.std == pytest.approx(math.sqrt(10 / 4))
    assert (found.p10, found.p90, found.p99) == pytest.approx((1.4, 4.6, 4.96))  # by hand: 1 + 4 p
    assert Statistics.of([2.0]).std == 0.0


def test_phases_are_told_apart_and_leave_no_gap() -> None:
    """A clock that is 1, 2, 4, 8 … at its readings: each interval is another power of two."""
    readings = iter([2.0**n for n in range(20)])
    clock = PhaseClock(lambda: next(readings))
    for phase in ("loader", "other", "forward", "backward", "forward", "backward", "optimizer"):
        clock.enter(phase)
    spent = clock.leave()
    assert spent == {
        "loader": 1.0, "other": 2.0, "forward": 4.0 + 16.0, "backward": 8.0 + 32.0, "optimizer": 64.0, "step": 127.0,
    }  # fmt: skip
    clock.enter("loader")
    assert clock.leave()["step"] == 2.0**8  # nothing of the step before


def test_what_an_observer_takes_is_no_part_of_the_step_and_the_device_is_waited_for() -> None:
    now, waits, told = [0.0], [], []
    clock = PhaseClock(lambda: now[0], wait=lambda: waits.append(now[0]))
    clock.observers.append(lambda phase: (told.append(phase), now.__setitem__(0, now[0] + 100)))
    clock.enter("loader")
    now[0] += 1
    clock.enter("forward")
    now[0] += 2
    spent = clock.leave()
    assert (spent["loader"], spent["forward"], spent["step"]) == (1.0, 2.0, 3.0)
    assert told == ["loader", "forward", None]
    assert waits == [0.0, 101.0, 203.0]


def test_the_injected_clock_decides_every_figure(folder: Path) -> None:
    """Each reading is one second after the last: loader, other, forward, backward, optimizer are a second each."""
    ticks = itertools.count()
    found = profile(
        recipe(),
        "out",
        steps=3,
        warmup=2,
        say=lambda line: None,
        clock=lambda: float(next(ticks)),
        loader=Batches(),
    )
    assert {name: found.phases[name].mean for name in PHASES} == dict.fromkeys(PHASES, 1.0)
    assert found.phases["step"].mean == 5.0 and found.phases["forward + backward"].p99 == 2.0
    assert found.tokens_per_step == 32 and found.tokens_per_second == pytest.approx(32 / 5)
    assert found.loader["share"] == pytest.approx(0.2)
    assert found.warmup == [5.0, 5.0] and found.first_step == 5.0


def test_accumulation_adds_up_its_parts(folder: Path) -> None:
    ticks = itertools.count()
    options = {"steps": 2, "warmup": 1, "say": lambda line: None}
    found = profile(
        recipe(train={"accumulation": 4}), "out", clock=lambda: float(next(ticks)), loader=Batches(), **options
    )
    assert found.phases["forward"].mean == found.phases["backward"].mean == 4.0
    assert found.phases["step"].mean == 11.0 and found.tokens_per_step == 32


def test_micro_batches_are_fitted_as_in_a_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fits on this machine is 4 at once; when a step then runs out of memory, it goes on in halves."""
    calls, said = [0], []
    counted = MarkedLoss.__call__

    def scarce(self: Any, batch: Any) -> Tensor:
        calls[0] += 1
        if calls[0] > 1 and len(batch.inputs) > 2:  # the first one is the trial before the steps
            raise torch.OutOfMemoryError("out of memory")
        return counted(self, batch)

    monkeypatch.setattr(MarkedLoss, "__call__", scarce)
    ticks = itertools.count()
    found = profile(
        recipe(train={"micro_batch": "auto"}),
        "out",
        steps=2,
        warmup=1,
        say=said.append,
        clock=lambda: float(next(ticks)),
    )
    assert found.settings["accumulation"] == 2 and found.tokens_per_step == 32
    assert any("going on with micro-batches of 2" in line for line in said)
    # Nothing of the trial; loader, other, the forward pass that failed, two halves each way, optimizer.
    assert found.warmup == [8.0] and found.phases["step"].mean == 7.0


def test_phases_add_up_to_the_step(measured: tuple[Any, Path]) -> None:
    found, _ = measured
    assert sum(found.phases[name].mean for name in PHASES) == pytest.approx(found.phases["step"].mean)
    assert all(found.phases[name].min > 0 for name in PHASES)
    both = found.phases["forward"].mean + found.phases["backward"].mean
    assert found.phases["forward + backward"].mean == pytest.approx(both)
    assert found.tokens_per_second == pytest.approx(32 / found.phases["step"].mean)


def test_a_slow_loader_is_seen(folder: Path) -> None:
    found = profile(recipe(), "out", steps=2, warmup=1, say=lambda line: None, loader=Batches(seconds=0.2))
    assert found.phases["loader"].min >= 0.2 and found.loader["seconds_per_batch"] >= 0.2
    assert found.loader["share"] > 0.5


def test_free_running_steps_are_waited_for_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA: before and after all of them, and not at the phases; later ones wait at the phases again."""
    waits, now = [], itertools.count()
    whole = recipe()
    model = Transformer(whole.model, seed=0)
    trainer = SteppingTrainer(
        model=model, loss=NextTokenLoss(model), loader=Batches(), config=whole.train, optim=whole.optim, folder=folder,
        device=torch.device("cpu"), say=lambda line: None, show_progress=False,
    )  # fmt: skip
    trainer.prepare(PhaseClock(wait=lambda: waits.append("phase")))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waits.append("whole"))
    speed = profile_module._free_running(trainer, 3, lambda: 4.0 * next(now))
    assert speed == 3 * 32 / 4.0 and waits == ["whole", "whole"]
    trainer.step()
    assert waits[2:] == ["phase"] * 6


def test_a_step_is_the_training_loops_own(tmp_path: Path) -> None:
    """After the same steps the weights are those of the Trainer, bit for bit."""

    def trained(kind: type[Trainer]) -> tuple[Transformer, Trainer]:
        whole = recipe(train={"steps": 4, "accumulation": 2})
        model = Transformer(whole.model, seed=3)
        loss, batches = NextTokenLoss(model), Batches()
        made = kind(
            model=model, loss=loss, loader=batches, config=whole.train, optim=whole.optim, folder=tmp_path / kind.__name__,
            device=torch.device("cpu"), say=lambda line: None, show_progress=False,
        )  # fmt: skip
        return model, made

    one, loop = trained(Trainer)
    loop.fit()
    other, stepping = trained(SteppingTrainer)
    assert isinstance(stepping, SteppingTrainer)
    stepping.prepare(PhaseClock())
    assert [stepping.step()[1] for _ in range(4)] == [32] * 4
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name
    assert not (tmp_path / "SteppingTrainer").exists()


# --- tables ----------------------------------------------------------------------------------------------------------


def test_the_module_table_covers_every_block_both_ways(measured: tuple[Any, Path]) -> None:
    found, _ = measured
    rows = {row.path: row for row in found.modules}
    for layer in range(2):
        for name in ("", ".attention", ".feedforward", ".attention_norm", ".feedforward_norm"):
            row = rows[f"blocks.{layer}{name}"]
            assert row.calls == 1 and row.forward_total > 0 and row.backward_total > 0, row
    for name in ("embedding", "norm", HEAD_AND_LOSS):
        assert rows[name].forward_total > 0 and rows[name].backward_total > 0
    # A block's total is its own time and its children's.
    inside = [rows[f"blocks.0.{n}"] for n in ("attention", "feedforward", "attention_norm", "feedforward_norm")]
    block = rows["blocks.0"]
    assert block.backward_total >= sum(row.backward_total for row in inside) - 1e-9
    assert block.forward_total >= sum(row.forward_total for row in inside) - 1e-9
    children = [row for path, row in rows.items() if path.startswith("blocks.0.")]
    assert block.forward_total == pytest.approx(
        block.forward_self + sum(row.forward_self for row in children), rel=1e-6
    )


class Slow(torch.autograd.Function):
    """Takes its time, forward and backward."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        time.sleep(0.06)
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        time.sleep(0.15)
        return gradient


def test_time_is_given_to_the_module_that_took_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One feed-forward of two sleeps 60 ms forward and 150 ms backward: its row has these, no other one has."""
    forward = FeedForward.forward

    def slow(self: Any, x: Tensor, *rest: Any) -> Any:
        return forward(self, Slow.apply(x) if self is chosen[0] else x, *rest)

    chosen: list[Any] = [None]
    built = Transformer.__init__

    def build(self: Any, *arguments: Any, **options: Any) -> None:
        built(self, *arguments, **options)
        chosen[0] = self.blocks[1].feedforward

    monkeypatch.setattr(FeedForward, "forward", slow)
    monkeypatch.setattr(Transformer, "__init__", build)
    rows = {row.path: row for row in profile(recipe(), "out", steps=1, warmup=1, say=lambda line: None).modules}
    slowest = rows["blocks.1.feedforward"]
    assert 60 <= slowest.forward_self < 150 <= slowest.backward_self
    others = [row for path, row in rows.items() if path != "blocks.1.feedforward"]
    assert max(row.forward_self for row in others) < 50 and max(row.backward_self for row in others) < 100
    assert rows["blocks.1"].forward_total >= 60 and rows["blocks.1"].backward_total >= 150
    assert rows["blocks.0"].forward_total < 50 and rows["blocks.0"].backward_total < 100


def test_on_a_device_the_time_is_that_of_the_kernels() -> None:
    """Records in the form the profiler gives them: a range's shadow on the device counts for nothing, its operations do."""

    def event(name: str, *kernels: float, parent: Any = None, number: int = -1, **fields: Any) -> SimpleNamespace:
        made = SimpleNamespace(
            name=name, kernels=[SimpleNamespace(duration=1000 * time) for time in kernels], cpu_parent=parent, cpu_children=[],
            is_user_annotation=name.startswith(("module", "phase")), sequence_nr=number, scope=0, thread=1, fwd_thread=0,
            device_type=torch.autograd.DeviceType.CPU, time_range=SimpleNamespace(start=len(events)), cpu_time_total=1e9,
        )  # fmt: skip
        vars(made).update(fields)
        if parent is not None:
            parent.cpu_children.append(made)
        events.append(made)
        return made

    events: list[Any] = []
    forward = event("phase: forward", 99)
    block = event("module: 0", 99, parent=forward)
    inner = event("module: 0.0", 50, parent=block)
    event("aten::mm", 2, 4, parent=inner, number=7)
    event("aten::add", 8, parent=block, number=8)
    event("aten::sum", 16, parent=forward, number=9)
    event("aten::_foreach_mul_", 512, parent=event("phase: optimizer", 99))
    back = event("autograd::engine::evaluate_function: MmBackward0", number=7, thread=2, fwd_thread=1, scope=1)
    event("aten::mm", 32, parent=back)
    event("autograd::engine::evaluate_function: AddBackward0", 64, number=8, thread=2, fwd_thread=1, scope=1)
    events.append(SimpleNamespace(name="a kernel", device_type=torch.autograd.DeviceType.CUDA))
    rows = {row.path: row for row in module_rows(events, nn.Sequential(nn.Sequential(nn.Identity())), steps=2)}
    assert {path: (row.calls, row.forward_self, row.forward_total) for path, row in rows.items()} == {
        "0": (0.5, 4, 7), "0.0": (0.5, 3, 3), "(outside modules)": (0, 8, 8),
    }  # fmt: skip
    assert [(row.backward_self, row.backward_total) for row in rows.values()] == [(32, 48), (16, 16), (0, 0)]


def test_layers_are_added_up_by_place() -> None:
    rows = [
        ModuleRow("blocks.0.norm", "RMSNorm", 1, 1.0, 2.0, 3.0, 4.0),
        ModuleRow("blocks.11.norm", "RMSNorm", 2, 10.0, 20.0, 30.0, 40.0),
        ModuleRow("blocks.0.attention", "Attention", 1, 5.0),
        ModuleRow("blocks.1.attention", "LinearAttention", 1, 5.0),
    ]
    norm, attention = by_place(rows)
    assert (norm.path, norm.kind, norm.calls) == ("blocks.*.norm", "RMSNorm", 3)
    assert (norm.forward_self, norm.forward_total, norm.backward_self, norm.backward_total) == (11, 22, 33, 44)
    assert norm.self_time == 44 and rows[0].calls == 1
    assert (attention.path, attention.kind) == ("blocks.*.attention", "Attention, LinearAttention")


def test_operations_hold_the_matrix_products_and_none_of_our_marks(measured: tuple[Any, Path]) -> None:
    found, _ = measured
    names = {row.name: row for row in found.operations}
    assert names["aten::mm"].calls >= 3 * 2  # at least q‖k‖v and two more, in two layers
    assert not any(name.startswith(("module:", "phase:", "ProfilerStep")) for name in names)
    assert sum(row.share for row in found.operations) == pytest.approx(1)
    assert [row.self_time for row in found.operations] == sorted(
        (r.self_time for r in found.operations), reverse=True
    )
    assert found.kernels == []  # of a device there is none here


class FakeNvtx:
    """Keeps what was opened, and checks that what closes was open."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self.seen: list[tuple[str, ...]] = []

    def range_push(self, name: str) -> None:
        self.open.append(name)
        self.seen.append(tuple(self.open))

    def range_pop(self) -> None:
        self.open.pop()


def test_nvtx_ranges_nest_as_modules_and_phases_do() -> None:
    model, nvtx = Transformer(ModelConfig(**MODEL), seed=0), FakeNvtx()
    loss = MarkedLoss(model)
    clock = PhaseClock()
    clock.observers.append(phase_ranges(nvtx, str.upper))
    with marked_modules(model, [nvtx]):
        loss.ranges = [nvtx]
        clock.enter("forward")
        loss(Batches().batch).backward()
        clock.enter("backward")
        clock.leave()
    assert nvtx.open == []
    assert nvtx.seen[0] == ("FORWARD",) and nvtx.seen[-1] == ("BACKWARD",)
    assert ("FORWARD", f"{MODULE}blocks.1", f"{MODULE}blocks.1.attention") in nvtx.seen
    assert ("FORWARD", MODULE + HEAD_AND_LOSS) in nvtx.seen
    before = len(nvtx.seen)
    loss.ranges = ()
    loss(Batches().batch)
    assert len(nvtx.seen) == before  # the hooks are gone


def test_ranges_close_when_a_module_fails() -> None:
    nvtx = FakeNvtx()
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 4)), nn.Linear(5, 4))
    with marked_modules(model, [nvtx]), pytest.raises(RuntimeError):
        model(torch.ones(2, 3))
    assert nvtx.open == [] and len(nvtx.seen) == 3


def test_a_shared_module_goes_by_the_path_of_who_calls_it() -> None:
    nvtx, shared = FakeNvtx(), nn.Linear(3, 3)
    model = nn.Sequential(nn.Sequential(shared), nn.Sequential(shared))
    with marked_modules(model, [nvtx]):
        model(torch.ones(2, 3))
        shared(torch.ones(2, 3))
    assert [names[-1].removeprefix(MODULE) for names in nvtx.seen] == ["0", "0.0", "1", "1.0", "0.0"]


def test_the_trace_is_json_and_names_modules_and_phases(measured: tuple[Any, Path]) -> None:
    _, out = measured
    trace = json.loads(gzip.decompress((out / "trace.json.gz").read_bytes()))
    names = [event.get("name", "") for event in trace["traceEvents"]]
    for name in ("blocks.0", "blocks.1.attention", HEAD_AND_LOSS, "embedding"):
        assert names.count(MODULE + name) == 2, name  # two steps are traced
    for phase in PHASES:
        assert f"phase: {phase}" in names
