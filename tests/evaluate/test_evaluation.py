"""A whole evaluation against a plain loop: every token once, each with the context that window and stride give it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from scratchlm.config import EvaluateConfig
from scratchlm.data import Tokens
from scratchlm.errors import UserError
from scratchlm.evaluate.compressors import CompressorResult
from scratchlm.evaluate.evaluation import evaluate_tokens
from scratchlm.model import ModelConfig, Transformer

SEPARATOR = 0
TEXT_BYTES = 77


def model() -> Transformer:
    fields = {"vocab_size": 20, "context_length": 8, "d_model": 16, "layers": 1, "heads": 2, "d_ff": 16}
    return Transformer(ModelConfig(**fields), seed=0)


def stream(length: int) -> Tokens:
    ids = np.random.default_rng(0).integers(0, 20, length, dtype=np.uint16)
    return Tokens([ids[:10], ids[10:]], separator_id=SEPARATOR, documents=3, bytes=TEXT_BYTES)


@torch.no_grad()
def brute_force(net: Transformer, tokens: Tokens, context: int, stride: int) -> float:
    """Nats of each token, one forward pass per token, log-softmax in float64."""
    ids = [SEPARATOR, *tokens.read(0, len(tokens)).tolist()]
    nats = []
    for target in range(1, len(ids)):
        # Window k reads ids[k·stride : k·stride + context]; the token belongs to the first window that predicts it.
        window = 0 if target <= context else -(-(target - context) // stride)
        logits = net(torch.tensor([ids[window * stride : target]]))[0, -1].double()
        nats.append(-float(logits.log_softmax(-1)[ids[target]]))
    return math.fsum(nats)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 50])
@pytest.mark.parametrize(("context", "stride"), [(None, None), (8, 3), (5, 1), (4, 4), (6, 6), (8, 1)])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_equals_brute_force(length, context, stride, batch_size):
    net, tokens = model(), stream(length)
    config = EvaluateConfig(batch_size=batch_size, context_length=context, stride=stride)
    found = evaluate_tokens(net, tokens, config, precision="fp32", show_progress=False)
    window = context or 8
    expected = brute_force(net, tokens, window, stride or window)
    assert found.tokens == length
    assert found.loss == pytest.approx(expected / length, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(expected / length), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(expected / math.log(2) / TEXT_BYTES, rel=1e-5)
    assert (found.context_length, found.stride) == (window, stride or window)
    assert (found.documents, found.text_bytes) == (3, TEXT_BYTES)


def test_bfloat16_is_near_and_not_the_same():
    net, tokens = model(), stream(200)
    losses = {
        precision: evaluate_tokens(net, tokens, EvaluateConfig(), precision=precision, show_progress=False).loss
        for precision in ("fp32", "bf16")
    }
    assert losses["bf16"] != losses["fp32"] and losses["bf16"] == pytest.approx(losses["fp32"], rel=0.01)


def test_compressors_are_kept():
    result = CompressorResult(bytes=5, bits_per_byte=1.0, seconds=0.0)
    found = evaluate_tokens(
        model(), stream(30), EvaluateConfig(), compressors={"gzip -9": result}, show_progress=False
    )
    assert found.compressors == {"gzip -9": result}
    assert found.seconds > 0


def test_progress_counts_the_batches(capfd):
    evaluate_tokens(model(), stream(50), EvaluateConfig(batch_size=4, stride=3))  # 15 windows: 1 + ceil(42 / 3)
    assert "4/4" in capfd.readouterr().err


def test_what_makes_no_sense():
    with pytest.raises(UserError, match="stride = 9 must be between 1 and the context length 8"):
        evaluate_tokens(model(), stream(30), EvaluateConfig(stride=9), show_progress=False)
    with pytest.raises(UserError, match=r"evaluate.context_length = 9 is longer than the model's context of 8"):
        evaluate_tokens(model(), stream(30), EvaluateConfig(context_length=9), show_progress=False)
    nothing = Tokens([np.empty(0, dtype=np.uint16)], separator_id=0, documents=0, bytes=0)
    with pytest.raises(UserError, match="has 0 tokens"):
        evaluate_tokens(model(), nothing, EvaluateConfig(), show_progress=False)
