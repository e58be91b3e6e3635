"""``scratchlm profile``: a recipe's training step, measured."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from scratchlm.arguments import parse
from scratchlm.commands.shared import say, take_preset, write
from scratchlm.config import Recipe, load_recipe
from scratchlm.errors import UserError
from scratchlm.threads import before_torch

if TYPE_CHECKING:
    from rich.table import Table

    from scratchlm.resources.profile import Profile

USAGE = "scratchlm profile RECIPE.toml [--json] [--steps N] [--out FOLDER] [--field value …]"


class ProfileArguments(Recipe):
    """Train a recipe for a few steps and say where time and memory go. Its run's folder is not touched; nothing is built: the
    run's token shards are used if they are there, else random ids. Every field of the recipe is an option. --json: print
    profile.json.
    """

    out: Path | None = Field(
        default=None, description="The profile's folder; None: runs/<name>.profile-<n>, a new one."
    )
    overwrite: bool = Field(default=False, description="Replace the profile in --out.")
    steps: int = Field(default=10, ge=1, le=10**6, description="Timed steps.")
    warmup: int = Field(default=3, ge=1, le=10**6, description="Steps before them; the first one compiles.")
    top: int = Field(default=15, ge=1, le=10**4, description="Rows of the tables on the screen.")


def profile(arguments: list[str]) -> None:
    """``scratchlm profile RECIPE``"""
    if not arguments:
        raise UserError(f"which recipe? usage: {USAGE}")
    if arguments[0] in ("-h", "--help"):
        parse(ProfileArguments, ["--help"], prog=USAGE)
    if arguments[0].startswith("-"):
        raise UserError(f"name the recipe first: {USAGE}")
    path, *rest = arguments
    as_json = "--json" in rest
    if as_json:
        rest.remove("--json")
    given = load_recipe(path, take_preset(rest))
    fields = {name: getattr(given, name) for name in Recipe.model_fields if name != "out"}
    options = parse(ProfileArguments, rest, prog=USAGE, default=ProfileArguments(**fields))
    recipe = Recipe(**{name: getattr(options, name) for name in fields}, out=given.out)
    before_torch()
    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "99"
    )  # read when torch is imported: the profiler's greetings to itself
    from scratchlm.resources.profile import default_folder, profile

    folder = default_folder(recipe) if options.out is None else options.out
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        found = profile(
            recipe, folder, steps=options.steps, warmup=options.warmup, overwrite=options.overwrite, say=say
        )
    if as_json:
        write(json.dumps(found.plain(), indent=2) + "\n")
        return
    show(found, options.top)
    say(f"{folder}: {', '.join(found.files)}")


def show(found: Profile, top: int) -> None:
    """The tables of a profile on standard output."""
    from rich.console import Console

    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 110)
    console.print(_phases(found))
    spent = f"{found.tokens_per_second:,.0f} tokens/s; first step {found.first_step:.2f} s"
    if found.compile_seconds is not None:
        spent += f", of which {found.compile_seconds:.2f} s once: compiling, allocating"
    making = 1e3 * found.loader["seconds_per_batch"]
    say(
        f"{spent}\nloader: waiting for batches is {found.loader['share']:.1%} of the step; making one takes {making:.2f} ms\n"
    )
    if found.skipped:
        say(f"{found.skipped} steps had a loss or gradient that was not finite: they end before the update\n")
    console.print(_modules(found, top))
    console.print(_operations(found, top))
    _memory(found)


def _table(title: str, *columns: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for column in columns:
        words = column in ("phase", "module", "class", "operation", "kernel")
        table.add_column(column, justify="left" if words else "right", no_wrap=True)
    return table


def _phases(found: Profile) -> Table:
    table = _table("a step, in milliseconds", "phase", "mean", "std", "p10", "p50", "p90", "p99", "share")
    whole = found.phases["step"].mean or 1.0
    for name, one in found.phases.items():
        values = (one.mean, one.std, one.p10, one.p50, one.p90, one.p99)
        both = name == "forward + backward"
        table.add_row(
            name,
            *(f"{1e3 * value:,.2f}" for value in values),
            f"{one.mean / whole:.1%}",
            style="bold" if name == "step" else "dim" if both else None,
        )
    return table


def _modules(found: Profile, top: int) -> Table:
    note = ", run without torch.compile" if found.modules_eager else ""
    table = _table(
        f"by module, all layers together{note}; milliseconds per step, own time first",
        *("module", "class", "calls", "forward\nself", "forward\ntotal", "backward\nself", "backward\ntotal"),
    )
    for row in found.places()[:top]:
        times = (row.forward_self, row.forward_total, row.backward_self, row.backward_total)
        table.add_row(
            _cut(row.path, 36), _cut(row.kind, 18), f"{row.calls:,.0f}", *(f"{time:,.2f}" for time in times)
        )
    return table


def _operations(found: Profile, top: int) -> Table:
    rows, what = (found.kernels, "kernel") if found.kernels else (found.operations, "operation")
    table = _table(f"by {what}; milliseconds per step", what, "calls", "self", "total", "share")
    for row in rows[:top]:
        times = (f"{row.self_time:,.2f}", f"{row.total_time:,.2f}")
        table.add_row(_cut(row.name, 64), f"{row.calls:,.0f}", *times, f"{row.share:.1%}")
    return table


def _cut(name: str, most: int) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _memory(found: Profile) -> None:
    timeline = found.memory
    stays = ", ".join(f"{name} {_size(size)}" for name, size in timeline.standing.items() if size)
    say(f"memory that stays: {stays}")
    for name, peaks in timeline.by_phase().items():
        shown = [f"{what} {_size(peak)}" for what, peak in peaks.items() if peak is not None]
        say(f"  {name:<10} at most {', '.join(shown)}")


def _size(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
