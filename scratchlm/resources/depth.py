"""A deep model's step, from those of two shallow ones.

Layers repeat, and with them what a step does: a model with one more period of layers runs a period's operations once more, in the middle of each
phase. What comes before them finds as many more bytes as a period's weights, gradients and state take; what comes after, in the forward
pass, what the period kept as well::

    one      a a │ · │ b b          operations of a phase: the first ones, a period in the middle, the last ones
    two      a a │ · · │ b b        live bytes grow from one to two at each a, and at each b, by what they grow by
    more     a a │ · · · · │ b b    with every further period; inside, the first or the last period has the most

So two traces say for every operation, counted from the phase's start or from its end, how its live bytes grow with depth. The result is exact, which the
tests hold over the whole table of architectures. An optimizer goes over all layers several times: there each run of equal operations grows in its middle.
What a compiler keeps of a block may depend on how deep it lies, as in some parallel blocks: a third trace tells (:class:`scratchlm.resources.any_depth.Steps`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from scratchlm.model.config import ModelConfig
from scratchlm.resources.answer import collapsed
from scratchlm.resources.trace import Operation, Trace

_AT_THE_ENDS = 2
"""Periods of the shallower model: one to begin with and one to end with."""


class Irregular(Exception):
    """The deeper of two models does not do what the other does with a period more."""


def shallow(config: ModelConfig) -> tuple[ModelConfig, ModelConfig, ModelConfig, int] | None:
    """Models with fewer layers, each with one period more than the one before, and how many periods more the given one has than the first.

    The third is there to see whether the first two foretell it. None: the given one has hardly more layers than the two together.
    """
    period = math.lcm(
        *(len(p) for p in (config.attention, config.mask, config.position, config.rope.theta, config.rope.scaling)),
        config.moe.every if config.moe.experts else 1,
    )
    before = config.moe.first_dense if config.moe.experts else 0
    more, rest = divmod(config.layers - before, period)
    first = before + rest + _AT_THE_ENDS * period
    if more <= _AT_THE_ENDS + 1 or config.layers <= 2 * first + period:
        return None
    one, two, three = (config.model_copy(update={"layers": first + n * period}) for n in range(3))
    return one, two, three, more - _AT_THE_ENDS


def _grown(one: Operation, two: Operation, more: int) -> Operation:
    """What an operation over all layers is in the deeper model."""

    def along(a: int, b: int) -> int:
        return a + more * (b - a)

    alike = [len(shape) for shape in one.shapes] == [len(shape) for shape in two.shapes]
    shapes = zip(one.shapes, two.shapes, strict=True) if alike else ()
    return replace(
        two,
        flops=along(one.flops, two.flops),
        read=along(one.read, two.read),
        written=along(one.written, two.written),
        shapes=tuple(tuple(map(along, a, b)) for a, b in shapes) if alike else two.shapes,
    )


@dataclass(frozen=True)
class _Stretch:
    """Operations that both have: `cut` before what `two` has `added`, all others after it."""

    phase: str
    one: range
    two: range
    cut: int

    @property
    def added(self) -> int:
        return len(self.two) - len(self.one)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The numbers of the operations that both have."""
        return list(zip(self.one, (*self.two[: self.cut], *self.two[self.cut + self.added :]), strict=True))

    @property
    def middle(self) -> range:
        """Those that `two` alone has."""
        return self.two[self.cut : self.cut + self.added]


class Deepening:
    """Which operations of two steps, and of one with `more` periods more than the first, are the same.

    Args:
        one, two: of the shallow models.
        more: at least 1.

    Raises:
        Irregular: `two` does not do what `one` does with a period more.
    """

    def __init__(self, one: Trace, two: Trace, more: int) -> None:
        self.more = more
        phases = [_by_phase(trace) for trace in (one, two)]
        if [phase for phase, *_ in phases[0]] != [phase for phase, *_ in phases[1]]:
            raise Irregular("other phases")
        self._stretches: list[_Stretch] = []
        for (phase, start, first), (_, start_two, second) in zip(*phases, strict=True):
            self._stretches += _phase(phase, start, first, start_two, second)

    def phases(self) -> list[str]:
        """Of every operation."""
        return [s.phase for s in self._stretches for _ in range(len(s.one) + self.more * s.added)]

    def deeper(self, one: Sequence[int], two: Sequence[int]) -> list[int]:
        """A number for every operation, from those of all operations of the two.

        Every further period adds the same: to operations before it what it adds to the first period's, to those after it what it adds
        to the last period's. So the n-th period in the middle has what the only one of `two` has, and both for the periods around it.
        """
        found: list[int] = []
        for s in self._stretches:
            growth = [two[j] - one[i] for i, j in s.pairs]
            grown = [one[i] + self.more * by for i, by in zip(s.one, growth, strict=True)]
            middle = [two[j] for j in s.middle]
            first, last = growth[s.cut - s.added : s.cut], growth[s.cut : s.cut + s.added]
            found += grown[: s.cut]
            for n in range(self.more):
                rest = self.more - 1 - n
                found += [m + n * a + rest * b for m, a, b in zip(middle, last, first, strict=True)]
            found += grown[s.cut :]
        return found

    def optimizer(self, one: Sequence[Operation], two: Sequence[Operation]) -> list[Operation]:
        """The deep model's optimizer's: each with the bytes, FLOPs and sizes that it has then, as its time need not grow along a line."""
        found: list[Operation] = []
        for s in (s for s in self._stretches if s.phase == "optimizer"):
            grown = [_grown(one[i], two[j], self.more) for i, j in s.pairs]
            middle = [two[j] for j in s.middle]
            found += [*grown[: s.cut], *middle * self.more, *grown[s.cut :]]
        return found

    def parts(self, at: int) -> list[tuple[int, int, int]]:
        """How :meth:`deeper` comes by the number of operation `at`: (how often, of which of the two, of which of its operations), the first being
        the same operation."""
        for s in self._stretches:
            middle = self.more * s.added
            if at >= len(s.one) + middle:
                at -= len(s.one) + middle
                continue
            if s.cut <= at < s.cut + middle:
                n, place = divmod(at - s.cut, s.added)
                rest = self.more - 1 - n
                first, last = s.cut - s.added + place, s.cut + place
                return [
                    (1, 1, s.two[s.cut + place]),
                    (n, 1, s.two[s.added + last]),
                    (-n, 0, s.one[last]),
                    (rest, 1, s.two[first]),
                    (-rest, 0, s.one[first]),
                ]
            number, longer = (at - middle, at - middle + s.added) if at >= s.cut else (at, at)
            return [(self.more, 1, s.two[longer]), (1 - self.more, 0, s.one[number])]
        raise IndexError(at)


