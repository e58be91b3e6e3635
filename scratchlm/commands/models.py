"""``scratchlm model list | show | shape``: architectures by name and by size."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import tyro
from pydantic import Field

from scratchlm.arguments import parse
from scratchlm.commands.shared import say, write
from scratchlm.errors import UserError
from scratchlm.model import presets
from scratchlm.model.config import FeedForwardName, ModelConfig
from scratchlm.section import Section

if TYPE_CHECKING:
    from rich.table import Table

    from scratchlm.model.shape import Count


class ListArguments(Section):
    """Known architectures: a recipe's [model] takes one by preset = "NAME", or --model.preset NAME."""


def list_presets(arguments: list[str]) -> None:
    """``scratchlm model list``"""
    parse(ListArguments, arguments, prog="scratchlm model list")
    from rich.table import Table

    table = Table()
    for column in ("released", "family", "presets", "source"):
        table.add_column(column)
    for family in presets.families():
        table.add_row(family.released, family.title, " ".join(family.presets), family.source)
    _print(table)


class ShowArguments(Section):
    """A known architecture as the [model] of a recipe, with its parameters and what of the real model it leaves out."""

    preset: tyro.conf.Positional[str] = Field(description="A name from `scratchlm model list`.")


def show(arguments: list[str]) -> None:
    """``scratchlm model show PRESET``"""
    if not arguments:
        raise UserError("which preset? usage: scratchlm model show PRESET; `scratchlm model list` shows them all")
    name = parse(ShowArguments, arguments, prog="scratchlm model show").preset
    config, family = presets.load(name), presets.family_of(name)
    from scratchlm.model.shape import count

    lines = [f"{name}: {family.title}", family.source, _counted(config, count(config))]
    lines += [f"left out: {sentence}" for sentence in family.left_out]
    write("\n".join(f"# {line}" for line in lines) + f"\n\n{presets.to_toml(config)}")


def _counted(config: ModelConfig, counted: Count) -> str:
    """The parameters in a sentence."""
    prediction = f"; {counted.prediction:,} of them only predict further tokens" if counted.prediction else ""
    if not config.vocab_size:
        from scratchlm.model.shape import params_per_token

        each = params_per_token(config)
        return (
            f"{counted.body:,} parameters{_active(counted.body, counted.active)}{prediction}, and {each:,} for every token "
            "of the tokenizer's vocabulary"
        )
    return f"{counted.total:,} parameters{_active(counted.total, counted.active)}{prediction}"


def _active(total: int, active: int) -> str:
    return "" if active == total else f", {active:,} of them active for a token"


class ShapeArguments(Section):
    """Propose d_model, layers, heads, d_ff and vocabulary for a wished number of parameters, by the lecture's rules of thumb.

    The proposal is shown beside known models, and as a recipe's [model]. --json: print it all as JSON.
    """

    params: str = Field(default="", description="How many parameters, embeddings included: 125M, 1.3B, 7e9.")
    aspect: float = Field(default=100.0, gt=0, le=100_000, description="d_model / layers to come near to.")
    head_dim: int | None = Field(
        default=None,
        ge=2,
        le=4096,
        description="Width of a head; None: 64, below 10M parameters 32, from 2B on 128.",
    )
    vocab_size: int | None = Field(
        default=None,
        ge=1,
        le=2**31 - 1,
        description="Token ids; None: at most 49,152, embeddings a third of the parameters.",
    )
    feedforward: FeedForwardName = Field(
        default="swiglu", description="Feed-forward; gated ones are 8/3 · d_model wide, plain ones 4 ·."
    )
    kv_heads: int | None = Field(
        default=None, ge=1, le=2**12, description="Key/value heads (GQA); None: as many as heads."
    )
    context: int = Field(default=1024, ge=1, le=2**24, description="Longest sequence, in tokens.")


def shape(arguments: list[str]) -> None:
    """``scratchlm model shape --params 125M``"""
    as_json = "--json" in arguments
    rest = [argument for argument in arguments if argument != "--json"]
    options = parse(ShapeArguments, rest, prog="scratchlm model shape [--json]")
    if not options.params:
        raise UserError("how many parameters? usage: scratchlm model shape --params 125M [--option value …]")
    from scratchlm.model import shape as shapes

    wish = shapes.parse_params(options.params)
    config = shapes.propose(
        wish,
        aspect=options.aspect,
        head_dim=options.head_dim,
        vocab_size=options.vocab_size,
        feedforward=options.feedforward,
        kv_heads=options.kv_heads,
        context_length=options.context,
    )
    known = {name: presets.load(name) for name in shapes.KNOWN}
    rows = {name: _row(model) for name, model in {"proposed": config, **known}.items()}
    if as_json:
        proposed = rows.pop("proposed")
        model = config.model_dump(mode="json")
        write(json.dumps({"wish": wish, "proposed": proposed, "model": model, "known": rows}, indent=2) + "\n")
        return
    _print(_comparison(rows))
    total = rows["proposed"]["params"]
    say(f"\n{total:,} parameters, {total / wish - 1:+.1%} of the wish; {config.heads} heads. The rules:")
    for name, rule in shapes.RULES.items():
        say(f"  {name:<16} {rule}")
    write(f"\n{presets.to_toml(config)}")


def _row(config: ModelConfig) -> dict[str, Any]:
    """What a model is compared by."""
    from scratchlm.model.shape import count, ratios

    found, counted = ratios(config), count(config)
    return {
        "params": counted.total - counted.prediction,
        "d_model": config.d_model,
        "layers": config.layers,
        "aspect_ratio": found.aspect,
        "d_ff_ratio": found.d_ff,
        "head_dim": config.resolved_head_dim,
        "heads_ratio": found.heads,
        "kv_heads": config.resolved_kv_heads,
        "vocab_size": config.vocab_size,
    }


def _comparison(rows: dict[str, dict[str, Any]]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    headers = ("model", "params", "d_model", "layers", "d_model\n/ layers", "d_ff /\nd_model", "head\ndim",
               "heads·dim\n/ d_model", "kv\nheads", "vocabulary")  # fmt: skip
    table = Table(box=SIMPLE_HEAD)
    for header in headers:
        table.add_column(header, justify="left" if header == "model" else "right", no_wrap=True)
    for name, row in rows.items():
        table.add_row(
            name,
            _short(row["params"]),
            f"{row['d_model']:,}",
            str(row["layers"]),
            f"{row['aspect_ratio']:.0f}",
            f"{row['d_ff_ratio']:.2f}",
            str(row["head_dim"]),
            f"{row['heads_ratio']:.2f}",
            str(row["kv_heads"]),
            f"{row['vocab_size']:,}",
            style="bold" if name == "proposed" else None,
            end_section=name == "proposed",
        )
    return table


def _short(number: int) -> str:
    """1,294,413,184 as 1.29 B."""
    size, unit = (10**9, "B") if number >= 10**9 else (10**6, "M")
    return f"{number / size:,.4g} {unit}" if number < 1000 * size else f"{number / size:,.0f} {unit}"


def _print(table: Table) -> None:
    from rich.console import Console

    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 110).print(table)
