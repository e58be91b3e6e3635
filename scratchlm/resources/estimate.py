"""What a recipe needs: parameters, FLOPs, memory, time and money, before anything runs."""

from __future__ import annotations

import functools
import math
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from scratchlm.config import Recipe, TrainConfig
from scratchlm.errors import UserError
from scratchlm.generate.cache import KVCache
from scratchlm.model.config import ModelConfig
from scratchlm.model.moe import ExpertLinear, MixtureOfExperts
from scratchlm.model.transformer import Transformer
from scratchlm.resources.depth import peak_of_deeper, shallow
from scratchlm.resources.step import Step, Traceable, as_run_on
from scratchlm.resources.timing import Bound, Machine, seconds_by_phase
from scratchlm.resources.trace import Operation, Trace
from scratchlm.train.fitting import MARGIN, Need, largest

IN_8_BITS = (1 + 4 / 256) / 4
"""Of a state in fp32 what it takes in 8 bits, with a scale in fp32 per block of 256 (Dettmers et al. 2022, arXiv 2110.02861)."""


@dataclass
class Component:
    """A module, over all layers it is repeated in.

    Attributes:
        path: its dotted name, ``*`` for the number of the layer.
        copies: how many modules it stands for.
        params: its own parameters (not those of modules inside), all copies together.
        active: those of them that one token meets.
        weights, gradients, state: bytes of its parameters, of their gradients and of what the optimizer remembers of them.
        forward, backward: FLOPs of its products per trained token.
        kept: bytes of activations that its forward pass leaves for the backward pass.
    """

    path: str
    copies: int = 0
    params: int = 0
    active: int = 0
    weights: int = 0
    gradients: int = 0
    state: int = 0
    forward: float = 0.0
    backward: float = 0.0
    kept: int = 0


@dataclass
class OperationGroup:
    """Equal operations of one phase and component."""

    phase: str
    component: str
    name: str
    calls: int
    flops: int
    moved: int
    seconds: float | None
    bound: Bound | None

    @property
    def intensity(self) -> float:
        return self.flops / max(1, self.moved)


@dataclass
class Memory:
    """Bytes of one step.

    Attributes:
        peak: the most that lives at once.
        moment: what runs then.
        at_peak: kind → bytes.
        by_component: component → bytes of activations and temporaries at the peak.
        timeline: (phase, live bytes) at every operation.
        by_kind: kind → live bytes at every operation.
    """

    peak: int
    moment: str
    at_peak: dict[str, int]
    by_component: dict[str, int]
    timeline: list[tuple[str, int]] = field(repr=False, default_factory=list)
    by_kind: dict[str, list[int]] = field(repr=False, default_factory=dict)


@dataclass
class Time:
    """Seconds of a step and what follows from them."""

    machine: str
    assumptions: tuple[str, ...]
    compiled: bool
    by_phase: dict[str, float]
    step: float
    tokens_per_second: float
    model_flops_per_second: float
    total: float
    price: float | None


@dataclass
class Estimate:
    """All of it; see :func:`estimate`."""

    name: str
    precision: str
    compiled: bool
    micro_batch: int
    accumulation: int
    length: int
    steps: int
    tokens: int
    params: int
    active_params: int
    embedding_params: int
    forward_flops: float
    backward_flops: float
    model_flops: float
    six_n: float
    components: list[Component]
    operations: list[OperationGroup]
    memory: Memory
    fixed_bytes: float
    bytes_per_sequence: float
    largest_micro_batch: int | None
    cache_bytes_per_token: int
    cache_bytes_bounded: int
    savings: dict[str, int]
    time: Time | None

    def flops_per_token(self, group: OperationGroup) -> float:
        """Of equal operations, per trained token: the optimizer works once a step, all else once a micro-batch."""
        batches = self.accumulation if group.phase == "optimizer" else 1
        return group.flops / (batches * self.micro_batch * self.length)


def vocabulary(recipe: Recipe) -> int:
    """The size of the tokenizer that the recipe will have, or has.

    Raises:
        UserError: the named tokenizer cannot be read.
    """
    if recipe.model.vocab_size:
        return recipe.model.vocab_size
    if recipe.tokenizer.path is not None:
        from scratchlm.tokenizer import Tokenizer

        return Tokenizer.load(recipe.tokenizer.path).vocab_size
    return recipe.tokenizer.vocab_size


def model_of(recipe: Recipe) -> ModelConfig:
    """The recipe's model with its vocabulary."""
    return recipe.model.model_copy(update={"vocab_size": vocabulary(recipe)})


