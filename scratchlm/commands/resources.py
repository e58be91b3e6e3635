"""``scratchlm resources RECIPE``: what a recipe needs, before anything runs."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from scratchlm.arguments import parse
from scratchlm.commands.shared import say, take_preset, write
from scratchlm.config import Recipe, load_recipe
from scratchlm.errors import UserError
from scratchlm.files import disk_errors, expanded
from scratchlm.model import presets
from scratchlm.resources.no_compiler import uncollected, without_the_compiler
from scratchlm.sizes import parse_bytes

if TYPE_CHECKING:
    from scratchlm.resources.devices import Device
    from scratchlm.resources.kept import Answer
    from scratchlm.resources.tables import Target
    from scratchlm.resources.timing import Machine

USAGE = "scratchlm resources RECIPE.toml|PRESET [--device NAME] [--html FILE] [--json] [--field value …]"
MEASURE = "`scratchlm resources measure`"

_HERE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")


class ResourcesArguments(Recipe):
    """What a recipe (or a preset's model) needs, traced without running it: parameters, FLOPs, memory, time, money.

    Every field of the recipe is an option. --json: print it all as JSON.
    """

    device: str = Field(
        default="auto",
        description="One of `scratchlm resources devices`, such as h100; auto, cpu, mps, cuda[:n]: of this machine.",
    )
    dtype: Literal["auto", "bf16", "fp32"] = Field(
        default="auto",
        description="bf16 or fp32, of the products; auto: the recipe's precision, or what the device is good at.",
    )
    micro_batch: int | None = Field(
        default=None, ge=1, description="Sequences at once, a divisor of train.batch-size; None: as the recipe."
    )
    compile: Literal["auto", "on", "off"] | None = Field(
        default=None,
        description="on, off or auto: whether passes between products are fused; None: the recipe's train.compile.",
    )
    memory: str | None = Field(default=None, description="Of the device, such as 80GB or 24GiB; None: its own.")
    price: float | None = Field(
        default=None, ge=0, allow_inf_nan=False, description="USD per hour; None: the device's, an assumption."
    )
    html: Path | None = Field(default=None, description="Also write a page with roofline and memory timeline here.")


def resources(arguments: list[str]) -> None:
    """``scratchlm resources RECIPE``"""
    as_json = "--json" in arguments
    rest = [argument for argument in arguments if argument != "--json"]
    if not rest:
        raise UserError(f"which recipe? usage: {USAGE}")
    if rest[0] in ("-h", "--help"):
        write(_overview())
        return
    if rest[0].startswith("-"):
        raise UserError(f"name the recipe first: {USAGE}")
    what, *rest = rest
    given = recipe_of(what, take_preset(rest))
    fields = {name: getattr(given, name) for name in Recipe.model_fields}
    options = parse(ResourcesArguments, rest, prog=USAGE, default=ResourcesArguments(**fields))
    known = None if _HERE.fullmatch(options.device) else _find(options.device)
    memory = None if options.memory is None else parse_bytes(options.memory)
    page = None if options.html is None else _page_path(options.html)
    names = [name for name in fields if name != "device"]
    recipe = Recipe(
        **{name: getattr(options, name) for name in names}, device=given.device if known else options.device
    )

    from scratchlm.resources import kept
    from scratchlm.resources.as_json import as_json as to_json
    from scratchlm.resources.tables import show

    asked = options.model_dump(
        mode="json", include={"device", "dtype", "compile", "memory", "price", "micro_batch"}
    )
    name = kept.name_of(recipe, asked, None if known else options.device)
    with uncollected():
        answer = None if name is None else kept.find(name)
        if answer is None:
            answer = _worked_out(options, recipe, known, memory)
            answer = answer if name is None else kept.keep(name, answer)
        found, target = answer.estimate, answer.target
        if page is not None:
            from scratchlm.resources.page import write_page

            write_page(found, target, page)
        if as_json:
            write(json.dumps(to_json(found, target), indent=2) + "\n")
        else:
            show(found, target)
    if page is not None:
        line = f"{page}: open it in a browser"
        print(line, file=sys.stderr) if as_json else say(line)


def _worked_out(options: ResourcesArguments, recipe: Recipe, known: Device | None, memory: float | None) -> Answer:
    """A fresh estimate."""
    from scratchlm.resources.kept import Answer

    with without_the_compiler():
        precision, compiled, machine, target = _settle(options, recipe, known, memory)
        from scratchlm.resources.estimate import estimate

        found = estimate(
            recipe,
            precision=precision,
            compiled=compiled,
            machine=machine,
            memory_bytes=memory if memory is not None or target.device is None else target.device.memory_bytes,
            price_per_hour=target.price_per_hour,
            micro_batch=options.micro_batch,
            on_cuda=target.device is not None and target.device.kind in ("cuda", "rocm"),
        )
    return Answer(found, target)


def _overview() -> str:
    """What the command takes besides a recipe's fields, and the commands below it."""
    from scratchlm.cli import COMMANDS

    own = {
        name: field for name, field in ResourcesArguments.model_fields.items() if name not in Recipe.model_fields
    }
    options = {"device": ResourcesArguments.model_fields["device"], **own}
    lines = [f"  --{name.replace('_', '-'):<13} {field.description}" for name, field in options.items()]
    lines.append(f"  --{'json':<13} Print it all as JSON.")
    below = [f"  {name:<20} {text}" for name, (_, text) in COMMANDS.items() if name.startswith("resources ")]
    return "\n".join(
        [
            f"usage: {USAGE}",
            "",
            "What a recipe (or a preset's model) needs, before anything runs: parameters, FLOPs, memory, time, money.",
            "",
            *lines,
            "  --field value   Any field of the recipe, such as --model.layers 24 or --train.batch-size 64.",
            "",
            *below,
            "",
            "for example: scratchlm resources gpt2-xl --device h100 --dtype bf16",
            "`scratchlm resources RECIPE --help` lists every field; `scratchlm model list` the presets.",
            "",
        ]
    )


def recipe_of(what: str, preset: str | None = None) -> Recipe:
    """The recipe in a file, or one with a preset's model and everything else at its defaults.

    Args:
        what: path of a recipe, or name of a preset.
        preset: takes the place of its model.

    Raises:
        UserError: there is neither such a recipe nor such a preset, or the recipe is wrong.
    """
    path = Path(what)
    if path.suffix == ".toml" or path.exists():
        return load_recipe(path, preset)
    model = presets.load(what)
    return Recipe(name=what, model=model if preset is None else presets.load(preset))


def _find(name: str) -> Device:
    from scratchlm.resources.devices import find

    return find(name)


def _page_path(given: Path) -> Path:
    """Where the page goes.

    Raises:
        UserError: something is there already.
    """
    path = expanded(given)
    with disk_errors(path):
        if path.exists() or path.is_symlink():
            raise UserError(f"{path} exists; choose another --html, or move it away")
    return path


def _settle(
    options: ResourcesArguments, recipe: Recipe, known: Device | None, memory: float | None
) -> tuple[str, bool, Machine | None, Target]:
    """Precision, compiled or not, what knows times, and what for."""
    from scratchlm.resources.devices import this_machine
    from scratchlm.resources.estimate import within_limit
    from scratchlm.resources.measurement import load_measurement
    from scratchlm.resources.tables import Target
    from scratchlm.resources.timing import Datasheet, Measured
    from scratchlm.train.precision import (
        COMPILE_PAYS_AFTER_STEPS,
        choose_compile,
        choose_device,
        choose_precision,
    )

    wanted = recipe.train.precision if options.dtype == "auto" else options.dtype
    compiling = options.compile or recipe.train.compile
    notes: list[str] = []
    machine: Machine | None = None
    if known is not None:
        device = known
        precision: str = wanted if wanted != "auto" else "bf16" if "bf16" in device.peak_flops else "fp32"
        pays = device.kind not in ("mps", "cpu") and recipe.train.steps >= COMPILE_PAYS_AFTER_STEPS
        compiled = compiling == "on" or (compiling == "auto" and pays)
        lacking = _lacking(device, precision)
        if lacking:
            notes.append(
                f"no times: {lacking} of {device.title} is unknown; a machine at hand is measured by {MEASURE}"
            )
        else:
            machine = Datasheet(device)
    else:
        here = choose_device(recipe.device)
        device = this_machine(here)
        precision = choose_precision(wanted, here).value
        compiled = choose_compile(compiling, here, recipe.train.steps).value == "on"
        measured = load_measurement() if device.measured else None
        if measured is not None and precision in measured.dtypes:
            machine = Measured(measured)
        elif measured is not None:
            notes.append(
                f"no times: {precision} was not measured here; `scratchlm resources measure --dtypes {precision}` does"
            )
        elif not _lacking(device, precision):
            machine = Datasheet(device)
            notes.append(
                f"times are by {device.title}'s printed figures; {MEASURE} finds out what this machine gives"
            )
        else:
            notes.append(f"no times: run {MEASURE} once (about a minute), or name a device, as in --device h100")
    if recipe.train.fp8:
        notes.append("train.fp8 is not in these figures: they are those of products in bf16")
    price, origin = options.price, ""
    if price is None and device.price_per_hour is not None:
        price = device.price_per_hour
        origin = f"a typical list price of {device.price_date}, an assumption"
    memory = within_limit(recipe.train, device.memory_bytes if memory is None else memory)
    return precision, compiled, machine, Target(device, memory, price, origin, tuple(notes))


def _lacking(device: Device, precision: str) -> str:
    """Which figure is missing for times; empty: none."""
    if device.memory_bandwidth is None:
        return "the memory's bandwidth"
    peaks: Sequence[str] = [str(dtype) for dtype in device.peak_flops]
    return "" if precision in peaks else f"the peak in {precision}"
