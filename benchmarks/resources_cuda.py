"""How true the estimates of `scratchlm resources` are on a GPU: peak memory and step time, predicted and measured.

All configurations run in one process, one after the other (a process of its own would start for longer than it measures). Memory: the most that
torch's allocator gave out in the second and third step, per phase, less what was out before the model was built, against the peak of the step
traced for a GPU; `requested` is the same without what the allocator rounds up, `first` that of the first step, in which kernels are compiled and
tuned. Time: the median of the steps after those three, each waited for, against the prediction from a measurement of this GPU
(`scratchlm resources measure`; without one, a quick one is made first), and beside it that from the maker's figures.

A configuration that fails is a row that says so, and the others go on; results are written after every row. The compiled ones come last.

Run: ``python benchmarks/resources_cuda.py [--what memory time] [--eager] [--budget 300] [--out docs/results/resources]``.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from resources import case, traced, training

from scratchlm.evaluate.environment import describe_environment
from scratchlm.files import write_json
from scratchlm.resources.devices import device_memory, match
from scratchlm.resources.measure import QUICK, measure
from scratchlm.resources.measurement import default_path, load_measurement, machine_title, store
from scratchlm.resources.timing import Datasheet, Machine, Measured, seconds_by_phase

BASE = {"vocab_size": 32_768, "context_length": 1024, "d_model": 1024, "layers": 6, "heads": 16}
LARGE = {"d_model": 2048, "layers": 6}  # few tokens of it: weights, gradients and state are the most
GPT2 = {
    "vocab_size": 50_257, "d_model": 768, "layers": 12, "heads": 12, "norm": "layernorm", "feedforward": "gelu_tanh",
    "position": "learned", "tied_embeddings": True, "attention_bias": ["q", "k", "v", "o"], "feedforward_bias": True,
}  # fmt: skip


def gpu(precision: str = "bf16", rows: int = 16, **given: Any) -> dict[str, Any]:
    """A configuration of a GPU's size."""
    return case(precision, rows, model=BASE | given.pop("model", {}), **given)


LONG = {"context_length": 16_384, "layers": 4}
CASES: dict[str, dict[str, Any]] = {
    "dense fp32": gpu("fp32", 8),
    "dense bf16": gpu(),
    "bf16 weights": gpu(train={"weights": "bf16"}),
    "small": gpu(rows=4, model={"d_model": 512, "heads": 8, "layers": 4}),
    "many rows": gpu(rows=64),
    "wide": gpu(rows=16, model={"d_model": 4096, "heads": 32, "layers": 2}),
    "deep": gpu(rows=32, model={"d_model": 512, "heads": 8, "layers": 24}),
    "short rows": gpu(rows=64, model={"context_length": 256}),
    "long context": gpu(rows=1, model=LONG),
    "long context fp32": gpu("fp32", 1, model={"context_length": 8192, "layers": 3}),
    "long context, window": gpu(
        rows=1, model={"context_length": 8192, "layers": 3, "mask": "sliding_window", "window": 1024}
    ),
    "grouped queries": gpu(model={"kv_heads": 4}),
    "grouped queries fp32": gpu("fp32", 8, model={"kv_heads": 4, "layers": 3}),
    "large vocabulary": gpu(model={"vocab_size": 131_072, "layers": 3}),
    "large vocabulary, all logits": gpu(
        rows=8, model={"vocab_size": 50_257, "layers": 3}, train={"loss_kernel": "reference"}
    ),
    "soft cap and z-loss": gpu(model={"logit_soft_cap": 30.0, "layers": 3}, train={"z_loss": 1e-4}),
    "experts": gpu(rows=8, model={"moe": {"experts": 8, "top_k": 2}, "layers": 4}),
    "latent attention": gpu(model={"attention": "mla", "latent": {"kv_rank": 256, "rope_dim": 32}}),
    "dropout": gpu(model={"embedding_dropout": 0.1, "attention_dropout": 0.1, "residual_dropout": 0.1}),
    "checkpointing": gpu(model={"layers": 12}, train={"activation_checkpointing": "blocks"}),
    "checkpointing, selective": gpu(model={"layers": 12}, train={"activation_checkpointing": "selective"}),
    "accumulation": gpu(rows=8, train={"accumulation": 4}),
    "GPT-2's choices": gpu(model=GPT2),
    "large, adamw": gpu(rows=2, model=LARGE),
    "large, muon": gpu(rows=2, model=LARGE, optim={"optimizer": "muon"}),
    "large, sgd": gpu(rows=2, model=LARGE, optim={"optimizer": "sgd"}),
    "large, lion": gpu(rows=2, model=LARGE, optim={"optimizer": "lion"}),
    "large, adafactor": gpu(rows=2, model=LARGE, optim={"optimizer": "adafactor"}),
    "dense bf16, compiled": gpu(compile=True),
    "large vocabulary, compiled": gpu(model={"vocab_size": 131_072, "layers": 3}, compile=True),
    "long context, compiled": gpu(rows=1, model=LONG, compile=True),
    "GPT-2's choices, compiled": gpu(model=GPT2, compile=True),
}
TIMED = [
    "dense fp32", "dense bf16", "wide", "deep", "short rows", "long context", "large vocabulary", "GPT-2's choices", "large, muon",
    "dense bf16, compiled", "large vocabulary, compiled", "long context, compiled", "GPT-2's choices, compiled",
]  # fmt: skip


