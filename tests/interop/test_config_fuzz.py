"""A config.json with a value of another type or size ends in a model or in one line that a person can act on."""

from __future__ import annotations

import copy
import random
import time
from typing import Any

import pytest
from all_cases import CASES
from transformers_oracle import transformers

from scratchlm.errors import UserError
from scratchlm.interop.family import families, family_of
from scratchlm.model.config import ModelConfig

BAD: list[Any] = [
    *(None, True, "x", [], {}, -1, 0, 0.5, 10**12, 10**400, float("nan"), float("inf"), [1], {"a": 1}),
    *("a\nb" * 300, [[]], 10**5000, 1e308, 10_000),
]
WHOLLY = ("llama", "deepseek_v3", "gemma3_text", "falcon")
SAMPLED = 150
MORE_KEYS = (
    *(
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "rope_local_base_freq",
        "layer_types",
        "quantization_config",
    ),
    *("sliding_window", "_sliding_window_pattern", "sliding_window_pattern", "max_window_layers", "attention_bias"),
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "tie_word_embeddings", "head_dim", "rotary_dim"),
)
"""Keys of older files, which transformers does not write."""


def config_of(model_type: str, seed: int = 0) -> dict[str, Any]:
    case = next(case for case in CASES if case.model_type == model_type)
    return transformers.AutoConfig.for_model(model_type, **case.draw(random.Random(seed))).to_dict()


def ends_well(values: dict[str, Any], model_type: str, what: str) -> str:
    """The error's line, or nothing."""
    began = time.perf_counter()
    try:
        config, line = family_of(model_type, "").read(values, "config.json"), ""
        assert isinstance(config, ModelConfig), what
    except UserError as error:
        line = str(error)
        assert line and len(line) < 400 and len(line.splitlines()) == 1, (what, line)
    assert time.perf_counter() - began < 2, what
    return line


def read(model_type: str, **changed: Any) -> ModelConfig:
    values = {key: value for key, value in (config_of(model_type) | changed).items() if value is not ...}
    return family_of(model_type, "").read(values, "config.json")


@pytest.mark.parametrize("model_type", families())
def test_every_bad_value_ends_in_a_model_or_in_one_line(model_type: str) -> None:
    values = config_of(model_type)
    assert not ends_well(values, model_type, "as drawn")
    pairs = [(key, bad) for key in sorted({*values, *MORE_KEYS}) for bad in BAD]
    if model_type not in WHOLLY:
        pairs = random.Random(model_type).sample(pairs, SAMPLED)
    refused = 0
    for key, bad in pairs:
        line = ends_well({**values, key: copy.deepcopy(bad)}, model_type, f"{key} = {type(bad)!s}")
        assert "makes no sense" not in line, (key, line)  # a rule says what it needs; that is the last resort
        refused += bool(line)
    assert refused > len(pairs) // 5


ROPE_KEYS = (
    *("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings"),
    *("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate", "low_freq_factor"),
    *("high_freq_factor", "short_factor"),
)


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3", "gemma3_text", "gpt_oss", "glm"])
@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_bad_settings_of_rotary_positions(model_type: str, kind: str) -> None:
    values = config_of(model_type)
    values.pop("rope_parameters", None)
    for key in ROPE_KEYS:
        for bad in BAD:
            scaling = {"rope_type": kind, "factor": 4.0, "original_max_position_embeddings": 8, key: bad}
            for name, given in (
                ("rope_scaling", scaling),
                ("rope_parameters", scaling),
                ("rope_parameters", {"full_attention": scaling}),
            ):
                ends_well({**values, name: copy.deepcopy(given)}, model_type, f"{name}.{key} = {type(bad)}")


