"""What a task hands to the training loop."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from scratchlm.model.transformer import Transformer


class Loader(Protocol):
    """A source of batches whose place can be saved."""

    def next_batch(self) -> Any: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Loss(Protocol):
    """A task's objective: summed over a batch's targets, in nats; it may run its model through torch.compile."""

    compiled: bool
    replayed: bool

    def __call__(self, batch: Any) -> Tensor: ...
    def compile(self, mode: str = "default") -> None: ...
    def eager(self) -> None: ...

    def use(self, model: Transformer) -> None:
        """Compute with this model, a copy of the one so far."""
        ...

    def targets(self, batch: Any) -> Tensor:
        """The targets of a batch that the loss sums over; IGNORE_INDEX elsewhere."""
        ...

    def extra(self) -> Tensor | None:
        """What the batches of this step added beyond the cross-entropy: not shown as loss."""
        ...

    def figures(self) -> dict[str, Any]:
        """More to log about this step."""
        ...

    def beside(self) -> Any:
        """What it keeps for :meth:`extra`, :meth:`figures` and :meth:`after_step`."""
        ...

    def put_back(self, beside: Any) -> None:
        """Undo what was forgotten since :meth:`beside`."""
        ...

    def after_step(self, updated: bool = True) -> None:
        """The optimizer has stepped (or the step was skipped)."""
        ...
