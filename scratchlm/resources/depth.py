"""The peak of a deep model, from two shallow ones.

Layers repeat, and with them what a step does: a model with one more period of layers runs a period's operations once more, in the middle of each
phase. What comes before them finds as many more bytes as a period's weights, gradients and state take; what comes after, in the forward
pass, what the period kept as well::

    one      a a │ · │ b b          operations of a phase: the first ones, a period in the middle, the last ones
    two      a a │ · · │ b b        live bytes grow from one to two at each a, and at each b, by what they grow by
    more     a a │ · · · · │ b b    with every further period; inside, the first or the last period has the most

So two traces say for every operation, counted from the phase's start or from its end, how its live bytes grow with depth. The result is exact, which the
tests hold over the whole table of architectures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

from scratchlm.model.config import ModelConfig
from scratchlm.resources.trace import Operation, Trace

_AT_THE_ENDS = 2
"""Periods of the shallower model: one to begin with and one to end with."""


def shallow(config: ModelConfig) -> tuple[ModelConfig, ModelConfig, int] | None:
    """Two models with fewer layers, the second with one period more than the first, and how many periods more the given one has than the first.

    None: it has hardly more layers than those.
    """
    period = math.lcm(
        *(len(p) for p in (config.attention, config.mask, config.position, config.rope.theta, config.rope.scaling)),
        config.moe.every if config.moe.experts else 1,
    )
    before = config.moe.first_dense if config.moe.experts else 0
    more, rest = divmod(config.layers - before, period)
    first = before + rest + _AT_THE_ENDS * period
    if more <= 2 * _AT_THE_ENDS + 1 or config.layers <= 2 * first:
        return None
    one, two = (config.model_copy(update={"layers": layers}) for layers in (first, first + period))
    return one, two, more - _AT_THE_ENDS


def peak_of_deeper(one: Trace, two: Trace, more: int) -> int | None:
    """Peak bytes of a model with `more` periods more than that of `one`.

    Args:
        one, two: forward and backward pass of the shallow models.
        more: at least 1.

    Returns:
        None if `two` does not do what `one` does with a period more.
    """
    best = 0
    phases = [_by_phase(trace) for trace in (one, two)]
    if [name for name, *_ in phases[0]] != [name for name, *_ in phases[1]]:
        return None
    for (_, names, live), (_, longer, live_longer) in zip(*phases, strict=True):
        added = len(longer) - len(names)
        # Equal from the start are both periods of `one` with what comes before them: the cut is between the two.
        equal = next((at for at, (a, b) in enumerate(zip(names, longer, strict=False)) if a != b), len(names))
        cut = equal - added
        if added < 0 or cut < 0 or names[cut:] != longer[cut + added :]:
            return None
        later = [*live_longer[:cut], *live_longer[cut + added :]]
        best = max(best, *(bytes_ + more * (grown - bytes_) for bytes_, grown in zip(live, later, strict=True)))
    return best


def _by_phase(trace: Trace) -> list[tuple[str, list[str], list[int]]]:
    """Each phase with the names of its operations and the live bytes at each."""

    def phase(pair: tuple[Operation, int]) -> str:
        return pair[0].phase

    pairs: Sequence[tuple[Operation, int]] = list(zip(trace.operations, trace.timeline(), strict=True))
    found = []
    for name, group in groupby(pairs, phase):
        operations, live = zip(*group, strict=True)
        found.append((name, [operation.name for operation in operations], list(live)))
    return found
