"""A training step against those that users would pick, on the same shapes: tokens/s, share of the machine's matmul peak, memory.

    python benchmarks/train.py --shapes 6M --out docs/results/train
    python benchmarks/train.py --device cuda --shapes 124M --out docs/results/gpu/train

Every contender is a process of its own, so that its allocator and its peak of memory are its own. All are started and warmed
up first; then they take turns, a few steps each, while the others sleep, and so does the measurement of the ceiling: products
of large matrices. On a CPU without bf16 all compute in fp32 (``--precision``). Memory is the resident set, on a GPU what torch had allocated at most. Ours is the trainer itself (``Trainer.fit``), with loader, clipping, metrics and all. ``--hold`` waits for a line on
standard input before the measurement, so that one can wait for a quiet machine. The last line printed is the result as JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A Llama with tied embeddings, d_ff by the model's own rule (8/3 d_model)."""

    d_model: int
    layers: int
    batch: int
    context: int = 256
    vocab: int = 10_000
    head_dim: int = 64
    device: str = "cpu"

    @property
    def heads(self) -> int:
        return self.d_model // self.head_dim

    @property
    def d_ff(self) -> int:
        return round(8 * self.d_model / (3 * 64)) * 64

    @property
    def tokens(self) -> int:
        """Per step."""
        return self.batch * self.context


SHAPES = {
    "6M": Shape(256, 4, 16),
    "18M": Shape(512, 4, 16),
    "31M": Shape(512, 8, 8),
    "64M": Shape(768, 8, 4),
    # For a GPU, with GPT-2's vocabulary. The batches are what all contenders hold side by side in 140 GB; in 80, two or three (gpu.sh).
    "124M": Shape(768, 12, 32, 1024, 50_304, device="cuda"),
    "350M": Shape(1024, 24, 16, 1024, 50_304, device="cuda"),
    "1B": Shape(2048, 18, 8, 2048, 50_304, 128, device="cuda"),
}
OURS, CEILING = "scratchlm", "ceiling"
CONTENDERS = {
    OURS: "our trainer with its defaults",
    "scratchlm-bf16": "the same, train.weights = bf16",
    "scratchlm-graph": "the same as that, train.cuda_graph = true",
    "scratchlm-eager": "the first with train.compile = off",
    "transformers-eager": "LlamaForCausalLM in bf16, torch's AdamW: what users run",
    "transformers-compiled": "the same under torch.compile, fused AdamW",
    "transformers-autocast": "fp32 weights, autocast, torch.compile, fused AdamW",
    "nanogpt-fp32": "a GPT-2-style module in fp32 under torch.compile: nanoGPT as shipped",
    "nanogpt-patched": "the same with autocast and fused AdamW",
    "litgpt": "litgpt's GPT in bf16 under torch.compile, fused AdamW",
}
ONLY_BF16 = ("scratchlm-bf16", "scratchlm-graph", "transformers-autocast")
"""What has no counterpart in fp32. (``nanogpt-patched`` is the fused AdamW alone there.)"""


