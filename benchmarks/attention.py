"""Attention by itself: ours against the formula, torch's fused kernel and FlexAttention, on the grid of the course (CS336).

Batch 1, causal; widths 16 … 128, lengths 128 … 65,536, forward, backward and both, bf16 and fp32. The kernels of one case are interleaved over
the rounds in one process; medians. A case is left out, and the table says why, where the scores of a kernel that holds them would not
fit, where a kernel's shorter length says that it would take longer than `--patience`, and all that comes after `--budget` seconds.
Then the largest errors of every kernel against float64, per dtype.

Run: ``python benchmarks/attention.py [--device cuda] [--widths 64] [--lengths 1024 4096] [--dtypes bf16] [--heads 16] [--out FOLDER]``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from scratchlm.evaluate.environment import describe_environment
from scratchlm.files import write_json, write_text
from scratchlm.kernels.attention import reference_attention, sdpa_attention
from scratchlm.kernels.blocked_attention import blocked_attention
from scratchlm.kernels.flash_attention import flash_attention
from scratchlm.kernels.flex_attention import flex_attention
from scratchlm.progress import progress

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
PASSES = ("forward", "backward", "both")
Kernel = Callable[..., Tensor]

FLASH = "sdpa's flash"
SCORES_HELD = {"naive": 40, "naive compiled": 16}
"""Kernels that keep all scores → bytes for each of them that a step needs. (On a GPU the formula line by line wanted more than 30.)"""


def sdpa_flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's kernel with the backend that is called flash, and no other."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return sdpa_attention(q, k, v)


def kernels(device: str) -> dict[str, Kernel]:
    """Everything that is compared. On a CPU FlexAttention has no backward, and compiling each length takes longer than it saves."""
    found: dict[str, Kernel] = {
        "naive": reference_attention,
        "sdpa": sdpa_attention,
        "flash (ours)": flash_attention,
    }
    if device == "cuda":  # where sdpa by itself may take cuDNN's kernel
        compiled = torch.compile(reference_attention, dynamic=False)
        return {**found, FLASH: sdpa_flash, "naive compiled": compiled, "flex": flex_attention}
    return {**found, "blocked (ours)": blocked_attention}


def chosen(options: argparse.Namespace) -> dict[str, Kernel]:
    """Those that are asked for."""
    return {name: kernel for name, kernel in kernels(options.device).items() if name in (options.only or [name])}


class Case:
    """One width, length and dtype, and what of each kernel is measured."""

    def __init__(self, heads: int, length: int, width: int, dtype: torch.dtype, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = 1, heads, length, width
        q, k, v, self.upstream = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4))
        self.tensors = tuple(x.requires_grad_() for x in (q, k, v))
        self.device = device

    def run(self, kernel: Kernel, which: str) -> Callable[[], Any]:
        """The work of one pass, ready to be timed; for `backward` the forward pass is done here."""
        if which == "forward":
            return lambda: self._without_gradients(kernel)
        if which == "both":
            return lambda: torch.autograd.grad(kernel(*self.tensors), self.tensors, self.upstream)
        out = kernel(*self.tensors)
        return lambda: torch.autograd.grad(out, self.tensors, self.upstream, retain_graph=True)

    def _without_gradients(self, kernel: Kernel) -> Tensor:
        with torch.no_grad():
            return kernel(*self.tensors)

    def seconds(self, work: Callable[[], Any], least: float) -> float:
        """Of one call, from as many in a row as fill `least` seconds."""
        calls, done = 0, 0.0
        self._wait()
        start = time.perf_counter()
        while done < least or not calls:
            batch = max(1, calls)  # waiting for the device after every call would be measured, too
            for _ in range(batch):
                work()
            self._wait()
            calls += batch
            done = time.perf_counter() - start
        return done / calls

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def free_memory(device: str) -> int:
    """Bytes that are free on the device."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    with Path("/proc/meminfo").open() as lines:
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def measured(options: argparse.Namespace, deadline: float) -> Iterator[list[dict[str, Any]]]:
    """The rows of one case after the other."""
    every = chosen(options)
    memory = options.memory_gib * 2**30
    last: dict[tuple[Any, ...], float] = {}  # seconds of `both` per pair of positions, at the length before
    cases = [
        (dtype, width, length) for dtype in options.dtypes for width in options.widths for length in options.lengths
    ]
    for dtype, width, length in progress(cases, description="attention", unit="case"):
        named = {"dtype": dtype, "head_dim": width, "length": length, "heads": options.heads}
        left_out: dict[str, str] = {}
        for name in every:
            expected = last.get((dtype, width, name), 0.0) * length**2
            if name == FLASH and dtype not in ("bf16", "fp16"):
                left_out[name] = "half precision only"
            elif time.perf_counter() > deadline:
                left_out[name] = "no time left"
            elif SCORES_HELD.get(name, 0) * options.heads * length**2 > memory:
                left_out[name] = "its scores do not fit"
            elif expected > options.patience:
                left_out[name] = f"would take more than {options.patience:g} s"
        taken = {name: kernel for name, kernel in every.items() if name not in left_out}
        rows = [{**named, "kernel": name, "left_out": reason} for name, reason in left_out.items()]
        if not taken:
            yield rows
            continue
        torch._dynamo.reset()  # no case is slower for the shapes before it
        case = Case(options.heads, length, width, DTYPES[dtype], options.device)
        found: dict[tuple[str, str], list[float]] = {}
        for which in PASSES:
            work = {name: case.run(kernel, which) for name, kernel in taken.items()}
            for one in work.values():
                one()  # compiles, tunes, allocates
            for _ in range(options.rounds):
                for name, one in work.items():
                    found.setdefault((name, which), []).append(case.seconds(one, options.least))
        for name in taken:
            seconds = {which: found[name, which] for which in PASSES}
            last[dtype, width, name] = statistics.median(seconds["both"]) / length**2
            rows.append({**named, "kernel": name, "seconds": seconds})
        yield rows


