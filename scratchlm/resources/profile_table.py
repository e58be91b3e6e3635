"""Which module and which operation a step's time goes to, from what torch.profiler saw.

Forward passes of modules are ranges that hooks open and close. Backward passes need no hooks, which would change the
graph: autograd numbers every node of it, an operation's record carries the number of the node it is about to make, and
the node's record when it runs backward carries the same one. So backward work belongs to the module in whose range its
node was made.
"""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType

from scratchlm.resources.profile_timing import Ranges
from scratchlm.train.loss import NextTokenLoss

MODULE, PHASE = "module: ", "phase: "
HEAD_AND_LOSS = "head + loss"
OUTSIDE = "(outside modules)"
_BACKWARD = "autograd::engine::evaluate_function: "
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


class ProfilerRanges:
    """Ranges in torch.profiler's trace, with the interface of ``torch.cuda.nvtx``."""

    def __init__(self) -> None:
        self._open: list[Any] = []

    def range_push(self, name: str) -> None:
        scope = torch.profiler.record_function(name)
        scope.__enter__()
        self._open.append(scope)

    def range_pop(self) -> None:
        self._open.pop().__exit__(None, None, None)


class MarkedLoss(NextTokenLoss):
    """The next-token loss with a range around head and cross-entropy, which are no call of a module."""

    ranges: Sequence[Ranges] = ()

    def _head(self, *arguments: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for ranges in self.ranges:
                ranges.range_push(MODULE + HEAD_AND_LOSS)
                stack.callback(ranges.range_pop)
            return super()._head(*arguments)


@contextlib.contextmanager
def marked_modules(model: nn.Module, ranges: Sequence[Ranges]) -> Iterator[None]:
    """Within the block, every module's forward pass is a range ``module: <path>`` in each of `ranges`.

    A range is closed also when the module raises. A module that several others share goes by the path within the one that
    calls it.
    """
    handles = []
    paths: dict[nn.Module, list[str]] = defaultdict(list)
    for path, module in model.named_modules(remove_duplicate=False):
        if path:
            paths[module].append(path)
    inside = [""]  # paths of the open ranges
    for module, names in paths.items():

        def push(_: nn.Module, __: Any, names: Sequence[str] = names) -> None:
            name = next((name for name in names if name.startswith(f"{inside[-1]}.")), names[0])
            inside.append(name)
            for each in ranges:
                each.range_push(MODULE + name)

        def pop(_: nn.Module, __: Any, ___: Any) -> None:
            inside.pop()
            for each in reversed(ranges):
                each.range_pop()

        handles.append(module.register_forward_pre_hook(push, prepend=True))
        handles.append(module.register_forward_hook(pop, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class ModuleRow:
    """One module's part of a step, in milliseconds per step.

    ``self`` is what passes in the module itself, ``total`` includes the modules inside it. On CUDA the time of its kernels,
    elsewhere of the processor.
    """

    path: str
    kind: str
    calls: float = 0.0
    forward_self: float = 0.0
    forward_total: float = 0.0
    backward_self: float = 0.0
    backward_total: float = 0.0

    @property
    def self_time(self) -> float:
        return self.forward_self + self.backward_self


@dataclass(frozen=True)
class OperationRow:
    """One operation or kernel, in milliseconds per step; `share` is its own time's part of all rows'."""

    name: str
    calls: float
    self_time: float
    total_time: float
    share: float


def module_rows(events: Iterable[Any], model: nn.Module, steps: int) -> list[ModuleRow]:
    """The table by module, in the model's order; last :data:`HEAD_AND_LOSS` and, if there is any, :data:`OUTSIDE`.

    Args:
        events: ``torch.profiler.profile.events()``.
        model: whose modules were marked by :func:`marked_modules`.
        steps: how many steps the profiler saw.
    """
    seen = [event for event in events if event.device_type == DeviceType.CPU]
    on_device = any(event.kernels for event in seen)
    named = model.named_modules(remove_duplicate=False)
    rows = {path: ModuleRow(path, type(module).__name__) for path, module in named if path}
    rows[HEAD_AND_LOSS] = ModuleRow(HEAD_AND_LOSS, NextTokenLoss.__name__)
    rows[OUTSIDE] = ModuleRow(OUTSIDE, "")
    makers: dict[tuple[int, int], tuple[float, str]] = {}  # (thread, number of a node) → when and where it was made
    for event in seen:
        module, phase = _enclosing(event)
        if phase != "forward":
            continue
        row = rows[module or OUTSIDE]
        row.calls += event.name.startswith(MODULE)
        if on_device:
            row.forward_self += _kernel_time(event)
        elif event.name.startswith((MODULE, PHASE)):
            row.forward_self += event.cpu_time_total
            if event.name.startswith(MODULE):
                rows[_enclosing(event.cpu_parent)[0] or OUTSIDE].forward_self -= event.cpu_time_total
        if event.sequence_nr >= 0 and event.scope == 0:
            key, start = (event.thread, event.sequence_nr), event.time_range.start
            if key not in makers or start >= makers[key][0]:  # the last to carry a number makes the node
                makers[key] = start, row.path
    for event in seen:
        if event.name.startswith(_BACKWARD):
            _, path = makers.get((event.fwd_thread, event.sequence_nr), (0.0, OUTSIDE))
            rows[path].backward_self += _inner_kernel_time(event) if on_device else event.cpu_time_total
    found = [row for row in rows.values() if row.calls or row.forward_self or row.backward_self]
    for row in found:
        row.calls /= steps
        row.forward_self = max(0.0, row.forward_self) / 1000 / steps
        row.backward_self = row.backward_self / 1000 / steps
    for row in found:
        inside = [other for other in found if other is row or other.path.startswith(f"{row.path}.")]
        row.forward_total = sum(other.forward_self for other in inside)
        row.backward_total = sum(other.backward_self for other in inside)
    return found


def _kernel_time(event: Any) -> float:
    """Microseconds of the kernels an operation itself launched.

    A range's are left out: on the device it has a shadow of its own, as long as all that runs in it.
    """
    return 0.0 if event.is_user_annotation else float(sum(kernel.duration for kernel in event.kernels))


def _inner_kernel_time(event: Any) -> float:
    return _kernel_time(event) + sum(_inner_kernel_time(child) for child in event.cpu_children)


def _enclosing(event: Any) -> tuple[str | None, str | None]:
    """The innermost module and phase whose ranges hold the event, itself included."""
    module = None
    while event is not None:
        if module is None and event.name.startswith(MODULE):
            module = event.name.removeprefix(MODULE)
        elif event.name.startswith(PHASE):
            return module, event.name.removeprefix(PHASE)
        event = event.cpu_parent
    return module, None


def by_place(rows: Iterable[ModuleRow]) -> list[ModuleRow]:
    """The same rows with those of all layers added up: ``blocks.0.norm``, ``blocks.1.norm`` → ``blocks.*.norm``."""
    merged: dict[str, ModuleRow] = {}
    for row in rows:
        place = _NUMBER.sub("*", row.path)
        into = merged.setdefault(place, ModuleRow(place, row.kind))
        if row.kind not in into.kind.split(", "):
            into.kind += f", {row.kind}"
        for name in ("calls", "forward_self", "forward_total", "backward_self", "backward_total"):
            setattr(into, name, getattr(into, name) + getattr(row, name))
    return list(merged.values())


def operation_rows(averages: Iterable[Any], steps: int, device: bool) -> list[OperationRow]:
    """The table by operation (`device` False: on the processor) or by kernel (True), most own time first.

    Args:
        averages: ``torch.profiler.profile.key_averages()``.
        steps: how many steps the profiler saw.
        device: which of the two.
    """
    chosen = [
        event
        for event in averages
        if (event.device_type != DeviceType.CPU) == device
        and not event.is_user_annotation
        and not event.key.startswith((MODULE, PHASE, "ProfilerStep"))
    ]
    own = [float(e.self_device_time_total if device else e.self_cpu_time_total) for e in chosen]
    total = [float(e.device_time_total if device else e.cpu_time_total) for e in chosen]
    everything = sum(own) or 1.0
    rows = [
        OperationRow(e.key, e.count / steps, mine / 1000 / steps, whole / 1000 / steps, mine / everything)
        for e, mine, whole in zip(chosen, own, total, strict=True)
    ]
    return sorted(rows, key=lambda row: -row.self_time)
