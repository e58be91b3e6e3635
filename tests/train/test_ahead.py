"""A host that does not wait: steps that are not finite are left out on the device, and nothing else changes.

On a CPU, too, the fused kernel can be told so, and there it is only pretended that waiting would cost something; where there is a GPU, these
tests run on it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_loop import MODEL, LossThat, RandomBatches, lines, trainer

from scratchlm.errors import UserError
from scratchlm.model import ModelConfig, Transformer
from scratchlm.optim import Adam, Muon, newton_schulz
from scratchlm.train.loop import Interrupted, Trainer
from scratchlm.train.outcome import Outcome

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPOILT = {1, 3, 4, 5, 9, 12}  # the first, one that is logged, and the last


def go_on(monkeypatch: pytest.MonkeyPatch, yes: bool) -> None:
    for kind in (Adam, Muon):
        monkeypatch.setattr(kind, "skips_on_device", lambda self: yes)


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on(monkeypatch, True)


def run_of(folder: Path, *, spoilt: set[int], value: float = math.nan, **options: Any) -> Trainer:
    model = Transformer(MODEL, seed=0)
    train = {"steps": 12, "log_interval": 5, "checkpoint_interval": 100} | options.pop("train", {})
    device = torch.device(DEVICE)
    return trainer(folder, model, loss=LossThat(model, spoilt, value), train=train, device=device, **options)


def everything(folder: Path) -> list[dict[str, Any]]:
    timed = ("seconds", "tokens_per_second", "flops_per_second", "memory_bytes")
    records = [*lines(folder, "train"), *lines(folder, "event")]
    return [{name: value for name, value in record.items() if name not in timed} for record in records]


def compare(
    tmp_path: Path, value: float, monkeypatch: pytest.MonkeyPatch, exactly: bool = True, **options: Any
) -> None:
    """A run that waits and one that goes on."""
    go_on(monkeypatch, False)
    waiting = run_of(tmp_path / "waiting", spoilt=SPOILT, value=value, **options)
    waiting.fit()
    go_on(monkeypatch, True)
    going = run_of(tmp_path / "ahead", spoilt=SPOILT, value=value, **options)
    going.fit()
    assert going._ahead and not waiting._ahead
    near = {"rtol": 0.0, "atol": 0.0} if exactly else {"rtol": 1e-4, "atol": 1e-5}
    for left, right in zip(waiting.model.parameters(), going.model.parameters(), strict=True):
        torch.testing.assert_close(left, right, **near)
    states = [one.optimizers.named_state() for one in (waiting, going)]
    assert states[0].keys() == states[1].keys()
    for name, state in states[0].items():
        torch.testing.assert_close(
            torch.as_tensor(states[1][name]), torch.as_tensor(state), **near, check_dtype=False
        )
    if exactly:
        assert everything(tmp_path / "waiting") == everything(tmp_path / "ahead")
    assert vars(waiting.state) | {"seconds": 0} == vars(going.state) | {"seconds": 0}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_it_is_the_same_run(tmp_path: Path, value: float, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(tmp_path, value, monkeypatch, train={"precision": "bf16", "weights": weights})


@pytest.mark.parametrize("in_batches", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_with_muon_and_an_average(
    tmp_path: Path, value: float, in_batches: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Momentum and average by other operations, which round otherwise."""
    monkeypatch.setattr(newton_schulz, "in_batches", lambda device: in_batches)
    monkeypatch.setattr(newton_schulz, "fast_dtype", lambda device_type: torch.float32)
    optim = {"optimizer": "muon", "muon_weight_decay": 0.1, "ema": 0.8, "schedule": "constant"}
    compare(tmp_path, value, monkeypatch, exactly=False, optim=optim)