def errors(options: argparse.Namespace, length: int = 1024, width: int = 64) -> list[dict[str, Any]]:
    """The largest difference from the formula in float64 on the same inputs, output and gradients, each relative to the largest entry."""
    rows = []
    for dtype in options.dtypes:
        case = Case(2, length, width, DTYPES[dtype], options.device)
        wide = [x.detach().double().requires_grad_() for x in case.tensors]
        out = reference_attention(*wide)
        exact = [out.detach(), *torch.autograd.grad(out, wide, case.upstream.double())]
        for name, kernel in chosen(options).items():
            if name == FLASH and dtype not in ("bf16", "fp16"):
                continue
            mixed = kernel(*case.tensors)
            found = [mixed.detach(), *torch.autograd.grad(mixed, case.tensors, case.upstream)]
            worst = [
                float((ours.double() - right).abs().max() / right.abs().max())
                for ours, right in zip(found, exact, strict=True)
            ]
            rows.append(
                {"dtype": dtype, "kernel": name, **dict(zip(("out", "d_q", "d_k", "d_v"), worst, strict=True))}
            )
    return rows


def ratios(rows: list[dict[str, Any]], against: str) -> list[float]:
    """How many times as fast as `against` ours is, forward and backward together, case by case."""
    both = {
        (r["dtype"], r["head_dim"], r["length"], r["kernel"]): statistics.median(r["seconds"]["both"])
        for r in rows
        if "seconds" in r
    }
    return [
        seconds / both[(*case, "flash (ours)")]
        for (*case, name), seconds in both.items()
        if name == against and (*case, "flash (ours)") in both
    ]


