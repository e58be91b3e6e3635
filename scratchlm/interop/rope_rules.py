"""Rules for rotary positions and for layers that differ: what config.json says about them in its several dialects.

Older files have ``rope_theta`` and ``rope_scaling``, newer ones (transformers 5) one ``rope_parameters`` with both, in some
families one per kind of layer. All are read; the older pair is written, which every version understands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from scratchlm.errors import UserError
from scratchlm.interop.rules import Inexpressible, Reading, Values, per_layer, shortest_pattern
from scratchlm.model.config import ModelConfig

_SCALED = ("linear", "yarn", "llama3")
_KEYS = {
    "default": (),
    "linear": ("factor",),
    "yarn": (
        *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "mscale"),
        *("mscale_all_dim", "truncate"),
    ),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
_NAMES = ("type", "rope_type")
_ALWAYS = (*_NAMES, "rope_theta", "partial_rotary_factor")
_KNOWN = {*_ALWAYS, *(name for names in _KEYS.values() for name in names)}


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """0.1 · mscale · ln(factor) + 1 (Peng et al. 2023, section 3.3, with DeepSeek's weight)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def read_scaling(config: Reading, given: Values, context: int, key: str = "rope_scaling") -> Values:
    """Our fields for one dictionary of RoPE settings.

    Args:
        config: for messages.
        given: the dictionary, as :func:`settings_of` checked it.
        context: the model's longest sequence.
        key: its name in the file.

    Raises:
        UserError: an option that this kind of scaling does not read.
    """
    kind = given.get("rope_type", given.get("type", "default")) or "default"
    spare = sorted(
        name for name, value in given.items() if value is not None and name not in (*_KEYS[kind], *_ALWAYS)
    )
    if kind == "default" and spare == ["factor"] and given["factor"] == 1:
        spare = []
    spare = [name for name in spare if name != "original_max_position_embeddings" or kind != "linear"]
    if spare:
        raise config.wrong(f"{key}.{spare[0]}", given[spare[0]], f"rope_type {kind} does not read it")
    if kind == "default":
        return {}
    fields: Values = {"rope.scaling": (kind,)}
    original = given.get("original_max_position_embeddings")
    factor = given.get("factor")
    if factor is None:
        if original is None:
            raise UserError(f"{config.where}: {key} has no factor, which rope_type {kind} needs")
        if original <= 0:
            raise config.wrong(f"{key}.original_max_position_embeddings", original, "it must be positive")
        factor = context / original
    fields["rope.factor"] = factor
    if kind == "linear":
        return fields
    fields["rope.original_context"] = original or context
    if kind == "llama3":
        return fields | {
            "rope.low_freq_factor": given.get("low_freq_factor", 1.0),
            "rope.high_freq_factor": given.get("high_freq_factor", 4.0),
        }
    fields |= {
        "rope.beta_fast": given.get("beta_fast") or 32.0,
        "rope.beta_slow": given.get("beta_slow") or 1.0,
        "rope.truncate": given.get("truncate", True),
    }
    stretched = given.get("attention_factor")
    if stretched is None:
        one, all_dims = given.get("mscale"), given.get("mscale_all_dim")
        stretched = yarn_mscale(factor)
        if one and all_dims:
            stretched = yarn_mscale(factor, one) / yarn_mscale(factor, all_dims)
    return fields | {"rope.attention_factor": stretched}


def write_scaling(model: ModelConfig, kind: str) -> Values | None:
    """The dictionary of one kind of scaling; None: not scaled.

    Raises:
        Inexpressible: a kind that config.json has no name for.
    """
    rope = model.rope
    if kind == "none":
        return None
    if kind not in _SCALED:
        raise Inexpressible("rope.scaling")
    given: Values = {"rope_type": kind, "factor": rope.factor}
    original: float = rope.original_context or model.context_length / rope.factor
    if kind != "linear" and original != int(original):
        raise Inexpressible("rope.original_context")
    if kind != "linear":
        given["original_max_position_embeddings"] = int(original)
    if kind == "llama3":
        given |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if kind == "yarn":
        factor = yarn_mscale(rope.factor) if rope.attention_factor is None else rope.attention_factor
        given |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "attention_factor": factor}
        if not rope.truncate:
            given["truncate"] = False
    return given


