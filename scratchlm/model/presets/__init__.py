"""Presets: known architectures as data, from the first Transformer to DeepSeek-V3, each also tiny.

A family is a TOML file beside this one: what its models share (``[architecture]``) and what a size adds to or changes of it
(``[sizes.8b]``); both hold fields of :class:`~scratchlm.model.ModelConfig` and nothing else. A preset is called by family and
size: ``llama-3-8b``, ``llama-3-tiny``. Published sizes are as published; a tiny one makes the same choices in proportions
that train on a CPU, and takes its vocabulary from the tokenizer.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from scratchlm.errors import UserError
from scratchlm.model.config import ModelConfig
from scratchlm.section import nearest_name, validate

Values = dict[str, Any]

WIDTHS = ("vocab_size", "context_length", "d_model", "layers", "heads", "d_ff")
"""Written out by :func:`to_toml` even where they are the defaults."""


@dataclass(frozen=True)
class Family:
    """Models of one architecture.

    Attributes:
        name: the first part of its presets' names.
        released: year and month, such as ``2024-04``.
        title: what it is called.
        source: where the values are from.
        left_out: what the real models have that no field expresses, a sentence each.
        architecture: the fields all sizes share.
        sizes: size → the fields it adds or changes.
    """

    name: str
    released: str
    title: str
    source: str
    left_out: tuple[str, ...]
    architecture: Values
    sizes: Mapping[str, Values]

    @property
    def presets(self) -> list[str]:
        return [f"{self.name}-{size}" for size in self.sizes]


@functools.cache
def families() -> tuple[Family, ...]:
    """All families, oldest first."""
    found = []
    for path in Path(__file__).parent.glob("*.toml"):
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        found.append(Family(path.stem, **{**table, "left_out": tuple(table["left_out"])}))
    return tuple(sorted(found, key=lambda family: (family.released, family.name)))


def names() -> list[str]:
    """The names of all presets, family by family."""
    return [name for family in families() for name in family.presets]


def family_of(name: str) -> Family:
    """The family a preset belongs to.

    Raises:
        UserError: there is no such preset; the nearest name is given.
    """
    for family in families():
        if name in family.presets:
            return family
    raise UserError(
        f"preset {name[:60]!r} is unknown{nearest_name(name, names())}; `scratchlm model list` shows them all"
    )


def values(name: str) -> Values:
    """The fields that a preset sets, as in a recipe's ``[model]``; errors as :func:`family_of`."""
    family = family_of(name)
    return merge(family.architecture, family.sizes[name.removeprefix(f"{family.name}-")])


def load(name: str) -> ModelConfig:
    """The configuration of a preset; errors as :func:`family_of`."""
    return validate(ModelConfig, values(name), f"preset {name}")


def merge(first: Mapping[str, Any], second: Mapping[str, Any]) -> Values:
    """`first` with what `second` sets, sections field by field; neither is changed."""
    merged = {key: merge(value, {}) if isinstance(value, Mapping) else value for key, value in first.items()}
    for key, value in second.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def expand(model: Mapping[str, Any]) -> Values:
    """A recipe's ``[model]`` with the preset it names, if it does, filled in below its own fields.

    Raises:
        UserError: there is no such preset.
    """
    own = {key: value for key, value in model.items() if key != "preset"}
    if "preset" not in model:
        return own
    if not isinstance(name := model["preset"], str):
        raise UserError(f"model.preset = {name!r} is no name; `scratchlm model list` shows them all")
    return merge(values(name), own)


def to_toml(config: ModelConfig) -> str:
    """The ``[model]`` table of a recipe with every field that is not at its default, and the widths."""

    def readable(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: readable(item) for key, item in value.items() if item is not None}
        if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
            return " ".join(value)
        return value[0] if isinstance(value, list) and len(value) == 1 else value

    table = readable(config.model_dump(mode="json", exclude_defaults=True))
    table |= {key: getattr(config, key) for key in WIDTHS if key != "d_ff"} | {"d_ff": config.resolved_d_ff}
    order = [*WIDTHS, *(key for key in table if key not in WIDTHS)]
    return tomli_w.dumps({"model": {key: table[key] for key in order}})
