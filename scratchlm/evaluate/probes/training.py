"""Train a small model on a task, and see how far it gets on sequences it has not seen."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from pydantic import ConfigDict
from torch import Tensor, nn

from scratchlm.config import OptimConfig
from scratchlm.errors import UserError
from scratchlm.evaluate.probes.tasks import Task
from scratchlm.files import stable_hash
from scratchlm.kernels.cross_entropy import IGNORE_INDEX, cross_entropy
from scratchlm.model import ModelConfig, Transformer
from scratchlm.optim import build_optimizers, clip_grad_norm, lr_multiplier
from scratchlm.progress import progress
from scratchlm.section import Section


class LengthResult(Section):
    """How a model does at one length."""

    model_config = ConfigDict(ser_json_inf_nan="strings", allow_inf_nan=True)

    length: int
    """Tokens of a sequence."""
    accuracy: float
    """Share of the questions whose likeliest id is the answer."""
    loss: float
    """Nats per question; NaN where training went astray."""
    questions: int
    """How many were asked."""
    chance: float
    """The task's at this length."""
    without_mechanism: float
    """The task's at this length."""


class ProbeResult(Section):
    """What a probe found; non-finite losses are the strings ``"NaN"`` and ``"Infinity"`` in JSON."""

    model_config = ConfigDict(ser_json_inf_nan="strings", allow_inf_nan=True)

    by_length: dict[int, LengthResult]
    """Held-out figures by multiple of the trained length."""
    train_accuracy: float
    """The same share on fresh draws of what was trained on: far above the held-out one, it was learnt by heart."""
    parameters: int
    """Distinct parameters of the model."""
    steps: int
    """Optimizer steps."""
    seconds: float
    """Wall-clock of the training."""

    @property
    def accuracy(self) -> float:
        """Held-out accuracy at the trained length, or the shortest one asked for."""
        return self.by_length[min(self.by_length)].accuracy

    @property
    def loss(self) -> float:
        """Held-out loss at the same length."""
        return self.by_length[min(self.by_length)].loss


def _generator(seed: int, stream: str) -> torch.Generator:
    """Streams of one seed have nothing to do with each other, nor those of neighbouring seeds."""
    return torch.Generator().manual_seed(int(stable_hash([seed, stream]), 16))


@torch.no_grad()
def _measure(
    model: nn.Module,
    task: Task,
    rows: int,
    batch: int,
    generator: torch.Generator,
    device: torch.device,
    held_out: bool,
) -> LengthResult:
    """`rows` sequences in portions of `batch`."""
    was_training = model.training
    model.eval()
    right, nats, questions = 0, 0.0, 0
    for start in range(0, rows, batch):
        ids, targets = (
            part.to(device) for part in task.batch(min(batch, rows - start), generator, held_out=held_out)
        )
        logits: Tensor = model(ids)
        right += int((logits.argmax(dim=-1) == targets).sum())
        nats += float(cross_entropy(logits, targets).sum())
        questions += int((targets != IGNORE_INDEX).sum())
    model.train(was_training)
    return LengthResult(
        length=task.length,
        accuracy=right / questions,
        loss=nats / questions,
        questions=questions,
        chance=task.chance,
        without_mechanism=task.without_mechanism,
    )


def probe(
    config: ModelConfig,
    task: Task,
    *,
    steps: int,
    batch: int = 64,
    lr: float = 1e-3,
    seed: int = 0,
    device: str | torch.device = "cpu",
    evaluate_lengths: Sequence[int] = (1,),
    evaluate_rows: int = 512,
    weight_decay: float = 0.1,
    warmup_share: float = 0.1,
    show_progress: bool = False,
) -> ProbeResult:
    """Train ``Transformer(config)`` on `task` from scratch and ask it what it has not seen.

    AdamW under a cosine with warm-up down to a tenth of the peak, gradients clipped at norm 1, in fp32. On a CPU the
    same seed gives the same result; on a GPU sums come in another order each time. Data is the same on both.

    Args:
        config: the architecture; a `vocab_size` of 0 becomes the task's, and `context_length` has to hold the longest
            sequence that is asked for.
        task: what to learn.
        steps, batch, lr: optimizer steps, sequences per step, peak learning rate.
        seed: of weights and data.
        device: where to train; data is drawn on the CPU.
        evaluate_lengths: multiples of the trained length to evaluate at, such as (1, 2, 4).
        evaluate_rows: sequences per evaluation.
        weight_decay: AdamW's, on matrices.
        warmup_share: share of the steps in which the rate rises.
        show_progress: show a bar that vanishes.

    Raises:
        UserError: the vocabulary or the context is too small for the task, the task has no such length, or a number is
            out of its range.
    """
    for name, value in {"steps": steps, "batch": batch, "evaluate_rows": evaluate_rows}.items():
        if value < 1:
            raise UserError(f"probe: {name} = {value} must be at least 1")
    if not evaluate_lengths or min(evaluate_lengths) < 1:
        raise UserError(f"probe: evaluate_lengths = {list(evaluate_lengths)} must be multiples of at least 1")
    if config.vocab_size == 0:
        config = config.model_copy(update={"vocab_size": task.vocab_size})
    if config.vocab_size < task.vocab_size:
        raise UserError(
            f"probe {task.name}: it has {task.vocab_size} ids, model.vocab_size is {config.vocab_size}; set it to 0"
        )
    asked = {times: task.longer(times) for times in evaluate_lengths}
    longest = max([task.length, *(other.length for other in asked.values())])
    if longest > config.context_length:
        raise UserError(
            f"probe {task.name}: sequences of {longest} tokens are asked for, model.context_length is "
            f"{config.context_length}; set it to {longest} or more"
        )
    optim = OptimConfig(
        optimizer="adamw",
        lr=lr,
        weight_decay=weight_decay,
        schedule="cosine",
        warmup_steps=round(warmup_share * steps),
    )
    device = torch.device(device)
    # Dropout draws from the global generators: they are seeded for the time, and put back.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = Transformer(config, seed=seed).to(device)
        optimizers = build_optimizers(model, optim)
        data = _generator(seed, "training")
        started = time.perf_counter()
        for step in progress(range(steps), description=task.name, unit="step", show=show_progress, leave=False):
            ids, targets = (part.to(device) for part in task.batch(batch, data))
            loss = cross_entropy(model(ids), targets).sum() / (targets != IGNORE_INDEX).sum()
            optimizers.zero_grad()
            loss.backward()
            clip_grad_norm(model.parameters(), optim.grad_clip)
            optimizers.set_lr(lr_multiplier(step, steps, optim))
            optimizers.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started

        def measured(asked_task: Task, stream: str, held_out: bool) -> LengthResult:
            return _measure(model, asked_task, evaluate_rows, batch, _generator(seed, stream), device, held_out)

        return ProbeResult(
            by_length={times: measured(other, f"evaluation {times}", True) for times, other in asked.items()},
            train_accuracy=measured(task, "training again", False).accuracy,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            steps=steps,
            seconds=seconds,
        )