def settings_of(config: Reading, key: str, given: Any) -> Values:
    """One dictionary of RoPE settings without its nulls, every value of its type; absent: empty.

    Args:
        config: for messages.
        key: its name in the file, for messages.
        given: what stands there.

    Raises:
        UserError: it is none, or of a kind that no field expresses, or has an option that no kind has, or a value of
            another type.
    """
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise config.wrong(key, given, "an object is needed")
    kind = given.get("rope_type", given.get("type")) or "default"
    if not isinstance(kind, str) or kind not in _KEYS:
        raise config.wrong(f"{key}.rope_type", kind, f"known are {', '.join(_KEYS)}")
    checked: Values = {}
    for name, value in given.items():
        if value is None:
            continue
        if name not in _KNOWN:
            raise config.wrong(f"{key}.{name[:60]}", value, "the option is not known here")
        if name in _NAMES and not isinstance(value, str):
            raise config.wrong(f"{key}.{name}", value, "a name is needed")
        if name == "truncate":
            value = config.as_flag(f"{key}.{name}", value)
        elif name not in _NAMES:
            config.as_number(f"{key}.{name}", value)
        checked[name] = value
    return checked


def one_rope(config: Reading) -> Values:
    """The settings of a file in which all layers have the same: ``rope_scaling`` where there are both, as transformers 5 has it."""
    new, old = (
        settings_of(config, key, config.get(key, default=None)) for key in ("rope_parameters", "rope_scaling")
    )
    return old or new


@dataclass(frozen=True)
class Rope:
    """Rotary positions, the same in every layer.

    Attributes:
        theta: what an absent ``rope_theta`` stands for.
        fraction: the key of the rotated share, if the family has one.
        fraction_default: what it stands for when absent.
        pairs: which dimensions form a pair.
        theta_key: the key of θ in older files, such as ``rotary_emb_base``.
        kinds: which kinds of scaling the family has.
    """

    theta: float = 10_000.0
    fraction: str | None = None
    fraction_default: float = 1.0
    pairs: str = "half"
    theta_key: str = "rope_theta"
    kinds: tuple[str, ...] = _SCALED

    def fields(self) -> Sequence[str]:
        return (
            "position",
            "rope.theta",
            "rope.scaling",
            "rope.pairs",
            *(["rope.fraction"] if self.fraction else []),
        )

    def said(self) -> dict[str, str]:
        """Field → the values it may have, in words."""
        return {"position": "rope", "rope.scaling": ", ".join(("none", *_SCALED)), "rope.pairs": self.pairs}

    def read(self, config: Reading) -> Values:
        given = one_rope(config)
        own_theta = config.number(self.theta_key, "rope_theta", default=self.theta)
        theta = given.get("rope_theta")
        fields: Values = {
            "position": ("rope",),
            "rope.theta": (float(own_theta if theta is None else theta),),
            "rope.pairs": self.pairs,
        }
        share = given.get("partial_rotary_factor")
        if self.fraction:
            own = config.number(self.fraction, default=self.fraction_default)
            fields["rope.fraction"] = own if share is None else share
        elif share not in (None, 1, 1.0):
            raise config.wrong("rope_parameters.partial_rotary_factor", share, "the whole head is rotated")
        context = config.whole("max_position_embeddings", "n_positions", default=2048)
        scaled = read_scaling(config, given, context)
        if scaled and scaled["rope.scaling"][0] not in self.kinds:
            raise config.wrong(
                "rope_scaling.rope_type", scaled["rope.scaling"][0], "the family has no such scaling"
            )
        return fields | scaled

    def write(self, model: ModelConfig) -> Values:
        if len(set(model.rope.theta)) > 1:
            raise Inexpressible("rope.theta")
        if len(set(model.rope.scaling)) > 1 or model.rope.scaling[0] not in ("none", *self.kinds):
            raise Inexpressible("rope.scaling")
        written: Values = {self.theta_key: model.rope.theta[0]}
        scaling = write_scaling(model, model.rope.scaling[0])
        if scaling is not None:
            written["rope_scaling"] = scaling
        if self.fraction:
            share, width = model.rope.fraction, model.resolved_head_dim
            cut_short = int(width * share) < model.rotated_dims  # 44 · (30 / 44) is a little less than 30
            written[self.fraction] = (model.rotated_dims + 0.5) / width if cut_short else share
        return written


LAYER_TYPES = {"sliding_attention": "sliding_window", "full_attention": "causal"}


