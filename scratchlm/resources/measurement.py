"""What :mod:`scratchlm.resources.measure` found out about a machine: kept as JSON, asked for peaks and for times.

A :class:`Measurement` answers two questions: how fast this machine can be at all (:meth:`Measurement.ceiling`), and how long one
matrix product of a given shape takes (:meth:`Measurement.seconds_of_product`).
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from scratchlm.errors import UserError
from scratchlm.files import read_json, write_bytes, write_json
from scratchlm.machine import cache_folder
from scratchlm.resources.devices import MEASURE, Device
from scratchlm.section import Section, validate

if TYPE_CHECKING:
    import torch

FORMAT = 1
"""Raised when a change of the fields makes stored measurements unreadable."""

NEIGHBOURS = 8
"""How many measured shapes have a say in the time of another one."""

BYTES = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2}

Dtype = Literal["fp32", "tf32", "bf16", "fp16"]


class Timing(Section):
    """Seconds of one call: the median over rounds, and how far they lie apart."""

    seconds: float = Field(gt=0, description="Median over the rounds.")
    spread: float = Field(ge=0, description="Interquartile range over the rounds, as a part of the median.")
    rounds: int = Field(ge=1, description="How many rounds were timed.")


class Product(Timing):
    """(m, k) times (k, n), the weight stored as (n, k)."""

    m: int = Field(ge=1)
    n: int = Field(ge=1)
    k: int = Field(ge=1)
    dtype: Dtype
    routine: Literal["torch", "onednn"] = Field(
        description="torch: F.linear, as in training; onednn: what reading and writing text takes on AMD's processors."
    )

    @property
    def flops_per_second(self) -> float:
        return 2 * self.m * self.n * self.k / self.seconds


class Transfer(Timing):
    """Memory read, or read and written, again and again within `working_set` bytes."""

    operation: Literal["read", "copy"]
    working_set: int = Field(ge=1, description="Bytes touched: of a copy, source and destination together.")
    moved: int = Field(ge=1, description="Bytes read plus bytes written in one call.")

    @property
    def bytes_per_second(self) -> float:
        return self.moved / self.seconds


class Elementwise(Timing):
    """A pass over tensors of `tensor_bytes` each."""

    operation: Literal["add", "exp", "silu", "softmax", "layer_norm"]
    dtype: Dtype
    tensor_bytes: int = Field(ge=1)
    moved: int = Field(ge=1, description="Bytes of all inputs and of the output, each once.")

    @property
    def bytes_per_second(self) -> float:
        return self.moved / self.seconds


class Attention(Timing):
    """Causal scaled dot-product attention. FLOPs count all length² scores, as everywhere here: no discount for the causal half."""

    length: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    heads: int = Field(ge=1, description="Over the whole batch.")
    dtype: Dtype
    direction: Literal["forward", "forward+backward"]

    @property
    def flops_per_second(self) -> float:
        forward = 4 * self.heads * self.length**2 * self.head_dim
        return forward * (1 if self.direction == "forward" else 3) / self.seconds


class Measurement(Section):
    """All that was measured on one machine in one go."""

    format: Literal[1] = 1
    machine: str = Field(description="The device's own name.")
    device: Literal["cpu", "cuda", "mps"]
    date: str = Field(description="When, in UTC.")
    quick: bool = Field(description="Few shapes and rounds: good for a first look.")
    seconds: float = Field(gt=0, description="How long all of it took.")
    threads: int = Field(ge=1, description="Torch's threads.")
    memory_bytes: float | None = Field(description="Of the device.")
    caches: dict[str, int] | None = Field(description="L1d, L2, L3 → bytes of one, where the system tells.")
    call_seconds: float = Field(
        gt=0, description="Time of an operation that has nothing to do, called from Python."
    )
    products: tuple[Product, ...]
    transfers: tuple[Transfer, ...]
    elementwise: tuple[Elementwise, ...]
    attention: tuple[Attention, ...]
    environment: dict[str, Any]

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Those that products were measured in, in order."""
        return tuple(dict.fromkeys(product.dtype for product in self.products))

    def best_product(self, dtype: str) -> Product:
        """The product with the best median.

        Raises:
            UserError: `dtype` was not measured.
        """
        measured = [product for product in self.products if product.dtype == dtype]
        if not measured:
            raise UserError(
                f"products in {dtype} were not measured on {self.machine} (but {', '.join(self.dtypes)}); {MEASURE}"
            )
        return max(measured, key=lambda product: product.flops_per_second)

    def ceiling(self, dtype: str) -> float:
        """The most FLOP/s that any matrix product reached; errors as :meth:`best_product`."""
        return self.best_product(dtype).flops_per_second

    @property
    def bandwidth(self) -> float:
        """Bytes/s of the memory itself: the better of reading and copying, over the largest working set."""
        largest = max(transfer.working_set for transfer in self.transfers)
        return max(transfer.bytes_per_second for transfer in self.transfers if transfer.working_set == largest)

    def bandwidth_within(self, working_set: float) -> float:
        """Bytes/s of copies within so many bytes, log-linear between those measured, constant beyond them."""
        copies = sorted(
            (transfer.working_set, transfer.bytes_per_second)
            for transfer in self.transfers
            if transfer.operation == "copy"
        )
        points = [(math.log(size), math.log(rate)) for size, rate in copies]
        return math.exp(between(points, math.log(working_set)))

    def seconds_of_product(
        self, m: int, n: int, k: int, dtype: str, routine: Literal["torch", "onednn"] = "torch"
    ) -> float:
        """How long (m, k) times (k, n) takes on this machine, from the measured shapes nearest to it.

        A first guess, t₀ = 2mnk / ceiling + bytes / bandwidth + the call itself, holds for any shape. By how much it is wrong is
        known at the measured shapes, and is interpolated: log(t / t₀) = Σ wᵢ log(tᵢ / t₀ᵢ) / Σ wᵢ over the nearest shapes, with
        wᵢ = 1 / dᵢ² for the distance d in log m, log n, log k. A measured shape gets its measured time.

        Args:
            m: rows, such as tokens of a batch.
            n: width of the result.
            k: width of the input.
            dtype: a measured one.
            routine: which of the machine's routines; torch's own is the one training takes.

        Raises:
            UserError: nothing was measured in `dtype` by `routine`, or a size is not positive.
        """
        if min(m, n, k) < 1:
            raise UserError(f"a product of {m} × {k} by {k} × {n} is none: sizes are at least 1")
        shapes = [product for product in self.products if (product.dtype, product.routine) == (dtype, routine)]
        if not shapes:
            raise UserError(f"no product in {dtype} by {routine} was measured on {self.machine}; {MEASURE}")
        ceiling = max(product.flops_per_second for product in shapes)
        guess = self._guess(m, n, k, dtype, ceiling)
        near = sorted((_distance((m, n, k), (p.m, p.n, p.k)), index) for index, p in enumerate(shapes))[:NEIGHBOURS]
        total = weights = 0.0
        for squared, index in near:
            product = shapes[index]
            if squared == 0.0:
                return product.seconds
            error = math.log(product.seconds / self._guess(product.m, product.n, product.k, dtype, ceiling))
            total += error / squared
            weights += 1 / squared
        return guess * math.exp(total / weights)

    def _guess(self, m: int, n: int, k: int, dtype: str, ceiling: float) -> float:
        touched = BYTES[dtype] * (m * k + k * n + m * n)
        return 2 * m * n * k / ceiling + touched / self.bandwidth_within(touched) + self.call_seconds

    def to_device(self, asked: Device) -> Device:
        """`asked` with the measured peaks, memory and bandwidth in the place of its maker's."""
        origin = f"measured {self.date[:10]} on {self.machine}, {self.threads} threads"
        if self.device != "cpu":
            origin = f"measured {self.date[:10]} on {self.machine}"
        peaks = {dtype: self.ceiling(dtype) for dtype in self.dtypes}
        sources = {key: text for key, text in asked.sources.items() if not key.startswith("peak_flops.")}
        sources |= {f"peak_flops.{dtype}": origin for dtype in peaks} | {"memory_bandwidth": origin}
        values = dict(asked) | {
            "title": self.machine,
            "peak_flops": peaks,
            "memory_bandwidth": self.bandwidth,
            "measured": self.date,
            "sources": sources,
        }
        return Device(**values)


