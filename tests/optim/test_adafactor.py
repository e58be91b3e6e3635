"""Adafactor against torch's and transformers', in the settings in which each agrees with the paper."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from optim_models import IMPLEMENTATIONS, compare, parameters, set_gradients, small_model, train_step
from torch import nn

from scratchlm.config import OptimConfig
from scratchlm.errors import UserError
from scratchlm.optim import Adafactor, build_optimizers

every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
TOLERANCES = (5e-6, 1e-10)


@every_implementation
@pytest.mark.parametrize(
    "chosen",
    [
        {"lr": 0.01},
        {"lr": 0.3, "weight_decay": 0.1},
        {"lr": 0.05, "decay": -0.5, "clip": 2.0, "eps2": 0.1},
    ],
    ids=["paper", "decay, 1/√t at work", "other constants"],
)
def test_relative_steps_are_torchs(chosen: dict[str, Any], implementation: str) -> None:
    """torch's has relative steps and scales always; its ε₁ bounds √V̂ from below, ours is added to squares."""
    names = {"decay": "beta2_decay", "clip": "d"}
    eps2 = chosen.get("eps2", 1e-3)
    mine = {name: value for name, value in chosen.items() if name != "eps2"}
    theirs = {"eps": (1e-15, eps2), **{names.get(name, name): value for name, value in mine.items()}}
    mine |= {"relative_step": True, "scale_parameter": True, "eps": (1e-30, eps2)}
    compare(Adafactor, torch.optim.Adafactor, mine, theirs, implementation, TOLERANCES)


@every_implementation
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("relative", [False, True])
def test_every_option_is_transformers(relative: bool, scaled: bool, implementation: str) -> None:
    options = {"relative_step": relative, "scale_parameter": scaled}
    mine = {"lr": 0.01, "clip": 1.5, "decay": -0.7, **options}
    theirs = {"lr": None if relative else 0.01, "clip_threshold": 1.5, "decay_rate": -0.7, **options}
    # A learning rate of its own, min(0.01, 1/√t), is not scheduled.
    compare(Adafactor, transformers.Adafactor, mine, theirs, implementation, TOLERANCES, scheduled=not relative)


def papers_update(g: np.ndarray, r: np.ndarray, c: np.ndarray, beta2: float) -> tuple[np.ndarray, ...]:
    """Algorithms 4 and 1 as printed: sums, not means. (update before the learning rate, R, C)."""
    r = beta2 * r + (1 - beta2) * (g * g + 1e-30) @ np.ones(g.shape[1])
    c = beta2 * c + (1 - beta2) * np.ones(g.shape[0]) @ (g * g + 1e-30)
    u = g / np.sqrt(np.outer(r, c) / (np.ones(len(r)) @ r))
    return u / max(1.0, np.sqrt((u * u).mean()) / 1.0), r, c


@every_implementation
def test_each_expert_is_factored_by_itself_as_the_paper_sums(implementation: str) -> None:
    """Stacked matrices, one never clipped (d is large): each moves as if it were alone."""
    p = nn.Parameter(torch.zeros(3, 4, 5, dtype=torch.float64))
    optimizer = Adafactor(
        [p], lr=0.1, relative_step=False, scale_parameter=False, clip=1e6, implementation=implementation
    )
    alone = [(np.zeros((4, 5)), np.zeros(4), np.zeros(5)) for _ in range(3)]
    for t in range(1, 11):
        gradient = np.random.default_rng(t).standard_normal((3, 4, 5)) * np.array([1.0, 1e-4, 1e4])[:, None, None]
        p.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
        for number, (theta, r, c) in enumerate(alone):
            r, c = papers_update(gradient[number], r, c, 1 - t**-0.8)[1:]
            u = gradient[number] / np.sqrt(np.outer(r, c) / r.sum())
            alone[number] = theta - 0.1 * u, r, c
    for number, (theta, r, c) in enumerate(alone):
        np.testing.assert_allclose(p.detach()[number].numpy(), theta, rtol=1e-10)
        np.testing.assert_allclose(optimizer.state[p]["row_mean"][number].numpy(), r / 5, rtol=1e-10)
        np.testing.assert_allclose(optimizer.state[p]["column_mean"][number].numpy(), c / 4, rtol=1e-10)


