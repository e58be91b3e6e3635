"""The bf16 matrix–vector product against float64, at the edges of its shapes, and where it steps aside."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from scratchlm.kernels import matvec as module
from scratchlm.kernels.matvec import fits, linear, matvec
from scratchlm.model.linear import Linear


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"], autouse=True)
def threads(request: pytest.FixtureRequest) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def exact(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(x.double(), weight.double())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 3), st.integers(0, 2**31))
def test_it_is_the_product_to_the_last_rounding(d_out: int, d_in: int, dims: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(d_out, d_in, generator=generator).bfloat16()
    x = torch.randn(*[1] * dims, d_in, generator=generator).bfloat16()
    found, wanted = matvec(x, weight), exact(x, weight)
    assert found.shape == wanted.shape and found.dtype == torch.bfloat16
    size = F.linear(x.double().abs(), weight.double().abs())  # what rounding errors are relative to
    assert ((found.double() - wanted).abs() <= wanted.abs() * 2**-8 + size * 2**-20).all()


def test_infinities_and_nan_come_through() -> None:
    weight = torch.ones(3, 40).bfloat16()
    weight[0, 7], weight[1, 20] = float("inf"), float("nan")
    y = matvec(torch.ones(40).bfloat16(), weight)
    assert y[0] == float("inf") and y[1].isnan() and y[2] == 40
    big = matvec(torch.full((2,), 3e38).bfloat16(), torch.full((1, 2), 2.0).bfloat16())
    assert big.isinf().all()


def test_the_layer_takes_it_for_one_row_and_torch_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(module, "matvec", lambda x, w: taken.append(x.shape) or matvec(x, w))
    layer = Linear(16, 24, bias=True).bfloat16()
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    one, two = torch.randn(1, 1, 16).bfloat16(), torch.randn(1, 2, 16).bfloat16()
    with torch.no_grad():
        y = layer(one)
        assert taken == [one.shape]
        assert (y.double() - (exact(one, layer.weight) + layer.bias.double())).abs().max() < 0.06
        layer(two)
    layer(one).sum().backward()  # a gradient is wanted
    assert layer.weight.grad is not None and len(taken) == 1


def test_where_it_does_not_apply() -> None:
    x, weight = torch.randn(1, 8).bfloat16(), torch.randn(4, 8).bfloat16()
    with torch.no_grad():
        assert fits(x, weight)
        assert not fits(x.float(), weight) and not fits(x, weight.float())
        assert not fits(torch.randn(2, 8).bfloat16(), weight)
        assert not fits(torch.zeros(1, 0).bfloat16(), torch.zeros(4, 0).bfloat16())
        assert not fits(torch.randn(1, 4).bfloat16(), weight.T)
        assert not fits(torch.randn(1, 6).bfloat16(), weight) and not fits(torch.randn(1, 9).bfloat16(), weight)
        assert not fits(x, weight[0])
        with torch.autocast("cpu", torch.bfloat16):
            assert not fits(x, weight)
        with FlopCounterMode(display=False) as counter:
            assert linear(x, weight).shape == (1, 4)
        assert counter.get_total_flops() == 2 * 8 * 4
        with pytest.raises(RuntimeError, match="shape"):
            linear(torch.randn(1, 6).bfloat16(), weight)
        assert linear(x, weight, torch.ones(4)).dtype == torch.bfloat16
        rows = torch.vmap(lambda row: linear(row, weight))(torch.randn(3, 8).bfloat16())
        assert rows.shape == (3, 4)
        assert linear(x.float(), weight.float()).equal(F.linear(x.float(), weight.float()))
    assert not fits(x, weight)


def test_a_forked_child_and_several_threads_at_once() -> None:
    """Numba's OpenMP kills a child that enters it after a fork; other layers abort when two threads are inside."""
    weight, x = torch.randn(64, 48).bfloat16(), torch.randn(48).bfloat16()
    wanted = matvec(x, weight)
    child = os.fork()
    if child == 0:
        os._exit(0 if matvec(x, weight).equal(wanted) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with ThreadPoolExecutor(4) as pool:
        assert all(y.equal(wanted) for y in pool.map(lambda _: matvec(x, weight), range(200)))


def test_a_layer_takes_what_its_weights_are() -> None:
    layer = Linear(16, 24).bfloat16()
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(2, 16)
    assert layer(x).dtype == torch.bfloat16 and layer.float()(x.bfloat16()).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
