"""Configurations as they lie on the hub, the GPT era: read whole, with the published number of parameters; and what is refused."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from cases import gpt
from safetensors.torch import load_file, save_file
from transformers_oracle import Case, build
from transformers_oracle import save as save_theirs

from scratchlm.errors import UserError
from scratchlm.interop.choose import fit
from scratchlm.interop.family import families, family_of
from scratchlm.interop.huggingface import open_folder
from scratchlm.model import ModelConfig
from scratchlm.model.draw.hollow import hollow

GPT2: dict[str, Any] = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}
GPT2_MEDIUM = GPT2 | {"n_embd": 1024, "n_head": 16, "n_layer": 24, "n_special": 0, "predict_special_tokens": True}
OPENAI_GPT = {
    "afn": "gelu",
    "architectures": ["OpenAIGPTLMHeadModel"],
    "attn_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "openai-gpt",
    "n_ctx": 512,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 512,
    "n_special": 0,
    "predict_special_tokens": True,
    "resid_pdrop": 0.1,
    "vocab_size": 40478,
}
PYTHIA_70M = {
    "architectures": ["GPTNeoXForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "gelu",
    "hidden_size": 512,
    "initializer_range": 0.02,
    "intermediate_size": 2048,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neox",
    "num_attention_heads": 8,
    "num_hidden_layers": 6,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "use_parallel_residual": True,
    "vocab_size": 50304,
}
NEOX_20B = PYTHIA_70M | {
    "attention_probs_dropout_prob": 0,
    "hidden_act": "gelu_fast",
    "hidden_dropout_prob": 0,
    "hidden_size": 6144,
    "intermediate_size": 24576,
    "num_attention_heads": 64,
    "num_hidden_layers": 44,
    "vocab_size": 50432,
}
GPTJ = {
    "activation_function": "gelu_new",
    "architectures": ["GPTJForCausalLM"],
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "gradient_checkpointing": False,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gptj",
    "n_embd": 4096,
    "n_head": 16,
    "n_inner": None,
    "n_layer": 28,
    "n_positions": 2048,
    "resid_pdrop": 0.0,
    "rotary": True,
    "rotary_dim": 64,
    "scale_attn_weights": True,
    "tie_word_embeddings": False,
    "tokenizer_class": "GPT2Tokenizer",
    "vocab_size": 50400,
}
GPT_NEO = {
    "activation_function": "gelu_new",
    "attention_dropout": 0,
    "attention_layers": ["global", "local"] * 6,
    "attention_types": [[["global", "local"], 6]],
    "embed_dropout": 0,
    "hidden_size": 768,
    "intermediate_size": None,
    "layer_norm_epsilon": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neo",
    "num_heads": 12,
    "num_layers": 12,
    "resid_dropout": 0,
    "vocab_size": 50257,
    "window_size": 256,
}
FALCON_7B = {
    "alibi": False,
    "apply_residual_connection_post_layernorm": False,
    "architectures": ["FalconForCausalLM"],
    "attention_dropout": 0.0,
    "bias": False,
    "hidden_dropout": 0.0,
    "hidden_size": 4544,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "falcon",
    "multi_query": True,
    "new_decoder_architecture": False,
    "num_attention_heads": 71,
    "num_hidden_layers": 32,
    "parallel_attn": True,
    "vocab_size": 65024,
}
FALCON_40B = FALCON_7B | {
    "hidden_size": 8192,
    "new_decoder_architecture": True,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_kv_heads": 8,
}
BLOOM_560M = {
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "hidden_dropout": 0.0,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "masked_softmax_fusion": True,
    "model_type": "bloom",
    "n_embed": 1024,
    "n_inner": None,
    "n_layer": 24,
    "num_attention_heads": 16,
    "offset_alibi": 100,
    "pretraining_tp": 1,
    "skip_bias_add": True,
    "skip_bias_add_qkv": False,
    "vocab_size": 250880,
}
BLOOM = BLOOM_560M | {"n_embed": 14336, "n_layer": 70, "num_attention_heads": 112, "seq_length": 2048}
MPT_7B = {
    "attn_config": {
        "alibi": True,
        "alibi_bias_max": 8,
        "attn_impl": "torch",
        "attn_pdrop": 0,
        "attn_type": "multihead_attention",
        "attn_uses_sequence_id": False,
        "clip_qkv": None,
        "prefix_lm": False,
        "qk_ln": False,
        "softmax_scale": None,
    },
    "d_model": 4096,
    "emb_pdrop": 0,
    "embedding_fraction": 1.0,
    "expansion_ratio": 4,
    "init_device": "cpu",
    "learned_pos_emb": True,
    "logit_scale": None,
    "max_seq_len": 2048,
    "model_type": "mpt",
    "n_heads": 32,
    "n_layers": 32,
    "no_bias": True,
    "norm_type": "low_precision_layernorm",
    "resid_pdrop": 0,
    "tokenizer_name": "EleutherAI/gpt-neox-20b",
    "verbose": 0,
    "vocab_size": 50432,
}
PHI_2 = {
    "attention_dropout": 0.0,
    "embd_pdrop": 0.0,
    "hidden_act": "gelu_new",
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "phi",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "partial_rotary_factor": 0.4,
    "qk_layernorm": False,
    "resid_pdrop": 0.1,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 51200,
}
STARCODER = {
    "activation_function": "gelu",
    "attention_softmax_in_fp32": True,
    "inference_runner": 0,
    "layer_norm_epsilon": 1e-05,
    "max_batch_size": None,
    "model_type": "gpt_bigcode",
    "multi_query": True,
    "n_embd": 6144,
    "n_head": 48,
    "n_inner": 24576,
    "n_layer": 40,
    "n_positions": 8192,
    "pad_key_length": True,
    "pre_allocate_kv_cache": False,
    "scale_attention_softmax_in_fp32": True,
    "scale_attn_weights": True,
    "validate_runner_input": True,
    "vocab_size": 49152,
}
STARCODER2_3B = {
    "activation_function": "gelu",
    "attention_dropout": 0.1,
    "embedding_dropout": 0.1,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 3072,
    "intermediate_size": 12288,
    "max_position_embeddings": 16384,
    "mlp_type": "default",
    "model_type": "starcoder2",
    "norm_epsilon": 1e-05,
    "norm_type": "layer_norm",
    "num_attention_heads": 24,
    "num_hidden_layers": 30,
    "num_key_value_heads": 2,
    "residual_dropout": 0.1,
    "rope_theta": 999999.4420358813,
    "sliding_window": 4096,
    "use_bias": True,
    "vocab_size": 49152,
}
STABLELM_3B = {
    "hidden_act": "silu",
    "hidden_size": 2560,
    "intermediate_size": 6912,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 4096,
    "model_type": "stablelm",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "partial_rotary_factor": 0.25,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "use_qkv_bias": False,
    "vocab_size": 50304,
}
STABLELM_12B = STABLELM_3B | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_key_value_heads": 8,
    "qk_layernorm": True,
    "use_parallel_residual": True,
    "vocab_size": 100352,
}


def read(values: dict[str, Any]) -> ModelConfig:
    return family_of(values["model_type"], "config.json").read(values, "config.json")


@pytest.mark.parametrize(
    "values,count",
    [
        pytest.param(GPT2, 124_439_808, id="gpt2"),
        pytest.param(GPT2_MEDIUM, 354_823_168, id="gpt2-medium"),
        pytest.param(OPENAI_GPT, 116_534_784, id="openai-gpt"),
        pytest.param(PYTHIA_70M, 70_426_624, id="pythia-70m"),
        pytest.param(NEOX_20B, 20_554_567_680, id="neox-20b"),
        pytest.param(GPTJ, 6_050_882_784, id="gptj-6b"),
        pytest.param(GPT_NEO, 125_198_592, id="gpt-neo-125m"),
        pytest.param(FALCON_7B, 6_921_720_704, id="falcon-7b"),
        pytest.param(FALCON_40B, 41_303_293_952, id="falcon-40b"),
        pytest.param(BLOOM_560M, 559_214_592, id="bloom-560m"),
        pytest.param(BLOOM, 176_247_271_424, id="bloom"),
        pytest.param(MPT_7B, 6_649_286_656, id="mpt-7b"),
        pytest.param(PHI_2, 2_779_683_840, id="phi-2"),
        pytest.param(STARCODER, 15_517_456_384, id="starcoder"),
        pytest.param(STARCODER2_3B, 3_030_371_328, id="starcoder2-3b"),
        pytest.param(STABLELM_3B, 2_795_443_200, id="stablelm-3b"),
        pytest.param(STABLELM_12B, 12_143_185_920, id="stablelm-12b"),
    ],
)
def test_released_configurations_have_the_published_size(values: dict[str, Any], count: int) -> None:
    config = read(values)
    assert hollow(config).num_params() == count
    written = fit(config, families()[values["model_type"]])
    assert not written.unsaid and written.config == config


def test_what_an_absent_key_stands_for() -> None:
    assert read(PYTHIA_70M).rotated_dims == 16
    assert read({key: value for key, value in PYTHIA_70M.items() if "rotary" not in key}) == read(PYTHIA_70M)
    assert read({key: value for key, value in GPT2.items() if "pdrop" not in key}) == read(GPT2)
    assert read({key: value for key, value in FALCON_7B.items() if key in ("vocab_size", "model_type")} | {
        "hidden_size": 4544, "num_attention_heads": 71, "num_hidden_layers": 32
    }) == read(FALCON_7B)  # fmt: skip
    for share, values in ((0.5, PHI_2), (0.25, STABLELM_3B)):
        left = {key: value for key, value in values.items() if key != "partial_rotary_factor"}
        assert read(left).rope.fraction == share
    assert read(STARCODER2_3B | {"num_key_value_heads": 24}).kv_heads == 24
    assert read({key: value for key, value in STARCODER2_3B.items() if "key_value" not in key}).kv_heads == 2


def test_defaults_of_one_key_beside_another() -> None:
    assert read({key: value for key, value in STARCODER.items() if key != "multi_query"}).kv_heads == 1
    both = read(BLOOM_560M | {"hidden_size": 64})  # transformers takes n_embed where both are there
    assert (both.d_model, both.d_ff) == (1024, 4096)


def test_neox_as_transformers_4_writes_it() -> None:
    assert read(PYTHIA_70M | {"partial_rotary_factor": 0.25, "rope_theta": 10000, "rope_scaling": None}) == read(
        PYTHIA_70M
    )


def test_falcon_under_its_first_names() -> None:
    """Folders of before transformers had the family: ``RefinedWebModel`` is the 7B's kind, ``RefinedWeb`` the 40B's."""
    names = {"num_attention_heads": "n_head", "num_hidden_layers": "n_layer", "num_kv_heads": "n_head_kv"}
    for values, model_type in ((FALCON_7B, "RefinedWebModel"), (FALCON_40B, "RefinedWeb")):
        old = {names.get(key, key): value for key, value in values.items() if key != "new_decoder_architecture"}
        assert read(old | {"model_type": model_type}) == read(values)


@pytest.mark.parametrize(
    "values,named",
    [
        (GPT2 | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        (GPT2 | {"add_cross_attention": True}, "add_cross_attention = True"),
        (GPT2 | {"a_new_option": 3}, "a_new_option"),
        (OPENAI_GPT | {"afn": "gelu_new"}, "afn = 'gelu_new'"),
        (GPT_NEO | {"attention_types": [[["global", "dilated"], 6]]}, "attention_types"),
        (GPT_NEO | {"attention_types": [[["global", "local"], 5]]}, "num_layers = 12"),
        (GPT_NEO | {"attention_types": "global"}, "attention_types = 'global'"),
        (GPTJ | {"rotary_dim": None}, "rotary_dim = None"),
        (GPTJ | {"rotary_dim": 512}, "rotary_dim = 512"),
        (GPTJ | {"rotary": False}, "rotary = False"),
        (PYTHIA_70M | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type = 'dynamic'"),
        (FALCON_7B | {"alibi": True}, "alibi = True"),
        (FALCON_7B | {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn = 2"),
        (FALCON_7B | {"multi_query": False, "num_kv_heads": 1}, "num_kv_heads = 1"),
        (FALCON_40B | {"parallel_attn": False}, "parallel_attn = False"),
        (FALCON_40B | {"num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn = 3"),
        (
            BLOOM | {"apply_residual_connection_post_layernorm": True},
            "apply_residual_connection_post_layernorm = True",
        ),
        (BLOOM | {"slow_but_exact": True}, "slow_but_exact = True"),
        (MPT_7B | {"attn_config": {"alibi_bias_max": 16}}, "attn_config: alibi_bias_max = 16"),
        (MPT_7B | {"attn_config": {"qk_ln": True}}, "attn_config: qk_ln = True"),
        (MPT_7B | {"attn_config": {"kv_n_heads": 8}}, "attn_config.kv_n_heads = 8"),
        (MPT_7B | {"attn_config": 3}, "attn_config = 3"),
        (MPT_7B | {"logit_scale": "inv_sqrt_d_model"}, "logit_scale = 'inv_sqrt_d_model'"),
        (MPT_7B | {"expansion_ratio": 3}, "expansion_ratio = 3"),
        (PHI_2 | {"head_dim": 70}, "head_dim"),
        (STARCODER2_3B | {"norm_type": "rms_norm"}, "norm_type = 'rms_norm'"),
        (STARCODER2_3B | {"mlp_type": "gated"}, "mlp_type = 'gated'"),
    ],
)
def test_what_we_have_no_field_for_is_refused_by_name(values: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as error:
        read(values)
    assert named in str(error.value)


@pytest.mark.parametrize(
    "values,change,unsaid",
    [
        (GPT2, {"attention_scale": 0.3}, "attention_scale"),
        (GPT2, {"kv_heads": 4}, "kv_heads"),
        (GPT2, {"attention_bias": ("q", "k", "v")}, "attention_bias"),
        (OPENAI_GPT, {"d_ff": 100}, "d_ff"),
        (GPTJ, {"head_bias": False}, "head_bias"),
        (GPT_NEO, {"mask": ("strided",)}, "mask"),
        (GPT_NEO, {"attention_scale": None}, "attention_scale"),
        (STARCODER, {"kv_heads": 4}, "kv_heads"),
        (FALCON_7B, {"feedforward_bias": True}, "feedforward_bias"),
        (FALCON_40B, {"block": "serial"}, "kv_heads"),
        (BLOOM, {"embedding_norm": False}, "embedding_norm"),
        (MPT_7B, {"norm": "layernorm"}, "norm"),
        (STABLELM_12B, {"qk_norm": "head"}, "qk_norm"),
        (STABLELM_12B, {"qk_norm_kind": "layernorm"}, "qk_norm_kind"),
        (STABLELM_12B, {"block": "parallel"}, "block"),
    ],
)
def test_what_a_family_cannot_say_is_named(values: dict[str, Any], change: dict[str, Any], unsaid: str) -> None:
    config = ModelConfig(**(read(values).model_dump() | change))
    assert fit(config, families()[values["model_type"]]).unsaid[0] == unsaid


def test_a_share_that_rounding_cuts_short_is_written_so_that_it_is_read_whole() -> None:
    """Readers take ⌊44 · share⌋ dimensions, and 44 · (30 / 44) is less than 30."""
    assert int(44 * (30 / 44)) == 29
    config = read(
        PHI_2
        | {"hidden_size": 44 * 4, "num_attention_heads": 4, "num_key_value_heads": 4, "partial_rotary_factor": 1.0}
    )
    config = ModelConfig(**(config.model_dump() | {"rope": {"fraction": 30 / 44}}))
    written = fit(config, families()["phi"])
    assert not written.unsaid
    assert int(44 * written.values["partial_rotary_factor"]) == 30


HEADS = {"openai-gpt": "attn.bias", "gpt2": "attn.bias", "bloom": "", "gpt_neo": "attn.attention.masked_bias"}


@pytest.mark.parametrize("model_type", HEADS)
def test_files_without_the_prefix_and_with_old_masks(model_type: str, tmp_path: Path) -> None:
    """GPT-2's and BLOOM's files on the hub begin at ``h.0``; older ones hold the triangle as a tensor."""
    draw = {"openai-gpt": gpt.gpt1, "gpt2": gpt.gpt2, "bloom": gpt.bloom, "gpt_neo": gpt.gpt_neo}[model_type]
    theirs = build(Case(model_type, lambda rng: draw(Random(1)) | {"tie_word_embeddings": True}), 1, torch.float32)
    save_theirs(theirs, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    before = open_folder(tmp_path).model.state_dict()
    if families()[model_type].prefix:
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        assert any(name.startswith("h.0.") for name in tensors)
    if buffer := HEADS[model_type]:
        start = "" if families()[model_type].prefix else "transformer."
        tensors |= {f"{start}h.{layer}.{buffer}": torch.ones(1, 1, 4, 4) for layer in range(2)}
    save_file(tensors, path, {"format": "pt"})
    opened = open_folder(tmp_path)
    assert all(tensor.equal(before[name]) for name, tensor in opened.model.state_dict().items())
    assert len(opened.left_out) == (2 if buffer else 0)
