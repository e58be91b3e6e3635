"""Norms, norms of queries and keys, feed-forwards, linears: each against its formula in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scratchlm.model import ModelConfig, choices
from scratchlm.model.context import Context
from scratchlm.model.linear import Embedding, Linear
from scratchlm.model.norm import EachHeadQKNorm, FullWidthQKNorm, HeadQKNorm, NoNorm, NoQKNorm, norm_of

both_kernels = pytest.mark.parametrize("kernels", ["fast", "reference"])
NORMS = [name for name in choices.NORM.names if name != "none"]
every_norm = pytest.mark.parametrize("kind", NORMS)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@torch.no_grad()
def moved(module: nn.Module, seed: int = 7) -> nn.Module:
    """Every parameter away from where it starts."""
    for index, parameter in enumerate(module.parameters()):
        start = parameter if parameter.ndim == 1 else torch.zeros_like(parameter)
        parameter.copy_(start + 0.5 * drawn(*parameter.shape, seed=seed + index))
    return module


def a_norm(kind: str, width: int, kernels: str, eps: float = 1e-5) -> Any:
    config = ModelConfig(norm=kind, norm_eps=eps, kernels=kernels)
    return moved(norm_of(config, width)).double()


def normed(kind: str, x: np.ndarray, eps: float, gain: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Every norm, vector by vector, from the papers' formulas."""
    out = np.empty_like(x)
    for place in np.ndindex(x.shape[:-1]):
        vector = x[place]
        if kind.startswith("layernorm"):
            vector = vector - sum(vector) / len(vector)
        unit = vector / math.sqrt(sum(v * v for v in vector) / len(vector) + eps)
        out[place] = {
            "rmsnorm": unit * gain,
            "rmsnorm_noscale": unit,
            "rmsnorm_unit_offset": unit * (1 + gain),
            "layernorm": unit * gain + shift,
            "layernorm_nobias": unit * gain,
            "layernorm_noparams": unit,
        }[kind]
    return out


def parameters_of(norm: Any, width: int) -> tuple[np.ndarray, np.ndarray]:
    gain, shift = np.full(width, np.nan), np.full(width, np.nan)  # what a kind does not have must not be used
    if norm.weight is not None:
        gain = norm.weight.detach().double().numpy()
    if norm.bias is not None:
        shift = norm.bias.detach().double().numpy()
    return gain, shift


@both_kernels
@every_norm
@pytest.mark.parametrize("eps", [1e-6, 0.1])
@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 3, 4, 16)])
def test_norms_are_their_formulas(kind: str, shape: tuple[int, ...], eps: float, kernels: str) -> None:
    x = drawn(*shape) * 3 + 0.5
    norm = a_norm(kind, 16, kernels, eps)
    expected = normed(kind, x.numpy(), eps, *parameters_of(norm, 16))
    np.testing.assert_allclose(norm(x).detach().numpy(), expected, rtol=1e-12, atol=1e-12)


@both_kernels
@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm", "layernorm_nobias", "layernorm_noparams"])
def test_norms_are_torchs_with_the_same_state(kind: str, kernels: str) -> None:
    norm = a_norm(kind, 16, kernels, eps=1e-3)
    if kind == "rmsnorm":
        theirs: nn.Module = nn.RMSNorm(16, eps=1e-3).double()
    else:
        theirs = nn.LayerNorm(
            16, eps=1e-3, elementwise_affine=norm.weight is not None, bias=norm.bias is not None
        ).double()
    theirs.load_state_dict(norm.state_dict(), strict=True)
    found = []
    for module in (norm, theirs):
        x = drawn(5, 16).requires_grad_()
        out = module(x)
        found.append((out, *torch.autograd.grad(out.pow(3).sum(), [x, *module.parameters()])))
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact)


@both_kernels
@every_norm
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_norms_compute_in_float32_inside(kind: str, kernels: str, weight_dtype: torch.dtype) -> None:
    norm = a_norm(kind, 512, kernels).to(weight_dtype)
    x = drawn(64, 512, dtype=torch.bfloat16)
    out = norm(x)
    assert out.dtype == torch.bfloat16
    exact = normed(kind, x.double().numpy(), 1e-5, *parameters_of(norm, 512))
    # Only the last rounding is left: at most half a unit in the last of bfloat16's 8 digits (and float32's own noise).
    assert (np.abs(out.detach().double().numpy() - exact) <= np.abs(exact) * 2**-8 * 1.001 + 1e-6).all()
    loud = drawn(4, 512).sign().mul(1000).half()  # its square does not fit float16
    exact = normed(kind, loud.double().numpy(), 1e-5, *parameters_of(norm, 512))
    out = norm(loud)
    assert out.dtype == torch.float16
    np.testing.assert_allclose(out.detach().float().numpy(), exact, rtol=2e-3, atol=2e-3)


