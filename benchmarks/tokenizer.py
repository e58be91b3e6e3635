"""The tokenizer beside its peers: encoding, decoding, training, memory, first use, hard inputs, data preparation.

    pip install -e '.[bench]'
    python benchmarks/tokenizer.py                                   # everything: about half an hour on 2 cores
    python benchmarks/tokenizer.py --only encode --corpora prose --vocab 32000
    python benchmarks/tokenizer.py --only train,memory --rounds 3 --megabytes 20

Parts (``--only``): prepare, encode, scripts, threads, decode, train, memory, hurt, first, shards. Corpora are found on the machine
(``tokenizer_corpora.py`` says where) and vocabularies trained here once; both are kept in ``--cache``. Each measurement
runs in a process of its own (``tokenizer_measure.py``), rivals in turn in the same process. Results are merged into
``results.json`` in ``--out``, so that parts can be run one by one; ``tables.md`` there and the chart are made from all of
it. The last line printed is one JSON object with every ratio against its target.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import tokenizer_report
from tokenizer_corpora import adversarial
from tokenizer_engines import versions

from scratchlm.files import read_json, write_json

HERE = Path(__file__).parent
PARTS = ("prepare", "encode", "scripts", "threads", "decode", "train", "memory", "hurt", "first", "shards")
MAIN_VOCAB = 32_000
FAST = ["scratchlm", "gigatoken", "snaptokens", "tiktoken"]


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit of the working tree, with ``+`` if it has changes; "" outside a repository."""
    try:
        name = subprocess.run(
            ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
        dirty = subprocess.run(
            ["git", "-C", str(HERE), "status", "--porcelain", "--", "../scratchlm"], capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return name.stdout.strip() + ("+" if dirty.stdout.strip() else "")


class Runner:
    """Runs measurements in fresh processes and keeps what they found in ``results.json``."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.path = options.out / "results.json"
        self.results: dict[str, Any] = read_json(self.path, "results") if self.path.exists() else {"parts": {}}

    def measure(
        self, part: str, threads: int | None = None, timeout: float | None = None, **job: Any
    ) -> dict[str, Any]:
        """What `part` of tokenizer_measure.py finds. `threads` holds back the thread pools of peers; None: all cores."""
        job = {
            "part": part,
            "cache": str(self.options.cache),
            "megabytes": self.options.megabytes,
            "rounds": self.options.rounds,
        } | job
        environment = dict(os.environ)
        if threads is not None:
            environment["RAYON_NUM_THREADS"] = str(threads)
            environment["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
            job["threads"] = threads
        command = [sys.executable, str(HERE / "tokenizer_measure.py"), json.dumps(job)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
        if done.returncode:
            raise SystemExit(f"{part} {job}: {done.stderr.strip()[-2000:]}")
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return found

    def keep(self, name: str, found: dict[str, Any]) -> None:
        load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
        about = {"date": time.strftime("%Y-%m-%d"), "commit": commit(), "rounds": self.options.rounds, "load": load}
        self.results["parts"][name] = found | {"about": about}
        self.results["machine"] = {
            "processor": processor(),
            "cores": os.cpu_count(),
            "system": platform.system(),
            "python": platform.python_version(),
        }
        self.results["versions"] = versions()
        write_json(self.path, self.results)

    # ---------------------------------------------------------------- parts

    def prepare(self) -> None:
        vocabularies = [(size, "gpt2") for size in self.options.vocab] + [
            (MAIN_VOCAB, "gpt2"),
            (MAIN_VOCAB, "cl100k"),
        ]
        found = self.measure("prepare", vocabularies=vocabularies)
        self.results["corpora"] = found["corpora"]
        self.keep("prepare", found)

    def encode(self) -> None:
        for corpus in self.options.corpora:
            for size in self.options.vocab:
                main = corpus == "prose" and size == MAIN_VOCAB
                job = {"corpus": corpus, "vocab_size": size, "pattern": "gpt2"}
                engines = None if size == MAIN_VOCAB else [*FAST, "tokenizers"]
                found = self.measure("encode", 1, **job, from_str=main, engines=engines)
                self.keep(f"encode {corpus} {size}", found)
                self.show("warm", found["warm"])
        if "prose" in self.options.corpora and MAIN_VOCAB in self.options.vocab:
            found = self.measure("encode", 1, corpus="prose", vocab_size=MAIN_VOCAB, pattern="cl100k")
            self.keep(f"encode prose {MAIN_VOCAB} cl100k", found)
            self.show("warm, cl100k", found["warm"])

    def scripts(self) -> None:
        for corpus in (
            "prose",
            "cjk",
            "cyrillic",
            "arabic",
            "emoji",
        ):  # prose here: the ASCII speed of the same minutes
            found = self.measure("encode", 1, corpus=corpus, vocab_size=MAIN_VOCAB, pattern="gpt2", engines=FAST)
            self.keep(f"script {corpus}", found)
            self.show(corpus, found["warm"])

    def threads(self) -> None:
        for corpus in self.options.corpora:
            found = self.measure("encode", 2, corpus=corpus, vocab_size=MAIN_VOCAB, pattern="gpt2", engines=FAST)
            self.keep(f"threads {corpus}", found)
            self.show(f"{corpus}, 2 threads", found["warm"])

    def decode(self) -> None:
        for corpus in ("prose", "multilingual"):
            found = self.measure("decode", 1, corpus=corpus, vocab_size=MAIN_VOCAB, pattern="gpt2")
            self.keep(f"decode {corpus}", found)
            self.show(f"decode {corpus}", found["decode"])

    def train(self) -> None:
        for size in self.options.vocab:
            if size > MAIN_VOCAB:
                continue
            found = self.measure("train", corpus="prose", vocab_size=size, engines=self.options.engines)
            self.keep(f"train {size}", found)
            self.show(f"train {size}", found["train"])

    def memory(self) -> None:
        folder = self.vocabulary_folder()
        found: dict[str, Any] = {}
        for task, engines in {
            "encode": ("scratchlm", "gigatoken", "gigatoken encode_files"),
            "train": ("scratchlm", "gigatoken"),
        }.items():
            for engine in engines:
                job = {
                    "corpus": "prose",
                    "vocabulary": folder,
                    "vocab_size": MAIN_VOCAB,
                    "task": task,
                    "engine": engine,
                }
                runs = [self.measure("memory", **job) for _ in range(3)]
                peaks = sorted(run["peak_mb"] for run in runs)
                found[f"{task} {engine}"] = {
                    "peak_mb": peaks[1],
                    "min": peaks[0],
                    "max": peaks[2],
                    "before_mb": runs[0]["before_mb"],
                }
                print(f"memory  {task} {engine}: {peaks[1]:.0f} MB beyond {runs[0]['before_mb']:.0f}")
        self.keep("memory", found)

    def hurt(self) -> None:
        folder = self.vocabulary_folder()
        found: dict[str, Any] = {}
        for name in adversarial(1000):
            for engine in ("scratchlm", "gigatoken", "tiktoken"):
                if name == "random bytes" and engine == "tiktoken":
                    continue  # takes str alone
                job = {
                    "input": name,
                    "engine": engine,
                    "vocabulary": folder,
                    "megabytes": min(10.0, self.options.megabytes),
                }
                job["rounds"] = 3 if engine == "scratchlm" else 1
                try:
                    rate = self.measure("hurt", 1, timeout=30, **job)["mb_per_s"]
                except subprocess.TimeoutExpired:
                    rate = 0.0  # not done within 30 seconds
                except SystemExit as error:
                    rate = f"failed: {str(error).splitlines()[-1][:120]}"
                found.setdefault(name, {})[engine] = rate
            print(f"hurt    {name:<28}{found[name]}")
        self.keep("hurt", {"mb_per_s": found})

    def first(self) -> None:
        """Whole processes, from start to end: nothing compiled before, and everything compiled before."""
        folder = self.vocabulary_folder()
        load = "from scratchlm.tokenizer import Tokenizer, train_bpe; from pathlib import Path\n"
        load += f"tokenizer = Tokenizer.load({folder + '/tokenizer.json'!r})\n"
        prose = (self.options.cache / f"prose-{self.options.megabytes:g}.bin").read_bytes().replace(b"\0", b"")
        text, more = self.options.cache / "first-use.txt", self.options.cache / "first-use-more.txt"
        text.write_bytes(prose[:4_000_000])
        more.write_bytes(prose[:40_000_000])
        scripts = {
            "import numpy": "import numpy",
            "encode a line": load + "assert tokenizer.encode('Hello, it is 2026')",
            "encode 4 MB": load + f"assert len(tokenizer.encode_array(Path({str(text)!r}).read_bytes()))",
            # More than plain Python would be left to do.
            "encode 40 MB": load + f"assert len(tokenizer.encode_array(Path({str(more)!r}).read_bytes()))",
            "train 4 MB to 4096": f"from scratchlm.tokenizer import train_bpe\nassert train_bpe({str(text)!r}, 4096).merges",
            "gigatoken: encode a line": f"import gigatoken; assert len(gigatoken.Tokenizer({folder + '/tokenizer.json'!r}).encode('Hello'))",
        }
        seconds: dict[str, list[float]] = {}

        def run(name: str, script: str, environment: dict[str, str]) -> None:
            started = time.perf_counter()
            done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"first: {name}: {done.stderr[-1500:]}")
            seconds.setdefault(name, []).append(round(time.perf_counter() - started, 3))

        for script in scripts.values():  # compiles what was not, reads files into memory
            run("", script, dict(os.environ))
        del seconds[""]
        for _ in range(self.options.rounds):
            for name, script in scripts.items():
                run(name, script, dict(os.environ))
        for name in ("encode a line", "encode 4 MB", "encode 40 MB", "train 4 MB to 4096"):
            for _ in range(3):
                with tempfile.TemporaryDirectory() as empty:
                    run(f"{name}, nothing compiled", scripts[name], {**os.environ, "NUMBA_CACHE_DIR": empty})
        found = {
            name: {"seconds": statistics.median(times), "min": min(times), "max": max(times)}
            for name, times in seconds.items()
        }
        for name, times in found.items():
            print(f"first   {name:<44}{times['seconds']:7.2f} s  ({times['min']:.2f} to {times['max']:.2f})")
        self.keep("first", {"processes": found})

    def shards(self) -> None:
        for workers in (1, 2):
            found = self.measure("shards", workers, corpus="prose", vocab_size=MAIN_VOCAB, workers=workers)
            self.keep(f"shards {workers}", found)
            self.show(f"shards, {workers} workers (same bytes: {found['same_bytes']})", found["shards"])

    # ---------------------------------------------------------------- helpers

    def vocabulary_folder(self) -> str:
        folders = sorted(
            self.options.cache.glob(f"vocabulary-{MAIN_VOCAB}-gpt2-*"), key=lambda path: path.stat().st_mtime
        )
        if not folders:
            raise SystemExit("no vocabulary yet: run with --only prepare first")
        return str(folders[-1])

    @staticmethod
    def show(title: str, figures: dict[str, dict[str, float]]) -> None:
        for name, row in figures.items():
            print(
                f"{title:<24}{name:<24}{row['mb_per_s']:9.1f} MB/s  {row['cores']:.2f} cores  ours is {row['times_ours']:.2f}x",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = lambda text: text.split(",")  # noqa: E731
    parser.add_argument(
        "--only", type=names, default=list(PARTS), help=f"parts, comma-separated: {', '.join(PARTS)}"
    )
    parser.add_argument("--corpora", type=names, default=["prose", "python", "multilingual"])
    parser.add_argument(
        "--vocab", type=lambda text: [int(size) for size in text.split(",")], default=[10_000, 32_000, 100_000]
    )
    parser.add_argument("--engines", type=names, help="trainers to run, comma-separated (default: all installed)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=float, default=100.0, help="size of each corpus")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "scratchlm-tokenizer-benchmark")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs/results/tokenizer")
    parser.add_argument(
        "--chart", type=Path, default=None, help="picture to draw (default: tokenizer.svg in --out)"
    )
    options = parser.parse_args()
    if unknown := set(options.only) - set(PARTS):
        parser.error(f"--only: no part is called {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    for folder in (options.cache, options.out):
        folder.mkdir(parents=True, exist_ok=True)
    runner = Runner(options)
    runner.results["command"] = "python benchmarks/tokenizer.py"
    for part in PARTS:
        if part in options.only:
            getattr(runner, part)()
    ratios = tokenizer_report.write(runner.results, options.out, options.chart)
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
