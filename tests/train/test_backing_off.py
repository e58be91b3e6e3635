"""Running out of memory in the middle of a run: the same batch again in smaller parts, and resuming from there."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import last_checkpoint, records
from test_fitting import AUTO, MODELS, assert_equal, simple_plan, weights
from test_loop import MODEL, LossThat, RandomBatches, lines, trainer
from torch import Tensor

from scratchlm.data.loader import Batch
from scratchlm.errors import UserError
from scratchlm.model import Transformer
from scratchlm.train.loop import Trainer
from scratchlm.train.loss import NextTokenLoss


class TooMuch(NextTokenLoss):
    """The next-token loss on a device whose memory holds `most` sequences, from call number `after` on."""

    def __init__(
        self, model: Transformer, most: int, after: int = 0, error: Callable[[], Exception] | None = None
    ) -> None:
        super().__init__(model)
        self.most, self.after, self.calls = most, after, 0
        self.error = error or (lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB"))
        self.refused: list[int] = []

    def __call__(self, batch: Any) -> Tensor:
        self.calls += 1
        loss = super().__call__(batch)  # random numbers are drawn, and sums kept, before it fails
        if len(batch.inputs) > self.most and self.calls > self.after:
            self.refused.append(len(batch.inputs))
            raise self.error()
        return loss


@pytest.mark.parametrize("planned", [True, False], ids=["verified", "in the first step"])
def test_backing_off_before_anything_was_learnt(tmp_path: Path, planned: bool) -> None:
    said: list[str] = []
    model = Transformer(MODEL, seed=0)
    loss = TooMuch(model, most=2)
    plan = simple_plan() if planned else None
    batches = RandomBatches(batch_size=8)
    run = trainer(
        tmp_path / "auto", model, loss=loss, plan=plan, loader=batches, said=said, train={"batch_size": 8, **AUTO}
    )
    run.fit()
    assert loss.refused == [8, 4] and run.parts == 4
    by_hand = trainer(
        tmp_path / "hand", loader=RandomBatches(batch_size=8), train={"batch_size": 8, "accumulation": 4}
    )
    by_hand.fit()
    assert_equal(weights(run), weights(by_hand))
    events = lines(tmp_path / "auto", "event")
    assert [event["message"] for event in events] == [
        "out of memory with 8 sequences at once: going on with micro-batches of 4, 2 per step",
        "out of memory with 4 sequences at once: going on with micro-batches of 2, 4 per step",
    ]
    assert {event["step"] for event in events} == {1}
    assert [message for message in said if "out of memory" in message] == [event["message"] for event in events]
    assert lines(tmp_path / "auto", "train")[-1]["loss"] == lines(tmp_path / "hand", "train")[-1]["loss"]


@pytest.mark.parametrize("ignored", [False, True], ids=["full", "rows with ignored targets"])
def test_backing_off_in_the_middle_loses_nothing(tmp_path: Path, ignored: bool) -> None:
    """The fourth step fails in its second half: what its first half left is dropped, and the same batch is done again."""
    optim = {"optimizer": "sgd", "lr": 0.5}
    ends = {}
    for folder, most in (("auto", 1), ("whole", 99)):
        model = Transformer(MODEL, seed=0)
        loss = TooMuch(model, most, after=2 * 3 + 1)
        batches = RandomBatches(ignored=ignored)
        run = trainer(tmp_path / folder, model, loss=loss, loader=batches, train={**AUTO, "steps": 7}, optim=optim)
        run._parts = 2  # as a run that was resumed
        run._fit_memory = lambda as_before: None  # type: ignore[method-assign]
        run.fit()
        assert batches.place == 7, "no batch was skipped"
        ends[folder] = weights(run)
        assert loss.refused == ([2] if most == 1 else [])
    assert run.parts == 2
    for name, tensor in ends["whole"].items():
        torch.testing.assert_close(ends["auto"][name], tensor, rtol=1e-5, atol=1e-6)
    pair = [lines(tmp_path / folder, "train") for folder in ("auto", "whole")]
    assert [line["tokens"] for line in pair[0]] == [line["tokens"] for line in pair[1]]
    assert [line["loss"] for line in pair[0]] == pytest.approx([line["loss"] for line in pair[1]], rel=1e-5)
    assert [event["step"] for event in lines(tmp_path / "auto", "event")] == [4]


def test_a_step_done_again_draws_the_same_random_numbers_and_counts_its_experts_once(tmp_path: Path) -> None:
    config = MODELS["experts that move biases"].model_copy(update={"residual_dropout": 0.2})
    model = Transformer(config, seed=0)
    loss = TooMuch(model, most=2)
    trainer(tmp_path / "auto", model, loss=loss, train=AUTO).fit()
    other = trainer(tmp_path / "hand", Transformer(config, seed=0), train={"accumulation": 2})
    other.fit()
    assert loss.refused == [4]
    assert_equal(dict(model.state_dict()), weights(other))
    shown = [[line["expert_load"] for line in lines(tmp_path / name, "train")] for name in ("auto", "hand")]
    assert shown[0] == shown[1]


def test_memory_of_a_failed_attempt_is_free_before_the_next(tmp_path: Path) -> None:
    class Watched(TooMuch):
        kept: weakref.ref[Tensor] | None = None
        freed: bool | None = None

        def __call__(self, batch: Any) -> Tensor:
            if self.kept is not None and self.freed is None:
                self.freed = self.kept() is None
            large = torch.zeros(1000)
            if self.kept is None:
                self.kept = weakref.ref(large)
            return super().__call__(batch) + large[0]

    model = Transformer(MODEL, seed=0)
    loss = Watched(model, most=2)
    trainer(tmp_path, model, loss=loss, train={**AUTO, "steps": 1}).fit()
    assert loss.refused == [4] and loss.freed


def allocate_too_much() -> Exception:
    try:
        torch.empty(2**60)
    except RuntimeError as error:
        return error
    raise AssertionError("this machine has exabytes")


OUT_OF_MEMORY = {
    "CUDA": lambda: torch.OutOfMemoryError("CUDA out of memory."),
    "Python": MemoryError,
    "torch on a CPU": allocate_too_much,
    "C++": lambda: RuntimeError("std::bad_alloc"),
    "cuBLAS": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
}


@pytest.mark.parametrize("name", OUT_OF_MEMORY)
def test_every_way_of_running_out_is_known(tmp_path: Path, name: str) -> None:
    model = Transformer(MODEL, seed=0)
    run = trainer(tmp_path, model, loss=TooMuch(model, 2, error=OUT_OF_MEMORY[name]), train=AUTO)
    assert run.fit().step == 6 and run.parts == 2


@pytest.mark.parametrize("error", [RuntimeError("size mismatch"), ValueError("out of memory"), KeyError("x")])
def test_other_errors_are_not_taken_for_it(tmp_path: Path, error: Exception) -> None:
    model = Transformer(MODEL, seed=0)
    with pytest.raises(type(error), match=str(error)):
        trainer(tmp_path, model, loss=TooMuch(model, 2, error=lambda: error), train=AUTO).fit()


def test_one_sequence_that_does_not_fit_is_said(tmp_path: Path) -> None:
    model = Transformer(MODEL, seed=0)
    loss = TooMuch(model, most=0, after=7)
    with pytest.raises(
        UserError, match=r"^out of memory at step 8 with a single sequence at once: lower model.context_len"
    ):
        trainer(tmp_path, model, loss=loss, train={**AUTO, "steps": 9}).fit()
    assert loss.refused == [4, 2, 1]


def test_a_number_that_does_not_fit_is_kept_and_said(tmp_path: Path) -> None:
    model = Transformer(MODEL, seed=0)
    loss = TooMuch(model, most=1, after=4)
    with pytest.raises(
        UserError, match=r"^out of memory at step 3 with 2 sequences at once: set train.micro_batch = auto"
    ):
        trainer(tmp_path, model, loss=loss, train={"micro_batch": 2}).fit()
    assert loss.refused == [2]


def test_a_loss_that_is_not_finite_after_backing_off_is_skipped_as_ever(tmp_path: Path) -> None:
    model = Transformer(MODEL, seed=0)
    run = trainer(tmp_path, model, loss=LossThat(model, {3}), train=AUTO)
    assert run.fit().skipped == 1 and run.parts == 1


# --- resuming -----------------------------------------------------------------------------------------------------------


class CutOff(RandomBatches):
    """A loader whose process is killed at one of its batches."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def next_batch(self) -> Batch:
        if self.place == self.at:
            raise KeyboardInterrupt
        return super().next_batch()


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_a_resumed_run_splits_as_the_first_one_did(tmp_path: Path, cut: int) -> None:
    """Memory lacks from step 2 on; the run that goes on has a device with plenty, and must not show it."""
    config = MODELS["dropout"]
    train = {**AUTO, "steps": 8, "checkpoint_interval": 2, "memory_limit": "1400B"}

    def start(folder: str, most: int, calls_before: int, loader: RandomBatches, **more: Any) -> Trainer:
        model = Transformer(config, seed=0)
        loss = TooMuch(model, most, after=calls_before)
        return trainer(
            tmp_path / folder, model, loss=loss, loader=loader, plan=simple_plan(), train={**train, **more}
        )

    verified = 2  # calls of the loss before the first step, which is of two micro-batches
    whole = start("whole", 1, verified + 2, RandomBatches())
    whole.fit()
    assert whole.parts == 4
    first = start("cut", 1, verified + 2, CutOff(cut))
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    # Cut off before the first checkpoint it begins anew, and meets the same want of memory.
    plenty = (99, 0) if cut > 2 else (1, verified + 2)
    resumed = start("cut", *plenty, RandomBatches(), memory_limit="8GB" if cut > 2 else "1400B")
    resumed.fit()
    assert resumed.parts == 4
    assert records(tmp_path / "cut") == records(tmp_path / "whole")
    assert_equal(weights(resumed), weights(whole))
    assert json.loads((last_checkpoint(tmp_path / "cut") / "state.json").read_text())["parts"] == 4


