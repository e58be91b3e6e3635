"""Positions: rotations as complex numbers, stretched wavelengths as in transformers, tables, ALiBi by brute force."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scratchlm.model import ModelConfig, Transformer
from scratchlm.model.context import Context
from scratchlm.model.position import ALiBi, Learned, NoPosition, Position, Positions, Sinusoidal, TablePosition
from scratchlm.model.position import alibi_slopes as slopes_of
from scratchlm.model.rope import RoPE

both_pairings = pytest.mark.parametrize("pairs", ["half", "interleaved"])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rope(head_dim: int = 8, context_length: int = 64, layer: int = 0, **settings: Any) -> RoPE:
    config = ModelConfig(d_model=head_dim, heads=1, context_length=context_length, rope=settings)
    position = Positions(config).at(layer, head_dim)
    assert isinstance(position, RoPE)
    return position.double()


def turned(x: np.ndarray, positions: np.ndarray, theta: float, pairs: str, width: int) -> np.ndarray:
    """Each pair as a complex number times exp(i · position · θ^(−2j/width)); the dimensions after `width` stay."""
    out = x.copy()
    for j in range(width // 2):
        a, b = (j, j + width // 2) if pairs == "half" else (2 * j, 2 * j + 1)
        number = (x[..., a] + 1j * x[..., b]) * np.exp(1j * positions * theta ** (-2 * j / width))
        out[..., a], out[..., b] = number.real, number.imag
    return out


@both_pairings
@pytest.mark.parametrize("theta", [10_000.0, 500.0])
@pytest.mark.parametrize(("head_dim", "fraction", "width"), [(2, 1, 2), (8, 1, 8), (12, 0.34, 4), (64, 0.25, 16)])
def test_rope_is_complex_multiplication(
    head_dim: int, fraction: float, width: int, theta: float, pairs: str
) -> None:
    layer = rope(head_dim, context_length=512, theta=theta, fraction=fraction, pairs=pairs)
    x = drawn(2, 3, 512, head_dim)
    expected = turned(x.numpy(), np.arange(512), theta, pairs, width)
    np.testing.assert_allclose(layer(x, None).numpy(), expected, rtol=0, atol=1e-11)
    np.testing.assert_allclose(layer(x, torch.arange(512)).numpy(), expected, rtol=0, atol=1e-11)
    rows = torch.stack([torch.arange(512) % 5, torch.arange(512).flip(0)])  # of its own for each row of the batch
    expected = turned(x.numpy(), rows.numpy()[:, None], theta, pairs, width)
    np.testing.assert_allclose(layer(x, rows).numpy(), expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(
        layer.float()(x.float(), rows).double(), torch.from_numpy(expected), rtol=0, atol=2e-4
    )


def test_theta_per_layer() -> None:
    x = drawn(1, 9, 8)
    for layer, theta in enumerate((100.0, 100.0, 1e6, 100.0, 100.0)):
        found = rope(layer=layer, theta="100 100 1e6")(x, None)
        np.testing.assert_allclose(found.numpy(), turned(x.numpy(), np.arange(9), theta, "half", 8), atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["half", "interleaved"]),
    st.sampled_from([1.0, 0.5]),
    *(st.integers(0, 40) for _ in "mn"),
    st.integers(0, 23),
    st.integers(0, 1000),
)
def test_rope_products_depend_on_the_distance_alone(
    pairs: str, fraction: float, m: int, n: int, shift: int, seed: int
) -> None:
    layer = rope(head_dim=16, pairs=pairs, fraction=fraction)
    q, k = drawn(1, 1, 16, seed=seed), drawn(1, 1, 16, seed=seed + 1)

    def product(query: int, key: int) -> float:
        turned_q, turned_k = layer(q, torch.tensor([query])), layer(k, torch.tensor([key]))
        torch.testing.assert_close(turned_q.norm(), q.norm())
        return (turned_q * turned_k).sum().item()

    assert product(m, n) == pytest.approx(product(m + shift, n + shift), abs=1e-9)
    assert product(m, m) == pytest.approx((q * k).sum().item(), abs=1e-9)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_the_two_pairings_are_permutations_of_each_other(fraction: float) -> None:
    width = int(16 * fraction)
    order = [*range(0, width, 2), *range(1, width, 2), *range(width, 16)]  # interleaved → halves
    x = drawn(2, 3, 20, 16)
    half, interleaved = (rope(16, fraction=fraction, pairs=pairs)(x_, None) for pairs, x_ in
                         (("half", x[..., order]), ("interleaved", x)))  # fmt: skip
    torch.testing.assert_close(half, interleaved[..., order])
    assert not torch.allclose(rope(16, fraction=fraction)(x, None), interleaved)


SCALINGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "linear": ("linear", {}, {}),
    "yarn": ("yarn", {}, {}),
    "yarn, other turns": ("yarn", {"beta_fast": 8.0, "beta_slow": 2.0}, {"beta_fast": 8.0, "beta_slow": 2.0}),
    "yarn, between pairs": ("yarn", {"truncate": False}, {"truncate": False}),
    "yarn, attention factor": ("yarn", {"attention_factor": 0.7}, {"attention_factor": 0.7}),
    "llama3": ("llama3", {}, {"low_freq_factor": 1.0, "high_freq_factor": 4.0}),
    "llama3, other waves": (
        "llama3",
        {"low_freq_factor": 2.0, "high_freq_factor": 9.0},
        {"low_freq_factor": 2.0, "high_freq_factor": 9.0},
    ),
    "ntk": ("dynamic", {}, {}),
}


@pytest.mark.parametrize("factor", [1.5, 4.0, 32.0])
@pytest.mark.parametrize(("theta", "head_dim", "fraction"), [(1e4, 64, 1.0), (5e5, 128, 1.0), (500.0, 32, 0.5)])
@pytest.mark.parametrize("case", SCALINGS)
def test_stretched_frequencies_are_those_of_transformers(
    case: str, theta: float, head_dim: int, fraction: float, factor: float
) -> None:
    transformers = pytest.importorskip("transformers")
    functions = pytest.importorskip("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS
    theirs, settings, asked = SCALINGS[case]
    original = 2048
    layer = rope(
        head_dim,
        scaling=case.split(",")[0],
        theta=theta,
        factor=factor,
        fraction=fraction,
        original_context=original,
        **settings,
    )
    ours, attention_factor = layer.frequencies()
    stretch = (
        1.0 if theirs == "dynamic" else factor
    )  # their NTK stretches by the length it meets, ours by the factor
    config = transformers.LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=original,
        rope_parameters={
            "rope_type": theirs,
            "rope_theta": theta,
            "factor": stretch,
            "partial_rotary_factor": fraction,
            **({} if theirs in ("linear", "dynamic") else {"original_max_position_embeddings": original}),
            **asked,
        },
    )
    more = {"seq_len": round(factor * original)} if theirs == "dynamic" else {}
    expected, their_factor = functions[theirs](config, "cpu", **more)
    torch.testing.assert_close(ours.float(), expected, rtol=2e-5, atol=0)
    assert attention_factor == pytest.approx(their_factor)
    unstretched = theta ** (-torch.arange(0, head_dim * fraction, 2, dtype=torch.float64) / (head_dim * fraction))
    assert not torch.allclose(ours, unstretched, rtol=1e-3, atol=0)

    # … and they are what queries and keys are turned by, both times the factor
    x = drawn(2, 5, head_dim)
    width = int(head_dim * fraction)
    numbers = x.numpy().copy()
    for j in range(width // 2):
        number = (numbers[..., j] + 1j * numbers[..., j + width // 2]) * attention_factor
        number = number * np.exp(1j * np.arange(5) * ours[j].item())
        numbers[..., j], numbers[..., j + width // 2] = number.real, number.imag
    np.testing.assert_allclose(layer(x, None).numpy(), numbers, rtol=0, atol=1e-12)


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize(
    ("original", "fast", "slow", "theta"),
    [
        (4, 32.0, 1.0, 1e4),  # no wave turns once: both ends below the first pair
        (40, 6.0, 5.0, 1e4),
        (40, 32.0, 1.0, 1e4),  # the first end below the first pair
        (4096, 2.0, 9.0, 1e4),  # the ramp runs backwards
        (4096, 5.0, 5.0, 1e4),  # a step where it is not rounded
        (4096, 600.0, 500.0, 1e4),
        (10**6, 3.0, 1.0, 2.0),  # both ends above the last pair
        (2048, 32.0, 1.0, 1e4),
    ],
)
def test_yarns_ramp_is_transformers_wherever_it_lies(
    original: int, fast: float, slow: float, theta: float, truncate: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = pytest.importorskip("transformers.modeling_rope_utils")._compute_yarn_parameters
    asked: dict[str, Any] = {"beta_fast": fast, "beta_slow": slow, "truncate": truncate, "factor": 8.0}
    ours, factor = rope(64, scaling="yarn", theta=theta, original_context=original, **asked).frequencies()
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_attention_heads=1,
        max_position_embeddings=8 * original,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": theta,
            "original_max_position_embeddings": original,
            **asked,
        },
    )
    expected, their_factor = theirs(config, "cpu")
    torch.testing.assert_close(ours.float(), expected, rtol=2e-5, atol=0)
    assert factor == pytest.approx(their_factor)


@pytest.mark.parametrize("scaling", ["yarn", "llama3"])
def test_without_an_original_context_it_is_the_part_before_stretching(scaling: str) -> None:
    settings: dict[str, Any] = {"scaling": scaling, "factor": 4.0, "theta": 300.0}
    left_out, said = (rope(32, context_length=64, **settings, **more).frequencies()[0] for more in
                      ({}, {"original_context": 16}))  # fmt: skip
    other = rope(32, context_length=64, **settings, original_context=64).frequencies()[0]
    assert left_out.equal(said) and not left_out.equal(other)


def test_scaling_per_layer() -> None:
    config: dict[str, Any] = {"scaling": "none linear", "factor": 8.0, "theta": "100 10000"}
    x = drawn(1, 9, 8)
    for layer in range(4):
        positions = np.arange(9) / (8 if layer % 2 else 1)
        expected = turned(x.numpy(), positions, (100.0, 1e4)[layer % 2], "half", 8)
        np.testing.assert_allclose(rope(layer=layer, **config)(x, None).numpy(), expected, atol=1e-12)


def model_of(**fields: Any) -> Transformer:
    defaults: dict[str, Any] = {"vocab_size": 11, "context_length": 4096, "d_model": 16, "heads": 2, "layers": 2}
    return Transformer(ModelConfig(**{**defaults, **fields}), seed=0)


def tables_of(model: Transformer) -> list[TablePosition]:
    return [module for module in model.modules() if isinstance(module, TablePosition)]


@pytest.mark.parametrize("position", ["rope", "sinusoidal", "alibi"])
def test_tables_survive_a_cast_of_the_model(position: str) -> None:
    (table,) = tables_of(model_of(position=position).double())
    exact = table.table
    assert exact.dtype == torch.float64 and exact.equal(table.compute())
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        (cast,) = tables_of(model_of(position=position).to(dtype))
        assert cast.table.dtype == torch.float32 and cast.table.equal(exact.float())
    (back,) = tables_of(model_of(position=position).bfloat16().double())
    assert back.table.equal(exact)


def test_equal_positions_are_shared_and_tables_are_not_saved() -> None:
    model = model_of(layers=8, rope={"theta": "100 100 100 10000"}, context_length=64)
    assert len(tables_of(model)) == 2
    blocks: Any = model.blocks
    held = [block.attention.position for block in blocks]
    assert held[0] is held[1] is held[2] is held[4] and held[3] is held[7] and held[0] is not held[3]
    assert [p.theta for p in held[2:5]] == [100.0, 10_000.0, 100.0]
    for position in ("rope", "alibi", "sinusoidal"):
        assert not [
            name for name in model_of(position=position, context_length=8).state_dict() if "position" in name
        ]
    assert len(tables_of(model_of(layers=8, position="alibi", context_length=8))) == 1

    mixed = model_of(layers=4, position="learned rope", context_length=64)
    assert [n for n in mixed.state_dict() if "position" in n] == ["embedding_positions.0.weight"]
    kinds = [type(block.attention.position) for block in mixed.blocks]  # type: ignore[union-attr]
    assert kinds == [NoPosition, RoPE, NoPosition, RoPE]
    (learned,) = mixed.embedding_positions
    assert isinstance(learned, Learned) and learned.weight.shape == (64, 16) and learned.num_params() == 64 * 16
    everything = model_of(layers=4, position="learned sinusoidal none rope", context_length=64)
    assert [type(p) for p in everything.embedding_positions] == [Learned, Sinusoidal]


@pytest.mark.parametrize("width", [6, 7, 1])
def test_sinusoids_are_the_papers(width: int) -> None:
    config = ModelConfig(context_length=40, d_model=width, heads=1, position="sinusoidal")
    layer = Sinusoidal(config, 0, 0).double()
    expected = np.empty((40, width))
    for position in range(40):
        for dim in range(width):
            angle = position / 10_000 ** ((dim - dim % 2) / width)
            expected[position, dim] = math.cos(angle) if dim % 2 else math.sin(angle)
    np.testing.assert_allclose(layer.table.numpy(), expected, rtol=0, atol=1e-13)
    x = drawn(2, 9, width)
    np.testing.assert_allclose(layer.embed(x, None).numpy(), x.numpy() + expected[:9], atol=1e-13)
    places = torch.tensor([[3] * 9, [*range(30, 39)]])
    np.testing.assert_allclose(layer.embed(x, places).numpy(), x.numpy() + expected[places], atol=1e-13)
    assert layer(x, None) is x and layer.slopes is None and layer.num_params() == 0


@pytest.mark.parametrize("kernels", ["fast", "reference"])
@pytest.mark.parametrize("position", ["learned", "sinusoidal"])
def test_what_is_added_is_added_to_the_scaled_embedding(position: str, kernels: str) -> None:
    model = model_of(position=position, embedding_scale=3.0, context_length=20, kernels=kernels).double()
    added: Any = model.embedding_positions[0]
    table = added.weight if position == "learned" else added.table
    ids = torch.tensor([[1, 2, 3, 4], [5, 5, 5, 5]])
    places = torch.tensor([[0, 1, 0, 1], [7, 19, 0, 2]])
    rows = model.embedding.weight[ids]
    torch.testing.assert_close(model.embed(ids), 3 * rows + table[torch.arange(4)])
    torch.testing.assert_close(model.embed(ids, places), 3 * rows + table[places])


def test_no_position_changes_nothing() -> None:
    x = drawn(2, 5, 8)
    nothing = NoPosition(ModelConfig(), 0, 8)
    assert nothing(x, torch.arange(5)) is x and nothing.embed(x, None) is x and nothing.slopes is None
    with torch.no_grad():
        model = model_of(position="none").double()
        ids = torch.tensor([[1, 2, 3, 4]])
        torch.testing.assert_close(model(ids, positions=torch.tensor([[9, 3, 0, 5]])), model(ids))


def test_alibi_slopes() -> None:
    """The paper's for 8 heads, 1/2 to 1/256; transformers' (BLOOM) for any number."""
    assert slopes_of(8).tolist() == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    assert slopes_of(16).tolist() == pytest.approx([2 ** (-n / 2) for n in range(1, 17)])
    assert slopes_of(6).tolist() == pytest.approx([1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8])
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    for heads in range(1, 33):
        theirs = bloom.build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
        torch.testing.assert_close(slopes_of(heads).float(), theirs, msg=str(heads))


@pytest.mark.parametrize("kernel", ["reference", "sdpa", "blocked"])
@pytest.mark.parametrize("restart", [False, True])
def test_alibi_in_attention_by_brute_force(kernel: str, restart: bool) -> None:
    model = model_of(
        position="alibi", heads=6, head_dim=4, kv_heads=3, layers=1, attention_kernel=kernel, context_length=16
    ).double()
    attention: Any = model.blocks[0].attention
    assert isinstance(attention.position, ALiBi)
    length = 9
    places = [0, 1, 2, 3, 0, 1, 2, 3, 4] if restart else list(range(length))
    documents = [0] * 4 + [1] * 5 if restart else [0] * length
    ids = torch.zeros(2, length, dtype=torch.long)
    context = model.context(
        ids,
        torch.tensor([places, places]) if restart else None,
        torch.tensor([documents, documents]) if restart else None,
    )
    x = drawn(2, length, 16)
    q, k, v = (x @ attention.qkv.weight.detach().T).split([24, 12, 12], dim=-1)
    slopes = [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
    mixed = np.zeros((2, length, 24))
    for row in range(2):
        for head in range(6):
            own, shared = slice(4 * head, 4 * head + 4), slice(4 * (head // 2), 4 * (head // 2) + 4)
            for i in range(length):
                readable = [j for j in range(i + 1) if documents[i] == documents[j]]
                scores = [float(q[row, i, own] @ k[row, j, shared]) / 2 - slopes[head] * (i - j) for j in readable]
                weights = np.exp(scores) / np.exp(scores).sum()
                for weight, j in zip(weights, readable, strict=True):
                    mixed[row, i, own] += weight * v[row, j, shared].numpy()
    expected = mixed @ attention.output.weight.detach().numpy().T
    np.testing.assert_allclose(attention(x, context).detach().numpy(), expected, rtol=1e-9, atol=1e-9)
    plain = attention(x, Context())
    assert torch.allclose(plain, attention(x, context)) != restart, "the plain triangle has the same distances"


def test_every_position_has_every_hook() -> None:
    x = drawn(2, 3, 4, 8)
    for name in ("rope", "alibi", "sinusoidal", "learned", "none"):
        config = ModelConfig(d_model=8, heads=1, position=name, context_length=16)
        at_layer = Positions(config).at(0, 8)
        assert isinstance(at_layer, Position)
        assert (at_layer.slopes is not None) == (name == "alibi")
        assert (at_layer(x, None) is x) == (name != "rope")
        assert bool(Positions(config).at_embedding()) == (name in ("sinusoidal", "learned"))


def test_angles_are_shared_within_a_pass_and_never_between_passes() -> None:
    config = ModelConfig(vocab_size=10, d_model=16, heads=2, layers=3, context_length=32)
    model = Transformer(config, seed=0)
    asked: list[int] = []
    rope = model.blocks[0].attention.position
    angles = rope.angles
    rope.angles = lambda length, positions: asked.append(length) or angles(length, positions)
    ids, positions = torch.randint(0, 10, (2, 5)), torch.arange(5)
    first = model(ids, positions)
    assert asked == [5]  # three layers, queries and keys
    positions += 3  # in place
    moved = model(ids, positions + torch.tensor([0, 0, 0, 0, 9]))
    assert asked == [5, 5] and not moved.equal(first)
    assert model(ids, positions - 3).equal(first)
    assert model.double()(ids, positions - 3).dtype == torch.float64
    with torch.inference_mode():
        model(ids, positions)
    model(ids, positions).sum().backward()


def test_a_memo_gives_what_was_computed() -> None:
    config = ModelConfig(vocab_size=10, d_model=16, heads=2, layers=1, context_length=32)
    rope, memo = RoPE(config, 0, 8), {}
    x, positions = torch.randn(2, 3, 5, 8), torch.arange(5).expand(2, 5)
    assert rope(x, positions, memo).equal(rope(x, positions)) and rope(x, positions, memo).equal(rope(x, positions))
    assert rope(x.bfloat16(), positions, memo).equal(rope(x.bfloat16(), positions))
    assert rope(x, positions + 1, memo).equal(rope(x, positions + 1))
    assert len(memo) == 3
