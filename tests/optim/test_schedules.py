"""Learning-rate schedules: points by hand, closed forms, and what holds of every one."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from scratchlm.config import OptimConfig
from scratchlm.errors import UserError
from scratchlm.optim import lr_multiplier

SCHEDULES = ["cosine", "linear", "wsd", "constant"]


def curve(total: int, **fields: object) -> list[float]:
    config = OptimConfig(**fields)
    return [lr_multiplier(step, total, config) for step in range(total)]


def test_points_by_hand() -> None:
    shared = {"warmup_steps": 4, "min_lr_ratio": 0.2}
    rise = [0.25, 0.5, 0.75, 1.0]  # from zero, in equal parts, the first step with 1/W
    assert curve(8, schedule="linear", **shared) == pytest.approx([*rise, 0.8, 0.6, 0.4, 0.2])
    half = 0.2 + 0.8 * 0.5
    bend = 0.8 * math.sqrt(0.5) / 2
    assert curve(8, schedule="cosine", **shared) == pytest.approx([*rise, half + bend, half, half - bend, 0.2])
    assert curve(8, schedule="constant", **shared) == pytest.approx([*rise, 1, 1, 1, 1])
    assert curve(8, schedule="wsd", decay_fraction=0.25, **shared) == pytest.approx([*rise, 1, 1, 0.6, 0.2])
    assert curve(8, schedule="wsd", decay_fraction=0.0, **shared) == pytest.approx([*rise, 1, 1, 1, 1])
    # A decay longer than what the warm-up leaves begins right after it.
    assert curve(8, schedule="wsd", decay_fraction=0.9, **shared) == curve(8, schedule="linear", **shared)
    assert curve(4, schedule="linear", warmup_steps=0, min_lr_ratio=0.0) == pytest.approx([0.75, 0.5, 0.25, 0])
    assert curve(2, schedule="cosine", **shared) == pytest.approx([0.25, 0.5]), "a long warm-up is cut off"
    assert curve(1, schedule="cosine", warmup_steps=0, min_lr_ratio=0.3) == pytest.approx([0.3])


def test_cosine_is_torchs() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=90, eta_min=0.1)
    config = OptimConfig(schedule="cosine", warmup_steps=10, min_lr_ratio=0.1)
    assert lr_multiplier(9, 100, config) == schedule.get_last_lr()[0] == 1.0
    for step in range(10, 100):
        optimizer.step()
        schedule.step()
        assert lr_multiplier(step, 100, config) == pytest.approx(schedule.get_last_lr()[0], abs=1e-9)


@given(
    st.sampled_from(SCHEDULES),
    st.integers(1, 300),
    st.integers(0, 400),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_what_holds_of_every_schedule(schedule: str, total: int, warmup: int, floor: float, decay: float) -> None:
    config = OptimConfig(schedule=schedule, warmup_steps=warmup, min_lr_ratio=floor, decay_fraction=decay)
    values = [lr_multiplier(step, total, config) for step in range(total + 5)]
    assert all(0 <= value <= 1 + 1e-12 for value in values)
    rise, fall = values[:warmup], values[warmup:]
    assert rise == sorted(rise) and fall == sorted(fall, reverse=True)
    if warmup:
        assert rise[0] == pytest.approx(1 / warmup)
    assert all(value >= floor - 1e-12 for value in fall)
    if warmup < total:
        reaches = schedule in ("cosine", "linear") or (schedule == "wsd" and round(decay * total) > 0)
        assert values[total - 1] == pytest.approx(floor if reaches else 1.0)
        assert values[total:] == [values[total - 1]] * 5, "and stays there"


@given(st.integers(2, 500), st.integers(0, 100))
def test_linear_falls_by_equal_steps(total: int, warmup: int) -> None:
    assume(warmup < total)
    config = OptimConfig(schedule="linear", warmup_steps=warmup, min_lr_ratio=0.0)
    values = [1.0, *(lr_multiplier(step, total, config) for step in range(warmup, total))]
    for before, after in itertools.pairwise(values):
        assert before - after == pytest.approx(1 / (total - warmup), abs=1e-9)


def test_errors_and_no_steps() -> None:
    with pytest.raises(UserError, match="at least 0"):
        lr_multiplier(-1, 10, OptimConfig())
    with pytest.raises(UserError, match="at least 0"):
        lr_multiplier(0, -1, OptimConfig())
    with pytest.raises(UserError, match="unknown"):
        lr_multiplier(200, 300, OptimConfig().model_copy(update={"schedule": "wave"}))
    assert lr_multiplier(0, 0, OptimConfig(warmup_steps=0, min_lr_ratio=0.1)) == pytest.approx(0.1)
