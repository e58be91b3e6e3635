"""The compiled blocks give what the eager ones give, forward and backward."""

from __future__ import annotations

import shutil

import pytest
import torch
from model_variants import VARIANTS, build, random_ids, some_now
from test_variants import Batch
from torch import Tensor

from scratchlm.model import ModelConfig
from scratchlm.train.loss import NextTokenLoss

REALLY = [
    "attention = mha",
    "attention = mla",
    "attention = gla",
    "attention = gated_delta",
    "mask = fixed",
    "mask = prefix_lm",
    "moe, fine-grained, shared",
    "alibi, sinks, cap",
    "parallel, double, vector",
    "rope interleaved, yarn",
    "mtp",
]


def objective_and_gradients(config: ModelConfig, backend: str | None) -> list[Tensor]:
    model, ids = build(config), random_ids(config, 2, 25)
    loss = NextTokenLoss(model, "reference")
    if backend is not None:
        torch._dynamo.reset()
        loss.body = torch.compile(model.body, backend=backend, fullgraph=True, dynamic=False)
    objective = loss(Batch(ids[:, :-1], ids[:, 1:]))
    objective.backward()
    return [objective.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def check(config: ModelConfig, backend: str) -> None:
    eager, compiled = objective_and_gradients(config, None), objective_and_gradients(config, backend)
    assert len(eager) == len(compiled)
    for ours, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("config", some_now(VARIANTS, 4))
def test_it_is_one_graph_with_the_same_results(config: ModelConfig) -> None:
    """Traced as a whole (no graph breaks), run without a code generator."""
    if config.attention_kernel == "flex":
        pytest.skip("torch's FlexAttention has no backward on a CPU")
    check(config, "aot_eager")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("name", REALLY)
def test_generated_code_gives_the_same(name: str) -> None:
    check(VARIANTS[name], "inductor")
