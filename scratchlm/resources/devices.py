"""Devices as data: what a processor can do at most, where each figure is from, and which one this machine has.

The figures of :func:`known` devices are their makers' (``devices.toml`` beside this file); those of :func:`this_machine` are
measured, where ``scratchlm resources measure`` has been run.
"""

from __future__ import annotations

import functools
import math
import os
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from scratchlm.errors import UserError
from scratchlm.machine import main_memory
from scratchlm.section import Section, nearest_name, validate

if TYPE_CHECKING:
    import torch

DTYPES = ("fp32", "tf32", "bf16", "fp16", "fp8", "int8")
FIGURES = ("memory_bytes", "memory_bandwidth", "interconnect", "tdp_watts", "price_per_hour")
MEASURE = "run `scratchlm resources measure`"

_FILE = Path(__file__).with_name("devices.toml")
_MAKERS = re.compile(r"^(nvidia|amd|apple|google|tesla|geforce|instinct)\s+", re.IGNORECASE)
_MEMORY_TOLERANCE = 0.1
"""Printed gigabytes are some 6 % less than reported ones; a slice of a device (MIG) has far less memory than the device."""


class Device(Section):
    """One device, or the machine at hand. What is not known is None, and a dtype without a figure is missing."""

    name: str = Field(description="What it is called by, such as h100-sxm.")
    title: str = Field(description="What its maker calls it.")
    kind: Literal["cuda", "mps", "tpu", "rocm", "cpu"] = Field(description="What drives it.")
    aliases: tuple[str, ...] = Field(default=(), description="Further names.")
    reported: tuple[str, ...] = Field(
        default=(), description="What its driver or system calls it, without the maker's name."
    )
    peak_flops: dict[Literal["fp32", "tf32", "bf16", "fp16", "fp8", "int8"], float] = Field(
        default={}, description="FLOP/s of dense matrix products per dtype (integer op/s for int8)."
    )
    memory_bytes: float | None = Field(default=None, gt=0, description="Its memory.")
    memory_bandwidth: float | None = Field(default=None, gt=0, description="Bytes/s of that memory.")
    interconnect: float | None = Field(default=None, gt=0, description="Bytes/s to its neighbours, one direction.")
    interconnect_name: str | None = Field(default=None, description="What connects it to them.")
    tdp_watts: float | None = Field(default=None, gt=0, description="Power it is cooled for.")
    price_per_hour: float | None = Field(default=None, ge=0, description="USD per hour: an assumption, dated.")
    price_date: str | None = Field(default=None, description="Year and month of that price.")
    cores: int | None = Field(default=None, ge=1, description="Logical cores of a CPU that this process may use.")
    measured: str | None = Field(
        default=None, description="When its peaks and bandwidth were measured; None: printed."
    )
    sources: dict[str, str] = Field(
        default={}, description="Figure (peak_flops.bf16, memory_bytes, …) → its origin."
    )

    def peak(self, dtype: str) -> float:
        """FLOP/s of dense matrix products in `dtype`.

        Raises:
            UserError: nobody knows it.
        """
        for known_dtype, figure in self.peak_flops.items():
            if known_dtype == dtype:
                return figure
        if dtype not in DTYPES:
            raise UserError(f"dtype {dtype!r} is unknown{nearest_name(dtype, DTYPES)}; one of {', '.join(DTYPES)}")
        there = f" (known: {', '.join(self.peak_flops)})" if self.peak_flops else ""
        advice = MEASURE if self.kind in ("cpu", "mps", "cuda", "rocm") else "give it in a file of devices"
        raise UserError(f"the peak of {self.title} in {dtype} is unknown{there}; {advice}")


def load_devices(path: str | os.PathLike[str]) -> dict[str, Device]:
    """The devices of a file that is written like ``devices.toml``: figures as ``[value, "source"]``.

    Raises:
        UserError: the file cannot be read, or a figure has no source or an impossible value.
    """
    path = Path(path)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the file of devices {path}: {error.strerror}") from error
    except ValueError as error:  # also what is no UTF-8
        raise UserError(f"file of devices {path} is not valid TOML: {error}") from error
    documents = tables.pop("documents", {})
    if not isinstance(documents, dict) or not all(isinstance(name, str) for name in documents.values()):
        raise UserError(
            f'{path}: documents is a table of names, such as datasheet = "NVIDIA, A100 datasheet, 2021"'
        )
    return {name: _device(name, table, documents, f"{path}: {name}") for name, table in tables.items()}


def _device(name: str, table: Any, documents: dict[str, str], where: str) -> Device:
    if not isinstance(table, dict):
        raise UserError(f"{where}: a device is a table, [{name}] with title, kind and figures")
    values: dict[str, Any] = {**table, "name": name}
    sources: dict[str, str] = {}
    peaks = values.get("peak_flops", {})
    if not isinstance(peaks, dict):
        raise UserError(f'{where}: peak_flops is a table of dtypes, such as bf16 = [312e12, "datasheet"]')
    values["peak_flops"] = {
        dtype: _figure(pair, f"peak_flops.{dtype}", documents, sources, where) for dtype, pair in peaks.items()
    }
    for figure in FIGURES:
        if figure in values:
            values[figure] = _figure(values[figure], figure, documents, sources, where)
    return validate(Device, values | {"sources": sources}, where)


