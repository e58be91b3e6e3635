"""The objective: the same with all logits, in chunks or compiled; what the architecture adds to it; what it reports."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scratchlm.data.loader import Batch
from scratchlm.model import ModelConfig, Transformer
from scratchlm.model.context import RouterRecord
from scratchlm.train.loss import NextTokenLoss

MODEL: dict[str, Any] = {"vocab_size": 37, "context_length": 8, "d_model": 16, "layers": 2, "heads": 2}
MOE: dict[str, Any] = {"experts": 4, "top_k": 2, "balance_loss": 0.3, "router_z_loss": 0.05, "d_expert": 8}


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def batch(seed: int = 0, rows: int = 3, ignored: bool = True) -> Batch:
    ids = torch.randint(0, 37, (rows, 9), generator=torch.Generator().manual_seed(seed))
    targets = ids[:, 1:].clone()
    if ignored:
        targets[0, :3] = -100
    return Batch(ids[:, :-1].contiguous(), targets, None, None)


def model_of(**fields: Any) -> Transformer:
    return Transformer(ModelConfig(**{**MODEL, **fields}), seed=0)


def gradients_of(model: Transformer, objective: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    objective.backward()
    parameters: Any = model.named_parameters()
    return {name: parameter.grad.clone() for name, parameter in parameters}


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kernel", ["auto", "reference", "chunked"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head_bias", [False, True])
def test_it_is_torchs_cross_entropy_summed(kernel: str, tied: bool, head_bias: bool) -> None:
    model = model_of(tied_embeddings=tied, head_bias=head_bias)
    if head_bias:
        torch.nn.init.normal_(model.head.bias, generator=torch.Generator().manual_seed(1))
    given = batch()
    loss = NextTokenLoss(model, kernel)(given)
    gradients = gradients_of(model, loss)
    expected = F.cross_entropy(model(given.inputs).flatten(0, 1), given.targets.flatten(), reduction="sum")
    torch.testing.assert_close(loss, expected)
    close(gradients, gradients_of(model, expected))


def test_auto_is_chunked() -> None:
    assert NextTokenLoss(model_of()).kernel == NextTokenLoss(model_of(), "chunked").kernel == "chunked"


@pytest.mark.parametrize("kernel", ["reference", "chunked"])
def test_z_loss_scale_and_cap(kernel: str) -> None:
    model = model_of(logit_scale=0.7, logit_soft_cap=2.0).double()
    given = batch()
    logits = 2 * torch.tanh(0.7 * (model.hidden(given.inputs) @ model.head.weight.T) / 2)
    normaliser = logits.exp().sum(dim=-1).log()
    counted = given.targets != -100
    nats = F.cross_entropy(logits.flatten(0, 1), given.targets.flatten(), reduction="sum")
    expected = nats + 0.01 * (normaliser**2)[counted].sum()
    loss = NextTokenLoss(model, kernel, z_loss=0.01)
    ours = loss(given)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(loss.extra(), (expected - nats).detach())
    close(gradients_of(model, ours), gradients_of(model, expected))


def records_of(model: Transformer, given: Batch) -> list[RouterRecord]:
    return model.run(given.inputs, model.context(given.inputs, given.positions, given.documents))[1]


def test_router_losses_count_once_per_token() -> None:
    """They are means over tokens and the objective is a sum: times the number of targets."""
    model = model_of(moe=MOE).double()
    given = batch()
    first, second = records_of(model, given)
    assert first.loss > 0.3 and not torch.isclose(first.loss, second.loss)
    nats = F.cross_entropy(model(given.inputs).flatten(0, 1), given.targets.flatten(), reduction="sum")
    expected = nats + 21 * (first.loss + second.loss)  # 24 targets, 3 of them ignored
    loss = NextTokenLoss(model)
    ours = loss(given)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(loss.extra(), 21 * (first.loss + second.loss).detach())
    close(gradients_of(model, ours), gradients_of(model, expected))


@pytest.mark.parametrize("prefix", [2, 5, 7])
def test_targets_inside_the_prefix_do_not_count(prefix: int) -> None:
    model = model_of(mask="prefix_lm causal", prefix_length=prefix).double()
    given = batch(ignored=False)
    before = given.targets.clone()
    counted = range(max(0, prefix - 1), 8)  # place i is asked for token i + 1, the prefix is tokens 0 … prefix − 1
    each = F.cross_entropy(model(given.inputs).mT, given.targets, reduction="none")
    torch.testing.assert_close(NextTokenLoss(model)(given), each[:, list(counted)].sum())
    assert given.targets.equal(before), "the batch is not changed"
    causal = model_of(prefix_length=prefix).double()
    each = F.cross_entropy(causal(given.inputs).mT, given.targets, reduction="none")
    torch.testing.assert_close(NextTokenLoss(causal)(given), each.sum(), msg="without the mask there is no prefix")


def test_every_document_has_a_prefix() -> None:
    model = model_of(mask="prefix_lm", prefix_length=3).double()
    given = batch(rows=1, ignored=False)
    given.documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    given.positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    logits = model(given.inputs, given.positions, given.documents)
    each = F.cross_entropy(logits.mT, given.targets, reduction="none")
    torch.testing.assert_close(NextTokenLoss(model)(given), each[0, [2, 3, 6, 7]].sum())


def test_documents_and_positions_reach_the_model() -> None:
    model = model_of(position="learned").double()
    given = batch()
    given.documents, given.positions = (
        torch.tensor([[0] * 3 + [1] * 5] * 3),
        torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]] * 3),
    )
    logits = model(given.inputs, given.positions, given.documents)
    expected = F.cross_entropy(logits.flatten(0, 1), given.targets.flatten(), reduction="sum")
    torch.testing.assert_close(NextTokenLoss(model)(given), expected)


CUT_IN_TWO: dict[str, tuple[dict[str, Any], bool]] = {
    "dense": ({}, True),
    "prediction": ({"mtp_depth": 2}, True),
    "prefix": ({"mask": "prefix_lm", "prefix_length": 3}, True),
    "mixture, z-loss of the router": ({"moe": {**MOE, "balance_loss": 0.0}}, True),
    "mixture, balance by sequence": ({"moe": {**MOE, "balance_over": "sequence"}}, True),
    "mixture, balance by batch": ({"moe": MOE}, False),  # a load of half a batch is another load
}


@pytest.mark.parametrize("case", CUT_IN_TWO)
def test_micro_batches_add_up(case: str) -> None:
    fields, equal = CUT_IN_TWO[case]
    model = model_of(**fields).double()
    given = batch(rows=4, ignored=False)
    whole, parts = NextTokenLoss(model, z_loss=0.01), NextTokenLoss(model, z_loss=0.01)
    once = whole(given)
    half = [parts(Batch(given.inputs[rows], given.targets[rows])) for rows in (slice(0, 2), slice(2, 4))]
    assert torch.isclose(once, half[0] + half[1]).item() == equal
    if equal:
        close(gradients_of(model, once), gradients_of(model, half[0] + half[1]))
        torch.testing.assert_close(parts.extra(), whole.extra())
    figures, expected = parts.figures(), whole.figures()
    assert figures.keys() == expected.keys() and bool(figures) == ("moe" in fields)
    for name in figures:
        if equal or name != "router_loss":
            torch.testing.assert_close(torch.tensor(figures[name]), torch.tensor(expected[name]), msg=name)


def test_extra_and_figures_begin_anew_after_a_step() -> None:
    model = model_of(moe=MOE)
    loss = NextTokenLoss(model)
    assert loss.extra() is None and loss.figures() == {}
    loss(batch())
    first = loss.extra()
    assert first is not None and not first.requires_grad
    loss(batch(1))
    both = loss.extra()
    assert both is not None and both > first
    loss.after_step()
    assert loss.extra() is None and loss.figures() == {}
    loss(batch(1))
    torch.testing.assert_close(loss.extra(), both - first)
    dense = NextTokenLoss(model_of())
    dense(batch())
    assert dense.extra() is not None and dense.extra().item() == 0 and dense.figures() == {}  # type: ignore[union-attr]


def test_figures_are_counted_from_the_routers_choices() -> None:
    """Two micro-batches of different size, counted from what the routers chose."""
    model = model_of(moe={**MOE, "capacity_factor": 0.75, "balance_loss": 0.0})
    chosen: list[list[Tensor]] = [[], []]
    shares: list[list[Tensor]] = [[], []]
    for layer, block in enumerate(model.blocks):

        def look(module: Any, given: Any, routing: Any, layer: int = layer) -> None:
            chosen[layer].append(routing.experts.flatten())
            shares[layer].append(routing.shares.detach().flatten(0, -2))

        block.feedforward.router.register_forward_hook(look)  # type: ignore[union-attr]
    loss = NextTokenLoss(model)
    loss(batch(0, rows=3))
    loss(batch(1, rows=1))
    figures = loss.figures()
    loads = [torch.cat(layer).bincount(minlength=4).tolist() for layer in chosen]
    assert figures["expert_load"] == loads and [sum(load) for load in loads] == [64, 64]
    assert figures["expert_max_over_mean"] == pytest.approx(max(max(load) / 16 for load in loads))
    dropped = 0.0
    for routed in chosen:
        for experts in routed:
            room = math.ceil(0.75 * len(experts) / 4)
            dropped += sum(max(0, count - room) for count in experts.bincount(minlength=4).tolist())
    assert dropped > 0 and figures["expert_dropped"] == pytest.approx(dropped / 128)
    entropies = [[-(p * p.log()).sum(-1).mean().item() for p in layer] for layer in shares]
    assert figures["router_entropy"] == pytest.approx(sum(sum(layer) / 2 for layer in entropies) / 2, rel=1e-5)
    passes = [[r.loss.item() for r in records_of(model, batch(seed, rows=rows))] for seed, rows in ((0, 3), (1, 1))]
    assert figures["router_loss"] == pytest.approx(sum(sum(losses) for losses in passes) / 2, rel=1e-5)


def corrections_of(model: Transformer) -> list[Tensor]:
    predictions: Any = model.predictions
    blocks = [*model.blocks, *(module.block for module in predictions)]
    return [block.feedforward.router.correction for block in blocks if hasattr(block.feedforward, "router")]


@pytest.mark.parametrize("mtp_depth", [0, 2])
def test_after_a_step_the_bias_moves_against_the_steps_load(mtp_depth: int) -> None:
    """b += γ · sign(mean − load) with the loads of all micro-batches; modules of prediction are layers, too."""
    model = model_of(
        moe={**MOE, "bias_update": 0.05, "router": "sigmoid", "first_dense": 1}, layers=3, mtp_depth=mtp_depth
    )
    loss = NextTokenLoss(model)
    loss(batch(0))
    loss(batch(1))
    loads = torch.tensor(loss.figures()["expert_load"])
    assert loads.shape == (2 + mtp_depth, 4) and (loads.sum(dim=-1) == 96).all()
    assert all(not correction.any() for correction in corrections_of(model))
    loss.after_step()
    corrections = torch.stack(corrections_of(model))
    torch.testing.assert_close(corrections, 0.05 * torch.sign(24 - loads))
    assert len({tuple(row) for row in corrections.tolist()}) > 1, "the layers' loads differ"

    loss(batch(2))
    loss.after_step(updated=False)
    assert torch.stack(corrections_of(model)).equal(corrections), "a skipped step moves nothing"
    loss.after_step()
    assert torch.stack(corrections_of(model)).equal(corrections), "and its load is forgotten"


def test_without_bias_update_no_bias_moves() -> None:
    model = model_of(moe={**MOE, "router": "sigmoid"})
    loss = NextTokenLoss(model)
    loss(batch())
    loss.after_step()
    assert not torch.stack(corrections_of(model)).any()


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"mtp_depth": 1, "logit_soft_cap": 3.0}], ids=["plain", "prediction"])
def test_compiled_and_eager_agree(fields: dict[str, Any]) -> None:
    model = model_of(**fields)
    loss = NextTokenLoss(model, z_loss=0.01)
    eager = loss(batch())
    loss.compile()
    torch.testing.assert_close(loss(batch()), eager)
    loss.eager()
    assert loss(batch()).equal(eager)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["cuda_graphs", "max_autotune"])
def test_a_mode_of_the_compiler_changes_no_figure(mode: str) -> None:
    """On a GPU the next replay writes over what the pass before has left: figures of the step must not change with it."""
    found = []
    for compile in (False, True):
        torch.manual_seed(0)
        loss = NextTokenLoss(model_of(moe=MOE).to(DEVICE))
        if compile:
            loss.compile(mode)
        total = [loss(batch(seed).to(DEVICE)) for seed in (0, 1)]
        found.append([*(float(one.detach()) for one in total), *loss.figures()["expert_load"][0]])
    assert found[0] == pytest.approx(found[1], rel=1e-5)
