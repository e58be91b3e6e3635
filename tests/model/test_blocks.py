"""Blocks: every place of the norms in every layout with every residual scale, against the sum written out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scratchlm.model import ModelConfig, Transformer, choices
from scratchlm.model.context import Context
from scratchlm.model.feedforward import SwiGLU
from scratchlm.model.moe import MixtureOfExperts
from scratchlm.model.norm import NoNorm
from scratchlm.model.position import Positions

WIDTH = 6


class Known(nn.Module):
    """A matrix in a branch's place."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.matrix = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return x @ self.matrix

    def num_params(self) -> int:
        return 0


def block_of(**fields: Any) -> Any:
    """A block in float64 whose branches are known matrices and whose parameters are all moved from their start."""
    config = ModelConfig(d_model=WIDTH, heads=1, **{"layers": 3, **fields})
    block = choices.BLOCK.get(config.block)(config, 1, Positions(config))
    block.attention, block.feedforward = Known(1), Known(2)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    return block.double()


def x_of() -> Tensor:
    return 2 * torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


# x the stream; A, F the branches; a, f their norms before; p, q those after or on the stream; s, t the residual scales.
Layout = Callable[..., Tensor]


def in_a_row(first: Layout, second: Layout) -> Layout:
    def both(x: Tensor, A: Any, F: Any, a: Any, f: Any, p: Any, q: Any, s: Tensor, t: Tensor) -> Tensor:
        x = first(x, A, a, p, s)
        return second(x, F, f, q, t)

    return both


SERIAL: dict[str, Layout] = {
    "pre": lambda x, branch, before, after, scale: x + scale * branch(before(x)),
    "post": lambda x, branch, before, after, scale: after(x + scale * branch(x)),
    "reordered": lambda x, branch, before, after, scale: x + scale * after(branch(x)),
    "double": lambda x, branch, before, after, scale: x + scale * after(branch(before(x))),
    "none": lambda x, branch, before, after, scale: x + scale * branch(x),
}
LAYOUTS: dict[tuple[str, str], Layout] = {
    **{("serial", name): in_a_row(layout, layout) for name, layout in SERIAL.items()},
    ("parallel", "pre"): lambda x, A, F, a, f, p, q, s, t: x + s * A(a(x)) + t * F(f(x)),
    ("parallel", "post"): lambda x, A, F, a, f, p, q, s, t: p(x + s * A(x) + t * F(x)),
    ("parallel", "reordered"): lambda x, A, F, a, f, p, q, s, t: x + s * p(A(x)) + t * q(F(x)),
    ("parallel", "double"): lambda x, A, F, a, f, p, q, s, t: x + s * p(A(a(x))) + t * q(F(f(x))),
    ("parallel", "none"): lambda x, A, F, a, f, p, q, s, t: x + s * A(x) + t * F(x),
    ("parallel_shared", "pre"): lambda x, A, F, a, f, p, q, s, t: x + s * A(a(x)) + t * F(a(x)),
    ("parallel_shared", "double"): lambda x, A, F, a, f, p, q, s, t: x + s * p(A(a(x))) + t * q(F(a(x))),
}
NORMS_HELD = {
    ("serial", "pre"): 2, ("serial", "post"): 2, ("serial", "reordered"): 2, ("serial", "double"): 4,
    ("parallel", "pre"): 2, ("parallel", "post"): 1, ("parallel", "reordered"): 2, ("parallel", "double"): 4,
    ("serial", "none"): 0, ("parallel", "none"): 0, ("parallel_shared", "pre"): 1, ("parallel_shared", "double"): 3,
}  # fmt: skip


