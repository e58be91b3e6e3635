"""EleutherAI's models with both branches side by side: GPT-J, and GPT-NeoX with Pythia."""

from __future__ import annotations

from scratchlm.interop.families import gpt
from scratchlm.interop.families.gpt import NO_DROPOUTS, SIZES, SUMMARY, H, inner, layer_norm
from scratchlm.interop.families.shared import BLOCK, plain, tied
from scratchlm.interop.family import Family
from scratchlm.interop.rope_rules import Rope
from scratchlm.interop.rules import (
    Always,
    Biases,
    Choice,
    Custom,
    Harmless,
    Inexpressible,
    Key,
    Only,
    Reading,
    Values,
)
from scratchlm.interop.weights import Map
from scratchlm.model.config import ModelConfig


def _read_rotated(config: Reading) -> Values:
    width = config.whole("n_embd", "hidden_size") // max(1, config.whole("n_head", "num_attention_heads"))
    if "rotary_dim" in config.values and config.values["rotary_dim"] is None:
        raise config.wrong("rotary_dim", None, "how many dimensions of a head are rotated is needed")
    turned = config.whole("rotary_dim", default=64)
    if not 0 < turned <= width:
        raise config.wrong("rotary_dim", turned, f"a head has {width} dimensions")
    return {"rope.fraction": turned / width}


def _write_rotated(model: ModelConfig) -> Values:
    if "rope" not in model.position:
        raise Inexpressible("position")
    return {"rotary_dim": model.rotated_dims}


GPTJ = Family(
    model_type="gptj",
    architecture="GPTJForCausalLM",
    title="GPT-J",
    config=(
        *SIZES,
        Key("n_positions", "context_length", also=("max_position_embeddings",), default=2048),
        inner("n_inner", "n_embd", "hidden_size"),
        *layer_norm("layer_norm_epsilon"),
        plain("activation_function"),
        Always(position=("rope",), rope__pairs="interleaved", rope__theta=(10_000.0,), block="parallel_shared"),
        Custom(("rope.fraction",), _read_rotated, _write_rotated),
        Always(feedforward_bias=True, head_bias=True),
        Only("rotary", True, written=False),
        Only("scale_attn_weights", True, written=False),
        *NO_DROPOUTS,
        tied(False),
        SUMMARY,
    ),
    weights=(
        *gpt.AROUND,
        Map(f"{H}.ln_1", f"{BLOCK}.attention_norm"),
        *(Map(f"{H}.attn.{name}_proj", f"{BLOCK}.attention.qkv", parts=(part,)) for part, name in enumerate("qkv")),
        Map(f"{H}.attn.out_proj", f"{BLOCK}.attention.output"),
        Map(f"{H}.mlp.fc_in", f"{BLOCK}.feedforward.up"),
        Map(f"{H}.mlp.fc_out", f"{BLOCK}.feedforward.down"),
    ),
    ignored=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias|embed_positions)",),
)

NEOX_LAYER = "gpt_neox.layers.{layer}"


def _read_dropout(config: Reading) -> Values:
    share = config.number("hidden_dropout", "hidden_dropout_prob", default=0.0)
    return {"embedding_dropout": share, "residual_dropout": share}


NEOX = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    title="GPT-NeoX, Pythia",
    config=(
        Key("vocab_size", "vocab_size"),
        Key("hidden_size", "d_model"),
        Key("num_hidden_layers", "layers"),
        Key("num_attention_heads", "heads"),
        Key("intermediate_size", "d_ff"),
        Key("max_position_embeddings", "context_length", default=2048),
        *layer_norm("layer_norm_eps"),
        plain("hidden_act", default="gelu"),
        Rope(fraction="rotary_pct", fraction_default=0.25, theta_key="rotary_emb_base"),
        Harmless("partial_rotary_factor"),  # transformers 4 writes it beside rotary_pct, and no version reads it
        Choice("use_parallel_residual", "block", {True: "parallel", False: "serial"}, default=True),
        Biases("attention_bias", default=True),
        Always(feedforward_bias=True),
        Key("attention_dropout", "attention_dropout", default=0.0, also=("attention_probs_dropout_prob",)),
        Custom(
            ("embedding_dropout", "residual_dropout"),
            _read_dropout,
            lambda model: {"hidden_dropout": model.residual_dropout},
        ),
        tied(False),
    ),
    weights=(
        Map("gpt_neox.embed_in", "embedding"),
        Map("gpt_neox.final_layer_norm", "norm"),
        Map("embed_out", "head"),
        Map(f"{NEOX_LAYER}.input_layernorm", f"{BLOCK}.attention_norm"),
        Map(f"{NEOX_LAYER}.post_attention_layernorm", f"{BLOCK}.feedforward_norm"),
        Map(f"{NEOX_LAYER}.attention.query_key_value", f"{BLOCK}.attention.qkv", grouped="heads"),
        Map(f"{NEOX_LAYER}.attention.dense", f"{BLOCK}.attention.output"),
        Map(f"{NEOX_LAYER}.mlp.dense_h_to_4h", f"{BLOCK}.feedforward.up"),
        Map(f"{NEOX_LAYER}.mlp.dense_4h_to_h", f"{BLOCK}.feedforward.down"),
    ),
    head="embed_out.weight",
    ignored=(r"gpt_neox\.layers\.\d+\.attention\.(masked_)?bias",),
)

FAMILIES = (GPTJ, NEOX)
