"""Lion against the paper's algorithm 2, written in numpy's float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optim_models import IMPLEMENTATIONS, parameters, set_gradients
from torch import nn

from scratchlm.errors import UserError
from scratchlm.optim import Lion

every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


class PapersLion:
    """Algorithm 2: interpolate, step by the sign, decay, then remember."""

    def __init__(self, theta: np.ndarray, beta1: float, beta2: float, decay: float) -> None:
        self.theta, self.m = theta.astype(np.float64), np.zeros(theta.shape)
        self.beta1, self.beta2, self.decay = beta1, beta2, decay

    def step(self, g: np.ndarray, lr: float) -> None:
        c = self.beta1 * self.m + (1.0 - self.beta1) * g
        self.theta = self.theta - lr * (np.sign(c) + self.decay * self.theta)
        self.m = self.beta2 * self.m + (1.0 - self.beta2) * g


@every_implementation
@pytest.mark.parametrize(
    "chosen",
    [{}, {"betas": (0.95, 0.98), "weight_decay": 0.5}, {"betas": (0.0, 0.0), "weight_decay": 1.0}],
    ids=["paper", "language models", "sign descent"],
)
def test_lion_is_the_papers(chosen: dict[str, Any], implementation: str) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        group = parameters(dtype)
        optimizer = Lion(group, implementation=implementation, **chosen)
        betas, decay = chosen.get("betas", (0.9, 0.99)), chosen.get("weight_decay", 0.0)
        papers = [PapersLion(p.detach().double().numpy(), *betas, decay) for p in group]
        for step in range(100):
            set_gradients(group, step)
            lr = 1e-3 * (1 + math.sin(step))
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            for p, paper in zip(group, papers, strict=True):
                if p.grad is not None:
                    paper.step(p.grad.double().numpy(), lr)
        for p, paper in zip(group, papers, strict=True):
            np.testing.assert_allclose(p.detach().double().numpy(), paper.theta, rtol=0, atol=tolerance * 10)
            if p.grad is not None:
                m = optimizer.state[p]["exp_avg"]
                np.testing.assert_allclose(m.double().numpy(), paper.m, rtol=0, atol=100 * tolerance)
                assert m.dtype == dtype and m.shape == p.shape


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.floats(1e-20, 1e20))
def test_every_coordinate_moves_by_the_learning_rate_at_any_scale(seed: int, scale: float) -> None:
    p = nn.Parameter(torch.zeros(3, 5, dtype=torch.float64))
    p.grad = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    Lion([p], lr=0.25).step()
    assert torch.equal(p.detach(), -0.25 * p.grad.sign())


@every_implementation
def test_what_cancels_does_not_move(implementation: str) -> None:
    """β₁ m + (1 − β₁) g = 0 for g = −β₁ m / (1 − β₁): with β₁ = ½ exactly representable."""
    p = nn.Parameter(torch.ones(4))
    optimizer = Lion([p], lr=0.5, betas=(0.5, 0.75), implementation=implementation)
    p.grad = torch.tensor([4.0, -4.0, 4.0, 0.0])
    optimizer.step()
    assert p.tolist() == [0.5, 1.5, 0.5, 1.0]
    p.grad = torch.tensor([-1.0, 1.0, -1.5, 0.0])  # m is a quarter of the first
    optimizer.step()
    assert p.tolist() == [0.5, 1.5, 1.0, 1.0]


def test_wrong_settings_and_bf16() -> None:
    for wrong, message in (({"betas": (0.9, 1.0)}, "beta2 = 1"), ({"implementation": "quick"}, "allowed: auto")):
        with pytest.raises(UserError, match=message):
            Lion(parameters(), **wrong)
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    p.grad = torch.tensor([1.0, -1.0, 0.0], dtype=torch.bfloat16)
    Lion([p], lr=0.25).step()
    assert p.tolist() == [0.75, 1.25, 1.0] and p.dtype == torch.bfloat16
