"""Releases of the dense families after Llama: their config.json reads, means what transformers takes it for, and has as many
parameters as was published; absent keys and older dialects."""

from __future__ import annotations

from typing import Any

import pytest
from cases.modern import CASES
from modern_releases import LLAMA3, RELEASES, YARN, release
from transformers_oracle import transformers

from scratchlm.errors import UserError
from scratchlm.interop.canonical import differences
from scratchlm.interop.choose import fit
from scratchlm.interop.family import family_of
from scratchlm.interop.rules import per_layer
from scratchlm.model import ModelConfig
from scratchlm.model.draw.hollow import hollow

FAMILIES = list(dict.fromkeys(case.model_type for case in CASES))


def read(values: dict[str, Any]) -> ModelConfig:
    return family_of(values["model_type"], "").read(values, "config.json")


def theirs(values: dict[str, Any]) -> dict[str, Any]:
    """What transformers makes of a config.json: absent keys filled in, older dialects turned into the newer."""
    more = {key: value for key, value in values.items() if key != "model_type"}
    filled: dict[str, Any] = transformers.AutoConfig.for_model(values["model_type"], **more).to_dict()
    return filled


@pytest.mark.parametrize("name", RELEASES)
def test_a_release_reads_and_has_its_number_of_parameters(name: str) -> None:
    values = release(name)
    config = read(values)
    assert hollow(config).num_params() == RELEASES[name][3]
    assert config.context_length == values["max_position_embeddings"]
    assert not fit(config, family_of(values["model_type"], "")).unsaid
    assert not differences(config, read(theirs(values)))


def test_every_family_has_a_release() -> None:
    assert {model_type for model_type, *_ in RELEASES.values()} == set(FAMILIES)


def small(model_type: str, **more: Any) -> dict[str, Any]:
    """No key but the widths."""
    heads = 20 if model_type == "helium" else 160  # Helium's are 128 wide, whatever is said
    widths = {"vocab_size": 97, "hidden_size": 2560, "intermediate_size": 31, "num_hidden_layers": 7}
    return {"model_type": model_type, **widths, "num_attention_heads": heads, **more}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_absent_keys_stand_for(model_type: str) -> None:
    values = small(model_type)
    config, filled = read(values), theirs(values)
    assert config.context_length == filled["max_position_embeddings"]
    assert config.attention_dropout == filled["attention_dropout"]
    assert not differences(config, read(filled))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_is_written_means_the_same_to_transformers(model_type: str) -> None:
    config = read(small(model_type))
    written = fit(config, family_of(model_type, "")).values
    assert not differences(config, read(theirs(written)))


OLDER: list[tuple[str, dict[str, Any]]] = [
    ("mistral", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("ministral", {"sliding_window": None}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "num_hidden_layers": 30}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 3}),
    ("qwen3", {"rope_scaling": {**YARN, "type": "yarn"}, "rope_theta": 77.0}),
    ("gemma3_text", {"sliding_window_pattern": 2, "rope_scaling": LLAMA3, "rope_local_base_freq": 33.0}),
    ("olmo3", {"rope_scaling": YARN, "rope_theta": 500000.0}),
    ("phi3", {"partial_rotary_factor": 0.5, "rope_theta": 77.0}),
    ("cohere2", {"sliding_window_pattern": 3, "rope_theta": 77.0}),
    ("smollm3", {"no_rope_layer_interval": 3, "use_sliding_window": True, "sliding_window": 9}),
    ("smollm3", {"no_rope_layers": [0, 1, 1, 0, 1, 0, 1, 1]}),
    ("glm", {"partial_rotary_factor": 0.25}),
    ("exaone4", {"sliding_window_pattern": 3}),
]


@pytest.mark.parametrize("model_type,more", OLDER)
def test_older_dialects_mean_what_transformers_takes_them_for(model_type: str, more: dict[str, Any]) -> None:
    values = small(model_type, **more)
    assert not differences(read(values), read(theirs(values)))
    assert differences(read(values), read(small(model_type))) or more.get("sliding_window", 0) is None


def test_null_is_not_the_same_as_absent() -> None:
    assert read(small("mistral")).kv_heads == 8
    assert read(small("mistral", num_key_value_heads=None)).kv_heads == 160
    assert read(small("mistral")).mask == ("sliding_window",)
    assert read(small("mistral", sliding_window=None)).mask == ("causal",)
    assert read(small("gemma2")).attention_soft_cap == 50
    assert read(small("gemma2", attn_logit_softcapping=None)).attention_soft_cap is None


def test_gemma_1_says_gelu_and_means_its_approximation() -> None:
    assert read(small("gemma", hidden_act="gelu")).feedforward == "geglu_tanh"
    assert read(small("gemma", hidden_act="gelu", hidden_activation=None)).feedforward == "geglu_tanh"
    assert read(small("gemma2", hidden_activation="gelu")).feedforward == "geglu"


