"""Head and cross-entropy, by rows and at once, against torch's function; values, gradients, memory."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scratchlm.kernels import cross_entropy as kernels
from scratchlm.kernels.cross_entropy import IGNORE_INDEX, HeadOptions, cross_entropy

ROWS = [1, 3, 5, 8, 30, 31, 1024]
"""Of 30 tokens: one row, not a divisor, divisors, all, more than all."""


def reference_linear_cross_entropy(*args: Any, **options: Any) -> Tensor:
    """The objective alone."""
    return kernels.reference_linear_cross_entropy(*args, **options)[0]


def chunked_linear_cross_entropy(*args: Any, **options: Any) -> Tensor:
    """The objective alone."""
    return kernels.chunked_linear_cross_entropy(*args, **options)[0]


def drawn(
    *lead: int, vocab: int = 11, width: int = 6, ignored: float = 0.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*lead, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(vocab, lead, generator=generator)
    targets[torch.rand(lead, generator=generator) < ignored] = IGNORE_INDEX
    return x, weight, targets


def torchs(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(x, weight).flatten(0, -2)
    return F.cross_entropy(logits, targets.flatten(), reduction="sum", ignore_index=IGNORE_INDEX)


def check(
    kernel: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    rtol: float = 1e-4,
    atol: float = 1e-4,
) -> None:
    expected = torchs(x, weight, targets)
    loss = kernel(x, weight, targets)
    torch.testing.assert_close(loss, expected, rtol=rtol, atol=atol)
    exact = torch.autograd.grad(2.5 * expected, (x, weight))
    for gradient, theirs in zip(torch.autograd.grad(2.5 * loss, (x, weight)), exact, strict=True):
        torch.testing.assert_close(gradient, theirs, rtol=rtol, atol=atol)


@pytest.mark.parametrize("ignored", [0.0, 0.4])
@pytest.mark.parametrize("lead", [(30,), (5, 6), (2, 3, 5), (1,)])
def test_reference_is_torchs(lead: tuple[int, ...], ignored: float) -> None:
    check(reference_linear_cross_entropy, *drawn(*lead, ignored=ignored))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("ignored", [0.0, 0.4])
@pytest.mark.parametrize("lead", [(30,), (2, 3, 5)])
def test_by_rows_is_torchs(lead: tuple[int, ...], ignored: float, rows: int) -> None:
    x, weight, targets = drawn(*lead, ignored=ignored)
    check(lambda *args: chunked_linear_cross_entropy(*args, rows=rows), x, weight, targets)
    torch.testing.assert_close(
        chunked_linear_cross_entropy(x, weight, targets, rows=rows),
        reference_linear_cross_entropy(x, weight, targets),
    )


def test_blocks_of_a_large_vocabulary_have_fewer_tokens_where_nothing_is_compiled() -> None:
    assert [kernels.rows_for(vocab, compiled=False) for vocab in (1, 8192, 32768, 32769, 50257, 100_000, 2**24)] == [
        1024, 1024, 1024, 512, 512, 256, 128,
    ]  # fmt: skip
    assert kernels.rows_for(100_000, compiled=True) == 1024


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(0, 12), rows=st.integers(1, 14), vocab=st.integers(1, 6), ignored=st.floats(0, 1))
def test_any_sizes(tokens: int, rows: int, vocab: int, ignored: float) -> None:
    x, weight, targets = drawn(tokens, vocab=vocab, ignored=ignored)
    check(lambda *args: chunked_linear_cross_entropy(*args, rows=rows), x, weight, targets)


@pytest.mark.parametrize("rows", [2, 3, 7])
def test_gradcheck(rows: int) -> None:
    x, weight, targets = drawn(5, vocab=4, width=3, ignored=0.3, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, w: chunked_linear_cross_entropy(x, w, targets, rows=rows), (x, weight)
    )
    assert torch.autograd.gradcheck(lambda x, w: reference_linear_cross_entropy(x, w, targets), (x, weight))


@pytest.mark.parametrize(
    "kernel", [reference_linear_cross_entropy, chunked_linear_cross_entropy], ids=["reference", "chunked"]
)
def test_all_ignored_costs_and_teaches_nothing(kernel: Callable[..., Tensor]) -> None:
    x, weight, targets = drawn(30, ignored=1.1)
    loss = kernel(x, weight, targets)
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, (x, weight)):
        assert torch.equal(gradient, torch.zeros_like(gradient))
    assert kernel(*drawn(0)).item() == 0


@pytest.mark.parametrize(
    "kernel", [reference_linear_cross_entropy, chunked_linear_cross_entropy], ids=["reference", "chunked"]
)
def test_enormous_logits(kernel: Callable[..., Tensor]) -> None:
    """Logits of ±10⁴: the likely token costs nothing, the unlikely one 2 · 10⁴ nats, all finite."""
    weight = torch.tensor([[100.0], [-100.0], [-100.0]], requires_grad=True)
    x = torch.tensor([[100.0], [100.0], [-100.0]], requires_grad=True)
    for targets, expected in (([0, 0, 1], math.log(2)), ([0, 1, 0], 4e4 + math.log(2))):
        check(kernel, x, weight, torch.tensor(targets))
        assert kernel(x, weight, torch.tensor(targets)).item() == pytest.approx(expected, rel=1e-6)


OPTIONS = {
    "scale": HeadOptions(scale=0.3),
    "cap": HeadOptions(soft_cap=2.0),
    "z": HeadOptions(z_loss=0.1),
    "all": HeadOptions(scale=1.7, soft_cap=1.5, z_loss=0.02),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_scale_cap_and_z_loss(options: HeadOptions) -> None:
    """Against the formula written with torch's functions; the cross-entropy alone comes out beside the objective."""
    x, weight, targets = drawn(30, ignored=0.4, dtype=torch.float64)
    logits = F.linear(x, weight) * options.scale
    if options.soft_cap is not None:
        logits = options.soft_cap * torch.tanh(logits / options.soft_cap)
    nats = F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE_INDEX)
    asked = targets != IGNORE_INDEX
    expected = nats + options.z_loss * (torch.logsumexp(logits, dim=-1)[asked] ** 2).sum()
    exact = torch.autograd.grad(expected, (x, weight))
    for both in (
        kernels.reference_linear_cross_entropy(x, weight, targets, options),
        kernels.chunked_linear_cross_entropy(x, weight, targets, options, rows=7),
    ):
        torch.testing.assert_close(both[0], expected)
        torch.testing.assert_close(both[1], nats.detach())
        assert not both[1].requires_grad
        for gradient, theirs in zip(torch.autograd.grad(both[0], (x, weight)), exact, strict=True):
            torch.testing.assert_close(gradient, theirs)
    assert torch.autograd.gradcheck(
        lambda x, w: chunked_linear_cross_entropy(x, w, targets, options, rows=7), (x, weight)
    )


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    "options", [HeadOptions(), HeadOptions(0.6, 1.5, 0.01)], ids=["plain", "scale, cap, z-loss"]
)
def test_a_bias_is_added_to_the_products(options: HeadOptions, rows: int) -> None:
    """… and learns: it is the weight of a feature that is 1 everywhere."""
    x, weight, targets = drawn(5, 6, ignored=0.3, dtype=torch.float64)
    bias = torch.linspace(-2, 2, 11, dtype=torch.float64, requires_grad=True)
    ones, column = torch.ones(5, 6, 1, dtype=torch.float64), bias.unsqueeze(1)
    expected, nats = kernels.reference_linear_cross_entropy(
        torch.cat([x, ones], -1), torch.cat([weight, column], 1), targets, options
    )
    gradients = torch.autograd.grad(expected, (x, weight, bias))
    for found in (
        kernels.reference_linear_cross_entropy(x, weight, targets, options, bias=bias),
        kernels.chunked_linear_cross_entropy(x, weight, targets, options, bias=bias, rows=rows),
    ):
        torch.testing.assert_close(found, (expected, nats))
        torch.testing.assert_close(torch.autograd.grad(found[0], (x, weight, bias)), gradients)


