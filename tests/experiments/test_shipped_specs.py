"""The experiments that the repository ships can all be planned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from scratchlm.experiments.budget import SHAPE_TOLERANCE, flops_per_token, parameters, tokens_per_step
from scratchlm.experiments.plan import Planner
from scratchlm.experiments.spec import load_experiment

SPECS = sorted(
    path
    for path in (Path(__file__).parents[2] / "recipes/experiments").glob("*.toml")
    if not path.name.startswith("base")
)


def test_they_are_there() -> None:
    assert len(SPECS) >= 15


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_it_can_be_planned_and_its_budget_is_met(path: Path, tmp_path: Path) -> None:
    experiment = load_experiment(path)
    sized = [
        replace(
            one,
            recipe=one.recipe.model_copy(
                update={
                    "model": one.recipe.model.model_copy(update={"vocab_size": one.recipe.tokenizer.vocab_size})
                }
            ),
        )
        for one in experiment.variants
    ]
    made = Planner(replace(experiment, variants=tuple(sized)), tmp_path, lambda recipe: "off")
    assert not made.refused and experiment.spec.question
    for trial in made.plan(lambda trial: None).trials:
        recipe = trial.recipe
        tokens = recipe.train.steps * tokens_per_step(recipe)
        counted = {
            "flops": tokens * flops_per_token(recipe),
            "parameters": parameters(recipe.model, made.amount.active),
        }
        slack = {"parameters": SHAPE_TOLERANCE}.get(made.amount.kind, 0.51 / recipe.train.steps)
        assert counted.get(made.amount.kind, tokens) == pytest.approx(made.amount.total, rel=slack)
        assert recipe.train.steps >= 10
