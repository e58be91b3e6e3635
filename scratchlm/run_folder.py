"""A run's folder: whose it is, what is done in it, and how long that took."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scratchlm.config import Recipe, load_recipe, save_recipe
from scratchlm.errors import UserError
from scratchlm.files import disk_errors, lock, read_json, write_json
from scratchlm.section import Section, flat_fields

_ELSEWHERE = {
    # Fields that say where and how to work; the model that comes out is the same.
    "name", "out", "evaluate", "generate", "data.cache", "data.workers",
    "train.trackers", "train.project", "train.keep_checkpoints", "train.checkpoint_interval",
    "train.eval_interval", "train.log_interval", "train.max_non_finite", "train.memory_limit",
    "model.vocab_size",  # its resolved value is part of the training's key
}  # fmt: skip

_ROUNDING = {
    # Fields that choose another way to compute the same: a run may go on with another one, in other last digits.
    "device", "threads", "model.kernels", "model.attention_kernel", "train.precision", "train.weights", "train.fp8",
    "train.compile", "train.compile_mode", "train.cuda_graph", "train.loss_kernel", "train.activation_checkpointing", "train.micro_batch", "train.accumulation", "optim.implementation",
    "model.linear.form", "model.linear.chunk", "model.moe.dispatch",
}  # fmt: skip


_LATER = {
    "corpus.hold_out": "documents", "train.weights": "fp32", "train.fp8": False, "train.compile_mode": "default",
    "train.cuda_graph": False,
}  # fmt: skip
"""Fields that came when runs of their default had been made already: with it they are left out, so that such a run is still the same run."""


def fields_of(recipe: Section) -> dict[str, Any]:
    """Every field of a recipe that bears on the trained weights, dotted, as plain values."""
    return {
        name: json.loads(json.dumps(value, default=str))
        for name, value in flat_fields(recipe).items()
        if name not in _ELSEWHERE and name.split(".")[0] not in _ELSEWHERE and (name, value) not in _LATER.items()
    }


def what_is_learnt(recipe: Section) -> dict[str, Any]:
    """The fields that decide what is learnt: two runs equal in these are the same run."""
    return {name: value for name, value in fields_of(recipe).items() if name not in _ROUNDING}


class RunFolder:
    """The folder of one run and its records: steps.json (keys of what is done) and timings.json.

    Args:
        recipe: the resolved recipe.
        say: receives one-line messages.
    """

    def __init__(self, recipe: Recipe, say: Callable[[str], None]) -> None:
        self.path = recipe.folder
        self.recipe = recipe
        self.say = say

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def has_checkpoints(self) -> bool:
        return any((self.path / "checkpoints").glob("step-*"))

    def claim(self) -> None:
        """Make the folder, or make sure that it is this run's.

        Raises:
            UserError: it is a file, holds something else, or holds a run that learns something else.
        """
        with disk_errors(self.path):
            if self.path.exists() and not self.path.is_dir():
                raise UserError(f"{self.path} is a file; choose another --out")
            self.path.mkdir(parents=True, exist_ok=True)
        if not is_run(self.path) and (others := visible(self.path)):
            raise UserError(
                f"{self.path} exists and holds other content ({others[0]}); choose another --out or empty it"
            )
        if not is_run(self.path) or not self.has_checkpoints:
            return
        saved = load_recipe(self / "recipe.toml")
        before, now = _LATER | fields_of(saved), _LATER | fields_of(self.recipe)
        for name in now:
            if name not in _ROUNDING and before.get(name) != now[name]:
                raise UserError(
                    f"{self.path} holds a run with {name} = {before.get(name)!r}, now it is {now[name]!r}: choose "
                    "another --out, or --fresh to move that run aside"
                )
        if changed := [name for name in sorted(_ROUNDING) if before.get(name) != now[name]]:
            self.say(f"going on with another {', '.join(changed)}: results may differ in the last digits")

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Keep a second process out of the folder."""
        return lock(
            self / ".lock",
            wait=False,
            busy=f"another process is working in {self.path}; wait for it or choose another --out",
        )

    def save_recipe(self) -> None:
        save_recipe(self.recipe, self / "recipe.toml")

    # --- records -----------------------------------------------------------------------------------------------------

    def _read(self, name: str) -> dict[str, Any]:
        path = self / name
        found = read_json(path, "run file") if path.exists() else {}
        if not isinstance(found, dict):
            raise UserError(f"{path} is damaged; delete it, the steps are then checked anew")
        return found

    def key(self, step: str) -> str | None:
        """The key under which `step` was last done."""
        return self._read("steps.json").get(step)

    def set_key(self, step: str, key: str) -> None:
        write_json(self / "steps.json", {**self._read("steps.json"), step: key})

    def refuse_change(self, step: str, key: str, what: str) -> None:
        """A run that has checkpoints goes on with what it began with, or not at all.

        Raises:
            UserError: it has checkpoints, and `step` was done under another key.
        """
        if self.has_checkpoints and self.key(step) not in (key, None):
            raise UserError(
                f"{what} has changed since {self.path} was begun: choose another --out, "
                "or --fresh to move that run aside"
            )

    def finish(self, step: str, key: str | None, action: str, seconds: float, note: str = "") -> None:
        """Record a step's key and time, and say what happened: it was ``built``, ``resumed`` or ``skipped``."""
        if key is not None:
            self.set_key(step, key)
        timings = self._read("timings.json")
        if action != "skipped" or step not in timings:
            timings[step] = {"seconds": round(seconds, 2), "action": action}
            write_json(self / "timings.json", timings)
        spent = "" if action == "skipped" else f" in {seconds:.1f} s"
        verb = {"skipped": "up to date, skipped", "built": "done", "resumed": "resumed and done"}[action]
        self.say(f"{step:<10} {verb}{spent}{': ' if note else ''}{note}")


def visible(folder: Path) -> list[str]:
    """Names in `folder` that do not start with a dot."""
    with disk_errors(folder):
        return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def is_run(folder: Path) -> bool:
    """Whether `folder` is a run's."""
    return (folder / "recipe.toml").exists()


def move_aside(folder: Path) -> Path | None:
    """Rename a run's folder to ``<name>.old-1`` (or the next free number); None if there is nothing to move.

    Raises:
        UserError: it holds something else than a run, or another process is working in it.
    """
    folder = folder.resolve()
    if not folder.exists():
        return None
    if not folder.is_dir() or (visible(folder) and not is_run(folder)):
        raise UserError(f"{folder.name} is not a run's folder, so --fresh leaves it alone; choose another --out")
    if folder == Path.cwd():
        raise UserError("--fresh cannot move the folder you are in; choose another --out")
    number = 1
    while (target := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    with (
        lock(folder / ".lock", wait=False, busy=f"another process is working in {folder.name}; wait for it"),
        disk_errors(target),
    ):
        folder.rename(target)
    return target