def test_a_bias_alone_learns_and_in_its_own_precision() -> None:
    x, weight, targets = (given.detach() for given in drawn(30))
    bias = torch.zeros(11, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_linear_cross_entropy(x, weight, targets, bias=bias, rows=7)
    (rough,) = torch.autograd.grad(loss, bias)
    (exact,) = torch.autograd.grad(F.cross_entropy(F.linear(x, weight, bias), targets, reduction="sum"), bias)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=3e-2, atol=3e-2)


def test_each_token_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3)], [5.0, 5.0], [1.0, 2.0]])
    losses = cross_entropy(logits, torch.tensor([1, 0, IGNORE_INDEX]))
    torch.testing.assert_close(losses, torch.tensor([math.log(4 / 3), math.log(2), 0.0]))
    half = cross_entropy(logits.bfloat16(), torch.tensor([1, 0, 0]))
    assert half.dtype == torch.float32
    batch = torch.randn(2, 3, 4, 7, generator=torch.Generator().manual_seed(0)) * 10
    targets = torch.randint(7, (2, 3, 4))
    expected = F.cross_entropy(batch.flatten(0, 2), targets.flatten(), reduction="none").view(2, 3, 4)
    torch.testing.assert_close(cross_entropy(batch, targets), expected)


@pytest.mark.parametrize(
    "kernel", [reference_linear_cross_entropy, chunked_linear_cross_entropy], ids=["reference", "chunked"]
)
@pytest.mark.parametrize("target", [11, -1])
def test_a_target_that_is_no_token_is_not_passed_over(kernel: Callable[..., Tensor], target: int) -> None:
    x, weight, targets = drawn(4)
    targets[2] = target
    with pytest.raises((RuntimeError, IndexError)):
        kernel(x, weight, targets)