@both_kernels
@every_norm
def test_norms_start_at_a_gain_of_one(kind: str, kernels: str) -> None:
    norm = norm_of(ModelConfig(norm=kind, kernels=kernels), 100)
    x = drawn(3, 100)
    twin = "layernorm_noparams" if kind.startswith("layernorm") else "rmsnorm_noscale"
    expected = normed(twin, x.numpy(), 1e-5, *parameters_of(a_norm(twin, 100, kernels), 100))
    np.testing.assert_allclose(norm(x).detach().numpy(), expected, rtol=1e-12, atol=1e-12)
    assert not norm(torch.zeros(2, 100)).any()
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x.float()).dtype == torch.float32


def test_what_norms_hold() -> None:
    held = {
        "rmsnorm": {"weight": "norm"},
        "rmsnorm_noscale": {},
        "rmsnorm_unit_offset": {"weight": "norm"},
        "layernorm": {"weight": "norm", "bias": "bias"},
        "layernorm_nobias": {"weight": "norm"},
        "layernorm_noparams": {},
        "none": {},
    }
    assert held.keys() == set(choices.NORM.names)
    for kind, roles in held.items():
        norm = norm_of(ModelConfig(), 10, kind)
        assert {name: parameter.role for name, parameter in norm.named_parameters()} == roles
        assert norm.num_params() == 10 * len(roles) and norm.flops_per_token() == 0
        start = {"weight": 0.0 if kind == "rmsnorm_unit_offset" else 1.0, "bias": 0.0}
        for name, parameter in norm.named_parameters():
            assert torch.equal(parameter, torch.full((10,), start[name])), (kind, name)
    x = drawn(3, 8)
    assert NoNorm(8)(x) is x


@both_kernels
@pytest.mark.parametrize(
    ("norm", "asked", "kind"),
    [
        *((name, None, name) for name in NORMS),
        ("none", None, "rmsnorm"),
        ("layernorm", "rmsnorm_noscale", "rmsnorm_noscale"),
        ("none", "layernorm", "layernorm"),
    ],
)
def test_norms_of_queries_and_keys(norm: str, asked: str | None, kind: str, kernels: str) -> None:
    """Per head: one gain of head_dim for all heads, or one each; over the full width: a token's heads as one vector."""
    config = ModelConfig(d_model=24, heads=4, norm=norm, qk_norm_kind=asked, norm_eps=1e-3, kernels=kernels)
    x = drawn(2, 3, 5, 6) * 2 + 0.3  # batch, heads, tokens, head_dim
    numbers = x.numpy()

    by_head: Any = moved(HeadQKNorm(config, 3)).double()
    expected = np.empty_like(numbers)
    for head in range(3):
        expected[:, head] = normed(kind, numbers[:, head], 1e-3, *parameters_of(by_head.norm, 6))
    np.testing.assert_allclose(by_head(x).detach().numpy(), expected, rtol=1e-12, atol=1e-12)
    assert by_head.num_params() == sum(p.numel() for p in by_head.parameters())

    each: Any = moved(EachHeadQKNorm(config, 3)).double()
    gains, shifts = (np.broadcast_to(held, (3, 6)) for held in parameters_of(each.norm, 6))
    for head in range(3):
        expected[:, head] = normed(kind, numbers[:, head], 1e-3, gains[head], shifts[head])
    np.testing.assert_allclose(each(x).detach().numpy(), expected, rtol=1e-12, atol=1e-12)
    assert all(p.shape == (3, 6) and p.role in ("norm", "bias") for p in each.parameters())
    assert each.num_params() == sum(p.numel() for p in each.parameters())
    assert each(x[0]).equal(each(x)[0])
    fresh = EachHeadQKNorm(config, 3).norm
    assert fresh.weight is None or fresh.weight.eq(1 - fresh.offset).all()

    full: Any = moved(FullWidthQKNorm(config, 3)).double()
    for row in range(2):
        for token in range(5):
            vector = np.concatenate([numbers[row, head, token] for head in range(3)])[None]
            found = normed(kind, vector, 1e-3, *parameters_of(full.norm, 18))[0]
            for head in range(3):
                expected[row, head, token] = found[6 * head : 6 * head + 6]
    np.testing.assert_allclose(full(x).detach().numpy(), expected, rtol=1e-12, atol=1e-12)
    assert full.num_params() == sum(p.numel() for p in full.parameters())
    assert full(x[0]).equal(full(x)[0])

    for name in ("head", "each", "full"):
        held = choices.QK_NORM.get(name)
        other: Any = held(ModelConfig(**{**config.model_dump(), "qk_norm_eps": 1.0}), 3).double()
        same: Any = held(ModelConfig(**{**config.model_dump(), "qk_norm_eps": 1e-3}), 3).double()
        assert same(x).equal(held(config, 3).double()(x))
        assert (other(x).norm() < 0.9 * same(x).norm()).item(), name

    nothing = NoQKNorm(config, 3)
    assert nothing(x) is x and nothing.num_params() == 0


def test_a_gain_for_each_head_is_transformers() -> None:
    theirs = pytest.importorskip("transformers.models.cohere.modeling_cohere")
    config = ModelConfig(d_model=24, heads=4, norm="layernorm_nobias", norm_eps=1e-3)
    ours: Any = moved(EachHeadQKNorm(config, 3))
    twin = theirs.CohereLayerNorm((3, 6), eps=1e-3)
    twin.load_state_dict(ours.norm.state_dict())
    x = drawn(2, 5, 3, 6, dtype=torch.float32) + 0.3
    torch.testing.assert_close(ours(x.transpose(1, 2)).transpose(1, 2), twin(x), rtol=1e-5, atol=1e-6)


