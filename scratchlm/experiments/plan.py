"""Which runs an experiment needs: a function of the spec and of the results there are.

::

    speeds ──► steps of a budget in seconds ─┐
    rates  ──► each variant's best rate ─────┴──► variant × seed at its own best rate, and at the reference's

Run after run the plan is asked again. So a queue that was killed goes on where it was: what is there is found by its key, and what is
missing is next.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from scratchlm.config import Recipe
from scratchlm.errors import UserError
from scratchlm.experiments.budget import Amount, amount_of, reshaped, with_steps
from scratchlm.experiments.results import Failure, Result, load_outcome
from scratchlm.experiments.spec import Experiment, Variant
from scratchlm.experiments.trial import key_of

Purpose = Literal["speed", "rate", "seed"]
SPEED_STEPS = 20
"""Of the short run that a budget in seconds is planned by."""

Outcomes = Callable[["Trial"], Result | Failure | None]


@dataclass(frozen=True)
class Trial:
    """One run.

    Attributes:
        variant: its name.
        purpose: measuring speed, choosing a rate, or counting for the table; a run may serve several, and is done once.
        factor: of the variant's learning rates.
        seed: of the run.
        recipe: everything, `out` included.
    """

    variant: str
    purpose: Purpose
    factor: float
    seed: int
    recipe: Recipe

    @functools.cached_property
    def key(self) -> str:
        """What tells this run from any other."""
        return key_of(self.recipe)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.recipe.folder

    def outcome(self) -> Result | Failure | None:
        """From the folder; None: not finished."""
        return load_outcome(self.folder, self.key)


@dataclass(frozen=True)
class Choice:
    """A variant's learning rate.

    Attributes:
        factor: the best of those tried; 1 without a sweep of rates.
        losses: factor → mean validation loss; infinite where runs diverged.
        at_edge: the best is the least or the greatest that was tried: a better one may lie beyond.
    """

    factor: float
    losses: Mapping[float, float]
    at_edge: bool


@dataclass(frozen=True)
class Plan:
    """What there is to do, and how far that can be told already.

    Attributes:
        trials: all runs that are known to be needed, finished ones included, in the order they are started.
        choices: variant → its rate; missing while its runs are.
        complete: nothing can be added by further results.
        refused: variant → why it has no runs: its budget cannot be met.
    """

    trials: tuple[Trial, ...]
    choices: Mapping[str, Choice]
    complete: bool
    refused: Mapping[str, str]

    def of(self, variant: str, factor: float) -> list[Trial]:
        """The runs that count for a row of the table, by seed."""
        found = [
            one for one in self.trials if one.purpose == "seed" and (one.variant, one.factor) == (variant, factor)
        ]
        return sorted(found, key=lambda trial: trial.seed)


class Planner:
    """Makes plans for one experiment.

    Args:
        experiment: with the vocabulary's size set in every recipe that leaves it to the tokenizer.
        runs: where the runs' folders lie.
        compiling: (recipe) → ``on`` or ``off``, for budgets in seconds, whose short run must compute as the long one will.

    Raises:
        UserError: the budget is not one.
    """

    def __init__(self, experiment: Experiment, runs: Path, compiling: Callable[[Recipe], str]) -> None:
        self.experiment = experiment
        self.runs = runs
        self.compiling = compiling
        self.amount: Amount = amount_of(experiment.spec.budget, experiment.reference.recipe)
        self._shaped: dict[str, Recipe] = {}
        self.refused: dict[str, str] = {}
        for variant in experiment.variants:
            try:
                self._shaped[variant.name] = self._shape(variant)
            except UserError as error:
                if variant is experiment.reference:
                    raise
                self.refused[variant.name] = str(error)

    def _shape(self, variant: Variant) -> Recipe:
        recipe = variant.recipe
        if self.amount.kind == "parameters":
            model = reshaped(recipe.model, self.amount.total, active=self.experiment.spec.budget.active)
            recipe = recipe.model_copy(update={"model": model})
        if self.amount.kind == "seconds":
            train = recipe.train.model_copy(update={"compile": self.compiling(recipe)})
            return recipe.model_copy(update={"train": train})
        return with_steps(recipe, self.amount)

    def plan(self, outcome: Outcomes = Trial.outcome) -> Plan:
        """The runs that are needed, given what is finished.

        Args:
            outcome: what became of a trial.
        """
        trials: dict[str, Trial] = {}
        complete = True
        recipes: dict[str, Recipe] = {}
        for name, recipe in self._shaped.items():
            if self.amount.kind != "seconds":
                recipes[name] = recipe
                continue
            probe = self._speed_trial(name, recipe)
            trials[f"speed {name}"] = probe
            found = outcome(probe)
            if isinstance(found, Result):
                recipes[name] = with_steps(recipe, self.amount, found.tokens_per_second)
            complete &= found is not None
        choices, swept = self._choices(recipes, outcome, trials)
        complete &= swept
        reference = choices.get(self.experiment.spec.reference)
        for seed in self.experiment.spec.chosen_seeds:
            for name, recipe in recipes.items():
                if name not in choices:
                    continue
                shared = () if reference is None else (reference.factor,)
                for factor in dict.fromkeys((choices[name].factor, *shared)):
                    trial = self._trial(name, "seed", factor, seed, recipe)
                    trials[f"seed {name} {factor} {seed}"] = trial
        return Plan(tuple(trials.values()), choices, complete, self.refused)

    def _choices(
        self, recipes: Mapping[str, Recipe], outcome: Outcomes, trials: dict[str, Trial]
    ) -> tuple[dict[str, Choice], bool]:
        """Each variant's rate, as far as known, and whether all are; adds the runs that tell to `trials`."""
        rates = self.experiment.spec.rates
        if rates is None:
            return {name: Choice(1.0, {}, False) for name in recipes}, True
        choices: dict[str, Choice] = {}
        complete = True
        for name, recipe in recipes.items():
            losses: dict[float, float] = {}
            for factor in sorted(rates.factors):
                found = []
                for seed in self.experiment.spec.chosen_seeds[: rates.seeds]:
                    trial = self._trial(name, "rate", factor, seed, recipe)
                    trials[f"rate {name} {factor} {seed}"] = trial
                    found.append(outcome(trial))
                if all(one is not None for one in found):
                    losses[factor] = float(np.mean([_loss(one) for one in found]))
            if len(losses) < len(rates.factors):
                complete = False
                continue
            # Where everything diverged there is no best rate: the least is the likeliest to be one.
            best = min(losses, key=lambda factor: (losses[factor], factor))
            choices[name] = Choice(best, losses, best in (min(losses), max(losses)))
        return choices, complete

    def _trial(self, name: str, purpose: Purpose, factor: float, seed: int, recipe: Recipe) -> Trial:
        optim = scaled_rates(recipe, factor).optim
        return self._placed(name, purpose, factor, seed, recipe.model_copy(update={"optim": optim, "seed": seed}))

    def _speed_trial(self, name: str, recipe: Recipe) -> Trial:
        seed = self.experiment.spec.chosen_seeds[0]
        train = recipe.train.model_copy(update={"steps": SPEED_STEPS, "log_interval": max(1, SPEED_STEPS // 5)})
        return self._placed(f"{name}", "speed", 1.0, seed, recipe.model_copy(update={"train": train, "seed": seed}))

    def _placed(self, name: str, purpose: Purpose, factor: float, seed: int, recipe: Recipe) -> Trial:
        """With a folder whose name says what it is, and whose end tells it from others of that name."""
        label = name + ("" if factor == 1.0 else f"-x{factor:g}") + ("-speed" if purpose == "speed" else "")
        folder = f"{label}-s{seed}-{key_of(recipe)[:8]}"
        placed = {"name": re.sub(r"[^\w.+-]+", "-", folder), "out": self.runs / folder}
        return Trial(name, purpose, factor, seed, recipe.model_copy(update=placed))


def scaled_rates(recipe: Recipe, factor: float) -> Recipe:
    """All learning rates of a recipe times `factor`."""
    optim = recipe.optim
    update = {"lr": optim.lr * factor, "muon_lr": optim.muon_lr * factor}
    if optim.embedding_lr is not None:
        update["embedding_lr"] = optim.embedding_lr * factor
    return recipe.model_copy(update={"optim": optim.model_copy(update=update)})


def _loss(found: Result | Failure | None) -> float:
    return found.loss if isinstance(found, Result) and math.isfinite(found.loss) else math.inf
