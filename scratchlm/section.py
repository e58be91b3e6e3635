"""The base of every configuration section: strict, and with errors a person can act on."""

from __future__ import annotations

import difflib
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from scratchlm.errors import UserError


class Section(BaseModel):
    """A part of a recipe: unknown fields are refused, assigned values are checked, equal content is equal."""

    model_config = ConfigDict(extra="forbid", validate_assignment=False, validate_default=False, frozen=True)


AnySection = TypeVar("AnySection", bound=Section)


def field_paths(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Every field of a section and of the sections in it, dotted: ``["name", "model", "model.layers", …]``."""
    paths = []
    for name, field in section.model_fields.items():
        paths.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            paths += field_paths(field.annotation, f"{prefix}{name}.")
    return paths


def nearest_field(section: type[BaseModel], path: str) -> str:
    """A hint ``; did you mean …?`` for a misspelt dotted field, or an empty string."""
    known = field_paths(section)
    match = difflib.get_close_matches(path, known, n=1, cutoff=0.6)
    if not match:  # right name, wrong section
        leaf = path.rsplit(".", 1)[-1]
        leaves = {name.rsplit(".", 1)[-1]: name for name in known}
        match = [leaves[near] for near in difflib.get_close_matches(leaf, list(leaves), n=1, cutoff=0.75)]
    return f"; did you mean {match[0]}?" if match else ""


def validate(section: type[AnySection], values: dict[str, Any], where: str) -> AnySection:
    """Build `section` from plain `values`.

    Args:
        section: the configuration class.
        values: as read from TOML or JSON.
        where: file (or other origin) to name in errors.

    Raises:
        UserError: the first thing that is wrong, with the nearest known field for a misspelt one.
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            message = f"unknown field {path}{nearest_field(section, path)}"
        elif first["type"] == "value_error":
            message = (f"{path}: " if path else "") + first["msg"].removeprefix("Value error, ")
        else:
            shown = repr(first.get("input"))
            shown = shown if len(shown) <= 60 else shown[:57] + "..."
            message = f"{path} = {shown}: {first['msg'][0].lower()}{first['msg'][1:]}"
        more = len(error.errors()) - 1
        raise UserError(f"{where}: {message}" + (f" (and {more} more)" if more else "")) from error
