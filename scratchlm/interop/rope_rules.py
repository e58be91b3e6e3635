"""Rules for rotary positions and for layers that differ: what config.json says about them in its several dialects.

Older files have ``rope_theta`` and ``rope_scaling``, newer ones (transformers 5) one ``rope_parameters`` with both, in some
families one per kind of layer. All are read; the older pair is written, which every version understands.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
_ALWAYS = ("type", "rope_type", "rope_theta", "partial_rotary_factor")


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """0.1 · mscale · ln(factor) + 1 (Peng et al. 2023, section 3.3, with DeepSeek's weight)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def read_scaling(config: Reading, given: Values, context: int, key: str = "rope_scaling") -> Values:
    """Our fields for one dictionary of RoPE settings.

    Args:
        config: for messages.
        given: the dictionary.
        context: the model's longest sequence.
        key: its name in the file.

    Raises:
        UserError: a kind of scaling, or an option of it, that no field expresses.
    """
    kind = given.get("rope_type", given.get("type", "default")) or "default"
    if kind not in _KEYS:
        raise config.wrong(f"{key}.rope_type", kind, f"known are {', '.join(_KEYS)}")
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
        "rope.truncate": bool(given.get("truncate", True)),
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


def one_rope(config: Reading) -> Values:
    """The settings of a file in which all layers have the same, from whichever keys it uses."""
    new, old = config.get("rope_parameters", default=None), config.get("rope_scaling", default=None)
    for key, value in (("rope_parameters", new), ("rope_scaling", old)):
        if value is not None and not isinstance(value, dict):
            raise config.wrong(key, value, "an object is needed")
    return dict(new or old or {})


@dataclass(frozen=True)
class Rope:
    """Rotary positions, the same in every layer.

    Attributes:
        theta: what an absent ``rope_theta`` stands for.
        fraction: the key of the rotated share, if the family has one.
        fraction_default: what it stands for when absent.
        pairs: which dimensions form a pair.
        theta_key: the key of θ in older files, such as ``rotary_emb_base``.
    """

    theta: float = 10_000.0
    fraction: str | None = None
    fraction_default: float = 1.0
    pairs: str = "half"
    theta_key: str = "rope_theta"

    def fields(self) -> Sequence[str]:
        return (
            "position",
            "rope.theta",
            "rope.scaling",
            "rope.pairs",
            *(["rope.fraction"] if self.fraction else []),
        )

    def read(self, config: Reading) -> Values:
        given = one_rope(config)
        own_theta = config.get(self.theta_key, "rope_theta", default=self.theta)
        theta = given.get("rope_theta")
        fields = {
            "position": ("rope",),
            "rope.theta": (float(own_theta if theta is None else theta),),
            "rope.pairs": self.pairs,
        }
        share = given.get("partial_rotary_factor")
        if self.fraction:
            own = config.get(self.fraction, default=self.fraction_default)
            fields["rope.fraction"] = own if share is None else share
        elif share not in (None, 1, 1.0):
            raise config.wrong("rope_parameters.partial_rotary_factor", share, "the whole head is rotated")
        context = config.whole("max_position_embeddings", "n_positions", default=2048)
        return fields | read_scaling(config, given, context)

    def write(self, model: ModelConfig) -> Values:
        if len(set(model.rope.theta)) > 1:
            raise Inexpressible("rope.theta")
        if len(set(model.rope.scaling)) > 1:
            raise Inexpressible("rope.scaling")
        written: Values = {self.theta_key: model.rope.theta[0]}
        scaling = write_scaling(model, model.rope.scaling[0])
        if scaling is not None:
            written["rope_scaling"] = scaling
        if self.fraction:
            written[self.fraction] = model.rope.fraction
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
        if kind not in LAYER_TYPES:
            raise config.wrong("layer_types", kind, f"known are {', '.join(LAYER_TYPES)}")
    return types


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

    def read(self, config: Reading) -> Values:
        absent = self.default if self.theirs not in config.values else None
        window = config.get(self.theirs, default=absent)
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

    def read(self, config: Reading) -> Values:
        layers = config.whole("num_hidden_layers")
        pattern: tuple[str, ...] = self.pattern
        if self.pattern_key:
            length = config.get(self.pattern_key, f"_{self.pattern_key}", default=self.pattern_default)
            if length:
                pattern = ("sliding_attention",) * (length - 1) + ("full_attention",)
        absent = [pattern[layer % len(pattern)] for layer in range(layers)]
        masks = [LAYER_TYPES[kind] for kind in read_layer_types(config, absent, layers)]
        window = config.get("sliding_window", default=self.window)
        fields: Values = {"mask": shortest_pattern(masks) or ("causal",)}
        return fields | ({"window": window} if "sliding_window" in masks else {})

    def write(self, model: ModelConfig) -> Values:
        types = write_layer_types(model)
        window: Any = model.window if "sliding_attention" in types else self.window
        return {"layer_types": types, "sliding_window": window}
