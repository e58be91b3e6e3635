"""Falcon: 7B (one key/value head, one norm for both branches), 40B and 180B (grouped heads, two norms), and serial ones."""

from __future__ import annotations

from scratchlm.interop.families.gpt import H, inner, layer_norm
from scratchlm.interop.families.shared import BLOCK, DROPOUT, plain, tied
from scratchlm.interop.family import Family
from scratchlm.interop.rope_rules import Rope
from scratchlm.interop.rules import Biases, Custom, Inexpressible, Key, Only, Reading, Values
from scratchlm.interop.weights import Map
from scratchlm.model.config import ModelConfig


def _is_new(config: Reading) -> bool:
    """Whether it is built as the 40B, which before it had a key of its own was a ``model_type`` of its own."""
    named = config.values.get("model_type") == "RefinedWeb"
    return config.flag("new_decoder_architecture", default=named)


def _read_block(config: Reading) -> Values:
    new, parallel = _is_new(config), config.flag("parallel_attn", default=True)
    norms = config.whole("num_ln_in_parallel_attn", default=2 if new else 1)
    if new and not parallel:
        raise config.wrong("parallel_attn", parallel, "new_decoder_architecture needs the branches side by side")
    if not parallel:
        return {"block": "serial"}
    if norms not in (1, 2) or (norms == 2 and not new):
        raise config.wrong("num_ln_in_parallel_attn", norms, "known are 1, and 2 with new_decoder_architecture")
    return {"block": "parallel" if norms == 2 else "parallel_shared"}


def _read_kv_heads(config: Reading) -> Values:
    heads = config.whole("num_attention_heads", "n_head")
    kv_heads = config.whole("num_kv_heads", "n_head_kv", default=heads)
    multi_query = config.flag("multi_query", default=True)
    if _is_new(config):
        return {"kv_heads": kv_heads}
    if not multi_query and kv_heads != heads:
        raise config.wrong("num_kv_heads", kv_heads, "grouped heads need new_decoder_architecture")
    return {"kv_heads": 1 if multi_query else heads}


def _write_block(model: ModelConfig) -> Values:
    new = model.block == "parallel" or (
        model.block == "parallel_shared" and model.resolved_kv_heads not in (1, model.heads)
    )
    written: Values = {"new_decoder_architecture": new, "parallel_attn": model.block != "serial"}
    return written | ({"num_ln_in_parallel_attn": 2 if model.block == "parallel" else 1} if new else {})


def _write_kv_heads(model: ModelConfig) -> Values:
    kv_heads = model.resolved_kv_heads
    if model.block == "serial" and kv_heads not in (1, model.heads):
        raise Inexpressible("kv_heads")
    return {"num_kv_heads": kv_heads, "multi_query": kv_heads == 1}


FAMILIES = (
    Family(
        model_type="falcon",
        architecture="FalconForCausalLM",
        title="Falcon",
        config=(
            Key("vocab_size", "vocab_size"),
            Key("hidden_size", "d_model", also=("n_embed",)),
            Key("num_hidden_layers", "layers", also=("n_layer",)),
            Key("num_attention_heads", "heads", also=("n_head",)),
            inner("ffn_hidden_size", "hidden_size", "n_embed"),
            Only("ff_factor", 4, written=False),
            Key("max_position_embeddings", "context_length", default=2048),
            Custom(("block",), _read_block, _write_block),
            Custom(("kv_heads",), _read_kv_heads, _write_kv_heads),
            *layer_norm("layer_norm_epsilon"),
            plain("activation", default="gelu"),
            # Its ALiBi is added before the division by the root of the head's width, and rounded to bf16: another slope.
            Only("alibi", False),
            Rope(),
            Biases("bias", feedforward=True),
            Only("apply_residual_connection_post_layernorm", False, written=False),
            DROPOUT,
            Key("hidden_dropout", "residual_dropout", default=0.0),
            tied(True),
        ),
        weights=(
            Map("transformer.word_embeddings", "embedding"),
            Map("transformer.ln_f", "norm"),
            Map("lm_head", "head"),
            Map(f"{H}.input_layernorm", f"{BLOCK}.attention_norm", when=("block", ("serial", "parallel_shared"))),
            Map(f"{H}.post_attention_layernorm", f"{BLOCK}.feedforward_norm", when=("block", ("serial",))),
            Map(f"{H}.ln_attn", f"{BLOCK}.attention_norm", when=("block", ("parallel",))),
            Map(f"{H}.ln_mlp", f"{BLOCK}.feedforward_norm", when=("block", ("parallel",))),
            Map(f"{H}.self_attention.query_key_value", f"{BLOCK}.attention.qkv", grouped="kv_heads"),
            Map(f"{H}.self_attention.dense", f"{BLOCK}.attention.output"),
            Map(f"{H}.mlp.dense_h_to_4h", f"{BLOCK}.feedforward.up"),
            Map(f"{H}.mlp.dense_4h_to_h", f"{BLOCK}.feedforward.down"),
        ),
        alias=("RefinedWebModel", "RefinedWeb"),
    ),
)