@pytest.mark.parametrize("rows", [7, 1024])
def test_bfloat16_autocast(rows: int) -> None:
    x, weight, targets = drawn(64, vocab=50, width=32, ignored=0.2)
    exact = torchs(x, weight, targets)
    exact_gradients = torch.autograd.grad(exact, (x, weight))
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_linear_cross_entropy(x, weight, targets, rows=rows)
        reference = reference_linear_cross_entropy(x, weight, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(loss, exact, rtol=5e-3, atol=0)
    assert loss.item() != exact.item(), "bfloat16 was not used"
    for gradient, theirs in zip(torch.autograd.grad(loss, (x, weight)), exact_gradients, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - theirs).norm() < 0.02 * theirs.norm()


def test_bfloat16_tensors_get_their_gradients_in_bfloat16() -> None:
    x, weight, targets = drawn(16, dtype=torch.bfloat16)
    loss = chunked_linear_cross_entropy(x, weight, targets, rows=5)
    assert loss.dtype == torch.float32
    loss.backward()
    assert x.grad is not None and weight.grad is not None
    assert x.grad.dtype == weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, torchs(x.float(), weight.float(), targets), rtol=2e-2, atol=0)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation returns, in elements, and counts the matrix products."""

    elements = 0
    products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.products += "aten.mm" in str(func)
        self.elements = max(self.elements, *sizes, 0)
        return out


def test_all_logits_are_never_in_memory() -> None:
    x, weight, targets = drawn(512, vocab=200, width=4)
    for kernel, rows, largest in (
        (chunked_linear_cross_entropy, {"rows": 32}, max(32 * 200, 512 * 4)),
        (reference_linear_cross_entropy, {}, 512 * 200),
    ):
        with Largest() as seen:
            kernel(x, weight, targets, **rows).backward()
        assert seen.elements == largest


def test_without_gradients_none_are_computed() -> None:
    x, weight, targets = drawn(30)
    with torch.no_grad(), Largest() as seen:
        loss = chunked_linear_cross_entropy(x, weight, targets, rows=2)
    assert seen.products == 15 and not loss.requires_grad, "one product for each block, the logits"
    torch.testing.assert_close(loss, torchs(x, weight, targets))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_is_torchs() -> None:
    x, weight, targets = drawn(30, ignored=0.3)
    check(lambda *args: chunked_linear_cross_entropy(*args, rows=8, compiled=True), x, weight, targets)


def test_a_second_derivative_is_right_or_refused() -> None:
    """A penalty on the gradient must not pass as a constant."""
    x = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    weight, targets = torch.randn(11, 8, dtype=torch.float64), torch.arange(6)
    with pytest.raises(RuntimeError, match=r"has no derivative of its own.*train.loss_kernel = reference"):
        torch.autograd.grad(chunked_linear_cross_entropy(x, weight, targets), x, create_graph=True)
    assert torch.autograd.gradgradcheck(lambda x: reference_linear_cross_entropy(x, weight, targets), (x,))
