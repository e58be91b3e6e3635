"""Newton–Schulz against the polar factor of the singular value decomposition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scratchlm.optim import newton_schulz, newton_schulz_reference, orthogonalise

SHAPES = [(1, 1), (4, 4), (32, 32), (64, 16), (16, 64), (100, 3), (3, 100), (1, 20), (20, 1)]


def drawn(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def polynomial_on_singular_values(matrix: Tensor, steps: int = 5) -> Tensor:
    """The exact result: the same quintic on each singular value alone, between the exact U and Vᵀ."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    s = s / (s.norm() + 1e-7)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ vt


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_the_polynomial_of_the_singular_values(shape: tuple[int, int]) -> None:
    matrix = drawn(*shape) * 7
    torch.testing.assert_close(
        newton_schulz_reference(matrix), polynomial_on_singular_values(matrix), rtol=0, atol=1e-8
    )
    single = newton_schulz_reference(matrix.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), polynomial_on_singular_values(matrix), rtol=0, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_near_one_and_directions_stay(
    shape: tuple[int, int], dtype: torch.dtype | None
) -> None:
    rows, columns = shape
    matrix = drawn(*shape)
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    (ours,) = orthogonalise([matrix.float()], dtype)
    for result in (ours.double(), newton_schulz_reference(matrix)):
        assert result.shape == shape
        kept = s > 0.02 * s.norm()  # smaller ones do not get there in five steps
        along = torch.diag(u.T @ result @ vt.T)[kept]
        assert (along > 0.6).all() and (along < 1.3).all()
        polar = u @ vt
        cosine = (result * polar).sum() / (result.norm() * polar.norm())
        assert cosine > (0.97 if rows != columns else 0.9)


@pytest.mark.parametrize("in_batches", [False, True], ids=["one by one", "as on a GPU"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6, 9])
def test_batched_in_float64_is_the_reference(steps: int, in_batches: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any mixture of shapes, on either path (matrix, Gram), in the order given; matrices of one shape of different norms."""
    monkeypatch.setattr(newton_schulz, "in_batches", lambda device: in_batches)
    mixed = [
        drawn(*shape, seed=i) for i, shape in enumerate([*SHAPES, (16, 64), (4, 4), (0, 3), (12, 13), (64, 16)])
    ]
    mixed = [matrix * 3.0**i for i, matrix in enumerate(mixed)]
    results = orthogonalise(mixed, torch.float64, steps=steps)
    for matrix, result in zip(mixed, results, strict=True):
        assert result.dtype == torch.float64
        if matrix.numel():
            torch.testing.assert_close(result, newton_schulz_reference(matrix, steps=steps), rtol=0, atol=1e-7)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.floats(1e-4, 1e6), st.integers(0, 100))
def test_scale_and_transposition_do_not_matter(rows: int, columns: int, scale: float, seed: int) -> None:
    matrix = drawn(rows, columns, seed)
    matrix = matrix / torch.linalg.matrix_norm(matrix)  # ε is 1e-7, to which a norm is small or not
    plain = newton_schulz_reference(matrix)
    torch.testing.assert_close(
        newton_schulz_reference(matrix * scale), plain, rtol=0, atol=0.2 if scale < 1e-3 else 1e-2
    )
    torch.testing.assert_close(newton_schulz_reference(matrix.mT), plain.mT, rtol=0, atol=1e-8)
    assert torch.linalg.matrix_norm(plain, 2) < 1.25


def test_nothing_stays_nothing() -> None:
    zero = torch.zeros(3, 5)
    assert torch.equal(newton_schulz_reference(zero), zero)
    assert torch.equal(orthogonalise([zero], torch.float32)[0], zero)
    assert orthogonalise([]) == []


def test_a_batch_of_leading_dimensions() -> None:
    stack = torch.stack([drawn(4, 6, seed) for seed in range(3)])
    for matrix, result in zip(stack, newton_schulz_reference(stack), strict=True):
        torch.testing.assert_close(result, newton_schulz_reference(matrix))