def read_layer_types(config: Reading, default: Sequence[str], layers: int) -> list[str]:
    """The kinds of all layers, ``full_attention`` or ``sliding_attention`` each.

    Raises:
        UserError: another kind, or another number of them.
    """
    types = config.get("layer_types", default=list(default))
    if not isinstance(types, list) or len(types) != layers:
        raise config.wrong("layer_types", types, f"a list of {layers} is needed, one per layer")
    for kind in types:
        if not isinstance(kind, str) or kind not in LAYER_TYPES:
            raise config.wrong("layer_types", kind, f"known are {', '.join(LAYER_TYPES)}")
    return types


def unless_null(key: str, absent: Any, null: Any = None) -> Callable[[Reading], Any]:
    """A default for a key whose null means something else than its absence."""
    return lambda config: null if key in config.values else absent


def read_window(config: Reading, absent: int | None, key: str = "sliding_window") -> int | None:
    """The window of a file; `absent` where the key is not there, None where it is null."""
    window = config.get(key, default=unless_null(key, absent))
    return None if window is None else config.as_whole(key, window)


def masks_of(config: Reading, types: Sequence[str], window: int | None) -> Values:
    """Our masks for the kinds of all layers.

    Raises:
        UserError: there are sliding layers and no window.
    """
    masks = [LAYER_TYPES[kind] for kind in types]
    if "sliding_window" not in masks:
        return {"mask": ("causal",)}
    if window is None:
        raise config.wrong("sliding_window", None, "layer_types has sliding_attention, which needs one")
    return {"mask": shortest_pattern(masks), "window": window}


def write_layer_types(model: ModelConfig) -> list[str]:
    """The list for config.json.

    Raises:
        Inexpressible: another mask than these two.
    """
    names = {ours: theirs for theirs, ours in LAYER_TYPES.items()}
    masks = per_layer(model, "mask")
    if set(masks) - set(names):
        raise Inexpressible("mask")
    return [names[mask] for mask in masks]


@dataclass(frozen=True)
class Window:
    """One window for all layers, or none: Mistral's ``sliding_window``."""

    theirs: str = "sliding_window"
    default: int | None = None

    def fields(self) -> Sequence[str]:
        return ("mask", "window")

    def said(self) -> dict[str, str]:
        """Field → the values it may have, in words."""
        return {"mask": "causal, sliding_window (in all layers)"}

    def read(self, config: Reading) -> Values:
        window = read_window(config, self.default, self.theirs)
        return {} if window is None else {"mask": ("sliding_window",), "window": window}

    def write(self, model: ModelConfig) -> Values:
        kinds = set(per_layer(model, "mask"))
        if kinds - {"causal"} and kinds != {"sliding_window"}:
            raise Inexpressible("mask")
        return {self.theirs: model.window if kinds == {"sliding_window"} else None}


@dataclass(frozen=True)
class LayerTypes:
    """``layer_types`` beside ``sliding_window``.

    Attributes:
        pattern: what an absent list stands for, repeated, such as ``("sliding_attention", "full_attention")``.
        window: what an absent ``sliding_window`` stands for.
        pattern_key: an older key with the length n of a pattern whose last layer is full.
        pattern_default: n where that key is absent; None: `pattern`.
    """

    pattern: tuple[str, ...] = ("full_attention",)
    window: int = 4096
    pattern_key: str | None = None
    pattern_default: int | None = None

    def fields(self) -> Sequence[str]:
        return ("mask", "window")

    def said(self) -> dict[str, str]:
        """Field → the values it may have, in words."""
        return {"mask": "causal, sliding_window"}

    def read(self, config: Reading) -> Values:
        layers = config.whole("num_hidden_layers")
        absent = [self.pattern[layer % len(self.pattern)] for layer in range(layers)]
        if self.pattern_key:
            length = config.whole(self.pattern_key, f"_{self.pattern_key}", default=self.pattern_default)
            if length < 1:
                raise config.wrong(self.pattern_key, length, "a number from 1 on is needed")
            absent = ["sliding_attention" if (layer + 1) % length else "full_attention" for layer in range(layers)]
        types = read_layer_types(config, absent, layers)
        return masks_of(config, types, read_window(config, self.window))

    def write(self, model: ModelConfig) -> Values:
        types = write_layer_types(model)
        window: Any = model.window if "sliding_attention" in types else self.window
        return {"layer_types": types, "sliding_window": window}


