"""Adam against torch's, and what sets it apart from AdamW."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from optim_models import IMPLEMENTATIONS, compare, parameters, set_gradients
from torch import nn

from scratchlm.optim import Adam, AdamW

every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@every_implementation
@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 1e-3},
        {"lr": 1e-3, "weight_decay": 0.3, "betas": (0.9, 0.95)},
        {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.5, 0.7), "eps": 1e-4},
        {"lr": 1e-3, "weight_decay": 0.01, "betas": (0.0, 0.999), "eps": 1e-12},
    ],
    ids=["plain", "decay", "betas, ε", "no first moment"],
)
def test_adam_is_torchs(settings: dict[str, Any], implementation: str) -> None:
    compare(Adam, torch.optim.Adam, settings, {**settings, "foreach": False}, implementation)


@every_implementation
def test_the_papers_formula_in_numpy(implementation: str) -> None:
    (p,) = group = [nn.Parameter(torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64))]
    optimizer = Adam(group, lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.2, implementation=implementation)
    theta, m, v = p.detach().numpy().copy(), np.zeros(3), np.zeros(3)
    for t in range(1, 21):
        gradient = np.sin(t * np.array([1.0, 2.0, 3.0])) * np.array([1.0, 1e-3, 0.0])
        p.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
        g = gradient + 0.2 * theta
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        theta = theta - 0.1 * (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-3)
    np.testing.assert_allclose(p.detach().numpy(), theta, rtol=0, atol=1e-7)


@every_implementation
def test_the_decay_passes_through_the_moments_and_adamws_does_not(implementation: str) -> None:
    """With no gradient Adam steps by η, however small the decay: that is what decoupling mends."""
    moved = {}
    for kind in (Adam, AdamW):
        p = nn.Parameter(torch.full((4,), 2.0))
        p.grad = torch.zeros(4)
        optimizer = kind([p], lr=0.1, weight_decay=0.01, implementation=implementation)
        optimizer.step()
        moved[kind] = (2.0 - p.detach())[0].item()
        assert optimizer.state[p]["exp_avg"].count_nonzero() == (4 if kind is Adam else 0)
    assert moved[Adam] == pytest.approx(0.1, rel=1e-4)
    assert moved[AdamW] == pytest.approx(0.1 * 0.01 * 2, rel=1e-4)


def test_without_decay_the_two_are_one() -> None:
    left, right = parameters(), parameters()
    a, b = Adam(left, lr=0.01), AdamW(right, lr=0.01, weight_decay=0.0)
    for step in range(5):
        for optimizer, group in ((a, left), (b, right)):
            set_gradients(group, step)
            optimizer.step()
    assert all(map(torch.equal, left, right))


@every_implementation
def test_gradients_stay_as_they_were(implementation: str) -> None:
    """The decay is added to a copy: who looks at a gradient after the step sees the loss's."""
    group = parameters()
    set_gradients(group, 0)
    before = [None if p.grad is None else p.grad.clone() for p in group]
    Adam(group, weight_decay=0.5, implementation=implementation).step()
    for p, gradient in zip(group, before, strict=True):
        assert (p.grad is None) == (gradient is None)
        if p.grad is not None and gradient is not None:
            assert torch.equal(p.grad, gradient)