class Peaks:
    """What the allocator gave out at most in every phase, beyond what was out when this was made."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = torch.cuda.memory_allocated(device)
        self.requested_before = torch.cuda.memory_stats(device).get("requested_bytes.all.current", 0)
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.by_phase: dict[str, int] = {}
        self.requested = 0
        torch.cuda.reset_peak_memory_stats(self.device)

    def __call__(self, phase: str) -> None:
        """A phase is over."""
        peak = torch.cuda.max_memory_allocated(self.device) - self.before
        self.by_phase[phase] = max(peak, self.by_phase.get(phase, 0))
        asked = torch.cuda.memory_stats(self.device).get("requested_bytes.all.peak", 0) - self.requested_before
        self.requested = max(self.requested, asked)
        torch.cuda.reset_peak_memory_stats(self.device)

    @property
    def peak(self) -> int:
        return max(self.by_phase.values())


def run(given: dict[str, Any], device: torch.device, timed: int) -> dict[str, Any]:
    """Three steps of a configuration, and `timed` more against the clock; what fails is told."""
    started = time.perf_counter()
    found: dict[str, Any] = {}
    try:
        found = _run(given, device, timed)
    except Exception as error:
        found = {"failed": f"{type(error).__name__}: {error}"[:500]}
    # Only here the exception is gone, and with it the tensors that its frames held.
    if given["compile"]:
        torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    return found | {"took": time.perf_counter() - started}


def _run(given: dict[str, Any], device: torch.device, timed: int) -> dict[str, Any]:
    torch.manual_seed(0)
    peaks = Peaks(device)
    step, _ = training(given, device, peaks)
    step()
    found: dict[str, Any] = {"first": peaks.peak}
    peaks.forget()
    for _ in range(2):
        step()
    found |= {"memory": peaks.peak, "requested": peaks.requested, "phases": dict(peaks.by_phase)}
    seconds = []
    for _ in range(timed):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        step()
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return found | {"seconds": seconds}


def warm_up(device: torch.device) -> None:
    """Libraries and their workspaces, in both precisions, with biases and without: they stay, and are none of a model's."""
    tiny = {"vocab_size": 512, "context_length": 128, "d_model": 128, "layers": 1, "heads": 2}
    for precision in ("fp32", "bf16"):
        for model in (tiny, GPT2 | tiny):
            run(case(precision, 4, model=model), device, 0)


def memory_row(step: Any, found: dict[str, Any]) -> dict[str, Any]:
    """Predicted and measured peaks, whole and by phase."""
    moment, predicted = step.memory.peak()
    operation = step.memory.operations[moment]
    by_phase: dict[str, int] = {}
    for each, live in zip(step.memory.operations, step.memory.timeline(), strict=True):
        by_phase[each.phase] = max(live, by_phase.get(each.phase, 0))
    return {
        "predicted": predicted,
        "measured": found["memory"],
        "error": predicted / found["memory"] - 1,
        "requested": found["requested"],
        "first": found["first"],
        "phases": {name: {"predicted": by_phase.get(name), "measured": peak} for name, peak in found["phases"].items()},
        "moment": f"{operation.name} in {operation.module or 'head and loss'}, {operation.phase}",
        "at_peak": step.memory.live_by(moment, lambda storage: storage.kind),
    }  # fmt: skip


def time_row(step: Any, found: dict[str, Any], machines: dict[str, Machine], compiled: bool) -> dict[str, Any]:
    """Predicted and measured seconds; the first machine's prediction counts."""
    seconds = statistics.median(found["seconds"])
    by = {name: seconds_by_phase(step.trace, machine, compiled) for name, machine in machines.items()}
    predicted = {name: sum(phases.values()) for name, phases in by.items()}
    first = next(iter(predicted))
    return {
        "predicted": predicted[first],
        "measured": seconds,
        "error": predicted[first] / seconds - 1,
        "spread": [min(found["seconds"]), max(found["seconds"])],
        "phases": by[first],
        "by": predicted,
    }


