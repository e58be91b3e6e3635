"""Norm, position, feed-forward, linear and mask, each against its formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from scratchlm.model import ModelConfig
from scratchlm.model.feedforward import SquaredReLU, SwiGLU
from scratchlm.model.linear import Embedding, Linear
from scratchlm.model.mask import Causal, attention_mask
from scratchlm.model.norm import NoNorm, RMSNorm
from scratchlm.model.position import NoPosition, RoPE

both_kernels = pytest.mark.parametrize("reference", [False, True], ids=["fast", "reference"])


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def norm_of(width: int, *, reference: bool, eps: float = 1e-5, dtype: torch.dtype = torch.float32) -> RMSNorm:
    norm = RMSNorm(width, eps, reference=reference)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.5 * drawn(width, seed=7))
    return norm.to(dtype)


@both_kernels
@pytest.mark.parametrize("eps", [1e-6, 0.1])
@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 3, 4, 16)])
def test_rmsnorm_is_the_formula(shape: tuple[int, ...], eps: float, reference: bool) -> None:
    x = drawn(*shape) * 3
    norm = norm_of(16, reference=reference, eps=eps)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (16,), norm.weight, eps))
    gain = norm.weight.detach().numpy().astype(np.float64)
    wide = x.numpy().astype(np.float64)
    by_hand = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + eps) * gain
    np.testing.assert_allclose(norm(x).detach().numpy(), by_hand, rtol=1e-5, atol=1e-6)


@both_kernels
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_rmsnorm_computes_in_float32_inside(reference: bool, weight_dtype: torch.dtype) -> None:
    x = drawn(64, 512, dtype=torch.bfloat16)
    norm = norm_of(512, reference=reference, dtype=weight_dtype)
    out = norm(x)
    assert out.dtype == torch.bfloat16
    exact = F.rms_norm(x.double(), (512,), norm.weight.double(), 1e-5)
    # Only the last rounding is left: at most half a unit in the last of bfloat16's 8 digits (and float32's own noise).
    assert ((out.double() - exact).abs() <= exact.abs() * (2**-8 * 1.001)).all()
    narrow = x / (x * x).mean(-1, keepdim=True).add(1e-5).sqrt() * norm.weight.bfloat16()
    assert ((narrow.double() - exact).abs() > exact.abs() * 2**-8 * 1.5).any(), "the test could not tell"
    loud = torch.full((4, 512), 1000.0, dtype=torch.float16)  # its square does not fit float16
    expected = norm.weight.float().expand(4, 512)
    torch.testing.assert_close(norm(loud).float(), expected, rtol=1e-2, atol=0)


@both_kernels
def test_rmsnorm_of_nothing_and_under_autocast(reference: bool) -> None:
    norm = norm_of(8, reference=reference)
    assert torch.equal(norm(torch.zeros(2, 8)), torch.zeros(2, 8))
    x = drawn(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(norm(x), norm_of(8, reference=True)(x))
    x = drawn(3, 8)
    assert NoNorm(8)(x) is x and NoNorm(8).num_params() == 0


def rope(head_dim: int = 8, context_length: int = 64, theta: float = 10_000.0) -> RoPE:
    return RoPE(
        ModelConfig(vocab_size=1, d_model=head_dim, heads=1, context_length=context_length, rope_theta=theta)
    )


def turned(x: np.ndarray, positions: np.ndarray, theta: float) -> np.ndarray:
    """RoPE as multiplication of complex numbers by exp(i · position · θ^(−2i/d)), float64."""
    half = x.shape[-1] // 2
    as_complex = x[..., :half].astype(np.complex128) + 1j * x[..., half:]
    frequencies = theta ** (-2 * np.arange(half) / x.shape[-1])
    out = as_complex * np.exp(1j * positions[..., None] * frequencies)
    return np.concatenate([out.real, out.imag], axis=-1)


@pytest.mark.parametrize("theta", [10_000.0, 500.0])
@pytest.mark.parametrize("head_dim", [2, 8, 64])
def test_rope_is_complex_multiplication(head_dim: int, theta: float) -> None:
    layer = rope(head_dim, context_length=512, theta=theta)
    x = drawn(2, 3, 512, head_dim)
    expected = turned(x.numpy(), np.arange(512), theta)
    np.testing.assert_allclose(layer(x, None).numpy(), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(layer(x, torch.arange(512)).numpy(), expected, rtol=0, atol=2e-4)
    rows = torch.stack([torch.arange(512) % 5, torch.arange(512).flip(0)])  # of its own for each row of the batch
    expected = turned(x.numpy(), rows.numpy()[:, None], theta)
    np.testing.assert_allclose(layer(x, rows).numpy(), expected, rtol=0, atol=2e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 23), st.integers(0, 1000))
def test_rope_products_depend_on_the_distance_alone(m: int, n: int, shift: int, seed: int) -> None:
    layer = rope(head_dim=16)
    q, k = drawn(1, 1, 16, seed=seed), drawn(1, 1, 16, seed=seed + 1)

    def product(query: int, key: int) -> float:
        turned_q, turned_k = layer(q, torch.tensor([query])), layer(k, torch.tensor([key]))
        torch.testing.assert_close(turned_q.norm(), q.norm())
        return (turned_q * turned_k).sum().item()

    assert product(m, n) == pytest.approx(product(m + shift, n + shift), abs=1e-4)
    assert product(m, m) == pytest.approx((q * k).sum().item(), abs=1e-4)


def test_rope_angles_survive_a_cast_of_the_model() -> None:
    exact = rope(context_length=4096).double().angles(4096, None)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        cast = rope(context_length=4096).to(dtype)
        assert cast.table.dtype == torch.float32
        for positions in (None, torch.arange(4096)):
            for ours, theirs in zip(cast.angles(4096, positions), exact, strict=True):
                torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=5e-4)
    assert exact[0].dtype == torch.float64
    assert not rope().state_dict(), "angles follow from the configuration and are not saved"


def test_no_position_changes_nothing() -> None:
    x = drawn(2, 5, 8)
    assert NoPosition(ModelConfig())(x, torch.arange(5)) is x


@pytest.mark.parametrize("kernels", ["fast", "reference"])
def test_feed_forwards_are_their_formulas(kernels: str) -> None:
    config = ModelConfig(d_model=12, heads=1, d_ff=20, kernels=kernels)
    x = drawn(2, 3, 12)
    gated = SwiGLU(config)
    torch.nn.init.normal_(gated.gate_up.weight)
    torch.nn.init.normal_(gated.down.weight)
    gate, up = gated.gate_up.weight[:20], gated.gate_up.weight[20:]
    g = x @ gate.T
    expected = (g / (1 + torch.exp(-g)) * (x @ up.T)) @ gated.down.weight.T
    torch.testing.assert_close(gated(x), expected, rtol=1e-4, atol=1e-4)

    plain = SquaredReLU(config)
    torch.nn.init.normal_(plain.up.weight)
    torch.nn.init.normal_(plain.down.weight)
    inner = x @ plain.up.weight.T
    expected = torch.where(inner > 0, inner**2, 0.0) @ plain.down.weight.T
    torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-4)


@both_kernels
def test_linear_and_embedding(reference: bool) -> None:
    layer = Linear(5, 6, parts=[4, 2], reference=reference)
    torch.nn.init.normal_(layer.weight)
    x = drawn(2, 3, 5)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight))
    assert layer.weight.muon_split == [4, 2] and not hasattr(Linear(5, 6).weight, "muon_split")
    table = Embedding(7, 3, reference=reference)
    torch.nn.init.normal_(table.weight)
    ids = torch.tensor([[0, 6], [3, 3]])
    assert torch.equal(table(ids), F.embedding(ids, table.weight))
    for bad in (7, -8):
        with pytest.raises(IndexError):
            table(torch.tensor([bad]))


def test_masks() -> None:
    causal = Causal(ModelConfig())
    assert attention_mask(causal, 5) is None, "kernels know the plain triangle themselves"
    after = attention_mask(causal, 2, past=3)
    assert after is not None and after.int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    packed = attention_mask(causal, 4, documents=torch.tensor([[0, 0, 1, 1]]))
    assert packed is not None and packed.shape == (1, 1, 4, 4)
    assert packed[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    padded = attention_mask(causal, 3, key_mask=torch.tensor([[False, True, True], [True, True, True]]))
    assert padded is not None and padded.shape == (2, 1, 3, 3)
    assert padded[0, 0].int().tolist() == [[0, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert padded[1, 0].equal(torch.ones(3, 3).tril().bool())


def test_a_gain_of_one_keeps_the_length_of_a_vector() -> None:
    assert RMSNorm(100)(drawn(100)).norm().item() == pytest.approx(math.sqrt(100), rel=1e-4)
