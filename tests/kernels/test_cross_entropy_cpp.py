"""The loss's kernel in C++ for CPUs: the formula in float64, in place, and where it is chosen."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scratchlm.kernels import cpp_here, cross_entropy
from scratchlm.kernels import cross_entropy_cpp as cpp
from scratchlm.kernels.cross_entropy import IGNORE_INDEX, HeadOptions, chunked_linear_cross_entropy

DTYPES = [torch.float32, torch.bfloat16]
DIGITS = {torch.float32: 2e-6, torch.bfloat16: 6e-3}
PLAIN = HeadOptions()

pytestmark = pytest.mark.skipif(cpp_here.compiler() is None, reason="there is no C++ compiler")


def problem(rows: int, vocab: int, seed: int, spread: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    products = (torch.randn(rows, vocab, generator=generator) * spread).to(dtype)
    targets = torch.randint(vocab, (rows,), generator=generator)
    return products, targets.masked_fill(torch.rand(rows, generator=generator) < 0.2, IGNORE_INDEX)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    vocab=st.integers(1, 300),
    seed=st.integers(0, 1000),
    spread=st.sampled_from([0.1, 1.0, 10.0, 1e4]),
    dtype=st.sampled_from(DTYPES),
    options=st.sampled_from(
        [PLAIN, HeadOptions(z_loss=1e-2), HeadOptions(scale=0.25), HeadOptions(0.5, None, 1e-3)]
    ),
)
def test_the_formula_in_float64(
    rows: int, vocab: int, seed: int, spread: float, dtype: torch.dtype, options: HeadOptions
) -> None:
    products, targets = problem(rows, vocab, seed, spread, dtype)
    right = cross_entropy._loss_and_gradient(products.double(), targets, options)
    objective, nats, gradient = cpp.loss_and_gradient(given_ := products.clone(), targets, options)
    assert gradient.data_ptr() == given_.data_ptr()
    for ours, exact in ((objective, right[0]), (nats, right[1])):
        assert ours.dtype == torch.float32
        assert float(ours) == pytest.approx(float(exact), rel=1e-5, abs=1e-5 * rows)
    size = max(1.0, float(right[2].abs().max()))
    assert (gradient.double() - right[2]).abs().max() < DIGITS[dtype] * size
    kept = products.clone()
    again = cpp.loss_and_gradient(kept, targets, options, wants_gradient=False)
    assert again[0].equal(objective) and again[1].equal(nats) and kept.equal(products)


@pytest.mark.parametrize("defines", [("VECTOR=4",), ("VECTOR=16",), ("VECTOR=16", "BF16")], ids=" ".join)
def test_vectors_of_other_processors(defines: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = torch.bfloat16 if "BF16" in defines else torch.float32
    library = cpp_here.built(cpp.SOURCE, defines)
    library.cross_entropy.restype = cpp.library(dtype).cross_entropy.restype
    monkeypatch.setattr(cpp, "library", lambda _: library)
    for vocab in (3, 64, 77):
        products, targets = problem(5, vocab, 0, 2.0, dtype)
        exact = cross_entropy._loss_and_gradient(products.double(), targets, PLAIN)
        objective, _, gradient = cpp.loss_and_gradient(products, targets, PLAIN)
        assert float(objective) == pytest.approx(float(exact[0]), rel=1e-5)
        assert (gradient.double() - exact[2]).abs().max() < DIGITS[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_no_number(dtype: torch.dtype) -> None:
    """NaN and +∞ make their row NaN and no other; −∞ has no share; a row of nothing else is NaN."""
    products, targets = torch.zeros(5, 40, dtype=dtype), torch.zeros(5, dtype=torch.int64)
    products[0, 39], products[1, 7], products[2, 1:] = float("nan"), float("inf"), float("-inf")
    products[3] = float("-inf")
    exact = cross_entropy._loss_and_gradient(products.double(), targets, PLAIN)[2]
    _, _, gradient = cpp.loss_and_gradient(products, targets, PLAIN)
    assert gradient[0].isnan().all() and gradient[3].isnan().all() and gradient[1, 7].isnan()
    assert gradient[2].eq(0).all() and (gradient[4].double() - exact[4]).abs().max() < DIGITS[dtype]


def test_a_target_that_is_no_token_is_an_error() -> None:
    for strange in (40, -1, 10**12):
        with pytest.raises(IndexError, match="1 of 2 targets are no tokens of the vocabulary of 40"):
            cpp.loss_and_gradient(torch.zeros(2, 40), torch.tensor([0, strange]), PLAIN)


def test_targets_of_another_kind_are_read_as_numbers() -> None:
    products = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    right = cpp.loss_and_gradient(products.clone(), torch.full((4,), 3), PLAIN)
    for targets in (torch.full((4,), 3, dtype=torch.int32), torch.tensor([3]), torch.full((8,), 3)[::2]):
        found = cpp.loss_and_gradient(products.clone(), targets, PLAIN)
        assert all(ours.equal(theirs) for ours, theirs in zip(found, right, strict=True))


def test_checked_by_torch_and_a_graph_has_the_formula() -> None:
    products, targets = problem(5, 33, 0, 1.0, torch.float32)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(cpp._sums, (products, targets, 1.0, 0.1, True), test_utils=tests)
    x, weight = torch.randn(10, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    torch._dynamo.reset()
    graph = torch.compile(chunked_linear_cross_entropy, backend="aot_eager", fullgraph=True)
    found, right = (f(x, weight, torch.arange(10))[0].detach() for f in (graph, chunked_linear_cross_entropy))
    assert float(found) == pytest.approx(float(right), rel=1e-6)


def test_no_rows_and_any_number_of_threads() -> None:
    objective, nats, gradient = cpp.loss_and_gradient(torch.zeros(0, 7), torch.zeros(0, dtype=torch.int64), PLAIN)
    assert objective == nats == 0 and gradient.shape == (0, 7)
    products, targets = problem(33, 100, 0, 1.0, torch.float32)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            found.append(cpp.loss_and_gradient(products.clone(), targets, PLAIN))
        finally:
            torch.set_num_threads(before)
    assert all(ours.equal(first) for other in found for ours, first in zip(other, found[0], strict=True))


def test_training_takes_it_and_reading_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.dtype] = []
    kernel = cpp.loss_and_gradient
    monkeypatch.setattr(cpp, "loss_and_gradient", lambda *given_: calls.append(given_[0].dtype) or kernel(*given_))
    x, weight = torch.randn(10, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    targets = torch.arange(10)
    chunked_linear_cross_entropy(x, weight, targets)[0].backward()
    assert calls == [torch.float32]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        chunked_linear_cross_entropy(x, weight, targets, rows=5)[0].backward()
    assert calls == [torch.float32, torch.bfloat16, torch.bfloat16]
    with torch.no_grad():
        chunked_linear_cross_entropy(x, weight, targets)
    chunked_linear_cross_entropy(x, weight, targets, HeadOptions(soft_cap=3.0))
    chunked_linear_cross_entropy(x, weight, targets, HeadOptions(scale=-1.0))
    chunked_linear_cross_entropy(x.double(), weight.double(), targets)
    monkeypatch.setattr(cpp_here, "compiler", lambda: None)
    chunked_linear_cross_entropy(x, weight, targets)
    assert len(calls) == 3


def test_a_kernel_that_cannot_be_built_is_told_of_and_torch_computes(
    monkeypatch: pytest.MonkeyPatch, told: list
) -> None:
    def fails(*_: object) -> None:
        raise cpp_here.NoKernel("c++ fails: error: no such thing")

    monkeypatch.setattr(cpp, "library", fails)
    x, weight = torch.randn(10, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    for _ in range(2):
        chunked_linear_cross_entropy(x, weight, torch.arange(10))[0].backward()
    assert len(told) == 1 and "the loss's gradient is computed by torch" in str(told[0].message)
