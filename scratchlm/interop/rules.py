"""Rules between a family's config.json and our fields, each declared once and used in both directions.

    config.json ── read ──► fields of ModelConfig          an unknown key, or a value no field has, is an error
    config.json ◄── write ── ModelConfig                   what a rule cannot write is named by its field

Fields are dotted: ``moe.top_k``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from scratchlm.errors import UserError
from scratchlm.model.config import ModelConfig

Values = dict[str, Any]

MISSING: Any = object()

LARGEST = 1e30
"""No number of a config.json is larger; Python's whole numbers have no limit, and floats do."""

MOST_LAYERS = 10_000
"""What :class:`~scratchlm.model.config.ModelConfig` allows."""


class Inexpressible(Exception):
    """A field's value has no place in the family's config.json; the message is the field's dotted name."""


class Reading:
    """A config.json being read: it remembers which keys somebody asked for.

    Args:
        values: the file's content.
        where: the file, for messages.
        family: the family's name, for messages.
    """

    def __init__(self, values: Mapping[str, Any], where: str, family: str) -> None:
        self.values, self.where, self.family = values, where, family
        self.asked: set[str] = set()

    def get(self, *keys: str, default: Any = MISSING) -> Any:
        """The value of the first of `keys` that is there; null counts as absent.

        Raises:
            UserError: none is there and no default is given.
        """
        self.asked.update(keys)
        for key in keys:
            if self.values.get(key) is not None:
                return self.values[key]
        if default is MISSING:
            raise UserError(
                f"{self.where} has no {keys[0]}, which a model of family {self.family} needs; take the whole folder"
            )
        return default(self) if callable(default) else default

    def whole(self, *keys: str, default: Any = MISSING) -> int:
        """As :meth:`get`, a whole number."""
        return self.as_whole(self._named(*keys), self.get(*keys, default=default))

    def number(self, *keys: str, default: Any = MISSING) -> float:
        """As :meth:`get`, a finite number."""
        return self.as_number(self._named(*keys), self.get(*keys, default=default))

    def flag(self, *keys: str, default: Any = MISSING) -> bool:
        """As :meth:`get`, true or false."""
        return self.as_flag(self._named(*keys), self.get(*keys, default=default))

    def _named(self, *keys: str) -> str:
        """That of `keys` which :meth:`get` takes, for messages."""
        return next((key for key in keys if self.values.get(key) is not None), keys[0])

    def as_whole(self, key: str, value: Any) -> int:
        """`value`, if it is a whole number of at most :data:`LARGEST`."""
        if type(value) is not int:
            raise self.wrong(key, value, "a whole number is needed")
        if abs(value) > LARGEST:
            raise self.wrong(key, value, "the number is too large")
        return value

    def as_number(self, key: str, value: Any) -> float:
        """`value`, if it is a number of at most :data:`LARGEST`; true is none."""
        if type(value) not in (int, float) or value != value:
            raise self.wrong(key, value, "a number is needed")
        if abs(value) > LARGEST:
            raise self.wrong(key, value, "the number is too large")
        return value

    def as_flag(self, key: str, value: Any) -> bool:
        """`value`, if it is true or false, or 1 or 0."""
        if type(value) not in (bool, int) or value not in (0, 1):
            raise self.wrong(key, value, "true or false is needed")
        return bool(value)

    def layers(self) -> None:
        """See that there are no more layers than a model may have, before a rule lists them.

        Raises:
            UserError: there are, or their number is none.
        """
        for key in ("num_hidden_layers", "num_layers", "n_layer", "n_layers"):
            value = self.values.get(key)
            if value is not None and not 0 <= self.as_whole(key, value) <= MOST_LAYERS:
                raise self.wrong(key, value, f"a number from 0 to {MOST_LAYERS} is needed")

    def wrong(self, key: str, value: Any, what: str) -> UserError:
        """The error for a value that we do not express."""
        huge = type(value) is int and abs(value) > LARGEST  # Python does not print the largest of them
        shown = f"a whole number of {value.bit_length()} bits" if huge else repr(value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        return UserError(f"{self.where}: {key} = {shown} of family {self.family} is not supported: {what}")

    def unknown(self) -> list[str]:
        """Keys with a value that nobody asked for."""
        return sorted(key for key, value in self.values.items() if key not in self.asked and value is not None)


class Rule(Protocol):
    """One correspondence."""

    def fields(self) -> Sequence[str]:
        """The dotted fields it speaks of, for the matrix in the documentation."""
        ...

    def read(self, config: Reading) -> Values:
        """Dotted fields and their values."""
        ...

    def write(self, model: ModelConfig) -> Values:
        """Keys of config.json and their values.

        Raises:
            Inexpressible: a field's value has no place there.
        """
        ...


_RESOLVED: dict[str, Callable[[ModelConfig], Any]] = {
    "kv_heads": lambda c: c.resolved_kv_heads,
    "head_dim": lambda c: c.resolved_head_dim,
    "d_ff": lambda c: c.resolved_d_ff,
    "final_norm": lambda c: c.resolved_final_norm,
    "latent.value_dim": lambda c: c.resolved_value_dim,
    "moe.d_expert": lambda c: c.resolved_d_expert,
    "moe.experts": lambda c: c.n_experts,
    "moe.top_k": lambda c: c.active_experts,
}


def value_of(model: ModelConfig, field: str) -> Any:
    """A field's value by its dotted name, what None stands for where the configuration resolves it."""
    if field in _RESOLVED:
        return _RESOLVED[field](model)
    value: Any = model
    for name in field.split("."):
        value = getattr(value, name)
    return value


@dataclass(frozen=True)
class Key:
    """A key that is a field under another name: a number, or true or false where that is its default.

    Attributes:
        theirs, ours: the names.
        default: what an absent key stands for (a value, or a function of the :class:`Reading`); none: it is required.
        also: other names under which older or newer files have it.
        optional: null and None are a value of their own.
    """

    theirs: str
    ours: str
    default: Any = MISSING
    also: tuple[str, ...] = ()

    def fields(self) -> Sequence[str]:
        return (self.ours,)

    def read(self, config: Reading) -> Values:
        value = config.get(self.theirs, *self.also, default=self.default)
        if isinstance(self.default, bool):
            config.as_flag(self.theirs, value)
        elif value is not None:
            config.as_number(self.theirs, value)
        return {self.ours: value}

    def write(self, model: ModelConfig) -> Values:
        value = value_of(model, self.ours)
        return {self.theirs: list(value) if isinstance(value, tuple) else value}


@dataclass(frozen=True)
class Choice:
    """A key whose values have other names with us: theirs → ours. Of several names for one value the first is written."""

    theirs: str
    ours: str
    names: Mapping[Any, Any]
    default: Any = MISSING
    also: tuple[str, ...] = ()

    def fields(self) -> Sequence[str]:
        return (self.ours,)

    def read(self, config: Reading) -> Values:
        value = config.get(self.theirs, *self.also, default=self.default)
        if not isinstance(value, str | int | float | bool) or value not in self.names:
            raise config.wrong(self.theirs, value, f"known are {', '.join(map(str, self.names))}")
        return {self.ours: self.names[value]}

    def write(self, model: ModelConfig) -> Values:
        value = value_of(model, self.ours)
        for theirs, ours in self.names.items():
            if ours == value:
                return {self.theirs: theirs}
        raise Inexpressible(self.ours)


class Always:
    """Fields that have one value in the whole family, such as ``Always(norm="rmsnorm")``; dots are double underscores."""

    def __init__(self, **fields: Any) -> None:
        self.values = {name.replace("__", "."): value for name, value in fields.items()}

    def fields(self) -> Sequence[str]:
        return list(self.values)

    def read(self, config: Reading) -> Values:
        return dict(self.values)

    def write(self, model: ModelConfig) -> Values:
        return {}


@dataclass(frozen=True)
class Only:
    """A key that may have one value alone (`value`, or absent): any other changes the function in a way we have no field for.

    Attributes:
        written: whether it is written.
        accepted: further values that mean the same.
    """

    theirs: str
    value: Any
    written: bool = True
    accepted: tuple[Any, ...] = ()

    def fields(self) -> Sequence[str]:
        return ()

    def read(self, config: Reading) -> Values:
        value = config.get(self.theirs, default=None)
        if value is not None and value != self.value and value not in self.accepted:
            raise config.wrong(self.theirs, value, f"only {self.value!r} is")
        return {}

    def write(self, model: ModelConfig) -> Values:
        return {self.theirs: self.value} if self.written else {}


class Harmless:
    """Keys that do not change what the model computes from token ids."""

    def __init__(self, *keys: str) -> None:
        self.keys = keys

    def fields(self) -> Sequence[str]:
        return ()

    def read(self, config: Reading) -> Values:
        config.asked.update(self.keys)
        return {}

    def write(self, model: ModelConfig) -> Values:
        return {}


@dataclass(frozen=True)
class Custom:
    """Two functions, where a sentence of its own is needed.

    Attributes:
        ours: the dotted fields it sets.
        reader: :class:`Reading` → fields.
        writer: configuration → keys; may raise :class:`Inexpressible`.
    """

    ours: tuple[str, ...]
    reader: Callable[[Reading], Values]
    writer: Callable[[ModelConfig], Values]

    def fields(self) -> Sequence[str]:
        return self.ours

    def read(self, config: Reading) -> Values:
        return self.reader(config)

    def write(self, model: ModelConfig) -> Values:
        return self.writer(model)


@dataclass(frozen=True)
class Biases:
    """A boolean key: whether the projections named have biases; `feedforward` with it where one key switches both.

    Attributes:
        theirs: the key.
        projections: of ``q k v o``.
        default: what an absent key stands for.
        always: projections that have a bias whatever the key says.
        feedforward: the key switches the feed-forward's biases as well.
    """

    theirs: str
    projections: str = "qkvo"
    default: bool = False
    always: str = ""
    feedforward: bool = False

    def fields(self) -> Sequence[str]:
        return ("attention_bias", "feedforward_bias") if self.feedforward else ("attention_bias",)

    def said(self) -> dict[str, str]:
        """Field → the values it may have, in words."""
        both = " or ".join(" ".join(self._names(on)) or "none" for on in (False, True))
        return {"attention_bias": both, "feedforward_bias": "no or yes"}

    def _names(self, on: bool) -> tuple[str, ...]:
        return tuple(name for name in "qkvo" if name in self.always or (on and name in self.projections))

    def read(self, config: Reading) -> Values:
        on = config.flag(self.theirs, default=self.default)
        return {"attention_bias": self._names(on)} | ({"feedforward_bias": on} if self.feedforward else {})

    def write(self, model: ModelConfig) -> Values:
        for on in (True, False):
            if set(self._names(on)) == set(model.attention_bias):
                return {self.theirs: on}
        raise Inexpressible("attention_bias")


def shortest_pattern(values: Sequence[Any]) -> tuple[Any, ...]:
    """The shortest pattern that gives `values` when it is repeated: (a, b, a, b) is (a, b)."""
    for length in range(1, len(values) + 1):
        if values[length:] == values[: len(values) - length]:
            return tuple(values[:length])
    return tuple(values)


def per_layer(model: ModelConfig, field: str) -> list[Any]:
    """The values of a pattern field, layer by layer."""
    pattern = value_of(model, field)
    return [pattern[layer % len(pattern)] for layer in range(model.layers)]


EVERYONES = Harmless(
    *(
        "architectures",
        "auto_map",
        "bos_token_id",
        "custom_pipelines",
        "dtype",
        "eos_token_id",
        "gradient_checkpointing",
    ),
    *(
        "id2label",
        "initializer_range",
        "label2id",
        "model_max_length",
        "model_type",
        "name_or_path",
        "_name_or_path",
    ),
    *("_attn_implementation", "_attn_implementation_internal", "attn_implementation", "output_attentions"),
    *(
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "problem_type",
        "quantization_config",
        "return_dict",
        "sep_token_id",
    ),
    *("tokenizer_class", "torch_dtype", "torchscript", "transformers_version", "unk_token_id", "use_bfloat16"),
    *(
        "use_cache",
        "use_return_dict",
        "decoder_start_token_id",
        "chunk_size_feed_forward",
        "finetuning_task",
        "prefix",
    ),
    *(
        "task_specific_params",
        "cls_token_id",
        "mask_token_id",
        "is_decoder",
        "max_length",
        "min_length",
        "do_sample",
    ),
    *("temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size"),
    *("encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "num_beams", "num_beam_groups"),
    *("diversity_penalty", "early_stopping", "output_scores", "return_dict_in_generate", "forced_bos_token_id"),
    *("forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens"),
    *("begin_suppress_tokens", "tf_legacy_loss", "pruned_heads", "tie_encoder_decoder", "n_ctx"),
    *(
        "cross_attention_hidden_size",
        "pretraining_tp",
        "base_model_tp_plan",
        "base_model_pp_plan",
        "classifier_dropout",
    ),
)
"""What any config.json may hold: names, token ids, outputs that are asked for, and how text is generated."""

EVERYONES_ONLY = (
    Only("is_encoder_decoder", False, written=False),
    Only("add_cross_attention", False, written=False),
)