def machines_of(device: torch.device, given: Path | None, out: Path | None) -> dict[str, Machine]:
    """What knows times of `device`: ``measured``, stored or measured now, and ``datasheet``, if the device is a known one."""
    found: dict[str, Machine] = {}
    title = machine_title(device)
    own = [] if out is None else [out / "cuda-device.json"]
    try:
        for path in [given or default_path(), *own]:
            if path.exists():
                stored = load_measurement(path)
                if (stored.device, stored.machine) == (device.type, title):
                    found["measured"] = Measured(stored)
                    break
        else:
            measured = measure(device, ("fp32", "bf16"), QUICK, show=False)
            print(f"measured {title} in {measured.seconds:.0f} s", flush=True)
            found["measured"] = Measured(measured)
            for path in own:
                store(measured, path)
    except Exception as error:
        print(f"no measurement, times are the maker's: {type(error).__name__}: {error}", flush=True)
    if (known := match(title, device_memory(device))) is not None:
        found["datasheet"] = Datasheet(known)
    gc.collect()
    torch.cuda.empty_cache()
    return found


class Report:
    """Rows of one kind, printed and written as they come."""

    def __init__(self, what: str, out: Path | None, facts: dict[str, Any]) -> None:
        self.what, self.facts = what, facts
        self.path = None if out is None else out / f"cuda-{what}.json"
        self.rows: list[dict[str, Any]] = []

    def add(self, name: str, row: dict[str, Any], given: dict[str, Any]) -> None:
        self.rows.append({"case": name, **row, "configuration": given})
        if "error" in row:
            size, unit = (1e6, "MB") if self.what == "memory" else (1e-3, "ms")
            text = (
                f"predicted {row['predicted'] / size:9.1f} {unit}  measured {row['measured'] / size:9.1f} {unit}  "
                f"{row['error']:+.1%}"
            )
        else:
            text = row["failed"]
        print(f"{self.what:<7} {name:<30} {text}", flush=True)
        if self.path is not None:
            write_json(self.path, {**self.facts, "results": self.rows})

    def summary(self) -> dict[str, Any]:
        errors = [abs(row["error"]) for row in self.rows if "error" in row]
        found: dict[str, Any] = {"cases": len(self.rows), "failed": len(self.rows) - len(errors)}
        if errors:
            found |= {"median_error": statistics.median(errors), "largest_error": max(errors)}
        return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="*", default=["memory", "time"], choices=["memory", "time"])
    parser.add_argument("--only", nargs="*", default=None, help="names of configurations")
    parser.add_argument("--eager", action="store_true", help="leave the compiled ones out")
    parser.add_argument("--steps", type=int, default=8, help="against the clock")
    parser.add_argument("--budget", type=float, default=540, help="no configuration begins after so many seconds")
    parser.add_argument(
        "--measurement", type=Path, default=None, help="of `scratchlm resources measure`; none: the stored one"
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument(
        "--out", type=Path, default=None, help="folder for cuda-memory.json and cuda-time.json; none: only print"
    )
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    device = options.device
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
    given_arguments = sys.argv[1:] if arguments is None else arguments
    facts: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/resources_cuda.py", *given_arguments]),
        "environment": describe_environment(),
        "device": machine_title(device),
    }
    machines = machines_of(device, options.measurement, options.out) if "time" in options.what else {}
    facts["machines"] = {name: [machine.name, *machine.assumptions] for name, machine in machines.items()}
    reports = {what: Report(what, options.out, facts) for what in options.what}
    warm_up(device)
    chosen = [name for name in CASES if options.only is None or name in options.only]
    for name in chosen:
        given, timed = CASES[name], "time" in reports and name in TIMED
        if (options.eager and given["compile"]) or not (timed or "memory" in reports):
            continue
        late = time.perf_counter() - started > options.budget
        found = {"failed": "no time left"} if late else run(given, device, options.steps if timed else 0)
        rows = {"memory": found, "time": found}
        if "failed" not in found:
            before = time.perf_counter()
            step = traced(given, "cuda")
            rows["memory"] = memory_row(step, found)
            if timed and machines:
                rows["time"] = time_row(step, found, machines, given["compile"])
            elif timed:
                rows["time"] = {"failed": "nothing knows times of this device", "measured": found["seconds"]}
            took = {"took": found["took"], "prediction_took": time.perf_counter() - before}
            rows = {what: row | took for what, row in rows.items()}
        for what, report in reports.items():
            if what == "memory" or timed:
                report.add(name, rows[what], given)
    print(json.dumps({what: report.summary() for what, report in reports.items()}))


if __name__ == "__main__":
    main()
