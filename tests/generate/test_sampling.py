"""Sampling against the definitions, computed by hand in float64, and against transformers' own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scratchlm.errors import UserError
from scratchlm.generate import apply_temperature, apply_top_k, apply_top_p, row_generator, sample

logit_lists = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=30)


def probabilities(logits: list[float], temperature: float) -> list[float]:
    top = max(logits)
    weights = [math.exp((value - top) / temperature) for value in logits]
    return [weight / math.fsum(weights) for weight in weights]


def kept(logits: torch.Tensor) -> set[int]:
    return {index for index, value in enumerate(logits.tolist()) if value != -math.inf}


def by_definition(logits: list[float], temperature: float, top_k: int | None, top_p: float) -> list[float]:
    """The distribution that temperature, then top-k, then top-p leave; ties stay in top-k, the first wins in top-p."""
    alive = set(range(len(logits)))
    if top_k is not None and top_k < len(logits):
        limit = sorted(logits, reverse=True)[top_k - 1]
        alive = {index for index in alive if logits[index] >= limit}
    weights = probabilities(
        [logits[index] if index in alive else -math.inf for index in range(len(logits))], temperature
    )
    if top_p < 1:
        order = sorted(alive, key=lambda index: (-logits[index], index))
        nucleus, mass = [], 0.0
        for index in order:
            nucleus.append(index)
            mass += weights[index]
            if mass >= top_p:
                break
        alive = set(nucleus)
    total = math.fsum(weights[index] for index in alive)
    return [weights[index] / total if index in alive else 0.0 for index in range(len(logits))]


@settings(max_examples=200, deadline=None)
@given(logits=logit_lists, k=st.integers(1, 40))
def test_top_k_keeps_the_k_largest_and_what_equals_them(logits, k):
    out = apply_top_k(torch.tensor(logits), k)
    limit = sorted(logits, reverse=True)[min(k, len(logits)) - 1]
    assert kept(out) == {index for index, value in enumerate(torch.tensor(logits).tolist()) if value >= limit}
    for index in kept(out):
        assert out[index] == torch.tensor(logits)[index]


@settings(max_examples=300, deadline=None)
@given(logits=logit_lists, p=st.floats(0.01, 1.0))
def test_top_p_keeps_the_smallest_nucleus(logits, p):
    values = torch.tensor(logits, dtype=torch.float64)
    out = apply_top_p(values, p)
    weights = probabilities(values.tolist(), 1.0)
    inside = kept(out)
    assert int(values.argmax()) in inside
    if p == 1:
        assert inside == set(range(len(logits)))
        return
    mass = math.fsum(weights[index] for index in inside)
    assert mass >= p - 1e-9  # enough
    least = min(weights[index] for index in inside)
    if len(inside) > 1:
        assert mass - least < p + 1e-9  # and no token more than needed
    assert all(weights[index] <= least + 1e-12 for index in set(range(len(logits))) - inside)  # the likeliest ones


@pytest.mark.parametrize("k", [1, 3, 50, 1000])
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.999])
def test_filters_equal_transformers(k, p):
    process = pytest.importorskip("transformers.generation.logits_process", reason="transformers is not installed")
    # In fp64: they add up from the least likely, and in fp32 a token at the border is in or out by the processor's rounding.
    logits = torch.randn(6, 1000, generator=torch.Generator().manual_seed(int(1000 * p) + k)).double() * 3
    assert torch.equal(apply_top_k(logits, k), process.TopKLogitsWarper(k)(None, logits))
    assert torch.equal(apply_top_p(logits, p), process.TopPLogitsWarper(p)(None, logits))
    torch.testing.assert_close(apply_temperature(logits, p), process.TemperatureLogitsWarper(p)(None, logits))


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, None, 1.0),
        (0.5, None, 1.0),
        (2.0, None, 1.0),
        (1.0, 4, 1.0),
        (1.0, None, 0.7),
        (1.3, 6, 0.8),
        (1e-4, None, 1.0),
    ],
)
def test_draws_follow_the_distribution(temperature, top_k, top_p):
    logits = (np.random.default_rng(0).normal(size=12) * 2).tolist()
    draws = 20_000
    found = sample(
        torch.tensor([logits] * draws), temperature, top_k, top_p, [torch.Generator().manual_seed(7)] * draws
    )
    assert found.dtype == torch.int64 and found.shape == (draws,)
    counts = np.bincount(found.numpy(), minlength=12)
    expected = draws * np.array(by_definition(logits, temperature, top_k, top_p))
    assert (counts[expected == 0] == 0).all()
    # Pearson's statistic, whose mean is the degrees of freedom f and whose standard deviation is sqrt(2 f).
    some = expected > 0
    freedom = int(some.sum()) - 1
    statistic = float(((counts[some] - expected[some]) ** 2 / expected[some]).sum())
    assert statistic <= freedom + 5 * math.sqrt(2 * freedom) + 1e-6


# Sixty-fourths: two logits that differ still do so in single precision, after the largest was subtracted.
steps = st.integers(-2000, 2000).map(lambda number: number / 64)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.lists(steps, min_size=5, max_size=5), min_size=1, max_size=4),
    data=st.data(),
)
def test_a_row_draws_only_what_its_filters_leave(rows, data):
    temperature = data.draw(st.floats(0.05, 5))
    top_k = data.draw(st.none() | st.integers(1, 6))
    top_p = data.draw(st.floats(0.01, 1))
    generators = [row_generator(data.draw(st.integers(0, 1000)), row) for row in range(len(rows))]
    drawn = sample(torch.tensor(rows), temperature, top_k, top_p, generators).tolist()
    for row, token in zip(rows, drawn, strict=True):
        # A hair more than the nucleus: where its border falls on a token, single precision may decide either way.
        assert by_definition(row, temperature, top_k, min(1.0, top_p + 1e-4))[token] > 0


def test_temperature_zero_is_argmax_and_draws_nothing():
    logits = torch.randn(50, 100, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    assert torch.equal(sample(logits, 0.0, 3, 0.5, [generator] * 50), logits.argmax(dim=-1))
    assert torch.equal(generator.get_state(), before)
    assert sample(torch.tensor([[1.0, 5.0, 5.0]]), 0.0).tolist() == [1]  # of equals the first


def test_extreme_logits():
    assert sample(torch.tensor([[-math.inf, 3.0, -math.inf]]), 1.0).tolist() == [1]
    assert sample(torch.tensor([[1e30, -1e30, 0.0]]), 1e-30).tolist() == [0]
    low = torch.tensor([[-5.0, 2.0]], dtype=torch.bfloat16)
    assert sample(low, 0.01).tolist() == [1]


@pytest.mark.parametrize("vocab", [1, 2, 50_257])
def test_the_last_id_is_reachable_and_none_beyond(vocab):
    logits = torch.zeros(1, vocab)
    logits[0, -1] = 30.0
    assert sample(logits, 1.0, generators=[torch.Generator().manual_seed(0)]).tolist() == [vocab - 1]
    uniform = torch.zeros(200, vocab)
    drawn = sample(uniform, 1.0, generators=[row_generator(0, row) for row in range(200)])
    assert int(drawn.min()) >= 0 and int(drawn.max()) < vocab


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 1), (1 - 2**-24, 3)])
def test_the_ends_of_the_uniform_draw(monkeypatch, uniform, token):
    monkeypatch.setattr(torch, "rand", lambda *size, generator=None: torch.tensor(uniform))
    assert sample(torch.tensor([[-math.inf, 1.0, 1.0, 1.0, -math.inf]]), 1.0).tolist() == [token]


def test_streams_of_rows_differ_and_repeat():
    def draw(seed, row):
        return torch.rand(8, generator=row_generator(seed, row)).tolist()

    assert draw(3, 0) == draw(3, 0)
    assert len({tuple(draw(seed, row)) for seed in range(5) for row in range(5)}) == 25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.1}, "generate.temperature = -0.1 must be at least 0"),
        ({"temperature": math.nan}, "generate.temperature = nan"),
        ({"top_k": 0}, "generate.top_k = 0 must be at least 1"),
        ({"top_p": 0.0}, "generate.top_p = 0.0 must be above 0"),
        ({"top_p": 1.5}, "generate.top_p = 1.5 must be above 0 and at most 1"),
    ],
)
def test_parameters_out_of_range(arguments, message):
    with pytest.raises(UserError, match=message):
        sample(torch.zeros(1, 3), **arguments)


def test_nan_logits_are_a_plain_error():
    with pytest.raises(UserError, match="logits are NaN"):
        sample(torch.tensor([[0.0, math.nan]]), 0.0)
