"""What small models of several architectures can do: variants × probes × seeds.

    python benchmarks/probes.py --out docs/results/probes --seeds 0 1 2
    python benchmarks/probes.py --variants rope none --probes copying "recall 8" --seeds 0

Every (variant, probe, seed) is kept in ``results.json`` as soon as it is done and not run again while its settings are
the same: a run can be stopped and continued, and two processes may share the work (``--reverse`` makes the second begin
at the other end). ``tables.md`` and ``probes.png`` are drawn from all that is there; ``--draw`` only draws.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from scratchlm.errors import UserError
from scratchlm.evaluate.environment import describe_environment
from scratchlm.evaluate.plots import png_bytes
from scratchlm.evaluate.probes import Copying, Induction, ModularAddition, ProbeResult, Recall, Task, probe
from scratchlm.files import lock, read_json, stable_hash, write_bytes, write_json, write_text
from scratchlm.model import ModelConfig
from scratchlm.progress import progress

BASE: dict[str, Any] = {"d_model": 64, "layers": 2, "heads": 4, "context_length": 256}

VARIANTS: dict[str, dict[str, Any]] = {
    "rope": {"position": "rope"},
    "none": {"position": "none"},
    "alibi": {"position": "alibi"},
    "sinusoidal": {"position": "sinusoidal"},
    "learned": {"position": "learned"},
    "window 8": {"mask": "sliding_window", "window": 8},
    "linear": {"attention": "linear"},
    "retention": {"attention": "retention"},
    "gated_delta": {"attention": "gated_delta", "position": "none"},
    "delta, then full": {"attention": "gated_delta mha", "position": "none"},
    "rope, 1 layer": {"position": "rope", "layers": 1},
}
"""Name → what differs from BASE."""


class Setting(NamedTuple):
    """A task and how it is trained."""

    task: Task
    steps: int
    lengths: tuple[int, ...] = (1,)
    batch: int = 64
    lr: float = 3e-3
    weight_decay: float = 0.1


PROBES: dict[str, Setting] = {
    "copying": Setting(Copying(count=16, symbols=16), 400),
    "copying, any length": Setting(Copying(count=16, symbols=32, shortest=4), 1000, (1, 2, 4)),
    "induction": Setting(Induction(count=16, symbols=64), 800, (1, 2, 4)),
    **{f"recall {pairs}": Setting(Recall(pairs=pairs), 1000) for pairs in (4, 8, 12, 16)},
    "recall, far": Setting(Recall(pairs=8, tail=32), 1000, (1, 2, 4)),
    "modular addition": Setting(
        ModularAddition(modulus=59, train_share=0.7), 2000, batch=256, lr=5e-3, weight_decay=1.0
    ),
}


def key_of(variant: str, name: str, seed: int) -> str:
    """Names a run by all that decides its result."""
    setting = PROBES[name]
    return stable_hash(
        [{**BASE, **VARIANTS[variant]}, setting.task.name, dataclasses.asdict(setting.task), setting[1:], seed]
    )


class Results:
    """``results.json``: read anew before, and written right after, every run, so that processes can share it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "results.json"
        self.lock = Path("runs/probes.lock")

    def read(self) -> dict[str, Any]:
        return (
            read_json(self.path) if self.path.exists() else {"benchmark": "probes", "environments": [], "runs": {}}
        )

    def add(self, key: str, run: dict[str, Any], environment: dict[str, Any]) -> None:
        with lock(self.lock):
            found = self.read()
            if environment not in found["environments"]:
                found["environments"].append(environment)
            found["runs"][key] = {**run, "environment": found["environments"].index(environment)}
            write_json(self.path, found)


def one_run(variant: str, name: str, seed: int, device: str) -> dict[str, Any]:
    """Train and ask; the record of it."""
    setting = PROBES[name]
    fields = {**BASE, **VARIANTS[variant]}
    result = probe(
        ModelConfig(**fields),
        setting.task,
        steps=setting.steps,
        batch=setting.batch,
        lr=setting.lr,
        seed=seed,
        device=device,
        evaluate_lengths=setting.lengths,
        weight_decay=setting.weight_decay,
        show_progress=True,
    )
    return {
        "variant": variant,
        "probe": name,
        "seed": seed,
        "model": fields,
        "task": {"name": setting.task.name, **dataclasses.asdict(setting.task)},
        "training": {name: value for name, value in setting._asdict().items() if name != "task"},
        "device": device,
        "date": time.strftime("%Y-%m-%d"),
        "command": "python benchmarks/probes.py " + " ".join(f'"{a}"' if " " in a else a for a in sys.argv[1:]),
        "result": result.model_dump(mode="json"),
    }


class Cell(NamedTuple):
    """Held-out accuracies of one (variant, probe) at one length, one per seed."""

    scores: list[float]
    length: int
    without_mechanism: float

    @property
    def middle(self) -> float:
        return statistics.median(self.scores)

    def __str__(self) -> str:
        middle, low, high = (f"{100 * score:.1f}" for score in (self.middle, min(self.scores), max(self.scores)))
        return middle if len(self.scores) == 1 or low == high else f"{middle} ({low} – {high})"


