"""W x + b by the routine of the place: the products against float64, at the edges of their shapes, and who computes what."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from scratchlm.kernels import hardware, matmul
from scratchlm.kernels.matmul import is_plain, linear
from scratchlm.kernels.matvec import matvec
from scratchlm.model.linear import Linear

DTYPES = [torch.float32, torch.bfloat16]
OF_ROUNDING = {torch.float32: 2**-23, torch.bfloat16: 2**-8}


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"], autouse=True)
def threads(request: pytest.FixtureRequest) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def exact(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return F.linear(x.double(), weight.double(), None if bias is None else bias.double())


def drawn(seed: int, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def assert_product(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Right up to the last rounding and the errors of sums in fp32."""
    wanted = exact(x, weight, bias)
    size = exact(
        x.abs(), weight.abs(), None if bias is None else bias.abs()
    )  # what rounding errors are relative to
    assert found.shape == wanted.shape and found.dtype == x.dtype
    assert ((found.double() - wanted).abs() <= wanted.abs() * OF_ROUNDING[x.dtype] + size * 2**-20).all()


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 3), st.booleans(), st.integers(0, 2**31))
def test_one_vector(dtype: torch.dtype, d_out: int, d_in: int, dims: int, biased: bool, seed: int) -> None:
    weight, x, bias = drawn(seed, dtype, (d_out, d_in), (*[1] * dims, d_in), (d_out,))
    given = bias if biased else None
    assert_product(matvec(x, weight, given), x, weight, given)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 40), st.integers(1, 90), st.integers(1, 90), st.booleans(), st.integers(0, 2**31))
def test_rows_in_fp32_by_either_library(rows: int, d_out: int, d_in: int, biased: bool, seed: int) -> None:
    weight, x, bias = drawn(seed, torch.float32, (d_out, d_in), (rows, d_in), (d_out,))
    given = bias if biased else None
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        for beats in (False, True):
            patch.setattr(
                matmul, "onednn_beats_mkl", lambda beats=beats: beats and torch.backends.mkldnn.is_available()
            )
            assert_product(linear(x, weight, given), x, weight, given)
            for view in (x.t().contiguous().t(), x.view(rows, 1, d_in), torch.cat([x, x], -1)[:, :d_in]):
                assert_product(linear(view, weight, given), view, weight, given)


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_nan_and_the_largest(dtype: torch.dtype) -> None:
    weight = torch.ones(3, 40, dtype=dtype)
    weight[0, 7], weight[1, 20] = float("inf"), float("nan")
    y = matvec(torch.ones(40, dtype=dtype), weight)
    assert y[0] == float("inf") and y[1].isnan() and y[2] == 40
    big = matvec(
        torch.full((2,), 3e38, dtype=dtype), torch.tensor([[2.0, 2.0], [-2.0, -2.0], [0.5, 0.0]], dtype=dtype)
    )
    assert big[0] == float("inf") and big[1] == float("-inf") and big[2] == torch.tensor(1.5e38).to(dtype)


def test_bf16_is_rounded_as_torch_rounds() -> None:
    values = torch.cat([torch.randn(2000) * 10.0**exponent for exponent in range(-40, 39, 6)])
    values = torch.cat([values, torch.tensor([1.00390625, 1.01171875, 0.0, 1e-45])])  # ties, the smallest
    x = torch.tensor([1.0, 1.0]).bfloat16()
    high = values.bfloat16()
    weight = torch.stack([high, (values - high.float()).bfloat16()], dim=1)  # the sum is not a bf16 number
    weight = torch.cat(
        [weight[weight.isfinite().all(-1)], torch.tensor([[3.3895e38, 1e36]]).bfloat16()]
    )  # beyond the edge
    wanted = (weight[:, 0].float() + weight[:, 1].float()).bfloat16()
    assert matvec(x, weight).equal(wanted) and wanted[-1] == float("inf") and len(wanted) > 20_000


def test_vectors_go_to_the_loop_rows_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[torch.Size] = []
    monkeypatch.setattr(matmul, "matvec", lambda x, w, b: taken.append(x.shape) or matvec(x, w, b))
    for dtype in DTYPES:
        layer = Linear(16, 24, bias=True).to(dtype)
        torch.nn.init.normal_(layer.weight)
        torch.nn.init.normal_(layer.bias)
        one, two = drawn(0, dtype, (1, 1, 16), (1, 2, 16))
        taken.clear()
        with torch.no_grad():
            assert_product(layer(one), one, layer.weight, layer.bias)
            assert taken == [one.shape]
            assert_product(layer(two), two, layer.weight, layer.bias)
        layer(one).sum().backward()  # a gradient is wanted
        assert layer.weight.grad is not None and len(taken) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_where_torch_is_left_alone(dtype: torch.dtype) -> None:
    x, weight = drawn(0, dtype, (1, 8), (4, 8))
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    with torch.no_grad():
        assert is_plain(x, weight) and is_plain(x.expand(3, 8), weight)
        assert not is_plain(x.to(other), weight) and not is_plain(x.double(), weight.double())
        assert not is_plain(x[:, :0], weight[:, :0]) and not is_plain(x[:0], weight) and not is_plain(x, weight[:0])
        assert not is_plain(x[:, :4], weight.T) and not is_plain(x[:, :6], weight) and not is_plain(x, weight[0])
        with torch.autocast("cpu", torch.bfloat16):
            assert not is_plain(x, weight)
        with FlopCounterMode(display=False) as counter:
            assert linear(x, weight).shape == (1, 4)
        assert counter.get_total_flops() == 2 * 8 * 4
        with pytest.raises(RuntimeError, match="shape"):
            linear(x[:, :6], weight)
        rows = torch.vmap(lambda row: linear(row, weight))(x.expand(3, 8))
        assert rows.shape == (3, 4)
        assert linear(x, weight, torch.ones(4, dtype=other)).dtype == dtype  # a bias of another dtype is rounded
        assert linear(x[:0], weight).shape == (0, 4)


def test_a_forked_child_and_several_threads_at_once() -> None:
    """Numba's OpenMP kills a child that enters it after a fork; other layers abort when two threads are inside."""
    weight, x = drawn(0, torch.bfloat16, (256, 96), (96,))
    wanted = matvec(x, weight)
    child = os.fork()
    if child == 0:
        os._exit(0 if matvec(x, weight).equal(wanted) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with ThreadPoolExecutor(4) as pool:
        assert all(y.equal(wanted) for y in pool.map(lambda _: matvec(x, weight), range(200)))


def test_who_is_asked_for_rows_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    from llvmlite import binding

    ask = hardware.onednn_beats_mkl.__wrapped__
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    monkeypatch.setattr(binding, "get_host_cpu_name", lambda: "znver3")
    assert ask() is both
    monkeypatch.setattr(binding, "get_host_cpu_name", lambda: "sapphirerapids")
    assert ask() is False
    monkeypatch.setattr(binding, "get_host_cpu_name", lambda: "znver3")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert ask() is False


def test_a_layer_takes_what_its_weights_are() -> None:
    layer = Linear(16, 24).bfloat16()
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(2, 16)
    assert layer(x).dtype == torch.bfloat16 and layer.float()(x.bfloat16()).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
