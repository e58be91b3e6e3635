"""BLOOM and MPT: ALiBi instead of positions."""

from __future__ import annotations

from scratchlm.interop.families.gpt import BIASED, H, four_times, layer_norm
from scratchlm.interop.families.shared import BLOCK, DROPOUT, tied
from scratchlm.interop.family import Family
from scratchlm.interop.rules import (
    EVERYONES,
    EVERYONES_ONLY,
    Always,
    Custom,
    Harmless,
    Key,
    Only,
    Reading,
    Rule,
    Values,
)
from scratchlm.interop.weights import Map
from scratchlm.model.config import ModelConfig

BLOOM = Family(
    model_type="bloom",
    architecture="BloomForCausalLM",
    title="BLOOM",
    config=(
        Key("vocab_size", "vocab_size"),
        Custom(
            ("d_model",),
            lambda config: {"d_model": config.whole("n_embed", "hidden_size")},
            lambda model: {"hidden_size": model.d_model},
        ),
        Key("n_layer", "layers", also=("num_hidden_layers",)),
        Key("n_head", "heads", also=("num_attention_heads",)),
        four_times("n_embed", "hidden_size"),
        Key("seq_length", "context_length", default=2048),  # trained on; ALiBi has no last position
        Always(position=("alibi",), embedding_norm=True, feedforward="gelu_tanh"),
        *layer_norm("layer_norm_epsilon"),
        BIASED,
        Only("apply_residual_connection_post_layernorm", False),
        Only("slow_but_exact", False, written=False),  # forgets biases
        DROPOUT,
        Key("hidden_dropout", "residual_dropout", default=0.0),
        tied(True),
        Harmless("n_inner", "offset_alibi", "skip_bias_add", "skip_bias_add_qkv", "attention_softmax_in_fp32"),
        Harmless("bias_dropout_fusion", "masked_softmax_fusion"),
    ),
    weights=(
        Map("transformer.word_embeddings", "embedding"),
        Map("transformer.word_embeddings_layernorm", "embedding_norm"),
        Map("transformer.ln_f", "norm"),
        Map("lm_head", "head"),
        Map(f"{H}.input_layernorm", f"{BLOCK}.attention_norm"),
        Map(f"{H}.post_attention_layernorm", f"{BLOCK}.feedforward_norm"),
        Map(f"{H}.self_attention.query_key_value", f"{BLOCK}.attention.qkv", grouped="heads"),
        Map(f"{H}.self_attention.dense", f"{BLOCK}.attention.output"),
        Map(f"{H}.mlp.dense_h_to_4h", f"{BLOCK}.feedforward.up"),
        Map(f"{H}.mlp.dense_4h_to_h", f"{BLOCK}.feedforward.down"),
    ),
    prefix="transformer.",
)

ATTN_CONFIG: tuple[Rule, ...] = (
    Only("attn_type", "multihead_attention"),
    Key("attn_pdrop", "attention_dropout", default=0.0),
    Key("clip_qkv", "qkv_clip", default=None),
    Key("softmax_scale", "attention_scale", default=None),
    *(Only(name, False) for name in ("prefix_lm", "qk_ln", "attn_uses_sequence_id")),
    Only("alibi", True),
    Only("alibi_bias_max", 8),
    Harmless("attn_impl", "tie_word_embeddings"),
    EVERYONES,
    *EVERYONES_ONLY,
)
"""Of the object ``attn_config``."""


def _read_attention(config: Reading) -> Values:
    given = config.get("attn_config", default={})
    if not isinstance(given, dict):
        raise config.wrong("attn_config", given, "an object is needed")
    inside = Reading(given, f"{config.where}, attn_config", config.family)
    fields: Values = {}
    for rule in ATTN_CONFIG:
        fields |= rule.read(inside)
    if unknown := inside.unknown():
        raise config.wrong(f"attn_config.{unknown[0]}", given[unknown[0]], "the option is not known here")
    return fields | {"qkv_clip": fields["qkv_clip"] or None}  # 0 is none


def _write_attention(model: ModelConfig) -> Values:
    written: Values = {}
    for rule in ATTN_CONFIG:
        written |= rule.write(model)
    return {"attn_config": written | {"attn_pdrop": 0}}  # transformers 5 takes whole numbers alone


B = "transformer.blocks.{layer}"

MPT = Family(
    model_type="mpt",
    architecture="MptForCausalLM",
    title="MPT",
    config=(
        Key("vocab_size", "vocab_size"),
        Key("d_model", "d_model", also=("hidden_size",)),
        Key("n_layers", "layers", also=("num_hidden_layers",)),
        Key("n_heads", "heads", also=("num_attention_heads",)),
        four_times("d_model", "hidden_size"),
        Only("expansion_ratio", 4),
        Key("max_seq_len", "context_length", default=2048),
        Always(position=("alibi",), norm="layernorm_nobias", feedforward="gelu"),
        Key("layer_norm_epsilon", "norm_eps", default=1e-5),
        Custom(("attention_dropout", "qkv_clip", "attention_scale"), _read_attention, _write_attention),
        Only("no_bias", True),
        Only("norm_type", "low_precision_layernorm", accepted=("layernorm",)),
        Only("logit_scale", None, written=False),
        Key("resid_pdrop", "residual_dropout", default=0.0),
        Key("emb_pdrop", "embedding_dropout", default=0.0),
        tied(True),
        Harmless(
            "learned_pos_emb", "embedding_fraction", "init_device", "init_config", "tokenizer_name", "verbose"
        ),
    ),
    weights=(
        Map("transformer.wte", "embedding"),
        Map("transformer.norm_f", "norm"),
        Map("lm_head", "head"),
        Map(f"{B}.norm_1", f"{BLOCK}.attention_norm"),
        Map(f"{B}.norm_2", f"{BLOCK}.feedforward_norm"),
        Map(f"{B}.attn.Wqkv", f"{BLOCK}.attention.qkv"),
        Map(f"{B}.attn.out_proj", f"{BLOCK}.attention.output"),
        Map(f"{B}.ffn.up_proj", f"{BLOCK}.feedforward.up"),
        Map(f"{B}.ffn.down_proj", f"{BLOCK}.feedforward.down"),
    ),
)

FAMILIES = (BLOOM, MPT)
