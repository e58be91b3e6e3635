"""``scratchlm resources dtypes``: number formats, and which of them each operation of a model runs in."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from scratchlm.arguments import parse
from scratchlm.commands.shared import say, take_preset, write
from scratchlm.config import Recipe, load_recipe
from scratchlm.errors import UserError
from scratchlm.section import Section

if TYPE_CHECKING:
    from rich.table import Table

    from scratchlm.resources.autocast_audit import Audit, Operation

USAGE = "scratchlm resources dtypes [RECIPE.toml] [--json] [--option value …]"


class FormatArguments(Section):
    """Number formats: their range and precision, what becomes of typical numbers, and of a long sum. With a RECIPE.toml: the
    dtypes of every operation of one training step of its model instead. --json: print it all as JSON."""

    saturate: bool = Field(
        default=False,
        description="What is too large becomes the largest number, as fp8 libraries do, not inf or NaN.",
    )


class AuditArguments(Recipe):
    """One training step of a recipe's model on random tokens, on the CPU, and the dtypes of every operation in it. A recipe's fields
    are options. --json: print it all as JSON. --model.preset NAME: a known architecture in place of the recipe's [model]."""

    precision: Literal["bf16", "fp32"] | None = Field(
        default=None, description="bf16: autocast; None: the recipe's train.precision, where auto is bf16."
    )
    length: int | None = Field(
        default=None, ge=1, le=2**24, description="Tokens per sequence; None: the model's context, at most 256."
    )


def dtypes(arguments: list[str]) -> None:
    """``scratchlm resources dtypes [RECIPE.toml]``"""
    as_json = "--json" in arguments
    rest = [argument for argument in arguments if argument != "--json"]
    if rest and not rest[0].startswith("-"):
        _audit(rest, as_json)
        return
    names = [argument.split("=")[0] for argument in rest if argument.startswith("--")]
    if found := [name for name in names if "." in name or name in ("--precision", "--length")]:
        raise UserError(f"{found[0]} is about a model: name its recipe first, as in {USAGE}")
    options = parse(FormatArguments, rest, prog=USAGE)
    if as_json:
        write(json.dumps(_formats_as_json(options.saturate), indent=2) + "\n")
        return
    _show_formats(options.saturate)


# --- formats -----------------------------------------------------------------------------------------------------


def _formats_as_json(saturate: bool) -> dict[str, Any]:
    """Everything as plain values; a sum or number that is not finite is null, its fate says which."""
    from scratchlm.resources import number_formats as nf

    derived = ("largest", "smallest_normal", "smallest_subnormal", "epsilon", "digits")
    fields = ("name", "exponent_bits", "mantissa_bits", "bias", "bytes", "infinities", *derived)
    numbers = []
    for what, x in nf.TYPICAL:
        becomes = {}
        for fmt in nf.FORMATS:
            fate, value = nf.becomes(x, fmt, saturate=saturate)
            becomes[fmt.name] = {"fate": fate, "value": value if math.isfinite(value) else None}
        numbers.append({"what": what, "number": x, "becomes": becomes})
    sums = [asdict(nf.add_up(fmt, method)) for fmt in nf.FORMATS for method in nf.METHODS]
    return {
        "formats": [{name: getattr(fmt, name) for name in fields} for fmt in nf.FORMATS],
        "saturate": saturate,
        "numbers": numbers,
        "sums": sums,
    }


def _show_formats(saturate: bool) -> None:
    import torch

    from scratchlm.resources import number_formats as nf

    table = _table("format", "bytes", "exponent\nbits", "mantissa\nbits", "largest", "smallest\nnormal",
                   "smallest\nsubnormal", "ε\n(1 to next)", "decimal\ndigits", "beyond")  # fmt: skip
    for fmt in nf.FORMATS:
        beyond = "largest" if saturate else "±inf" if fmt.infinities else "NaN"
        table.add_row(
            fmt.name,
            str(fmt.bytes),
            str(fmt.exponent_bits),
            str(fmt.mantissa_bits),
            *(_short(x) for x in (fmt.largest, fmt.smallest_normal, fmt.smallest_subnormal, fmt.epsilon)),
            f"{fmt.digits:.1f}",
            beyond,
        )
    _print(table)
    cast = "saturates" if nf.torch_saturates(nf.E4M3) else "does not saturate"
    say(
        "tf32 lies in memory as fp32: it is what a tensor core keeps of one.\n"
        f"e4m3 is torch's float8_e4m3fn, to which torch {torch.__version__} {cast} in casts."
    )

    names = [fmt.name for fmt in nf.FORMATS]
    table = _table("what becomes of", "", *names)
    for what, x in nf.TYPICAL:
        fates = (nf.becomes(x, fmt, saturate=saturate) for fmt in nf.FORMATS)
        table.add_row(what, _short(x), *(_fate(*fate) for fate in fates))
    say("")
    _print(table)
    say("A number in a cell is what it was rounded to, to four digits.")

    table = _table("0.01, ten thousand times", *names)
    for method in nf.METHODS:
        sums = [nf.add_up(fmt, method) for fmt in nf.FORMATS]
        table.add_row(f"sum {method}", *(f"{found.value:.6g}" for found in sums))
        table.add_row("  error", *(f"{found.error:+.3g}" for found in sums))
        table.add_row(
            "  last step that changed it", *(f"{found.last_change:,}" for found in sums), end_section=True
        )
    say("")
    _print(table)
    say(
        "in itself: the sum is kept in the same format, and stops growing where 0.01 is at most half of its last place.\n"
        "in fp32: 0.01 is rounded to the format, the sum is fp32, as tensor cores add up.\n"
        "compensated: in the same format, what each addition lost is added to the next (Kahan 1965)."
    )


