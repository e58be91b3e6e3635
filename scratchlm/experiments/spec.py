"""What is to be compared, as data: a recipe, variants of it, seeds, and what all of them get the same amount of.

::

    base = "../python-stdlib.toml"      # a recipe; its path is seen from this file
    seeds = 3

    [fields]                            # changed for every run, the base included
    train.steps = 200

    [budget]
    kind = "tokens"                     # tokens, flops, parameters or seconds

    [variants.post]                     # name → what is different
    model.norm_placement = "post"

    [sweep]                             # and/or a grid, or random draws
    kind = "grid"
    fields."optim.lr" = [0.01, 0.03, 0.1]

    [rates]                             # each variant is also judged at a learning rate of its own
    factors = [0.5, 1.0, 2.0]

Nothing runs before every run's recipe has been built: an unknown field, a value that is not allowed or a combination that the model refuses
is an error that names the variant.
"""

from __future__ import annotations

import itertools
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from scratchlm.config import Recipe, load_recipe, plain
from scratchlm.errors import UserError
from scratchlm.model import presets
from scratchlm.section import Section, field_paths, nearest_field, validate

BASE = "base"
"""Name of the recipe as it is, among the variants."""

_NAME = re.compile(r"[\w+-][\w.+=,-]*")
_OWN = {"seed": "the list of seeds", "name": "the folder", "out": "the folder"}
"""Fields that the experiment sets itself, and from what."""

BudgetKind = Literal["tokens", "flops", "parameters", "seconds"]


class BudgetSpec(Section):
    """What every variant gets the same amount of."""

    kind: BudgetKind = Field(
        default="tokens",
        description="tokens: steps are set; flops: steps by the model's products; parameters: widths are set, and tokens are equal; "
        "seconds: steps by the measured speed.",
    )
    amount: float | None = Field(
        default=None, gt=0, description="How much: tokens, FLOPs, parameters or seconds; None: as much as the base."
    )
    active: bool = Field(
        default=False, description="parameters: count those that a token meets, not those of all experts."
    )

    @model_validator(mode="after")
    def _countable(self) -> BudgetSpec:
        if self.active and self.kind != "parameters":
            raise ValueError("active = true belongs to kind = parameters")
        return self


