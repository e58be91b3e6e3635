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
SHAPES = ["linear", "sqrt", "cosine"]


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
    assert curve(7, schedule="rise", warmup_steps=4, min_lr_ratio=0.25) == pytest.approx([*rise, 0.25, 0.5, 1.0])
    assert curve(1, schedule="rise", warmup_steps=0, min_lr_ratio=0.25) == [1.0]
    with pytest.raises(UserError, match="set it above 0"):
        curve(3, schedule="rise", warmup_steps=0, min_lr_ratio=0.0)
    assert curve(8, schedule="constant", **shared) == pytest.approx([*rise, 1, 1, 1, 1])
    assert curve(8, schedule="wsd", decay_fraction=0.25, **shared) == pytest.approx([*rise, 1, 1, 0.6, 0.2])
    assert curve(8, schedule="wsd", decay_fraction=0.0, **shared) == pytest.approx([*rise, 1, 1, 1, 1])
    # A decay longer than what the warm-up leaves begins right after it.
    assert curve(8, schedule="wsd", decay_fraction=0.9, **shared) == curve(8, schedule="linear", **shared)
    assert curve(4, schedule="linear", warmup_steps=0, min_lr_ratio=0.0) == pytest.approx([0.75, 0.5, 0.25, 0])
    assert curve(2, schedule="cosine", **shared) == pytest.approx([0.25, 0.5]), "a long warm-up is cut off"
    assert curve(1, schedule="cosine", warmup_steps=0, min_lr_ratio=0.3) == pytest.approx([0.3])


def test_shapes_of_the_decay_by_hand() -> None:
    """Two steps of warm-up, four of peak, four of decay: p = ¼, ½, ¾, 1."""
    shared = {"schedule": "wsd", "warmup_steps": 2, "decay_fraction": 0.4}
    before = [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]
    roots = [0.5, 1 - 0.7071067811865476, 1 - 0.8660254037844386, 0.0]
    bends = [0.8535533905932737, 0.5, 0.14644660940672627, 0.0]
    for shape, after in (("linear", [0.75, 0.5, 0.25, 0.0]), ("sqrt", roots), ("cosine", bends)):
        found = curve(10, min_lr_ratio=0.0, decay_shape=shape, **shared)
        assert found == pytest.approx([*before, *after], abs=1e-15), shape
        raised = curve(10, min_lr_ratio=0.2, decay_shape=shape, **shared)
        assert raised == pytest.approx([*before, *(0.2 + 0.8 * value for value in after)]), shape
    assert curve(10, min_lr_ratio=0.0, **shared) == curve(10, min_lr_ratio=0.0, decay_shape="linear", **shared)


@given(st.sampled_from(SHAPES), st.integers(2, 400), st.integers(0, 100), st.floats(0.01, 1))
def test_a_decay_to_zero_reaches_it_with_the_last_step_alone(
    shape: str, total: int, warmup: int, fraction: float
) -> None:
    assume(warmup < total and round(fraction * total) > 0)
    values = curve(
        total, schedule="wsd", warmup_steps=warmup, decay_fraction=fraction, decay_shape=shape, min_lr_ratio=0.0
    )
    assert values[-1] == 0.0 and all(value > 0 for value in values[:-1])


def test_the_other_schedules_do_not_read_the_shape() -> None:
    for schedule in ("cosine", "linear", "constant"):
        plain = curve(20, schedule=schedule, warmup_steps=3)
        assert all(curve(20, schedule=schedule, warmup_steps=3, decay_shape=shape) == plain for shape in SHAPES)


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
    st.sampled_from(SHAPES),
)
def test_what_holds_of_every_schedule(
    schedule: str, total: int, warmup: int, floor: float, decay: float, shape: str
) -> None:
    config = OptimConfig(
        schedule=schedule, warmup_steps=warmup, min_lr_ratio=floor, decay_fraction=decay, decay_shape=shape
    )
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
    with pytest.raises(UserError, match="decay_shape = 'wave' is unknown; allowed: linear, sqrt, cosine"):
        lr_multiplier(200, 300, OptimConfig(schedule="wsd").model_copy(update={"decay_shape": "wave"}))
    assert lr_multiplier(0, 0, OptimConfig(warmup_steps=0, min_lr_ratio=0.1)) == pytest.approx(0.1)
