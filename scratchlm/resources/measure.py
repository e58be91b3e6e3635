"""Measure the machine one sits at: what its matrix products, its memory and its calls really give.

All of it in plain torch. Everything is timed in rounds: each round times every task once, so that a busy minute falls on all tasks
and not on one; the median over the rounds counts, and their interquartile range is kept beside it. A task is repeated within a
timing until that takes a few milliseconds, and a device that computes behind the caller's back is waited for.
A training step finds few of its operands in a cache: between two looks at one, a whole pass over the model has gone by. So products and
elementwise passes take the next piece of a large buffer at every call, and what they make is kept for as long (:class:`_Cold`).
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from scratchlm.errors import UserError
from scratchlm.evaluate.environment import describe_environment
from scratchlm.kernels import flash_attention_cpp, flash_attention_op
from scratchlm.kernels.attention import PLAIN
from scratchlm.kernels.hardware import onednn_beats_mkl
from scratchlm.progress import progress
from scratchlm.resources.devices import cache_sizes, device_memory
from scratchlm.resources.measurement import (
    BYTES,
    Attention,
    Elementwise,
    Measurement,
    Product,
    Timing,
    Transfer,
    default_path,
    load_measurement,
    machine_title,
    store,
)
from scratchlm.section import nearest_name

__all__ = ["FULL", "QUICK", "Measurement", "Plan", "default_path", "load_measurement", "measure", "store"]

TORCH_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Plan:
    """What is measured, and for how long.

    Attributes:
        shapes: (m, n, k) of the matrix products.
        working_sets: bytes that are read and copied.
        tensor_bytes: sizes of the tensors of elementwise passes.
        lengths: of attention.
        tokens: of attention's batch: length · sequences.
        head_dims: widths of attention's heads, of which there are as many as make the same model's width.
        rounds: how often everything is timed.
        seconds: a phase (there are four) ends after so long, though not before its third round.
        slowest: a product that would take longer than so many seconds is left out.
        shortest: a timing is made of repeated calls until it takes so many seconds.
        quick: kept in the result.
        cold: so many bytes go by before an operand is used again: more than the caches hold.
    """

    shapes: tuple[Shape, ...]
    working_sets: tuple[int, ...]
    tensor_bytes: tuple[int, ...]
    lengths: tuple[int, ...]
    tokens: int
    rounds: int
    seconds: float
    slowest: float
    shortest: float
    quick: bool = False
    head_dims: tuple[int, ...] = (64,)
    cold: int = 2**27

    def on_a_gpu(self) -> Plan:
        """The same with batches that fill a GPU: else its products and its attention are timed while most of it has nothing to do."""
        rows = 2**15
        large = [(rows, n, k) for n in (1024, 4096) for k in (1024, 4096)]
        gradients = [(n, k, rows) for n in (1024, 4096) for k in (1024, 4096)]
        return replace(
            self,
            shapes=tuple(dict.fromkeys([*self.shapes, *large, *gradients])),
            tensor_bytes=(*self.tensor_bytes, 2**28),
            tokens=32 * self.tokens,
            lengths=(*self.lengths, 8192),
            cold=max(self.cold, 2**29),
        )


def _shapes(squares: Sequence[int], rows: Sequence[int], widths: Sequence[int]) -> tuple[Shape, ...]:
    """Squares, and rows of tokens times a layer of every pair of widths."""
    return tuple(
        dict.fromkeys(
            [(size, size, size) for size in squares] + [(m, n, k) for m in rows for n in widths for k in widths]
        )
    )


FULL = Plan(
    shapes=_shapes((128, 256, 512, 1024, 2048, 4096, 8192, 16384), (512, 2048, 8192), (128, 512, 1024, 4096)),
    working_sets=tuple(2**15 * 4**step for step in range(8)),  # 32 KiB … 512 MiB
    tensor_bytes=(2**17, 2**20, 2**23, 2**26),
    lengths=(128, 256, 512, 1024, 2048),
    tokens=2048,
    rounds=7,
    seconds=30.0,
    slowest=0.25,
    shortest=0.004,
    head_dims=(32, 64, 128),
)
QUICK = Plan(
    shapes=_shapes((256, 1024, 2048, 4096, 8192), (512, 2048), (128, 512, 2048)),
    working_sets=(2**15, 2**20, 2**25, 2**28),
    tensor_bytes=(2**20, 2**24),
    lengths=(128, 1024),
    tokens=1024,
    rounds=3,
    seconds=4.0,
    slowest=0.1,
    shortest=0.002,
    quick=True,
)


@dataclass
class _Task:
    """One thing to time; `facts` are what the result says of it."""

    run: Callable[[], Any]
    facts: dict[str, Any]
    precision: str = "highest"
    repeats: int = 1
    timings: list[float] = field(default_factory=list)


class _Cold:
    """Operands and results that are in no cache.

    ::

        buffer    │ x₀ │ x₁ │ x₂ │ …    each call takes the next piece, and comes back to the first when all caches have forgotten it
        results   │ y₀ │ y₁ │ y₂ │ …    kept as long, so that the allocator does not hand out the memory that was just written
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._results: deque[Tensor] = deque()
        self._held = 0

    def pieces(self, buffer: Tensor, *shape: int) -> Iterator[Tensor]:
        """Tensors of `shape` cut from `buffer`, without end."""
        numbers = math.prod(shape)
        whole = min(buffer.numel(), max(numbers, self.size // buffer.element_size()))
        starts = range(0, whole - numbers + 1, numbers)
        return itertools.cycle([buffer[start : start + numbers].view(shape) for start in starts])

    def keep(self, result: Tensor) -> None:
        """Hold on to `result` until as many bytes have followed it."""
        self._results.append(result)
        self._held += result.nbytes
        while self._held > self.size:
            self._held -= self._results.popleft().nbytes

    def clear(self) -> None:
        """Give everything back."""
        self._results.clear()
        self._held = 0


class _Bench:
    """Times tasks on a device in interleaved rounds."""

    def __init__(self, device: torch.device, plan: Plan, show: bool) -> None:
        self.device, self.plan, self.show = device, plan, show
        self.cold = _Cold(plan.cold)

    def wait(self) -> None:
        """Until the device has done all it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def time(self, task: _Task) -> float:
        """Seconds of one call."""
        torch.set_float32_matmul_precision(task.precision)
        self.wait()
        start = time.perf_counter()
        for _ in range(task.repeats):
            task.run()
        self.wait()
        return (time.perf_counter() - start) / task.repeats

    def warm_up(self, task: _Task) -> float:
        """A first call for what is done only once, then as many as make a timing long enough to be trusted."""
        self.time(task)
        task.repeats = 1
        once = self.time(task)
        while once * task.repeats < self.plan.shortest:
            task.repeats = max(task.repeats * 2, min(math.ceil(self.plan.shortest / once), task.repeats * 16))
            once = self.time(task)
        return once

    def rounds(self, tasks: Sequence[_Task], description: str) -> None:
        """Time every task once per round, until the plan's rounds are done or the phase's time is up."""
        deadline = time.perf_counter() + self.plan.seconds
        with progress(
            description=description, total=self.plan.rounds * len(tasks), show=self.show, leave=False
        ) as bar:
            for number in range(self.plan.rounds):
                if number >= min(3, self.plan.rounds) and time.perf_counter() > deadline:
                    break
                for task in tasks:
                    task.timings.append(self.time(task))
                    bar.update()


Result = TypeVar("Result", bound=Timing)


def _results(kind: type[Result], tasks: Sequence[_Task]) -> tuple[Result, ...]:
    return tuple(kind(**_summary(task.timings), **task.facts) for task in tasks)


def _summary(timings: Sequence[float]) -> dict[str, Any]:
    """Median, interquartile range over the median, and their number."""
    median = statistics.median(timings)
    if len(timings) < 2:
        return {"seconds": median, "spread": 0.0, "rounds": len(timings)}
    quarters = statistics.quantiles(timings, n=4, method="inclusive")
    return {"seconds": median, "spread": (quarters[2] - quarters[0]) / median, "rounds": len(timings)}


def default_dtypes(device: torch.device) -> tuple[str, ...]:
    """What training may compute in on `device`, as far as torch multiplies it there."""
    if device.type != "cuda":
        return ("fp32", "bf16") if device.type == "cpu" else ("fp32", "fp16")
    modern = torch.cuda.is_bf16_supported(including_emulation=False)
    return ("fp32", "tf32", "bf16", "fp16") if modern else ("fp32", "fp16")


@contextlib.contextmanager
def _precision_restored() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def measure(
    device: torch.device | None = None,
    dtypes: Sequence[str] | None = None,
    plan: Plan = FULL,
    *,
    show: bool = False,
) -> Measurement:
    """Measure `device`, or the one training would take.

    Args:
        device: ``cpu``, ``cuda`` or ``mps``; None: the best there is.
        dtypes: of products, elementwise passes and attention, out of fp32, tf32 (CUDA), bf16, fp16; None: those that training may
            use on the device. fp8 and int8 have no product in torch's public functions.
        plan: :data:`FULL` takes about a minute on two cores, :data:`QUICK` some seconds. On CUDA with larger batches (:meth:`Plan.on_a_gpu`).
        show: whether a progress bar is shown.

    Raises:
        UserError: the device is not there, or a dtype is not measured on it.
    """
    from scratchlm.train.precision import choose_device

    device = device or choose_device("auto")
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device {device} cannot be measured; name cpu, cuda or mps")
    dtypes = tuple(dict.fromkeys(dtypes or default_dtypes(device)))
    for dtype in dtypes:
        if dtype not in TORCH_DTYPES:
            hint = nearest_name(dtype, TORCH_DTYPES)
            raise UserError(f"dtype {dtype!r} cannot be measured{hint}; name some of {', '.join(TORCH_DTYPES)}")
        if dtype == "tf32" and device.type != "cuda":
            raise UserError("tf32 is a way in which NVIDIA's GPUs multiply fp32; leave it out here")
    started = time.perf_counter()
    bench = _Bench(device, plan.on_a_gpu() if device.type == "cuda" else plan, show)
    plain = tuple(dtype for dtype in dtypes if dtype != "tf32")
    with _precision_restored(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        call = _call_seconds(bench)
        products = _products(bench, dtypes)
        transfers = _transfers(bench)
        elementwise = _elementwise(bench, plain or ("fp32",))
        attention = _attention(bench, plain or ("fp32",))
    return Measurement(
        machine=machine_title(device),
        device=device.type,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        quick=plan.quick,
        seconds=time.perf_counter() - started,
        threads=torch.get_num_threads(),
        memory_bytes=device_memory(device),
        caches=cache_sizes() if device.type == "cpu" else None,
        call_seconds=call,
        products=products,
        transfers=transfers,
        elementwise=elementwise,
        attention=attention,
        environment=describe_environment(),
    )


def _call_seconds(bench: _Bench) -> float:
    one = torch.ones(1, device=bench.device)
    task = _Task(lambda: one.add_(1), {})
    bench.warm_up(task)
    return statistics.median(bench.time(task) for _ in range(9))


def _random(elements: int, dtype: str, device: torch.device) -> Tensor:
    """N(0, 1) numbers: products of zeros draw less power, and so run faster on some GPUs."""
    return torch.randn(elements, device=device, dtype=torch.float32).to(TORCH_DTYPES[dtype])


def _products(bench: _Bench, dtypes: Sequence[str]) -> tuple[Product, ...]:
    """Every shape in every dtype whose product is not too slow; operands are cut from two common buffers."""
    tasks: list[_Task] = []
    slowest = bench.plan.slowest
    for dtype in dtypes:
        shapes = sorted(bench.plan.shapes, key=math.prod)
        buffer = [_random(bench.plan.cold // BYTES[dtype], dtype, bench.device) for _ in range(2)]
        for routine, product in _routines(bench.device, dtype).items():
            rate = 0.0  # of the product before
            for m, n, k in shapes:
                flops = 2 * m * n * k
                if rate and flops / rate > slowest:
                    break
                if buffer[0].numel() < (needed := max(m * k, n * k)):
                    size = max(needed, 2 * buffer[0].numel())  # the tasks before keep the smaller ones
                    buffer = [_random(size, dtype, bench.device) for _ in range(2)]
                x, weight = bench.cold.pieces(buffer[0], m, k), bench.cold.pieces(buffer[1], n, k)
                task = _Task(
                    lambda x=x, weight=weight, product=product: bench.cold.keep(product(next(x), next(weight))),  # type: ignore[misc]
                    {"m": m, "n": n, "k": k, "dtype": dtype, "routine": routine},
                    precision="high" if dtype == "tf32" else "highest",
                )
                rate = flops / bench.warm_up(task)
                tasks.append(task)
    with torch.no_grad():
        bench.rounds(tasks, "matrix products")
    bench.cold.clear()
    return _results(Product, tasks)


def _routines(device: torch.device, dtype: str) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """F.linear, which training takes, and where it is not the fastest on this processor, what is."""
    routines: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"torch": F.linear}
    if device.type == "cpu" and dtype == "fp32" and onednn_beats_mkl():
        routines["onednn"] = lambda x, weight: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return routines


def _transfers(bench: _Bench) -> tuple[Transfer, ...]:
    tasks = []
    for working_set in bench.plan.working_sets:
        elements = max(working_set // 4, 2)
        data = torch.ones(elements, device=bench.device)
        source, destination = data[: elements // 2], data[elements // 2 : elements // 2 * 2]
        # Small sets are read many times within one call, by a dimension of stride 0: else the call hides the caches.
        passes = max(1, min(2**24 // working_set, 512))
        again = data.expand(passes, elements)
        tasks.append(
            _Task(
                lambda again=again: again.sum(dim=1),  # type: ignore[misc]
                {"operation": "read", "working_set": 4 * elements, "moved": 4 * elements * passes},
            )
        )
        tasks.append(
            _Task(
                lambda source=source, destination=destination: destination.copy_(source),  # type: ignore[misc]
                {"operation": "copy", "working_set": 8 * (elements // 2), "moved": 8 * (elements // 2)},
            )
        )
    for task in tasks:
        bench.warm_up(task)
    bench.rounds(tasks, "memory")
    return _results(Transfer, tasks)


_ROW = 1024  # the width of softmax and layer norm


def _elementwise(bench: _Bench, dtypes: Sequence[str]) -> tuple[Elementwise, ...]:
    operations: dict[str, tuple[int, Callable[[Tensor, Tensor], Tensor]]] = {
        # operation → (tensors read and written, what is called)
        "add": (3, torch.add),
        "exp": (2, lambda x, _: torch.exp(x)),
        "silu": (2, lambda x, _: F.silu(x)),
        "softmax": (2, lambda x, _: F.softmax(x, dim=-1)),
        "layer_norm": (2, lambda x, _: F.layer_norm(x, (x.shape[-1],))),
    }
    tasks = []
    for dtype in dtypes:
        most = max(bench.plan.cold, *bench.plan.tensor_bytes, _ROW * BYTES[dtype]) // BYTES[dtype]
        buffers = [_random(most, dtype, bench.device) for _ in range(2)]
        for size in bench.plan.tensor_bytes:
            rows = max(size // BYTES[dtype] // _ROW, 1)
            actual = rows * _ROW * BYTES[dtype]
            for operation, (tensors, function) in operations.items():
                x, y = (bench.cold.pieces(buffer, rows, _ROW) for buffer in buffers)
                task = _Task(
                    lambda x=x, y=y, function=function: bench.cold.keep(function(next(x), next(y))),  # type: ignore[misc]
                    {"operation": operation, "dtype": dtype, "tensor_bytes": actual, "moved": tensors * actual},
                )
                bench.warm_up(task)
                tasks.append(task)
    with torch.no_grad():
        bench.rounds(tasks, "elementwise")
    bench.cold.clear()
    return _results(Elementwise, tasks)


_WIDTH = 512  # heads · head_dim


def _fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The fused attention that training takes here: ours or torch's."""
    if flash_attention_cpp.is_the_way(q, k, v, None, PLAIN):
        return flash_attention_op.fused_attention(q, k, v, None, PLAIN)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _attention(bench: _Bench, dtypes: Sequence[str]) -> tuple[Attention, ...]:
    tasks = []
    for dtype in dtypes:
        for length, head_dim in itertools.product(bench.plan.lengths, bench.plan.head_dims):
            batch, heads = max(bench.plan.tokens // length, 1), _WIDTH // head_dim
            shape = (batch, heads, length, head_dim)
            *qkv, gradient = (_random(math.prod(shape), dtype, bench.device).view(shape) for _ in range(4))
            trained = [tensor.requires_grad_() for tensor in qkv]

            def forward(trained: list[Tensor] = trained) -> None:
                _fused(*trained)

            def both(trained: list[Tensor] = trained, gradient: Tensor = gradient) -> None:
                torch.autograd.grad(_fused(*trained), trained, gradient)

            for direction, run in (("forward", forward), ("forward+backward", both)):
                facts = {
                    "length": length, "head_dim": head_dim, "heads": batch * heads, "dtype": dtype, "direction": direction,
                }  # fmt: skip
                task = _Task(run, facts)
                bench.warm_up(task)
                tasks.append(task)
    bench.rounds(tasks, "attention")
    return _results(Attention, tasks)
