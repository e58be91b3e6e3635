"""A recipe's step, whatever the depth of its model: traced whole, or by two shallow models where those say the same sooner."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, get_args

from scratchlm.config import OptimConfig, TrainConfig
from scratchlm.model.config import ModelConfig
from scratchlm.model.transformer import Transformer
from scratchlm.resources.account import Account, account_of, further, groups_of, sum_of
from scratchlm.resources.answer import Memory, collapsed
from scratchlm.resources.depth import Deepening, Irregular, shallow
from scratchlm.resources.step import Step, Traceable
from scratchlm.resources.timing import Machine
from scratchlm.resources.trace import Kind, Trace

T = TypeVar("T")

_KINDS: tuple[str, ...] = get_args(Kind)
_PASSING = ("activations", "temporaries")


@dataclass(frozen=True)
class Taken:
    """A traced step; or two of shallow models, and how many periods of layers the model has more than the first of them.

    Every question may raise Irregular, where there are two that do not tell what the deep model does.
    """

    steps: tuple[Step, ...]
    models: tuple[Transformer, ...]
    more: int = 0

    def live(self) -> list[int]:
        """Bytes at every operation."""
        return self._deeper([trace.timeline() for trace in self._traces])

    def peak(self) -> int:
        """The most bytes that live at once."""
        return max(self.live())

    def bytes_of(self, kind: Kind) -> int:
        """Of all storages of one kind."""
        return self._further([sum_of(kind, trace) for trace in self._traces])

    def account(self, machine: Machine | None, compiled: bool) -> Account:
        """All that adds up; see :func:`scratchlm.resources.account.account_of`."""
        pairs = zip(self.steps, self.models, strict=True)
        found = self._further([account_of(step, model, machine, compiled) for step, model in pairs])
        if self._deepening is not None:
            updates = self._deepening.optimizer(*(step.trace.operations for step in self.steps))
            found.operations |= groups_of(updates, machine)
            if machine is not None:
                found.seconds["optimizer"] = sum(machine.of(operation).seconds for operation in updates)
        return found

    def memory(self) -> Memory:
        """Bytes at every operation, and what they are at the peak."""
        kinds = [trace.timeline_by_kind() for trace in self._traces]
        by_kind = {kind: self._deeper([of[kind] for of in kinds]) for kind in _KINDS}
        live = [sum(column) for column in zip(*by_kind.values(), strict=True)]
        moment = max(range(len(live)), key=live.__getitem__)
        parts = [(1, 0, moment)] if self._deepening is None else self._deepening.parts(moment)
        operation = self._traces[parts[0][1]].operations[parts[0][2]]
        alive = {kind: of[moment] for kind, of in by_kind.items() if of[moment]}
        where: Counter[str] = Counter()
        for often, which, at in parts:
            passing = self._traces[which].live_by(at, lambda s: collapsed(s.module) if s.kind in _PASSING else "")
            where.update({place: often * bytes_ for place, bytes_ in passing.items() if place})
        phases = [op.phase for op in self._traces[0].operations]
        return Memory(
            live[moment],
            f"{operation.name} in {collapsed(operation.module)}, {operation.phase}",
            dict(sorted(alive.items(), key=lambda pair: -pair[1])),
            {place: bytes_ for place, bytes_ in where.most_common() if bytes_},
            list(zip(phases if self._deepening is None else self._deepening.phases(), live, strict=True)),
            by_kind,
        )

    @property
    def _traces(self) -> list[Trace]:
        return [step.memory for step in self.steps]

    @functools.cached_property
    def _deepening(self) -> Deepening | None:
        if not self.more:
            return None
        one, two = self._traces
        return Deepening(one, two, self.more)

    def _deeper(self, numbers: Sequence[list[int]]) -> list[int]:
        return numbers[0] if self._deepening is None else self._deepening.deeper(*numbers)

    def _further(self, values: Sequence[T]) -> T:
        return further(values[0], values[-1], self.more)


class Steps:
    """The step of one recipe's model, to be asked about.

    Args:
        config: the architecture, with its vocabulary.
        optim, train: sections of the recipe.
        device_type: as for :class:`scratchlm.resources.step.Traceable`.
    """

    def __init__(
        self, config: ModelConfig, optim: OptimConfig, train: TrainConfig, *, device_type: str = "cpu"
    ) -> None:
        def prepared(config: ModelConfig) -> Traceable:
            return Traceable(config, optim, train, device_type=device_type)

        self._whole = functools.cache(lambda: prepared(config))
        self._two: tuple[Traceable, Traceable, int] | None = None
        found = shallow(config)
        if found is not None:
            one, two, three, more = found
            self._two = prepared(one), prepared(two), more
            self._three = functools.cache(lambda: prepared(three))
        self._foretold = False

    def ask(self, question: Callable[[Taken], T], **how: Any) -> T:
        """What `question` finds in a step.

        Args:
            question: asked of two shallow steps, where the model is deep and they tell; else of its own.
            how: as for :meth:`scratchlm.resources.step.Traceable.step`.
        """
        if self._two is not None:
            *prepared, more = self._two
            taken = _taken(prepared, more, how)
            try:
                if how.get("compiled") and not self._foretold:
                    self._foretell(replace(taken, more=2), how)
                return question(taken)
            except Irregular:
                self._two = None  # its other steps are no more regular
        return question(_taken([self._whole()], 0, how))

    def _foretell(self, taken: Taken, how: dict[str, Any]) -> None:
        """See that the two foretell the third, in what a compiler keeps.

        Raises:
            Irregular: they do not.
        """
        if taken.live() != self._three().step(**how).memory.timeline():
            raise Irregular("what is kept of a block depends on how deep it lies")
        self._foretold = True


def _taken(prepared: Sequence[Traceable], more: int, how: dict[str, Any]) -> Taken:
    return Taken(tuple(p.step(**how) for p in prepared), tuple(p.model for p in prepared), more)