def test_gemma_3_and_olmo_3_scale_full_layers_alone() -> None:
    linear = {"rope_type": "linear", "factor": 8.0}
    old = read(small("gemma3_text", rope_theta=300.0, rope_local_base_freq=20.0, rope_scaling=linear))
    new = read(
        small(
            "gemma3_text",
            rope_parameters={
                "full_attention": {**linear, "rope_theta": 300.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
            },
        )
    )
    assert old == new
    assert old.rope.theta == (*[20.0] * 5, 300.0) and old.rope.scaling == (*["none"] * 5, "linear")
    olmo = read(small("olmo3", rope_theta=300.0, rope_scaling=linear))
    assert olmo.rope.theta == (300.0,) and olmo.rope.scaling == (*["none"] * 3, "linear")
    # a pattern of kinds that is no pattern of θ when it is cut short
    types = ["sliding_attention", "full_attention", "sliding_attention"] * 3
    odd = read(small("gemma3_text", layer_types=types[:7], rope_theta=300.0, rope_local_base_freq=20.0))
    assert per_layer(odd, "rope.theta") == [20.0, 300.0, 20.0, 20.0, 300.0, 20.0, 20.0]
    all_sliding = read(small("gemma3_text", layer_types=["sliding_attention"] * 7, rope_scaling=linear))
    assert all_sliding.rope.scaling == ("none",) and all_sliding.rope.factor == 1


def test_exaone_without_windows_is_rotated_everywhere_and_with_one_nowhere_else() -> None:
    full = ["full_attention"] * 7
    assert read(small("exaone4", sliding_window=None, layer_types=full)).position == ("rope",)
    assert read(small("exaone4", sliding_window=4096, layer_types=full)).position == ("none",)
    for window in (None, 4096):
        config = read(small("exaone4", sliding_window=window, layer_types=full))
        assert not fit(config, family_of("exaone4", "")).unsaid


LONGROPE = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("phi3", {"rope_scaling": LONGROPE}, "longrope"),
    ("phi3", {"rope_scaling": {"type": "su"}}, "'su'"),
    ("phi3", {"rope_scaling": YARN}, "yarn"),
    ("phi3", {"attention_bias": True}, "attention_bias"),
    ("qwen2", {"use_mrope": True}, "use_mrope"),
    ("qwen2", {"layer_types": ["sliding_attention"] * 7}, "sliding_window"),
    ("qwen3", {"layer_types": ["full_attention"] * 6}, "layer_types"),
    ("qwen3", {"layer_types": ["chunked_attention"] * 7}, "layer_types"),
    ("ministral", {"sliding_window": None, "layer_types": ["sliding_attention"] * 7}, "sliding_window"),
    ("mistral", {"layer_types": ["full_attention"] * 7}, "layer_types"),
    ("gemma", {"hidden_act": "silu", "hidden_activation": "gelu"}, "hidden_activation"),
    ("gemma", {"hidden_act": "gelu_fast"}, "hidden_act"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma2", {"sliding_window": None}, "sliding_window"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ("gemma3_text", {"rope_parameters": {"rope_theta": 3.0}}, "rope_parameters"),
    (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 2.0},
                "sliding_attention": {"rope_type": "linear", "factor": 3.0},
            }
        },
        "rope_parameters",
    ),
    ("cohere2", {"use_qk_norm": True}, "use_qk_norm"),
    ("cohere2", {"rotary_pct": 0.5}, "rotary_pct"),
    ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
    ("exaone4", {"sliding_window_pattern": "LLLG"}, "sliding_window_pattern"),
    ("helium", {"head_dim": 64}, "head_dim"),
    ("granite", {"mup": True}, "mup"),
]


@pytest.mark.parametrize("model_type,more,named", REFUSED)
def test_what_no_field_says_is_refused_by_name(model_type: str, more: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        read(small(model_type, **more))


UNSAID: list[tuple[str, dict[str, Any], str]] = [
    ("qwen2", {"attention_bias": ()}, "attention_bias"),
    ("gemma2", {"attention_scale": 0.1234}, "attention_scale"),
    ("gemma2", {"heads": 7, "kv_heads": 7}, "heads"),
    ("gemma", {"feedforward": "geglu"}, "feedforward"),
    ("gemma3_text", {"attention_soft_cap": 5.0}, "attention_soft_cap"),
    ("olmo", {"norm_eps": 1e-6}, "norm_eps"),
    ("olmo2", {"qk_norm": "head"}, "qk_norm"),
    ("cohere2", {"position": ("rope",)}, "position"),
    ("smollm3", {"position": ("alibi",)}, "position"),
    ("exaone4", {"position": ("rope", "none")}, "position"),
    ("granite", {"residual": "scalar"}, "residual"),
    ("seed_oss", {"attention_bias": ("q", "v")}, "attention_bias"),
    ("helium", {"head_dim": 64}, "head_dim"),
    ("glm", {"mask": ("sliding_window",)}, "mask"),
    ("mistral", {"mask": ("sliding_window", "causal")}, "mask"),
]


@pytest.mark.parametrize("model_type,changed,named", UNSAID)
def test_what_a_family_cannot_say_is_named(model_type: str, changed: dict[str, Any], named: str) -> None:
    config = read(small(model_type))
    other = ModelConfig(**{**config.model_dump(), **changed})
    assert named in fit(other, family_of(model_type, "")).unsaid


def test_a_ministral_without_windows_still_names_one() -> None:
    config = read(small("ministral", sliding_window=None))
    written = fit(config, family_of("ministral", "")).values
    assert (
        config.mask == ("causal",)
        and written["sliding_window"]
        and set(written["layer_types"]) == {"full_attention"}
    )


def test_phi_3_has_no_scaling() -> None:
    config = read(small("phi3"))
    scaled = ModelConfig(**{**config.model_dump(), "rope": {"scaling": "linear", "factor": 2.0}})
    assert "rope.scaling" in fit(scaled, family_of("phi3", "")).unsaid


@pytest.mark.parametrize("scaling", [0.7, 3.0, 13.0, 16.0, 8.3, 1 / 3])
def test_granites_inverse_scale_returns_to_the_bit(scaling: float) -> None:
    config = read(small("granite", logits_scaling=scaling))
    found = fit(config, family_of("granite", ""))
    assert read(found.values).logit_scale == config.logit_scale
    assert found.values["logits_scaling"] == pytest.approx(scaling, rel=1e-13)
