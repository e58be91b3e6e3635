"""Gradient clipping against torch's."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optim_models import parameters, set_gradients
from torch import nn

from scratchlm.optim import clip_grad_norm


@settings(max_examples=30, deadline=None)
@given(st.floats(1e-4, 1e4), st.integers(0, 20))
def test_torchs(max_norm: float, step: int) -> None:
    left, right = parameters(), parameters()
    for group in (left, right):
        set_gradients(group, step)
    ours = clip_grad_norm(left, max_norm)
    theirs = torch.nn.utils.clip_grad_norm_(right, max_norm)
    torch.testing.assert_close(ours, theirs)
    assert ours.dtype == torch.float32 and ours.shape == ()
    for p, q in zip(left, right, strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad)
    assert clip_grad_norm(left, 0.0).item() <= max_norm * (1 + 1e-5)


def test_by_hand() -> None:
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    a.grad, b.grad = torch.tensor([2.0, 3.0]), torch.tensor([6.0])
    assert clip_grad_norm([a, b], 0.0).item() == 7 and a.grad.tolist() == [2, 3], "0 only measures"
    assert clip_grad_norm(iter([a, b]), 10.0).item() == 7 and b.grad.tolist() == [6], "small ones stay as they are"
    assert clip_grad_norm([a, b], 3.5).item() == 7
    torch.testing.assert_close(torch.cat([a.grad, b.grad]), torch.tensor([1.0, 1.5, 3.0]))
    assert clip_grad_norm(a, 100.0).item() == pytest.approx(math.sqrt(3.25))
    assert clip_grad_norm([], 1.0).item() == 0 and clip_grad_norm([nn.Parameter(torch.ones(1))], 1.0).item() == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_reported_and_left_alone(bad: float) -> None:
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    a.grad, b.grad = torch.tensor([2.0, 30.0]), torch.tensor([bad])
    norm = clip_grad_norm([a, b], 1.0)
    assert not norm.isfinite()
    assert a.grad.tolist() == [2, 30]
    torch.testing.assert_close(b.grad, torch.tensor([bad]), equal_nan=True)


def test_the_norm_of_half_precision_is_summed_in_float32() -> None:
    p = nn.Parameter(torch.zeros(100_000, dtype=torch.bfloat16))
    p.grad = torch.full_like(p, 10.0)
    assert clip_grad_norm([p], 0.0).item() == pytest.approx(10 * math.sqrt(100_000), rel=1e-5)
    clip_grad_norm([p], 1.0)
    assert p.grad.dtype == torch.bfloat16
    assert p.grad.float().norm().item() == pytest.approx(1, rel=1e-2)
