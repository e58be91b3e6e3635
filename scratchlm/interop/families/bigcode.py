"""BigCode's models: SantaCoder and StarCoder (GPT-2 with one key/value head), StarCoder 2."""

from __future__ import annotations

from scratchlm.interop.families.gpt import (
    AROUND,
    BIASED,
    DROPOUTS,
    NORMS,
    POSITIONS,
    SCALED,
    SIZES,
    SUMMARY,
    H,
    inner,
    layer_norm,
    mlp,
)
from scratchlm.interop.families.shared import AROUND as LLAMA_AROUND
from scratchlm.interop.families.shared import (
    ATTENTION,
    BLOCK,
    DROPOUT,
    LAYER,
    PRE_NORMS,
    WIDTHS,
    grouped,
    plain,
    tied,
)
from scratchlm.interop.family import Family
from scratchlm.interop.rope_rules import Rope, Window
from scratchlm.interop.rules import Biases, Custom, Harmless, Inexpressible, Key, Only, Reading, Values
from scratchlm.interop.weights import Map
from scratchlm.model.config import ModelConfig


def _read_multi_query(config: Reading) -> Values:
    heads = config.whole("n_head", "num_attention_heads")
    config.asked.add("num_key_value_heads")  # follows from multi_query
    return {"kv_heads": 1 if config.flag("multi_query", default=True) else heads}


def _write_multi_query(model: ModelConfig) -> Values:
    if model.resolved_kv_heads not in (1, model.heads):
        raise Inexpressible("kv_heads")
    return {"multi_query": model.resolved_kv_heads == 1}


STARCODER = Family(
    model_type="gpt_bigcode",
    architecture="GPTBigCodeForCausalLM",
    title="SantaCoder, StarCoder",
    config=(
        *SIZES,
        *POSITIONS,
        inner("n_inner", "n_embd", "hidden_size"),
        Custom(("kv_heads",), _read_multi_query, _write_multi_query),
        *layer_norm("layer_norm_epsilon"),
        plain("activation_function", default="gelu_pytorch_tanh"),
        BIASED,
        SCALED,
        *DROPOUTS,
        tied(True),
        SUMMARY,
        Harmless(
            "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "inference_runner", "max_batch_size"
        ),
        Harmless("max_sequence_length", "pad_key_length", "pre_allocate_kv_cache", "validate_runner_input"),
        Harmless("runner_max_sequence_length"),
    ),
    weights=(
        *AROUND,
        *NORMS,
        Map(f"{H}.attn.c_attn", f"{BLOCK}.attention.qkv", grouped="kv_heads"),
        Map(f"{H}.attn.c_proj", f"{BLOCK}.attention.output"),
        *mlp(transposed=False),
    ),
    ignored=(r"transformer\.bias", r"transformer\.h\.\d+\.attn\.(masked_)?bias"),
)

STARCODER2 = Family(
    model_type="starcoder2",
    architecture="Starcoder2ForCausalLM",
    title="StarCoder 2",
    config=(
        *WIDTHS,
        *grouped(kv_heads=2),
        *layer_norm("norm_epsilon"),
        plain(default="gelu_pytorch_tanh"),
        Rope(),
        Window(),
        Biases("use_bias", default=True, feedforward=True),
        Only("norm_type", "layer_norm", written=False),
        Only("mlp_type", "default", written=False),
        Harmless("activation_function"),  # hidden_act is meant
        DROPOUT,
        Key("embedding_dropout", "embedding_dropout", default=0.0),
        Key("residual_dropout", "residual_dropout", default=0.0),
        tied(True),
    ),
    weights=(
        *LLAMA_AROUND,
        *ATTENTION,
        *PRE_NORMS,
        Map(f"{LAYER}.mlp.c_fc", f"{BLOCK}.feedforward.up"),
        Map(f"{LAYER}.mlp.c_proj", f"{BLOCK}.feedforward.down"),
    ),
)

FAMILIES = (STARCODER, STARCODER2)
