"""Tiny Shakespeare by characters: our recipe's wall-clock beside nanoGPT's recipe, everything included.

    python benchmarks/speedrun.py --text tinyshakespeare.txt --rounds 3 --out docs/results/speedrun
    python benchmarks/speedrun.py --text tinyshakespeare.txt --device cuda --rounds 1 --ours 3 --out docs/results/gpu

Each run is a process from its first import to its last line, ours `scratchlm run` in a fresh folder without any cache of tokenizers or shards: tokenizer, data,
training, evaluation, samples, report; what Numba has compiled on this machine before stays compiled. Theirs is the recipe of nanoGPT's README for a CPU (or a GPU) on a module of our own (``gpt2_style.py``): its own code is
not at hand here. In turns, one seed per round; the loss is that of the whole held-out text, in nats per character, and on a GPU, where it learns the text by heart in the
end, also its lowest estimate, as its README quotes it, and when that was. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from scratchlm.evaluate.environment import describe_environment
from scratchlm.files import write_json
from scratchlm.train.metrics import read_metrics

HERE = Path(__file__).resolve().parent
RECIPES = {
    device: HERE.parent / f"recipes/speedrun/{name}.toml"
    for device, name in (("cpu", "shakespeare-char"), ("cuda", "shakespeare-char-gpu"))
}


def ours(text: Path, device: str, threads: int, seed: int, folder: Path) -> dict[str, float]:
    command = [
        sys.executable,
        "-m",
        "scratchlm",
        "run",
        str(RECIPES[device]),
        "--corpus.paths",
        str(text),
        "--seed",
        str(seed),
    ]
    options = ["--threads", str(threads), "--out", str(folder / "run"), "--data.cache", str(folder / "cache")]
    subprocess.run([*command, *options], check=True, capture_output=True)
    found = [record for record in read_metrics(folder / "run/metrics.jsonl") if record["kind"] == "validation"][-1]
    # Where a recipe averages its weights, the average is its model.
    bits = found.get("bits_per_byte_ema", found["bits_per_byte"])
    return {"loss": float(bits) * math.log(2), "training_seconds": found["seconds"]}


def theirs(text: Path, device: str, threads: int, seed: int, folder: Path) -> dict[str, float]:
    command = [sys.executable, str(HERE / "gpt2_style.py"), str(text), device, str(threads), str(seed)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--device", choices=list(RECIPES), default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ours", type=int, default=1, help="runs of ours in each round")
    parser.add_argument("--theirs", type=int, default=1, help="runs of theirs in each round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {"scratchlm": [], "nanogpt-recipe": []}
    seeds = {"scratchlm": 0, "nanogpt-recipe": 0}
    for _ in range(given.rounds):
        for name, run in [*[("scratchlm", ours)] * given.ours, *[("nanogpt-recipe", theirs)] * given.theirs]:
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                result = run(given.text.resolve(), given.device, given.threads, seeds[name], Path(folder))
                found[name].append({"seed": seeds[name], **result, "seconds": time.perf_counter() - start})
            seeds[name] += 1
            print(f"{name}: {found[name][-1]}", file=sys.stderr, flush=True)
    ran = {name: runs for name, runs in found.items() if runs}
    seconds = {name: statistics.median(run["seconds"] for run in runs) for name, runs in ran.items()}
    summary: dict[str, Any] = {
        "benchmark": "speedrun",
        "command": "python benchmarks/speedrun.py " + " ".join(sys.argv[1:]),
        "environment": describe_environment(),
        "threads": given.threads,
        "runs": found,
        "seconds": seconds,
        "loss": {name: max(run["loss"] for run in runs) for name, runs in ran.items()},
        "times_as_fast": seconds["nanogpt-recipe"] / seconds["scratchlm"] if len(seconds) == 2 else None,
    }
    if given.out is not None:
        write_json(given.out / f"{RECIPES[given.device].stem}.json", summary)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