def test_a_number_in_the_recipe_overrules_what_was_fitted(tmp_path: Path) -> None:
    train = {"steps": 6, "checkpoint_interval": 2}
    with pytest.raises(KeyboardInterrupt):
        trainer(
            tmp_path, loader=CutOff(3), plan=simple_plan(), train={**train, **AUTO, "memory_limit": "1300B"}
        ).fit()
    run = trainer(tmp_path, train={**train, "micro_batch": 4})
    run.fit()
    assert run.parts == 1


@pytest.mark.parametrize("saved", [None, 3, 0, "2", True])
def test_a_checkpoint_that_does_not_say_is_fitted_anew(tmp_path: Path, saved: Any) -> None:
    train = {"steps": 6, "checkpoint_interval": 2}
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, loader=CutOff(3), train=train).fit()
    path = last_checkpoint(tmp_path) / "state.json"
    state = json.loads(path.read_text())
    assert state.pop("parts") == 1
    path.write_text(json.dumps(state if saved is None else {**state, "parts": saved}))
    said: list[str] = []
    run = trainer(tmp_path, plan=simple_plan(), said=said, train={**train, **AUTO, "memory_limit": "1400B"})
    run.fit()
    assert run.parts == 2 and any(message.startswith("micro-batches of 2, 2 per step") for message in said)
