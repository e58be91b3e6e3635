"""A recipe that is profiled in a moment, and batches for it."""

from __future__ import annotations

import time
from typing import Any

import torch

from scratchlm.config import Recipe
from scratchlm.data.loader import Batch

MODEL = {"context_length": 8, "d_model": 16, "layers": 2, "heads": 2, "d_ff": 32, "vocab_size": 64}


def recipe(**options: Any) -> Recipe:
    values: dict[str, Any] = {
        "name": "tiny",
        "device": "cpu",
        "model": MODEL | options.pop("model", {}),
        "train": {"batch_size": 4, "precision": "fp32", "compile": "off", "steps": 20} | options.pop("train", {}),
        "optim": {"warmup_steps": 0},
    }
    return Recipe(**(values | options))


class Batches:
    """The same batch again and again; `seconds` to make one."""

    def __init__(self, seconds: float = 0.0, vocab_size: int = 64) -> None:
        ids = torch.randint(0, vocab_size, (4, 9), generator=torch.Generator().manual_seed(0))
        self.batch, self.seconds = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()), seconds

    def next_batch(self) -> Batch:
        time.sleep(self.seconds)
        return self.batch

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
