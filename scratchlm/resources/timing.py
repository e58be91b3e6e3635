"""How long a traced step takes: each operation by what bounds it, on a measured machine or by a datasheet.

::

    product of matrices    measured: the time of that shape              datasheet: FLOPs / (share of the peak that is reached)
    flash attention        measured: FLOP/s at that length and width     datasheet: the same with a smaller share
    everything else        bytes / bandwidth, and the call itself        bytes / (share of the bandwidth)

Compiled, operations between two products that hand each other their results become one pass: what is made and used up inside such a
stretch is never written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from scratchlm.resources.answer import Bound
from scratchlm.resources.devices import Device
from scratchlm.resources.measurement import Measurement, between
from scratchlm.resources.trace import Operation, Trace

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


@dataclass(frozen=True)
class Cost:
    """Seconds of one operation (or of a stretch of them), and what bounds it."""

    seconds: float
    bound: Bound


class Machine(Protocol):
    """Something that knows times."""

    @property
    def name(self) -> str:
        """What the times are of."""
        ...

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What they rest on, a sentence each."""
        ...

    @property
    def is_cpu(self) -> bool:
        """Whether it computes as torch does on a CPU."""
        ...

    def of(self, operation: Operation) -> Cost:
        """An operation by itself."""
        ...

    def of_pass(self, moved: int, operations: int) -> Cost:
        """One pass over memory that does the work of so many operations."""
        ...

    def of_calls(self, calls: int) -> float:
        """Seconds that so many calls take at least, whatever they do."""
        ...


def product_shape(operation: Operation) -> tuple[int, int, int] | None:
    """(m, n, k) of a product of matrices, batches taken as more rows; None: it is none."""
    matrices = [shape for shape in operation.shapes if len(shape) >= 2]
    if (
        operation.name in ("mm", "addmm", "bmm", "baddbmm", "product_", "grouped_product", "grouped_outer")
        and len(matrices) >= 2
    ):
        first, second = matrices[-2:]
        if operation.name == "grouped_product":
            return first[0], second[-2], second[-1]
        if operation.name == "grouped_outer":
            return first[-1], second[-1], first[0]
        return math.prod(first[:-1]), second[-1], first[-1]
    return None


def is_attention(operation: Operation) -> bool:
    """Whether it is a fused attention, torch's or ours."""
    return "scaled_dot_product" in operation.name or operation.name.startswith("flash_attention")


@dataclass(frozen=True)
class Datasheet:
    """Times from a device's printed figures and stated shares of them.

    Attributes:
        device: a known one.
        product_share, attention_share, bandwidth_share: what of the peak or the bandwidth is reached.
        launch: seconds between the starts of two kernels when nothing else is in the way.
    """

    device: Device
    product_share: float = 0.7
    attention_share: float = 0.45
    bandwidth_share: float = 0.8
    launch: float = 5e-6

    @property
    def name(self) -> str:
        return self.device.title

    @property
    def assumptions(self) -> tuple[str, ...]:
        return (
            f"products reach {self.product_share:.0%} of the printed dense peak, fused attention {self.attention_share:.0%}",
            f"everything else reaches {self.bandwidth_share:.0%} of the memory's bandwidth",
            f"a kernel starts every {self.launch * 1e6:g} µs at best",
            *(
                f"what is multiplied in {name} takes the peak of {other}: no other is printed"
                for name, other in self._instead()
            ),
        )

    def _instead(self) -> Iterator[tuple[str, str]]:
        """fp32 or bf16, where its peak is not printed, and the other of the two, whose is: TPUs multiply fp32 in bf16 unless told otherwise, and torch takes fp32
        where a GPU has no bf16."""
        peaks: dict[str, float] = {str(name): peak for name, peak in self.device.peak_flops.items()}
        for name, other in (("fp32", "bf16"), ("bf16", "fp32")):
            if name not in peaks and other in peaks:
                yield name, other

    def _peak(self, dtype: torch.dtype) -> float:
        name = NAMES.get(dtype, "fp32")
        return self.device.peak(dict(self._instead()).get(name, name))

    @property
    def is_cpu(self) -> bool:
        return self.device.kind == "cpu"

    def of(self, operation: Operation) -> Cost:
        moved = (operation.read + operation.written) / (self.bandwidth_share * self._bandwidth)
        if not operation.flops:
            return Cost(moved, "memory")
        share = self.attention_share if is_attention(operation) else self.product_share
        computed = operation.flops / (share * self._peak(operation.dtype))
        return Cost(max(moved, computed), "compute" if computed >= moved else "memory")

    def of_pass(self, moved: int, operations: int) -> Cost:
        return Cost(moved / (self.bandwidth_share * self._bandwidth), "memory")

    def of_calls(self, calls: int) -> float:
        return calls * self.launch

    @property
    def _bandwidth(self) -> float:
        assert self.device.memory_bandwidth is not None
        return self.device.memory_bandwidth