@every_implementation
def test_the_papers_algorithm_for_a_matrix(implementation: str) -> None:
    p = nn.Parameter(torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    optimizer = Adafactor([p], lr=0.01, implementation=implementation)
    theta, r, c = p.detach().numpy().copy(), np.zeros(6), np.zeros(3)
    clipped = 0
    for t in range(1, 31):
        gradient = np.random.default_rng(t).standard_normal((6, 3)) * (50.0 if t % 7 == 0 else 1.0)
        p.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
        update, r, c = papers_update(gradient, r, c, 1 - t**-0.8)
        clipped += bool(np.isclose(np.sqrt((update * update).mean()), 1.0))
        alpha = max(1e-3, np.sqrt((theta * theta).mean())) * min(1e-2, t**-0.5)
        theta = theta - alpha * update
    assert 0 < clipped < 30, "clipping was at work, and not always"
    np.testing.assert_allclose(p.detach().numpy(), theta, rtol=1e-11)


@every_implementation
def test_small_parameters_have_a_least_scale(implementation: str) -> None:
    """ε₂ for a parameter of zeros, which could else never leave them; its RMS for a larger one."""
    zero, large = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.tensor([3.0, -4.0, 0.0, 0.0]))
    for p in (zero, large):
        p.grad = torch.ones_like(p)
    Adafactor([zero, large], lr=0.1, relative_step=False, eps=(1e-30, 0.01), implementation=implementation).step()
    torch.testing.assert_close(zero.detach(), torch.full((2, 2), -0.1 * 0.01))
    torch.testing.assert_close(large.detach(), torch.tensor([3.0, -4.0, 0.0, 0.0]) - 0.1 * 2.5)


@every_implementation
def test_a_rank_one_gradient_is_known_exactly(implementation: str) -> None:
    """G² = r cᵀ is its own factorisation: the update is the sign."""
    rows, columns = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.1, -4.0])
    p = nn.Parameter(torch.zeros(3, 2))
    p.grad = rows[:, None] * columns
    Adafactor([p], lr=0.5, relative_step=False, scale_parameter=False, implementation=implementation).step()
    torch.testing.assert_close(p.detach(), -0.5 * p.grad.sign())


@every_implementation
def test_zero_and_tiny_gradients_are_harmless(implementation: str) -> None:
    """In fp32, where the product of two squares of 1e-20 is 0."""
    p, q = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    p.grad, q.grad = torch.zeros(4, 4), torch.full((4, 4), 1e-13)
    q.grad[0] = 0.0
    Adafactor([p, q], lr=0.5, relative_step=False, scale_parameter=False, implementation=implementation).step()
    assert torch.equal(p.detach(), torch.ones(4, 4))
    assert torch.equal(q.detach()[0], torch.ones(4)) and torch.isfinite(q).all()
    assert (q.detach()[1:] < 1).all()


def test_state_is_rows_and_columns_and_a_wrong_one_is_refused() -> None:
    model = small_model()
    optimizers = build_optimizers(model, OptimConfig(optimizer="adafactor"))
    train_step(model, optimizers, 0)
    state = optimizers.named_state()
    matrix = "blocks.0.attention.qkv.weight"
    assert state[f"adafactor.row_mean.{matrix}"].shape == (48,)
    assert state[f"adafactor.column_mean.{matrix}"].shape == (16,)
    assert state["adafactor.exp_avg_sq.norm.weight"].shape == (16,)
    kept = sum(value.numel() for name, value in state.items() if ".step." not in name)
    assert kept == sum(sum(p.shape) if p.ndim == 2 else p.numel() for p in model.parameters())
    good = copy.deepcopy(state)
    for wrong, message in (
        ({**good, f"adafactor.row_mean.{matrix}": torch.zeros(16)}, r"shape \(16,\), this parameter's \(48,\)"),
        ({**good, f"adafactor.exp_avg_sq.{matrix}": torch.zeros(48, 16)}, "do not have"),
        ({k: v for k, v in good.items() if k != f"adafactor.column_mean.{matrix}"}, "lacks adafactor.column_mean"),
    ):
        with pytest.raises(UserError, match=message):
            optimizers.load_named_state(wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"decay": 0.0}, "decay = 0.0 must be below 0"),
        ({"clip": 0.5}, "clip = 0.5"),
        ({"eps": (0.0, 1e-3)}, "eps"),
        ({"lr": -1.0}, "lr = -1"),
        ({"implementation": "quick"}, "allowed: auto"),
    ],
)
def test_wrong_settings(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Adafactor(parameters(), **wrong)


@every_implementation
def test_bf16_parameters(implementation: str) -> None:
    half, full = parameters(torch.bfloat16), parameters()
    for group in (half, full):
        optimizer = Adafactor(group, lr=0.05, implementation=implementation)
        for step in range(3):
            set_gradients(group, step)
            optimizer.step()
    for p, q in zip(half, full, strict=True):
        assert p.dtype == torch.bfloat16
        torch.testing.assert_close(p.float(), q, rtol=3e-2, atol=3e-2)
