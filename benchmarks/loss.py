"""Head and cross-entropy of one batch, forward and backward: peak memory and time of the chunked loss beside the plain ones.

    python benchmarks/loss.py --tokens 8192 --vocab 100000 --width 256 --rounds 3 --out docs/results/loss

Each contender is a process of its own; they take turns. Memory is the peak of the resident set above what the process held with its inputs there
(weights, hidden states; for both, gradients are in the peak). bf16 is autocast, as training has it. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CONTENDERS = {
    "plain": "F.linear and F.cross_entropy, as most training loops have it",
    "chunked": "ours, by rows, gradients in the forward pass",
    "chunked, compiled": "the same, pointwise part compiled, as training takes it",
}


def child(name: str, given: argparse.Namespace) -> None:
    from scratchlm.allocator import keep_freed_memory

    if name != "plain":  # which has the allocator that its users have
        keep_freed_memory()
    import torch
    import torch.nn.functional as F
    from resources import resident

    from scratchlm.kernels.cross_entropy import chunked_linear_cross_entropy

    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    x = torch.randn(given.tokens, given.width, requires_grad=True)
    weight = (0.02 * torch.randn(given.vocab, given.width)).requires_grad_()
    targets = torch.randint(given.vocab, (given.tokens,))

    def step() -> float:
        x.grad = weight.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=given.dtype == "bf16"):
            if name == "plain":
                loss = F.cross_entropy(F.linear(x, weight).float(), targets, reduction="sum")
            else:
                loss, _ = chunked_linear_cross_entropy(x, weight, targets, compiled="compiled" in name)
        loss.backward()
        return float(loss.detach()) / given.tokens

    if "compiled" in name:  # the compiler's memory is not the loss's
        small = torch.randn(given.tokens, given.width, requires_grad=True)
        chunked_linear_cross_entropy(small[:1], weight[:1], targets[:1] * 0, compiled=True)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    seconds = []
    for _ in range(2):  # the first pays for memory and compiler
        start = time.perf_counter()
        loss = step()
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"loss": loss, "seconds": seconds[-1], "bytes": resident("VmHWM") - before}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child is not None:
        child(given.child, given)
        return
    from scratchlm.evaluate.environment import describe_environment
    from scratchlm.files import write_json

    found: dict[str, list[dict[str, float]]] = {name: [] for name in given.only}
    options = [f"--{name}={getattr(given, name)}" for name in ("tokens", "vocab", "width", "dtype", "threads")]
    for _ in range(given.rounds):
        for name, runs in found.items():
            done = subprocess.run(
                [sys.executable, __file__, "--child", name, *options], check=True, capture_output=True, text=True
            )
            runs.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{name:<20} {runs[-1]}", file=sys.stderr, flush=True)
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()
    }
    result: dict[str, Any] = {
        "benchmark": "loss",
        "command": "python benchmarks/loss.py " + " ".join(sys.argv[1:]),
        "environment": describe_environment(),
        "contenders": {name: CONTENDERS[name] for name in found},
        "medians": medians,
        "spread": {
            name: [min(r["seconds"] for r in runs), max(r["seconds"] for r in runs)] for name, runs in found.items()
        },
    }
    if "plain" in medians:
        plain = medians["plain"]
        result["of_the_plain_memory"] = {name: one["bytes"] / plain["bytes"] for name, one in medians.items()}
        result["times_as_fast"] = {name: plain["seconds"] / one["seconds"] for name, one in medians.items()}
    if given.out is not None:
        write_json(given.out / f"loss-{given.dtype}.json", result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
