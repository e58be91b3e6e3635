"""Memory over a few steps: what the system says (resident memory, sampled), what torch's allocator says (every
allocation), and on CUDA the allocator's own snapshot.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import platform
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType

from scratchlm.optim.build import Optimizers

_MOST_POINTS = 2000
_COLOURS = {
    "loader": "#8b929a",
    "other": "#c9ced4",
    "forward": "#2f6fb4",
    "backward": "#d1570a",
    "optimizer": "#3d8b57",
}

Curve = list[tuple[float, int]]
"""(seconds since the beginning, bytes)"""


@dataclass
class Span:
    """One phase of one step, and the most memory in it: live tensors, and resident (None: not known)."""

    phase: str
    start: float
    end: float
    live_peak: int | None = None
    resident_peak: int | None = None


@dataclass
class MemoryTimeline:
    """What was held when.

    Attributes:
        device: ``cpu`` or ``cuda``.
        standing: bytes of parameters, of their gradients after a step, of the optimizer's state, of buffers.
        live: bytes of torch's tensors.
        resident: bytes of the process in main memory; empty on CUDA.
        spans: the phases.
    """

    device: str
    standing: dict[str, int]
    live: Curve = field(default_factory=list)
    resident: Curve = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)

    @property
    def peak(self) -> int | None:
        """The most bytes of live tensors."""
        return max((size for _, size in self.live), default=None)

    @property
    def resident_peak(self) -> int | None:
        """The most bytes of the process that were seen in main memory."""
        return max((size for _, size in self.resident), default=None)

    def by_phase(self) -> dict[str, dict[str, int | None]]:
        """Phase → the peaks of its spans."""
        found: dict[str, dict[str, int | None]] = {}
        for span in self.spans:
            peaks = found.setdefault(span.phase, {"live": None, "resident": None})
            for name, value in (("live", span.live_peak), ("resident", span.resident_peak)):
                peaks[name] = _larger(peaks[name], value)
        return found

    def fill_spans(self) -> None:
        """Give the spans the peaks of the curves within them, where they have none yet."""
        for span in self.spans:
            if span.live_peak is None:
                span.live_peak = _peak(self.live, span)
            if span.resident_peak is None:
                span.resident_peak = _peak(self.resident, span)

    def plain(self) -> dict[str, Any]:
        """As plain JSON values; curves of at most 2,000 points, of which none hides a peak."""
        return {
            "device": self.device,
            "standing_bytes": self.standing,
            "peak_live_bytes": self.peak,
            "peak_resident_bytes": self.resident_peak,
            "peak_bytes_by_phase": self.by_phase(),
            "spans": [vars(span) for span in self.spans],
            "live": thin(self.live),
            "resident": thin(self.resident),
        }


def _larger(one: int | None, other: int | None) -> int | None:
    known = [value for value in (one, other) if value is not None]
    return max(known, default=None)


def _peak(curve: Curve, span: Span) -> int | None:
    """The most within the span, the value it begins with included."""
    before = [size for when, size in curve if when <= span.start]
    inside = [size for when, size in curve if span.start < when <= span.end]
    return max([*before[-1:], *inside], default=None)


def thin(curve: Curve, most: int = _MOST_POINTS) -> Curve:
    """The highest point of every n, so that at most `most` remain."""
    step = -(-len(curve) // most) or 1
    return [max(curve[at : at + step], key=lambda point: point[1]) for at in range(0, len(curve), step)]


def standing_bytes(
    model: nn.Module,
    optimizers: Optimizers,
    computing: nn.Module | None = None,
    with_gradients: Iterable[torch.Tensor] | None = None,
) -> dict[str, int]:
    """What stays from step to step, each tensor once: ``parameters``, ``gradients``, ``optimizer``, ``buffers``.

    Args:
        model: what is trained.
        optimizers: its.
        computing: the copy of it that computes, if there is one: its parameters are among the parameters.
        with_gradients: those that have the gradients; None: the model's parameters that are trained.
    """
    if with_gradients is None:
        with_gradients = (p for p in model.parameters() if p.requires_grad)

    def size(tensors: Iterable[torch.Tensor]) -> int:
        return sum({id(t): t.numel() * t.element_size() for t in tensors}.values())

    state = [t for t in optimizers.named_state().values() if t.ndim]
    return {
        "parameters": size([*model.parameters(), *(computing or model).parameters()]),
        "gradients": size(with_gradients),
        "optimizer": size(state),
        "buffers": size(model.buffers()),
    }


# --- the processor's memory ------------------------------------------------------------------------------------------


def resident_bytes() -> int | None:
    """Bytes of this process in main memory, as Linux says; None elsewhere."""
    try:
        pages = int(Path("/proc/self/statm").read_bytes().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def release_free_memory() -> None:
    """Have glibc give all freed memory back, so that what is resident is what is used; nothing elsewhere."""
    if platform.libc_ver()[0] == "glibc":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


class ResidentSampler:
    """Samples resident memory in a thread while a block runs, and at its marks.

    At every mark freed memory is given back to the system first: within a phase the curve never falls, from phase to phase
    it does.

    Args:
        interval: seconds between samples.
        read: bytes now; None: not known here, and the curve stays empty.
        clock: seconds.
    """

    def __init__(
        self,
        interval: float = 0.002,
        read: Callable[[], int | None] = resident_bytes,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.curve: Curve = []
        self.spans: list[Span] = []
        self._interval, self._read, self._clock = interval, read, clock
        self._stop = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> ResidentSampler:
        release_free_memory()
        self.started = self._clock()
        self._sample()
        self._thread = threading.Thread(target=self._work, name="resident memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.mark(None)

    def mark(self, phase: str | None) -> None:
        """The present phase ends here; `phase` begins (None: none does)."""
        self._sample()
        now = self._clock() - self.started
        if self.spans and self.spans[-1].end < 0:
            self.spans[-1].end = now
        release_free_memory()
        if phase is not None:
            self.spans.append(Span(phase, self._clock() - self.started, -1.0))
        self._sample()

    def _sample(self) -> None:
        with self._lock:  # the curve is in the order of time
            size = self._read()
            if size is not None:
                self.curve.append((self._clock() - self.started, size))

    def _work(self) -> None:
        while not self._stop.wait(self._interval):
            self._sample()


def live_curve(changes: Iterable[tuple[float, int]], before: int) -> Curve:
    """Bytes held after every allocation (positive) and release (negative).

    Args:
        changes: (seconds, bytes).
        before: what was held at the beginning.
    """
    held, curve = before, [(0.0, before)]
    for when, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        curve.append((max(0.0, when), held))
    return curve


def on_cpu(step: Callable[[], Any], observers: list[Any], standing: dict[str, int], steps: int) -> MemoryTimeline:
    """Run `step` so often, watching main memory.

    The first one is not shown: gradients are forgotten and made anew in it, so that all is known that is held.

    Args:
        step: one training step; it leaves gradients behind, and forgets them when it begins.
        observers: of the phases; the list is that of :class:`~scratchlm.resources.profile_timing.PhaseClock`.
        standing: :func:`standing_bytes`.
        steps: how many.
    """
    timeline = MemoryTimeline("cpu", standing)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
        with ResidentSampler() as sampler:
            observers.append(sampler.mark)
            try:
                for _ in range(steps):
                    step()
            finally:
                observers.remove(sampler.mark)
    timeline.resident, timeline.spans = sampler.curve, sampler.spans
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    changes = [
        (event.start_ns() / 1e9 - sampler.started, event.nbytes())
        for event in seen.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == DeviceType.CPU
    ]
    held = sum(size for name, size in standing.items() if name != "gradients")
    earlier = sum(size for when, size in changes if when < 0)  # the first step's, above all gradients
    timeline.live = live_curve(((when, size) for when, size in changes if when >= 0), held + earlier)
    timeline.fill_spans()
    return timeline


# --- the memory of a CUDA device -------------------------------------------------------------------------------------


def on_cuda(
    step: Callable[[], Any],
    observers: list[Any],
    standing: dict[str, int],
    steps: int,
    snapshot_path: Path,
    device: torch.device,
) -> MemoryTimeline:
    """Run `step` so often, recording every allocation of the CUDA allocator; its snapshot is pickled.

    Arguments as for :func:`on_cpu`, and:

    Args:
        snapshot_path: for https://pytorch.org/memory_viz.
        device: whose memory.
    """
    timeline = MemoryTimeline("cuda", standing)

    def mark(phase: str | None) -> None:
        now = time.time() - started
        if timeline.spans and timeline.spans[-1].end < 0:
            timeline.spans[-1].end = now
            timeline.spans[-1].live_peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        if phase is not None:
            timeline.spans.append(Span(phase, now, -1.0))

    before = torch.cuda.memory_allocated(device)
    torch.cuda.memory._record_memory_history(max_entries=1_000_000)
    started = time.time()
    observers.append(mark)
    try:
        for _ in range(steps):
            step()
        snapshot = torch.cuda.memory._snapshot(device)
    finally:
        observers.remove(mark)
        torch.cuda.memory._record_memory_history(enabled=None)
    with snapshot_path.open("wb") as file:
        pickle.dump(snapshot, file)
    changes = snapshot_changes(snapshot, torch.cuda.current_device() if device.index is None else device.index)
    timeline.live = live_curve(((when - started, size) for when, size in changes), before)
    return timeline


def snapshot_changes(snapshot: dict[str, Any], device: int) -> list[tuple[float, int]]:
    """(seconds since 1970, bytes) of every allocation and release in a snapshot of the CUDA allocator."""
    sign = {"alloc": 1, "free_completed": -1}
    return [
        (entry["time_us"] / 1e6, sign[entry["action"]] * entry["size"])
        for entry in snapshot["device_traces"][device]
        if entry["action"] in sign
    ]


# --- the picture -----------------------------------------------------------------------------------------------------


def picture(timeline: MemoryTimeline, title: str) -> bytes:
    """A PNG: memory against time, the phases as coloured ground."""
    from matplotlib.figure import Figure  # here, because it takes a second

    from scratchlm.evaluate.plots import png_bytes

    curves = {"live tensors": timeline.live, "resident": timeline.resident}
    curves = {name: curve for name, curve in curves.items() if curve}
    figure = Figure(figsize=(10.0, 2.2 + 2.0 * len(curves)), layout="constrained")
    panels: list[Any] = [*figure.subplots(len(curves), 1, sharex=True, squeeze=False).flat] if curves else []
    for axes, (name, curve) in zip(panels, curves.items(), strict=True):
        named: set[str] = set()
        for span in timeline.spans:
            label = None if span.phase in named else span.phase
            named.add(span.phase)
            colour = _COLOURS.get(span.phase, "#8b929a")
            axes.axvspan(1e3 * span.start, 1e3 * span.end, color=colour, alpha=0.22, linewidth=0, label=label)
        shown = thin(curve)
        times, sizes = [1e3 * when for when, _ in shown], [size / 2**20 for _, size in shown]
        drawn: dict[str, Any] = {"drawstyle": "steps-post"} if name == "live tensors" else {}
        axes.plot(times, sizes, color="#1f2328", linewidth=1.2, **drawn)
        _standing_lines(axes, timeline.standing if name == "live tensors" else {}, max(sizes))
        axes.set_title(
            f"{name}: at most {max(size for _, size in curve) / 2**20:,.1f} MiB", fontsize=10, loc="left"
        )
        axes.set_ylabel("MiB")
        axes.margins(x=0.01)
        axes.set_ylim(top=1.06 * max(sizes))
        axes.spines[["top", "right"]].set_visible(False)
    if curves:
        panels[0].legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=9, frameon=False)
        panels[-1].set_xlabel("milliseconds")
    figure.suptitle(title, fontsize=11)
    return png_bytes(figure)


def _standing_lines(axes: Any, standing: dict[str, int], top: float) -> None:
    """What stays, stacked: lines at parameters, + optimizer, + gradients."""
    height = 0.0
    for name in ("parameters", "optimizer", "gradients"):
        height += standing.get(name, 0) / 2**20
        if standing.get(name) and height <= top:
            axes.axhline(height, color="#8b929a", linestyle=":", linewidth=1.0)
            text = name if name == "parameters" else f"+ {name}"
            axes.annotate(
                text, (1.01, height), xycoords=("axes fraction", "data"), fontsize=8, color="#5b636b", va="center"
            )
