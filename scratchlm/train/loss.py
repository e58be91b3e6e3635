"""The training objective: next-token cross-entropy, and what the architecture adds to it.

::

    objective = Σ −log p(next token)  [+ z-loss]      over all targets
              + tokens · (balance and z-losses of the routers)
              + mtp_weight / depth · Σ over depths of the same cross-entropy, further ahead
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from scratchlm.config import TrainConfig
from scratchlm.kernels.cross_entropy import (
    IGNORE_INDEX,
    HeadOptions,
    chunked_linear_cross_entropy,
    reference_linear_cross_entropy,
)
from scratchlm.model.context import Context, RouterRecord
from scratchlm.model.transformer import Transformer

COMPILE_MODES = {
    "default": None,
    "cuda_graphs": "reduce-overhead",
    "max_autotune": "max-autotune-no-cudagraphs",
    "max_autotune_cuda_graphs": "max-autotune",
}
"""``train.compile_mode`` → torch's name."""


class Batch(Protocol):
    """What a batch source yields: int64 tensors of shape (batch, length)."""

    inputs: Tensor
    targets: Tensor
    positions: Tensor | None
    documents: Tensor | None


def loss_options(train: TrainConfig) -> dict[str, Any]:
    """What a recipe's section says of the objective: keyword arguments of :class:`NextTokenLoss`."""
    return {
        "kernel": train.loss_kernel,
        "z_loss": train.z_loss,
        "mtp_weight": train.mtp_weight,
        "checkpointing": train.activation_checkpointing,
    }


