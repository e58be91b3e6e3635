"""SwiGLU as one operation against the formula in float64: on a GPU where there is one, else in Triton's interpreter on the CPU."""

from __future__ import annotations

import shutil
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_flash_attention_triton import ahead, compiles
from torch import Tensor
from triton_device import DEVICE

from scratchlm.kernels import rows_cpp, swiglu_op, swiglu_triton, triton_probe
from scratchlm.kernels import swiglu as kernels
from scratchlm.kernels.swiglu import swiglu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDED = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Of a result that was computed in fp32: half the distance between two numbers of the dtype."""


@pytest.fixture(autouse=True)
def in_triton(interpreted: list[warnings.WarningMessage]) -> None:
    pass


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """gate‖up of `shape`, and a gradient of what comes out of it."""
    generator = torch.Generator().manual_seed(seed)
    gate_up = (3 * torch.randn(*shape, generator=generator)).to(DEVICE, dtype)
    d_out = torch.randn(*shape[:-1], shape[-1] // 2, generator=generator).to(DEVICE, dtype)
    return gate_up, d_out


def exact(gate_up: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor]:
    wide = gate_up.double().requires_grad_()
    gate, up = wide.chunk(2, dim=-1)
    out = F.silu(gate) * up
    return out.detach(), torch.autograd.grad(out, wide, d_out.double())[0]


def check(gate_up: Tensor, d_out: Tensor) -> None:
    """Values and gradient as by the formula in float64, but for the dtype's rounding and the last digits of fp32."""
    given = gate_up.detach().requires_grad_()
    out = swiglu(given)
    (gradient,) = torch.autograd.grad(out, given, d_out)
    assert out.dtype == gradient.dtype == gate_up.dtype
    assert out.is_contiguous() and gradient.is_contiguous()
    near = {"rtol": ROUNDED[gate_up.dtype] + 2e-6, "atol": 4e-6}
    right = exact(gate_up, d_out)
    torch.testing.assert_close(out.detach().double(), right[0], **near)
    torch.testing.assert_close(gradient.double(), right[1], **near)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 7, 64, 2048, 2049, 2730, 4100])
def test_values_and_gradients(width: int, dtype: torch.dtype) -> None:
    check(*drawn(3, 2 * width, dtype=dtype))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lead=st.lists(st.integers(0, 4), max_size=3),
    width=st.integers(0, 70),
    dtype=st.sampled_from(DTYPES),
    transposed=st.booleans(),
    gradient=st.sampled_from(["own", "transposed", "expanded"]),
    seed=st.integers(0, 99),
)
def test_any_problem(
    lead: list[int], width: int, dtype: torch.dtype, transposed: bool, gradient: str, seed: int
) -> None:
    gate_up, d_out = drawn(*lead, 2 * width, dtype=dtype, seed=seed)
    if transposed and lead:
        gate_up = gate_up.transpose(0, -1).contiguous().transpose(0, -1)
    if gradient == "transposed" and lead:
        d_out = d_out.transpose(0, -1).contiguous().transpose(0, -1)
    if gradient == "expanded":
        d_out = d_out.new_full((), 0.5).expand(d_out.shape)
    check(gate_up, d_out)


def test_large_gates_have_a_finite_gradient() -> None:
    """exp(−g) overflows below −88, where silu is 0 and so is its slope; far above, silu(g) = g."""
    gates = torch.tensor([-1e4, -200.0, -90.0, -0.0, 0.0, 90.0, 1e4], device=DEVICE)
    check(torch.cat([gates, gates.flip(0)])[None], torch.ones(1, 7, device=DEVICE))
    gate_up = torch.cat([gates, torch.ones_like(gates)])[None].requires_grad_()
    (gradient,) = torch.autograd.grad(swiglu(gate_up).sum(), gate_up)
    assert gradient.isfinite().all()
    assert gradient[0, :3].tolist() == [0, 0, pytest.approx(0, abs=1e-36)] and gradient[0, 5:7].tolist() == [1, 1]


def test_a_nan_stays_in_its_place() -> None:
    gate_up, d_out = drawn(3, 40, dtype=torch.float32)
    gate_up[1, 5] = float("nan")
    gate_up[2, 25] = float("inf")
    given = gate_up.requires_grad_()
    out = swiglu(given)
    (gradient,) = torch.autograd.grad(out, given, d_out)
    assert out.isnan().nonzero().tolist() == [[1, 5]] and out.isinf().nonzero().tolist() == [[2, 5]]
    assert gradient.isnan().nonzero().tolist() == [[1, 5], [1, 25]]


def test_two_runs_agree_to_the_bit() -> None:
    first, second = (swiglu(drawn(5, 700, dtype=torch.bfloat16)[0]) for _ in range(2))
    assert torch.equal(first, second)


def test_odd_widths_are_no_two_halves() -> None:
    with pytest.raises(ValueError, match="two halves, but their width is 7"):
        swiglu(torch.ones(2, 7, device=DEVICE))


def test_when_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(2, 8, device=DEVICE)
    assert [kernels.fits(x.to(dtype)) for dtype in (*DTYPES, torch.float64)] == [True, True, True, False]
    with torch.no_grad():
        assert not kernels.fits(x)
    monkeypatch.undo()
    assert kernels.fits(x) == (DEVICE == "cuda" or rows_cpp.runs(x.dtype))
    monkeypatch.setattr(rows_cpp, "runs", lambda dtype: False)
    assert kernels.fits(x) == (DEVICE == "cuda")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_the_operations_keep_their_promises(dtype: torch.dtype) -> None:
    """Schema, shapes without computing, gradients under torch.compile: torch's own check of custom operations."""
    gate_up, d_out = drawn(3, 5, 2 * 6, dtype=dtype)
    near = {"rtol": 1e-2, "atol": 1e-2} if dtype in (torch.bfloat16, torch.float16) else {}
    torch.library.opcheck(swiglu_op.swiglu, (gate_up.clone().requires_grad_(),), **near)
    torch.library.opcheck(swiglu_op.swiglu_backward, (d_out, gate_up), **near)