class Worker:
    """A contender in its own process: one line in, one line of JSON out."""

    def __init__(self, name: str, shape: str, threads: int, precision: str) -> None:
        worker = str(Path(__file__).with_name("train_worker.py"))
        command = [sys.executable, worker, name, shape, str(threads), precision]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, line: str = "") -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        if line:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"it ended with {self.process.wait()}")
        return json.loads(answer)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def measure(
    name: str, contenders: list[str], rounds: int, steps: int, threads: int, precision: str, hold: bool
) -> dict[str, Any]:
    """All contenders on one shape."""
    every = [*contenders, CEILING]
    started: dict[str, Worker] = {}
    workers: dict[str, Worker] = {}
    found: dict[str, dict[str, Any]] = {}
    times: dict[str, list[Any]] = {}
    ends: dict[str, Any] = {}

    def asked(contender: str, line: str = "") -> Any:
        """Its answer; None: it has died, which is said, and the others go on."""
        try:
            return started[contender].ask(line)
        except (RuntimeError, OSError, ValueError) as error:
            print(f"{contender}: {error}", file=sys.stderr)
            started[contender].end()
            workers.pop(contender, None)
            return None

    try:
        if SHAPES[name].device == "cuda":  # a GPU's machine has cores for all of them
            started |= {contender: Worker(contender, name, threads, precision) for contender in every}
        for contender in every:
            if contender not in started:
                started[contender] = Worker(contender, name, threads, precision)
            first = asked(contender)
            if first is None or asked(contender, str(steps)) is None:
                continue
            workers[contender], times[contender] = started[contender], []
            found[contender] = {"what": CONTENDERS.get(contender, ""), **first}
            print(f"{contender}: ready after {first['first_step_seconds']:.1f} s", file=sys.stderr)
        if hold:
            print("all are warm; a line on standard input starts the measurement", file=sys.stderr, flush=True)
            sys.stdin.readline()
        for _ in range(rounds):
            for contender in list(workers):
                times[contender] += asked(contender, str(steps)) or []
        for contender in list(workers):
            ends[contender] = asked(contender, "end")
    finally:
        for worker in started.values():
            worker.end()
    ceiling = {}
    if times.get(CEILING):
        ceiling = {kind: spread([t[kind] for t in times[CEILING]]) for kind in times[CEILING][0]}
    found = {
        contender: figures for contender, figures in found.items() if contender != CEILING and ends.get(contender)
    }
    shape = SHAPES[name]
    for contender, figures in found.items():
        per_second = [shape.tokens / seconds for seconds in times[contender]]
        figures["tokens_per_second"] = spread(per_second)
        figures["gflops"] = statistics.median(per_second) * figures["flops_per_token"] / 1e9
        for kind in ceiling:
            figures[f"share_of_{kind}_ceiling"] = figures["gflops"] / ceiling[kind]["median"]
        figures["peak_mb"] = ends[contender]["peak_mb"]
    ours = max(
        (f["tokens_per_second"]["median"] for name, f in found.items() if name.startswith(OURS)), default=None
    )
    if ours:
        for figures in found.values():
            figures["ours_times_as_fast"] = ours / figures["tokens_per_second"]["median"]
    return {"shape": asdict(shape), "ceiling_gflops": ceiling, "contenders": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="default: all of the device")
    parser.add_argument(
        "--contenders", nargs="+", choices=CONTENDERS, default=None, help="default: all that the device runs"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="per turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--precision", choices=["bf16", "fp32"], help="default: bf16 where the device multiplies it"
    )
    parser.add_argument("--hold", action="store_true", help="wait for a line on standard input before measuring")
    parser.add_argument("--out", type=Path, help="folder for results-<shape>.json")
    options = parser.parse_args()
    from scratchlm.evaluate.environment import describe_environment
    from scratchlm.kernels.hardware import has_native_bf16

    if options.precision is None:
        options.precision = "bf16" if has_native_bf16(options.device) else "fp32"
    here = [name for name in CONTENDERS if name != "scratchlm-graph" or options.device == "cuda"]
    if options.precision == "fp32":
        here = [name for name in here if name not in ONLY_BF16]
    if options.contenders is None:
        options.contenders = here
    if strange := [name for name in options.contenders if name not in here]:
        parser.error(f"{strange[0]} does not run on {options.device} in {options.precision}")
    shapes = options.shapes or [name for name, shape in SHAPES.items() if shape.device == options.device]
    if strange := [name for name in shapes if SHAPES[name].device != options.device]:
        parser.error(f"{strange[0]} is a shape for {SHAPES[strange[0]].device}, not for {options.device}")
    results = {
        "benchmark": "train",
        "date": time.strftime("%Y-%m-%d"),
        "command": "python benchmarks/train.py " + " ".join(sys.argv[1:]),
        "python": platform.python_version(),
        "environment": describe_environment(),
        "precision": options.precision,
        "rounds": options.rounds,
        "steps_per_turn": options.steps,
        "shapes": {},
    }
    for name in shapes:
        turns = options.rounds, options.steps, options.threads
        found = measure(name, options.contenders, *turns, options.precision, options.hold)
        results["shapes"][name] = found
        share = f"share_of_{options.precision}_ceiling"
        for contender, figures in found["contenders"].items():
            print(
                f"{name:4} {contender:22} {figures['tokens_per_second']['median']:8,.0f} tok/s  "
                f"{figures.get(share, 0):4.0%} of {options.precision}  {figures['peak_mb']:6,.0f} MB  "
                f"ours × {figures.get('ours_times_as_fast', 0):.2f}",
                file=sys.stderr,
            )
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            one = {**results, "shapes": {name: found}}
            (options.out / f"{name}.json").write_text(json.dumps(one, indent=1) + "\n")
    print(json.dumps(results))
    if missing := [
        (shape, name)
        for shape in shapes
        for name in options.contenders
        if name not in results["shapes"][shape]["contenders"]
    ]:
        sys.exit("without a result: " + ", ".join(f"{name} ({shape})" for shape, name in missing))


if __name__ == "__main__":
    main()
