"""The loop: six steps, accumulation, the policy for non-finite losses, checkpoints kept, the compiler's failure."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scratchlm.config import OptimConfig, TrainConfig
from scratchlm.data.loader import Batch
from scratchlm.errors import UserError
from scratchlm.model import ModelConfig, Transformer
from scratchlm.train import loop as loop_module
from scratchlm.train.loop import Trainer
from scratchlm.train.loss import NextTokenLoss

MODEL = ModelConfig(vocab_size=19, context_length=8, d_model=16, layers=1, heads=2)


class RandomBatches:
    """A loader with a place, as the trainer wants one."""

    def __init__(self, batch_size: int = 4, seed: int = 0, ignored: bool = False) -> None:
        self.batch_size, self.place, self.seed, self.ignored = batch_size, 0, seed, ignored

    def next_batch(self) -> Batch:
        generator = torch.Generator().manual_seed(1000 * self.seed + self.place)
        self.place += 1
        ids = torch.randint(0, 19, (self.batch_size, 9), generator=generator)
        targets = ids[:, 1:].clone()
        if self.ignored:  # rows with different numbers of targets
            for row in range(self.batch_size):
                targets[row, : 2 * row] = -100
        return Batch(ids[:, :-1].contiguous(), targets, None, None)

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


class LossThat(NextTokenLoss):
    """The next-token loss, spoilt at chosen calls."""

    def __init__(self, model: Transformer, spoilt: set[int], value: float = math.nan) -> None:
        super().__init__(model)
        self.spoilt, self.value, self.calls = spoilt, value, 0

    def __call__(self, batch: Any) -> Tensor:
        self.calls += 1
        loss = super().__call__(batch)
        return loss * self.value if self.calls in self.spoilt else loss


def trainer(folder: Path, model: Transformer | None = None, **options: Any) -> Trainer:
    model = model or Transformer(MODEL, seed=0)
    train = {"steps": 6, "batch_size": 4, "precision": "fp32", "compile": "off", "log_interval": 1}
    train |= options.pop("train", {})
    settings: dict[str, Any] = {
        "model": model,
        "loss": NextTokenLoss(model),
        "loader": RandomBatches(),
        "config": TrainConfig(**train),
        "optim": OptimConfig(warmup_steps=0, **options.pop("optim", {})),
        "folder": folder,
        "device": torch.device("cpu"),
        "say": options.pop("said", []).append,
        "show_progress": False,
    }
    return Trainer(**(settings | options))


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    text = (folder / "metrics.jsonl").read_text()
    return [record for record in map(json.loads, text.splitlines()) if record["kind"] == kind]


def test_training_lowers_the_loss_of_a_batch_seen_again_and_again(tmp_path: Path) -> None:
    class OneBatch(RandomBatches):
        def next_batch(self) -> Batch:
            self.place = 0
            return super().next_batch()

    trainer(tmp_path, loader=OneBatch(), train={"steps": 60}, optim={"lr": 1e-2}).fit()
    losses = [record["loss"] for record in lines(tmp_path, "train")]
    assert losses[0] == pytest.approx(math.log(19), rel=0.5)
    assert losses[-1] < 0.3 * losses[0]


def test_every_line_says_what_a_reader_needs(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    run = trainer(tmp_path, trackers=seen.append, train={"steps": 4}, optim={"schedule": "linear", "lr": 1e-2})
    run.fit()
    records = lines(tmp_path, "train")
    assert seen == records
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert [record["tokens"] for record in records] == [32, 64, 96, 128]
    assert records[0]["lr"] > records[-1]["lr"] > 0
    assert all(record["tokens_per_second"] > 0 and record["grad_norm"] > 0 for record in records)


def test_metrics_hold_the_mean_loss_since_the_last_line(tmp_path: Path) -> None:
    trainer(tmp_path / "each").fit()
    trainer(tmp_path / "third", train={"log_interval": 3}).fit()
    each = [record["loss"] for record in lines(tmp_path / "each", "train")]
    third = [record["loss"] for record in lines(tmp_path / "third", "train")]
    assert third == pytest.approx([sum(each[:3]) / 3, sum(each[3:]) / 3])


@pytest.mark.parametrize("ignored", [False, True], ids=["full", "rows with ignored targets"])
@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_equals_the_big_batch(tmp_path: Path, parts: int, ignored: bool) -> None:
    models = {}
    for accumulation in (1, parts):
        model = Transformer(MODEL, seed=0)
        trainer(
            tmp_path / str(accumulation),
            model,
            loader=RandomBatches(ignored=ignored),
            train={"accumulation": accumulation},
            optim={"optimizer": "sgd", "lr": 0.5, "momentum": 0.9},
        ).fit()
        models[accumulation] = model
    for whole, split in zip(models[1].parameters(), models[parts].parameters(), strict=True):
        torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-6)
    first, second = (lines(tmp_path / str(n), "train") for n in (1, parts))
    assert [r["loss"] for r in second] == pytest.approx([r["loss"] for r in first], rel=1e-5)


def test_a_loss_that_is_not_finite_is_skipped_counted_and_recorded(tmp_path: Path) -> None:
    model, said = Transformer(MODEL, seed=0), []
    run = trainer(tmp_path, model, loss=LossThat(model, {3, 4}), said=said)
    state = run.fit()
    assert (state.step, state.skipped, state.skipped_in_a_row) == (6, 2, 0)
    assert [record["step"] for record in lines(tmp_path, "event")] == [3, 4]
    assert [record["step"] for record in lines(tmp_path, "train")] == [1, 2, 5, 6]
    assert any("step skipped" in line for line in said)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_skipped_step_leaves_weights_and_moments_alone(tmp_path: Path, value: float) -> None:
    clean, spoilt = Transformer(MODEL, seed=0), Transformer(MODEL, seed=0)
    trainer(tmp_path / "clean", clean, train={"steps": 3}, optim={"schedule": "constant"}).fit()

    class WithOneMore(RandomBatches):
        """The same three batches, with one between them that will be spoilt."""

        def next_batch(self) -> Batch:
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls == 2:
                return RandomBatches(seed=7).next_batch()
            return super().next_batch()

    trainer(
        tmp_path / "spoilt",
        spoilt,
        loss=LossThat(spoilt, {2}, value),
        loader=WithOneMore(),
        train={"steps": 4},
        optim={"schedule": "constant"},
    ).fit()
    for left, right in zip(clean.parameters(), spoilt.parameters(), strict=True):
        assert left.equal(right)


def test_too_many_in_a_row_stop_the_run_with_advice(tmp_path: Path) -> None:
    model = Transformer(MODEL, seed=0)
    run = trainer(
        tmp_path, model, loss=LossThat(model, set(range(3, 100))), train={"steps": 50, "max_non_finite": 2}
    )
    with pytest.raises(UserError, match=r"stopped at step 5: 3 steps in a row .* lower optim.lr"):
        run.fit()
    assert len(lines(tmp_path, "event")) == 3


def test_newest_and_best_checkpoints_are_kept(tmp_path: Path) -> None:
    losses = iter([3.0, 1.0, 2.0, 2.5, 2.6, 2.7])
    run = trainer(
        tmp_path,
        validate=lambda: {"loss": next(losses)},
        train={"steps": 6, "eval_interval": 1, "checkpoint_interval": 1, "keep_checkpoints": 2},
    )
    state = run.fit()
    assert state.best_step == 2
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000005",
        "step-00000006",
    ]


def test_zero_steps_leave_a_checkpoint_of_the_initial_weights(tmp_path: Path) -> None:
    state = trainer(tmp_path, train={"steps": 0}).fit()
    assert state.step == 0
    assert (tmp_path / "checkpoints/step-00000000/model.safetensors").exists()


def test_a_failing_compiler_does_not_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.exc import InductorError

    def broken(*_: Any, **__: Any) -> Any:
        raise InductorError(RuntimeError("no such header: omp.h"), None)

    model, said = Transformer(MODEL, seed=0), []
    loss = NextTokenLoss(model)
    monkeypatch.setattr(
        loss, "compile", lambda mode: (setattr(loss, "body", broken), setattr(loss, "compiled", True))
    )
    monkeypatch.setattr(loop_module, "choose_compile", lambda *_: loop_module.Decision("on", "for this test"))
    state = trainer(tmp_path / "broken", model, loss=loss, said=said).fit()
    assert state.step == 6
    assert state.compile == "off"
    assert any("torch.compile failed" in line and "omp.h" in line for line in said)
    trainer(tmp_path / "eager").fit()
    losses, expected = ([r["loss"] for r in lines(tmp_path / name, "train")] for name in ("broken", "eager"))
    assert losses == pytest.approx(expected, rel=1e-5)


def test_a_compiler_that_fails_late_in_a_step_costs_no_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second micro-batch's failure must not lose the first one's part."""
    from torch._inductor.exc import InductorError

    models = {}
    for broken in (False, True):
        model = Transformer(MODEL, seed=0)
        loss = NextTokenLoss(model)
        calls = [0]

        def body(*arguments: Any, model: Transformer = model, calls: list[int] = calls) -> Tensor:
            calls[0] += 1
            if calls[0] == 2:
                raise InductorError(RuntimeError("late"), None)
            return model.body(*arguments)

        if broken:
            loss.body, loss.compiled = body, True
            monkeypatch.setattr(loss, "compile", lambda mode: None)
        options = {"optimizer": "sgd", "lr": 0.5, "grad_clip": 0}
        train = {"accumulation": 2, "steps": 1}
        trainer(tmp_path / str(broken), model, loss=loss, said=[], train=train, optim=options).fit()
        models[broken] = model
    for left, right in zip(models[False].parameters(), models[True].parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


def test_a_compiler_stopped_by_ctrl_c_has_not_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run must not go on, nor resume, without the compiler."""
    import os
    import signal

    from torch._inductor.exc import InductorError

    def stopped(*_: Any) -> Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        raise InductorError(RuntimeError("g++ was killed"), None)

    model = Transformer(MODEL, seed=0)
    loss = NextTokenLoss(model)
    monkeypatch.setattr(
        loss, "compile", lambda mode: (setattr(loss, "body", stopped), setattr(loss, "compiled", True))
    )
    monkeypatch.setattr(loop_module, "choose_compile", lambda *_: loop_module.Decision("on", "for this test"))
    run = trainer(tmp_path, model, loss=loss, said=[])
    with pytest.raises(loop_module.Interrupted, match="SIGINT: stopped while compiling, after step 0 of 6"):
        run.fit()
    assert run.state.compile == "on"
    assert not list((tmp_path / "checkpoints").glob("step-*"))


def test_a_validation_that_is_not_finite_is_never_the_best(tmp_path: Path) -> None:
    losses = iter([math.nan, 2.0, math.nan])
    run = trainer(tmp_path, validate=lambda: {"loss": next(losses)}, train={"steps": 3, "eval_interval": 1})
    assert run.fit().best_step == 2


@pytest.mark.parametrize("last", [False, True])
def test_a_signal_during_a_step_ends_the_run_with_its_checkpoint(tmp_path: Path, last: bool) -> None:
    import os
    import signal

    step = 6 if last else 3

    class Signalling(RandomBatches):
        def next_batch(self) -> Batch:
            if self.place == step - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().next_batch()

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(loop_module.Interrupted, match=f"SIGTERM: stopped after step {step} of 6") as stopped:
        trainer(tmp_path, loader=Signalling()).fit()
    assert stopped.value.signal_number == signal.SIGTERM
    assert (tmp_path / f"checkpoints/step-0000000{step}").is_dir()
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_explicit_precision_wins_over_the_checkpoints(tmp_path: Path) -> None:
    said: list[str] = []
    trainer(tmp_path, train={"steps": 2, "precision": "fp32"}).fit()
    state = trainer(tmp_path, said=said, train={"steps": 4, "precision": "auto"}).fit()
    assert state.precision == "fp32" and any("fp32 (as before)" in line for line in said)
    state = trainer(tmp_path, train={"steps": 6, "precision": "bf16"}).fit()
    assert state.precision == "bf16"


def test_resuming_with_another_tokenizer_of_the_same_size_is_refused(tmp_path: Path) -> None:
    from scratchlm.tokenizer import train_bpe

    first, second = (train_bpe([text], 260, ["<|e|>"]) for text in ("aaaa bbbb", "cccc dddd"))
    assert first.vocab_size == second.vocab_size
    trainer(tmp_path, tokenizer=first).fit()
    trainer(tmp_path, tokenizer=first, train={"steps": 7}).fit()
    with pytest.raises(UserError, match="trained with another tokenizer"):
        trainer(tmp_path, tokenizer=second, train={"steps": 8}).fit()


def test_an_error_of_the_model_itself_is_not_mistaken_for_the_compilers(tmp_path: Path) -> None:
    model = Transformer(MODEL, seed=0)
    loss = NextTokenLoss(model)
    loss.compiled = True

    def wrong(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("mine")

    loss.body = wrong
    with pytest.raises(ZeroDivisionError, match="mine"):
        trainer(tmp_path, model, loss=loss).fit()


def test_resuming_with_another_model_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path).fit()
    other = Transformer(ModelConfig(**{**MODEL.model_dump(), "rope": {"theta": 500.0}}), seed=0)
    with pytest.raises(UserError, match=r"model.rope.theta = \(10000.0,\), the recipe says \(500.0,\)"):
        trainer(tmp_path, other, train={"steps": 8}).fit()


def test_a_checkpoint_of_another_format_is_not_resumed(tmp_path: Path) -> None:
    trainer(tmp_path).fit()
    path = tmp_path / "checkpoints/step-00000006/state.json"
    state = json.loads(path.read_text())
    state["progress"]["format_version"] = 0
    path.write_text(json.dumps(state))
    with pytest.raises(UserError, match="trains differently"):
        trainer(tmp_path, train={"steps": 8}).fit()


def test_the_learning_rate_follows_the_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path, optim={"lr": 0.1, "schedule": "linear", "min_lr_ratio": 0.0}, train={"steps": 5})
    rates: list[float] = []
    original = Trainer._gradients

    def watched(self: Trainer, batches: Any, tokens: int) -> Tensor:
        rates.append(self.optimizers.param_groups[0]["lr"])
        return original(self, batches, tokens)

    monkeypatch.setattr(Trainer, "_gradients", watched)
    run.fit()
    assert rates == pytest.approx([record["lr"] for record in lines(tmp_path, "train")])
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(
    ("moe", "idle"),
    [
        ({"top_k": 1}, True),
        ({"top_k": 1, "router": "topk_softmax"}, True),
        ({"top_k": 1, "normalise": False}, False),
        ({"top_k": 2}, False),
        ({"top_k": 1, "fine_grained": 2}, False),
    ],
)
def test_a_router_that_learns_nothing_from_the_task_is_told(
    tmp_path: Path, moe: dict[str, Any], idle: bool
) -> None:
    config = ModelConfig(**MODEL.model_dump() | {"moe": {"experts": 4, "balance_loss": 0.0} | moe})
    model, said = Transformer(config, seed=0), []
    run = trainer(tmp_path, model, train={"steps": 1}, said=said)
    run.fit()
    assert any("the router learns from the balance loss alone" in line for line in said) == idle
    gradient = model.blocks[0].feedforward.router.score.weight.grad
    assert gradient is not None and bool(gradient.abs().max() > 1e-9) != idle
