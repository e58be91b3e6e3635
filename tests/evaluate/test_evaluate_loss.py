"""Loss, perplexity, bits per byte: against float64 by hand, at the edges, in bounded memory."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from scratchlm.data import Batch
from scratchlm.errors import UserError
from scratchlm.evaluate.compressors import CompressorResult
from scratchlm.evaluate.metrics import Evaluation, LossSum, bits_per_byte, evaluate_loss, perplexity
from scratchlm.model import ModelConfig, Transformer


def batch(inputs: Tensor, targets: Tensor) -> SimpleNamespace:
    return SimpleNamespace(inputs=inputs, targets=targets)


def random_batches(count: int, shape: tuple[int, int], vocab: int, ignored: float = 0.3) -> list[SimpleNamespace]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        inputs = torch.randint(vocab, shape, generator=generator)
        targets = torch.randint(vocab, shape, generator=generator)
        targets[torch.rand(shape, generator=generator) < ignored] = -100
        made.append(batch(inputs, targets))
    return made


def brute_force(table: np.ndarray, batches: list[SimpleNamespace]) -> tuple[float, int]:
    """Token by token in float64: −ln(e^logit / Σ e^logits)."""
    nats, tokens = [], 0
    for one in batches:
        for context, target in zip(one.inputs.flatten().tolist(), one.targets.flatten().tolist(), strict=True):
            if target != -100:
                logits = table[context].astype(np.float64)
                nats.append(math.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[target])
                tokens += 1
    return math.fsum(nats), tokens


@settings(deadline=None, max_examples=25)
@given(
    count=st.integers(0, 3),
    rows=st.integers(0, 3),
    length=st.integers(0, 9),
    vocab=st.integers(1, 40),
    chunk=st.integers(1, 500),
)
def test_equals_brute_force_whatever_the_chunk(count: int, rows: int, length: int, vocab: int, chunk: int) -> None:
    table = nn.Embedding(vocab, vocab)
    batches = random_batches(count, (rows, length), vocab)
    summed = evaluate_loss(table, batches, device="cpu", chunk_elements=chunk)
    nats, tokens = brute_force(table.weight.detach().numpy(), batches)
    assert summed.tokens == tokens
    assert summed.nats == pytest.approx(nats, rel=1e-6, abs=1e-6)


def test_float64_logits_stay_float64() -> None:
    table = nn.Embedding(50, 50).double()
    batches = random_batches(2, (4, 16), 50)
    nats, _ = brute_force(table.weight.detach().numpy(), batches)
    assert evaluate_loss(table, batches, device="cpu").nats == pytest.approx(nats, rel=1e-14)


def test_sum_is_float64() -> None:
    # After 40 · 2^20 nats the steps of a float32 are 4 wide: it could not take another 1.31 in.
    def model(inputs: Tensor) -> Tensor:
        return torch.stack([torch.zeros(inputs.shape), inputs.float()], dim=-1)

    zeros = torch.zeros(1, 1024, dtype=torch.int64)
    batches = [batch(zeros + 1024, zeros)] * 40 + [batch(zeros[:, :1] + 1, zeros[:, :1])]
    expected = 40 * 2**20 + math.log(1 + math.e)
    assert evaluate_loss(model, batches, device="cpu").nats == pytest.approx(expected, abs=1e-6)


def test_bfloat16_logits_are_widened_first() -> None:
    table = nn.Embedding(1000, 1000)
    batches = random_batches(2, (4, 32), 1000)
    summed = evaluate_loss(lambda inputs: table(inputs).bfloat16(), batches, device="cpu")
    expected = brute_force(table.weight.detach().bfloat16().float().numpy(), batches)[0]
    assert summed.nats == pytest.approx(expected, rel=1e-6)


def test_autocast_runs_the_model_in_bfloat16() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 64))
    batches = random_batches(2, (4, 32), 64)
    seen = []
    model[1].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    exact = evaluate_loss(model, batches, device="cpu").nats
    rough = evaluate_loss(model, batches, device="cpu", autocast=torch.bfloat16).nats
    assert set(seen[:2]) == {torch.float32} and set(seen[2:]) == {torch.bfloat16}
    assert rough != exact and rough == pytest.approx(exact, rel=1e-2)


def test_positions_and_documents_reach_a_model_that_is_given_them() -> None:
    seen: list[tuple] = []

    def model(inputs: Tensor, positions: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        seen.append((positions, documents))
        return torch.zeros(*inputs.shape, 5)

    ids = torch.zeros(2, 3, dtype=torch.int64)
    for given_positions, given_documents in ((ids + 1, ids + 2), (ids, None), (None, ids), (None, None)):
        made = Batch(ids, ids, given_positions, given_documents)
        assert evaluate_loss(model, [made], device="cpu").tokens == 6
        positions, documents = seen.pop()
        for sent, found in ((given_positions, positions), (given_documents, documents)):
            assert found is None if sent is None else torch.equal(found, sent)
    evaluate_loss(lambda inputs: torch.zeros(*inputs.shape, 5), [Batch(ids, ids)], device="cpu")  # plain callables


def test_a_bar_within_a_bar_leaves_nothing_behind(capfd: pytest.CaptureFixture[str]) -> None:
    batches = random_batches(3, (2, 4), 5)
    silent = evaluate_loss(nn.Embedding(5, 5), batches, device="cpu")
    assert silent.tokens and capfd.readouterr().err == ""
    evaluate_loss(nn.Embedding(5, 5), iter(batches), device="cpu", show_progress=True, total=3)
    shown = capfd.readouterr().err
    assert "validate" in shown and "/3" in shown
    assert shown.rsplit("\r", 2)[-2].strip() == "" and not shown.endswith("\n")
    evaluate_loss(nn.Embedding(5, 5), batches, device="cpu", show_progress=True)
    assert "/3" in capfd.readouterr().err


def test_nothing_to_evaluate() -> None:
    none = evaluate_loss(nn.Embedding(3, 3), [], device="cpu")
    ignored = evaluate_loss(
        nn.Embedding(3, 3), [batch(torch.zeros(2, 2, dtype=torch.int64), torch.full((2, 2), -100))], device="cpu"
    )
    assert none == ignored == LossSum(nats=0.0, tokens=0)
    assert math.isnan(none.loss) and math.isnan(none.perplexity) and math.isnan(none.bits_per_byte(0))


def test_uniform_model_pays_log_vocab() -> None:
    batches = random_batches(3, (2, 8), 256, ignored=0)
    summed = evaluate_loss(lambda inputs: torch.zeros(*inputs.shape, 256), batches, device="cpu")
    assert summed.loss == pytest.approx(math.log(256), rel=1e-7)
    assert summed.perplexity == pytest.approx(256, rel=1e-6)
    assert summed.bits_per_byte(48) == pytest.approx(8, rel=1e-7)  # one byte per token: 8 bits per byte


def test_module_is_in_evaluation_mode_meanwhile_and_put_back() -> None:
    class Model(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            assert not self.training and not torch.is_grad_enabled()
            return F.one_hot(inputs, 5).float()

    model = Model()
    for training in (True, False):
        model.train(training)
        evaluate_loss(model, random_batches(1, (2, 3), 5), device="cpu")
        assert model.training is training
    model.train()
    with pytest.raises(ValueError, match="do not fit"):
        evaluate_loss(
            model, [batch(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int64))], device="cpu"
        )
    assert model.training


def test_non_finite_losses_are_reported_not_hidden() -> None:
    batches = random_batches(1, (2, 4), 5, ignored=0)
    assert math.isnan(evaluate_loss(lambda i: torch.full((*i.shape, 5), math.nan), batches, device="cpu").loss)


def test_logits_are_widened_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    original = F.cross_entropy

    def spy(logits: Tensor, *rest: object, **more: object) -> Tensor:
        sizes.append(logits.numel())
        return original(logits, *rest, **more)

    monkeypatch.setattr(F, "cross_entropy", spy)
    evaluate_loss(nn.Embedding(10, 10), random_batches(1, (4, 25), 10), device="cpu", chunk_elements=305)
    assert sizes == [300, 300, 300, 100]


def test_sums_add_up() -> None:
    batches = random_batches(4, (2, 8), 20)
    model = nn.Embedding(20, 20)
    whole = evaluate_loss(model, batches, device="cpu")
    parts = evaluate_loss(model, batches[:1], device="cpu") + evaluate_loss(model, batches[1:], device="cpu")
    assert parts.tokens == whole.tokens and parts.nats == pytest.approx(whole.nats, rel=1e-12)


def test_perplexity_overflows_to_infinity() -> None:
    assert perplexity(0.0) == 1.0
    assert (
        math.isfinite(perplexity(709.7))
        and perplexity(709.8) == perplexity(1e6) == perplexity(math.inf) == math.inf
    )
    assert math.isnan(perplexity(math.nan))


def test_bits_per_byte_by_hand() -> None:
    # 100 tokens at 2 ln 2 nats are 200 bits; on 50 bytes that is 4 bits per byte.
    assert bits_per_byte(100 * 2 * math.log(2), 50) == pytest.approx(4.0, rel=1e-15)
    assert math.isnan(bits_per_byte(1.0, 0))


def make(nats: float = 340.0, tokens: int = 100, text_bytes: int = 300, **more: object) -> Evaluation:
    fields = {"documents": 3, "context_length": 64, "stride": 32, "seconds": 0.5} | more
    return Evaluation.from_sum(LossSum(nats=nats, tokens=tokens), text_bytes=text_bytes, **fields)


def test_evaluation_derives_every_figure() -> None:
    made = make()
    assert made.loss == 3.4 and made.perplexity == pytest.approx(math.exp(3.4))
    assert made.bits_per_token == pytest.approx(3.4 / math.log(2))
    assert made.bits_per_byte == pytest.approx(made.bits_per_token * 100 / 300)


def test_evaluation_file_round_trip(tmp_path) -> None:
    made = make(compressors={"gzip -9": CompressorResult(bytes=120, bits_per_byte=3.2, seconds=0.01)})
    made.save(tmp_path / "evaluation.json")
    assert Evaluation.load(tmp_path / "evaluation.json") == made
    assert json.loads((tmp_path / "evaluation.json").read_text())["compressors"]["gzip -9"]["bytes"] == 120


def test_evaluation_file_holds_non_finite_figures_as_strict_json(tmp_path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    make(nats=1e6, text_bytes=0).save(tmp_path / "e.json")
    json.loads((tmp_path / "e.json").read_text(), parse_constant=refuse)
    loaded = Evaluation.load(tmp_path / "e.json")
    assert loaded.perplexity == math.inf and math.isnan(loaded.bits_per_byte) and loaded.loss == 1e4


def test_broken_evaluation_file_is_one_line(tmp_path) -> None:
    (tmp_path / "e.json").write_text('{"loss": 1}')
    with pytest.raises(UserError, match="perplexity"):
        Evaluation.load(tmp_path / "e.json")
    with pytest.raises(UserError, match="does not exist"):
        Evaluation.load(tmp_path / "none.json")


def test_a_prefix_does_not_judge_tokens_it_has_seen() -> None:
    """Under mask = prefix_lm every token is judged by what came before it: the causal model's loss, weights being equal."""
    fields = {"vocab_size": 20, "context_length": 12, "d_model": 16, "heads": 2, "layers": 2, "d_ff": 16}
    prefix = Transformer(ModelConfig(**fields, mask="prefix_lm", prefix_length=6), seed=0)
    causal = Transformer(ModelConfig(**fields), seed=0)
    ids = torch.randint(20, (3, 13), generator=torch.Generator().manual_seed(0))
    batches = [batch(ids[:, :-1], ids[:, 1:])]
    assert not torch.allclose(prefix(ids[:, :-1]), causal(ids[:, :-1]))
    seen = [evaluate_loss(model, batches, device="cpu").nats for model in (prefix, causal)]
    assert seen[0] == pytest.approx(seen[1], rel=1e-6)