@dataclass(frozen=True)
class RopeByKind:
    """Rotary positions of their own for sliding layers and for full ones (Gemma 3, OLMo 3).

    ::

        older    rope_theta, rope_scaling: full layers      rope_local_base_freq: sliding layers, never scaled
        newer    rope_parameters = {"full_attention": {…}, "sliding_attention": {…}}

    Both are written: each version reads its own.

    Attributes:
        layers: the family's rule for the kinds of its layers.
        theta, local_theta: what an absent θ stands for in full and in sliding layers; `local_theta` None: that of full layers.
        local_key: the key of the sliding layers' θ in older files; None: they share ``rope_theta``.
    """

    layers: LayerTypes
    theta: float
    local_theta: float | None = None
    local_key: str | None = None

    def fields(self) -> Sequence[str]:
        return ("position", "rope.theta", "rope.scaling", "rope.pairs")

    def said(self) -> dict[str, str]:
        """Field → the values it may have, in words."""
        return {"position": "rope", "rope.scaling": ", ".join(("none", *_SCALED)), "rope.pairs": "half"}

    def read(self, config: Reading) -> Values:
        pattern: tuple[str, ...] = self.layers.read(config)["mask"]
        masks = [pattern[layer % len(pattern)] for layer in range(max(1, config.whole("num_hidden_layers")))]
        full, sliding = self._settings(config)
        theta = config.number("rope_theta", default=self.theta)
        local = theta if self.local_theta is None else self.local_theta
        if self.local_key:
            local = config.number(self.local_key, default=local)
        thetas = {"causal": full.get("rope_theta", theta), "sliding_window": sliding.get("rope_theta", local)}
        context = config.whole("max_position_embeddings", default=131_072)
        kinds, fields = {}, dict[str, Any]()
        for mask, given in (("causal", full), ("sliding_window", sliding)):
            if mask not in masks:
                continue
            if given.get("partial_rotary_factor") not in (None, 1, 1.0):
                raise config.wrong(
                    "partial_rotary_factor", given["partial_rotary_factor"], "the whole head is rotated"
                )
            scaled = read_scaling(config, given, context)
            kinds[mask] = scaled.pop("rope.scaling", ("none",))[0]
            if any(fields.get(name, value) != value for name, value in scaled.items()):
                raise config.wrong("rope_parameters", given, "all scaled layers need the same settings")
            fields |= scaled
        return fields | {
            "position": ("rope",),
            "rope.pairs": "half",
            "rope.theta": shortest_pattern([float(thetas[mask]) for mask in masks]),
            "rope.scaling": shortest_pattern([kinds[mask] for mask in masks]),
        }

    def _settings(self, config: Reading) -> tuple[Values, Values]:
        """The dictionaries of full and of sliding layers; ``rope_scaling`` goes over the former, as in transformers 5."""
        new, old = config.get("rope_parameters", default={}), config.get("rope_scaling", default=None)
        if not isinstance(new, dict) or set(new) - set(LAYER_TYPES):
            raise config.wrong("rope_parameters", new, f"one object each is needed for {', '.join(LAYER_TYPES)}")
        full, sliding = (
            settings_of(config, f"rope_parameters.{kind}", new.get(kind))
            for kind in ("full_attention", "sliding_attention")
        )
        return full | settings_of(config, "rope_scaling", old), sliding

    def write(self, model: ModelConfig) -> Values:
        layers = list(
            zip(*(per_layer(model, name) for name in ("mask", "rope.theta", "rope.scaling")), strict=True)
        )
        local = self.theta if self.local_theta is None else self.local_theta
        found: dict[str, Values] = {}
        for kind, sliding in (("full_attention", False), ("sliding_attention", True)):
            own = [layer for layer in layers if (layer[0] == "sliding_window") == sliding]
            thetas, kinds = {theta for _, theta, _ in own}, {scaling for _, _, scaling in own}
            for name, values in (("rope.theta", thetas), ("rope.scaling", kinds)):
                if len(values) > 1:
                    raise Inexpressible(name)
            scaling = write_scaling(model, kinds.pop()) if kinds else None
            theta = thetas.pop() if thetas else (local if sliding else self.theta)
            found[kind] = {**(scaling or {"rope_type": "default"}), "rope_theta": theta}
        full, sliding_theta = found["full_attention"], found["sliding_attention"]["rope_theta"]
        written: Values = {"rope_theta": full["rope_theta"], "rope_parameters": found}
        if full["rope_type"] != "default":
            written["rope_scaling"] = {name: value for name, value in full.items() if name != "rope_theta"}
        return written | ({self.local_key: sliding_theta} if self.local_key else {})
