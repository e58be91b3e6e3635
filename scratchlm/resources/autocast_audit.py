"""Which operation of a model runs in which dtype: one real training step on the CPU, watched from below autocast.

::

    loss(batch) ─► autograd ─► autocast ─► what is computed ◄── we stand here (a TorchDispatchMode)

Below autocast its casts are operations like all others (``aten::_to_copy``), and every operation comes with the dtypes it is
really given. No list of what autocast does is kept here: the tables are what happened.

What one kernel does inside (fused attention, RMSNorm, fused AdamW) is not seen, only what goes in and comes out; with
``model.kernels = "reference"`` and ``optim.implementation = "reference"`` the formulas run instead, one operation at a time.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scratchlm.config import Recipe
from scratchlm.data.loader import Batch
from scratchlm.errors import UserError
from scratchlm.kernels.cross_entropy import IGNORE_INDEX
from scratchlm.model.config import ModelConfig
from scratchlm.model.shape import count
from scratchlm.model.transformer import Transformer
from scratchlm.optim import Optimizers, build_optimizers, clip_grad_norm, lr_multiplier
from scratchlm.resources.places import Places
from scratchlm.train.loss import NextTokenLoss, loss_options
from scratchlm.train.precision import Precision
from scratchlm.train.working_copy import Computing

PHASES = ("forward", "backward", "clipping", "optimizer")
OUTSIDE = "outside modules"
"""The place of what no module does: the embedding's scale, the mean over the batch's tokens."""
LOSS = "head and loss"

LARGE = 1_000_000_000
"""A model that needs more bytes than this to train is audited in its first layers only."""
BYTES_PER_PARAMETER = 4 + 4 + 8 + 2
"""Weight, gradient, two moments, and the copy in bf16."""
SHARE_OF_MEMORY = 0.6

_SHORT = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "e4m3",
    torch.float8_e5m2: "e5m2",
}


_FLOATING = frozenset(_SHORT.values())


def short(dtype: torch.dtype) -> str:
    """``fp32`` for ``torch.float32``, and so on."""
    return _SHORT.get(dtype, str(dtype).removeprefix("torch."))


@dataclass
class Operation:
    """All calls of one operation with the same dtypes, at one place and in one phase of the step.

    Attributes:
        phase: one of :data:`PHASES`.
        place: the module it runs in (one that layers share goes by its first name); in the backward pass, the one whose gradient it
            belongs to; in the last phase, the optimizer.
        name: as torch calls it, without its overload.
        reads: the distinct dtypes of the tensors it is given, in their order.
        writes: the distinct dtypes of what it returns, or overwrites.
        computes: False for views, copies, and memory that is only set aside or filled.
        times: how often.
        numbers: how many numbers it wrote.
    """

    phase: str
    place: str
    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    computes: bool
    times: int = 0
    numbers: int = 0

    @property
    def is_floating(self) -> bool:
        """Whether it writes floating numbers."""
        return any(dtype in _FLOATING for dtype in self.writes)

    @property
    def is_cast(self) -> bool:
        """Whether it only changes the dtype of floating numbers."""
        moves = self.name in ("_to_copy", "copy_") and self.reads != self.writes
        return moves and self.is_floating and all(dtype in _FLOATING for dtype in self.reads)


@dataclass(frozen=True)
class Held:
    """Tensors of one kind and dtype that outlive the step: weights, gradients, buffers, a kind of optimizer state."""

    what: str
    dtype: str
    tensors: int
    numbers: int
    bytes: int


@dataclass(frozen=True)
class Audit:
    """What one step did.

    Attributes:
        precision: what was asked for.
        loss: the objective of that step, in nats per token; the tokens were random.
        tokens: how many tokens the step saw.
        layers, of_layers: how many layers ran, and how many the model has.
        operations: in the order of their first calls.
        held: what lies in memory after the step.
    """

    precision: str
    loss: float
    tokens: int
    layers: int
    of_layers: int
    operations: list[Operation]
    held: list[Held]

    def listed(self) -> list[Operation]:
        """What computes floating numbers: without views, copies, allocations, and arithmetic of indices and masks."""
        return [found for found in self.operations if found.computes and found.is_floating]

    def casts(self) -> list[Operation]:
        """Changes of dtype only."""
        return [found for found in self.listed() if found.is_cast]


def everywhere(place: str) -> str:
    """A module's name with all layers as one: ``blocks.*.attention.qkv``."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", place)