class RangeSpec(Section):
    """Random values of one field."""

    low: float
    high: float
    log: bool = Field(default=False, description="Uniform in the logarithm.")
    multiple_of: int | None = Field(default=None, ge=1, description="Whole numbers, rounded to a multiple of this.")

    @model_validator(mode="after")
    def _in_order(self) -> RangeSpec:
        if not self.low < self.high:
            raise ValueError(f"low = {self.low:g} is not below high = {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"log = true needs low > 0, not {self.low:g}")
        return self

    def draw(self, chance: np.random.Generator) -> float | int:
        """One value."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = float(chance.uniform(low, high))
        value = math.exp(value) if self.log else value
        if self.multiple_of is None:
            return float(f"{value:.4g}")
        return max(1, round(value / self.multiple_of)) * self.multiple_of


class SweepSpec(Section):
    """Variants by combination."""

    kind: Literal["grid", "random"] = Field(default="grid", description="All combinations, or draws.")
    samples: int = Field(default=8, ge=1, le=10_000, description="random: how many.")
    seed: int = Field(default=0, ge=0, description="random: of the draws.")
    fields: dict[str, Any] = Field(
        default={}, description="Field → list of values; random: also {low, high, log, multiple_of}."
    )


class RatesSpec(Section):
    """A small sweep of the learning rate for every variant: judged at another's best rate, a choice is judged unfairly."""

    factors: list[float] = Field(
        default=[0.5, 1.0, 2.0], min_length=2, description="Of all learning rates of the variant."
    )
    seeds: int = Field(default=1, ge=1, description="Runs per rate; the first so many of the seeds.")

    @model_validator(mode="after")
    def _distinct(self) -> RatesSpec:
        if min(self.factors) <= 0 or len(set(self.factors)) < len(self.factors):
            raise ValueError("factors must be positive and distinct")
        if 1.0 not in self.factors:
            raise ValueError("factors must hold 1.0, the recipe's own rate")
        return self


class ExperimentSpec(Section):
    """The file."""

    base: str = Field(
        description="Path of a recipe, from this file's folder; or a name from `scratchlm model list`."
    )
    question: str = Field(default="", description="What is asked; shown above the table.")
    seeds: int | list[int] = Field(default=3, description="How many, from 0 on; or which.")
    fields: dict[str, Any] = Field(default={}, description="Changes of the recipe for all runs.")
    variants: dict[str, dict[str, Any]] = Field(default={}, description="Name → fields that differ from the base.")
    reference: str = Field(default=BASE, description="The variant that the others are compared with.")
    without_base: bool = Field(default=False, description="Leave the recipe as it is out of the comparison.")
    budget: BudgetSpec = BudgetSpec()
    sweep: SweepSpec | None = None
    rates: RatesSpec | None = None
    target_bits_per_byte: float | None = Field(
        default=None, gt=0, description="Also show how many tokens it takes to get there."
    )

    @model_validator(mode="after")
    def _seeds(self) -> ExperimentSpec:
        chosen = self.chosen_seeds
        if not chosen or min(chosen) < 0 or len(set(chosen)) < len(chosen):
            raise ValueError(f"seeds = {self.seeds!r}: give a positive number, or distinct seeds from 0 on")
        if self.rates is not None and self.rates.seeds > len(chosen):
            raise ValueError(f"rates.seeds = {self.rates.seeds} of {len(chosen)} seeds")
        return self

    @property
    def chosen_seeds(self) -> list[int]:
        """The seeds themselves."""
        return list(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds


@dataclass(frozen=True)
class Variant:
    """A row of the comparison.

    Attributes:
        name: unique in the experiment.
        changes: dotted field → value, as in the file.
        recipe: the resolved recipe, before the budget and the seed.
    """

    name: str
    changes: dict[str, Any]
    recipe: Recipe


@dataclass(frozen=True)
class Experiment:
    """A spec with all its recipes built."""

    name: str
    spec: ExperimentSpec
    variants: tuple[Variant, ...]

    @property
    def reference(self) -> Variant:
        """The one that the others are compared with."""
        return next(one for one in self.variants if one.name == self.spec.reference)


def load_experiment(path: str | Path) -> Experiment:
    """Read a spec and build the recipe of every variant.

    Raises:
        UserError: what is wrong, with the nearest name for a misspelt field; nothing has run.
    """
    path = Path(path)
    spec = validate(ExperimentSpec, _read(path), str(path))
    base = spec.base
    recipe = load_recipe(path.parent / base) if base.endswith(".toml") else Recipe(model=presets.load(base))
    name = re.sub(r"[^\w.+-]+", "-", path.stem).strip(".-") or "experiment"
    shared = flattened(spec.fields, f"{path}: fields")
    recipe = changed(recipe, shared, f"{path}: fields")
    changes: dict[str, dict[str, Any]] = {} if spec.without_base else {BASE: {}}
    for variant, fields in spec.variants.items():
        _check_name(variant, path)
        if variant in changes:
            raise UserError(
                f"{path}: a variant is named {BASE!r}, which is the recipe as it is; choose another name"
            )
        changes[variant] = flattened(fields, f"{path}: variant {variant!r}")
    if spec.sweep is not None:
        for variant, fields in _swept(spec.sweep, f"{path}: sweep").items():
            if variant in changes:
                raise UserError(f"{path}: the sweep and the variants both have {variant!r}; rename the variant")
            changes[variant] = fields
    if spec.reference not in changes:
        raise UserError(
            f"{path}: reference = {spec.reference!r} is no variant; there are {', '.join(changes) or 'none'}"
        )
    if len(changes) < 2:
        raise UserError(f"{path}: nothing to compare; add [variants.<name>] or [sweep]")
    variants = tuple(
        Variant(variant, fields, changed(recipe, fields, f"{path}: variant {variant!r}"))
        for variant, fields in changes.items()
    )
    return Experiment(name, spec, variants)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"experiment {path} does not exist; recipes/experiments/ holds examples") from error
    except OSError as error:
        raise UserError(f"experiment {str(path)[:80]} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"experiment {path} is not valid TOML: {error}") from error


def _check_name(name: str, path: Path) -> None:
    if not _NAME.fullmatch(name) or len(name) > 80:
        raise UserError(f"{path}: variant {name[:80]!r} names folders: use letters, digits and . _ + - = ,")


def flattened(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Nested tables and dotted keys alike as dotted field → value.

    Raises:
        UserError: a field that no recipe has, or one that the experiment sets itself.
    """
    known = set(field_paths(Recipe))
    sections = {path.rsplit(".", 1)[0] for path in known if "." in path}
    found: dict[str, Any] = {}

    def walk(values: Mapping[str, Any], prefix: str) -> None:
        for key, value in values.items():
            path = prefix + key
            if path in sections and isinstance(value, Mapping):
                walk(value, f"{path}.")
            elif path in _OWN:
                raise UserError(f"{where}: {path} is set by {_OWN[path]}; leave it out")
            elif path != "model.preset" and (path not in known or path in sections):
                raise UserError(f"{where}: unknown field {path}{nearest_field(Recipe, path)}")
            elif path in found:
                raise UserError(f"{where}: {path} is given twice")
            else:
                found[path] = value

    walk(fields, "")
    return found


def changed(recipe: Recipe, changes: Mapping[str, Any], where: str) -> Recipe:
    """`recipe` with dotted fields replaced; ``model.preset`` first, in place of the whole model.

    Raises:
        UserError: a value that is not allowed, alone or beside the others.
    """
    values = plain(recipe)
    if "model.preset" in changes:
        try:
            values["model"] = presets.expand({"preset": changes["model.preset"]})
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    for path, value in changes.items():
        if path == "model.preset":
            continue
        *sections, leaf = path.split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        place[leaf] = value
    return validate(Recipe, values, where)


def _swept(sweep: SweepSpec, where: str) -> dict[str, dict[str, Any]]:
    """Name → fields of every point; names hold the values: ``lr=0.01,layers=4``."""
    given: dict[str, Any] = {}
    for path, values in flattened_lists(sweep.fields).items():
        flattened({path: None}, where)  # is there such a field
        if isinstance(values, Mapping) and sweep.kind == "random":
            given[path] = validate(RangeSpec, dict(values), f"{where}: {path}")
        elif isinstance(values, list) and values:
            given[path] = values
        else:
            raise UserError(f"{where}: {path} = {values!r}: give a list of values (random: or low and high)")
    if not given:
        raise UserError(f"{where}: no fields to sweep")
    points: list[dict[str, Any]]
    if sweep.kind == "grid":
        points = [dict(zip(given, values, strict=True)) for values in itertools.product(*given.values())]
    else:
        chance = np.random.default_rng(sweep.seed)
        points = [
            {
                path: values.draw(chance)
                if isinstance(values, RangeSpec)
                else values[int(chance.integers(len(values)))]
                for path, values in given.items()
            }
            for _ in range(sweep.samples)
        ]
    leaves = [path.rsplit(".", 1)[-1] for path in given]
    short = leaves if len(set(leaves)) == len(leaves) else list(given)
    named: dict[str, dict[str, Any]] = {}
    for point in points:  # equal draws are one point
        label = ",".join(f"{name}={_word(value)}" for name, value in zip(short, point.values(), strict=True))
        named[label] = point
    return named


def flattened_lists(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys; a table with ``low`` is a value."""
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, Mapping) and "low" not in value:
            flat |= flattened_lists(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _word(value: Any) -> str:
    """A value as part of a folder's name."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^\w.+-]+", "_", text).strip("_") or "none"
