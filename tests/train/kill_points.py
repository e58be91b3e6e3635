"""Run as a script by test_resume.py: train, get killed at a chosen moment, train again; for every moment in turn.

Each training is a forked child of a process that has only imported torch, which saves its seconds of import each time.
usage: kill_points.py FOLDER RESULT.json NAME …
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # torch.optim imports it on first use, a second in every child

import scratchlm.evaluate.metrics
import scratchlm.optim.build
import scratchlm.pipeline
import scratchlm.train.checkpoint as checkpoint
import scratchlm.train.loop as loop
from scratchlm.cli import main
from scratchlm.train.metrics import MetricsFile


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(
    owner: Any, name: str, count: int, before: Callable[..., None] | None = None, after: bool = False
) -> None:
    """Replace ``owner.name`` by itself plus a SIGKILL at its `count`-th call (`before` or after it happens)."""
    original, calls = getattr(owner, name), [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == count and not after:
            if before is not None:
                before(*args, **kwargs)
            kill()
        result = original(*args, **kwargs)
        if calls[0] == count:
            kill()
        return result

    setattr(owner, name, wrapped)


def half_a_file(weights: Any, path: Path, **_: Any) -> None:
    Path(path).write_bytes(b"\x40\x00\x00\x00\x00\x00\x00\x00{half of a header")


def half_a_line(metrics: MetricsFile, record: Any) -> None:
    with metrics.path.open("ab") as file:
        file.write(b'{"kind": "train", "step": 1')


def rename_to_checkpoint(count: int, after: bool) -> None:
    original, calls = Path.rename, [0]

    def rename(self: Path, target: Any) -> Path:
        becomes_checkpoint = Path(target).name.startswith("step-")
        calls[0] += becomes_checkpoint
        if becomes_checkpoint and calls[0] == count and not after:
            kill()
        result = original(self, target)
        if becomes_checkpoint and calls[0] == count:
            kill()
        return result

    Path.rename = rename  # type: ignore[method-assign]


def in_removal() -> None:
    """Delete one file of a checkpoint that is no longer wanted, then be killed."""
    original = shutil.rmtree

    def rmtree(path: Path, **options: Any) -> None:
        if Path(path).name.endswith(".removed"):
            next(Path(path).iterdir()).unlink()
            kill()
        original(path, **options)

    shutil.rmtree = rmtree  # type: ignore[assignment]


def alarm(seconds: float) -> None:
    signal.signal(signal.SIGALRM, lambda *_: kill())
    signal.setitimer(signal.ITIMER_REAL, seconds)


KILL_POINTS: dict[str, Callable[[], None]] = {
    "in the first step": lambda: at_call(scratchlm.optim.build.Optimizers, "step", 1),
    "before the first checkpoint": lambda: at_call(scratchlm.optim.build.Optimizers, "step", 4),
    "between checkpoints": lambda: at_call(scratchlm.optim.build.Optimizers, "step", 13),
    "in the backward pass": lambda: at_call(loop.Trainer, "_gradients", 17, after=True),
    "in the validation": lambda: at_call(scratchlm.evaluate.metrics, "_summed_nats", 3),
    "writing the first checkpoint's weights": lambda: at_call(checkpoint, "save_file", 1, half_a_file),
    "writing a checkpoint's weights": lambda: at_call(checkpoint, "save_file", 5, half_a_file),
    "writing a checkpoint's optimizer": lambda: at_call(checkpoint, "save_file", 6, half_a_file),
    "before a checkpoint gets its name": lambda: rename_to_checkpoint(3, after=False),
    "after a checkpoint got its name": lambda: rename_to_checkpoint(3, after=True),
    "deleting an old checkpoint": in_removal,
    "writing a line of metrics": lambda: at_call(MetricsFile, "log", 5, half_a_line),
    **{f"after {seconds} s": (lambda seconds=seconds: alarm(seconds)) for seconds in (0.3, 0.6, 0.9)},
}


def child(folder: Path, prepare: Callable[[], None] | None, arguments: list[str]) -> int:
    """Train in a forked child; its exit status, or minus the signal that ended it."""
    process = os.fork()
    if process == 0:
        os.chdir(folder)
        output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        torch.set_num_threads(1)
        code = 1
        try:
            if prepare is not None:
                prepare()
            code = main(["train", "small.toml", *arguments])
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status)


def run_all(folder: Path, names: list[str], arguments: list[str]) -> dict[str, Any]:
    results: dict[str, Any] = {"uninterrupted": child(folder, None, ["--out", "runs/whole", *arguments])}
    for number, name in enumerate(names):
        out = f"runs/{number}"
        first = child(folder, KILL_POINTS[name], ["--out", out, *arguments])
        second = child(folder, None, ["--out", out, *arguments])
        results[name] = {"first": first, "second": second, "out": out}
    return results


if __name__ == "__main__":
    target, result, *chosen = sys.argv[1:]
    split = chosen.index("--") if "--" in chosen else len(chosen)
    outcome = run_all(Path(target), chosen[:split], chosen[split + 1 :])
    Path(result).write_text(json.dumps(outcome))
