"""A whole evaluation against a plain loop: every token once, each with the context that window and stride give it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from scratchlm.config import CorpusConfig, DataConfig, EvaluateConfig
from scratchlm.data import Tokens, open_corpus, prepare
from scratchlm.data.loader import evaluation_windows
from scratchlm.data.tokens import TokenData
from scratchlm.errors import UserError
from scratchlm.evaluate.compressors import CompressorResult
from scratchlm.evaluate.evaluation import count_batches, evaluate_tokens, tokenise
from scratchlm.model import ModelConfig, Transformer
from scratchlm.tokenizer import Tokenizer

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


def documents(*lengths: int) -> list[np.ndarray]:
    """Documents of random ids, each with the separator at its end."""
    random = np.random.default_rng(1)
    return [np.append(random.integers(1, 20, length - 1, dtype=np.uint16), SEPARATOR) for length in lengths]


def as_split(*pieces: np.ndarray) -> Tokens:
    return Tokens([np.concatenate(pieces)], separator_id=SEPARATOR, documents=len(pieces), bytes=TEXT_BYTES)


def test_packed_documents_with_boundaries_are_as_if_alone():
    # No document crosses the end of a window of 8, so that none loses context by packing.
    pieces = documents(3, 5, 8, 1, 1, 6, 2, 4)
    net = model()

    def nats(tokens: Tokens, boundaries: bool) -> float:
        found = evaluate_tokens(
            net,
            tokens,
            EvaluateConfig(batch_size=3),
            precision="fp32",
            document_boundaries=boundaries,
            show_progress=False,
        )
        assert found.tokens == len(tokens)
        return found.loss * found.tokens

    alone = math.fsum(nats(as_split(piece), False) for piece in pieces)
    assert nats(as_split(*pieces), True) == pytest.approx(alone, rel=1e-6)
    assert nats(as_split(*pieces), False) != pytest.approx(alone, rel=1e-3)  # the test can tell


@pytest.mark.parametrize("separator", ["<|pad|>", "<|endoftext|>"])
@pytest.mark.parametrize("boundaries", [False, True])
def test_text_as_documents_has_the_figure_of_prepared_shards(tmp_path, separator, boundaries):
    tokenizer = Tokenizer({i: bytes([i]) for i in range(256)}, [], special_tokens=["<|pad|>", "<|endoftext|>"])
    separator_id = tokenizer.special_tokens[separator]
    texts = ["a first text, é", "", "b", "日本 and much more of it" * 3, "x" * 70]
    (tmp_path / "train.txt").write_text("training text", encoding="utf-8")
    (tmp_path / "held.txt").write_text("<|endoftext|>".join(texts), encoding="utf-8")
    held, train = str(tmp_path / "held.txt"), str(tmp_path / "train.txt")
    fields = {"vocab_size": 258, "context_length": 16, "d_model": 16, "layers": 1, "heads": 2, "d_ff": 16}
    net = Transformer(ModelConfig(**fields), seed=0)
    options = {"precision": "fp32", "document_boundaries": boundaries, "show_progress": False}

    corpus = open_corpus(CorpusConfig(kind="text", paths=[train], validation_paths=[held]))
    config = DataConfig(workers=1, shard_tokens=50)
    prepare(corpus, tokenizer, tmp_path / "data", config, separator_id=separator_id, show_progress=False)
    shards = TokenData.open(tmp_path / "data", tokenizer).split("validation")
    expected = evaluate_tokens(net, shards, EvaluateConfig(stride=5), **options)

    loose = open_corpus(CorpusConfig(kind="text", paths=[held], validation_fraction=0.0))
    with tokenise(loose, tokenizer, show_progress=False, separator_id=separator_id) as tokens:
        assert tokens.read(0, len(tokens)).tolist() == shards.read(0, len(shards)).tolist()
        found = evaluate_tokens(net, tokens, EvaluateConfig(stride=5), **options)
    same = ("loss", "perplexity", "bits_per_byte", "bits_per_token", "tokens", "text_bytes", "documents")
    for name in same:
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-6), name
    with tokenise(loose, tokenizer, show_progress=False) as tokens:  # by default the first special token
        assert tokens.separator_id == tokenizer.special_tokens["<|pad|>"]


def test_a_separator_has_to_be_an_id(tmp_path):
    (tmp_path / "held.txt").write_text("text", encoding="utf-8")
    corpus = open_corpus(CorpusConfig(kind="text", paths=[str(tmp_path / "held.txt")], validation_fraction=0.0))
    bare = Tokenizer({i: bytes([i]) for i in range(256)}, [])
    with pytest.raises(UserError, match="the separator 256 is no id"), tokenise(corpus, bare, separator_id=256):
        pass
    with pytest.raises(UserError, match="no special token to end documents with"), tokenise(corpus, bare):
        pass


@pytest.mark.parametrize("length", [1, 7, 8, 9, 50])
@pytest.mark.parametrize("stride", [None, 1, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_batches_are_counted(length, stride, batch_size):
    windows = evaluation_windows(stream(length), 8, stride, batch_size)
    assert count_batches(length, 8, stride, batch_size) == len(list(windows))