def by_hand(norm: nn.Module, kind: str) -> Callable[[Tensor], Tensor]:
    """The norm's formula with its parameters; one that is not there must not be asked for."""

    def function(x: Tensor) -> Tensor:
        assert not isinstance(norm, NoNorm)
        if kind == "layernorm":
            x = x - x.mean(dim=-1, keepdim=True)
        unit = x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
        return unit * norm.weight + (norm.bias if kind == "layernorm" else 0)  # type: ignore[operator]

    return function


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("residual", choices.RESIDUAL.names)
@pytest.mark.parametrize(("block", "placement"), LAYOUTS, ids=lambda name: name)
def test_the_sum_is_the_one_written_out(block: str, placement: str, residual: str, norm: str) -> None:
    module = block_of(block=block, norm_placement=placement, residual=residual, residual_init=0.3, norm=norm)
    scales = {
        "plain": lambda scale: torch.ones(()),
        "depth": lambda scale: torch.tensor(1 / math.sqrt(2 * 3), dtype=torch.float64),
        "fixed": lambda scale: torch.tensor(0.3, dtype=torch.float64),
        "scalar": lambda scale: scale.scale,
        "vector": lambda scale: scale.scale,
    }[residual]
    s, t = scales(module.attention_scale), scales(module.feedforward_scale)
    assert s.shape == t.shape == {"scalar": (1,), "vector": (WIDTH,)}.get(residual, ())
    names = ("attention_norm", "feedforward_norm", "attention_post_norm", "feedforward_post_norm")
    norms = [by_hand(getattr(module, name), norm) for name in names]
    x = x_of()
    expected = LAYOUTS[block, placement](
        x,
        lambda u: u @ module.attention.matrix,
        lambda u: u @ module.feedforward.matrix,
        *norms,
        s,
        t,
    )
    torch.testing.assert_close(module(x, Context()), expected, rtol=1e-11, atol=1e-11)
    per_norm = WIDTH * (2 if norm == "layernorm" else 1)
    held = sum(p.numel() for p in module.parameters())
    assert held == NORMS_HELD[block, placement] * per_norm + s.numel() * 2 * (residual in ("scalar", "vector"))
    assert module.num_params() == held


def test_every_layout_is_written_out() -> None:
    everything = {(b, p) for b in choices.BLOCK.names for p in choices.NORM_PLACEMENT.names}
    refused = {("parallel_shared", p) for p in ("post", "reordered", "none")}
    assert set(LAYOUTS) == everything - refused


def test_residual_scales_start_where_the_configuration_says() -> None:
    x = x_of()
    for residual, size in (("scalar", 1), ("vector", WIDTH)):
        config = ModelConfig(d_model=WIDTH, heads=1, residual=residual, residual_init=0.25)
        scale = choices.RESIDUAL.get(residual)(config)
        assert scale.num_params() == size and scale.scale.shape == (size,) and scale.scale.role == "norm"
        torch.testing.assert_close(scale(x), x / 4)
        assert scale(x.bfloat16()).dtype == torch.bfloat16
    for layers in (0, 1, 8):
        config = ModelConfig(d_model=WIDTH, heads=1, layers=layers, residual="depth")
        torch.testing.assert_close(choices.RESIDUAL.get("depth")(config)(x), x / math.sqrt(2 * max(1, layers)))
    silent = Transformer(
        ModelConfig(vocab_size=9, d_model=8, heads=2, residual="scalar", residual_init=0.0, final_norm=False)
    )
    ids = torch.arange(5)
    torch.testing.assert_close(silent(ids), silent.head(silent.embedding(ids)), msg="ReZero starts as the identity")


def test_branches_are_the_layers_own_and_get_the_context() -> None:
    asked: list[Context] = []
    module = block_of()
    for name in ("attention", "feedforward"):
        getattr(module, name).register_forward_pre_hook(lambda m, given: asked.append(given[1]))
    context = Context()
    module(x_of(), context)
    assert [one is context for one in asked] == [True, True]

    config = ModelConfig(
        d_model=8, heads=2, layers=4, attention="mha gla", moe={"experts": 3, "first_dense": 1, "every": 2}
    )
    blocks: Any = Transformer(ModelConfig(**{**config.model_dump(), "vocab_size": 5})).blocks
    assert [type(block.attention).__name__ for block in blocks] == [
        "MultiHeadAttention",
        "GatedLinearAttention",
    ] * 2
    assert [type(block.feedforward) for block in blocks] == [SwiGLU, SwiGLU, MixtureOfExperts, SwiGLU]
    mixed = blocks[2]
    spared = mixed.feedforward.num_params() - mixed.feedforward.num_active_params()
    assert spared > 0 and mixed.num_params() - mixed.num_active_params() == spared
    assert blocks[0].num_params() == blocks[0].num_active_params()
    for block in blocks:
        assert block.flops_per_token(7) == block.attention.flops_per_token(7) + block.feedforward.flops_per_token(7)


