"""``scratchlm run``, ``train`` and ``data prepare``: the steps of a recipe."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scratchlm.arguments import parse
from scratchlm.commands.shared import say, take_preset
from scratchlm.config import Recipe, load_recipe
from scratchlm.errors import UserError
from scratchlm.files import read_json
from scratchlm.threads import before_torch

if TYPE_CHECKING:
    from scratchlm.evaluate.metrics import Evaluation
    from scratchlm.pipeline import Pipeline


def _pipeline(arguments: list[str], command: str) -> Pipeline:
    """Read ``RECIPE.toml [--fresh] [--field value …]`` and claim the run's folder."""
    prog = f"scratchlm {command} RECIPE.toml [--fresh]"
    if not arguments or arguments[0] in ("-h", "--help"):
        if not arguments:
            raise UserError(f"which recipe? usage: scratchlm {command} RECIPE.toml [--field value …]")
        parse(Recipe, ["--help"], prog=prog)
    if arguments[0].startswith("-"):
        raise UserError(f"name the recipe first: scratchlm {command} RECIPE.toml {' '.join(arguments)}")
    path, *rest = arguments
    fresh = "--fresh" in rest
    if fresh:
        rest.remove("--fresh")
    preset = take_preset(rest)
    recipe = parse(
        Recipe,
        rest,
        prog=prog,
        default=load_recipe(path, preset),
        description="A recipe's fields as options. --fresh: move the existing run's folder aside and start anew. "
        "--model.preset NAME: a known architecture in place of the recipe's [model] (see `scratchlm model list`).",
    )
    before_torch()
    from scratchlm.pipeline import Pipeline
    from scratchlm.run_folder import move_aside

    if fresh and (moved := move_aside(recipe.folder)):
        say(f"{recipe.folder} moved to {moved}")
    return Pipeline(recipe, say=say)


def run(arguments: list[str]) -> None:
    """``scratchlm run``: every step, then what came of it."""
    pipeline = _pipeline(arguments, "run")
    pipeline.run()
    _summary(pipeline.folder.path)


def train(arguments: list[str]) -> None:
    """``scratchlm train``: tokenizer, data and training."""
    pipeline = _pipeline(arguments, "train")
    pipeline.run(until="train")
    say(f"run folder: {pipeline.folder.path}")


def data_prepare(arguments: list[str]) -> None:
    """``scratchlm data prepare``: tokenizer and token shards."""
    pipeline = _pipeline(arguments, "data prepare")
    pipeline.run(until="data")
    say(f"token shards: {pipeline.data.folder}")


def _summary(folder: Path) -> None:
    """The end of a run: a sample, a table, and where everything lies."""
    from scratchlm.evaluate.metrics import Evaluation
    from scratchlm.evaluate.samples import read_samples

    samples = read_samples(folder / "samples.txt")
    if samples:
        say(f"\na sample, from the prompt {samples[0].prompt!r}:\n")
        say("\n".join(f"    {line}" for line in (samples[0].prompt + samples[0].continuation).splitlines()))
    say("")
    print_table(Evaluation.load(folder / "evaluation.json"), speed=_median_speed(folder))
    seconds = {step: timing["seconds"] for step, timing in read_json(folder / "timings.json", "run file").items()}
    say("seconds: " + ", ".join(f"{step} {spent:,.1f}" for step, spent in seconds.items()))
    say(f"run folder: {folder} (open {folder / 'report.html'} in a browser)")


def _median_speed(folder: Path) -> float | None:
    from scratchlm.train.metrics import read_metrics

    records = read_metrics(folder / "metrics.jsonl")
    speeds = [record["tokens_per_second"] for record in records if record.get("kind") == "train"]
    return float(np.median(speeds)) if speeds else None


def print_table(result: Evaluation, speed: float | None = None) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{result.text_bytes:,} held-out bytes in {result.documents:,} documents", title_justify="left"
    )
    table.add_column("measure")
    table.add_column("value", justify="right")
    rows = [
        ("validation loss, nats per token", f"{result.loss:.4f}"),
        ("perplexity", f"{result.perplexity:.2f}"),
        ("bits per byte", f"{result.bits_per_byte:.4f}"),
        *((f"bits per byte, {name}", f"{found.bits_per_byte:.4f}") for name, found in result.compressors.items()),
    ]
    if speed is not None:
        rows.append(("training speed, tokens/s", f"{speed:,.0f}"))
    for row in rows:
        table.add_row(*row)
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 100).print(table)
