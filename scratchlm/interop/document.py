"""The generated parts of docs/interop.md: which family has which choices, the worked example, and the measured errors.

``python -m scratchlm.interop.document [DOCS]`` renews them.
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

from scratchlm.errors import UserError
from scratchlm.files import write_text
from scratchlm.interop.families import arcee
from scratchlm.interop.family import Family, families
from scratchlm.interop.rules import Always, Choice, Key
from scratchlm.model.config import ModelConfig
from scratchlm.model.draw.document import filled

COLUMNS = (
    *(
        "norm",
        "norm_placement",
        "block",
        "qk_norm",
        "feedforward",
        "attention",
        "position",
        "rope.pairs",
        "rope.scaling",
    ),
    *("mask", "attention_bias", "tied_embeddings", "moe.router"),
)
"""The axes that families differ in; a column each. Other fields with a value or key of their own are named behind them."""

WIDTHS = (
    *(
        "vocab_size",
        "context_length",
        "d_model",
        "layers",
        "heads",
        "kv_heads",
        "head_dim",
        "d_ff",
        "norm_eps",
        "window",
    ),
    *("rope.theta", "attention_dropout", "residual_dropout", "embedding_dropout"),
)
"""What every family has a key for, more or less."""

MEASURED = "results/interop/errors.json"


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "–" if value is None else str(value)


def default_of(field: str) -> Any:
    """The default of a dotted field."""
    value: Any = ModelConfig()
    for name in field.split("."):
        value = getattr(value, name)
    return value


def cell(family: Family, field: str) -> str:
    """What a family's rules say of a field: its one value, the values it may have, ``any`` (a key with the value itself), ``own
    rule``, or an empty cell where no rule speaks of it and the default holds."""
    found = ""
    for rule in family.config:
        if field not in rule.fields():
            continue
        if isinstance(rule, Always):
            found = _shown(rule.values[field])
        elif isinstance(rule, Choice):
            found = ", ".join(dict.fromkeys(_shown(value) for value in rule.names.values()))
        elif isinstance(rule, Key):
            found = "any"
        else:
            said: dict[str, str] = rule.said() if hasattr(rule, "said") else {}
            found = said.get(field, "own rule")
    return found


def further(family: Family) -> str:
    """The other fields that a family sets or has a key for."""
    named: dict[str, str] = {}
    for rule in family.config:
        for field in rule.fields():
            if field not in (*COLUMNS, *WIDTHS):
                value = cell(family, field)
                named[field] = f" = {value}" if isinstance(rule, Always) else ""
    return ", ".join(f"`{field}{value}`" for field, value in named.items())


def matrix() -> str:
    """Families by fields."""
    known = list(families().values())
    lines = [
        "| family | " + " | ".join(f"`{field}`" for field in COLUMNS) + " | further fields |",
        "|---" * (len(COLUMNS) + 2) + "|",
        "| *default* | " + " | ".join(_shown(default_of(field)) for field in COLUMNS) + " | |",
    ]
    for family in known:
        cells = [*(cell(family, field) for field in COLUMNS), further(family)]
        lines.append(f"| **{family.model_type}** {family.title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def errors(docs: Path) -> str:
    """The measured errors as a table, from the committed results."""
    measured = json.loads((docs / MEASURED).read_text(encoding="utf-8"))
    lines = [
        "| case | seeds | logits fp64 | layers fp64 | gradients fp64, relative to the largest | logits fp32 | greedy tokens equal |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in measured["results"]:
        lines.append(
            f"| {row['case']} | {row['seeds']} | {row['logits_fp64']:.0e} | {_optional(row['layers_fp64'])} | "
            f"{row['gradients_fp64']:.0e} | {row['logits_fp32']:.0e} | {row['tokens_equal']} of {row['tokens']} |"
        )
    return "\n".join(lines)


def _optional(value: float | None) -> str:
    return "not reported there" if value is None else f"{value:.0e}"


def example() -> str:
    """The worked example, as it stands in its file."""
    return f"```python\n{inspect.getsource(arcee).rstrip()}\n```"


def parts(docs: Path) -> dict[str, str]:
    """Every generated part by the name of its marks."""
    return {"matrix": matrix(), "errors": errors(docs), "example": example()}


def main(docs: Path) -> None:
    """Renew ``interop.md`` in `docs`.

    Raises:
        UserError: the page is missing or lacks a mark.
    """
    page = docs / "interop.md"
    if not page.exists():
        raise UserError(f"{page} does not exist; run this in the repository's root, or name the folder of the page")
    write_text(page, filled(page.read_text(encoding="utf-8"), parts(docs)))


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs"))
    except UserError as error:
        sys.exit(f"error: {error}")
