"""An update in one pass is the update in several: the same run, with and without it.

On a GPU where there is one, else in Triton's interpreter on the CPU.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from test_loop import MODEL, LossThat, lines, trainer
from triton_device import DEVICE

from scratchlm.kernels import adam, adam_triton, cross_entropy, rotary, swiglu
from scratchlm.model import Transformer
from scratchlm.optim import Adam
from scratchlm.train.loop import Trainer
from scratchlm.train.working_copy import WorkingCopy


@pytest.fixture(autouse=True)
def one_pass(interpreted: list[warnings.WarningMessage], monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels run on whatever device; interpreted, only those that this is about."""
    if DEVICE == "cpu":
        monkeypatch.setattr(swiglu, "fits", lambda gate_up: False)
        monkeypatch.setattr(rotary, "fits", lambda projected: False)
        monkeypatch.setattr(cross_entropy, "runs_on", lambda device, otherwise: False)


def run_of(folder: Path, *, in_one_pass: bool, spoilt: set[int] | None = None, **options: Any) -> Trainer:
    model = Transformer(MODEL, seed=0)
    train = {"steps": 5, "log_interval": 1, "precision": "bf16"} | options.pop("train", {})
    # A small ε would make of a gradient's last digits a step of another sign.
    optim = {"lr": 1e-2, "weight_decay": 0.1, "grad_clip": 0.5, "schedule": "constant", "eps": 1e-3} | options.pop(
        "optim", {}
    )
    made = trainer(
        folder,
        model,
        loss=LossThat(model, spoilt or set()),
        train=train,
        optim=optim,
        device=torch.device(DEVICE),
        **options,
    )
    with pytest.MonkeyPatch.context() as changed:
        if not in_one_pass:
            changed.setattr(adam, "fits", lambda parameters: False)
        made.fit()
    return made


def compare(tmp_path: Path, tolerance: float, **options: Any) -> tuple[Trainer, Trainer]:
    one, several = (run_of(tmp_path / str(way), in_one_pass=way, **options) for way in (True, False))
    assert one.update.in_one_pass and not several.update.in_one_pass
    for (name, left), right in zip(one.model.named_parameters(), several.model.parameters(), strict=True):
        torch.testing.assert_close(
            left, right, rtol=tolerance, atol=tolerance, msg=lambda said, n=name: f"{n}: {said}"
        )
    for left_line, right_line in zip(*(lines(tmp_path / str(way), "train") for way in (True, False)), strict=True):
        assert left_line["grad_norm"] == pytest.approx(right_line["grad_norm"], rel=max(tolerance, 1e-5) * 10)
        assert left_line["loss"] == pytest.approx(right_line["loss"], rel=max(tolerance, 1e-5))
    return one, several


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("optimizer", ["adamw", "adam"])
def test_with_fp32_weights(tmp_path: Path, optimizer: str, accumulation: int) -> None:
    one, _ = compare(tmp_path, 1e-5, optim={"optimizer": optimizer}, train={"accumulation": accumulation})
    assert all(line["grad_norm"] > 0.5 for line in lines(tmp_path / "True", "train")), "nothing was clipped"
    assert one._computing.copy is None


@pytest.mark.parametrize("accumulation", [1, 2])
def test_with_bf16_weights(tmp_path: Path, accumulation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    widened: list[int] = []
    collect = WorkingCopy.collect
    monkeypatch.setattr(WorkingCopy, "collect", lambda self: (widened.append(1), collect(self))[1])
    train = {"weights": "bf16", "accumulation": accumulation}
    # The last digit of a master may be another one's after rounding: then its copies, and what they compute, are 2⁻⁸ apart.
    one, _ = compare(tmp_path, 2e-3, train=train)
    assert len(widened) == (
        5 if accumulation == 1 else 20
    )  # of the run in several passes, and of two micro-batches
    assert one._computing.copy is not None
    for master, copy in one._computing.copy.pairs().items():
        assert torch.equal(copy, master.bfloat16())
        assert (master.grad is None) == (accumulation == 1)


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_a_step_that_is_not_finite_changes_nothing(
    tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host does not wait for it: the kernel leaves it out."""
    monkeypatch.setattr(Adam, "skips_on_device", lambda self: True)
    train = {"weights": weights}
    one = run_of(tmp_path / "spoilt", in_one_pass=True, spoilt={2, 5}, train=train)
    assert one._ahead and one.state.skipped == 2
    for parameter in one.model.parameters():
        assert parameter.isfinite().all()
        assert one.optimizers.optimizers["adamw"].state[parameter]["step"].item() == 3
    steps: list[int] = []
    monkeypatch.setattr(Adam, "skips_on_device", lambda self: False)
    step = adam_triton.step
    monkeypatch.setattr(adam_triton, "step", lambda *given, **how: (steps.append(1), step(*given, **how))[1])
    waiting = run_of(tmp_path / "waiting", in_one_pass=True, spoilt={2, 5}, train=train)
    assert not waiting._ahead and len(steps) == 2 * 3  # two groups
    for left, right in zip(one.model.parameters(), waiting.model.parameters(), strict=True):
        assert torch.equal(left, right)


def test_a_resumed_run_goes_on_to_the_last_digit(tmp_path: Path) -> None:
    train = {"weights": "bf16", "checkpoint_interval": 2}
    whole = run_of(tmp_path / "whole", in_one_pass=True, train=train)
    run_of(tmp_path / "parts", in_one_pass=True, train=train | {"steps": 2})
    again = run_of(tmp_path / "parts", in_one_pass=True, train=train)
    assert again.state.step == 5
    for left, right in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(left, right)


def test_where_the_average_of_weights_is_kept(tmp_path: Path) -> None:
    one, several = compare(tmp_path, 1e-5, optim={"ema": 0.9})
    assert one.optimizers.average is not None and several.optimizers.average is not None
    left, right = (run.optimizers.average.named_state() for run in (one, several))  # type: ignore[union-attr]
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-5, atol=1e-5)


def test_muon_beside_adam_goes_in_several(tmp_path: Path) -> None:
    run = run_of(tmp_path, in_one_pass=True, optim={"optimizer": "muon"}, train={"weights": "bf16", "steps": 2})
    assert not run.update.in_one_pass
    assert run._computing.copy is not None
    for master, copy in run._computing.copy.pairs().items():
        assert torch.equal(copy, master.bfloat16())
