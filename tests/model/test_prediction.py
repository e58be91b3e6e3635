"""Multi-token prediction against DeepSeek-V3's equations 21 to 25, with tokens cut out instead of rolled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_variants import VARIANTS, random_ids, reference_of
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from scratchlm.kernels.cross_entropy import IGNORE_INDEX
from scratchlm.model import ModelConfig, Transformer
from scratchlm.train.loss import NextTokenLoss

VOCAB, LENGTH, WIDTH = 17, 9, 8


@dataclass
class Batch:
    inputs: Tensor
    targets: Tensor
    positions: Tensor | None = None
    documents: Tensor | None = None


def model_of(seed: int = 0, **fields: Any) -> Transformer:
    """In float64, with every parameter moved from where it starts."""
    defaults: dict[str, Any] = {
        "vocab_size": VOCAB, "context_length": 16, "d_model": WIDTH, "layers": 2, "heads": 2, "d_ff": 12,
        "mtp_depth": 3, "init_embedding_std": 0.5,
    }  # fmt: skip
    model = Transformer(ModelConfig(**{**defaults, **fields}), seed=seed).double()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def tokens(rows: int = 2, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (rows, length + 1), generator=torch.Generator().manual_seed(seed))


def batch_of(ids: Tensor) -> Batch:
    return Batch(ids[:, :-1], ids[:, 1:].clone())


def rms(x: Tensor, gain: Tensor) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * gain


def nats_of(model: Transformer, hidden: Tensor, asked: Tensor, z_loss: float = 0.0) -> Tensor:
    config = model.config
    logits = (
        hidden @ model.head.weight.T + (0 if model.head.bias is None else model.head.bias)
    ) * config.logit_scale
    if config.logit_soft_cap is not None:
        logits = config.logit_soft_cap * torch.tanh(logits / config.logit_soft_cap)
    logits = logits.flatten(0, -2)
    normaliser = logits.exp().sum(dim=-1).log()
    counted = (asked.flatten() != IGNORE_INDEX).double()
    return (
        F.cross_entropy(logits, asked.flatten(), reduction="sum", ignore_index=IGNORE_INDEX)
        + z_loss * (normaliser.square() * counted).sum()
    )


def by_hand(
    model: Transformer, ids: Tensor, targets: Tensor, weight: float, z_loss: float = 0.0
) -> tuple[Tensor, list[Tensor]]:
    """Objective, and the hidden states of every depth (eq. 21 and 22), for one document per row.

    Paper's depth k = 1 … D: at place i the hidden state of depth k − 1 meets the embedding of token i + k, and token
    i + k + 1 is asked for; i runs over the places where both are in the row.
    """
    length = targets.shape[-1]
    hidden = model.hidden(ids[:, :-1])
    total, states = nats_of(model, hidden, targets, z_loss), []
    depths: Any = model.predictions
    for k, module in enumerate(depths, start=1):
        kept = length - k
        beside = model.embedding.weight[ids[:, k : k + kept]] * model.embedding_scale
        both = [rms(hidden[:, :kept], module.hidden_norm.weight), rms(beside, module.token_norm.weight)]
        joined = torch.cat(both, dim=-1) @ module.project.weight.T
        hidden = module.block(joined, model.context(ids[:, :kept]))
        states.append(hidden)
        asked = targets[:, k : k + kept]
        total = total + weight / len(depths) * nats_of(model, rms(hidden, module.norm.weight), asked, z_loss)
    return total, states


def states_in(model: Transformer, batch: Batch) -> list[Tensor]:
    """Every depth's hidden states in the real objective."""
    seen: list[Tensor] = []
    hooks = [module.register_forward_hook(lambda m, given, out: seen.append(out)) for module in model.predictions]
    NextTokenLoss(model)(batch)
    for hook in hooks:
        hook.remove()
    return seen


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one depth": {"mtp_depth": 1},
    "tied": {"tied_embeddings": True},
    "tied, head bias": {"tied_embeddings": True, "head_bias": True, "logit_scale": 0.7},
    "scales and cap": {"embedding_scale": 2.5, "logit_scale": 0.6, "logit_soft_cap": 1.2},
    "parallel, window": {"block": "parallel", "mask": "sliding_window causal", "window": 3},
    "patterns": {"layers": 3, "attention": "gla mha mha", "position": "rope none none"},
    "alibi": {"position": "alibi"},
}


