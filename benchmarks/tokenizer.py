"""Training and encoding speed beside tiktoken and Hugging Face tokenizers, on the source of Python's standard library.

    python benchmarks/tokenizer.py [--megabytes 4] [--rounds 3]

Every machine has this text. All run on one thread, in one process, in turn; medians over the rounds, with the spread.
The last line is one JSON object: text, versions, machine and all figures. Ids are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Before the import of tokenizers: one thread each.
os.environ["RAYON_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import tiktoken
import tokenizers

from scratchlm.tokenizer import PATTERNS, Tokenizer, train_bpe

SPECIAL = "<|endoftext|>"


def standard_library(size: int) -> str:
    """The first `size` bytes of the modules of Python's standard library, in order of their names, without its tests."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    parts, total = [], 0
    for path in sorted(folder.rglob("*.py")):
        if {"site-packages", "test", "tests", "idle_test"} & set(path.relative_to(folder).parts):
            continue
        parts.append(path.read_text(encoding="utf-8", errors="replace"))
        total += len(parts[-1].encode())
        if total >= size:
            break
    return "".join(parts).encode()[:size].decode("utf-8", errors="ignore")


def interleaved(rivals: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of each, in turn `rounds` times: {name: {"median", "min", "max"}}; ``ratio`` is ours over theirs."""
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for number in range(rounds):
        names = list(rivals)
        for name in names if number % 2 == 0 else reversed(names):  # whoever runs first does not always run first
            started = time.perf_counter()
            rivals[name]()
            seconds[name].append(time.perf_counter() - started)
    ours = seconds[next(iter(rivals))]
    return {
        name: {
            "median": round(statistics.median(times), 4),
            "min": round(min(times), 4),
            "max": round(max(times), 4),
            "times_ours": round(statistics.median(t / o for t, o in zip(times, ours, strict=True)), 2),
        }
        for name, times in seconds.items()
    }


def hugging_face_trainer(text: str, vocab_size: int) -> tokenizers.Tokenizer:
    other = tokenizers.Tokenizer(tokenizers.models.BPE())
    other.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SPECIAL],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    other.train_from_iterator([text], trainer)
    return other


def compile_seconds() -> dict[str, float]:
    """Seconds of the first merge with the compiled loop in a fresh process: nothing compiled yet, and compiled before."""
    script = (
        "import time; started = time.perf_counter()\n"
        "from scratchlm.tokenizer.merging_fast import merge_words_fast\n"
        "merge_words_fast({b'ab': 1}, 1); print(time.perf_counter() - started)"
    )
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "NUMBA_CACHE_DIR": folder}
        cold, warm = (
            float(
                subprocess.run(
                    [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, check=True
                ).stdout
            )
            for _ in range(2)
        )
    return {"cold": round(cold, 2), "warm": round(warm, 2)}


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def measure(megabytes: float, rounds: int) -> dict[str, Any]:
    text = standard_library(int(megabytes * 1e6))
    small, medium = text[:130_000], text[: len(text) // 2]
    size = len(text.encode())
    result: dict[str, Any] = {
        "bytes": size,
        "rounds": rounds,
        "compile": compile_seconds(),
        "train": {},
        "encode": {},
    }

    train_bpe([medium], 4096, workers=1)  # compiles, if nothing did before
    for name, part, vocab_size, repeat in [
        ("130 kB to 500", small, 500, rounds),
        ("medium to 4096", medium, 4096, 3),
    ]:
        result["train"][name] = {
            "bytes": len(part.encode()),
            "vocab_size": vocab_size,
            "seconds": interleaved(
                {
                    "scratchlm": lambda part=part, v=vocab_size: train_bpe([part], v, [SPECIAL], workers=1),
                    "tokenizers": lambda part=part, v=vocab_size: hugging_face_trainer(part, v),
                },
                repeat,
            ),
        }

    for pattern in PATTERNS:
        ours = train_bpe([medium], 4096, [SPECIAL], pattern, workers=1)
        special = set(ours.special_tokens.values())
        theirs = tiktoken.Encoding(
            "same",
            pat_str=PATTERNS[pattern].replace(r"\Z", "$"),
            mergeable_ranks={token: index for index, token in ours.vocab.items() if index not in special},
            special_tokens=ours.special_tokens,
        )
        with tempfile.TemporaryDirectory() as folder:
            hugging = tokenizers.Tokenizer.from_file(str(ours.save(folder)))
        # tokenizers is fed lines: one long text takes it much longer still.
        lines = text.splitlines(keepends=True)
        ids = ours.encode(text)
        if ids != theirs.encode_ordinary(text):
            raise SystemExit(f"ids differ from tiktoken's under {pattern}: nothing is timed")
        if [i for e in hugging.encode_batch(lines[:2000]) for i in e.ids] != [
            i for line in lines[:2000] for i in ours.encode(line)
        ]:
            raise SystemExit(f"ids differ from tokenizers' under {pattern}: nothing is timed")

        def fresh(ours: Tokenizer = ours) -> None:  # with an empty cache of words, as a new process has it
            Tokenizer(ours.vocab, ours.merges, ours.special_tokens, ours.pattern).encode_array(text)

        seconds = interleaved(
            {
                "scratchlm": lambda ours=ours: ours.encode_array(text),
                "scratchlm, first use": fresh,
                "tiktoken": lambda theirs=theirs: theirs.encode_to_numpy(text, disallowed_special=()),
                "tokenizers": lambda hugging=hugging, lines=lines: hugging.encode_batch(lines),
            },
            rounds,
        )
        result["encode"][pattern] = {
            "bytes_per_token": round(size / len(ids), 3),
            "seconds": seconds,
            "megabytes_per_second": {
                name: round(size / 1e6 / times["median"], 2) for name, times in seconds.items()
            },
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--megabytes", type=float, default=4.0, help="how much text to encode; half of it is trained on"
    )
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    started = time.perf_counter()
    load = [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None  # by others
    result = measure(arguments.megabytes, arguments.rounds)
    for task in ("train", "encode"):
        for name, figures in result[task].items():
            for rival, times in figures["seconds"].items():
                rate = figures.get("megabytes_per_second", {}).get(rival)
                print(
                    f"{task:<7}{name:<16}{rival:<22}{times['median']:8.3f} s  ({times['min']:.3f} to {times['max']:.3f})"
                    + (f"  {rate:6.1f} MB/s" if rate else "")
                )
    print(
        f"compiling the merge loop: {result['compile']['cold']} s once, {result['compile']['warm']} s from then on"
    )
    about = {
        "benchmark": "tokenizer",
        "command": f"python benchmarks/tokenizer.py --megabytes {arguments.megabytes:g} --rounds {arguments.rounds}",
        "date": time.strftime("%Y-%m-%d"),
        "text": f"standard library of Python {platform.python_version()}, without tests",
        "machine": {"processor": processor(), "cores": os.cpu_count(), "system": platform.system(), "load": load},
        "versions": {
            name: version(name) for name in ("scratchlm", "regex", "numba", "numpy", "tiktoken", "tokenizers")
        },
        "wall_seconds": round(time.perf_counter() - started, 1),
    }
    print(json.dumps(about | result))


if __name__ == "__main__":
    main()
