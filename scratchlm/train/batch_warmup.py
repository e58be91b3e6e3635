"""Batches that begin small and grow: early on the gradient is the same whatever the batch, and a small one is cheaper.

::

    sequences                 ┌───────────── batch_size            batch_warmup_start = 4, batch_size = 16,
       16                ┌────┘                                    batch_warmup_steps = 9: three steps each of 4, 8 and 12
        8          ┌─────┘
        4    ──────┘                                               (Brown et al. 2020, appendix B, grew GPT-3's by a line;
             0     3     6    9   step                              McCandlish et al. 2018, arXiv 1812.06162, say why)

Learning rates follow the step, as without it.
"""

from __future__ import annotations

from typing import Any, Protocol

from scratchlm.config import TrainConfig
from scratchlm.data.loader import Batch


class SizedLoader(Protocol):
    """A loader that takes its next `batch_size` windows from one order, however many those are."""

    batch_size: int

    def next_batch(self) -> Batch: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class GrowingBatches:
    """`loader` with as many sequences in each batch as :meth:`TrainConfig.batch_size_at` says. No window is skipped.

    Args:
        loader: taken over; its own batch size is that of the recipe, which is what its state names.
        train: the recipe's section.
    """

    def __init__(self, loader: SizedLoader, train: TrainConfig) -> None:
        self.loader, self.train = loader, train
        self._taken = 0

    def next_batch(self) -> Batch:
        """The next batch, (sequences, context length)."""
        whole = self.loader.batch_size
        self.loader.batch_size = self.train.batch_size_at(self._taken)
        try:
            batch = self.loader.next_batch()
        finally:
            self.loader.batch_size = whole
        self._taken += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The loader's, and how many batches were taken."""
        return {**self.loader.state_dict(), "taken": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind `state`. Errors are the loader's."""
        self.loader.load_state_dict({name: value for name, value in state.items() if name != "taken"})
        self._taken = int(state["taken"])