# --- the watcher -------------------------------------------------------------------------------------------------


class _Places(Places):
    """In the backward pass `now` jumps to where the running node was made."""

    def follow_backward(self, loss: Tensor) -> None:
        """From now on every node of the graph says where it was made, just before it runs."""
        waiting: list[Any] = [loss.grad_fn]
        known = set(waiting)
        while waiting:
            node = waiting.pop()
            self._hooks.append(node.register_prehook(functools.partial(self._jump, self.made_at(node))))
            found = {next_node for next_node, _ in node.next_functions if next_node is not None} - known
            known |= found
            waiting += found

    def _jump(self, place: str, *_: Any) -> None:
        self.now = place


class _Watcher(TorchDispatchMode):
    """Notes every operation that reaches a kernel."""

    def __init__(self, places: _Places) -> None:
        super().__init__()
        self.places, self.phase = places, PHASES[0]
        self.found: dict[tuple[Any, ...], Operation] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        read = _tensors((args, kwargs))
        written = _tensors(out) or _overwritten(func, args, kwargs)
        name = func._schema.name.removeprefix("aten::")
        reads, writes = _dtypes(read), _dtypes(written)
        key = self.phase, self.places.now, name, reads, writes
        idle = func.is_view or not read or _only_moves(name, reads == writes)
        operation = self.found.setdefault(key, Operation(*key, computes=not idle))
        operation.times += 1
        operation.numbers += sum(tensor.numel() for tensor in written)
        return out


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _dtypes(tensors: Iterable[Tensor]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(short(tensor.dtype) for tensor in tensors))