def test_a_step_of_muon_and_of_the_average_that_is_left_out_changes_nothing() -> None:
    from scratchlm.config import OptimConfig
    from scratchlm.optim import build_optimizers

    model = Transformer(MODEL, seed=0).to(DEVICE)
    optimizers = build_optimizers(model, OptimConfig(optimizer="muon", muon_weight_decay=0.1, ema=0.9))

    def step(value: float, skip: float | None) -> list[torch.Tensor]:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        optimizers.step(None if skip is None else torch.tensor(skip, device=DEVICE))
        return [x.clone() for x in (*model.parameters(), *map(torch.as_tensor, optimizers.named_state().values()))]

    first = step(math.nan, 1.0)  # of all
    assert optimizers.average is not None and optimizers.average.updates == 0
    with optimizers.average.swapped():  # there is none yet: the weights themselves
        assert all(map(torch.equal, first, model.parameters()))
    before = step(0.3, 0.0)
    assert all(x.isfinite().all() for x in before)
    after = step(math.nan, 1.0)
    assert all(map(torch.equal, before, after))
    assert optimizers.average.updates == 1
    again = build_optimizers(model, OptimConfig(optimizer="muon", muon_weight_decay=0.1, ema=0.9))
    again.load_named_state(optimizers.named_state())
    optimizers.load_named_state(optimizers.named_state())  # the count of what was left out is in it
    assert again.average is not None and again.average.updates == optimizers.average.updates == 1


def test_the_host_reads_a_step_when_the_next_is_launched(
    tmp_path: Path, ahead: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    read, step = Outcome.read, Trainer._step

    def reading(self: Outcome) -> tuple[float, float]:
        events.append(f"read {self.step}")
        return read(self)

    def stepping(self: Trainer) -> Outcome:
        events.append(f"step {self.state.step + 1}")
        return step(self)

    monkeypatch.setattr(Outcome, "read", reading)
    monkeypatch.setattr(Trainer, "_step", stepping)
    run_of(tmp_path, spoilt=set(), train={"steps": 4, "log_interval": 3}).fit()
    order = list(dict.fromkeys(events))
    assert order == ["step 1", "step 2", "read 1", "step 3", "read 2", "read 3", "step 4", "read 4"]


def test_too_many_in_a_row_still_stop_the_run(tmp_path: Path, ahead: None) -> None:
    with pytest.raises(UserError, match="training stopped at step 5: 3 steps in a row"):
        run_of(tmp_path, spoilt=set(range(3, 100)), train={"steps": 50, "max_non_finite": 2}).fit()


def test_a_signal_finds_everything_read(tmp_path: Path, ahead: None) -> None:
    import os
    import signal

    class Signalling(RandomBatches):
        def next_batch(self) -> Any:
            if self.place == 6:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().next_batch()

    run = run_of(tmp_path, spoilt={7}, loader=Signalling())
    with pytest.raises(Interrupted, match="SIGTERM: stopped after step 7 of 12"):
        run.fit()
    assert (run.state.skipped, run.state.step) == (1, 7)
    assert (tmp_path / "checkpoints/step-00000007").is_dir()


@pytest.mark.parametrize(
    "changed",
    [
        {"optim": {"optimizer": "lion"}},
        {"optim": {"implementation": "foreach"}},
        {"optim": {"optimizer": "muon", "implementation": "reference"}},
    ],
)
def test_what_the_host_has_to_know_it_waits_for(tmp_path: Path, changed: dict[str, Any]) -> None:
    run = run_of(tmp_path, spoilt=set(), train={"steps": 1}, **changed)
    run.fit()
    assert not run._ahead


def test_routers_with_a_bias_wait(tmp_path: Path, ahead: None) -> None:
    fields = MODEL.model_dump() | {"moe": {"experts": 4, "top_k": 2, "bias_update": 0.1, "balance_loss": 0.0}}
    run = trainer(tmp_path, Transformer(ModelConfig(**fields), seed=0), train={"steps": 1})
    run.fit()
    assert not run._ahead


def test_resuming_goes_on_from_what_was_read(tmp_path: Path, ahead: None) -> None:
    """A run that ends in the middle and one that does not have the same weights, with steps left out before and after."""
    train = {"checkpoint_interval": 6}
    first = run_of(tmp_path / "parts", spoilt={5, 6}, train=train | {"steps": 6}, optim={"schedule": "constant"})
    first.fit()
    again = run_of(tmp_path / "parts", spoilt={2}, train=train, optim={"schedule": "constant"})
    again.fit()
    straight = run_of(tmp_path / "straight", spoilt={5, 6, 8}, train=train, optim={"schedule": "constant"})
    straight.fit()
    assert (again.state.step, again.state.skipped) == (12, 3)
    for left, right in zip(again.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(left, right)
