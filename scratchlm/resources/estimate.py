"""What a recipe needs: parameters, FLOPs, memory, time and money, before anything runs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from scratchlm.config import Recipe, TrainConfig
from scratchlm.errors import UserError
from scratchlm.generate.cache import KVCache
from scratchlm.machine import COMPILER
from scratchlm.model.config import ModelConfig
from scratchlm.resources.account import Account
from scratchlm.resources.answer import Estimate, Time
from scratchlm.resources.any_depth import Steps, Taken
from scratchlm.resources.step import as_run_on
from scratchlm.resources.timing import Machine, no_less_than_calls
from scratchlm.sizes import parse_bytes
from scratchlm.train.fitting import MARGIN, Need, largest

IN_8_BITS = (1 + 4 / 256) / 4
"""Of a state in fp32 what it takes in 8 bits, with a scale in fp32 per block of 256 (Dettmers et al. 2022, arXiv 2110.02861)."""


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
        memory_bytes: of the device, for the largest micro-batch, which ``train.memory_limit`` bounds as well; None: it is not said.
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
    config = as_run_on(device_type, config, length)

    steps = Steps(config, recipe.optim, recipe.train, device_type=device_type)
    options: dict[str, Any] = {"precision": precision, "compiled": compiled}
    rows = micro_batch or _micro_batch(recipe.train, steps, options, memory_bytes, device_type)
    memory_bytes = within_limit(recipe.train, memory_bytes)
    whole = recipe.train.batch_size
    if whole % rows:
        raise UserError(
            f"micro-batch {rows} does not divide train.batch_size = {whole}; give a divisor, or --train.batch-size as well"
        )
    parts = whole // rows
    given = options | {"accumulation": parts}
    account, memory = steps.ask(
        lambda step: (step.account(machine, compiled), step.memory()), micro_batch=rows, **given
    )
    updating = [live for phase, live in memory.timeline if phase == "optimizer"]
    optimizer = max(updating, default=0) - account.given  # the batch alone depends on the micro-batch

    @functools.cache
    def peak(batch: int, **changes: Any) -> int:
        """Of a step with another micro-batch, or with something else changed; the optimizer's own part is known by now."""
        return steps.ask(
            lambda step: max(step.peak(), optimizer + step.bytes_of("batch and tables")),
            **{"micro_batch": batch, "for_peak": True, **given, **changes},
        )

    other = 2 * rows if rows == 1 else rows // 2
    peaks = {rows: memory.peak, other: peak(other)}
    largest = None
    if memory_bytes is not None:
        most = max(rows, other, LONGEST_TRACE // length)
        largest = largest_fitting(peak, memory_bytes, peaks, most)
    fixed, slope = _line(peaks, rows, largest)
    tokens = rows * length
    cache, bounded = _cache(config, precision)
    return Estimate(
        name=recipe.name,
        precision=precision,
        compiled=compiled,
        micro_batch=rows,
        accumulation=parts,
        length=length,
        steps=recipe.train.steps,
        tokens=recipe.tokens,
        params=account.params,
        active_params=account.active_params,
        embedding_params=account.embedding_params,
        forward_flops=account.flops["forward"] / tokens,
        backward_flops=account.flops["backward"] / tokens,
        model_flops=account.model_flops,
        six_n=6 * account.active_params,
        components=list(account.components.values()),
        operations=sorted(account.operations.values(), key=lambda g: (-(g.seconds or 0), -g.flops, -g.moved)),
        memory=memory,
        fixed_bytes=fixed,
        bytes_per_sequence=slope,
        largest_micro_batch=largest,
        cache_bytes_per_token=cache,
        cache_bytes_bounded=bounded,
        savings=_savings(peak, memory.peak, account.state, rows, parts, precision, recipe.train) if savings else {},
        time=None if machine is None else _time(account, tokens, parts, recipe, machine, compiled, price_per_hour),
    )


def _line(peaks: dict[int, int], rows: int, largest: int | None) -> tuple[float, float]:
    """Bytes = fixed + slope · sequences, true for `rows` of them and for the most that fit, or for those nearest to these that were traced.

    The peak bends where another moment becomes the highest; between the two it is no higher than the line, or little. A step of which twice as many sequences take
    more than twice as much has no fixed part.
    """
    others = [known for known in peaks if known != rows]
    end = min(others, key=lambda known: (abs(known - (largest or 0)), known))
    slope = (peaks[end] - peaks[rows]) / (end - rows)
    fixed = peaks[rows] - slope * rows
    return (fixed, slope) if fixed >= 0 else (0.0, peaks[rows] / rows)


def within_limit(train: TrainConfig, memory: float | None) -> float | None:
    """Bytes that a step may take: the device's, or fewer by ``train.memory_limit``; None where neither is known."""
    limit = None if train.memory_limit is None else parse_bytes(train.memory_limit)
    return min((size for size in (memory, limit) if size is not None), default=None)


def _micro_batch(
    train: TrainConfig, steps: Steps, options: dict[str, Any], memory: float | None, device_type: str
) -> int:
    """The recipe's; where that is ``auto``, what a run would begin with on a device with so much memory (:func:`scratchlm.train.fitting.choose`)."""
    if memory is not None and options["compiled"] and device_type == "cpu":
        memory = max(0, memory - COMPILER)
    budget = within_limit(train, memory)
    if train.parts is not None or budget is None:
        return train.batch_size // (train.parts or 1)

    def need(rows: int) -> Need:
        return Need(steps.ask(Taken.peak, micro_batch=rows, accumulation=train.batch_size // rows, **options))

    return largest(train.batch_size, (1 - MARGIN) * budget, need)[0]


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
    return KVCache.bytes_per_token(config, dtype), KVCache.state_bytes(config, dtype, config.context_length)


def _time(
    account: Account,
    tokens: int,
    parts: int,
    recipe: Recipe,
    machine: Machine,
    compiled: bool,
    price: float | None,
) -> Time:
    """Of steps of `parts` micro-batches of so many tokens."""
    phases = no_less_than_calls(account.seconds, account.calls, machine)
    computing = parts * (phases["forward"] + phases["backward"])
    seconds, steps = computing + phases["optimizer"], recipe.train.steps
    tokens *= parts
    batches = recipe.tokens / tokens  # fewer than steps, if they begin small
    total = batches * computing + steps * phases["optimizer"]
    return Time(
        machine.name,
        machine.assumptions,
        compiled,
        phases,
        seconds,
        tokens / seconds,
        account.model_flops * tokens / seconds,
        total,
        None if price is None else price * total / 3600,
    )


def _savings(
    peak_with: Callable[..., int], peak: int, state: int, rows: int, parts: int, precision: str, train: TrainConfig
) -> dict[str, int]:
    """Peak bytes with one thing changed: what can be traced is traced, the rest is taken from the trace."""
    found: dict[str, int] = {}
    if precision != "bf16":
        found["bf16 autocast"] = peak_with(rows, precision="bf16")
    if rows > 1:
        more = {} if parts > 1 else {"accumulation": 2}  # two stand for any number above one
        half = peak_with(rows // 2, **more)
        found["half the micro-batch, twice the accumulation"] = half
    if train.loss_kernel == "reference":
        found["chunked loss"] = peak_with(rows, loss_kernel="chunked")
    if train.activation_checkpointing == "none":
        found["checkpointing all but products"] = peak_with(rows, checkpointing="selective")
    if train.activation_checkpointing != "blocks":
        found["checkpointing whole blocks"] = peak_with(rows, checkpointing="blocks")
    if state:
        found["optimizer states in 8 bits"] = peak - state + round(IN_8_BITS * state)
    return {name: bytes_ for name, bytes_ in found.items() if bytes_ != peak}
