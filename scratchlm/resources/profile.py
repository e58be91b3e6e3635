"""Where a training step's time and memory go, measured: the recipe is trained for a few steps, as its run would be.

Each thing is measured in steps of its own, so that none disturbs another: first the clock alone, then torch.profiler, then
memory. Nothing is learnt that is kept, and the run's folder is not touched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from scratchlm.config import Recipe, plain
from scratchlm.data.prefetch import Prefetcher
from scratchlm.errors import UserError
from scratchlm.evaluate.environment import describe_environment
from scratchlm.files import atomic_directory, disk_errors, expanded, new_folder, write_bytes, write_json
from scratchlm.model.transformer import Transformer
from scratchlm.resources import profile_memory as memory
from scratchlm.resources.plan import plan_of
from scratchlm.resources.profile_data import material, open_loader
from scratchlm.resources.profile_table import (
    PHASE,
    MarkedLoss,
    ModuleRow,
    OperationRow,
    ProfilerRanges,
    by_place,
    marked_modules,
    module_rows,
    operation_rows,
)
from scratchlm.resources.profile_timing import (
    PHASES,
    PhaseClock,
    Ranges,
    Statistics,
    SteppingTrainer,
    TimedLoader,
    phase_ranges,
)
from scratchlm.train.loss import loss_options
from scratchlm.train.precision import choose_device
from scratchlm.train.task import Loader

REPORT = "profile.json"
_TRACED_STEPS = 2
_MEMORY_STEPS = 2


@dataclass
class Profile:
    """What was measured.

    Attributes:
        name: the recipe's.
        settings: ``device``, ``precision``, ``compile`` (each choice with its reason), ``batch_size``, ``accumulation``,
            ``context_length``, ``parameters``, ``data`` (a sentence) and ``own_data``.
        first_step: seconds of the very first step, which compiles, allocates and fills caches (fitting micro-batches does so before it).
        phases: phase → seconds per step; beside the phases ``forward + backward`` and ``step``.
        tokens_per_step: targets of a step, on average.
        tokens_per_second: on CUDA of steps in which nothing waits for the device between the phases.
        loader: ``share`` of the step spent waiting for batches, ``seconds_per_batch`` in the thread that makes them.
        modules: by module, in milliseconds per step.
        modules_eager: the model was run without torch.compile for that table.
        operations, kernels: by operation on the processor, and by kernel on the device (empty without one).
        memory: of a few steps.
        skipped: steps with a loss or gradient that was not finite, which end before the update.
        environment: machine and versions.
        files: what lies in the folder.
    """

    name: str
    settings: dict[str, Any]
    first_step: float
    warmup: list[float]
    phases: dict[str, Statistics]
    tokens_per_step: float
    tokens_per_second: float
    loader: dict[str, float]
    modules: list[ModuleRow]
    modules_eager: bool
    operations: list[OperationRow]
    kernels: list[OperationRow]
    memory: memory.MemoryTimeline
    skipped: int
    environment: dict[str, Any]
    files: list[str] = field(default_factory=list)

    @property
    def compile_seconds(self) -> float | None:
        """What the first step took beyond a common one, if torch.compile is on."""
        if self.settings["compile"] != "on":
            return None
        return max(0.0, self.first_step - self.phases["step"].p50)

    def places(self) -> list[ModuleRow]:
        """The table by module with all layers added up, most own time first."""
        return sorted(by_place(self.modules), key=lambda row: -row.self_time)

    def plain(self) -> dict[str, Any]:
        """As plain JSON values: profile.json. Times of tables are in milliseconds, all others in seconds."""
        return {
            "name": self.name,
            "settings": self.settings,
            "first_step_seconds": self.first_step,
            "compile_seconds": self.compile_seconds,
            "warmup_seconds": self.warmup,
            "phases": {name: dataclasses.asdict(found) for name, found in self.phases.items()},
            "tokens_per_step": self.tokens_per_step,
            "tokens_per_second": self.tokens_per_second,
            "loader": self.loader,
            "modules_eager": self.modules_eager,
            "modules": [dataclasses.asdict(row) for row in self.modules],
            "operations": [dataclasses.asdict(row) for row in self.operations],
            "kernels": [dataclasses.asdict(row) for row in self.kernels],
            "memory": self.memory.plain(),
            "skipped_steps": self.skipped,
            "environment": self.environment,
            "files": self.files,
        }


def default_folder(recipe: Recipe) -> Path:
    """``runs/<name>.profile-1`` or the next free number: beside the run's folder, which a run claims for itself."""
    number = 1
    while (folder := recipe.folder.with_name(f"{recipe.folder.name}.profile-{number}")).exists():
        number += 1
    return folder


