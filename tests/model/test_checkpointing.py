"""A block that is computed again in the backward pass gives the same, with less in memory."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from model_variants import VARIANTS, build, random_ids
from test_variants import Batch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from scratchlm.kernels import rows_cpp
from scratchlm.model import ModelConfig
from scratchlm.train.loss import NextTokenLoss


def objective_and_gradients(config: ModelConfig, checkpointing: str, *, compile: bool = False) -> list[Tensor]:
    model, ids = build(config), random_ids(config, 2, 25)
    loss = NextTokenLoss(model, checkpointing=checkpointing)
    if compile:
        torch._dynamo.reset()
        loss.compile()
    torch.manual_seed(3)  # of dropout and jitter
    objective = loss(Batch(ids[:, :-1], ids[:, 1:]))
    objective.backward()
    figures = loss.figures()
    return [
        objective.detach(),
        *(p.grad for p in model.parameters() if p.grad is not None),
        *(torch.tensor(load) for load in figures.get("expert_load", [])),
    ]


HOW = ("selective", "blocks")


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("config", VARIANTS.values(), ids=list(VARIANTS))
def test_the_same_to_the_last_digit(config: ModelConfig, how: str) -> None:
    plain, checkpointed = (objective_and_gradients(config, which) for which in ("none", how))
    assert len(plain) == len(checkpointed)
    for one, other in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("checkpointing", HOW)
def test_dropout_falls_on_the_same_places(checkpointing: str) -> None:
    config = ModelConfig(
        vocab_size=50, d_model=16, layers=2, heads=2, context_length=32, residual_dropout=0.5, attention_dropout=0.5
    )
    for one, other in zip(*(objective_and_gradients(config, how) for how in ("none", checkpointing)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_products_are_not_computed_again_where_only_the_rest_is_checkpointed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the linear layers' and of torch's attention there are as many calls as without; of the norms there are more."""
    config = ModelConfig(vocab_size=50, d_model=16, layers=3, heads=2, context_length=32, attention_kernel="sdpa")
    monkeypatch.setattr(rows_cpp, "runs", lambda dtype: False)  # torch's kernels are counted
    calls: dict[str, Counter[str]] = {}
    for how in ("none", *HOW):
        with Calls() as calls_of:
            objective_and_gradients(config, how)
        calls[how] = calls_of.found
    flash = "aten::_scaled_dot_product_flash_attention_for_cpu"
    for name, times in (("aten::mm", 3 * 3), (flash, 3)):  # the last product of a block nobody asks for again
        assert calls["selective"][name] == calls["none"][name]
        assert calls["blocks"][name] == calls["none"][name] + times
    assert calls["selective"]["aten::rsqrt"] == calls["blocks"]["aten::rsqrt"] > calls["none"]["aten::rsqrt"]


class Calls(TorchDispatchMode):
    """Counts torch's operations, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def test_only_the_blocks_inputs_are_kept() -> None:
    config = ModelConfig(vocab_size=50, d_model=16, layers=3, heads=2, context_length=32)
    model, ids = build(config), random_ids(config, 2, 25)
    kept: list[int] = []
    for how in ("none", "blocks"):
        saved: dict[int, int] = {}

        def note(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
            if not isinstance(tensor, torch.nn.Parameter):
                saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            hidden, _ = model.run(ids, replace(model.context(ids), checkpointing=how))
        kept.append(sum(saved.values()))
        del hidden
    one = 2 * 25 * 16 * 4
    assert kept[1] <= 5 * one + 1000, "the inputs of three blocks, and what the last norm asks for"
    assert kept[0] > 3 * kept[1]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("how", HOW)
def test_compiled_as_well(how: str) -> None:
    config = ModelConfig(vocab_size=50, d_model=16, layers=2, heads=2, context_length=32)
    eager, compiled = (objective_and_gradients(config, how, compile=on) for on in (False, True))
    for one, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
