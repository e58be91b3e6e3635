"""The objective: the same with all logits, in chunks, compiled or not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from scratchlm.data.loader import Batch
from scratchlm.model import ModelConfig, Transformer
from scratchlm.train.loss import NextTokenLoss

MODEL = ModelConfig(vocab_size=37, context_length=8, d_model=16, layers=2, heads=2)


def batch() -> Batch:
    ids = torch.randint(0, 37, (3, 9), generator=torch.Generator().manual_seed(0))
    targets = ids[:, 1:].clone()
    targets[0, :3] = -100
    return Batch(ids[:, :-1].contiguous(), targets, None, None)


@pytest.mark.parametrize("kernel", ["auto", "reference", "chunked"])
@pytest.mark.parametrize("tied", [False, True])
def test_it_is_torchs_cross_entropy_summed(kernel: str, tied: bool) -> None:
    model = Transformer(MODEL.model_copy(update={"tied_embeddings": tied}), seed=0)
    given = batch()
    loss = NextTokenLoss(model, kernel)(given)
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    expected = F.cross_entropy(model(given.inputs).flatten(0, 1), given.targets.flatten(), reduction="sum")
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
def test_compiled_and_eager_agree() -> None:
    model = Transformer(MODEL, seed=0)
    loss = NextTokenLoss(model)
    eager = loss(batch())
    loss.compile()
    torch.testing.assert_close(loss(batch()), eager)
    loss.eager()
    assert loss(batch()).equal(eager)
