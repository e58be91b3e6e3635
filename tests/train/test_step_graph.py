"""A step recorded and replayed: the same run as launched one kernel after the other.

Where there is no GPU, a stand-in records: it computes the pass again at every replay and writes the results where those of the recording were.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_loop import MODEL, RandomBatches, lines, trainer
from torch import Tensor

from scratchlm.config import Recipe
from scratchlm.data.loader import Batch
from scratchlm.errors import UserError
from scratchlm.model import ModelConfig, Transformer
from scratchlm.section import validate
from scratchlm.train import fitting, step_graph
from scratchlm.train.loop import Trainer
from scratchlm.train.loss import NextTokenLoss

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class StandIn:
    """Records on a CPU; what it leaves is nothing before the first replay, as on a GPU."""

    def __init__(self) -> None:
        self.recordings = self.replays = 0

    def __call__(self, run: Callable[[], list[Tensor]], device: torch.device) -> Callable[[], None]:
        self.recordings += 1
        if DEVICE.type == "cuda":
            graph = step_graph.record(run, device)
        else:
            with fitting.untouched_generators(device):
                left = run()
            for tensor in left:
                tensor.fill_(float("nan"))

        def replay() -> None:
            self.replays += 1
            if DEVICE.type == "cuda":
                graph()
                return
            before = [tensor.data_ptr() for tensor in left]
            for parameter in self.parameters:
                parameter.grad = None
            for old, new in zip(left, self.again(run), strict=True):
                old.copy_(new)
            assert before == [tensor.data_ptr() for tensor in left]

        return replay

    def again(self, run: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Compute it once more, without the recording being told."""
        graph = self.graph
        kept = graph._total, graph._grads
        found = run()
        graph._total, graph._grads = kept
        return found

    def built(self, *arguments: Any) -> step_graph.StepGraph:
        self.graph = step_graph.StepGraph(*arguments, record=self)
        self.parameters = arguments[2]
        return self.graph


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    made = StandIn()
    monkeypatch.setattr("scratchlm.train.loop.StepGraph", made.built)
    monkeypatch.setattr(Trainer, "_on_gpu", property(lambda self: True))
    return made


class FewerTargets(RandomBatches):
    """Every batch has another number of targets."""

    def next_batch(self) -> Batch:
        batch = super().next_batch()
        batch.targets[0, : self.place % 5] = -100
        return batch


def run_of(folder: Path, graph: bool, model: ModelConfig = MODEL, **options: Any) -> Trainer:
    train = {"cuda_graph": graph} | options.pop("train", {})
    made = trainer(folder, Transformer(model, seed=0), train=train, device=DEVICE, **options)
    made.fit()
    return made