class NextTokenLoss:
    """Sum over a batch of −log p(target | what came before), in nats, with the architecture's own additions.

    Under ``mask = prefix_lm`` the targets inside the prefix count for nothing: their tokens have been seen.

    Args:
        model: the Transformer.
        kernel: ``reference`` (all logits) or ``chunked``; ``auto`` is chunked.
        z_loss: weight of the squared log-normaliser of the language model's softmax.
        mtp_weight: weight of the multi-token predictions (λ in DeepSeek-V3, eq. 25).
        checkpointing: what blocks keep for the backward pass: all (``none``), their inputs (``blocks``), or those and the results of their
            products (``selective``).
    """

    def __init__(
        self,
        model: Transformer,
        kernel: str = "auto",
        *,
        z_loss: float = 0.0,
        mtp_weight: float = 0.3,
        checkpointing: str = "none",
    ) -> None:
        self.model = model
        self.kernel = "chunked" if kernel == "auto" else kernel
        self.options = HeadOptions(model.config.logit_scale, model.config.logit_soft_cap, z_loss)
        self.mtp_weight = mtp_weight
        self.checkpointing = checkpointing
        self.body = model.body
        self.compiled = False
        self.replayed = False  # whether passes are CUDA graphs, whose results the next pass writes over
        self.rows: int | None = None  # of the chunked loss; None: the kernel's own
        self._prefix = model.config.prefix_length if "prefix_lm" in model.config.mask else 0
        self._forget()

    def use(self, model: Transformer) -> None:
        """Compute with `model`, a copy of the one before, from now on."""
        self.model = model
        self.eager()

    def compile(self, mode: str = "default") -> None:
        """Run the model's blocks and the pointwise part of the loss through torch.compile.

        Args:
            mode: as ``train.compile_mode``.
        """
        self.body = torch.compile(self.model.body, dynamic=False, mode=COMPILE_MODES[mode])
        self.compiled = True
        self.replayed = mode.endswith("cuda_graphs")

    def eager(self) -> None:
        """Undo :meth:`compile`."""
        self.body = self.model.body
        self.compiled = self.replayed = False
        self._forget()  # what a failed compilation has seen is seen again

    def __call__(self, batch: Batch) -> Tensor:
        context = self.model.context(batch.inputs, batch.positions, batch.documents)
        context = replace(context, checkpointing=self.checkpointing)
        if self.replayed:  # the graph's memory, with what the last pass left in it, is about to be used again
            torch.compiler.cudagraph_mark_step_begin()
        hidden, routers = self.model.run(batch.inputs, context, self.body)
        targets = self.targets(batch)
        objective, nats = self._head(hidden, targets)
        tokens = (targets != IGNORE_INDEX).sum()
        if self.model.predictions:
            further, more = self._predictions(hidden, batch, targets, context)
            routers = [*routers, *more]
            objective = objective + self.mtp_weight / len(self.model.predictions) * further
        for record in routers:
            objective = objective + tokens * record.loss
        self._remember(objective, nats, routers)
        return objective

    def targets(self, batch: Batch) -> Tensor:
        """The batch's targets, without those that the mask has shown already: what a mean is taken over."""
        if self._prefix <= 1:
            return batch.targets
        return batch.targets.masked_fill(self._inside_prefix(batch), IGNORE_INDEX)

    def _inside_prefix(self, batch: Batch) -> Tensor:
        """True where the next token belongs to the prefix (of its document, where positions begin anew)."""
        places = batch.positions
        if places is None:
            places = torch.arange(batch.inputs.shape[-1], device=batch.inputs.device)
        return places < self._prefix - 1

    def _head(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        weight, bias = self.model.head.weight, self.model.head.bias
        if self.kernel == "reference":
            return reference_linear_cross_entropy(hidden, weight, targets, self.options, bias=bias)
        return chunked_linear_cross_entropy(
            hidden, weight, targets, self.options, bias=bias, rows=self.rows, compiled=self.compiled
        )

    def _predictions(
        self, hidden: Tensor, batch: Batch, targets: Tensor, context: Context
    ) -> tuple[Tensor, list[RouterRecord]]:
        """The summed loss of all depths: module k reads the token k + 1 ahead and foretells the one after it."""
        total = torch.zeros((), device=hidden.device)
        context.routers.clear()
        for k, module in enumerate(self.model.predictions):
            # Beyond the row or the document there is none: nothing is asked at such a place, and none that is reads it.
            known = _ahead(batch.inputs, k + 1, batch.documents).clamp(min=0)
            hidden = module(hidden, self.model.embed(known, batch.positions), context)
            asked = _ahead(targets, k + 1, batch.documents)
            if self._prefix > 1:  # these places have read each other's tokens, the ones asked for among them
                asked = asked.masked_fill(self._inside_prefix(batch), IGNORE_INDEX)
            total = total + self._head(module.norm(hidden), asked)[0]  # type: ignore[operator]
        return total, list(context.routers)

    # What the trainer reads beside the objective.

    def _forget(self) -> None:
        self._extra: Tensor | None = None
        self._records: dict[int, RouterRecord] = {}

    def _remember(self, objective: Tensor, nats: Tensor, routers: list[RouterRecord]) -> None:
        """Keep sums over the step's micro-batches, without waiting for the device."""
        extra = objective.detach() - nats
        self._extra = extra if self._extra is None else self._extra + extra
        for record in routers:
            before, found = self._records.get(record.layer), record.detached()
            if before is not None:
                found = before.plus(found)
            elif self.replayed:
                found = found.cloned()
            self._records[record.layer] = found

    def beside(self) -> Any:
        """What was added up since :meth:`after_step`: for :meth:`put_back`, when a CUDA graph has computed it anew."""
        return self._extra, dict(self._records)

    def put_back(self, beside: Any) -> None:
        """See :meth:`beside`."""
        self._extra, records = beside
        self._records = dict(records)

    def extra(self) -> Tensor | None:
        """What the objective held beyond the cross-entropy since :meth:`after_step`, summed; None: no batch yet."""
        return self._extra

    def figures(self) -> dict[str, Any]:
        """For the metrics: the routers' loads, the worst expert's share of an even load, dropped share, entropy."""
        if not self._records:
            return {}
        records = [self._records[layer] for layer in sorted(self._records)]
        loads = [record.load for record in records]
        return {
            "expert_load": [load.tolist() for load in loads],
            "expert_max_over_mean": max(float(load.max() / load.mean().clamp(min=1e-9)) for load in loads),
            "expert_dropped": float(sum(r.dropped / r.load.sum().clamp(min=1) for r in records)) / len(records),
            "router_entropy": float(sum(r.entropy / r.passes for r in records)) / len(records),
            "router_loss": float(sum(r.loss / r.passes for r in records)),
        }

    def after_step(self, updated: bool = True) -> None:
        """The optimizer has stepped: routers that balance without a loss move their biases; the sums begin anew.

        Args:
            updated: False if the step was skipped: then no bias moves.
        """
        if updated and self.model.config.moe.bias_update:
            for layer, record in self._records.items():
                block = [*self.model.blocks, *(module.block for module in self.model.predictions)][layer]
                block.feedforward.router.update_bias(record.load)
        self._forget()


def _ahead(ids: Tensor, steps: int, documents: Tensor | None) -> Tensor:
    """The ids `steps` (at least 1) places further on; IGNORE_INDEX where the row ends or another document begins."""
    moved = torch.full_like(ids, IGNORE_INDEX)
    moved[..., :-steps] = ids[..., steps:]
    if documents is not None:
        same = torch.zeros_like(ids, dtype=torch.bool)
        same[..., :-steps] = documents[..., steps:] == documents[..., :-steps]
        moved = moved.masked_fill(~same, IGNORE_INDEX)
    return moved
