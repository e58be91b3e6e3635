"""softmax, the activations and the soft cap, each against its formula in plain Python and against torch's own."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scratchlm.kernels.functions import gelu, gelu_tanh, relu, sigmoid, silu, soft_cap, softmax, squared_relu


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20))
def test_softmax_is_a_distribution_and_torchs(values: list[float]) -> None:
    x = torch.tensor(values)
    out = softmax(x)
    torch.testing.assert_close(out, x.softmax(-1))
    assert out.sum().item() == pytest.approx(1, abs=1e-5) and (out >= 0).all()
    torch.testing.assert_close(softmax(x + 1000), x.add(1000).softmax(-1))


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2])
def test_softmax_along_any_dimension(dim: int) -> None:
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)) * 5
    torch.testing.assert_close(softmax(x, dim=dim), x.softmax(dim))


def test_softmax_at_the_extremes() -> None:
    x = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [3e38, 3e38, -3e38]])
    expected = torch.tensor([[1, 0, 0], [1 / 3, 1 / 3, 1 / 3], [0.5, 0.5, 0]])
    torch.testing.assert_close(softmax(x), expected)
    nothing = torch.full((2, 3), float("-inf"), requires_grad=True)
    out = softmax(nothing)
    assert torch.equal(out, torch.zeros(2, 3)), "documented: a row of −inf gives zeros, where torch gives NaN"
    assert softmax(torch.empty(2, 0)).shape == (2, 0)
    x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(softmax, x)


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


Pair = tuple[Callable[[Tensor], Tensor], Callable[[float], float], Callable[[Tensor], Tensor]]
ACTIVATIONS: dict[str, Pair] = {
    "relu": (relu, lambda x: max(0.0, x), F.relu),
    "squared_relu": (squared_relu, lambda x: max(0.0, x) ** 2, lambda x: F.relu(x).square()),
    "sigmoid": (sigmoid, logistic, torch.sigmoid),
    "silu": (silu, lambda x: x * logistic(x), F.silu),
    "gelu": (gelu, lambda x: x * 0.5 * math.erfc(-x / math.sqrt(2)), F.gelu),
    "gelu_tanh": (
        gelu_tanh,
        lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))),
        lambda x: F.gelu(x, approximate="tanh"),
    ),
    "soft_cap": (
        lambda x: soft_cap(x, 3.0),
        lambda x: 3 * math.tanh(x / 3),
        lambda x: 3 * F.tanh(x / 3),
    ),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_their_formulas_and_torchs(name: str) -> None:
    ours, formula, torchs = ACTIVATIONS[name]
    points = torch.cat([torch.linspace(-20, 20, 401), torch.tensor([-1e4, -200.0, 200.0, 1e4])])
    exact = points.double()
    expected = np.array([formula(x) for x in exact.tolist()])
    np.testing.assert_allclose(ours(exact).numpy(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours(points), torchs(points))
    gradients = []
    for function in (ours, torchs):
        x = points[points != 0].requires_grad_()  # a ReLU has no slope at 0
        gradients.append(torch.autograd.grad(function(x).sum(), x)[0])
    torch.testing.assert_close(*gradients)


def test_the_cap_is_never_passed_and_none_is_no_cap() -> None:
    x = torch.linspace(-1e4, 1e4, 101)
    assert soft_cap(x, None) is x
    assert soft_cap(x, 30.0).abs().max().item() == 30.0
    small = torch.linspace(-0.1, 0.1, 11, dtype=torch.float64)
    torch.testing.assert_close(soft_cap(small, 30.0), small, rtol=1e-5, atol=1e-9)