def profile(
    recipe: Recipe,
    out: str | Path | None = None,
    *,
    steps: int = 10,
    warmup: int = 3,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
    clock: Callable[[], float] = time.perf_counter,
    loader: Loader | None = None,
) -> Profile:
    """Train `recipe` for a few steps from random weights, and write what they took.

    Args:
        recipe: its model, loss, optimizer, precision, torch.compile and loader are those of its run. Its data too, if its
            run has made the shards; else random token ids.
        out: the profile's folder: profile.json, trace.json.gz, memory.png, on CUDA also memory-snapshot.pickle; None:
            :func:`default_folder`.
        steps: timed steps.
        warmup: steps before them, at least 1.
        overwrite: replace a profile that is there.
        say: receives one-line messages.
        clock: seconds; of the phases.
        loader: batches, in place of the recipe's loader, and taken as they come: no thread works ahead.

    Raises:
        UserError: `out` exists, the recipe demands what the machine lacks, or the numbers of steps are out of range.
    """
    if steps < 1 or warmup < 1:
        raise UserError(f"steps = {steps} and warmup = {warmup} must be at least 1")
    folder = _claim(default_folder(recipe) if out is None else expanded(out), overwrite)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    device = choose_device(recipe.device)
    with contextlib.ExitStack() as stack:
        found = material(recipe)
        timed = TimedLoader(open_loader(recipe, found) if loader is None else loader)
        batches = timed if loader is not None else stack.enter_context(Prefetcher(timed))
        data = found.source if loader is None else "the caller's batches"
        config = recipe.model.model_copy(update={"vocab_size": found.vocab_size})
        model = Transformer(config, seed=recipe.seed)
        train = recipe.train
        loss = MarkedLoss(model, **loss_options(train))
        trainer = SteppingTrainer(
            model=model,
            loss=loss,
            loader=batches,
            config=train,
            optim=recipe.optim,
            folder=folder,
            device=device,
            seed=recipe.seed,
            plan=plan_of(config, recipe.optim, train, device_type=device.type),
            say=say,
            show_progress=False,
        )
        waiting = PhaseClock(
            clock, functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else None
        )
        precision, compiling = trainer.prepare(waiting)
        settings = {
            "device": str(device),
            "precision": precision.value,
            "precision_reason": precision.reason,
            "compile": compiling.value,
            "compile_reason": compiling.reason,
            "compile_mode": train.compile_mode,
            "weights": train.weights,
            "fp8": train.fp8,
            "batch_size": train.batch_size,
            "accumulation": trainer.parts,
            "context_length": config.context_length,
            "parameters": model.num_params(),
            "data": data,
            "own_data": found.own and loader is None,
        }
        say(
            f"profiling on {device}: {model.num_params():,} parameters, {precision.value}, compile {compiling.value}, {data}"
        )
        if train.cuda_graph:
            say("profiled as launched, one kernel after the other: without train.cuda_graph")
        temporary = stack.enter_context(atomic_directory(folder))  # all files at once, at the end
        before = [trainer.step()[0]["step"] for _ in range(warmup)]
        # The compiler may have failed, or memory.
        settings |= {"compile": trainer.state.compile, "accumulation": trainer.parts}
        already = len(timed.seconds)
        measured = [trainer.step() for _ in range(steps)]
        making = timed.seconds[already:] or timed.seconds
        tokens = sum(targets for _, targets in measured)
        phases = _phases([seconds for seconds, _ in measured])
        speed = tokens / max(sum(seconds["step"] for seconds, _ in measured), 1e-12)
        if device.type == "cuda":
            speed = _free_running(trainer, steps, clock)
        seen, traced_modules = _trace(trainer, loss, temporary / "trace.json.gz", device)
        averages = seen.key_averages()
        alone = trainer.parts == 1  # then no gradient is widened to be added to
        own = trainer.update.with_gradients() if alone else None
        standing = memory.standing_bytes(model, trainer.optimizers, loss.model, own)
        if device.type == "cuda":
            path = temporary / "memory-snapshot.pickle"
            timeline = memory.on_cuda(trainer.step, waiting.observers, standing, _MEMORY_STEPS, path, device)
        else:
            trainer.optimizers.zero_grad()  # gradients come anew, before the eyes of the profiler
            timeline = memory.on_cpu(trainer.step, waiting.observers, standing, _MEMORY_STEPS)
        write_bytes(
            temporary / "memory.png", memory.picture(timeline, f"{recipe.name}: {_MEMORY_STEPS} training steps")
        )
        by_module = seen
        if not traced_modules:
            loss.eager()
            trainer.step()
            by_module, _ = _trace(trainer, loss, temporary / "trace-eager.json.gz", device)
        result = Profile(
            name=recipe.name,
            settings=settings,
            first_step=before[0],
            warmup=before,
            phases=phases,
            tokens_per_step=tokens / steps,
            tokens_per_second=speed,
            loader={
                "share": phases["loader"].mean / max(phases["step"].mean, 1e-12),
                "seconds_per_batch": sum(making) / len(making),
            },
            modules=module_rows(by_module.events(), loss.model, _TRACED_STEPS),
            modules_eager=not traced_modules,
            operations=operation_rows(averages, _TRACED_STEPS, device=False),
            kernels=operation_rows(averages, _TRACED_STEPS, device=True),
            memory=timeline,
            skipped=trainer.non_finite,
            environment=describe_environment(model.num_params()),
        )
        result.files = sorted([REPORT, *(path.name for path in temporary.iterdir())])
        write_json(temporary / REPORT, {**result.plain(), "recipe": plain(recipe)})
    return result


