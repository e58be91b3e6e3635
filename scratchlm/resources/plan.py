"""What training needs to know of its memory before it runs: for ``train.micro_batch = auto``.

The training loop is given it (:class:`scratchlm.train.fitting.Plan`) and imports nothing from here.
"""

from __future__ import annotations

from typing import Any

import torch

from scratchlm.config import OptimConfig, TrainConfig
from scratchlm.data.loader import Batch
from scratchlm.model.config import ModelConfig
from scratchlm.resources.any_depth import Steps
from scratchlm.resources.step import as_run_on
from scratchlm.train.fitting import Need, Plan


def plan_of(config: ModelConfig, optim: OptimConfig, train: TrainConfig, *, device_type: str = "cpu") -> Plan:
    """That of language modelling: a step traced without memory.

    Args:
        config: the architecture, with its vocabulary.
        optim, train: sections of the recipe.
        device_type: where it will run: attention, the loss and some norms need less memory on CUDA.
    """
    model = as_run_on(device_type, config, config.context_length)
    steps = Steps(model, optim, train, device_type=device_type)

    def need(micro_batch: int, parts: int, precision: str, compiled: bool) -> Need:
        options: dict[str, Any] = {"precision": precision, "accumulation": parts, "compiled": compiled}
        return steps.ask(
            lambda step: Need(step.peak(), step.bytes_of("optimizer state")), micro_batch=micro_batch, **options
        )

    def probe(sequences: int) -> Any:
        shape = sequences, config.context_length
        ids = torch.randint(config.vocab_size, shape)
        places = documents = None
        if train.document_boundaries:
            places, documents = torch.arange(shape[1]).repeat(sequences, 1), torch.zeros_like(ids)
        return Batch(ids, torch.randint(config.vocab_size, shape), places, documents)

    return Plan(need, probe)