def logistic(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def gaussian(x: np.ndarray) -> np.ndarray:
    return x * np.vectorize(math.erfc)(-x / math.sqrt(2)) / 2


def gaussian_by_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


PLAIN: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "gelu": gaussian,
    "gelu_tanh": gaussian_by_tanh,
    "silu": lambda x: x * logistic(x),
}
GATED: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "glu": lambda gate, up: logistic(gate) * up,
    "reglu": lambda gate, up: np.maximum(gate, 0) * up,
    "geglu": lambda gate, up: gaussian(gate) * up,
    "geglu_tanh": lambda gate, up: gaussian_by_tanh(gate) * up,
    "swiglu": lambda gate, up: gate * logistic(gate) * up,
    "swiglu_clamped": lambda gate, up: (
        np.minimum(gate, 7) * logistic(1.702 * np.minimum(gate, 7)) * (np.maximum(np.minimum(up, 7), -7) + 1)
    ),
}


@both_kernels
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("name", choices.FEEDFORWARD.names)
def test_feed_forwards_are_their_formulas(name: str, bias: bool, kernels: str) -> None:
    config = ModelConfig(d_model=12, heads=1, d_ff=20, feedforward=name, feedforward_bias=bias, kernels=kernels)
    module: Any = moved(choices.FEEDFORWARD.get(name)(config)).double()
    x = drawn(2, 3, 12) * 5
    weights = {key: value.detach().numpy() for key, value in module.state_dict().items()}

    def linear(inputs: np.ndarray, which: str) -> np.ndarray:
        product = np.einsum("...i,oi->...o", inputs, weights[f"{which}.weight"])
        return product + weights[f"{which}.bias"] if bias else product

    if name in PLAIN:
        inner = PLAIN[name](linear(x.numpy(), "up"))
        sizes = 2 * 12 * 20 + bias * (20 + 12)
    else:
        both = linear(x.numpy(), "gate_up")
        inner = GATED[name](both[..., :20], both[..., 20:])
        sizes = 3 * 12 * 20 + bias * (40 + 12)
        assert (np.abs(both) > 7).any(), "the clamp must have something to do"
    np.testing.assert_allclose(module(x, Context()).detach().numpy(), linear(inner, "down"), rtol=1e-10, atol=1e-10)
    assert module.num_params() == module.num_active_params() == sizes
    assert module.flops_per_token(9) == 2 * (3 if name in GATED else 2) * 12 * 20
    assert module.down.residual_output
    assert len(weights) == (4 if bias else 2)


def test_every_feed_forward_is_plain_or_gated_and_its_width_follows() -> None:
    assert {*PLAIN, *GATED} == set(choices.FEEDFORWARD.names)
    for name in choices.FEEDFORWARD.names:
        ratio = 8 / 3 if name in GATED else 4
        config = ModelConfig(d_model=768, feedforward=name)
        assert config.resolved_d_ff == ratio * 768
        module: Any = choices.FEEDFORWARD.get(name)(config)
        assert module.down.weight.shape == (768, ratio * 768)
        narrow: Any = choices.FEEDFORWARD.get(name)(config, d_ff=7)
        assert narrow.down.weight.shape == (768, 7)
        inner = narrow.gate_up if name in GATED else narrow.up
        assert inner.parts == ([7, 7] if name in GATED else [7])


@pytest.mark.parametrize("reference", [False, True], ids=["fast", "reference"])
def test_linear_and_embedding(reference: bool) -> None:
    layer: Any = Linear(5, 9, parts=[4, 2, 3], bias=[True, False, True], reference=reference)
    moved(layer.double())
    x = drawn(2, 3, 5)
    assert layer.bias is not None and layer.bias.shape == (7,), "a part without a bias stores none"
    bias = torch.cat([layer.bias[:4], torch.zeros(2), layer.bias[4:]])
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, bias))
    assert layer.num_params() == sum(p.numel() for p in layer.parameters()) == 5 * 9 + 7
    assert layer.weight.muon_split == [4, 2, 3] and layer.bias.role == "bias"
    plain: Any = Linear(5, 6, reference=reference, role="head")
    assert plain.bias is None and plain.full_bias() is None and not hasattr(plain.weight, "muon_split")
    assert plain.weight.role == "head" and plain.num_params() == 30 and plain.flops_per_token() == 60
    whole = Linear(5, 6, bias=True, parts=[2, 4], reference=reference).double()
    moved(whole)
    torch.testing.assert_close(whole(x), F.linear(x, whole.weight, whole.bias))

    table = Embedding(7, 3, reference=reference)
    torch.nn.init.normal_(table.weight)
    ids = torch.tensor([[0, 6], [3, 3]])
    assert torch.equal(table(ids), F.embedding(ids, table.weight)) and table.num_params() == 21
    for bad in (7, -8):
        with pytest.raises(IndexError):
            table(torch.tensor([bad]))
