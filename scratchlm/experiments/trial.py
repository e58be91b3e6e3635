"""One run of an experiment, in a process of its own that :mod:`scratchlm.experiments.queue` starts.

The run is an ordinary one, in an ordinary run folder, trained as ``scratchlm train`` does. What it came to is written beside it when it is
complete, and why it failed if it does. Killed at any moment, it goes on from its last checkpoint the next time; it stops by itself when whoever
started it is gone.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

from scratchlm.config import Recipe, load_recipe
from scratchlm.errors import UserError
from scratchlm.experiments.results import FAILURE, Failure, Result, figures_of
from scratchlm.files import lock, stable_hash
from scratchlm.run_folder import fields_of
from scratchlm.train.metrics import read_metrics


def key_of(recipe: Recipe) -> str:
    """Hash of all that the run's result depends on: its name, folder and cache are not among it."""
    return stable_hash(fields_of(recipe))


def run_trial(recipe: Recipe, key: str) -> Result:
    """Train, and write ``result.json`` into the run's folder.

    Raises:
        UserError: as training does.
    """
    from scratchlm.pipeline import Pipeline

    folder = recipe.folder
    # A process that lost its starter may still be writing its last checkpoint there.
    with lock(folder / ".lock", busy=f"waiting for another process in {folder}"):
        pass
    pipeline = Pipeline(recipe, show_progress=False)
    pipeline.run(until="train")
    result = result_of(recipe, key, pipeline.model_config.vocab_size)
    result.save(folder)
    return result


def result_of(recipe: Recipe, key: str, vocab_size: int) -> Result:
    """What the trained run in `recipe`'s folder came to."""
    from scratchlm.model.draw.cost import growing_and_bounded_bytes
    from scratchlm.model.draw.hollow import hollow
    from scratchlm.model.shape import count
    from scratchlm.train.checkpoint import checkpoints

    config = recipe.model.model_copy(update={"vocab_size": vocab_size})
    counted = count(config)
    growing, bounded = growing_and_bounded_bytes(config)
    last = checkpoints(recipe.folder / "checkpoints")[-1]
    return Result(
        key=key,
        **figures_of(read_metrics(recipe.folder / "metrics.jsonl")),
        parameters=counted.total,
        active_parameters=counted.active,
        flops_per_token=float(hollow(config).training_flops_per_token(config.context_length)),
        cache_bytes_per_token=growing,
        cache_bytes_bounded=bounded,
        peak_memory=peak_memory(recipe.device),
        skipped=last.progress().skipped,
    )


def peak_memory(device: str) -> int:
    """Bytes: the most that tensors held on CUDA, else the most that was resident."""
    import torch

    from scratchlm.train.precision import choose_device

    chosen = choose_device(device)
    if chosen.type == "cuda":
        return int(torch.cuda.max_memory_allocated(chosen))
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def _stop_when_alone() -> None:
    """End this process, as a signal would, when its parent is gone: its place in the queue is, too."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def main(arguments: list[str] | None = None) -> int:
    """The process: 0 when the result is written, 1 when the failure is, 128 + n after signal n."""
    from scratchlm.threads import before_torch

    _stop_when_alone()
    path, key = (sys.argv[1:] if arguments is None else arguments)[:2]
    recipe = load_recipe(path)
    before_torch()
    (recipe.folder / FAILURE).unlink(missing_ok=True)
    try:
        run_trial(recipe, key)
    except Exception as error:
        number = getattr(error, "signal_number", None)  # train.loop.Interrupted
        if number is not None:
            print(error, file=sys.stderr)
            return 128 + int(number)
        if not isinstance(error, UserError):
            import traceback

            traceback.print_exc()
        message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        print(message, file=sys.stderr)
        Failure(key, " ".join(message.split())[:500]).save(_existing(recipe.folder))
        return 1
    return 0


def _existing(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