def _distance(one: Sequence[int], other: Sequence[int]) -> float:
    """Squared distance of two shapes in logarithms."""
    return sum(math.log(a / b) ** 2 for a, b in zip(one, other, strict=True))


def between(points: Sequence[tuple[float, float]], x: float) -> float:
    """The line through `points` (sorted) at `x`; constant outside of them."""
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[-1][1]


def machine_title(device: torch.device) -> str:
    """What the device calls itself."""
    import torch

    from scratchlm.evaluate.environment import cpu_name

    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def default_path() -> Path:
    """Where a user's measurement lies: ``~/.cache/scratchlm/device.json``, or under ``$XDG_CACHE_HOME``."""
    return cache_folder() / "device.json"


def load_measurement(path: str | os.PathLike[str] | None = None) -> Measurement:
    """A stored measurement.

    Args:
        path: the file; None: :func:`default_path`.

    Raises:
        UserError: it is missing, cut off, of another kind or of another version.
    """
    path = Path(path) if path is not None else default_path()
    if not path.exists():
        raise UserError(f"there is no measurement {path}; {MEASURE}")
    values = read_json(path, "measurement")
    if not isinstance(values, dict) or "products" not in values:
        raise UserError(f"measurement {path} is of another kind; name the right file, or {MEASURE}")
    if values.get("format") != FORMAT:
        raise UserError(f"measurement {path} is of another version of scratchlm; {MEASURE} again")
    found = validate(Measurement, values, f"measurement {path}")
    if not found.products or not any(transfer.operation == "copy" for transfer in found.transfers):
        raise UserError(f"measurement {path} is empty; {MEASURE} again")
    return found


def refuse_other_file(path: Path) -> None:
    """Before minutes are spent: what lies at `path` may be replaced.

    Raises:
        UserError: a file is there that is no measurement.
    """
    if not path.exists():
        return
    try:
        load_measurement(path)
    except UserError as error:
        raise UserError(
            f"{path} is there and is no measurement that can be read ({error}); move it away"
        ) from error


def store(measurement: Measurement, path: Path) -> Path | None:
    """Write `measurement` to `path`; what was there is kept beside it.

    Returns:
        Where the former one is kept, ``<path>.previous``; None if there was none.
    """
    previous = None
    if path.exists():
        previous = path.with_name(f"{path.name}.previous")
        write_bytes(previous, path.read_bytes())
    write_json(path, measurement.model_dump(mode="json"))
    return previous
