"""The course's experiments: run what is not finished, and gather tables, pictures and figures.

Run: ``python benchmarks/lecture3.py [NAMES …] [--jobs 2] [--work runs/lecture3] [--out docs/results/lecture3]``; without names all of
recipes/experiments that are for a CPU. Hours on two cores; stopped, the same command goes on. Equal runs are made once for all experiments. The page README.md in the
output folder gets its short tables from here; its words are a person's.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import shutil
from pathlib import Path

from scratchlm.experiments import Ablation, load_experiment

SPECS = Path(__file__).resolve().parent.parent / "recipes/experiments"
LARGE = "larger"
"""For a GPU: it is run when it is named."""
KEPT = ("table.md", "table.csv", "results.json")


def short_table(folder: Path) -> str:
    """An experiment's table.csv as the page shows it: losses, differences, verdicts."""
    with (folder / "table.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    in_bits = json.loads((folder / "results.json").read_text(encoding="utf-8"))["judged_by"] == "bits per byte"
    measure, title = ("bits_per_byte", "bits per byte") if in_bits else ("loss", "loss, nats per token")
    rates = any(row["rate"] for row in rows)
    lines = [
        f"| variant |{' learning rates |' * rates} {title} | difference, 95 % interval | verdict |",
        f"| --- |{' --- |' * rates} ---: | ---: | --- |",
    ]
    for row in rows:
        loss, error, difference = (
            _number(row[measure]),
            _number(row[f"{measure}_error"]),
            _number(row["difference"]),
        )
        shown = "–" if math.isnan(loss) else f"{loss:.3f}" + ("" if math.isnan(error) else f" ± {error:.3f}")
        apart = ""
        if not math.isnan(difference):
            apart = f"{difference:+.3f}"
            if row["low"]:
                apart += f" [{_number(row['low']):+.3f}, {_number(row['high']):+.3f}]"
        cells = [row["variant"], *([f"×{float(row['factor']):g} ({row['rate']})"] if rates else [])]
        lines.append("| " + " | ".join([*cells, shown, apart.replace("-", "−"), row["verdict"]]) + " |")
    return "\n".join(lines)


def _number(text: str) -> float:
    return float(text) if text else math.nan


def filled(page: str, folder: Path) -> str:
    """The page with the tables of `folder`: each stands between ``<!-- table NAME -->`` and ``<!-- end -->``."""

    def table(found: re.Match[str]) -> str:
        if not (folder / found[1] / "table.csv").exists():  # not run yet
            return found[0]
        return f"<!-- table {found[1]} -->\n{short_table(folder / found[1])}\n<!-- end -->"

    return re.sub(r"<!-- table ([\w-]+) -->\n.*?<!-- end -->", table, page, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = sorted(path.stem for path in SPECS.glob("*.toml") if not path.stem.startswith("base"))
    parser.add_argument("names", nargs="*", choices=[*every, []], help=f"default: all but {LARGE}")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--work", type=Path, default=Path("runs/lecture3"), help="experiments and their runs")
    parser.add_argument("--out", type=Path, default=Path("docs/results/lecture3"), help="tables and pictures")
    given = parser.parse_args()
    for name in given.names or [name for name in every if name != LARGE]:
        print(f"== {name}", flush=True)
        source = SPECS / f"{name}.toml"
        folder = given.work / "experiments" / name
        Ablation(load_experiment(source), source, folder, jobs=given.jobs, runs=given.work / "runs").run()
        target = given.out / name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for file in [*(folder / name for name in KEPT), *sorted((folder / "pictures").glob("*.png"))]:
            shutil.copy(file, target)
    page = given.out / "README.md"
    if page.exists():
        page.write_text(filled(page.read_text(encoding="utf-8"), given.out), encoding="utf-8")


if __name__ == "__main__":
    main()
