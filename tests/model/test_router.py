"""Routers and what keeps their load even: losses by brute force, the correction bias, jitter."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mixtures import inputs, mixture, run
from torch import Tensor

from scratchlm.model.router import balance_loss, entropy, z_loss


@pytest.mark.parametrize("k", [1, 2, 3])
def test_balance_loss(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    shares = torch.rand(3, 7, 4, generator=generator).double().softmax(-1)
    experts = torch.stack([torch.randperm(4, generator=generator)[:k] for _ in range(21)]).view(3, 7, k)

    def of(tokens: list[tuple[int, int]]) -> float:
        total = 0.0
        for i in range(4):
            f = sum(int(i in experts[t].tolist()) for t in tokens) / (k * len(tokens))
            total += f * sum(float(shares[t][i]) for t in tokens) / len(tokens)
        return 4 * total

    everything = [(row, t) for row in range(3) for t in range(7)]
    assert float(balance_loss(shares, experts, "batch")) == pytest.approx(of(everything))
    each = [of([(row, t) for t in range(7)]) for row in range(3)]
    assert float(balance_loss(shares, experts, "sequence")) == pytest.approx(sum(each) / 3)


def test_balance_loss_is_1_when_even_and_the_number_of_experts_when_collapsed() -> None:
    even = torch.full((1, 6, 3), 1 / 3)
    for k in (1, 2, 3):
        turns = torch.tensor([[[(t + j) % 3 for j in range(k)] for t in range(6)]])
        assert float(balance_loss(even, turns, "batch")) == pytest.approx(1)
    collapsed = torch.tensor([0.0, 0.0, 1.0]).expand(1, 6, 3)
    assert float(balance_loss(collapsed, torch.full((1, 6, 1), 2), "batch")) == pytest.approx(3)


def test_balance_loss_pushes_against_the_load() -> None:
    """Gradient descent on the loss lowers the score of the expert that has most."""
    scores = torch.zeros(1, 8, 3, requires_grad=True)
    experts = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2]).view(1, 8, 1)
    (gradient,) = torch.autograd.grad(balance_loss(scores.softmax(-1), experts, "batch"), scores)
    assert (gradient[..., 0] > 0).all() and (gradient[..., 2] < 0).all()


def test_z_loss_and_entropy() -> None:
    scores = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)).double() * 3
    expected = np.mean([math.log(sum(math.exp(s) for s in row)) ** 2 for row in scores.view(-1, 4).tolist()])
    assert float(z_loss(scores)) == pytest.approx(expected)
    assert float(entropy(torch.full((5, 4), 0.25))) == pytest.approx(math.log(4))
    assert float(entropy(torch.eye(4))) == 0


def test_the_records_loss_is_the_weighted_sum() -> None:
    x = inputs(2, 9)
    loss = {
        (b, z): float(run(mixture(balance_loss=b, router_z_loss=z), x)[1].loss.detach())
        for b in (0.0, 0.5)
        for z in (0.0, 0.25)
    }
    with torch.no_grad():
        routing = mixture().router(x)
    balance, z = balance_loss(routing.shares, routing.experts, "batch"), z_loss(routing.scores)
    assert loss[0.0, 0.0] == 0
    assert loss[0.5, 0.0] == pytest.approx(0.5 * float(balance))
    assert loss[0.0, 0.25] == pytest.approx(0.25 * float(z))
    assert loss[0.5, 0.25] == pytest.approx(0.5 * float(balance) + 0.25 * float(z))


def test_sequences_are_balanced_each_by_itself() -> None:
    x = inputs(3, 7)
    each = [float(run(mixture(balance_loss=1.0), row)[1].loss.detach()) for row in x]
    together = mixture(balance_loss=1.0, balance_over="sequence")
    assert float(run(together, x)[1].loss.detach()) == pytest.approx(sum(each) / 3)
    assert float(run(together, x.flatten(0, 1))[1].loss.detach()) != pytest.approx(sum(each) / 3, rel=1e-3)


def test_the_bias_moves_by_gamma_against_the_load() -> None:
    router = mixture(bias_update=0.125).router
    before = router.correction.clone()
    router.update_bias(torch.tensor([5.0, 1.0, 3.0, 3.0]))
    torch.testing.assert_close(router.correction - before, torch.tensor([-0.125, 0.125, 0.0, 0.0]))
    assert mixture().router.correction is None
    assert mixture(router="sigmoid").router.correction is not None  # for models that were trained with one
    mixture().update_bias(torch.ones(4))  # nothing to move


@pytest.mark.parametrize("router", ["softmax_topk", "topk_softmax", "sigmoid"])
def test_the_bias_balances_an_unbalanced_router_in_training(router: str) -> None:
    """Scores that favour two experts for every token; no balance loss. The bias alone evens out the load."""

    def train(bias_update: float) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        module = mixture(router=router, router_bias=True, balance_loss=0.0, bias_update=bias_update, experts=8)
        with torch.no_grad():
            module.router.score.bias.copy_(torch.tensor([4.0, 4.0] + [0.0] * 6))
            if module.router.correction is not None:
                module.router.correction.zero_()
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
        loads = []
        for step in range(120):
            x = inputs(64, seed=step)
            y, record = run(module, x)
            optimizer.zero_grad()
            (F.mse_loss(y, x) + record.loss).backward()
            optimizer.step()
            module.update_bias(record.load)
            loads.append(record.load)
        return loads[0], torch.stack(loads[-20:]).mean(0)

    first, stuck = train(0.0)
    mean = 64 * 2 / 8
    assert first.max() > 2.5 * mean and stuck.max() > 2.5 * mean
    gamma = {"softmax_topk": 0.02, "topk_softmax": 0.1, "sigmoid": 0.02}[router]
    first, balanced = train(gamma)
    assert first.max() > 2.5 * mean
    assert balanced.max() < 1.4 * mean and balanced.min() > 0.6 * mean


def test_jitter_acts_in_training_alone_and_on_the_router_alone() -> None:
    module, plain = mixture(jitter=0.3), mixture()
    x = inputs(50)
    exact = plain.router(x).scores
    assert torch.equal(module.eval().router(x).scores, exact)
    with torch.no_grad():
        module.router.score.weight.copy_(torch.eye(4, x.shape[-1]))  # scores are the first four inputs themselves
    torch.manual_seed(0)
    factors = module.train().router(x).scores.detach() / x[:, :4]
    assert 0.7 <= factors.min() < 0.75 and 1.25 < factors.max() <= 1.3001
    assert factors.mean() == pytest.approx(1, abs=0.05)
    everyone = mixture(jitter=0.3, top_k=4, router="sigmoid", normalise=True).train()
    with torch.no_grad():
        everyone.router.score.weight.zero_()  # gates no longer depend on the input: then nothing is noisy
    torch.testing.assert_close(run(everyone, x)[0], run(everyone.eval(), x)[0])
