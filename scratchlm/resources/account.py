"""What adds up over a traced step: parameters, FLOPs, bytes and seconds by component and by operation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

from scratchlm.model.moe import ExpertLinear, MixtureOfExperts
from scratchlm.model.transformer import Transformer
from scratchlm.resources.answer import HEAD, Component, OperationGroup, collapsed
from scratchlm.resources.depth import Irregular
from scratchlm.resources.step import Step
from scratchlm.resources.timing import Machine, cost_by_phase
from scratchlm.resources.trace import Operation, Trace


@dataclass
class Account:
    """Of one step. With every further period of layers all of it grows by the same (:func:`further`).

    Attributes:
        params, active_params, embedding_params: numbers.
        flops: phase → FLOPs of its matrix products.
        model_flops: per trained token, by the model's formula.
        components: path → component.
        operations: (phase, component, name) → equal operations.
        seconds, calls: phase → of its operations, and how many calls they are; without a machine, none.
        state: bytes that the optimizer remembers.
        given: bytes of the batch and of tables, which are there all the time.
    """

    params: int
    active_params: int
    embedding_params: int
    flops: dict[str, int]
    model_flops: float
    components: dict[str, Component]
    operations: dict[tuple[str, str, str], OperationGroup]
    seconds: dict[str, float]
    calls: dict[str, int]
    state: int
    given: int


def account_of(step: Step, model: Transformer, machine: Machine | None, compiled: bool) -> Account:
    """A traced step of `model`, added up; with a `machine`, its times as well."""
    seconds, calls = ({}, {}) if machine is None else cost_by_phase(step.trace, machine, compiled)
    return Account(
        params=model.num_params(),
        active_params=model.num_active_params(),
        embedding_params=model.embedding.num_params(),
        flops={phase: step.trace.flops(phase) for phase in ("forward", "backward")},
        model_flops=model.training_flops_per_token(step.length),
        components={component.path: component for component in components_of(step, model)},
        operations=groups_of(step.trace.operations, machine),
        seconds=seconds,
        calls=calls,
        state=sum_of("optimizer state", step.memory),
        given=sum_of("batch and tables", step.memory),
    )


def sum_of(kind: str, trace: Trace) -> int:
    """Bytes of all storages of one kind."""
    return sum(storage.size for storage in trace.storages if storage.kind == kind)


T = TypeVar("T")


def further(one: T, two: T, more: int) -> T:
    """What becomes of `one` after `more` steps of the kind that leads to `two`.

    Numbers grow along a line, in dicts and dataclasses each for itself; whatever else there is, is that of `two`.

    Raises:
        Irregular: a dict does not have the same keys in both.
    """
    first: Any = one
    second: Any = two
    if isinstance(second, dict):
        if first.keys() != second.keys():
            raise Irregular(f"{sorted(map(str, first.keys() ^ second.keys()))} are in one of two steps alone")
        return {key: further(first[key], value, more) for key, value in second.items()}  # type: ignore[return-value]
    if is_dataclass(second):
        parts = {f.name: further(getattr(first, f.name), getattr(second, f.name), more) for f in fields(second)}
        return replace(second, **parts)  # type: ignore[type-var, return-value]
    return first + more * (second - first) if isinstance(second, int | float) else two


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


def groups_of(
    operations: Sequence[Operation], machine: Machine | None
) -> dict[tuple[str, str, str], OperationGroup]:
    """Operations by phase, component and name."""
    groups: dict[tuple[str, str, str], list[Operation]] = defaultdict(list)
    for operation in operations:
        place = "" if operation.phase == "optimizer" else collapsed(operation.module)
        groups[operation.phase, place, operation.name].append(operation)
    found = {}
    for (phase, place, name), calls in groups.items():
        costs = [machine.of(call) for call in calls] if machine is not None else []
        found[phase, place, name] = OperationGroup(
            phase,
            place,
            name,
            len(calls),
            sum(call.flops for call in calls),
            sum(call.read + call.written for call in calls),
            sum(cost.seconds for cost in costs) if costs else None,
            max(costs, key=lambda cost: cost.seconds).bound if costs else None,
        )
    return found