def page(found: dict[str, Any]) -> str:
    rows, names = found["results"], list(dict.fromkeys(row["kernel"] for row in found["results"]))
    lines = [
        "# Attention by itself",
        "",
        f"Causal, batch 1, {found['heads']} head(s), on {found['on']}. Milliseconds, medians of {found['rounds']} interleaved rounds, with the spread of",
        f"forward and backward together. – was left out, the reason is in the [JSON](results.json). `{found['command']}`",
        "",
        *found["remarks"],
        "",
        "| dtype | head_dim | length | kernel | forward | backward | both | spread |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        start = f"| {row['dtype']} | {row['head_dim']} | {row['length']:,} | {row['kernel']} |"
        if "left_out" in row:
            lines.append(f"{start} – | – | – | {row['left_out']} |")
            continue
        middle = [f"{1000 * statistics.median(row['seconds'][which]):.3g}" for which in PASSES]
        both = row["seconds"]["both"]
        lines.append(f"{start} {' | '.join(middle)} | {1000 * min(both):.3g}–{1000 * max(both):.3g} |")
    lines += [
        "",
        "Forward and backward, times as fast as … (median over the cases both ran; least and most):",
        "",
        "| ours against | median | least | most | cases |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name in names:
        times = ratios(rows, name)
        if name != "flash (ours)" and times:
            lines.append(
                f"| {name} | {statistics.median(times):.2f} | {min(times):.2f} | {max(times):.2f} | {len(times)} |"
            )
    lines += [
        "",
        "## Errors",
        "",
        "The largest difference from the formula in float64 on the same inputs (length 1,024, two heads of 64), relative to the largest entry.",
        "",
        "| dtype | kernel | output | dQ | dK | dV |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in found["errors"]:
        cells = " | ".join(f"{row[name]:.1e}" for name in ("out", "d_q", "d_k", "d_v"))
        lines.append(f"| {row['dtype']} | {row['kernel']} | {cells} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--widths", nargs="+", type=int, default=[16, 32, 64, 128])
    parser.add_argument("--lengths", nargs="+", type=int, default=[128 << n for n in range(10)])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["bf16", "fp32"])
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=None, help="kernels, by the names in the table; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--least", type=float, default=0.02, help="seconds that one timing fills at least")
    parser.add_argument("--patience", type=float, default=5.0, help="seconds that one call may take")
    parser.add_argument("--budget", type=float, default=3600.0, help="seconds after which cases are left out")
    parser.add_argument(
        "--memory-gib", type=float, default=None, help="for the scores; default: 60 % of the free memory"
    )
    parser.add_argument(
        "--remark", action="append", default=[], help="a sentence for the page, such as what else ran"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results/attention"))
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here; use --device cpu")
    if strange := set(options.only or []) - set(kernels(options.device)):
        parser.error(f"--only {strange.pop()}: the kernels are {', '.join(kernels(options.device))}")
    if min(*options.widths, *options.lengths, options.heads, options.rounds) < 1:
        parser.error("widths, lengths, heads and rounds must be at least 1")
    if options.memory_gib is None:
        options.memory_gib = 0.6 * free_memory(options.device) / 2**30
    deadline = time.perf_counter() + options.budget
    rows: list[dict[str, Any]] = []
    found = {
        "command": "python " + " ".join(sys.argv),
        "environment": describe_environment(0),
        "on": torch.cuda.get_device_name()
        if options.device == "cuda"
        else f"a CPU, {torch.get_num_threads()} thread(s)",
        "heads": options.heads,
        "rounds": options.rounds,
        "remarks": options.remark,
        "results": rows,
        "errors": errors(options),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    for of_case in measured(options, deadline):
        rows += of_case
        write_json(
            options.out / "results.json", found
        )  # after every case: a run that is cut off has been worth something
        write_text(options.out / "README.md", page(found))
    summary: dict[str, Any] = {
        "cases": sum("seconds" in row for row in rows),
        "left_out": sum("left_out" in row for row in rows),
    }
    for name in chosen(options):
        if name != "flash (ours)" and (times := ratios(rows, name)):
            summary[f"times as fast as {name}"] = round(statistics.median(times), 3)
    print(json.dumps({**summary, "out": str(options.out)}))


if __name__ == "__main__":
    main()
