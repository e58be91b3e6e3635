"""A corpus and a recipe small enough that a whole run takes a second, and what a run leaves behind."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

RECIPE = """\
[corpus]
kind = "text"
paths = ["corpus.txt"]
validation_fraction = 0.1

[tokenizer]
vocab_size = 300

[model]
context_length = 32
d_model = 32
layers = 2
heads = 2

[optim]
optimizer = "muon"
warmup_steps = 3

[train]
steps = 24
batch_size = 4
eval_interval = 6
checkpoint_interval = 5
log_interval = 4
precision = "fp32"
compile = "off"

[generate]
prompts = ["def ", "é"]
max_tokens = 12
"""


def write_corpus(path: Path, documents: int = 200) -> None:
    """Documents of made-up code, with some non-ASCII words."""
    chance = random.Random(0)
    words = [
        "def",
        "return",
        "naïve",
        "x",
        "y",
        "日本",
        "total",
        "self",
        "None",
        "print",
        "🙂",
        "for",
        "in",
        "range",
    ]
    texts = []
    for number in range(documents):
        lines = [" ".join(chance.choices(words, k=chance.randint(2, 9))) for _ in range(chance.randint(2, 8))]
        texts.append(f"# file {number}\n" + "\n    ".join(lines) + "\n")
    path.write_text("<|endoftext|>".join(texts), encoding="utf-8")


def write_recipe(path: Path, text: str = RECIPE) -> None:
    path.write_text(text, encoding="utf-8")


def records(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock and the machine."""
    clock = ("seconds", "tokens_per_second", "flops_per_second", "mfu", "memory_bytes", "time")
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


def last_checkpoint(folder: Path) -> Path:
    return sorted((folder / "checkpoints").glob("step-*"))[-1]
