"""Equal budgets: steps from tokens, FLOPs and seconds; widths from parameters."""

from __future__ import annotations

import pytest
from model_variants import VARIANTS

from scratchlm.config import Recipe
from scratchlm.errors import UserError
from scratchlm.experiments.budget import (
    SHAPE_TOLERANCE,
    amount_of,
    flops_per_token,
    parameters,
    reshaped,
    tokens_per_step,
    with_steps,
)
from scratchlm.experiments.spec import BudgetSpec
from scratchlm.model import ModelConfig
from scratchlm.model.draw.hollow import hollow

BASE = Recipe(
    model={"vocab_size": 500, "context_length": 64, "d_model": 64, "layers": 2, "heads": 2},
    train={"steps": 100, "batch_size": 8},
)


def changed(**sections: dict[str, object]) -> Recipe:
    return BASE.model_copy(
        update={name: getattr(BASE, name).model_copy(update=fields) for name, fields in sections.items()}
    )


def test_equal_tokens() -> None:
    amount = amount_of(BudgetSpec(), BASE)
    assert amount.total == 100 * 8 * 64
    for batch in (1, 8, 24):
        variant = with_steps(changed(train={"batch_size": batch}), amount)
        assert abs(variant.train.steps * tokens_per_step(variant) - amount.total) <= tokens_per_step(variant) / 2
    assert with_steps(BASE, amount_of(BudgetSpec(amount=51_200), BASE)).train.steps == 100


@pytest.mark.parametrize("tokens", [600, 2_000, 5_000, 51_200])
def test_batches_that_grow_are_counted_as_they_are(tokens: int) -> None:
    growing = changed(train={"batch_size": 8, "batch_warmup_steps": 9, "batch_warmup_start": 2})
    found = with_steps(growing, amount_of(BudgetSpec(amount=tokens), BASE))
    counted = 64 * sum(found.train.batch_size_at(step) for step in range(found.train.steps))
    assert found.tokens == counted and abs(counted - tokens) <= tokens_per_step(found) / 2
    assert amount_of(BudgetSpec(), found).total == counted


def test_equal_flops_by_the_models_own_count() -> None:
    amount = amount_of(BudgetSpec(kind="flops"), BASE)
    assert amount.total == 100 * 8 * 64 * hollow(BASE.model).training_flops_per_token(64)
    wide = with_steps(changed(model={"d_model": 128}), amount)
    assert wide.train.steps < 60
    spent = wide.train.steps * tokens_per_step(wide) * flops_per_token(wide)
    assert abs(spent / amount.total - 1) < 0.5 / wide.train.steps + 1e-9


def test_seconds_by_a_measured_speed() -> None:
    with pytest.raises(UserError, match="needs an amount"):
        amount_of(BudgetSpec(kind="seconds"), BASE)
    amount = amount_of(BudgetSpec(kind="seconds", amount=30), BASE)
    assert with_steps(BASE, amount, speed=5120.0).train.steps == 300


def test_a_budget_of_less_than_a_step_is_refused() -> None:
    with pytest.raises(UserError, match="less than a step of 512"):
        with_steps(BASE, amount_of(BudgetSpec(amount=100), BASE))


@pytest.mark.parametrize(
    "fields",
    [
        {"feedforward": "relu"},
        {"feedforward": "relu", "d_ff": 64},
        {"d_ff": 1024},
        {"layers": 5},
        {"tied_embeddings": True},
        {"heads": 8, "kv_heads": 1},
        {"head_dim": 48},
        {"moe": {"experts": 4, "top_k": 1}},
        {"attention": ("mla",)},
        {"attention": ("linear",), "position": ("none",)},
        {"position": ("learned",)},
    ],
    ids=str,
)
def test_parameters_are_matched_by_the_widths(fields: dict[str, object]) -> None:
    """From every variant back to the base's number, and to three times it, counted on real modules."""
    model = ModelConfig(**{**BASE.model.model_dump(), **fields})
    for wish in (parameters(BASE.model, False), 3 * parameters(BASE.model, False)):
        found = reshaped(model, wish)
        assert abs(hollow(found).num_params() / wish - 1) <= SHAPE_TOLERANCE
        kept = (
            "layers",
            "heads",
            "kv_heads",
            "feedforward",
            "attention",
            "position",
            "vocab_size",
            "context_length",
            "head_dim",
        )
        assert all(getattr(found, name) == getattr(model, name) for name in kept)


def test_a_wish_that_holds_changes_nothing() -> None:
    assert reshaped(BASE.model, parameters(BASE.model, False) * 1.005) == BASE.model


def test_of_a_mixture_the_active_parameters_can_be_matched() -> None:
    model = ModelConfig(**{**BASE.model.model_dump(), "moe": {"experts": 8, "top_k": 2, "fine_grained": 2}})
    wish = parameters(BASE.model, True)
    found = reshaped(model, wish, active=True)
    assert abs(hollow(found).num_active_params() / wish - 1) <= SHAPE_TOLERANCE
    assert hollow(found).num_params() > 1.5 * wish


def test_what_cannot_be_matched_is_refused() -> None:
    with pytest.raises(UserError, match="no width gives 10 parameters"):
        reshaped(BASE.model, 10)


@pytest.mark.slow
@pytest.mark.parametrize("config", VARIANTS.values(), ids=list(VARIANTS))
def test_every_architecture_can_be_matched(config: ModelConfig) -> None:
    wish = 2.5 * parameters(config, False)
    try:
        found = reshaped(config, wish)
    except UserError as error:
        assert "no width gives" in str(error)
        return
    assert abs(parameters(found, False) / wish - 1) <= SHAPE_TOLERANCE
