"""Models whose weights come from somewhere else: built without memory or random numbers, then given their tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from scratchlm.model.config import ModelConfig
from scratchlm.model.draw.hollow import NO_DRAWING
from scratchlm.model.position import TablePosition
from scratchlm.model.transformer import Transformer


def hollow_model(config: ModelConfig) -> Transformer:
    """The model of `config` on the meta device, but with its tables of positions, for :func:`install`."""
    with torch.device("meta"):
        model = Transformer(config.model_copy(update=NO_DRAWING))
    model.config = config
    return model


def install(model: Transformer, tensors: Mapping[str, Tensor]) -> None:
    """Make `tensors` the weights of a hollow model, without copying them; each keeps its dtype.

    Tables of positions become fp64 if a weight is.

    Args:
        model: from :func:`hollow_model`.
        tensors: every name of its state; not the head's if that is tied.
    """
    tied = model.config.tied_embeddings
    for prefix, module in model.named_modules():
        for own, parameter in list(module.named_parameters(recurse=False)):
            name = f"{prefix}.{own}"
            if tied and name == "head.weight":
                continue
            fresh = nn.Parameter(tensors[name])
            fresh.__dict__.update(parameter.__dict__)  # how the optimizer groups it
            setattr(module, own, fresh)
        for own in [own for own, _ in module.named_buffers(recurse=False)]:
            if f"{prefix}.{own}" in tensors:
                setattr(module, own, tensors[f"{prefix}.{own}"])
    if tied:
        model.head.weight = model.embedding.weight
    if any(tensor.dtype == torch.float64 for tensor in tensors.values()):
        for module in model.modules():
            if isinstance(module, TablePosition):
                module.double()
