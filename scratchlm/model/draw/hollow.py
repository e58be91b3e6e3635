"""The real modules without memory for their weights."""

from __future__ import annotations

import torch

from scratchlm.model.config import ModelConfig
from scratchlm.model.transformer import Transformer

NO_DRAWING = {"init_linear_std": 0.0, "init_embedding_std": 0.0, "init_output_std": 0.0}
"""Zeros need no random numbers."""


def hollow(config: ModelConfig) -> Transformer:
    """The model of `config` on torch's meta device: its modules and counts are real, its weights are not there.

    Its tables of positions have one row unless it learns them: they would be computed whatever the device.
    """
    quick: dict[str, float] = dict(NO_DRAWING)
    if "learned" not in config.position:
        quick["context_length"] = 1
    with torch.device("meta"):
        return Transformer(config.model_copy(update=quick))