def current(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs whose variant, task and training are still what they are called here."""
    return [
        run
        for key, run in found["runs"].items()
        if run["variant"] in VARIANTS
        and run["probe"] in PROBES
        and key == key_of(run["variant"], run["probe"], run["seed"])
    ]


def cells_of(found: dict[str, Any]) -> dict[tuple[str, str, int], Cell]:
    """(variant, probe, multiple of the length) → its runs."""
    cells: dict[tuple[str, str, int], Cell] = {}
    for run in current(found):
        for times, at in ProbeResult.model_validate(run["result"]).by_length.items():
            cell = cells.setdefault(
                (run["variant"], run["probe"], times), Cell([], at.length, at.without_mechanism)
            )
            cell.scores.append(at.accuracy)
    return cells


def table(
    cells: dict[tuple[str, str, int], Cell], columns: Sequence[tuple[str, int]], titles: Sequence[str]
) -> str:
    """Variants down, `columns` (probe, multiple) across; the first row is what can be had without the mechanism."""
    bounds = []
    for column in columns:
        bounds.append(
            next((100 * c.without_mechanism for (_, *rest), c in cells.items() if tuple(rest) == column), None)
        )
    lines = ["| variant | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    lines.append(
        "| *without the mechanism* | " + " | ".join("" if b is None else f"*{b:.1f}*" for b in bounds) + " |"
    )
    for variant in VARIANTS:
        row = [cells.get((variant, *column)) for column in columns]
        if any(row):
            lines.append(f"| {variant} | " + " | ".join("" if cell is None else str(cell) for cell in row) + " |")
    return "\n".join(lines) + "\n"


def tables(found: dict[str, Any]) -> str:
    """All results as a page."""
    cells = cells_of(found)
    here = [name for name in PROBES if any(key[1] == name for key in cells)]
    seeds = sorted({run["seed"] for run in current(found)})
    page = (
        "# Probes: held-out accuracy\n\nPer cent of the questions answered right: median over the seeds "
        f"({', '.join(map(str, seeds))}), with the least and the greatest where they differ. What the probes are: "
        "[probes.md](../../probes.md). Raw figures, settings and machine: [results.json](results.json).\n\n"
        "![accuracy by length and by pairs](probes.png)\n\n"
    )
    page += "## At the trained length\n\n" + table(cells, [(name, 1) for name in here], here)
    long = [(name, times) for name in here for times in PROBES[name].lengths if len(PROBES[name].lengths) > 1]
    if long:
        page += "\n## Beyond it\n\n" + table(cells, long, [f"{name}: {times}×" for name, times in long])
    return page


def draw(found: dict[str, Any]) -> bytes:
    """A panel per probe with several lengths, and one of recall by the number of pairs."""
    from matplotlib.figure import Figure

    cells = cells_of(found)
    panels: list[tuple[str, str, dict[int, tuple[str, int]]]] = [
        (name, "tokens", {times * setting.task.length: (name, times) for times in setting.lengths})
        for name, setting in PROBES.items()
        if len(setting.lengths) > 1
    ]
    by_pairs = {
        setting.task.pairs: (name, 1)
        for name, setting in PROBES.items()
        if isinstance(setting.task, Recall) and setting.task.tail is None
    }
    panels.append(("recall", "pairs", dict(sorted(by_pairs.items()))))
    figure = Figure(figsize=(4.2 * len(panels), 4.4), layout="constrained", facecolor="white")
    markers, colours = "osD^vPX*<>h", [*(f"C{index}" for index in range(10)), "black"]
    for axes, (title, unit, points) in zip(
        figure.subplots(1, len(panels), squeeze=False).ravel(), panels, strict=True
    ):
        for index, variant in enumerate(VARIANTS):
            there = {x: cells[variant, *column] for x, column in points.items() if (variant, *column) in cells}
            if not there:
                continue
            scores = [100 * cell.middle for cell in there.values()]
            spread = [
                [100 * (cell.middle - min(cell.scores)) for cell in there.values()],
                [100 * (max(cell.scores) - cell.middle) for cell in there.values()],
            ]
            style = {
                "marker": markers[index % len(markers)],
                "color": colours[index % len(colours)],
                "capsize": 3,
                "markersize": 5,
            }
            axes.errorbar(list(there), scores, yerr=spread, label=variant, **style)
        bounds = {
            x: 100 * next(cell.without_mechanism for (_, *rest), cell in cells.items() if tuple(rest) == column)
            for x, column in points.items()
            if any(tuple(rest) == column for _, *rest in cells)
        }
        axes.plot(list(bounds), list(bounds.values()), ":", color="0.5", label="without the mechanism")
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(points), [str(x) for x in points])
        axes.minorticks_off()
        axes.set_xlim(0.9 * min(points), 1.1 * max(points))
        axes.set_ylim(0, 103)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel(f"{unit} (trained on {min(points)})" if unit == "tokens" else unit)
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("held-out accuracy (%)")
    # One legend for all panels, in which a variant that only one of them has is named, too.
    entries = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=6, frameon=False)
    return png_bytes(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results/probes"))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--probes", nargs="+", choices=PROBES, default=list(PROBES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of this process")
    parser.add_argument("--reverse", action="store_true", help="begin at the end, beside another process")
    parser.add_argument("--draw", action="store_true", help="run nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = Results(options.out)
    # Seeds outermost: stopped early, every variant has been tried.
    wanted = [(v, name, seed) for seed in options.seeds for name in options.probes for v in options.variants]
    wanted = [] if options.draw else wanted[:: -1 if options.reverse else 1]
    environment = describe_environment()
    bar = progress(wanted, description="probes", unit="run")
    for variant, name, seed in bar:
        key = key_of(variant, name, seed)
        if key in results.read()["runs"]:
            continue
        bar.set_postfix_str(f"{variant}: {name}, seed {seed}")
        run = one_run(variant, name, seed, options.device)
        results.add(key, run, environment)
        bar.write(
            f"{variant}: {name}, seed {seed}: {100 * run['result']['by_length']['1']['accuracy']:.1f} %",
            file=sys.stderr,
        )
    found = results.read()
    if not found["runs"]:
        raise UserError(f"there is nothing to draw in {options.out}; run without --draw first")
    write_text(options.out / "tables.md", tables(found))
    write_bytes(options.out / "probes.png", draw(found))
    print(tables(found))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"benchmarks/probes.py: {error}")