def _fate(fate: str, value: float) -> str:
    return _short(value) if fate == "rounded" else fate


def _short(x: float) -> str:
    """Four digits, with an exponent only where it is shorter to read."""
    if x == int(x) and abs(x) < 1e6:
        return f"{int(x):,}"
    return f"{x:.4g}".replace("e-0", "e-").replace("e+0", "e+")


# --- the audit ---------------------------------------------------------------------------------------------------


def _audit(arguments: list[str], as_json: bool) -> None:
    path, *rest = arguments
    prog = f"scratchlm resources dtypes {Path(path).name} [--json]"
    recipe = load_recipe(path, take_preset(rest))
    given = AuditArguments(**{name: getattr(recipe, name) for name in Recipe.model_fields})
    options = parse(AuditArguments, rest, prog=prog, default=given)
    precision = options.precision or ("fp32" if options.train.precision == "fp32" else "bf16")
    from scratchlm.resources.autocast_audit import audit

    found = audit(options, precision, length=options.length)
    if as_json:
        write(json.dumps(_audit_as_json(found), indent=2) + "\n")
    else:
        _show_audit(found)


def _audit_as_json(found: Audit) -> dict[str, Any]:
    operations = [
        {**asdict(one), "is_cast": one.is_cast, "is_floating": one.is_floating} for one in found.operations
    ]
    return {**asdict(found), "operations": operations}


def _show_audit(found: Audit) -> None:
    from scratchlm.resources.autocast_audit import PHASES

    how = "under autocast to bf16" if found.precision == "bf16" else "in fp32, without autocast"
    say(f"one training step {how}, on the CPU: {found.tokens:,} random tokens, loss {found.loss:.3f}")
    if found.layers < found.of_layers:
        say(f"the model is large: only the first {found.layers} of its {found.of_layers} layers, which then repeat")
    for phase in PHASES:
        listed = [one for one in found.listed() if one.phase == phase]
        if not listed:
            continue
        table = _table(phase, "reads → writes", "operations, and how often", numbers=())
        for (place, dtypes), calls in _by_place(listed).items():
            table.add_row(place, dtypes, ", ".join(f"{name} {times:,}" for name, times in calls.items()))
        _print(table)
    unlisted = sum(one.times for one in found.operations) - sum(one.times for one in found.listed())
    say(
        f"{unlisted:,} more operations are views, copies, allocations, or about indices and masks. What a kernel does inside is\n"
        "not seen: --model.kernels reference --train.loss-kernel reference --optim.implementation reference run formulas instead."
    )
    table = _table(
        "held after the step", "dtype", "tensors", "numbers", "bytes", numbers=("tensors", "numbers", "bytes")
    )
    for held in found.held:
        table.add_row(held.what, held.dtype, f"{held.tensors:,}", f"{held.numbers:,}", f"{held.bytes:,}")
    _print(table)


def _by_place(operations: list[Operation]) -> dict[tuple[str, str], Counter[str]]:
    """(place, dtypes) → operations and how often, in all layers together; places as they were come to."""
    from scratchlm.resources.autocast_audit import everywhere

    rows: dict[str, dict[str, Counter[str]]] = {}
    for one in operations:
        reads, writes = ", ".join(one.reads), ", ".join(one.writes)
        dtypes = writes if reads == writes else f"{reads} → {writes}"
        name = "cast" if one.is_cast else one.name
        rows.setdefault(everywhere(one.place), {}).setdefault(dtypes, Counter())[name] += one.times
    return {(place, dtypes): calls for place, found in rows.items() for dtypes, calls in found.items()}


# --- tables ------------------------------------------------------------------------------------------------------


def _table(*headers: str, numbers: tuple[str, ...] | None = None) -> Table:
    """An empty table; `numbers` names the columns that are lined up on the right, None: all but the first."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    for at, header in enumerate(headers):
        right = at > 0 if numbers is None else header in numbers
        table.add_column(header, justify="right" if right else "left", no_wrap=right)
    return table


def _print(table: Table) -> None:
    from rich.console import Console

    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120).print(table)
