"""Choices together: any two axes at any values build, learn nothing from the future, and compute the same in every way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from model_variants import BESIDE_THE_AXES, SMALL, build, changes_of, random_ids, reference_of
from test_variants import Batch, reachable

from scratchlm.errors import UserError
from scratchlm.generate.cache import KVCache
from scratchlm.model import ModelConfig, choices
from scratchlm.train.loss import NextTokenLoss

SINGLE: dict[str, dict[str, Any]] = {
    f"{axis.axis} = {name}": changes_of(axis.axis, name) for axis in choices.AXES for name in axis.names
} | BESIDE_THE_AXES
names = st.lists(st.sampled_from(list(SINGLE)), min_size=2, max_size=4, unique=True)


def together(chosen: list[str]) -> dict[str, Any]:
    """The fields of several choices, sections merged; a later choice wins."""
    fields: dict[str, Any] = dict(SMALL)
    for name in chosen:
        for field, value in SINGLE[name].items():
            merged = isinstance(value, dict) and isinstance(fields.get(field), dict)
            fields[field] = {**fields[field], **value} if merged else value
    return fields


def check(chosen: list[str]) -> None:
    try:
        config = ModelConfig(**together(chosen))
    except UserError as refused:
        sentence = str(refused)
        assert "\n" not in sentence and len(sentence) > 40, "a refusal says why"
        assume(False)
    model, reference = build(config).double(), build(reference_of(config)).double()
    assert model.num_params() == sum(p.numel() for p in model.parameters())
    ids = random_ids(config, 2, 25)
    read, asked = ids[:, :-1], ids[:, 1:]
    results = []
    for one, kernel in ((model, "chunked"), (reference, "reference")):
        objective = NextTokenLoss(one, kernel)(Batch(read, asked))
        objective.backward()
        results.append([objective.detach(), *(p.grad for p in one.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > 1 and all(r.isfinite().all() for r in results[0])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    with torch.no_grad():
        whole = model(read, prefix=5)
        cache, pieces = KVCache(config, batch=2, max_length=24), []
        for piece in read.split([5, 1, 7, 11], dim=1):
            pieces.append(model(piece, cache=cache))
            cache.advance(piece.shape[1])
        torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-7, atol=1e-8)
        swapped = read[0].repeat(24, 1)
        swapped.diagonal().add_(1).remainder_(config.vocab_size)
        influence = (model(swapped) - model(read[:1])).abs().amax(dim=-1).T > 1e-12
        assert not (influence & ~reachable(config, 24)).any()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(names)
def test_some_combinations(chosen: list[str]) -> None:
    check(chosen)


@pytest.mark.slow
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(names)
def test_many_combinations(chosen: list[str]) -> None:
    check(chosen)