@pytest.mark.parametrize("kernels", ["fast", "reference"])
def test_around_the_blocks(kernels: str) -> None:
    """Embedding, scale, norm; blocks; final norm; head, scale, cap."""
    config = ModelConfig(
        vocab_size=13, d_model=8, heads=2, layers=2, embedding_scale="sqrt_d_model", embedding_norm=True,
        logit_scale=0.7, logit_soft_cap=1.5, head_bias=True, kernels=kernels,
    )  # fmt: skip
    model = Transformer(config, seed=0).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3)
        model.head.bias.copy_(torch.linspace(-1, 1, 13))
    ids = torch.tensor([[1, 5, 12, 0]])
    x = by_hand(model.embedding_norm, "rmsnorm")(model.embedding.weight[ids] * math.sqrt(8))
    torch.testing.assert_close(model.embed(ids), x)
    for block in model.blocks:
        x = block(x, Context())
    x = by_hand(model.norm, "rmsnorm")(x)
    torch.testing.assert_close(model.hidden(ids), x)
    torch.testing.assert_close(
        model(ids), 1.5 * torch.tanh(0.7 * (x @ model.head.weight.T + model.head.bias) / 1.5)
    )
    for placement, final in (
        ("pre", True),
        ("post", False),
        ("reordered", True),
        ("double", True),
        ("none", False),
    ):
        for asked in (None, True, False):
            other = Transformer(ModelConfig(vocab_size=3, norm_placement=placement, final_norm=asked))
            assert isinstance(other.norm, NoNorm) != (final if asked is None else asked)


@pytest.mark.parametrize("block", choices.BLOCK.names)
def test_residual_dropout_acts_on_branches_in_training_alone(block: str) -> None:
    module = block_of(block=block, residual_dropout=0.5, norm="rmsnorm_noscale")
    still = block_of(block=block, norm="rmsnorm_noscale")
    x = x_of()
    module.eval(), still.eval()
    torch.testing.assert_close(module(x, Context()), still(x, Context()))
    module.train()
    module.feedforward.matrix.zero_()  # only attention is left
    branch = (still.attention_norm(x) @ still.attention.matrix).flatten()
    torch.manual_seed(0)
    added = (module(x, Context()) - x).flatten()
    dropped = added.abs() < 1e-12
    assert 0.25 < dropped.double().mean().item() < 0.75
    torch.testing.assert_close(added[~dropped], 2 * branch[~dropped])
    module.attention.matrix.zero_()
    torch.testing.assert_close(module(x, Context()), x, msg="the stream itself is not dropped")


@pytest.mark.parametrize("site", ["embedding_dropout", "attention_dropout", "residual_dropout"])
@pytest.mark.parametrize("kernels", ["fast", "reference"])
def test_dropout_acts_in_training_alone(site: str, kernels: str) -> None:
    fields: dict[str, Any] = {"vocab_size": 13, "d_model": 8, "heads": 2, "layers": 1, "kernels": kernels}
    still, dropping = (Transformer(ModelConfig(**fields, **more), seed=0) for more in ({}, {site: 0.5}))
    ids = torch.arange(12).reshape(2, 6)
    expected = still.train()(ids)
    torch.testing.assert_close(dropping.eval()(ids), expected)
    dropping.train()
    torch.manual_seed(0)
    first, second = dropping(ids), dropping(ids)
    assert not torch.allclose(first, expected) and not torch.allclose(first, second)
    embedded, rows = dropping.embed(ids), still.embed(ids)
    if site == "embedding_dropout":
        dropped = embedded == 0
        assert 0.2 < dropped.double().mean().item() < 0.8
        torch.testing.assert_close(embedded[~dropped], 2 * rows[~dropped])
    else:
        torch.testing.assert_close(embedded, rows)
