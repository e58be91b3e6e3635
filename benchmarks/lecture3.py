"""The course's experiments: run what is not finished, and gather tables, pictures and figures.

Run: ``python benchmarks/lecture3.py [NAMES …] [--jobs 2] [--work runs/lecture3] [--out docs/results/lecture3]``; without names all of
recipes/experiments. Hours on two cores; stopped, the same command goes on. Equal runs are made once for all experiments.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from scratchlm.experiments import Ablation, load_experiment

SPECS = Path(__file__).resolve().parent.parent / "recipes/experiments"
KEPT = ("table.md", "table.csv", "results.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = sorted(path.stem for path in SPECS.glob("*.toml") if path.stem != "base")
    parser.add_argument("names", nargs="*", choices=[*every, []], help="default: all")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--work", type=Path, default=Path("runs/lecture3"), help="experiments and their runs")
    parser.add_argument("--out", type=Path, default=Path("docs/results/lecture3"), help="tables and pictures")
    given = parser.parse_args()
    for name in given.names or every:
        print(f"== {name}", flush=True)
        source = SPECS / f"{name}.toml"
        folder = given.work / "experiments" / name
        Ablation(load_experiment(source), source, folder, jobs=given.jobs, runs=given.work / "runs").run()
        target = given.out / name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for file in [*(folder / name for name in KEPT), *sorted((folder / "pictures").glob("*.png"))]:
            shutil.copy(file, target)


if __name__ == "__main__":
    main()
