"""Speed of the scanners beside `regex`: megabytes per second by pattern and kind of text, and what compiling costs.

    python benchmarks/scanner.py --out docs/results/scanner-2026-11-27.json

Texts are those of the tokenizer benchmark (``tokenizer_corpora.py``), found on this machine, and its inputs meant to hurt. A
scanner walks over the whole text in calls of 4,096 spans; `regex` gets the first megabyte. Rounds are interleaved, medians
reported. Compiling is measured in a process of its own with an empty cache, in CPU seconds, from importing Numba to the end of
the first call; then once more with the cache filled.
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

import numpy as np
import regex
import tokenizer_corpora as corpora

from scratchlm.files import write_json
from scratchlm.tokenizer.patterns import PATTERNS
from scratchlm.tokenizer.scanner import scanner_for

FIRST_CALL = """
import sys, time
import numpy as np
start = time.process_time()
from scratchlm.tokenizer.scanner import scanner_for
data = np.frombuffer(b"x" * 200, np.uint8)
scanner_for(sys.argv[1])(data, np.array([[0, 200, -1]]), np.zeros(2, np.int64), np.zeros((9, 2), np.int64))
print(time.process_time() - start)
"""


def scan_seconds(name: str, text: bytes, spans: np.ndarray) -> tuple[float, int]:
    """Seconds for the whole text, and how many pre-tokens there are."""
    scan = scanner_for(name)
    assert scan is not None
    data, regions = np.frombuffer(text, np.uint8), np.array([[0, len(text), -1]], np.int64)
    cursor, rows = np.zeros(2, np.int64), -1
    start = time.perf_counter()
    while count := scan(data, regions, cursor, spans):
        rows += count
    return time.perf_counter() - start, rows


def regex_seconds(name: str, text: str) -> float:
    compiled = regex.compile(PATTERNS[name])
    start = time.perf_counter()
    compiled.findall(text)
    return time.perf_counter() - start


def first_call(name: str, cache: str) -> float:
    environment = os.environ | {"NUMBA_CACHE_DIR": cache}
    command = [sys.executable, "-c", FIRST_CALL, name]
    return float(subprocess.run(command, env=environment, capture_output=True, check=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=100, help="size of the corpora that are looked for")
    parser.add_argument("--use", type=float, default=10, help="megabytes of each text that are scanned")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cache", type=Path, default=Path("benchmarks/.cache"), help="where corpora are kept")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    size = int(options.use * 1e6)
    texts = {
        kind: corpora.load(kind, options.megabytes, options.cache).text[:size]
        for kind in ["prose", "python", "cjk", "cyrillic", "arabic", "emoji"]
    } | corpora.adversarial(size)
    spans = np.zeros((4096, 2), np.int64)
    table: dict[str, dict[str, dict[str, float]]] = {}
    for name in PATTERNS:
        table[name] = {}
        for kind, text in texts.items():
            beginning = text[:1_000_000].decode("utf-8", "surrogateescape")
            ours, theirs, rows = [], [], 0
            for _ in range(options.rounds):
                seconds, rows = scan_seconds(name, text, spans)
                ours.append(len(text) / seconds / 1e6)
                if len(theirs) < 3:
                    theirs.append(min(1.0, len(text) / 1e6) / regex_seconds(name, beginning))
            table[name][kind] = {
                "bytes": len(text),
                "pre-tokens": rows,
                "MB/s": round(statistics.median(ours), 1),
                "spread": [round(min(ours), 1), round(max(ours), 1)],
                "regex MB/s": round(statistics.median(theirs), 2),
                "ratio": round(statistics.median(ours) / statistics.median(theirs), 1),
            }
            print(f"{name:8} {kind:26} {table[name][kind]}", file=sys.stderr)
    compiling = {}
    for name in PATTERNS:
        with tempfile.TemporaryDirectory() as cache:
            compiling[name] = {"cold": first_call(name, cache), "warm": first_call(name, cache)}
    result = {
        "command": "python benchmarks/scanner.py "
        + " ".join(f"--{k} {v}" for k, v in vars(options).items() if k in ("megabytes", "use", "rounds")),
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"cores": os.cpu_count(), "processor": _processor(), "python": platform.python_version()},
        "versions": {"numpy": np.__version__, "regex": regex.__version__, "numba": _version("numba")},
        "speed": table,
        "first call, CPU seconds": compiling,
    }
    write_json(options.out, result)
    print(json.dumps({name: {kind: row["MB/s"] for kind, row in rows.items()} for name, rows in table.items()}))


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


if __name__ == "__main__":
    main()
