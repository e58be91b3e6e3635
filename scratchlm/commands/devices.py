"""``scratchlm resources devices | measure``: what devices can do, by their makers and by the clock."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro
from pydantic import Field

from scratchlm.arguments import parse
from scratchlm.commands.shared import say, write
from scratchlm.resources.devices import Device, find, known
from scratchlm.section import Section
from scratchlm.threads import before_torch

if TYPE_CHECKING:
    from rich.table import Table

    from scratchlm.resources.measurement import Measurement


def _take(arguments: list[str], *options: str) -> tuple[list[str], set[str]]:
    """The arguments without `options` (which have no value), and which of these were there."""
    given = {option for option in options if option in arguments}
    return [argument for argument in arguments if argument not in given], given


class DevicesArguments(Section):
    """Known devices: dense peaks, memory, bandwidth and an assumed price. --sources: where each figure is from. --json: all of it."""

    names: tyro.conf.Positional[list[str]] = Field(default=[], description="Only these, by name or alias.")
    file: Path | None = Field(
        default=None, description='Further devices, as [name] tables in TOML with figures as [value, "source"].'
    )


def devices(arguments: list[str]) -> None:
    """``scratchlm resources devices``"""
    rest, given = _take(arguments, "--json", "--sources")
    options = parse(DevicesArguments, rest, prog="scratchlm resources devices [--json] [--sources]")
    every = known(options.file)
    if options.names:
        found = (find(name, options.file) for name in options.names)
        every = {device.name: device for device in found}
    if "--json" in given:
        write(json.dumps({name: device.model_dump(mode="json") for name, device in every.items()}, indent=2) + "\n")
        return
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape

    table = _table(
        ("name", "title"), ("bf16\nTFLOP/s", "fp32\nTFLOP/s", "memory\nGB", "GB/s", "USD/h", "price\nof")
    )
    table.box = SIMPLE_HEAD
    for name, device in every.items():
        table.add_row(
            escape(name),
            escape(device.title),
            _number(device.peak_flops.get("bf16"), 1e12),
            _number(device.peak_flops.get("fp32"), 1e12),
            _number(device.memory_bytes, 1e9),
            _number(device.memory_bandwidth, 1e9),
            "–" if device.price_per_hour is None else f"{device.price_per_hour:.2f}",
            escape(device.price_date or "–"),
        )
    _print(table)
    say("Peaks are of dense matrix products. Prices are assumptions: typical list prices on demand at that date.")
    if "--sources" in given:
        for device in every.values():
            _sources(device)
    else:
        say("--sources says where each figure is from, --json prints them all.")


def _sources(device: Device) -> None:
    if not device.sources:
        return
    say(f"\n{device.name}")
    for figure, source in device.sources.items():
        owner, _, dtype = figure.partition(".")
        value = device.peak(dtype) if owner == "peak_flops" else getattr(device, figure)
        say(f"  {figure:<18} {value:>10.4g}  {source}")


class MeasureArguments(Section):
    """Measure this machine: matrix products, memory, elementwise passes, attention and the time of a call, in about a minute.

    --quick: some seconds, with fewer shapes. --json: print all of it. The result is stored, and other commands take their
    peaks from it; what lay there before is kept beside it as .previous.
    """

    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        default="auto", description="auto: what training would take."
    )
    dtypes: list[Literal["fp32", "tf32", "bf16", "fp16"]] | None = Field(
        default=None, description="Of products and passes; None: those training may use."
    )
    threads: int | None = Field(default=None, ge=1, le=4096, description="CPU threads; None: torch's own choice.")
    out: Path | None = Field(default=None, description="Where to store it; None: in the user's cache folder.")


def measure(arguments: list[str]) -> None:
    """``scratchlm resources measure``"""
    rest, given = _take(arguments, "--quick", "--json")
    options = parse(MeasureArguments, rest, prog="scratchlm resources measure [--quick] [--json]")
    before_torch()
    import torch

    from scratchlm.resources import measure as bench
    from scratchlm.resources.measurement import default_path, load_measurement, refuse_other_file, store
    from scratchlm.train.precision import choose_device

    path = options.out or default_path()
    refuse_other_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)  # before a minute of measuring, not after it
    former = load_measurement(path) if path.exists() else None
    if options.threads:
        torch.set_num_threads(options.threads)
    plan = bench.QUICK if "--quick" in given else bench.FULL
    measured = bench.measure(choose_device(options.device), options.dtypes, plan, show=True)
    previous = store(measured, path)
    if "--json" in given:
        write(measured.model_dump_json(indent=2) + "\n")
        return
    _show(measured)
    say(f"stored in {path}")
    if former is not None:
        whose = "this machine" if former.machine == measured.machine else former.machine
        say(f"the former measurement, of {whose} on {former.date[:10]}, is kept in {previous}")


def _show(measured: Measurement) -> None:
    caches = ", ".join(f"{name} {size // 2**10:,} KiB" for name, size in (measured.caches or {}).items())
    threads = f", {measured.threads} threads" if measured.device == "cpu" else ""
    say(f"{measured.machine}{threads}, in {measured.seconds:.0f} s{f'; caches: {caches}' if caches else ''}")
    table = _table(("matrix products", "best shape m × n × k", "by"), ("FLOP/s", "spread", "shapes"))
    for dtype in measured.dtypes:
        for routine in dict.fromkeys(product.routine for product in measured.products if product.dtype == dtype):
            of = [product for product in measured.products if (product.dtype, product.routine) == (dtype, routine)]
            best = max(of, key=lambda product: product.flops_per_second)
            table.add_row(
                dtype,
                f"{best.m:,} × {best.n:,} × {best.k:,}",
                routine,
                _flops(best.flops_per_second),
                f"{best.spread:.0%}",
                str(len(of)),
            )
    _print(table)
    _print_grid(
        "memory, GB/s",
        [
            (transfer.operation, _bytes(transfer.working_set), transfer.bytes_per_second / 1e9)
            for transfer in measured.transfers
        ],
    )
    _print_grid(
        "elementwise, GB/s",
        [
            (f"{passing.operation} {passing.dtype}", _bytes(passing.tensor_bytes), passing.bytes_per_second / 1e9)
            for passing in measured.elementwise
        ],
    )
    _print_grid(
        "attention of 64 wide, GFLOP/s",
        [
            (f"{attention.direction} {attention.dtype}", f"{attention.length:,}", attention.flops_per_second / 1e9)
            for attention in measured.attention
            if attention.head_dim == 64
        ],
    )
    say(f"an operation with nothing to do takes {measured.call_seconds * 1e6:.2f} µs")
    peaks = ", ".join(f"{dtype} {_flops(measured.ceiling(dtype))}FLOP/s" for dtype in measured.dtypes)
    say(f"peaks: {peaks}; memory {measured.bandwidth / 1e9:,.1f} GB/s")
    worst = max(measured.best_product(dtype).spread for dtype in measured.dtypes)
    if worst > 0.25:
        say(
            f"half of the timings behind a peak lie {worst:.0%} apart: is the machine busy? Measure again when it is idle."
        )


def _print_grid(title: str, cells: Sequence[tuple[str, str, float]]) -> None:
    """(row, column, value) as a table, rows and columns in the order they come in."""
    columns = list(dict.fromkeys(column for _, column, _ in cells))
    values = {(row, column): value for row, column, value in cells}
    table = _table((title,), columns)
    for row in dict.fromkeys(row for row, _, _ in cells):
        found = (values.get((row, column)) for column in columns)
        table.add_row(row, *("–" if value is None else f"{value:,.3g}" for value in found))
    _print(table)


def _bytes(size: int) -> str:
    return f"{size / 2**20:,.3g} MiB" if size >= 2**20 else f"{size / 2**10:,.3g} KiB"


def _flops(rate: float) -> str:
    """412e9 as 412 G."""
    return f"{rate / 1e12:,.4g} T" if rate >= 1e12 else f"{rate / 1e9:,.3g} G"


def _number(value: float | None, unit: float) -> str:
    return "–" if value is None else f"{value / unit:,.4g}"


def _table(left: Sequence[str], right: Sequence[str]) -> Table:
    from rich.table import Table

    table = Table()
    for header in left:
        table.add_column(header, no_wrap=True)
    for header in right:
        table.add_column(header, justify="right", no_wrap=True)
    return table


def _print(table: Table) -> None:
    from rich.console import Console

    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 110).print(table)
