"""Shapes read off small tensors: those of the large ones, or no answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from scratchlm.resources.small_sizes import Unanswered, ask_small

ATEN = torch.ops.aten


def layouts(out: Any, _: Any, back: Any) -> Any:
    return back(out) if isinstance(out, Tensor) else [back(one) for one in out]


def zeros(*size: int) -> Tensor:
    return torch.zeros(size)


QKV = zeros(2, 16, 96).split([32, 32, 32], dim=2)
CASES: dict[str, tuple[Any, Any]] = {
    "broadcast": (ATEN.add.Tensor, (zeros(40, 1, 12), zeros(30, 12))),
    "transposed": (ATEN.mul.Tensor, (zeros(40, 12).t(), zeros(40, 12).t())),
    "two orders": (ATEN.mul.Tensor, (zeros(12, 40).t(), zeros(40, 12))),
    "with gaps": (ATEN.mul.Tensor, (QKV[1].view(2, 16, 4, 8).transpose(1, 2), zeros(2, 4, 16, 8))),
    "repeated": (ATEN.exp.default, (zeros(1, 12).expand(40, 12),)),
    "a mean": (ATEN.mean.dim, (zeros(40, 12, 30), [1], True)),
    "no dimension": (ATEN.sum.default, (zeros(40, 12),)),
    "a size among the numbers": (ATEN.native_layer_norm.default, (zeros(40, 12), [12], zeros(12), zeros(12), 1e-5)),
    "a number that no tensor has": (
        ATEN.embedding_dense_backward.default,
        (zeros(40, 12), torch.zeros(40, dtype=torch.int64), 300, -1, False),
    ),
    "attention": (
        ATEN._scaled_dot_product_flash_attention_for_cpu.default,
        tuple(piece.view(2, 16, 4, 8).transpose(1, 2) for piece in QKV),
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_it_is_the_shape_of_the_large(case: tuple[Any, Any]) -> None:
    func, args = case
    large = func(*args)
    known = [(tuple(one.shape), one.stride()) for one in (large if isinstance(large, tuple) else [large])]
    found = ask_small(func, args, {}, layouts)
    assert (found if isinstance(found, list) else [found]) == known


@pytest.mark.parametrize(
    "func, args",
    [
        (ATEN.cat.default, ([zeros(12, 5), zeros(30, 5)],)),  # a sum
        (ATEN.cat.default, ([zeros(12, 5), zeros(2, 5), zeros(2, 5), zeros(16, 5)],)),  # a sum that is a size, too
        (ATEN.constant_pad_nd.default, (zeros(40, 12), [0, -2])),  # a difference
        (ATEN.t_.default, (zeros(40, 12),)),  # it turns its argument
        (ATEN.bernoulli_.float, (zeros(40, 12), 0.5)),  # it draws
    ],
    ids=["a sum", "a sum of known size", "a difference", "turned", "drawn"],
)
def test_what_sizes_do_not_say_is_not_answered(func: Any, args: Any) -> None:
    state = torch.get_rng_state()
    with pytest.raises(Unanswered):
        ask_small(func, args, {}, layouts)
    assert torch.equal(torch.get_rng_state(), state)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=4), st.permutations(range(4)), st.data())
def test_pointwise_results_lie_as_torch_lays_them(size: list[int], order: list[int], data: st.DataObject) -> None:
    """Any order in memory, any dimension of one, against the real result."""
    x = torch.zeros(size).permute([at for at in order if at < len(size)])
    y = torch.zeros([data.draw(st.sampled_from([1, length])) for length in x.shape])
    out = x + y
    try:
        shape, stride = ask_small(ATEN.add.Tensor, (x, y), {}, layouts)
    except Unanswered:  # too many sizes
        pytest.fail("a sum of two is always answered")
    assert shape == tuple(out.shape)
    assert [step for step, length in zip(stride, shape, strict=True) if length > 1] == [
        step for step, length in zip(out.stride(), out.shape, strict=True) if length > 1
    ]


def test_the_arguments_are_not_touched() -> None:
    x = torch.ones(40, 12)
    ask_small(ATEN.add_.Scalar, (x, 1), {}, layouts)
    assert x.sum() == 480