@pytest.mark.parametrize("kernel", ["reference", "chunked"])
@pytest.mark.parametrize("case", CASES)
def test_the_equations(case: str, kernel: str) -> None:
    model = model_of(**CASES[case])
    ids = tokens()
    expected, states = by_hand(model, ids, ids[:, 1:], weight=0.4, z_loss=0.01)
    ours = NextTokenLoss(model, kernel, z_loss=0.01, mtp_weight=0.4)(batch_of(ids))
    torch.testing.assert_close(ours, expected)
    for found, state in zip(states_in(model, batch_of(ids)), states, strict=True):
        torch.testing.assert_close(found[:, : state.shape[1]], state)
    gradients = []
    for objective in (ours, expected):
        model.zero_grad()
        objective.backward(retain_graph=True)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == dict(model.named_parameters()).keys()
    for name, gradient in gradients[0].items():
        assert gradient.any(), f"{name} does not learn"
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


def test_the_block_is_the_one_after_the_last_layer() -> None:
    model = model_of(layers=3, attention="mha gla mha", mask="causal causal sliding_window", mtp_depth=3)
    blocks: Any = [module.block for module in model.predictions]
    assert [type(block.attention).__name__ for block in blocks] == [
        "MultiHeadAttention", "GatedLinearAttention", "MultiHeadAttention"
    ]  # fmt: skip
    assert [blocks[0].attention.mask, blocks[2].attention.mask] == ["causal", "sliding_window"]
    for module in model.predictions:
        held = sum(p.numel() for p in module.parameters())
        assert module.num_params() == module.num_active_params() == held  # type: ignore[operator]
    first: Any = model.predictions[0]
    assert first.flops_per_token(5) == 2 * 2 * WIDTH * WIDTH + blocks[0].flops_per_token(5)
    assert model_of(mtp_depth=0).flops_per_token(5) == model_of(mtp_depth=2).flops_per_token(5)


def test_generation_leaves_them_out() -> None:
    with_them, without = model_of(mtp_depth=2), model_of(mtp_depth=0)
    without.load_state_dict(with_them.state_dict(), strict=False)
    ids = tokens()
    torch.testing.assert_close(with_them(ids), without(ids))


def test_the_weight_is_shared_by_the_depths() -> None:
    model = model_of()
    ids = tokens()
    values = [NextTokenLoss(model, mtp_weight=weight)(batch_of(ids)).item() for weight in (0.0, 1.0, 2.0)]
    assert values[0] == pytest.approx(nats_of(model, model.hidden(ids[:, :-1]), ids[:, 1:]).item())
    assert values[2] - values[1] == pytest.approx(values[1] - values[0]) and values[1] > values[0]


def test_a_depth_reads_no_further_than_its_token() -> None:
    """Hidden states of depth k = 0, 1, … at place i read exactly the tokens up to i + k + 1."""
    model = model_of()
    ids = tokens(rows=1)
    with torch.no_grad():
        before = states_in(model, batch_of(ids))
        for changed in range(LENGTH):
            other = ids.clone()
            other[0, changed] = (other[0, changed] + 1) % VOCAB
            after = states_in(model, batch_of(other))
            for k in range(3):
                for i in range(LENGTH - k - 1):
                    differs = not torch.allclose(before[k][0, i], after[k][0, i], rtol=1e-9, atol=1e-9)
                    assert differs == (changed <= i + k + 1), (changed, k, i)


def packed(parts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    documents = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor(parts))
    return tokens(rows=1), documents[None], torch.cat([torch.arange(part) for part in parts])[None]


@pytest.mark.parametrize("parts", [[4, 5], [1, 2, 6], [1] * 9, [9]])
@pytest.mark.parametrize("restart", [False, True])
def test_documents_are_as_if_alone(parts: list[int], restart: bool) -> None:
    """A document's last target is its separator; no module asks or reads beyond it."""
    model = model_of()
    ids, documents, positions = packed(parts)
    batch = Batch(ids[:, :-1], ids[:, 1:], positions if restart else None, documents)
    expected, start = torch.zeros((), dtype=torch.float64), 0
    for part in parts:
        alone = ids[:, start : start + part + 1]
        expected = expected + by_hand(model, alone, alone[:, 1:], weight=0.3)[0]
        start += part
    torch.testing.assert_close(NextTokenLoss(model, mtp_weight=0.3)(batch), expected)
    assert len(parts) == 1 or not torch.isclose(NextTokenLoss(model)(batch_of(ids)), expected)