HEAD = "head and loss"


def collapsed(path: str) -> str:
    """A module's path with ``*`` for numbers; what no module did is the head's and the loss's."""
    place = re.sub(r"\.\d+(?=\.|$)", ".*", path)
    return HEAD if place in ("", "head") else place


def estimate(
    recipe: Recipe,
    *,
    precision: str,
    compiled: bool = False,
    machine: Machine | None = None,
    memory_bytes: float | None = None,
    price_per_hour: float | None = None,
    micro_batch: int | None = None,
    savings: bool = True,
    on_cuda: bool = False,
) -> Estimate:
    """Trace a step of the recipe and add up.

    Args:
        recipe: nothing of it is run.
        precision: ``bf16`` or ``fp32``.
        compiled: whether the model's blocks go through torch.compile: passes between products are fused, and less is kept.
        machine: gives times; None: no times.
        memory_bytes: of the device, for the largest micro-batch; None: it is not said.
        price_per_hour: for the money.
        micro_batch: sequences at once, a divisor of the recipe's batch; None: the recipe's.
        savings: also trace what other choices would need.
        on_cuda: the device is one that torch calls ``cuda`` (AMD's, too): attention, the loss and norms keep less there.

    Raises:
        UserError: the micro-batch does not divide the batch.
    """
    config = model_of(recipe)
    length = config.context_length
    device_type = "cuda" if on_cuda else "cpu" if machine is None or machine.is_cpu else "mps"
    config = as_run_on(device_type, config, length, compiled)

    prepared = Traceable(config, recipe.optim, recipe.train, device_type=device_type)
    options: dict[str, Any] = {"precision": precision, "compiled": compiled}
    rows = micro_batch or _micro_batch(recipe.train, prepared, options, memory_bytes)
    whole = recipe.train.batch_size
    if whole % rows:
        raise UserError(
            f"micro-batch {rows} does not divide train.batch_size = {whole}; give a divisor, or --train.batch-size as well"
        )
    parts = whole // rows
    given = options | {"accumulation": parts}
    step = prepared.step(micro_batch=rows, **given)
    optimizer = _peak_of_update(step)

    two_shallow = _two_shallow(config, recipe, device_type)

    @functools.cache
    def peak(batch: int, **changes: Any) -> int:
        """Of a step with another micro-batch, or with something else changed; the optimizer's own part is known by now."""
        nonlocal two_shallow
        wanted = {"micro_batch": batch, "for_peak": True, **given, **changes}
        if two_shallow is not None:
            *models, more = two_shallow
            one, two = (model.step(**wanted).memory for model in models)
            found = peak_of_deeper(one, two, more)
            if found is not None:
                return max(found, optimizer + _tables(one) + more * (_tables(two) - _tables(one)))
            two_shallow = None  # its other steps are no more regular
        trace = prepared.step(**wanted).memory
        return max(trace.peak()[1], optimizer + _tables(trace))

    model = prepared.model
    memory = _memory(step)
    other = 2 * rows if rows == 1 else rows // 2
    peaks = {rows: memory.peak, other: peak(other)}
    slope = (peaks[rows] - peaks[other]) / (rows - other)
    fixed = memory.peak - slope * rows
    largest = None
    if memory_bytes is not None:
        most = max(rows, other, LONGEST_TRACE // length)
        largest = largest_fitting(peak, memory_bytes, peaks, most)
    tokens = step.tokens
    saved = _savings(peak, step, rows, precision, recipe) if savings else {}
    found = Estimate(
        name=recipe.name,
        precision=precision,
        compiled=compiled,
        micro_batch=rows,
        accumulation=parts,
        length=length,
        steps=recipe.train.steps,
        tokens=recipe.tokens,
        params=model.num_params(),
        active_params=model.num_active_params(),
        embedding_params=model.embedding.num_params(),
        forward_flops=step.trace.flops("forward") / tokens,
        backward_flops=step.trace.flops("backward") / tokens,
        model_flops=model.training_flops_per_token(length),
        six_n=6 * model.num_active_params(),
        components=components_of(step, model),
        operations=_operations(step, machine),
        memory=memory,
        fixed_bytes=fixed,
        bytes_per_sequence=slope,
        largest_micro_batch=largest,
        cache_bytes_per_token=_cache(config, precision)[0],
        cache_bytes_bounded=_cache(config, precision)[1],
        savings=saved,
        time=None if machine is None else _time(step, recipe, machine, compiled, model, price_per_hour),
    )
    return found


def _micro_batch(train: TrainConfig, prepared: Traceable, options: dict[str, Any], memory: float | None) -> int:
    """The recipe's; where that is ``auto``, what a run would begin with on a device with so much memory."""
    if train.parts is not None or memory is None:
        return train.batch_size // (train.parts or 1)

    def need(rows: int) -> Need:
        step = prepared.step(micro_batch=rows, accumulation=train.batch_size // rows, **options)
        return Need(step.memory.peak()[1])

    return largest(train.batch_size, (1 - MARGIN) * memory, need)[0]


def largest_fitting(
    peak: Callable[[int], int], memory: float, known: dict[int, int], most: int, tries: int = 8
) -> int:
    """The most sequences at once whose peak is within `memory`.

    Bytes grow along nearly a line, which bends where another moment becomes the peak: the line through the two known points
    nearest to the memory says where to look next.

    Args:
        peak: traces a step with so many sequences.
        memory: bytes.
        known: sequences → peak, at least two; new ones are added.
        most: beyond so many sequences nothing is traced: the line through the last two points is followed.
        tries: how many more are traced at most.

    Returns:
        0 if not even one fits.
    """
    for attempt in range(tries):
        fitting = max((rows for rows, bytes_ in known.items() if bytes_ <= memory), default=0)
        beyond = min((rows for rows, bytes_ in known.items() if bytes_ > memory), default=None)
        if beyond == fitting + 1:
            return fitting
        (one, low), (two, high) = sorted(known.items(), key=lambda pair: abs(pair[1] - memory))[:2]
        guess = math.floor(one + (memory - low) / max((high - low) / (two - one), 1.0))
        if beyond is None and fitting >= most:
            return max(guess, fitting)
        if beyond is None:
            guess = min(max(guess, fitting + 1), most)
        elif attempt % 3 == 2:  # the line bends: halve what is left now and then
            guess = (fitting + beyond) // 2
        else:
            guess = min(max(guess, fitting + 1), beyond - 1)
        known[guess] = peak(guess)
    return max((rows for rows, bytes_ in known.items() if bytes_ <= memory), default=0)


LONGEST_TRACE = 2**17
"""Tokens of a micro-batch: the loss of more of them is more blocks, each of which has to be traced."""


def _cache(config: ModelConfig, precision: str) -> tuple[int, int]:
    import torch

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return KVCache.bytes_per_token(config, dtype), KVCache.state_bytes(config, dtype)


def _memory(step: Step) -> Memory:
    trace = step.memory
    moment, peak = trace.peak()
    operation = trace.operations[moment]
    alive = trace.live_by(moment, lambda s: s.kind)
    passing = {"activations", "temporaries"}
    where = trace.live_by(moment, lambda s: collapsed(s.module) if s.kind in passing else "")
    where.pop("", None)
    return Memory(
        peak,
        f"{operation.name} in {collapsed(operation.module)}, {operation.phase}",
        dict(sorted(alive.items(), key=lambda pair: -pair[1])),
        dict(sorted(where.items(), key=lambda pair: -pair[1])),
        [(op.phase, live) for op, live in zip(trace.operations, trace.timeline(), strict=True)],
        trace.timeline_by_kind(),
    )


def _two_shallow(config: ModelConfig, recipe: Recipe, device_type: str) -> tuple[Traceable, Traceable, int] | None:
    """What :func:`scratchlm.resources.depth.shallow` says, ready to be traced."""
    found = shallow(config)
    if found is None:
        return None
    one, two = (Traceable(c, recipe.optim, recipe.train, device_type=device_type) for c in found[:2])
    return one, two, found[2]


def _peak_of_update(step: Step) -> int:
    """The most that lives while the optimizer works, without the batch, which alone depends on the micro-batch."""
    live = zip(step.memory.operations, step.memory.timeline(), strict=True)
    return max((bytes_ for op, bytes_ in live if op.phase == "optimizer"), default=0) - _tables(step.memory)


def _tables(trace: Trace) -> int:
    return sum(storage.size for storage in trace.storages if storage.kind == "batch and tables")


def components_of(step: Step, model: Transformer) -> list[Component]:
    """A traced step by the modules of its model."""
    found: dict[str, Component] = {}

    def at(path: str) -> Component:
        return found.setdefault(path, Component(path))

    owners: dict[str, set[str]] = defaultdict(set)
    for name, numbers in step.params.items():
        module = name.rpartition(".")[0]
        at(collapsed(module)).params += numbers
        at(collapsed(module)).active += _active(model, module, numbers)
        owners[collapsed(module)].add(module)
    for operation in step.trace.operations:
        if operation.phase in ("forward", "backward") and operation.flops:
            component = at(collapsed(operation.module))
            owners[component.path].add(operation.module)
            share = operation.flops / step.tokens
            if operation.phase == "forward":
                component.forward += share
            else:
                component.backward += share
    for storage in step.memory.storages:
        if storage.owner:
            owner = at(collapsed(storage.owner.rpartition(".")[0]))
            if storage.kind == "weights":
                owner.weights += storage.size
            elif storage.kind == "gradients":
                owner.gradients += storage.size
            elif storage.kind == "optimizer state":
                owner.state += storage.size
        if storage.kind == "activations":
            component = at(collapsed(storage.module))
            component.kept += storage.size
            owners[component.path].add(storage.module)
    for component in found.values():
        component.copies = len(owners[component.path]) if component.path != HEAD else 1
    return list(found.values())


def _active(model: Transformer, module: str, params: int) -> int:
    """Of a module's own parameters those that one token meets: of a mixture's experts the k it goes to."""
    if not isinstance(model.get_submodule(module), ExpertLinear):
        return params
    mixture = model.get_submodule(module.rpartition(".")[0])
    assert isinstance(mixture, MixtureOfExperts)
    return params * mixture.k // mixture.n_experts


def _operations(step: Step, machine: Machine | None) -> list[OperationGroup]:
    groups: dict[tuple[str, str, str], list[Operation]] = defaultdict(list)
    for operation in step.trace.operations:
        place = "" if operation.phase == "optimizer" else collapsed(operation.module)
        groups[operation.phase, place, operation.name].append(operation)
    found = []
    for (phase, place, name), calls in groups.items():
        costs = [machine.of(call) for call in calls] if machine is not None else []
        found.append(
            OperationGroup(
                phase,
                place,
                name,
                len(calls),
                sum(call.flops for call in calls),
                sum(call.read + call.written for call in calls),
                sum(cost.seconds for cost in costs) if costs else None,
                max(costs, key=lambda cost: cost.seconds).bound if costs else None,
            )
        )
    return sorted(found, key=lambda group: (-(group.seconds or 0), -group.flops, -group.moved))


def _time(step: Step, recipe: Recipe, machine: Machine, compiled: bool, model: Any, price: float | None) -> Time:
    phases = seconds_by_phase(step.trace, machine, compiled)
    computing = step.accumulation * (phases["forward"] + phases["backward"])
    seconds, steps = computing + phases["optimizer"], recipe.train.steps
    tokens = step.tokens * step.accumulation
    batches = recipe.tokens / tokens  # fewer than steps, if they begin small
    total = batches * computing + steps * phases["optimizer"]
    return Time(
        machine.name,
        machine.assumptions,
        compiled,
        phases,
        seconds,
        tokens / seconds,
        model.training_flops_per_token(step.length) * tokens / seconds,
        total,
        None if price is None else price * total / 3600,
    )


def _savings(
    peak_with: Callable[..., int], step: Step, rows: int, precision: str, recipe: Recipe
) -> dict[str, int]:
    """Peak bytes with one thing changed: what can be traced is traced, the rest is taken from the trace."""
    peak = step.memory.peak()[1]
    found: dict[str, int] = {}
    if precision != "bf16":
        found["bf16 autocast"] = peak_with(rows, precision="bf16")
    if rows > 1:
        more = {} if step.accumulation > 1 else {"accumulation": 2}  # two stand for any number above one
        half = peak_with(rows // 2, **more)
        found["half the micro-batch, twice the accumulation"] = half
    if recipe.train.loss_kernel == "reference":
        found["chunked loss"] = peak_with(rows, loss_kernel="chunked")
    if recipe.train.activation_checkpointing == "none":
        found["checkpointing all but products"] = peak_with(rows, checkpointing="selective")
    if recipe.train.activation_checkpointing != "blocks":
        found["checkpointing whole blocks"] = peak_with(rows, checkpointing="blocks")
    state = sum(s.size for s in step.memory.storages if s.kind == "optimizer state")
    if state:
        found["optimizer states in 8 bits"] = peak - state + round(IN_8_BITS * state)
    return {name: bytes_ for name, bytes_ in found.items() if bytes_ != peak}