def _overwritten(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The arguments that an operation without a result writes to, such as those of multi-tensor updates."""
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    changed = {argument.name for argument in func._schema.arguments if argument.is_write}
    return _tensors([value for name, value in given.items() if name in changed])


def _only_moves(name: str, same_dtypes: bool) -> bool:
    """Whether an operation computes nothing though it is no view: a copy, or a new tensor with at most one value."""
    if name in ("clone", "_unsafe_view") or (name in ("copy_", "_to_copy") and same_dtypes):
        return True
    return name.startswith(("empty", "zeros", "ones", "full", "new_", "zero_", "fill_"))


class _WatchedLoss(NextTokenLoss):
    """The objective, which says when it is at the head: that is not the forward pass of any module."""

    def __init__(self, *args: Any, places: _Places, **options: Any) -> None:
        super().__init__(*args, **options)
        self._places = places

    def _head(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        with self._places.inside(LOSS):
            return super()._head(hidden, targets)


# --- the step ----------------------------------------------------------------------------------------------------


def audit(recipe: Recipe, precision: Precision = "bf16", *, sequences: int = 2, length: int | None = None) -> Audit:
    """One training step of a recipe's model on random tokens: loss, backward, clipping, optimizer, as the loop does them.

    The model is the recipe's in every width. If training it takes more than :data:`LARGE` bytes, only the first layers run: up to where
    the pattern of its layers begins again. torch.compile is off: fused, operations could not be told apart; and so are products in fp8.

    Args:
        recipe: its `model` (a vocabulary of 0 is the tokenizer's wished size), `optim`, `train` and `seed` are read.
        precision: ``bf16``: autocast, as in training; ``fp32``: none.
        sequences: the batch.
        length: tokens per sequence; None: the model's context, at most 256.

    Raises:
        UserError: even so the model does not fit into memory, or a sequence is longer than its context.
    """
    whole = recipe.model
    if not whole.vocab_size:
        whole = whole.model_copy(update={"vocab_size": recipe.tokenizer.vocab_size})
    config = _first_layers(whole)
    length = min(config.context_length, 256) if length is None else length
    if not 1 <= length <= config.context_length:
        raise UserError(f"length = {length} is not between 1 and model.context_length = {config.context_length}")
    with torch.random.fork_rng(devices=[]):  # dropout and the routers' jitter draw from torch's own generator
        torch.manual_seed(recipe.seed)
        model = Transformer(config, seed=recipe.seed)
        optimizers = build_optimizers(model, recipe.optim)
        batch = _random_batch(config.vocab_size, sequences, length, recipe)
        computing = Computing(model, precision, recipe.train.weights, torch.device("cpu"))
        places = _Places(computing.model, OUTSIDE)
        loss = _WatchedLoss(computing.model, places=places, **loss_options(recipe.train))
        try:
            with _Watcher(places) as watcher:
                nats = _step(loss, batch, optimizers, recipe, watcher, computing)
        finally:
            places.remove()
    return Audit(
        precision=precision,
        loss=float(nats),
        tokens=sequences * length,
        layers=config.layers,
        of_layers=whole.layers,
        operations=list(watcher.found.values()),
        held=_held(model, optimizers, computing.model),
    )


def _step(
    loss: NextTokenLoss,
    batch: Batch,
    optimizers: Optimizers,
    recipe: Recipe,
    watcher: _Watcher,
    computing: Computing,
) -> Tensor:
    """The six moves of :meth:`scratchlm.train.loop.Trainer._step`; returns the objective per token."""
    tokens = max(1, int((loss.targets(batch) != IGNORE_INDEX).sum()))
    optimizers.set_lr(lr_multiplier(0, max(1, recipe.train.steps), recipe.optim))
    optimizers.zero_grad()
    with computing.context():
        total = loss(batch)
    mean = total / tokens
    watcher.phase = "backward"
    watcher.places.follow_backward(mean)
    mean.backward()
    watcher.places.now = "all gradients"
    computing.collect()
    watcher.phase = "clipping"
    clip_grad_norm(list(optimizers.names.values()), recipe.optim.grad_clip or math.inf)
    watcher.phase = "optimizer"
    for name, optimizer in optimizers.optimizers.items():
        watcher.places.now = name
        optimizer.step()
    watcher.places.now = "rounded weights"
    computing.refresh()
    watcher.places.now = "routers"
    loss.after_step()
    return mean.detach()


def _random_batch(vocabulary: int, sequences: int, length: int, recipe: Recipe) -> Batch:
    """Tokens that mean nothing; with document boundaries, if the recipe trains with them, in the middle of each row."""
    chance = torch.Generator().manual_seed(recipe.seed)
    ids = torch.randint(vocabulary, (sequences, length + 1), generator=chance)
    if not recipe.train.document_boundaries:
        return Batch(ids[:, :-1], ids[:, 1:])
    places = torch.arange(length).expand(sequences, length)
    second = places >= length // 2
    return Batch(ids[:, :-1], ids[:, 1:], places - second * (length // 2), second.long())


def _first_layers(config: ModelConfig) -> ModelConfig:
    """The model, or its first layers if it is large."""
    if count(config).total * BYTES_PER_PARAMETER > LARGE:
        moe = config.moe
        patterns = (config.attention, config.mask, config.position, config.rope.theta, config.rope.scaling)
        period = math.lcm(moe.every if moe.experts else 1, *(len(pattern) for pattern in patterns))
        first = moe.first_dense if moe.experts else 0
        config = config.model_copy(update={"layers": min(config.layers, first + period)})
    needed = count(config).total * BYTES_PER_PARAMETER
    if needed > SHARE_OF_MEMORY * _memory():
        raise UserError(
            f"a training step of {config.layers} of this model's layers needs about {needed / 1e9:,.0f} GB, this machine has "
            f"{_memory() / 1e9:,.0f}; audit a narrower model: --model.d-model, --model.vocab-size, --model.moe.experts"
        )
    return config


def _memory() -> float:
    """Bytes of memory that this machine has; infinite if it does not say."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return math.inf


def _held(model: nn.Module, optimizers: Optimizers, computing: nn.Module | None = None) -> list[Held]:
    """What lies in memory between two steps, by kind and dtype."""
    parameters = list(dict.fromkeys([*model.parameters(), *(computing or model).parameters()]))
    kinds: dict[str, list[Tensor]] = {
        "weights": list(parameters),
        "gradients": [parameter.grad for parameter in parameters if parameter.grad is not None],
    }
    for name, tensor in optimizers.named_state().items():
        optimizer, key, _ = name.split(".", 2)
        kinds.setdefault(f"{optimizer}: {key}", []).append(tensor)
    kinds["buffers"] = list(model.buffers())
    held = []
    for what, tensors in kinds.items():
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            chosen = [tensor for tensor in tensors if tensor.dtype == dtype]
            numbers = sum(tensor.numel() for tensor in chosen)
            held.append(Held(what, short(dtype), len(chosen), numbers, numbers * dtype.itemsize))
    return held