def _phase(phase: str, start: int, one: list[Operation], start_two: int, two: list[Operation]) -> list[_Stretch]:
    """How the operations of a phase belong together: as a whole, or else the model's parts one by one, as a loss adds up what layers report."""
    if phase == "optimizer":
        return _in_runs(phase, start, one, start_two, two)
    if found := _once(phase, start, _named(one), start_two, _named(two)):
        return found
    parts, longer_parts = ([list(part) for _, part in groupby(given, _part)] for given in (one, two))
    if [_part(part[0]) for part in parts] != [_part(part[0]) for part in longer_parts]:
        raise Irregular(f"other parts in the {phase} pass")
    for part, longer in zip(parts, longer_parts, strict=True):
        once = _once(phase, start, _named(part), start_two, _named(longer))
        found += once or _in_runs(phase, start, part, start_two, longer)
        start, start_two = start + len(part), start_two + len(longer)
    return found


def _part(operation: Operation) -> str:
    return operation.module.partition(".")[0]


def _named(operations: list[Operation]) -> list[str]:
    """With place and shapes, so that a layer's end is not taken for what follows it."""
    return [f"{_name(operation)} of {operation.shapes}" for operation in operations]


def _once(phase: str, start: int, names: list[str], start_two: int, longer: list[str]) -> list[_Stretch]:
    """A phase whose operations are the same but for one stretch of `longer`; none: it is not of that kind."""
    added = len(longer) - len(names)
    # Equal from the start are both periods of `one` with what comes before them: the cut is between the two.
    equal = next((at for at, (a, b) in enumerate(zip(names, longer, strict=False)) if a != b), len(names))
    cut = equal - added
    if added < 0 or cut < added or cut + added > len(names) or names[cut:] != longer[cut + added :]:
        return []
    one, two = range(start, start + len(names)), range(start_two, start_two + len(longer))
    return [_Stretch(phase, one, two, cut if added else 0)]


def _in_runs(phase: str, start: int, one: list[Operation], start_two: int, two: list[Operation]) -> list[_Stretch]:
    """A phase that goes over the layers again and again: runs of equal operations, some of which are longer in `two`.

    A run that has as many calls in both may take more in each of them: all layers at once.
    """
    runs, longer_runs = ([list(run) for _, run in groupby(given, _name)] for given in (one, two))
    if [_name(run[0]) for run in runs] != [_name(run[0]) for run in longer_runs]:
        raise Irregular(f"other operations in the {phase} pass")
    found: list[_Stretch] = []
    for run, longer in zip(runs, longer_runs, strict=True):
        if len(run) == len(longer):
            ranges = range(start, start + len(run)), range(start_two, start_two + len(run))
            found.append(_Stretch(phase, *ranges, 0))
        else:
            shapes = [[str(operation.shapes) for operation in operations] for operations in (run, longer)]
            aligned = _once(phase, start, shapes[0], start_two, shapes[1])
            if not aligned:
                raise Irregular(f"{_name(run[0])} is not repeated layer by layer")
            found += aligned
        start, start_two = start + len(run), start_two + len(longer)
    return found


def _name(operation: Operation) -> str:
    return f"{operation.name} in {collapsed(operation.module)}"


def _by_phase(trace: Trace) -> list[tuple[str, int, list[Operation]]]:
    """Each phase, the number of its first operation, and all of them."""
    found = []
    start = 0
    for phase, group in groupby(trace.operations, lambda operation: operation.phase):
        operations = list(group)
        found.append((str(phase), start, operations))
        start += len(operations)
    return found
