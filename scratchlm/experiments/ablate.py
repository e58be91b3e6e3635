"""An experiment from its spec to its pages: data, runs, table, report.

::

    spec ──► every recipe ──► tokenizers, shards ──► queue of runs ──► table.md  table.csv  results.json  report.html  pictures/

The experiment's folder::

    runs/<name>/
        spec.toml       as it was given (the recipe it builds on is in every run's folder)
        data/           a folder per tokenizer and corpus
        trials/         recipe and log of every run
        runs/           the runs: ordinary run folders, with result.json or failure.json
        table.md …      written anew after every session of work, also an unfinished one
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from scratchlm.config import Recipe, plain
from scratchlm.errors import UserError
from scratchlm.experiments.comparison import Comparison, as_csv, as_markdown, as_records, compare
from scratchlm.experiments.live import Live
from scratchlm.experiments.plan import Plan, Planner
from scratchlm.experiments.queue import Queue, Stopped
from scratchlm.experiments.report import write_pictures, write_report
from scratchlm.experiments.spec import Experiment, Variant
from scratchlm.files import disk_errors, lock, stable_hash, write_bytes, write_json, write_text
from scratchlm.run_folder import visible

MARKER = "spec.toml"


@dataclass
class Ablation:
    """Runs an experiment.

    Args:
        experiment: from :func:`scratchlm.experiments.spec.load_experiment`.
        source: the spec's file, of which a copy is kept.
        folder: the experiment's.
        jobs: runs at once.
        retry: run again what failed.
        runs: where the runs lie, which other experiments may share; None: in `folder`.
        say: receives one-line messages.
        show_progress: show bars and the lines of runs at work.

    Raises:
        UserError: the folder holds something else.
    """

    experiment: Experiment
    source: Path
    folder: Path
    jobs: int = 1
    retry: bool = False
    runs: Path | None = None
    say: Callable[[str], None] = print
    show_progress: bool = True

    def run(self) -> Comparison:
        """Everything that is not finished, then the table and the report; they are written if the work is stopped, too.

        Raises:
            UserError: data cannot be prepared, or the budget cannot be met by the reference.
            Stopped: by a signal.
        """
        self._claim()
        with lock(
            self.folder / ".lock",
            wait=False,
            busy=f"another process works on {self.folder}; wait for it, or choose another --out",
        ):
            write_bytes(self.folder / MARKER, self.source.read_bytes())
            prepared = self._prepared()
            planner = Planner(prepared, self.runs or self.folder / "runs", _compiling)
            with Live() as live:
                queue = Queue(
                    planner,
                    self.folder,
                    self.jobs,
                    gpus=_gpus(prepared),
                    retry=self.retry,
                    watch=live.show if self.show_progress else lambda queue, plan: None,
                )
                stopped: Stopped | None = None
                try:
                    plan = queue.run()
                except Stopped as error:
                    stopped, plan = error, planner.plan(queue.outcome)
            comparison = self._write(prepared, planner, plan, queue)
            if stopped is not None:
                raise stopped
        return comparison

    def _claim(self) -> None:
        """The folder is new, empty, or an experiment's."""
        with disk_errors(self.folder):
            if self.folder.exists() and not self.folder.is_dir():
                raise UserError(f"{self.folder} is a file; choose another --out")
            self.folder.mkdir(parents=True, exist_ok=True)
        others = visible(self.folder)
        if others and MARKER not in others:
            raise UserError(f"{self.folder} exists and holds other content ({others[0]}); choose another --out")

    def _prepared(self) -> Experiment:
        """Tokenizers and shards of all variants, each once, before many processes want them; then vocabularies are known."""
        from scratchlm.pipeline import Pipeline

        sizes: dict[str, int] = {}
        variants: list[Variant] = []
        for variant in self.experiment.variants:
            recipe = variant.recipe
            needs = {name: plain(getattr(recipe, name)) for name in ("corpus", "tokenizer", "data")}
            key = stable_hash(needs)
            if key not in sizes:
                # A recipe of its own: what the folder's recipe says of the model is no part of these steps.
                place = Recipe(
                    name=f"data-{key[:8]}",
                    out=self.folder / "data" / key[:8],
                    corpus=recipe.corpus,
                    tokenizer=recipe.tokenizer,
                    data=recipe.data,
                    generate=recipe.generate,
                )
                pipeline = Pipeline(place, say=self.say, show_progress=self.show_progress)
                pipeline.run(until="data")
                sizes[key] = pipeline.tokenizer.vocab_size
            size = recipe.model.vocab_size or sizes[key]
            if size < sizes[key]:
                raise UserError(
                    f"variant {variant.name!r}: model.vocab_size = {size} is smaller than the tokenizer's {sizes[key]}"
                )
            model = recipe.model.model_copy(update={"vocab_size": size})
            variants.append(replace(variant, recipe=recipe.model_copy(update={"model": model})))
        return replace(self.experiment, variants=tuple(variants))

    def _write(self, experiment: Experiment, planner: Planner, plan: Plan, queue: Queue) -> Comparison:
        """table.md, table.csv, results.json, report.html, pictures/."""
        comparison = compare(experiment, plan, planner.amount, queue.outcome)
        write_text(self.folder / "table.md", as_markdown(comparison))
        write_text(self.folder / "table.csv", as_csv(comparison))
        write_json(self.folder / "results.json", as_json(comparison, plan, queue))
        write_report(comparison, plan, queue.outcome, self.folder / "report.html")
        write_pictures(comparison, plan, queue.outcome, self.folder / "pictures")
        return comparison


def as_json(comparison: Comparison, plan: Plan, queue: Queue) -> dict[str, object]:
    """results.json: the rows, each run, each choice of a rate; by which spec, on which machine."""
    from scratchlm.evaluate.environment import describe_environment

    spec = comparison.experiment.spec
    return {
        "experiment": comparison.experiment.name,
        "spec": json.loads(spec.model_dump_json()),
        "environment": describe_environment(),
        "budget": vars(comparison.amount),
        "judged_by": comparison.unit,
        "rows": as_records(comparison),
        "rates": {
            name: {"factor": choice.factor, "losses": {f"{f:g}": _plain(v) for f, v in choice.losses.items()}}
            for name, choice in plan.choices.items()
            if choice.losses
        },
        "runs": [
            {
                "variant": trial.variant,
                "purpose": trial.purpose,
                "factor": trial.factor,
                "seed": trial.seed,
                "folder": trial.folder.name,
                "outcome": {name: _plain(value) for name, value in vars(found).items()},
            }
            for trial in plan.trials
            if (found := queue.outcome(trial)) is not None
        ],
    }


def _plain(value: object) -> object:
    """A number as JSON has it: text where it is not finite."""
    return str(value) if isinstance(value, float) and value - value != 0 else value


def _compiling(recipe: Recipe) -> str:
    """Whether a run of this recipe would be compiled."""
    from scratchlm.train.precision import choose_compile, choose_device

    return choose_compile(recipe.train.compile, choose_device(recipe.device), recipe.train.steps).value


def _gpus(experiment: Experiment) -> int:
    """How many GPUs runs can be dealt out to: none where a variant names a device of its own."""
    if any(variant.recipe.device not in ("auto", "cuda") for variant in experiment.variants):
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
