"""Releases of mixtures of experts: their config.json reads, means what transformers takes it for, and has as many parameters as
was published; absent keys, older dialects, what is refused and what is left out."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from cases.experts import CASES
from experts_releases import RELEASES, release
from safetensors.torch import load_file, save_file
from transformers_oracle import save as save_theirs
from transformers_oracle import transformers

from scratchlm.errors import UserError
from scratchlm.interop.canonical import differences
from scratchlm.interop.choose import choose, fit
from scratchlm.interop.family import family_of
from scratchlm.interop.huggingface import open_folder
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
    values, published = release(name), RELEASES[name][3]
    config = read(values)
    found = hollow(config).num_params()
    if published > 1000:
        assert found == published
    else:  # published in billions, some with the extra modules or without the embedding
        assert found / 1e9 == pytest.approx(published, rel=0.01)
    assert config.context_length == values["max_position_embeddings"]
    assert not fit(config, family_of(values["model_type"], "")).unsaid
    assert not differences(config, read(theirs(values)))


def test_every_family_has_a_release() -> None:
    assert {model_type for model_type, *_ in RELEASES.values()} == set(FAMILIES)


def small(model_type: str, **more: Any) -> dict[str, Any]:
    """No key but the widths, and what the class has no number for."""
    widths = {"vocab_size": 97, "hidden_size": 2560, "num_hidden_layers": 7, "num_attention_heads": 128}
    if model_type != "solar_open":
        widths["intermediate_size"] = 31
    if model_type in ("deepseek_v2", "dots1"):
        widths["num_experts_per_tok"] = 3
    if model_type == "dots1":
        widths |= {"n_routed_experts": 7, "n_shared_experts": 1}
    return {"model_type": model_type, **widths, **more}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_absent_keys_stand_for(model_type: str) -> None:
    values = small(model_type)
    config, filled = read(values), theirs(values)
    assert config.context_length == filled["max_position_embeddings"]
    assert config.attention_dropout == filled.get("attention_dropout", 0)
    assert not differences(config, read(filled))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_is_written_means_the_same_to_transformers(model_type: str) -> None:
    config = read(small(model_type))
    written = fit(config, family_of(model_type, "")).values
    assert not differences(config, read(theirs(written)))


YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512}

OLDER: list[tuple[str, dict[str, Any]]] = [
    ("mixtral", {"rope_theta": 77.0, "sliding_window": 9}),
    ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 4}),
    ("qwen2_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [1, 3]}),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 9}),
    ("qwen3_moe", {"mlp_only_layers": [0, 1], "rope_scaling": {**YARN, "type": "yarn"}}),
    ("olmoe", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("deepseek_v2", {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7}}),
    ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 2}),
    ("deepseek_v3", {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}),
    ("deepseek_v3", {"q_lora_rank": None, "rope_interleave": False, "first_k_dense_replace": 9}),
    ("gpt_oss", {"rope_scaling": {**YARN, "truncate": False}, "rope_theta": 77.0}),
    ("gpt_oss", {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}),
    ("granitemoe", {"logits_scaling": 3.0, "residual_multiplier": 0.2}),
    ("dots1", {"sliding_window": 9, "max_window_layers": 3}),
    ("glm4_moe", {"partial_rotary_factor": 1.0, "use_qk_norm": True}),
    ("exaone_moe", {"first_k_dense_replace": 3, "sliding_window_pattern": 2}),
    ("minimax_m2", {"rotary_dim": 64}),
    ("ernie4_5_moe", {"moe_layer_start_index": 3, "moe_layer_interval": 2}),
]


@pytest.mark.parametrize("model_type,more", OLDER)
def test_older_dialects_mean_what_transformers_takes_them_for(model_type: str, more: dict[str, Any]) -> None:
    values = small(model_type, **more)
    assert not differences(read(values), read(theirs(values)))
    assert differences(read(values), read(small(model_type)))


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("qwen3_moe", {"use_sliding_window": True, "max_window_layers": 3}, "max_window_layers = 3"),
    ("qwen2_moe", {"mlp_only_layers": [1, 2]}, "every n-th one to the last"),
    ("olmoe", {"head_dim": 64}, "head_dim = 64"),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method = 'noaux_tc'"),
    ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob = True"),
    ("deepseek_v2", {"mlp_bias": True}, "mlp_bias = True"),
    ("deepseek_v3", {"attention_bias": True}, "attention_bias = True"),
    ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads = 2"),
    ("deepseek_v3", {"n_shared_experts": 0}, "n_shared_experts = 0"),
    ("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config: fp8"),
    ("gpt_oss", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config: gptq"),
    ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit = 5.0"),
    ("gpt_oss", {"swiglu_alpha": 1.5}, "swiglu_alpha = 1.5"),
    ("glm4_moe", {"some_option": 3}, "some_option"),
    ("solar_open", {"first_k_dense_replace": 1}, "first_k_dense_replace = 1"),
    ("exaone_moe", {"mlp_layer_types": ["sparse"] * 6}, "a list of 7"),
    ("ernie4_5_moe", {"moe_layer_end_index": 3}, "every n-th one to the last"),
    ("ernie4_5_moe", {"use_bias": True}, "use_bias = True"),
]


@pytest.mark.parametrize("model_type,more,said", REFUSED)
def test_what_no_field_expresses_is_refused_by_name(model_type: str, more: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        read(small(model_type, **more))
    assert said in str(error.value)


def _losses(config: ModelConfig) -> tuple[float, str]:
    return config.moe.balance_loss, config.moe.balance_over


def test_deepseeks_latent_norms_and_scale() -> None:
    config = read(release("DeepSeek-V3"))
    assert (
        config.latent.norm_eps == 1e-6 == config.norm_eps
        and read(small("deepseek_v3", rms_norm_eps=1e-3)).norm_eps == 1e-3
    )
    assert config.rope.attention_factor == 1.0
    assert _losses(config) == (0.001, "sequence") == _losses(read(small("deepseek_v3")))
    assert config.attention_scale == pytest.approx((0.1 * math.log(40) + 1) ** 2 / math.sqrt(192))
    written = fit(config, family_of("deepseek_v3", "")).values["rope_scaling"]
    assert (written["mscale"], written["mscale_all_dim"]) == (1.0, 1.0)


def test_a_models_own_experts_find_their_family() -> None:
    moe = {"experts": 4, "top_k": 2}
    rms = {"d_model": 64, "heads": 4, "layers": 4, "vocab_size": 50, "norm_eps": 1e-6}
    assert choose(ModelConfig(**rms, moe=moe)).family.model_type == "mixtral"
    assert (
        choose(ModelConfig(**rms, moe={**moe, "normalise": False}, qk_norm="head")).family.model_type == "qwen3_moe"
    )
    shared = {**moe, "shared": 1, "shared_gate": True, "d_shared": 40}
    assert choose(ModelConfig(**rms, moe=shared)).family.model_type == "qwen2_moe"
    latent = {"attention": "mla", "rope": {"pairs": "interleaved"}}
    assert choose(ModelConfig(**rms, **latent)).family.model_type == "deepseek_v2"
    assert choose(ModelConfig(**rms, attention="mla")).family.model_type == "deepseek_v3"
    assert (
        choose(ModelConfig(**rms, **latent, moe={**moe, "router": "sigmoid", "shared": 2})).family.model_type
        == "deepseek_v3"
    )
    for fields, unsaid in (
        ({**latent, "moe": {**moe, "router": "sigmoid", "shared": 1, "d_shared": 40}}, "moe.d_shared"),
        ({**latent, "attention_scale": 0.5}, "attention_scale"),
        ({**latent, "moe": {**moe, "router": "sigmoid", "shared": 1, "every": 2}}, "moe.every"),
        ({**latent, "mtp_depth": 1}, "mtp_depth"),
        ({**latent, "attention_bias": "o"}, "attention_bias"),
    ):
        with pytest.raises(UserError, match=unsaid):
            choose(ModelConfig(**rms, **fields), "deepseek_v3")


def test_modules_of_multi_token_prediction_are_left_out_and_said(tmp_path: Path) -> None:
    (case,) = [case for case in CASES if case.model_type == "deepseek_v3" and not case.title]
    config = transformers.AutoConfig.for_model("deepseek_v3", **case.draw(random.Random(0)))
    save_theirs(transformers.AutoModelForCausalLM.from_config(config), tmp_path)
    path = tmp_path / "model.safetensors"
    last = config.num_hidden_layers - 1
    tensors = load_file(path)
    extra = {
        name.replace(f"layers.{last}.", f"layers.{last + 1}."): tensor.clone()
        for name, tensor in tensors.items()
        if f"layers.{last}." in name
    }
    save_file(tensors | extra, path, metadata={"format": "pt"})
    assert open_folder(tmp_path).left_out == tuple(sorted(extra))
    save_file(tensors | {f"model.layers.{last}.more.weight": torch.ones(2)}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"1 tensors that .* model\.layers\.{last}\.more\.weight"):
        open_folder(tmp_path)
