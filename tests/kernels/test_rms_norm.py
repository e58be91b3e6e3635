"""RMSNorm in one pass: against the formula in float64, and where it steps aside."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scratchlm.kernels import rms_norm as kernel
from scratchlm.model.norm import LayerNorm, RMSNorm, RMSNormNoScale, RMSNormUnitOffset

DTYPES = [torch.float32, torch.bfloat16]


def formula(x: torch.Tensor, gain: torch.Tensor | None, eps: float, offset: float) -> torch.Tensor:
    x = x.double()
    normed = x / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    return normed if gain is None else normed * (offset + gain.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_gain", [False, True])
@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 400),
    st.sampled_from([0.0, 1.0]),
    st.floats(1e-8, 0.5),
    st.integers(0, 2**31),
)
def test_it_is_the_formula_to_the_last_rounding(
    dtype: torch.dtype, with_gain: bool, rows: int, width: int, offset: float, eps: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, width, generator=generator) * 3).to(dtype)
    gain = torch.randn(width, generator=generator).to(dtype) if with_gain else None
    found, wanted = kernel.rms_norm(x, gain, eps, offset), formula(x, gain, eps, offset)
    assert found.dtype == dtype and found.shape == x.shape
    last = 2**-8 if dtype == torch.bfloat16 else 0
    assert ((found.double() - wanted).abs() <= wanted.abs() * (last + 1e-5) + 1e-7).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [RMSNorm, RMSNormNoScale, RMSNormUnitOffset])
def test_the_layer_takes_it_without_gradients(
    dtype: torch.dtype, kind: type[RMSNorm], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    real = kernel.rms_norm
    monkeypatch.setattr(kernel, "rms_norm", lambda *arguments: taken.append(1) or real(*arguments))
    layer = kind(24, 1e-3).to(dtype)
    if layer.weight is not None:
        torch.nn.init.normal_(layer.weight)
    x = torch.randn(2, 3, 5, 24).to(dtype).transpose(1, 2)  # as heads lie
    with torch.no_grad():
        fast = layer(x)
    assert len(taken) == 1 and fast.shape == x.shape
    assert ((fast.double() - formula(x, layer.weight, 1e-3, layer.offset)).abs() < 0.04).all()
    slow = layer(x.requires_grad_())
    slow.sum().backward()
    assert len(taken) == 1 and x.grad is not None
    assert (fast.double() - slow.double()).abs().max() <= slow.abs().max() * (
        2**-7 if dtype == torch.bfloat16 else 1e-5
    )
    with torch.no_grad():
        kind(24, 1e-3, reference=True)(x)
        assert len(taken) == 1
        if layer.weight is not None:
            kind(24, 1e-3, rows=3).to(dtype)(x)
            assert len(taken) == 1


def test_where_it_steps_aside() -> None:
    x = torch.randn(2, 8)
    assert not kernel.fits(x, None)  # gradients are on
    with torch.no_grad():
        assert kernel.fits(x, None) and kernel.fits(x, x[0])
        assert not kernel.fits(x.double(), None) and not kernel.fits(x.half(), None)
        assert not kernel.fits(x, x[0].bfloat16()) and not kernel.fits(x[:0], None)
        with torch.autocast("cpu", torch.bfloat16):
            assert not kernel.fits(x, None)
        assert RMSNorm(8)(x[:0]).shape == (0, 8)
        assert RMSNorm(8).double()(x.double()).dtype == torch.float64
    nan, inf = torch.tensor([[float("nan"), 1.0]]), torch.tensor([[float("inf"), 1.0]])
    assert kernel.rms_norm(nan, None, 1e-5).isnan().all()
    assert kernel.rms_norm(inf, None, 1e-5)[0, 0].isnan() and kernel.rms_norm(inf, None, 1e-5)[0, 1] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layer_norm_computes_in_fp32_whatever_its_input(dtype: torch.dtype) -> None:
    layer = LayerNorm(64, 1e-5).to(dtype)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    x = (torch.randn(30, 64) * 3 + 5).to(dtype)
    wide = torch.nn.functional.layer_norm(x.double(), (64,), layer.weight.double(), layer.bias.double(), 1e-5)
    last = torch.finfo(dtype).eps
    assert ((layer(x).double() - wide).abs() <= wide.abs() * last / 2 + 1e-4).all()
