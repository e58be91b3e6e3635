"""What sparse masks really save: time, FLOPs and memory of attention, forward and backward, dense against blocked.

Every figure comes from a process of its own, so that the peak of its memory is that of one case alone; the cases of one length
are interleaved over the rounds. Run: ``python benchmarks/masks.py [--lengths 1024 4096] [--rounds 5] [--out docs/results/masks]``.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from scratchlm.evaluate.environment import describe_environment
from scratchlm.files import write_json, write_text
from scratchlm.kernels.attention import reference_attention, sdpa_attention
from scratchlm.kernels.blocked_attention import blocked_attention
from scratchlm.kernels.visibility import Visibility
from scratchlm.model import ModelConfig, choices
from scratchlm.progress import progress

HEADS, HEAD_DIM = 4, 64
MASKS: dict[str, dict[str, Any]] = {
    "causal": {},
    "sliding_window": {"window": 256},
    "fixed": {"stride": 128, "stride_summary": 8},
    "block_sparse": {"mask_block": 128, "mask_local_blocks": 2, "global_tokens": 16},
    "strided": {"stride": 128},
}
KERNELS = {"reference": reference_attention, "sdpa": sdpa_attention, "blocked": blocked_attention}


def one(mask: str, kernel: str, length: int) -> dict[str, float]:
    """One forward and backward in this process."""
    config = ModelConfig(mask=mask, context_length=length, **MASKS[mask])
    rule = choices.MASK.get(mask).of(config)
    q, k, v = (torch.randn(1, HEADS, length, HEAD_DIM, requires_grad=True) for _ in range(3))
    visible = Visibility.of_sequence(rule, length)
    small = (torch.randn(1, HEADS, 64, HEAD_DIM, requires_grad=True) for _ in range(3))
    KERNELS[kernel](*small, Visibility.of_sequence(rule, 64)).sum().backward()  # load what is loaded on first use
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    KERNELS[kernel](q, k, v, visible).sum().backward()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    with FlopCounterMode(display=False) as counter:
        KERNELS[kernel](q, k, v, visible).sum().backward()
    return {"seconds": seconds, "peak_mib": peak / 1024, "gflop": counter.get_total_flops() / 1e9}


def in_its_own_process(mask: str, kernel: str, length: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", mask, kernel, str(length)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    measured: dict[str, float] = json.loads(printed.strip().splitlines()[-1])
    return measured


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "# What sparse masks save",
        "",
        f"Attention alone, {HEADS} heads of {HEAD_DIM}, batch 1, fp32, forward and backward on a CPU, "
        f"{torch.get_num_threads()} thread(s); medians. `reference` and",
        "`sdpa` compute the whole square and mask it; `blocked` computes the columns that some query of a block may read.",
        "FLOPs as counted by torch (its counter does not see inside `sdpa` on a CPU). [JSON](results.json)",
        "",
        "| mask | length | kernel | GFLOP | peak MiB | ms | spread |",
        "| --- | ---: | --- | ---: | ---: | ---: | --- |",
    ]
    for row in results:
        seconds = row["seconds"]
        flops = f"{row['gflop']:.2f}" if row["gflop"] else "–"
        lines.append(
            f"| {row['mask']} | {row['length']:,} | {row['kernel']} | {flops} | {row['peak_mib']:.0f} | "
            f"{1000 * statistics.median(seconds):.1f} | {1000 * min(seconds):.1f}–{1000 * max(seconds):.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=3, metavar=("MASK", "KERNEL", "LENGTH"), help=argparse.SUPPRESS)
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 4096])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("docs/results/masks"))
    options = parser.parse_args()
    if options.one:
        torch.manual_seed(0)
        print(json.dumps(one(options.one[0], options.one[1], int(options.one[2]))))
        return
    results = []
    for length in options.lengths:
        cases = [(mask, kernel) for mask in MASKS for kernel in KERNELS]
        measured: dict[tuple[str, str], list[dict[str, float]]] = {case: [] for case in cases}
        rounds = [case for _ in range(options.rounds) for case in cases]
        for case in progress(rounds, description=f"length {length}", unit="case"):
            measured[case].append(in_its_own_process(*case, length))
        for (mask, kernel), runs in measured.items():
            results.append(
                {
                    "mask": mask,
                    "fields": MASKS[mask],
                    "length": length,
                    "kernel": kernel,
                    "gflop": runs[0]["gflop"],
                    "peak_mib": statistics.median(run["peak_mib"] for run in runs),
                    "seconds": [run["seconds"] for run in runs],
                }
            )
    found = {
        "command": "python " + " ".join(sys.argv),
        "environment": describe_environment(0),
        "heads": HEADS,
        "head_dim": HEAD_DIM,
        "results": results,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "results.json", found)
    write_text(options.out / "README.md", table(results))
    print(json.dumps({"cases": len(results), "out": str(options.out)}))


if __name__ == "__main__":
    main()
