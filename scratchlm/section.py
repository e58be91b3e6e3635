"""The base of every configuration section: strict, and with errors a person can act on."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from scratchlm.errors import UserError

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:  # without depending on where pydantic keeps it
    ModelMetaclass = type(BaseModel)


class _OneLineErrors(ModelMetaclass):
    """Turns pydantic's report into a :class:`UserError` where a section is built by hand: ``ModelConfig(layers=-1)``.

    In the metaclass, because pydantic builds the sections of a recipe without it and so still knows the whole path.
    """

    def __call__(cls, *args: Any, **values: Any) -> Any:
        try:
            return super().__call__(*args, **values)
        except ValidationError as error:
            section: Any = cls
            raise UserError(f"{cls.__name__}: {_explain(section, error)}") from error


class Section(BaseModel, metaclass=_OneLineErrors):
    """A part of a recipe: unknown fields are refused, values are checked and fixed, equal content is equal.

    Raises:
        UserError: one line about the first thing that is wrong.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would read ``steps = true`` as 1."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and annotation is not bool and bool not in get_args(annotation):
            raise ValueError(f"{str(value).lower()} is a boolean, which this field does not take")
        return value


AnySection = TypeVar("AnySection", bound=Section)


def flat_fields(section: Section, prefix: str = "") -> dict[str, Any]:
    """Every value of a section and of the sections in it under its dotted name."""
    flat: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        flat |= flat_fields(value, f"{prefix}{name}.") if isinstance(value, Section) else {prefix + name: value}
    return flat


def field_paths(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Every field of a section and of the sections in it, dotted: ``["name", "model", "model.layers", …]``."""
    paths = []
    for name, field in section.model_fields.items():
        paths.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            paths += field_paths(field.annotation, f"{prefix}{name}.")
    return paths


def nearest_name(name: str, known: Iterable[str]) -> str:
    """A hint ``; did you mean …?`` for a misspelt `name`, or an empty string."""
    match = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else ""


def nearest_field(section: type[BaseModel], path: str) -> str:
    """A hint ``; did you mean …?`` for a misspelt dotted field, or an empty string."""
    known = field_paths(section)
    leaf = path.rsplit(".", 1)[-1]
    if elsewhere := [
        name for name in known if "." in name and name.endswith(f".{leaf}")
    ]:  # right name, wrong section
        return f"; did you mean {elsewhere[0]}?"
    match = difflib.get_close_matches(path, known, n=1, cutoff=0.6)
    if not match:  # misspelt, and in the wrong section
        leaves = {name.rsplit(".", 1)[-1]: name for name in known}
        match = [leaves[near] for near in difflib.get_close_matches(leaf, list(leaves), n=1, cutoff=0.75)]
    return f"; did you mean {match[0]}?" if match else ""


def _explain(section: type[BaseModel], error: ValidationError) -> str:
    """The first thing that is wrong, in one line, with the nearest known name for a misspelt field or choice."""
    first = error.errors()[0]
    # A field that takes one of several types is followed by the type that was tried.
    path = re.sub(r"\.(float|int|str|bool|literal\[.*\]|constrained-\w+)$", "", ".".join(map(str, first["loc"])))
    shown = repr(first.get("input"))
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    if first["type"] == "extra_forbidden":
        message = f"unknown field {path}{nearest_field(section, path)}"
    elif first["type"] == "value_error":
        message = (f"{path}: " if path else "") + first["msg"].removeprefix("Value error, ")
    elif first["type"] == "literal_error":
        allowed = re.findall(r"'([^']*)'", first["ctx"]["expected"])
        hint = nearest_name(str(first["input"]), allowed)
        message = f"{path} = {shown} is unknown{hint}; allowed: {', '.join(allowed)}"
    else:
        message = f"{path} = {shown}: {first['msg'][0].lower()}{first['msg'][1:]}"
    more = error.error_count() - 1
    return message + (f" (and {more} more)" if more else "")


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
        raise UserError(f"{where}: {_explain(section, error)}") from error
