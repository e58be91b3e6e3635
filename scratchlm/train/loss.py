"""The training objective: next-token cross-entropy."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from scratchlm.kernels.cross_entropy import chunked_linear_cross_entropy, reference_linear_cross_entropy
from scratchlm.model.transformer import Transformer


class Batch(Protocol):
    """What a batch source yields: int64 tensors of shape (batch, length)."""

    inputs: Tensor
    targets: Tensor
    positions: Tensor | None
    documents: Tensor | None


class NextTokenLoss:
    """Sum over a batch of −log p(target | what came before), in nats.

    Args:
        model: the Transformer.
        kernel: ``reference`` (all logits) or ``chunked``; ``auto`` is chunked.
    """

    def __init__(self, model: Transformer, kernel: str = "auto") -> None:
        self.model = model
        self.kernel = "chunked" if kernel == "auto" else kernel
        self.body = model.body
        self.compiled = False

    def compile(self) -> None:
        """Run the model's blocks and the pointwise part of the loss through torch.compile."""
        self.body = torch.compile(self.model.body, dynamic=False)
        self.compiled = True

    def eager(self) -> None:
        """Undo :meth:`compile`."""
        self.body = self.model.body
        self.compiled = False

    def __call__(self, batch: Batch) -> Tensor:
        hidden = self.model.hidden(batch.inputs, batch.positions, batch.documents, body=self.body)
        if self.kernel == "reference":
            return reference_linear_cross_entropy(hidden, self.model.head.weight, batch.targets)
        return chunked_linear_cross_entropy(hidden, self.model.head.weight, batch.targets, compiled=self.compiled)
