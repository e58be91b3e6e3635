"""Initial weights: the stated spread of every matrix in every scheme, cut where it says so, repeatable from a seed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scratchlm.config import load_recipe
from scratchlm.errors import UserError
from scratchlm.model import ModelConfig, Transformer, choices
from scratchlm.model.linear import Linear
from scratchlm.model.parts import MoEConfig

WIDE = ModelConfig(vocab_size=300, context_length=8, d_model=256, layers=1, heads=8, kv_heads=2, d_ff=512)
# Standard deviation of a unit normal cut at ±3: √(1 − 2·3·φ(3) / (2Φ(3) − 1)).
CUT = math.sqrt(1 - 6 * math.exp(-4.5) / math.sqrt(2 * math.pi) / math.erf(3 / math.sqrt(2)))


def check(weight: Tensor, sigma: float, *, cut: bool = True, rel: float = 0.012) -> None:
    assert weight.mean().item() == pytest.approx(0, abs=0.02 * sigma)
    assert weight.std().item() == pytest.approx((CUT if cut else 1) * sigma, rel=rel)
    inside_one_sigma = (weight.abs() < sigma).double().mean().item()  # a uniform or cut-at-two draw would differ
    within = math.erf(1 / math.sqrt(2))
    if cut:
        assert 2.8 * sigma < weight.abs().max().item() <= 3.0001 * sigma
        within /= math.erf(3 / math.sqrt(2))
    else:
        assert weight.abs().max().item() > 3.2 * sigma
    assert inside_one_sigma == pytest.approx(within, abs=0.01)


def test_the_spread_of_every_weight() -> None:
    assert pytest.approx(0.98658, abs=1e-5) == CUT
    model: Any = Transformer(WIDE, seed=0)
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


def glorot(d_in: int, d_out: int) -> float:
    return math.sqrt(2 / (d_in + d_out))


def everywhere(d_in: int, d_out: int) -> float:
    return 0.02


LAYERS = 3
SCHEMES: dict[str, tuple[Any, float, Any, bool]] = {
    # σ of a linear, of the embedding, factor of a residual output in layer l, whether the draw is cut
    "truncated_normal": (glorot, 1.0, lambda layer: 1.0, True),
    "normal": (everywhere, 0.02, lambda layer: 1.0, False),
    "gpt2": (everywhere, 0.02, lambda layer: 1 / math.sqrt(2 * LAYERS), False),
    "depth_scaled": (glorot, 1.0, lambda layer: 1 / math.sqrt(2 * (layer + 1)), True),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme(scheme: str) -> None:
    """Also experts, each a linear of its own, learned positions, and the blocks of multi-token prediction."""
    assert set(SCHEMES) == set(choices.INIT.names)
    linear, embedding, factor, cut = SCHEMES[scheme]
    config = ModelConfig(
        vocab_size=300,
        context_length=200,
        d_model=192,
        layers=LAYERS,
        heads=6,
        kv_heads=2,
        d_ff=320,
        position="learned",
        attention_bias="q k v o",
        feedforward_bias=True,
        attention_sinks=True,
        norm="layernorm",
        mtp_depth=1,
        moe={"experts": 3, "top_k": 1, "first_dense": 2, "d_expert": 256, "shared": 1, "router_bias": True},
        init=scheme,
    )
    model: Any = Transformer(config, seed=0)
    check(model.embedding.weight, embedding, cut=cut)
    check(model.embedding_positions[0].weight, embedding, cut=cut)
    check(model.head.weight, linear(192, 300), cut=cut)
    check(model.predictions[0].project.weight, linear(384, 192), cut=cut)
    blocks = [*model.blocks, model.predictions[0].block]
    for layer, block in enumerate(blocks):
        parts = block.attention.qkv.weight.split([192, 64, 64])
        for part in parts:
            check(part, linear(192, len(part)), cut=cut, rel=0.02)
        check(block.attention.output.weight, linear(192, 192) * factor(layer), cut=cut, rel=0.02)
        feedforward = block.feedforward
        if layer < 2:
            for half in feedforward.gate_up.weight.chunk(2):
                check(half, linear(192, 320), cut=cut)
            check(feedforward.down.weight, linear(320, 192) * factor(layer), cut=cut)
            continue
        assert feedforward.up.weight.shape == (3, 512, 192)
        for expert in range(3):
            for half in feedforward.up.weight[expert].chunk(2):
                check(half, linear(192, 256), cut=cut)
            check(feedforward.down.weight[expert], linear(256, 192) * factor(layer), cut=cut)
        check(feedforward.shared.down.weight, linear(256, 192) * factor(layer), cut=cut)
    named = dict(model.named_parameters())
    zeros = [name for name in named if name.endswith((".bias", ".sinks"))]
    assert (
        len(zeros) == 4 * 3 + 2 * 2 + 2 * 5 + 4 * 2 + 1 + 3
    )  # attention, dense, mixtures, norms in, above, beside blocks
    assert not any(named[name].any() for name in zeros)
    for name, parameter in named.items():
        if parameter.role == "norm":
            assert torch.equal(parameter, torch.ones_like(parameter)), name


def test_a_recipe_may_state_each_sigma() -> None:
    config = WIDE.model_copy(
        update={"init_linear_std": 0.02, "init_embedding_std": 0.5, "init_output_std": 0.01, "feedforward": "relu2"}
    )
    model: Any = Transformer(config, seed=0)
    check(model.embedding.weight, 0.5)
    block = model.blocks[0]
    for hidden in (block.attention.qkv, block.feedforward.up):
        check(hidden.weight, 0.02)
    for output in (block.attention.output, block.feedforward.down, model.head):
        check(output.weight, 0.01)

    silent: Any = Transformer(WIDE.model_copy(update={"init_output_std": 0.0}), seed=0)
    assert not silent.head.weight.any() and not silent.blocks[0].attention.output.weight.any()
    check(silent.blocks[0].feedforward.gate_up.weight, math.sqrt(2 / (256 + 512)))

    deep: Any = Transformer(
        WIDE.model_copy(update={"init": "gpt2", "init_output_std": 0.3, "mtp_depth": 1}), seed=0
    )
    for block in (deep.blocks[0], deep.predictions[0].block):  # a stated σ is taken as it is
        check(block.attention.output.weight, 0.3, cut=False)
    experts = WIDE.model_copy(
        update={"moe": MoEConfig(experts=2), "init_linear_std": 0.02, "init_output_std": 0.01}
    )
    mixture: Any = Transformer(experts, seed=0).blocks[0].feedforward
    check(mixture.up.weight, 0.02)
    check(mixture.down.weight, 0.01)
    learned = WIDE.model_copy(update={"position": ("learned",), "context_length": 100, "init_embedding_std": 0.5})
    placed: Any = Transformer(learned, seed=0)
    check(placed.embedding_positions[0].weight, 0.5)

    everything: Any = Transformer(WIDE.model_copy(update={"init_linear_std": 0.02}), seed=0)
    for module in everything.modules():
        if isinstance(module, Linear):
            check(module.weight, 0.02)


def test_the_demo_recipe_starts_silent() -> None:
    recipe = load_recipe(Path(__file__).parents[2] / "recipes" / "python-stdlib.toml")
    model: Any = Transformer(recipe.model.model_copy(update={"vocab_size": 300, "layers": 1}), seed=0)
    assert recipe.model.init_embedding_std is not None
    check(model.embedding.weight, recipe.model.init_embedding_std)
    assert recipe.model.init_output_std == 0
    with torch.no_grad():
        assert not model(torch.arange(10)).any(), "the first guess is uniform: a loss of ln(vocabulary)"


def test_a_tied_head_is_the_embedding() -> None:
    model: Any = Transformer(WIDE.model_copy(update={"tied_embeddings": True, "init_embedding_std": 0.1}), seed=0)
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
