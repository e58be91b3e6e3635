"""The rules of thumb: every proposal keeps them and has the parameters it says."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scratchlm.errors import UserError
from scratchlm.model import ModelConfig, Transformer, choices, presets, shape

exponents = st.floats(6, 10)


@settings(max_examples=40, deadline=None)
@given(exponents, st.sampled_from(choices.FEEDFORWARD.names))
def test_a_proposal_keeps_the_rules_from_a_million_to_ten_billion(exponent: float, feedforward: str) -> None:
    wish = round(10**exponent)
    config = shape.propose(wish, feedforward=feedforward)
    found, ratio = shape.count(config), choices.FEEDFORWARD.get(feedforward).default_ratio
    assert abs(found.total / wish - 1) <= shape.TOLERANCE
    assert found.embeddings <= wish * shape.EMBEDDING_SHARE
    proportions = shape.ratios(config)
    assert 50 <= proportions.aspect <= 200
    assert proportions.heads == 1 and config.resolved_head_dim in (32, 64, 128)
    assert abs(proportions.d_ff / ratio - 1) <= 0.4
    step = 32 if config.d_model < 512 else 64 if config.d_model < 1024 else 128
    assert config.d_model % step == config.resolved_d_ff % step == 0
    assert config.vocab_size in shape.VOCABULARIES


@settings(max_examples=30, deadline=None)
@given(
    st.floats(7.5, 10),
    st.floats(40, 250),
    st.sampled_from([32, 64, 128]),
    st.integers(256, 50_000),
    st.sampled_from([None, 1, 2, 4]),
    st.integers(1, 10_000),
)
def test_what_is_asked_for_is_kept(
    exponent: float, aspect: float, head_dim: int, vocab_size: int, kv_heads: int | None, context: int
) -> None:
    wish = round(10**exponent)
    config = shape.propose(
        wish, aspect=aspect, head_dim=head_dim, vocab_size=vocab_size, kv_heads=kv_heads, context_length=context
    )
    assert (config.resolved_head_dim, config.vocab_size, config.context_length) == (head_dim, vocab_size, context)
    assert config.kv_heads == kv_heads and config.heads % (kv_heads or 1) == 0
    assert abs(shape.count(config).total / wish - 1) <= shape.TOLERANCE
    if head_dim * (kv_heads or 1) <= 128:  # else d_model has few values to choose among
        assert aspect / 2 <= shape.ratios(config).aspect <= aspect * 2


def test_a_wider_aspect_ratio_is_wider() -> None:
    narrow, wide = (shape.propose(10**8, aspect=aspect) for aspect in (30, 200))
    assert narrow.layers > 2 * wide.layers and narrow.d_model < wide.d_model


def test_key_value_heads_save_parameters_for_the_rest() -> None:
    grouped = shape.propose(7 * 10**9, kv_heads=8)
    assert grouped.kv_heads == 8 and grouped.resolved_head_dim == 128 and not grouped.tied_embeddings
    assert shape.propose(10**9).tied_embeddings


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"params": 10**6, "vocab_size": 10**5}, r"no model within 5 % of 1,000,000 .*the nearest has [\d,]+"),
        ({"params": 10**6, "head_dim": 1024}, r"no model within 5 %.*--head-dim"),
        ({"params": 10**8, "head_dim": 63}, r"--head-dim 63 is odd"),
        ({"params": 10**8, "feedforward": "swigul"}, r"did you mean swiglu\?"),
    ],
)
def test_what_cannot_be_had_is_said_in_a_line(asked: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        shape.propose(**asked)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "number"),
    [("125M", 125_000_000), ("1.3B", 1_300_000_000), ("7e9", 7 * 10**9), ("350_000_000", 350_000_000), ("1000k", 10**6),
     ("1t", 10**12), (" 2 b ", 2 * 10**9), ("124,439,808", 124_439_808)],
)  # fmt: skip
def test_numbers_of_parameters(text: str, number: int) -> None:
    assert shape.parse_params(text) == number


@pytest.mark.parametrize(
    "text",
    ["", "x", "-5M", "1e400", "12MB", "1.2.3M", "nan", "inf", "0", "999k", "1001B", "1e99B", "M", "١M", "\n"],
)
def test_what_is_no_number_of_parameters(text: str) -> None:
    with pytest.raises(UserError, match=r"--params") as caught:
        shape.parse_params(text)
    assert "\n" not in str(caught.value)


def test_ratios_of_known_models() -> None:
    """By hand from the published widths; of a mixture, the experts a token meets count together."""
    expected = {
        "gpt2-xl": (1600 / 48, 4, 1),
        "llama-2-7b": (128, 11008 / 4096, 1),
        "qwen3-0.6b": (1024 / 28, 3, 2),
        "mixtral-8x7b": (128, 2 * 14336 / 4096, 1),
        "deepseek-v3-671b": (7168 / 61, 9 * 2048 / 7168, 128 * 128 / 7168),
    }
    for name, (aspect, d_ff, heads) in expected.items():
        found = shape.ratios(presets.load(name))
        assert (found.aspect, found.d_ff, found.heads) == pytest.approx((aspect, d_ff, heads)), name
    assert set(shape.KNOWN) <= set(presets.names())
    mixture = {"experts": 8, "top_k": 2, "shared": 3, "d_shared": 100, "d_expert": 50}
    assert shape.ratios(ModelConfig(d_model=64, heads=4, moe=mixture)).d_ff == (2 * 50 + 100) / 64


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head_bias", [False, True])
def test_what_every_token_of_the_vocabulary_costs(tied: bool, head_bias: bool) -> None:
    fields: dict[str, Any] = {
        "d_model": 16,
        "heads": 2,
        "layers": 1,
        "head_bias": head_bias,
        "tied_embeddings": tied,
    }
    config = ModelConfig(vocab_size=9, **fields)
    held = sum(p.numel() for p in Transformer(config).parameters())
    counted = shape.count(config)
    assert counted.total == held and counted.active == held
    assert counted.embeddings == 9 * shape.params_per_token(config) == 9 * (16 * (1 if tied else 2) + head_bias)
    unset = shape.count(ModelConfig(**fields))
    assert unset.embeddings == 0 and unset.body == counted.body
