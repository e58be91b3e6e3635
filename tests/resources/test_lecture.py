"""The lecture's exercises: the page is what the code writes, and the code's figures are those worked out by hand."""

from __future__ import annotations

import pytest

from scratchlm.model import presets
from scratchlm.resources import lecture


def test_gpt2_by_hand() -> None:
    """Per layer and token: q, k, v and output 8 d², the feed-forward 16 d², scores and mixture 4 n d; the head 2 V d."""
    for name in lecture.GPT2:
        config = presets.load(name)
        d, n, layers, vocab = config.d_model, 1024, config.layers, config.vocab_size
        total, parts = lecture.shares(name, n)
        assert total == layers * (24 * d**2 + 4 * n * d) + 2 * vocab * d
        assert parts["feed-forward"] * total == pytest.approx(layers * 16 * d**2)
        assert parts["scores, states"] * total == pytest.approx(layers * 4 * n * d)
        assert sum(parts.values()) == pytest.approx(1)
    short, long = (lecture.shares("gpt2-xl", n)[0] * n for n in (1024, 16_384))
    assert 38 < long / short < 39  # sixteen times as long, 38 times the work


def test_published_figures_are_near() -> None:
    for one in lecture.PUBLISHED:
        if one.flops is not None:
            model = lecture.hollow(presets.load(one.preset))
            causal = 3 * (model.flops_per_token(one.length) + model.flops_per_token(0)) / 2
            assert causal * one.tokens == pytest.approx(one.flops, rel=0.05), one.preset


def test_the_page_is_up_to_date() -> None:
    if not lecture.PAGE.exists():
        pytest.skip("docs are not beside the package")
    text = lecture.PAGE.read_text(encoding="utf-8")
    for part in (lecture.sizes(), lecture.six_n(), lecture.published()):
        assert part in text, "python -m scratchlm.resources.lecture writes it anew"


@pytest.mark.slow
def test_the_memory_of_gpt2_xl_is_up_to_date() -> None:
    """16 bytes per parameter are the weights, gradients and moments; what a sequence adds are its activations."""
    assert lecture.memory() in lecture.PAGE.read_text(encoding="utf-8")
    line, step = lecture.adamw_memory("gpt2-xl", 1024, "fp32")
    params = sum(step.params.values())
    assert params == 1_557_611_200
    assert line.fixed > 12 * params  # gradients are not there yet while activations are at their most
    layers, d, n = 48, 1600, 1024
    by_hand = (
        4 * layers * n * d * 16
    )  # norms 2, qkv 3, attention 1, residuals 2, feed-forward 4 + 4: 16 d numbers per token
    assert 0.8 * by_hand < line.per_sequence < 1.6 * by_hand
