"""Tensors without numbers: their shapes, strides and types are those of real ones, and so is a step on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scratchlm.config import OptimConfig, TrainConfig
from scratchlm.model import ModelConfig
from scratchlm.resources import hollow_tensor
from scratchlm.resources.hollow_tensor import Hollow, HollowTensor, tensors_in
from scratchlm.resources.step import trace_step

OPERATIONS: dict[str, Any] = {
    "product": lambda: torch.zeros(3, 4) @ torch.zeros(4, 5),
    "a sum that broadcasts": lambda: torch.zeros(3, 1) + torch.zeros(5, dtype=torch.float64),
    "a transposed sum": lambda: torch.zeros(3, 4).t() + torch.zeros(3, 4).t(),
    "an integer divided": lambda: torch.arange(6) / 2,
    "an integer times one": lambda: torch.arange(6) * 1,
    "an integer times one point zero": lambda: torch.arange(6) * 1.0,
    "a comparison": lambda: torch.arange(6) > 2,
    "views": lambda: torch.zeros(4, 6).view(2, 2, 6)[:, 1].transpose(0, 1),
    "in place": lambda: torch.zeros(3, 4).add_(1).t_(),
    "two results": lambda: torch.zeros(3, 4).max(dim=1).values,
    "pieces": lambda: torch.zeros(3, 7).split([2, 5], dim=1)[1],
    "joined": lambda: torch.cat([torch.zeros(2, 3), torch.zeros(4, 3)]),
    "padded": lambda: F.pad(torch.zeros(2, 3, 4), (1, 2, 0, 3)),
    "padded, turned around": lambda: F.pad(torch.zeros(2, 3, 4).transpose(1, 2), (1, 2)),
    "cut by padding": lambda: F.pad(torch.zeros(2, 6), (-2, 1)),
    "the largest": lambda: torch.zeros(4, 6, 3).topk(2, dim=1).values,
    "where the largest are": lambda: torch.zeros(4, 6).topk(6).indices,
    "the largest, turned around": lambda: torch.zeros(4, 6).t().topk(2, dim=0).values,
    "dropped": lambda: torch.native_dropout(torch.zeros(2, 3, 4), 0.5, True)[0],
    "which are dropped": lambda: torch.native_dropout(torch.zeros(2, 3, 4).transpose(0, 1), 0.5, True)[1],
    "dropped with gaps": lambda: torch.native_dropout(torch.zeros(4, 6)[:, ::2], 0.5, True)[0],
    "another type": lambda: torch.zeros(2, 2).to(torch.bfloat16).sum(dtype=torch.float32),
    "attention": lambda: F.scaled_dot_product_attention(
        *(torch.zeros(2, 4, 8, 16) for _ in range(3)), is_causal=True
    ),
    "drawn": lambda: torch.empty(3, 4).normal_(),
    "like another": lambda: torch.zeros_like(torch.empty(3, 4).t()),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=list(OPERATIONS))
def test_an_operation_gives_the_same_kind_of_tensor(operation: Any) -> None:
    real = operation()
    for _ in range(2):  # the second time from memory
        with Hollow():
            hollow = operation()
        assert isinstance(hollow, HollowTensor)
        for one in ("shape", "dtype", "device", "requires_grad", "is_contiguous"):
            told, known = getattr(hollow, one), getattr(real, one)
            assert (told() if callable(told) else told) == (known() if callable(known) else known), one
        assert hollow.stride() == real.stride() and hollow.storage_offset() == real.storage_offset()
        assert hollow.untyped_storage().nbytes() == real.untyped_storage().nbytes()


def test_they_take_no_memory_and_have_no_numbers() -> None:
    with Hollow():
        huge = torch.ones(10**7, 10**6)
        total = (huge * 2).sum()
    assert huge.untyped_storage().nbytes() == 4 * 10**13
    with pytest.raises(RuntimeError):
        total.item()
    assert (huge + 1).shape == huge.shape and isinstance(huge + 1, HollowTensor)  # outside, too


def test_real_tensors_mix_with_them() -> None:
    table = torch.arange(12.0).view(3, 4)
    with Hollow():
        out = torch.zeros(3, 4) + table
    assert isinstance(out, HollowTensor) and out.shape == (3, 4)
    assert table.sum() == 66


def test_what_shares_memory_shares_it() -> None:
    """Also when the same question was answered before: a view is never made of new memory."""
    with Hollow():
        for _ in range(3):
            x = torch.zeros(4, 6)
            y, z, w = x.view(24), x + 0, x.add_(1)
            assert y.untyped_storage()._cdata == x.untyped_storage()._cdata == w.untyped_storage()._cdata
            assert w is x
            assert z.untyped_storage()._cdata != x.untyped_storage()._cdata
            same, other = x.contiguous(), x.t().contiguous()
            assert same.untyped_storage()._cdata == x.untyped_storage()._cdata
            assert other.untyped_storage()._cdata != x.untyped_storage()._cdata


def test_autograd_and_autocast_work_on_them() -> None:
    with Hollow():
        layer, x = torch.nn.Linear(8, 4), torch.zeros(2, 8, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        y.float().pow(2).sum().backward()
    assert y.dtype == torch.bfloat16
    assert isinstance(x.grad, HollowTensor) and x.grad.shape == x.shape and x.grad.dtype == torch.float32
    assert isinstance(layer.weight.grad, Tensor) and layer.weight.grad.shape == (4, 8)


def test_tensors_in() -> None:
    a, b, c = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    assert [t.numel() for t in tensors_in((a, 1, [b, None]), {"x": c}, "y")] == [1, 2, 3]


def test_an_estimate_does_not_look_a_second_time_at_what_it_knows() -> None:
    """Layers ask the same, and the answers are remembered: four more of them ask nothing new, but for clipping and the optimizer,
    which take all parameters at once."""
    config = ModelConfig(vocab_size=300, context_length=64, d_model=32, layers=2, heads=4)
    deep = config.model_copy(update={"layers": 6})
    hollow_tensor._ANSWERS.clear()
    trace_step(config, OptimConfig(), TrainConfig(), precision="fp32", micro_batch=2)
    known = set(hollow_tensor._ANSWERS)
    trace_step(deep, OptimConfig(), TrainConfig(), precision="fp32", micro_batch=2)
    at_once = ("_foreach", "fused", "stack", "vector_norm")
    new = [question[0] for question in set(hollow_tensor._ANSWERS) - known]
    assert known and all(any(part in str(func) for part in at_once) for func in new), new