@pytest.mark.parametrize(
    "model_type,changed,said",
    [
        ("llama", {"rope_theta": True, "rope_parameters": ...}, "rope_theta = True .*a number is needed"),
        ("llama", {"rope_theta": 10**400, "rope_parameters": ...}, "rope_theta = a whole number of 1329 bits"),
        ("llama", {"rope_scaling": {"rope_type": ["yarn"]}}, r"rope_scaling.rope_type = \['yarn'\] .*known are"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": "4"}}, "rope_scaling.factor = '4' "),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": "no"}}, "truncate = 'no' "),
        ("llama", {"attention_bias": "no"}, "attention_bias = 'no' .*true or false"),
        ("llama", {"attention_bias": 2}, "attention_bias = 2 .*true or false"),
        ("llama", {"mlp_bias": "yes"}, "mlp_bias = 'yes' .*true or false"),
        ("llama", {"hidden_size": "48"}, "hidden_size = '48' .*a number"),
        ("llama", {"num_hidden_layers": 10**12}, "num_hidden_layers = 1000000000000 .*0 to 10000"),
        ("falcon", {"multi_query": float("nan")}, "multi_query = nan .*true or false"),
        ("gemma3_text", {"sliding_window_pattern": 0.5, "layer_types": ...}, "sliding_window_pattern = 0.5 "),
        ("gemma3_text", {"rope_parameters": {"full_attention": True}}, "rope_parameters.full_attention = True"),
        ("gemma3_text", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar = 0 .*positive"),
        ("ernie4_5_moe", {"moe_layer_interval": 0}, "moe_layer_interval = 0 .*from 1 on"),
        ("qwen3_moe", {"mlp_only_layers": "01"}, "mlp_only_layers = '01' .*a list of numbers"),
        ("gpt_neo", {"attention_types": [[["global"], 10**12]]}, "attention_types = .*kinds are needed"),
        ("smollm3", {"no_rope_layers": ["no"] * 40}, "no_rope_layers = 'no' .*true or false"),
    ],
)
def test_the_key_is_named(model_type: str, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        read(model_type, **changed)


def test_zero_and_one_are_false_and_true() -> None:
    assert read("llama", attention_bias=1).attention_bias == tuple("qkvo")
    assert read("llama", attention_bias=0, mlp_bias=1).feedforward_bias is True
    assert read("llama", attention_bias=0).attention_bias == ()


def test_a_pattern_longer_than_the_model_has_only_windows() -> None:
    changed = {"_sliding_window_pattern": 10**12, "layer_types": ...}
    assert read("gemma3_text", **changed).mask == ("sliding_window",)


NEW = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
OLD = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize("old", [OLD, {**OLD, "rope_theta": 700.0}, {}, None])
@pytest.mark.parametrize("new", [NEW, {}, None])
@pytest.mark.parametrize("theta", [300.0, ...])
def test_of_both_dictionaries_the_one_that_transformers_takes(old: Any, new: Any, theta: Any) -> None:
    values = config_of("llama") | {"rope_scaling": old, "rope_parameters": new, "rope_theta": theta}
    values = {key: value for key, value in values.items() if value is not ...}
    theirs = transformers.AutoConfig.for_model(**copy.deepcopy(values)).rope_parameters
    ours = family_of("llama", "").read(values, "config.json").rope
    assert ours.scaling == ({"default": "none"}.get(theirs["rope_type"], theirs["rope_type"]),)
    assert ours.theta == (theirs["rope_theta"],)
    if "factor" in theirs:
        assert ours.factor == theirs["factor"]


def test_scaling_goes_over_the_full_layers_settings_as_in_transformers() -> None:
    nested = {
        "full_attention": {"rope_type": "default", "rope_theta": 900.0},
        "sliding_attention": {"rope_theta": 60.0},
    }
    scaling = {"rope_type": "linear", "factor": 4.0}
    values = config_of("gemma3_text") | {"rope_scaling": scaling, "rope_parameters": nested}
    types = ["sliding_attention", "full_attention"] * values["num_hidden_layers"]
    values["layer_types"] = types[: values["num_hidden_layers"]]
    theirs = transformers.AutoConfig.for_model(**copy.deepcopy(values)).rope_parameters
    ours = family_of("gemma3_text", "").read(values, "config.json").rope
    assert theirs["full_attention"] == {"rope_type": "linear", "factor": 4.0, "rope_theta": 900.0}
    assert ours.factor == theirs["full_attention"]["factor"]
    assert ours.theta == (theirs["sliding_attention"]["rope_theta"], theirs["full_attention"]["rope_theta"])
    assert ours.scaling == ("none", "linear")


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_an_unknown_setting_is_refused_in_either_dictionary(key: str) -> None:
    both = {"rope_scaling": OLD, "rope_parameters": NEW}
    both[key] = {**both[key], "short_mscale": 1.0}
    with pytest.raises(UserError, match=rf"{key}.short_mscale = 1.0 .*not known here"):
        read("llama", **both)


def test_a_rule_that_fails_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (TypeError("a\nb"), ValueError("x" * 999), OverflowError(), MemoryError(), RecursionError()):

        def fails(self: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("scratchlm.interop.rules.Reading.layers", fails)
        line = ends_well(config_of("llama"), "llama", repr(error))
        assert "config.json of family llama has a value that makes no sense" in line


def test_a_file_without_a_family() -> None:
    with pytest.raises(UserError, match=r"config.json names no model_type.*known are .*llama") as caught:
        family_of(None, "config.json")
    assert "did you mean" not in str(caught.value)