def _figure(pair: Any, figure: str, documents: dict[str, str], sources: dict[str, str], where: str) -> float:
    """Take a figure's value, and write its source into `sources`."""
    match pair:
        case [int() | float() as value, str() as source] if not isinstance(value, bool) and source.strip():
            document, colon, detail = source.partition(":")
            if document in documents:
                source = documents[document] + (f",{detail}" if colon else "")
            if not (math.isfinite(value) and value >= 0) or (value == 0 and figure != "price_per_hour"):
                raise UserError(f"{where}: {figure} = {value} is no such figure; leave out what is unknown")
            sources[figure] = source
            return float(value)
    raise UserError(f'{where}: {figure} = {pair!r}: write [value, "source"], as in [312e12, "datasheet"]')


@functools.cache
def _built_in() -> dict[str, Device]:
    return load_devices(_FILE)


def known(path: str | os.PathLike[str] | None = None) -> dict[str, Device]:
    """All devices by name.

    Args:
        path: a file of one's own, whose devices come on top (and replace those of the same name).

    Raises:
        UserError: as :func:`load_devices`.
    """
    return dict(_built_in()) | (load_devices(path) if path is not None else {})


def find(name: str, path: str | os.PathLike[str] | None = None) -> Device:
    """A device by its name or an alias, in any case, with or without its maker's name: ``h100``, ``NVIDIA H100 SXM``.

    Args:
        name: the name.
        path: see :func:`known`.

    Raises:
        UserError: there is no such device; the nearest name is given.
    """
    devices = known(path)
    names = {alias: device for device in devices.values() for alias in map(_plain, device.aliases)}
    names |= {_plain(device.title): device for device in devices.values()}
    names |= {_plain(key): device for key, device in devices.items()}
    if found := names.get(_plain(name)):
        return found
    raise UserError(
        f"device {name[:60]!r} is unknown{nearest_name(_plain(name), names)}; "
        "`scratchlm resources devices` lists them all, and a file of your own may add more"
    )


def _plain(name: str) -> str:
    """A name without its maker, in lower case, words joined by hyphens."""
    words = re.sub(r"[\s_-]+", " ", name).strip()
    while (shorter := _MAKERS.sub("", words)) != words:
        words = shorter
    return words.lower().replace(" ", "-")


def match(reported: str, memory_bytes: float | None) -> Device | None:
    """The known device that calls itself `reported` and has about that much memory; None where that is not certain.

    Args:
        reported: as torch or the system says it, such as ``NVIDIA H100 80GB HBM3``.
        memory_bytes: its memory; None where it varies, as on Apple's chips.
    """
    for device in known().values():
        if _plain(reported) not in map(_plain, device.reported):
            continue
        printed = device.memory_bytes
        if memory_bytes is None or printed is None or abs(memory_bytes / printed - 1) < _MEMORY_TOLERANCE:
            return device
    return None


def this_machine(device: torch.device | None = None, path: str | os.PathLike[str] | None = None) -> Device:
    """The device one sits at: as measured if it was, else what its system says, and its maker where it is a known one.

    Args:
        device: None: the one that training would take, ``cuda``, then ``mps``, then ``cpu``.
        path: a stored measurement; None: the one in the user's folder, where it is of this very machine and device.

    Raises:
        UserError: `path` is missing or is no measurement, or the stored one is damaged.
    """
    from scratchlm.resources.measurement import default_path, load_measurement, machine_title
    from scratchlm.train.precision import choose_device

    device = device or choose_device("auto")
    found = _asked(device)
    if path is None and not default_path().exists():
        return found
    measurement = load_measurement(path)
    if path is None and (measurement.device, measurement.machine) != (device.type, machine_title(device)):
        return found  # a home folder that several machines share, or another device of this one
    return measurement.to_device(found)


def _asked(device: torch.device) -> Device:
    """What the system says of `device`."""
    from scratchlm.processes import cores
    from scratchlm.resources.measurement import machine_title

    title = machine_title(device)
    memory = device_memory(device)
    asked = "reported by the system"
    if device.type == "cpu":
        facts: dict[str, Any] = {"name": "cpu", "title": title, "kind": "cpu", "cores": cores()}
    elif maker := match(title, None if device.type == "mps" else memory):
        facts = dict(maker)
    else:
        import torch

        kind = "rocm" if device.type == "cuda" and torch.version.hip else device.type
        facts = {"name": _plain(title), "title": title, "kind": kind}
    if memory is not None:
        facts["memory_bytes"] = memory
        facts["sources"] = {**facts.get("sources", {}), "memory_bytes": asked}
    return Device(**facts)


def device_memory(device: torch.device) -> float | None:
    """Bytes of memory of `device`: of a CPU what this process may have, also in a container; None where unknown."""
    if device.type == "cuda":
        import torch

        return float(torch.cuda.get_device_properties(device).total_memory)
    return main_memory()


def cache_sizes(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> dict[str, int] | None:
    """Bytes of the caches that the first core sees: ``{"L1d": …, "L2": …, "L3": …}``; None where the system does not tell."""
    found: dict[str, int] = {}
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    for index in sorted(folder.glob("index*")):
        try:
            level, kind, size = (
                (index / name).read_text(encoding="ascii").strip() for name in ("level", "type", "size")
            )
            if kind == "Instruction":
                continue
            unit = units.get(size[-1:].upper())
            found[f"L{level}" + ("d" if kind == "Data" else "")] = int(size[:-1]) * unit if unit else int(size)
        except (OSError, ValueError):
            continue
    return found or None
