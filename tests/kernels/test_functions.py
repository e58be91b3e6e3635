"""softmax and SiLU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from scratchlm.kernels.functions import silu, softmax


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


def test_silu() -> None:
    x = torch.cat([torch.linspace(-20, 20, 401), torch.tensor([-1e4, 1e4, 0.0])])
    torch.testing.assert_close(silu(x), F.silu(x))
    wide = x.double().numpy()
    np.testing.assert_allclose(
        silu(x.double()).numpy(), wide / (1 + np.exp(-np.clip(wide, -700, None))), atol=1e-12
    )
    assert silu(torch.tensor(-1e4)).item() == 0 and silu(torch.tensor(1e4)).item() == 1e4
