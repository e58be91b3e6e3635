"""Initial weights: the stated spread of every matrix, cut at three sigma, repeatable from a seed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from scratchlm.config import load_recipe
from scratchlm.errors import UserError
from scratchlm.model import ModelConfig, Transformer
from scratchlm.model.linear import Linear

WIDE = ModelConfig(vocab_size=300, context_length=8, d_model=256, layers=1, heads=8, kv_heads=2, d_ff=512)
# Standard deviation of a unit normal cut at ±3: √(1 − 2·3·φ(3) / (2Φ(3) − 1)).
CUT = math.sqrt(1 - 6 * math.exp(-4.5) / math.sqrt(2 * math.pi) / math.erf(3 / math.sqrt(2)))


def check(weight: Tensor, sigma: float) -> None:
    assert weight.mean().item() == pytest.approx(0, abs=0.02 * sigma)
    assert weight.std().item() == pytest.approx(CUT * sigma, rel=0.012)
    assert 2.8 * sigma < weight.abs().max().item() <= 3.0001 * sigma
    inside_one_sigma = (weight.abs() < sigma).double().mean().item()  # a uniform or cut-at-two draw would differ
    assert inside_one_sigma == pytest.approx(math.erf(1 / math.sqrt(2)) / math.erf(3 / math.sqrt(2)), abs=0.01)


def test_the_spread_of_every_weight() -> None:
    assert pytest.approx(0.98658, abs=1e-5) == CUT
    model = Transformer(WIDE, seed=0)
    attention, feedforward = model.blocks[0].attention, model.blocks[0].feedforward
    check(model.embedding.weight, 1.0)
    q, k, v = attention.qkv.weight.split([256, 64, 64])
    check(q, math.sqrt(2 / (256 + 256)))
    for projection in (k, v):  # each with the width of its own output, not that of the fused matrix
        check(projection, math.sqrt(2 / (256 + 64)))
    check(attention.output.weight, math.sqrt(2 / (256 + 256)))
    for half in feedforward.gate_up.weight.chunk(2):
        check(half, math.sqrt(2 / (256 + 512)))
    check(feedforward.down.weight, math.sqrt(2 / (512 + 256)))
    check(model.head.weight, math.sqrt(2 / (256 + 300)))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter))


def test_a_recipe_may_state_each_sigma() -> None:
    config = WIDE.model_copy(
        update={"init_linear_std": 0.02, "init_embedding_std": 0.5, "init_output_std": 0.01, "feedforward": "relu2"}
    )
    model = Transformer(config, seed=0)
    check(model.embedding.weight, 0.5)
    block = model.blocks[0]
    for hidden in (block.attention.qkv, block.feedforward.up):
        check(hidden.weight, 0.02)
    for output in (block.attention.output, block.feedforward.down, model.head):
        check(output.weight, 0.01)

    silent = Transformer(WIDE.model_copy(update={"init_output_std": 0.0}), seed=0)
    assert not silent.head.weight.any() and not silent.blocks[0].attention.output.weight.any()
    check(silent.blocks[0].feedforward.gate_up.weight, math.sqrt(2 / (256 + 512)))

    everything = Transformer(WIDE.model_copy(update={"init_linear_std": 0.02}), seed=0)
    for module in everything.modules():
        if isinstance(module, Linear):
            check(module.weight, 0.02)


def test_the_demo_recipe_starts_silent() -> None:
    recipe = load_recipe(Path(__file__).parents[2] / "recipes" / "python-stdlib.toml")
    model = Transformer(recipe.model.model_copy(update={"vocab_size": 300, "layers": 1}), seed=0)
    check(model.embedding.weight, recipe.model.init_embedding_std)
    assert recipe.model.init_output_std == 0
    with torch.no_grad():
        assert not model(torch.arange(10)).any(), "the first guess is uniform: a loss of ln(vocabulary)"


def test_a_tied_head_is_the_embedding() -> None:
    model = Transformer(WIDE.model_copy(update={"tied_embeddings": True, "init_embedding_std": 0.1}), seed=0)
    assert model.head.weight is model.embedding.weight
    check(model.head.weight, 0.1)


def test_same_seed_same_weights_whatever_happened_before() -> None:
    def weights(seed: int | None) -> list[Tensor]:
        return [p.detach() for p in Transformer(WIDE, seed=seed).parameters()]

    first = weights(3)
    torch.manual_seed(99)
    torch.rand(17)
    state = torch.get_rng_state()
    assert all(map(torch.equal, first, weights(3)))
    assert torch.equal(torch.get_rng_state(), state), "a seeded model leaves the global generator alone"
    assert not torch.equal(first[0], weights(4)[0])
    torch.manual_seed(5)
    unseeded = weights(None)
    assert not torch.equal(unseeded[0], weights(None)[0])
    torch.manual_seed(5)
    assert all(map(torch.equal, unseeded, weights(None)))


def test_the_vocabulary_must_be_known() -> None:
    with pytest.raises(UserError, match="vocab_size is 0"):
        Transformer(ModelConfig())
