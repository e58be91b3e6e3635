"""How true the estimates of `scratchlm resources` are on this machine: peak memory and step time, predicted and measured.

Each configuration runs in a process of its own. Memory: glibc is told to give every freed block back at once, so that the resident
set follows the tensors; its highest value over three steps, less what was resident before the model was built, is compared with the
peak of the traced step. What torch's compiler itself holds is none of the model's: a compiled step is compared by how far it rises above
the resident set between two steps, and the tensors that are there then; the rest is written beside it as `compiler`. Time: as `scratchlm train` runs (freed memory is kept), the median of the steps after three for
warming up, compared with the prediction from `scratchlm resources measure`, which must have been run on this machine before.

Start: whole processes of `scratchlm resources`, interleaved with one that only imports torch, by the clock and by the CPU's time: traced anew,
and answered from what was kept of it. Python may write its compiled files, as it does unless one forbids it.

The same on a GPU: ``benchmarks/resources_cuda.py``.

Run: ``python benchmarks/resources.py [--what memory time start] [--steps 12] [--out docs/results/resources]``.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
SMALL = {"vocab_size": 4096, "context_length": 256, "d_model": 256, "layers": 4, "heads": 4}


def case(precision: str = "fp32", rows: int = 8, compile: bool = False, **sections: Any) -> dict[str, Any]:
    """One configuration: sections of a recipe, and how it is run."""
    model = SMALL | sections.pop("model", {})
    return {"precision": precision, "rows": rows, "compile": compile, "model": model, **sections}


MEMORY: dict[str, dict[str, Any]] = {
    "dense fp32": case(),
    "dense bf16": case("bf16"),
    "bf16 weights": case("bf16", train={"weights": "bf16"}),
    "bf16 weights, accumulation": case("bf16", train={"weights": "bf16", "accumulation": 4}, rows=4),
    "wide": case(model={"d_model": 512, "heads": 8}, rows=4),
    "deep": case("bf16", model={"layers": 12}),
    "long context": case(model={"context_length": 2048}, rows=1),
    "long context, window": case(model={"context_length": 2048, "mask": "sliding_window", "window": 256}, rows=1),
    "large vocabulary": case("bf16", model={"vocab_size": 50_257}, rows=4),
    "large vocabulary, all logits": case(model={"vocab_size": 32_000}, rows=4, train={"loss_kernel": "reference"}),
    "experts": case(model={"moe": {"experts": 8, "top_k": 2}}, rows=4),
    "latent attention": case("bf16", model={"attention": "mla", "latent": {"kv_rank": 64, "rope_dim": 32}}),
    "gated delta rule": case(model={"attention": "gated_delta"}, rows=1),
    "muon": case("bf16", optim={"optimizer": "muon"}),
    "sgd": case(optim={"optimizer": "sgd"}),
    "adamw, one tensor at a time": case(
        optim={"implementation": "reference"}, model={"d_model": 512, "heads": 8}, rows=1
    ),
    "accumulation": case(train={"accumulation": 4}, rows=4),
    "checkpointing": case(train={"activation_checkpointing": "blocks"}),
    "checkpointing, selective": case("bf16", train={"activation_checkpointing": "selective"}),
    "checkpointing, deep": case("bf16", model={"layers": 12}, train={"activation_checkpointing": "blocks"}),
    "dense fp32, compiled": case(compile=True),
    "dense bf16, compiled": case("bf16", compile=True),
    "bf16 weights, compiled": case("bf16", train={"weights": "bf16"}, compile=True),
    "wide bf16, compiled": case("bf16", model={"d_model": 512, "heads": 8}, rows=4, compile=True),
    "long context bf16, compiled": case("bf16", model={"context_length": 2048}, rows=1, compile=True),
    "experts, compiled": case(model={"moe": {"experts": 8, "top_k": 2}}, rows=4, compile=True),
    "latent attention, compiled": case(
        "bf16", model={"attention": "mla", "latent": {"kv_rank": 64, "rope_dim": 32}}, compile=True
    ),
    "accumulation, compiled": case(train={"accumulation": 4}, rows=4, compile=True),
    "checkpointing, compiled": case(train={"activation_checkpointing": "blocks"}, compile=True),
}

TIME: dict[str, dict[str, Any]] = {
    "fp32 d 128": case(model={"d_model": 128}, rows=16),
    "fp32 d 256": case(),
    "fp32 d 512": case(model={"d_model": 512, "heads": 8}),
    "bf16 d 128": case("bf16", model={"d_model": 128}, rows=16),
    "bf16 d 256": case("bf16"),
    "bf16 d 512": case("bf16", model={"d_model": 512, "heads": 8}),
    "bf16 d 768, 2 layers": case("bf16", model={"d_model": 768, "heads": 12, "layers": 2}),
    "bf16 long context": case("bf16", model={"context_length": 1024}, rows=2),
    "fp32 GPT-2's choices": case(model={"norm": "layernorm", "feedforward": "gelu_tanh", "position": "learned"}),
    "bf16 muon": case("bf16", optim={"optimizer": "muon"}),
    "bf16 d 256 compiled": case("bf16", compile=True),
    "bf16 d 512 compiled": case("bf16", model={"d_model": 512, "heads": 8}, compile=True),
}


START = {
    "import torch": ["-c", "import torch"],
    "recipes/python-stdlib.toml": [
        "-m",
        "scratchlm",
        "resources",
        "recipes/python-stdlib.toml",
        "--device",
        "h100",
    ],
    "gpt2-xl": ["-m", "scratchlm", "resources", "gpt2-xl", "--device", "h100"],
    "llama-3-70b": ["-m", "scratchlm", "resources", "llama-3-70b", "--device", "h100"],
}


def sections(given: dict[str, Any]) -> tuple[Any, Any, Any]:
    from scratchlm.config import OptimConfig, TrainConfig
    from scratchlm.model import ModelConfig

    return (
        ModelConfig(**given["model"]),
        OptimConfig(**given.get("optim", {})),
        TrainConfig(**given.get("train", {})),
    )


def training(
    given: dict[str, Any], device: Any = None, watch: Callable[[str], None] = lambda phase: None
) -> tuple[Any, Any]:
    """A function that does one step as the trainer does, and one that says how many bytes stay between two steps.

    Args:
        given: the configuration.
        device: where; None: the CPU.
        watch: is told of every phase that is over.
    """
    import torch

    from scratchlm.data.loader import Batch
    from scratchlm.model import Transformer
    from scratchlm.optim import build_optimizers
    from scratchlm.resources.step import CPU
    from scratchlm.train.loss import NextTokenLoss, loss_options
    from scratchlm.train.update import Update
    from scratchlm.train.working_copy import Computing

    device = device or CPU
    config, optim, train = sections(given)
    with device:  # a GPU draws its weights itself: a CPU takes seconds
        model = Transformer(config, seed=0 if device.type == "cpu" else None)
    model.to(device)  # the tables of angles, which are made on a CPU
    loss = NextTokenLoss(model, **loss_options(train))
    computing = Computing(model, given["precision"], train.weights, device)
    if computing.copy is not None:
        loss.use(computing.model)
    if given["compile"]:
        loss.compile()
    optimizers = build_optimizers(model, optim)
    update = Update(optimizers, computing, 1.0)
    ids = torch.randint(config.vocab_size, (given["rows"], config.context_length), device=device)

    def step() -> None:
        update.zero_grad()
        for _ in range(train.accumulation):
            with computing.context():
                objective = loss(Batch(ids, ids.roll(-1, 1)))
            watch("forward")
            (objective / (ids.numel() * train.accumulation)).backward()
            update.collect(alone=train.accumulation == 1)
            watch("backward")
        update.clip()
        update.apply()
        watch("optimizer")
        loss.after_step()

    def standing() -> int:
        tensors = [
            *model.parameters(),
            *computing.copied(),
            *model.buffers(),
            ids,
            *optimizers.named_state().values(),
        ]
        tensors += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        tensors += [m.table for m in model.modules() if isinstance(getattr(m, "table", None), torch.Tensor)]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    return step, standing


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def measure_memory(given: dict[str, Any]) -> dict[str, Any]:
    mallopt = ctypes.CDLL("libc.so.6").mallopt
    mallopt(_M_MMAP_THRESHOLD, 1 << 14)
    mallopt(_M_TRIM_THRESHOLD, 1 << 14)
    mallopt(_M_TOP_PAD, 0)
    small = {"vocab_size": 64, "context_length": 32, "d_model": 32, "layers": 1, "heads": 2}
    tiny = {**given, "model": {**given["model"], **small}, "rows": 2, "compile": False}
    for _ in range(2):
        training(tiny)[0]()  # libraries, threads
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest value begins anew
    step, standing = training(given)
    for _ in range(3):
        step()
    if not given["compile"]:
        return {"measured": resident("VmHWM") - before}
    gc.collect()
    between = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(2):
        step()
    return {"measured": resident("VmHWM") - between + standing(), "compiler": between - before - standing()}


def measure_time(given: dict[str, Any], steps: int) -> dict[str, Any]:
    step, _ = training(given)
    for _ in range(3):
        step()
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return {"measured": statistics.median(seconds), "spread": [min(seconds), max(seconds)]}


def traced(given: dict[str, Any], device_type: str = "cpu") -> Any:
    """The step as `scratchlm resources` traces it."""
    from scratchlm.resources.step import as_run_on, trace_step

    config, optim, train = sections(given)
    return trace_step(
        as_run_on(device_type, config, config.context_length),
        optim,
        train,
        device_type=device_type,
        precision=given["precision"],
        micro_batch=given["rows"],
        accumulation=train.accumulation,
        compiled=given["compile"],
    )


def predict(what: str, given: dict[str, Any]) -> float:
    from scratchlm.resources.measurement import load_measurement
    from scratchlm.resources.timing import Measured, seconds_by_phase

    step = traced(given)
    if what == "memory":
        return step.memory.peak()[1]
    return sum(seconds_by_phase(step.trace, Measured(load_measurement()), given["compile"]).values())


def measure_start(rounds: int) -> list[dict[str, Any]]:
    """Whole processes, the first round thrown away: it fills the file cache and keeps the answers."""
    cases = {name: (arguments, "0") for name, arguments in START.items()}
    cases |= {f"{name}, asked again": (arguments, "1") for name, arguments in START.items() if "import" not in name}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryDirectory() as cache:
        environment["XDG_CACHE_HOME"] = cache
        for _ in range(rounds + 1):
            for name, (arguments, keep) in cases.items():
                used, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
                given = environment | {"SCRATCHLM_KEEP_ANSWERS": keep}
                subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True, env=given)
                seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
                taken[name].append((seconds, after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime))
    rows = []
    for name, runs in taken.items():
        clock, cpu = ([run[at] for run in runs[1:]] for at in (0, 1))
        rows.append(
            {"case": name, "seconds": statistics.median(clock), "spread": [min(clock), max(clock)]}
            | {"cpu_seconds": statistics.median(cpu), "cpu_spread": [min(cpu), max(cpu)]}
        )
        print(
            f"start   {name:<30} {rows[-1]['seconds']:.2f} s, {rows[-1]['cpu_seconds']:.2f} s of the CPU",
            flush=True,
        )
    return rows


def child(what: str, given: dict[str, Any], steps: int) -> None:
    if what == "memory":
        print(json.dumps(measure_memory(given)))
        return
    from scratchlm.allocator import keep_freed_memory

    keep_freed_memory()
    print(json.dumps(measure_time(given, steps)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="*", default=["memory", "time"], choices=["memory", "time", "start"])
    parser.add_argument("--only", nargs="*", default=None, help="names of configurations")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5, help="of whole processes")
    parser.add_argument(
        "--out", type=Path, default=None, help="folder for memory.json and time.json; none: only print"
    )
    parser.add_argument("--child", nargs=2, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], json.loads(options.child[1]), options.steps)
        return
    from scratchlm.evaluate.environment import describe_environment
    from scratchlm.files import write_json
    from scratchlm.progress import progress

    summary = {}
    for what in options.what:
        rows = measure_start(options.rounds) if what == "start" else []
        cases = {"memory": MEMORY, "time": TIME}.get(what, {})
        chosen = {name: given for name, given in cases.items() if options.only is None or name in options.only}
        for name, given in progress(chosen.items(), description=what, unit="model") if chosen else ():
            predicted = predict(what, given)
            command = [sys.executable, __file__, "--child", what, json.dumps(given), "--steps", str(options.steps)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            error = predicted / found["measured"] - 1
            rows.append({"case": name, "predicted": predicted, **found, "error": error, "configuration": given})
            unit = (1e6, "MB") if what == "memory" else (1e-3, "ms")
            print(
                f"{what:<7} {name:<30} predicted {predicted / unit[0]:8.1f} {unit[1]}  "
                f"measured {found['measured'] / unit[0]:8.1f} {unit[1]}  {error:+.1%}",
                flush=True,
            )
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            written = {
                "command": " ".join(["python", "benchmarks/resources.py", *sys.argv[1:]]),
                "environment": describe_environment(),
                "results": rows,
            }
            write_json(options.out / f"{what}.json", written)
        errors = [abs(row["error"]) for row in rows if "error" in row]
        if not errors:
            continue
        summary[what] = {
            "cases": len(rows),
            "median_error": statistics.median(errors),
            "largest_error": max(errors),
        }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
