"""A family of the hub: how its config.json and its tensors correspond to ours."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from scratchlm.errors import UserError
from scratchlm.interop import families as _package
from scratchlm.interop.rules import EVERYONES, EVERYONES_ONLY, Inexpressible, Reading, Rule, Values
from scratchlm.interop.weights import Map
from scratchlm.model.config import ModelConfig
from scratchlm.section import nearest_name, validate


@dataclass(frozen=True)
class Family:
    """One ``model_type``.

    Attributes:
        model_type: as config.json says it.
        architecture: the class of transformers that computes it.
        title: what people call it, with the releases it covers.
        config: the rules of config.json.
        weights: the places of tensors.
        head: their name of the head's weight, absent from files when it is tied.
        prefix: what some files leave out before every name but the head's, such as ``transformer.``.
        ignored: regular expressions of tensors that the model does not compute with (masks and tables of old files, modules of
            multi-token prediction); ``{beyond}`` is the number of a layer after the last.
        alias: other ``model_type``\\ s that are read as this one.
        written: further keys of config.json, which change nothing.
        quantised: the quantisations of its files that are read.
    """

    model_type: str
    architecture: str
    title: str
    config: Sequence[Rule]
    weights: Sequence[Map]
    head: str = "lm_head.weight"
    prefix: str = ""
    ignored: Sequence[str] = ()
    alias: Sequence[str] = ()
    written: Mapping[str, Any] = field(default_factory=dict)
    quantised: Sequence[str] = ()

    @property
    def rules(self) -> list[Rule]:
        return [*self.config, *EVERYONES_ONLY, EVERYONES]

    def read(self, values: Mapping[str, Any], where: str) -> ModelConfig:
        """Our configuration for a config.json.

        Every key of it is read by a rule, known to change nothing, or an error.

        Args:
            values: the file's content.
            where: the file, for messages.

        Raises:
            UserError: a key or value that no field of ours expresses; it is named.
        """
        try:
            return self._read(values, where)
        except _SENSELESS as error:
            said = " ".join(f"{type(error).__name__}: {error}".split())[:120]
            raise UserError(
                f"{where}: config.json of family {self.model_type} has a value that makes no sense ({said})"
            ) from error

    def _read(self, values: Mapping[str, Any], where: str) -> ModelConfig:
        self.quantisation(values, where)
        reading = Reading(values, where, self.model_type)
        reading.layers()
        fields: Values = {}
        for rule in self.rules:
            fields |= rule.read(reading)
        if unknown := reading.unknown():
            several = len(unknown) > 1
            named = ", ".join(" ".join(key[:40].split()) for key in unknown[:_NAMED])
            if len(unknown) > _NAMED:
                named += f" and {len(unknown) - _NAMED} more"
            raise UserError(
                f"{where}: option{'s' if several else ''} {named} of family {self.model_type} "
                f"{'are' if several else 'is'} not known here; nothing is ignored silently, so the model is not read"
            )
        return validate(ModelConfig, nested(fields), where)

    def quantisation(self, values: Mapping[str, Any], where: str) -> str | None:
        """How the weights beside a config.json are quantised; None: they are not.

        Raises:
            UserError: in a way that is not read.
        """
        said = values.get("quantization_config")
        if not said:
            return None
        method = said.get("quant_method", "?") if isinstance(said, dict) else said
        if isinstance(method, str) and method in self.quantised:
            return method
        named = " ".join(method[:40].split()) if isinstance(method, str) else "?"
        raise UserError(
            f"{where}: the weights are quantised (quantization_config: {named}), which is not supported; take a copy "
            "of the model in bf16, fp16 or fp32"
        )

    def write(self, model: ModelConfig) -> tuple[Values, list[str]]:
        """config.json for a configuration, and the fields that it cannot say (their dotted names)."""
        values: Values = {"architectures": [self.architecture], "model_type": self.model_type, **self.written}
        unsaid: list[str] = []
        for rule in self.config:
            try:
                values |= rule.write(model)
            except Inexpressible as error:
                unsaid.append(str(error))
        return values, unsaid

    def harmless(self, values: Mapping[str, Any]) -> Values:
        """Of a config.json of this family, the keys that change nothing and are worth giving back."""
        reading = Reading(values, "config.json", self.model_type)
        for rule in self.config:
            rule.read(reading)
        return {key: value for key, value in values.items() if key not in reading.asked and key not in _OURS_TO_SAY}


_SENSELESS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, MemoryError, RecursionError)
"""What a rule that meets a value of another type or size than it looks for may end in."""

_NAMED = 8
"""So many unknown options are named."""

_OURS_TO_SAY = (
    "quantization_config",
    "architectures",
    "model_type",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "auto_map",
    "_name_or_path",
)
"""What an export says itself."""


def nested(fields: Mapping[str, Any]) -> Values:
    """``{"moe.top_k": 2}`` → ``{"moe": {"top_k": 2}}``."""
    tree: Values = {}
    for name, value in fields.items():
        *sections, leaf = name.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[leaf] = value
    return tree


@functools.cache
def families() -> dict[str, Family]:
    """All families by ``model_type``, in alphabetical order: every file of ``interop/families`` has a list of them."""
    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(_package.__path__):
        for family in importlib.import_module(f"{_package.__name__}.{module.name}").FAMILIES:
            found[family.model_type] = family
    return dict(sorted(found.items()))


def family_of(model_type: Any, where: str) -> Family:
    """The family called `model_type`.

    Raises:
        UserError: there is none, or it is unknown; all known ones are listed.
    """
    if model_type is None:
        raise UserError(
            f"{where} names no model_type, so its family cannot be told; known are {', '.join(families())}"
        )
    for family in families().values():
        if model_type == family.model_type or model_type in family.alias:
            return family
    hint = nearest_name(str(model_type), families())
    raise UserError(
        f"{where}: model_type {str(model_type)[:60]!r} is unknown{hint}; known are {', '.join(families())}"
    )