def same(left: Trainer, right: Trainer) -> None:
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if DEVICE.type == "cuda" else {"rtol": 0.0, "atol": 0.0}
    for ours, theirs in zip(left.model.parameters(), right.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("train", [{}, {"precision": "bf16"}, {"precision": "bf16", "weights": "bf16"}], ids=str)
def test_it_is_the_same_run(tmp_path: Path, stand_in: StandIn, train: dict[str, Any]) -> None:
    plain = run_of(tmp_path / "plain", False, train=train, loader=FewerTargets())
    assert not stand_in.recordings
    recorded = run_of(tmp_path / "recorded", True, train=train, loader=FewerTargets())
    assert (stand_in.recordings, stand_in.replays) == (1, 6)
    same(plain, recorded)
    found = [[record["loss"] for record in lines(tmp_path / name, "train")] for name in ("plain", "recorded")]
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert found[0] != [found[0][0]] * 6


def test_bf16_gradients_are_left_where_the_update_reads_them(
    tmp_path: Path, stand_in: StandIn, interpreted: list[Any]
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    if DEVICE.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("TRITON_INTERPRET is not 1")
    train = {"precision": "bf16", "weights": "bf16"}
    recorded = run_of(tmp_path / "recorded", True, train=train)
    assert recorded.update.in_one_pass and stand_in.recordings == 1
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in recorded.update.with_gradients())
    assert all(p.grad is None for p in recorded.model.parameters())
    same(run_of(tmp_path / "plain", False, train=train), recorded)


def test_dropout_is_drawn_anew_at_every_replay(tmp_path: Path, stand_in: StandIn) -> None:
    """And goes on from a checkpoint as if nothing had been."""
    model = MODEL.model_copy(update={"residual_dropout": 0.3, "embedding_dropout": 0.3})

    class OneBatch(RandomBatches):
        def next_batch(self) -> Batch:
            self.place = 0
            return super().next_batch()

    still = {"loader": OneBatch(), "optim": {"lr": 1e-30}}
    run_of(tmp_path / "still", True, model, **still)
    losses = [record["loss"] for record in lines(tmp_path / "still", "train")]
    assert len({round(loss, 5) for loss in losses}) == len(losses)

    whole = run_of(tmp_path / "whole", True, model, train={"checkpoint_interval": 3})
    for steps in (3, 6):
        halves = run_of(tmp_path / "halves", True, model, train={"steps": steps}, optim={"schedule": "constant"})
    constant = run_of(tmp_path / "constant", True, model, optim={"schedule": "constant"})
    same(constant, halves)
    if DEVICE.type == "cpu":
        same(whole, run_of(tmp_path / "plain", False, model))


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_what_the_objective_adds_is_not_shown_as_loss(tmp_path: Path, stand_in: StandIn, z_loss: float) -> None:
    if DEVICE.type == "cpu" and z_loss:
        pytest.skip("the stand-in does not keep what the loss adds up beside")
    for graph in (False, True):
        run_of(tmp_path / str(graph), graph, train={"z_loss": z_loss})
    found = [[record["loss"] for record in lines(tmp_path / str(graph), "train")] for graph in (False, True)]
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_a_batch_of_another_shape_is_recorded_anew(tmp_path: Path, stand_in: StandIn) -> None:
    class Growing(RandomBatches):
        def next_batch(self) -> Batch:
            self.batch_size = 2 if self.place < 3 else 4
            return super().next_batch()

    train = {"batch_warmup_steps": 3, "batch_warmup_start": 2}
    plain = run_of(tmp_path / "plain", False, train=train, loader=Growing())
    same(plain, run_of(tmp_path / "recorded", True, train=train, loader=Growing()))
    assert (stand_in.recordings, stand_in.replays) == (2, 6)


def test_what_waits_for_the_gpu_is_computed_as_usual(
    tmp_path: Path, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen before anything is recorded; with dropout, so that a generator that is not what it was would show."""
    if DEVICE.type == "cuda":
        real = NextTokenLoss.targets
        monkeypatch.setattr(
            NextTokenLoss, "targets", lambda self, batch: [real(self, batch), batch.inputs.sum().item()][0]
        )
    else:

        @contextlib.contextmanager
        def refuse(device: torch.device) -> Iterator[None]:
            yield
            raise step_graph.NotRecorded("the step waits for the GPU, and cannot be recorded as a CUDA graph")

        monkeypatch.setattr(step_graph, "no_waiting", refuse)
    said: list[str] = []
    model = MODEL.model_copy(update={"residual_dropout": 0.3})
    recorded = run_of(tmp_path / "recorded", True, model, said=said)
    same(run_of(tmp_path / "plain", False, model), recorded)
    assert [line for line in said if "CUDA graph" in line] == [
        "the step waits for the GPU, and cannot be recorded as a CUDA graph: going on without train.cuda_graph, slower"
    ]
    assert not stand_in.recordings


def test_a_recording_that_fails_ends_the_run_with_advice(
    tmp_path: Path, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: StandIn, run: Any, device: torch.device) -> Any:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(StandIn, "__call__", refuse)
    with pytest.raises(
        UserError,
        match=r"\(CUDA error: operation not permitted when stream is capturing\): leave train\.cuda_graph out",
    ):
        run_of(tmp_path, True)


def test_a_batch_in_parts_does_not_end_the_recording(tmp_path: Path, stand_in: StandIn) -> None:
    """A growing batch is computed in parts before it is whole."""

    class Growing(RandomBatches):
        def next_batch(self) -> Batch:
            self.batch_size = (2, 2, 4, 4, 8, 8)[self.place]
            return super().next_batch()

    said: list[str] = []
    train = {"batch_size": 8, "batch_warmup_steps": 4, "batch_warmup_start": 2}
    plain = run_of(tmp_path / "plain", False, train=train, loader=Growing())
    same(plain, run_of(tmp_path / "recorded", True, train=train, loader=Growing(), said=said))
    assert (stand_in.recordings, stand_in.replays) == (2, 4)
    assert sum("goes without" in line for line in said) == 1


def test_out_of_memory_while_recording_is_backed_off_from(
    tmp_path: Path, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: StandIn, run: Any, device: torch.device) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(StandIn, "__call__", refuse)
    said: list[str] = []
    run = run_of(tmp_path, True, train={"micro_batch": "auto"}, said=said)
    assert run.parts == 2 and run.state.step == 6
    assert [line for line in said if "micro-batches" in line][-2:] == [
        "out of memory with 4 sequences at once: going on with micro-batches of 2, 2 per step",
        "train.cuda_graph records batches that are computed at once: this one, in micro-batches, goes without",
    ]


def test_a_cpu_goes_on_without(tmp_path: Path) -> None:
    said: list[str] = []
    made = trainer(tmp_path, train={"cuda_graph": True}, said=said)
    made.fit()
    assert "train.cuda_graph is for GPUs: cpu goes on without" in said and made._graph is None


@pytest.mark.parametrize(
    ("train", "complaint"),
    [
        ({"compile_mode": "cuda_graphs"}, "one of them records the step"),
        ({"accumulation": 2}, "with 2 micro-batches per step"),
        ({"micro_batch": 4}, "with 4 micro-batches per step"),
    ],
    ids=str,
)
def test_a_recipe_that_contradicts_itself_is_refused(train: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        validate(Recipe, {"train": {"cuda_graph": True, "batch_size": 16, **train}}, "recipe")


@pytest.mark.skipif(DEVICE.type != "cuda", reason="there is no GPU here that would record")
@pytest.mark.parametrize("compile", ["off", "on"])
def test_routers_go_on_beside_the_graph(tmp_path: Path, stand_in: StandIn, compile: str) -> None:
    """Their loads are of the step, and their biases move with them."""
    moe = MODEL.moe.model_copy(update={"experts": 4, "top_k": 2, "bias_update": 0.01})
    model = MODEL.model_copy(update={"moe": moe})
    found = []
    for graph in (False, True):
        run = run_of(tmp_path / str(graph), graph, model, train={"compile": compile})
        found.append([record["expert_load"] for record in lines(tmp_path / str(graph), "train")])
    assert found[0] == found[1] and run.state.step == 6


@pytest.mark.slow
@pytest.mark.skipif(DEVICE.type != "cuda", reason="there is no GPU here that would record")
def test_what_the_compiler_made_is_recorded_as_well(tmp_path: Path, stand_in: StandIn) -> None:
    plain = run_of(tmp_path / "plain", False, train={"compile": "on"})
    same(plain, run_of(tmp_path / "recorded", True, train={"compile": "on"}))
    assert stand_in.recordings == 1