_EXPONENTIALS = (
    "exp",
    "gelu",
    "silu",
    "tanh",
    "sigmoid",
    "erf",
    "log",
    "pow",
    "rsqrt",
    "sqrt",
    "cos",
    "sin",
    "softplus",
)


@dataclass(frozen=True)
class Measured:
    """Times from what :func:`scratchlm.resources.measure.measure` found on this machine."""

    measurement: Measurement

    @property
    def name(self) -> str:
        return self.measurement.machine

    @property
    def assumptions(self) -> tuple[str, ...]:
        return (
            f"times of {self.measurement.machine}, {self.measurement.threads} threads, measured {self.measurement.date[:10]}",
        )

    @property
    def is_cpu(self) -> bool:
        return self.measurement.device == "cpu"

    def of(self, operation: Operation) -> Cost:
        # A GPU is handed its calls ahead of the work (see of_calls); what a small operation was measured to take holds its call already.
        call, dtype = self.measurement.call_seconds if self.is_cpu else 0.0, self._dtype(operation.dtype)
        shape = product_shape(operation)
        if shape is not None and min(shape) > 0:
            fastest = operation.flops / self.measurement.ceiling(dtype)  # a timing's noise is no speed
            return self._bounded(max(fastest, self.measurement.seconds_of_product(*shape, dtype)), operation)
        if is_attention(operation) and operation.flops:
            return self._bounded(operation.flops / self._attention_rate(operation, dtype) + call, operation)
        if operation.flops:
            return self._bounded(operation.flops / self.measurement.ceiling(dtype) + call, operation)
        moved = operation.read + operation.written
        if (
            not operation.dtype.is_floating_point
        ):  # a comparison takes as long as an addition of as many numbers, however few bytes it writes
            moved = max(moved, 3 * 4 * operation.written // operation.dtype.itemsize)
        passing = moved / self._rate(_kind(operation.name), dtype, max(operation.read, operation.written))
        return Cost(passing + call, "memory" if passing > call else "calls")

    def of_pass(self, moved: int, operations: int) -> Cost:
        if not moved:
            return Cost(0.0, "calls")
        passing = moved / self._rate("silu", "fp32", moved / 2)
        return Cost(passing + (self.measurement.call_seconds if self.is_cpu else 0.0), "memory")

    def of_calls(self, calls: int) -> float:
        if self.is_cpu:
            return 0.0  # the calls and the work follow each other: they are in the operations' times
        return calls * self.measurement.call_seconds

    def _bounded(self, seconds: float, operation: Operation) -> Cost:
        moved = (operation.read + operation.written) / self.measurement.bandwidth
        return Cost(seconds, "memory" if moved > seconds / 2 else "compute")

    def _dtype(self, dtype: torch.dtype) -> str:
        name = NAMES.get(dtype, "fp32")
        return name if name in self.measurement.dtypes else self.measurement.dtypes[0]

    def _attention_rate(self, operation: Operation, dtype: str) -> float:
        """FLOP/s of the measured length nearest to this one; backward from the difference of the two measured directions."""
        *_, queries, width = max(operation.shapes, key=len)
        measured = [one for one in self.measurement.attention if one.dtype == dtype] or list(
            self.measurement.attention
        )

        def away(length: int, head_dim: int) -> float:
            return abs(math.log(length / max(1, queries))) + abs(math.log(head_dim / max(1, width)))

        if not measured:
            return self.measurement.ceiling(dtype)
        nearest = min(measured, key=lambda one: away(one.length, one.head_dim))
        same = {
            one.direction: one
            for one in measured
            if (one.length, one.head_dim, one.heads) == (nearest.length, nearest.head_dim, nearest.heads)
        }
        forward = same["forward"]
        work = 4 * forward.heads * forward.length**2 * forward.head_dim
        if "backward" not in operation.name or "forward+backward" not in same:
            return work / forward.seconds
        return 2.5 * work / max(same["forward+backward"].seconds - forward.seconds, 0.5 * forward.seconds)

    def _rate(self, kind: str, dtype: str, size: float) -> float:
        """Bytes/s of a pass over tensors of this size, log-linear between the measured ones."""
        points = sorted(
            (one.tensor_bytes, one.bytes_per_second)
            for one in self.measurement.elementwise
            if one.operation == kind and one.dtype == dtype
        ) or sorted((one.tensor_bytes, one.bytes_per_second) for one in self.measurement.elementwise)
        if not points:
            return self.measurement.bandwidth
        logs = [(math.log(size), math.log(rate)) for size, rate in points]
        return math.exp(between(logs, math.log(max(size, 1))))


def _kind(name: str) -> str:
    """Which of the measured passes an operation resembles most."""
    if "softmax" in name:
        return "softmax"
    if "norm" in name and "foreach" not in name:
        return "layer_norm"
    return "silu" if any(part in name for part in _EXPONENTIALS) else "add"


def stretches(trace: Trace) -> Iterator[list[Operation]]:
    """Operations in order, products and attention each alone, all others in the stretches between them."""
    stretch: list[Operation] = []
    for operation in trace.operations:
        alone = bool(operation.flops) or product_shape(operation) is not None
        if stretch and (alone or operation.phase != stretch[-1].phase):
            yield stretch
            stretch = []
        if alone:
            yield [operation]
        else:
            stretch.append(operation)
    if stretch:
        yield stretch


def moved_by(stretch: Sequence[Operation], trace: Trace, last: int) -> int:
    """Bytes that one pass for all of `stretch` has to read and write; `last` is the number of its last operation."""
    made = {number for operation in stretch for number in operation.outputs}
    first = last - len(stretch) + 1
    read = {number for operation in stretch for number in operation.inputs}
    outside = sum(trace.storages[n].size for n in read if trace.storages[n].born < first)
    lasting = 0
    for number in made:
        storage = trace.storages[number]
        if storage.died is None or storage.died > last + 1:
            lasting += storage.size
    return outside + lasting


def cost_by_phase(trace: Trace, machine: Machine, compiled: bool) -> tuple[dict[str, float], dict[str, int]]:
    """Of forward, backward and optimizer the seconds that their operations take one by one, and how many calls they are."""
    found = {"forward": 0.0, "backward": 0.0, "optimizer": 0.0}
    calls = dict.fromkeys(found, 0)
    at = -1
    for stretch in stretches(trace):
        at += len(stretch)
        phase = stretch[0].phase
        fused = compiled and phase != "optimizer" and len(stretch) > 1
        if fused:
            found[phase] += machine.of_pass(moved_by(stretch, trace, at), len(stretch)).seconds
            calls[phase] += 1
        else:
            found[phase] += sum(machine.of(operation).seconds for operation in stretch)
            calls[phase] += len(stretch)
    return found, calls


def no_less_than_calls(seconds: dict[str, float], calls: dict[str, int], machine: Machine) -> dict[str, float]:
    """Seconds of each phase: of its operations, or of handing them all to the device, if that takes longer."""
    return {phase: max(own, machine.of_calls(calls[phase])) for phase, own in seconds.items()}


def seconds_by_phase(trace: Trace, machine: Machine, compiled: bool) -> dict[str, float]:
    """Forward, backward and optimizer, in seconds."""
    return no_less_than_calls(*cost_by_phase(trace, machine, compiled), machine)
