"""One step of training as the trainer does it, traced without memory."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor

from scratchlm.config import OptimConfig, TrainConfig
from scratchlm.data.loader import Batch
from scratchlm.model.config import ModelConfig
from scratchlm.model.draw.hollow import NO_DRAWING
from scratchlm.model.transformer import Transformer
from scratchlm.optim import build_optimizers
from scratchlm.resources.trace import Trace, Tracer, without_memory
from scratchlm.train.loss import NextTokenLoss
from scratchlm.train.precision import autocast

CPU = torch.device("cpu")


@dataclass
class Step:
    """A traced step.

    Attributes:
        trace: operations and storages of one micro-batch (of the second, if there are several: gradients are there then) and
            of the optimizer.
        micro_batch, length: sequences per micro-batch, tokens per sequence.
        accumulation: micro-batches per step.
        precision: ``bf16`` (autocast) or ``fp32``.
        params: of the model: name → numbers.
    """

    trace: Trace
    micro_batch: int
    length: int
    accumulation: int
    precision: str
    params: dict[str, int]

    @property
    def tokens(self) -> int:
        """Per micro-batch."""
        return self.micro_batch * self.length


def as_compiled_on_a_cpu(config: ModelConfig, length: int) -> ModelConfig:
    """The same with what ``auto`` attention takes inside torch.compile on a CPU: blocks, for short sequences."""
    short = config.attention_kernel == "auto" and config.kernels == "fast" and length <= 1024
    return config.model_copy(update={"attention_kernel": "blocked"}) if short else config


def trace_step(
    config: ModelConfig,
    optim: OptimConfig,
    train: TrainConfig,
    *,
    precision: str,
    micro_batch: int,
    accumulation: int = 1,
    length: int | None = None,
    real: bool = False,
) -> Step:
    """Trace a step in its steady state: the optimizer's state is there, and between micro-batches the gradients are.

    A mixture of experts is traced with its grouped products, whatever `moe.dispatch`.

    Args:
        config: the architecture, with its vocabulary.
        optim, train: sections of the recipe.
        precision: ``bf16`` or ``fp32``.
        micro_batch: sequences at once.
        accumulation: micro-batches per step; two stand for any number above one.
        length: tokens per sequence; None: the model's context.
        real: with memory and numbers, to hold the fake to; slow.
    """
    length = length or config.context_length
    if config.moe.experts and not real:  # the formula asks which tokens each expert has, which fakes cannot say
        config = config.model_copy(update={"moe": config.moe.model_copy(update={"dispatch": "grouped"})})
    with contextlib.nullcontext() if real else without_memory():
        model = Transformer(config.model_copy(update={} if real else NO_DRAWING), seed=0 if real else None)
        model.config = config
        ids = torch.zeros(micro_batch, length, dtype=torch.int64)
        positions = documents = None
        if train.document_boundaries:
            positions, documents = torch.zeros_like(ids), torch.zeros_like(ids)
        batch = Batch(ids, torch.zeros_like(ids), positions, documents)
        loss = NextTokenLoss(model, train.loss_kernel, z_loss=train.z_loss, mtp_weight=train.mtp_weight)
        optimizers = build_optimizers(model, optim)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for parameter in named.values():
            parameter.grad = torch.zeros_like(parameter)
        optimizers.step()  # makes its state
        optimizers.zero_grad()

        tracer = Tracer(model)
        for name, parameter in model.named_parameters():
            tracer.watch(parameter, "weights", name)
        for buffer in model.buffers():
            tracer.watch(buffer, "batch and tables")
        for module in model.modules():
            table = getattr(module, "table", None)
            if isinstance(table, Tensor):
                tracer.watch(table, "batch and tables")
        for tensor in (batch.inputs, batch.targets, batch.positions, batch.documents):
            if tensor is not None:
                tracer.watch(tensor, "batch and tables")
        for name, state in optimizers.named_state().items():
            if state.ndim:
                tracer.watch(state, "optimizer state", name.split(".", 2)[-1])

        def micro_step() -> None:
            tracer.phase = "forward"
            with autocast(precision, CPU):
                objective = loss(batch)
            tracer.note_kept()
            tracer.phase = "backward"
            (objective / (micro_batch * length)).backward()

        with tracer:
            if accumulation > 1:
                with tracer.paused():
                    micro_step()
                for name, parameter in named.items():
                    assert parameter.grad is not None
                    tracer.watch(parameter.grad, "gradients", name)
            micro_step()
            for name, parameter in named.items():
                if parameter.grad is not None:
                    tracer.watch(parameter.grad, "gradients", name)
            tracer.phase = "optimizer"
            optimizers.step()
        params = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return Step(tracer.trace, micro_batch, length, accumulation, precision, params)
