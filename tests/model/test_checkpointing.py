"""A block that is computed again in the backward pass gives the same, with less in memory."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from model_variants import VARIANTS, build, random_ids
from test_variants import Batch
from torch import Tensor

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


@pytest.mark.parametrize("config", VARIANTS.values(), ids=list(VARIANTS))
def test_the_same_to_the_last_digit(config: ModelConfig) -> None:
    plain, checkpointed = (objective_and_gradients(config, how) for how in ("none", "blocks"))
    assert len(plain) == len(checkpointed)
    for one, other in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_dropout_falls_on_the_same_places() -> None:
    config = ModelConfig(
        vocab_size=50, d_model=16, layers=2, heads=2, context_length=32, residual_dropout=0.5, attention_dropout=0.5
    )
    for one, other in zip(*(objective_and_gradients(config, how) for how in ("none", "blocks")), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


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
            hidden, _ = model.run(ids, replace(model.context(ids), checkpointing=how == "blocks"))
        kept.append(sum(saved.values()))
        del hidden
    one = 2 * 25 * 16 * 4
    assert kept[1] <= 5 * one + 1000, "the inputs of three blocks, and what the last norm asks for"
    assert kept[0] > 3 * kept[1]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_as_well() -> None:
    config = ModelConfig(vocab_size=50, d_model=16, layers=2, heads=2, context_length=32)
    eager, compiled = (objective_and_gradients(config, "blocks", compile=on) for on in (False, True))
    for one, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
