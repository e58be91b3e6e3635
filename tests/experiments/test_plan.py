"""Plans follow from results: what is run next, and which rate a variant is judged at."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from scratchlm.errors import UserError
from scratchlm.experiments.plan import Planner, Trial
from scratchlm.experiments.results import Failure, Result
from scratchlm.experiments.spec import Experiment, load_experiment

RESULT = Result(
    key="", loss=3.0, bits_per_byte=1.5, best_loss=3.0, steps=24, tokens=3072, seconds=1.0, tokens_per_second=1000.0,
    parameters=1000, active_parameters=1000, flops_per_token=6000.0, cache_bytes_per_token=4, cache_bytes_bounded=0,
    peak_memory=10, spikes=0, skipped=0, grad_norm_median=1.0, grad_norm_max=2.0,
)  # fmt: skip


def planner(folder: Path, text: str) -> Planner:
    (folder / "exp.toml").write_text('base = "small.toml"\n' + text)
    experiment = load_experiment(folder / "exp.toml")
    sized = tuple(
        replace(
            one,
            recipe=one.recipe.model_copy(update={"model": one.recipe.model.model_copy(update={"vocab_size": 300})}),
        )
        for one in experiment.variants
    )
    return Planner(Experiment(experiment.name, experiment.spec, sized), folder / "runs/exp", lambda recipe: "off")


def nothing(trial: Trial) -> None:
    return None


def described(trials: tuple[Trial, ...]) -> list[tuple[str, str, float, int]]:
    return [(one.variant, one.purpose, one.factor, one.seed) for one in trials]


POST = '[variants.post]\nmodel.norm_placement = "post"\n'


def test_every_variant_runs_with_every_seed_seed_by_seed(small: Path) -> None:
    plan = planner(small, f"seeds = 2\n{POST}").plan(nothing)
    assert described(plan.trials) == [
        ("base", "seed", 1.0, 0),
        ("post", "seed", 1.0, 0),
        ("base", "seed", 1.0, 1),
        ("post", "seed", 1.0, 1),
    ]
    assert (
        plan.complete
        and len({one.key for one in plan.trials}) == 4
        and len({one.folder for one in plan.trials}) == 4
    )
    assert [one.recipe.seed for one in plan.trials] == [0, 0, 1, 1]
    again = planner(small, f"seeds = 2\n{POST}").plan(nothing)
    assert [one.key for one in again.trials] == [one.key for one in plan.trials]
    other = planner(small, f"seeds = 2\nfields.'train.steps' = 25\n{POST}").plan(nothing)
    assert not {one.folder for one in other.trials} & {one.folder for one in plan.trials}, "changed, so run anew"


def test_where_and_how_often_to_look_is_no_part_of_a_run(small: Path) -> None:
    plan = planner(small, POST).plan(nothing)
    other = planner(small, f"fields.'train.eval_interval' = 2\nfields.'data.cache' = 'elsewhere'\n{POST}").plan(
        nothing
    )
    assert [one.key for one in other.trials] == [one.key for one in plan.trials]


def test_rates_first_then_each_variant_at_its_own_and_at_the_references(small: Path) -> None:
    made = planner(small, f"seeds = 2\n{POST}[rates]\nfactors = [0.5, 1.0, 4.0]\n")
    first = made.plan(nothing)
    assert not first.complete and {one.purpose for one in first.trials} == {"rate"} and len(first.trials) == 6
    rates = {one.factor: one.recipe.optim for one in first.trials if one.variant == "base"}
    own = made.experiment.reference.recipe.optim
    assert [(o.lr / own.lr, o.muon_lr / own.muon_lr) for o in rates.values()] == [
        (0.5, 0.5),
        (1.0, 1.0),
        (4.0, 4.0),
    ]

    losses = {("base", 0.5): 3.0, ("base", 1.0): 2.9, ("base", 4.0): math.nan,
              ("post", 0.5): 3.0, ("post", 1.0): 2.9, ("post", 4.0): 2.5}  # fmt: skip

    def outcome(trial: Trial) -> Result | None:
        return replace(RESULT, loss=losses[trial.variant, trial.factor]) if trial.purpose == "rate" else None

    second = made.plan(outcome)
    assert second.complete
    assert second.choices["base"].factor == 1.0 and not second.choices["base"].at_edge
    assert second.choices["post"].factor == 4.0 and second.choices["post"].at_edge
    runs = [one for one in described(second.trials) if one[1] == "seed"]
    assert runs == [
        ("base", "seed", 1.0, 0), ("post", "seed", 4.0, 0), ("post", "seed", 1.0, 0),
        ("base", "seed", 1.0, 1), ("post", "seed", 4.0, 1), ("post", "seed", 1.0, 1),
    ]  # fmt: skip
    shared = {one.key for one in second.trials if one.purpose == "rate"} & {
        one.key for one in second.trials if one.purpose == "seed"
    }
    assert len(shared) == 3, "the runs that chose the rate are the first seed's"


def test_a_failed_rate_is_no_choice_and_no_stop(small: Path) -> None:
    made = planner(small, f"{POST}[rates]\nfactors = [1.0, 2.0]\n")

    def outcome(trial: Trial) -> Result | Failure:
        return Failure(trial.key, "broke") if trial.factor == 2.0 else RESULT

    plan = made.plan(outcome)
    assert plan.complete and {choice.factor for choice in plan.choices.values()} == {1.0}


def test_seconds_are_planned_by_a_short_run(small: Path) -> None:
    made = planner(small, f"seeds = 1\n{POST}[budget]\nkind = 'seconds'\namount = 10\n")
    first = made.plan(nothing)
    assert [(one.purpose, one.recipe.train.steps) for one in first.trials] == [
        ("speed", 20)
    ] * 2 and not first.complete
    speeds = {"base": 1280.0, "post": 2560.0}

    def outcome(trial: Trial) -> Result | None:
        return replace(RESULT, tokens_per_second=speeds[trial.variant]) if trial.purpose == "speed" else None

    steps = {one.variant: one.recipe.train.steps for one in made.plan(outcome).trials if one.purpose == "seed"}
    assert steps == {"base": 100, "post": 200}  # 128 tokens per step


def test_a_failed_short_run_is_the_variants_end(small: Path) -> None:
    made = planner(small, f"seeds = 1\n{POST}[budget]\nkind = 'seconds'\namount = 10\n")

    def outcome(trial: Trial) -> Result | Failure:
        return RESULT if trial.variant == "base" else Failure(trial.key, "broke")

    plan = made.plan(outcome)
    assert plan.complete and [one.variant for one in plan.trials if one.purpose == "seed"] == ["base"]


def test_a_variant_whose_budget_cannot_be_met_has_no_runs(small: Path) -> None:
    made = planner(small, "[variants.deep]\nmodel.layers = 64\n[budget]\nkind = 'parameters'\n")
    plan = made.plan(nothing)
    assert "no width gives" in plan.refused["deep"] and {one.variant for one in plan.trials} == {"base"}
    with pytest.raises(UserError, match="no width gives"):
        planner(small, f"{POST}[budget]\nkind = 'parameters'\namount = 10\n")


def test_shapes_meet_the_references_parameters(small: Path) -> None:
    made = planner(
        small,
        "seeds = 1\n[variants.relu]\nmodel.feedforward = 'relu'\nmodel.d_ff = 512\n[budget]\nkind = 'parameters'\n",
    )
    from scratchlm.experiments.budget import parameters

    counted = [parameters(one.recipe.model, False) for one in made.plan(nothing).trials]
    assert counted[1] == pytest.approx(counted[0], rel=0.01)