def test_no_token_of_another_document_is_read() -> None:
    model = model_of()
    ids, documents, positions = packed([4, 5])
    other = ids.clone()
    other[0, 4:] = (
        other[0, 4:] + 1
    ) % VOCAB  # the second document, its first token being the first one's separator
    with torch.no_grad():
        first, second = (states_in(model, Batch(x[:, :-1], x[:, 1:], positions, documents)) for x in (ids, other))
    for k in range(3):
        asked = 4 - k - 1  # places of the first document at which depth k is asked for something
        torch.testing.assert_close(first[k][:, :asked], second[k][:, :asked])
        assert asked == 0 or not torch.allclose(first[k][:, asked + 1 :], second[k][:, asked + 1 :])


def test_targets_that_do_not_count_are_not_asked_for() -> None:
    model = model_of()
    ids = tokens()
    targets = ids[:, 1:].clone()
    targets[:, -4:] = IGNORE_INDEX  # padding: what stands there may be anything
    other = ids.clone()
    other[:, -4:] = 0
    values = [NextTokenLoss(model)(Batch(x[:, :-1], targets)) for x in (ids, other)]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(values[0], by_hand(model, ids, targets, weight=0.3)[0])


@pytest.mark.parametrize("ignored", [slice(0, 3), slice(2, 5)])
def test_what_is_not_asked_for_is_read_all_the_same(ignored: slice) -> None:
    """A prompt, or context that another window has already scored: its tokens are known and belong into the modules."""
    model = model_of()
    ids = tokens()
    targets = ids[:, 1:].clone()
    targets[:, ignored] = IGNORE_INDEX
    ours = NextTokenLoss(model, mtp_weight=0.3)(Batch(ids[:, :-1], targets))
    torch.testing.assert_close(ours, by_hand(model, ids, targets, weight=0.3)[0])


@pytest.mark.parametrize("prefix", [3, 5])
def test_a_prefix_is_not_asked_for_what_it_has_seen(prefix: int) -> None:
    """In the prefix every place reads the others' tokens, also those that module k has brought to its last place."""
    model = model_of(mask="prefix_lm", prefix_length=prefix, mtp_depth=3)
    ids = tokens(rows=1)
    with torch.no_grad():
        hidden = model.hidden(ids[:, :-1])
        expected = nats_of(model, hidden[:, prefix - 1 :], ids[:, prefix:])
        depths: Any = model.predictions
        for k, module in enumerate(depths, start=1):
            kept = LENGTH - k
            beside = model.embedding.weight[ids[:, k : k + kept]]
            both = [rms(hidden[:, :kept], module.hidden_norm.weight), rms(beside, module.token_norm.weight)]
            hidden = module.block(torch.cat(both, dim=-1) @ module.project.weight.T, model.context(ids[:, :kept]))
            from_here = slice(prefix - 1, kept)
            asked = ids[:, k + prefix : LENGTH + 1]
            expected += 0.1 * nats_of(model, rms(hidden, module.norm.weight)[:, from_here], asked)
        ours = NextTokenLoss(model, mtp_weight=0.3)(batch_of(ids))
    torch.testing.assert_close(ours, expected)


def test_what_a_training_step_costs_has_the_predictions_in_it() -> None:
    """Forward of the whole objective, by torch's counter; the backward pass costs twice that."""
    config = ModelConfig(**{**reference_of(VARIANTS["mtp"]).model_dump(), "tied_embeddings": False})
    model, ids = Transformer(config), random_ids(config, 3, 25)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        NextTokenLoss(model, "reference")(Batch(ids[:, :-1], ids[:, 1:]))
    assert model.training_flops_per_token(24) * 3 * 24 == 3 * counter.get_total_flops()
    assert model.training_flops_per_token(24) > 3 * model.flops_per_token(24)