def test_in_float64_by_the_formula() -> None:
    gate_up = drawn(3, 2 * 5, dtype=torch.float64)[0].requires_grad_()
    assert torch.autograd.gradcheck(swiglu, (gate_up,))


COMPILERS = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler"),
        ],
    ),
]


@pytest.mark.parametrize("backend", COMPILERS)
def test_compiled_it_gives_the_same(backend: str) -> None:
    torch._dynamo.reset()
    gate_up, d_out = drawn(3, 5, 2 * 30, dtype=torch.bfloat16)

    def layer(x: Tensor) -> Tensor:
        return swiglu(x * 2.0) + 1.0 if kernels.fits(x) else x

    found = []
    for function in (layer, torch.compile(layer, backend=backend, fullgraph=True, dynamic=False)):
        given = gate_up.clone().requires_grad_()
        out = function(given)
        found.append((out.detach(), torch.autograd.grad(out, given, d_out)[0]))
    torch.testing.assert_close(found[1], found[0], rtol=2**-7, atol=0)
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_machine_without_a_compiler_gets_torchs_kernels_and_is_told_once(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, told: list[warnings.WarningMessage]
) -> None:
    def fails(device: torch.device) -> None:
        raise RuntimeError("Failed to find C compiler.\nmore")

    def not_here(*_: Any) -> None:
        raise AssertionError("the kernel was called")

    monkeypatch.setattr(triton_probe, "probe", fails)
    monkeypatch.setattr(swiglu_triton, "forward", not_here)
    monkeypatch.setattr(swiglu_triton, "backward", not_here)
    for shape in ((4, 2 * 30), (2, 3, 2 * 5)):
        gate_up, d_out = drawn(*shape, dtype=dtype)
        given = gate_up.requires_grad_()
        out = swiglu(given)
        (gradient,) = torch.autograd.grad(out, given, d_out)
        right = exact(gate_up, d_out)
        near = {
            "rtol": 4 * ROUNDED[dtype] + 2e-6,
            "atol": 4 * ROUNDED[dtype] + 4e-6,
        }  # what is in between is rounded, too
        torch.testing.assert_close(out.detach().double(), right[0], **near)
        torch.testing.assert_close(gradient.double(), right[1], **near)
    assert [str(w.message) for w in told] == [
        "SwiGLU and its gradient are computed by torch's kernels, which is slower: triton does not run here "
        "(RuntimeError: Failed to find C compiler.)"
    ]


def test_how_it_is_launched() -> None:
    """Whole blocks where there are some, of no more threads than there is work for."""
    tiles = {width: swiglu_triton.tiling(width) for width in (1, 64, 1365, 2048, 2816, 5632, 8192, 14336)}
    assert {width: (tile["BLOCK"], tile["num_warps"]) for width, tile in tiles.items()} == {
        1: (1, 1),
        64: (64, 1),
        1365: (512, 2),
        2048: (2048, 8),
        2816: (1024, 4),
        5632: (512, 2),
        8192: (2048, 8),
        14336: (2048, 8),
    }


# --- what the compiler and a GPU say --------------------------------------------------------------------------------------


@compiles
@pytest.mark.parametrize("capability", ["90", pytest.param("80", marks=pytest.mark.slow)])
def test_the_compiler_reads_and_writes_16_bytes_at_once(capability: str) -> None:
    rows = [row for row in ahead(capability, "--pointwise") if row["kernel"].startswith("swiglu")]
    assert {(row["kernel"], row["dtype"], row["width"]) for row in rows} == {
        (f"swiglu_{which}", dtype, width)
        for which in ("forward", "backward")
        for dtype in ("*bf16", "*fp32")
        for width in (64, 1365, 2048)
    }
    for row in rows:
        assert row["stack"] == 0 and row["registers"] <= 64, row
        if row["width"] == 2048:
            loads, stores = (2, 1) if row["kernel"] == "swiglu_forward" else (3, 2)
            pieces = 2 if row["dtype"] == "*fp32" else 1  # eight numbers per thread
            assert row["accesses"] == {"exchanges": 0, "ld 128": loads * pieces, "st 128": stores * pieces}, row


on_a_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="there is no GPU here")


@on_a_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1365, 2048, 5632])
def test_on_a_gpu(width: int, dtype: torch.dtype) -> None:
    check(*drawn(512, 2 * width, dtype=dtype))


@on_a_gpu
def test_more_numbers_than_an_int32_counts() -> None:
    rows = 2**31 // 4096 + 8
    gate_up = torch.zeros(rows, 4096, dtype=torch.bfloat16, device=DEVICE)
    last, d_last = drawn(3, 4096, dtype=torch.bfloat16)
    gate_up[-3:] = last
    d_out = torch.zeros(rows, 2048, dtype=torch.bfloat16, device=DEVICE)
    d_out[-3:] = d_last
    right = exact(last, d_last)
    torch.testing.assert_close(swiglu(gate_up)[-3:].double(), right[0], rtol=2**-8 + 2e-6, atol=4e-6)
    gradient = swiglu_op.swiglu_backward(d_out, gate_up)
    torch.testing.assert_close(gradient[-3:].double(), right[1], rtol=2**-8 + 2e-6, atol=4e-6)
    assert not gradient[:-3].any()