def _claim(folder: Path, overwrite: bool) -> Path:
    """The folder, if it is free or holds a profile that may go.

    Raises:
        UserError: it is there, and is not to be replaced or is no profile.
    """
    with disk_errors(folder):
        if not folder.is_dir() or not any(folder.iterdir()):
            return new_folder(folder)
    if not overwrite:
        raise UserError(f"{folder} exists; choose another --out, or --overwrite True")
    if not (folder / REPORT).is_file():
        raise UserError(f"{folder} holds something else than a profile (no {REPORT}); choose another --out")
    return folder


def _phases(steps: list[dict[str, float]]) -> dict[str, Statistics]:
    found = {phase: Statistics.of([seconds[phase] for seconds in steps]) for phase in PHASES}
    both = Statistics.of([seconds["forward"] + seconds["backward"] for seconds in steps])
    return {**found, "forward + backward": both, "step": Statistics.of([seconds["step"] for seconds in steps])}


def _free_running(trainer: SteppingTrainer, steps: int, clock: Callable[[], float]) -> float:
    """Tokens per second when the processor runs ahead of the device, as in a run."""
    phases = trainer.clock
    wait, phases.wait = phases.wait, None
    torch.cuda.synchronize(trainer.device)
    started = clock()
    tokens = sum(trainer.step()[1] for _ in range(steps))
    torch.cuda.synchronize(trainer.device)
    spent = clock() - started
    phases.wait = wait
    return tokens / max(spent, 1e-12)


def _trace(
    trainer: SteppingTrainer, loss: MarkedLoss, path: Path, device: torch.device
) -> tuple[torch.profiler.profile, bool]:
    """A few steps under torch.profiler; modules are marked if the model is not compiled.

    Compiled code has no modules left, and hooks would have it compiled anew.

    Returns:
        The profiler, and whether modules were marked. The Chrome trace lies in `path`.
    """
    marks: list[Ranges] = [ProfilerRanges()]
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        marks.append(torch.cuda.nvtx)
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    eager = not loss.compiled
    observers = [phase_ranges(ranges, lambda phase: PHASE + phase) for ranges in marks]
    trainer.clock.observers += observers
    loss.ranges = marks if eager else ()
    modules = marked_modules(loss.model, marks) if eager else contextlib.nullcontext()
    try:
        # The first step under the profiler pays for its start and is not kept.
        schedule = torch.profiler.schedule(wait=0, warmup=1, active=_TRACED_STEPS, repeat=1)
        with modules, torch.profiler.profile(activities=activities, schedule=schedule, acc_events=True) as seen:
            for _ in range(1 + _TRACED_STEPS):
                trainer.step()
                seen.step()
    finally:
        loss.ranges = ()
        for observer in observers:
            trainer.clock.observers.remove(observer)
    seen.export_chrome_trace(str(path))
    return seen, eager
