"""How good the demo gets in its time, and in 2 and 4 times as many steps.

    python benchmarks/demo.py --out docs/results/demo --steps 1 2 4 --seeds 0 1 2

Every (multiple of the recipe's steps, seed) is one ordinary ``scratchlm run`` in a process of its own; more than one seed
only at the recipe's own length. What is there already is not run again. Writes ``results.json``, ``loss.png`` and
``samples.txt`` (of the first run) into the folder; the last line printed is the same JSON.
"""

from __future__ import annotations

import argparse
import json
import lzma
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from scratchlm.config import load_recipe
from scratchlm.data import open_corpus

RECIPE = Path("recipes/python-stdlib.toml")


def one_run(steps: int, seed: int, runs: Path) -> tuple[Path, dict[str, Any]]:
    """Run the recipe; its figures."""
    folder = runs / f"steps-{steps}-seed-{seed}"
    recipe = load_recipe(RECIPE)
    command = [sys.executable, "-m", "scratchlm", "run", str(RECIPE), "--out", str(folder)]
    if steps != recipe.train.steps:
        # four validations however long the run is, so that they do not weigh more in a longer one
        quarter = str(max(1, steps // 4))
        command += [
            "--train.steps",
            str(steps),
            "--train.eval-interval",
            quarter,
            "--train.checkpoint-interval",
            quarter,
        ]
    if seed != recipe.seed:
        command += ["--seed", str(seed)]
    record = folder / "wall.json"
    if not record.exists():
        started = time.perf_counter()
        subprocess.run(command, check=True)
        record.write_text(json.dumps({"command": " ".join(command[2:]), "seconds": time.perf_counter() - started}))
    wall = json.loads(record.read_text())
    evaluation = json.loads((folder / "evaluation.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if line["kind"] == "train"]
    speeds = sorted(line["tokens_per_second"] for line in training)
    return folder, {
        "steps": steps,
        "seed": seed,
        "tokens": training[-1]["tokens"],
        "bits_per_byte": evaluation["bits_per_byte"],
        "loss": evaluation["loss"],
        "perplexity": evaluation["perplexity"],
        "text_bytes": evaluation["text_bytes"],
        "documents": evaluation["documents"],
        "compressors": {name: found["bits_per_byte"] for name, found in evaluation["compressors"].items()},
        "tokens_per_second": {
            "median": speeds[len(speeds) // 2],
            "tenth": speeds[len(speeds) // 10],
            "ninetieth": speeds[9 * len(speeds) // 10],
        },
        "seconds_by_step": {k: v["seconds"] for k, v in json.loads((folder / "timings.json").read_text()).items()},
        "wall_seconds": round(wall["seconds"], 1),
        "command": wall["command"],
        "curve": [
            [line["step"], round(line["bits_per_byte"], 4)] for line in lines if line["kind"] == "validation"
        ],
    }


def primed_xz() -> float:
    """Bits per byte of the held-out text for ``xz -9e`` that has read the training text: the difference of two sizes."""
    corpus = open_corpus(load_recipe(RECIPE).corpus)
    training, held_out = (b"".join(corpus.bytes_of(split)) for split in ("train", "validation"))
    whole = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 64 << 20}]
    sizes = [len(lzma.compress(text, filters=whole)) for text in (training + held_out, training)]
    return 8 * (sizes[0] - sizes[1]) / len(held_out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results/demo"))
    parser.add_argument("--runs", type=Path, default=Path("runs/demo"))
    parser.add_argument("--steps", type=int, nargs="+", default=[1], help="multiples of the recipe's steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    base = load_recipe(RECIPE).train.steps
    wanted = [(multiple * base, options.seeds[0]) for multiple in options.steps]
    wanted += [(options.steps[0] * base, seed) for seed in options.seeds[1:]]
    results = []
    options.out.mkdir(parents=True, exist_ok=True)
    for number, (steps, seed) in enumerate(wanted):
        folder, figures = one_run(steps, seed, options.runs)
        results.append(figures)
        if number == 0:
            environment = json.loads((folder / "environment.json").read_text())
            for name in ("loss.png", "samples.txt"):
                shutil.copyfile(folder / name, options.out / name)
    found = {
        "benchmark": "demo",
        "date": time.strftime("%Y-%m-%d"),
        "command": "python benchmarks/demo.py " + " ".join(sys.argv[1:]),
        "python": platform.python_version(),
        "environment": environment,
        "xz_primed_bits_per_byte": primed_xz(),
        "runs": results,
    }
    (options.out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
