"""``scratchlm ablate`` and ``scratchlm lr``: comparisons, and the range of learning rates that work."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
from pydantic import Field

from scratchlm.arguments import parse
from scratchlm.commands.shared import say, take_preset
from scratchlm.config import Recipe, load_recipe
from scratchlm.errors import UserError
from scratchlm.files import expanded
from scratchlm.section import Section
from scratchlm.threads import before_torch

if TYPE_CHECKING:
    from scratchlm.experiments.comparison import Comparison

USAGE = "scratchlm ablate SPEC.toml [--out FOLDER] [--runs FOLDER] [--jobs N]"


class AblateArguments(Section):
    """Run a table of choices under an equal budget with several seeds, and say which differ and whether it is noise.

    The same command goes on with what was cut off; finished runs are never repeated.
    """

    spec: tyro.conf.Positional[Path] = Field(description="What is compared: see recipes/experiments/.")
    out: Path | None = Field(default=None, description="The experiment's folder; None: runs/<name of the spec>.")
    jobs: int = Field(
        default=1, ge=1, le=1024, description="Runs at once; on a machine with GPUs they are dealt out."
    )
    retry: bool = Field(default=False, description="Run again what failed before.")
    runs: Path | None = Field(
        default=None,
        description="Where the runs lie; experiments with the same folder share equal runs. None: in the experiment's.",
    )
    dry_run: bool = Field(default=False, description="Only check the spec, and list the variants.")


def ablate(arguments: list[str]) -> None:
    """``scratchlm ablate SPEC.toml``"""
    if not arguments:
        raise UserError(f"which experiment? usage: {USAGE}; recipes/experiments/ holds examples")
    options = parse(AblateArguments, arguments, prog="scratchlm ablate")
    from scratchlm.experiments.spec import load_experiment

    source = expanded(options.spec)
    experiment = load_experiment(source)
    if options.dry_run:
        for variant in experiment.variants:
            changes = ", ".join(f"{path} = {value}" for path, value in variant.changes.items())
            say(f"{variant.name:<28} {changes or 'the recipe as it is'}")
        return
    from scratchlm.experiments.ablate import Ablation

    folder = Path("runs") / experiment.name if options.out is None else expanded(options.out)
    runs = None if options.runs is None else expanded(options.runs)
    comparison = Ablation(experiment, source, folder, options.jobs, options.retry, runs, say).run()
    print_comparison(comparison)
    say(f"experiment folder: {folder} (open {folder / 'report.html'} in a browser)")


def print_comparison(comparison: Comparison) -> None:
    """The table, on a terminal as wide as it is."""
    from rich.console import Console
    from rich.table import Table

    from scratchlm.experiments.comparison import cells, sentences, shown_columns

    names = ("variant", "rate", "seeds", "loss", "bits", "difference", "verdict", "speed", "parameters")
    columns = [(name, title) for name, title in shown_columns(comparison) if name in names]
    table = Table()
    for name, title in columns:
        table.add_column(title, justify="left" if name in ("variant", "verdict", "rate") else "right")
    for row in comparison.rows:
        found = cells(row)
        table.add_row(*(found[name] for name, _ in columns))
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160).print(table)
    for sentence in sentences(comparison):
        say(sentence)
    for row in comparison.rows:
        for note in row.notes:
            say(f"{row.variant}: {note}")


LR_USAGE = "scratchlm lr RECIPE.toml [--low 0.001] [--high 30] [--rise-steps 200] [--field value …]"


class LearningRateArguments(Recipe):
    """Find the learning rates that work: one short run in which they rise from far too small to far too large.

    Every field of the recipe is an option, too.
    """

    low: float = Field(
        default=1e-3, gt=0, description="The run begins with the recipe's learning rates times this."
    )
    high: float = Field(default=30.0, gt=0, description="And ends with them times this, unless it breaks before.")
    rise_steps: int = Field(default=200, ge=20, le=100_000, description="Steps from one to the other.")


def learning_rate(arguments: list[str]) -> None:
    """``scratchlm lr RECIPE.toml``"""
    if not arguments:
        raise UserError(f"which recipe? usage: {LR_USAGE}")
    if arguments[0] in ("-h", "--help"):
        parse(LearningRateArguments, ["--help"], prog=LR_USAGE)
    if arguments[0].startswith("-"):
        raise UserError(f"name the recipe first: {LR_USAGE}")
    path, *rest = arguments
    given = load_recipe(path, take_preset(rest))
    fields = {name: getattr(given, name) for name in Recipe.model_fields}
    options = parse(LearningRateArguments, rest, prog=LR_USAGE, default=LearningRateArguments(**fields))
    recipe = Recipe(**{name: getattr(options, name) for name in fields})
    before_torch()
    from scratchlm.experiments.learning_rates import find_learning_rate, in_words, rising

    run = rising(recipe, options.low, options.high, options.rise_steps)
    for line in in_words(find_learning_rate(run, say=say)):
        say(line)
    say(f"run folder: {run.folder} (see {run.folder / 'lr.png'})")
