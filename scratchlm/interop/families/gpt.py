"""OpenAI's GPT-1 and GPT-2, and what others kept of their format; GPT-Neo, which took it with half of its layers local."""

from __future__ import annotations

from typing import Any

from scratchlm.interop.families.shared import BLOCK, plain, tied
from scratchlm.interop.family import Family
from scratchlm.interop.rules import (
    Always,
    Choice,
    Custom,
    Harmless,
    Inexpressible,
    Key,
    Only,
    Reading,
    Rule,
    Values,
    per_layer,
    shortest_pattern,
)
from scratchlm.interop.weights import Map
from scratchlm.model.config import ModelConfig

H = "transformer.h.{layer}"

SIZES: tuple[Rule, ...] = (
    Key("vocab_size", "vocab_size"),
    Key("n_embd", "d_model", also=("hidden_size",)),
    Key("n_layer", "layers", also=("num_hidden_layers",)),
    Key("n_head", "heads", also=("num_attention_heads",)),
)
"""GPT-2's names of the widths; its later ones are read as well."""

POSITIONS = (
    Always(position=("learned",)),
    Key("n_positions", "context_length", also=("max_position_embeddings",), default=1024),
)

DROPOUTS = tuple(
    Key(theirs, ours, default=0.1)
    for theirs, ours in (
        ("attn_pdrop", "attention_dropout"),
        ("embd_pdrop", "embedding_dropout"),
        ("resid_pdrop", "residual_dropout"),
    )
)
"""Of attention's weights, embeddings and branches: 0.1 where a file does not say."""

NO_DROPOUTS = tuple(Key(rule.theirs, rule.ours, default=0.0) for rule in DROPOUTS)
"""The same keys in families that start from 0."""

SUMMARY = Harmless(
    *(f"summary_{name}" for name in ("type", "use_proj", "activation", "proj_to_labels", "first_dropout")),
    *("summary_last_dropout", "num_labels", "_num_labels", "n_special", "predict_special_tokens", "output_past"),
)
"""Of a classifier's head, and of training long ago."""

BIASED = Always(attention_bias=tuple("qkvo"), feedforward_bias=True)
"""Every projection has a bias."""


def layer_norm(key: str) -> tuple[Rule, ...]:
    """LayerNorm and its ε."""
    return (Always(norm="layernorm"), Key(key, "norm_eps", default=1e-5))


def inner(key: str, *width: str) -> Key:
    """The feed-forward's inner width: four times the model's where a file does not say."""
    return Key(key, "d_ff", default=lambda config: 4 * config.whole(*width))


def four_times(*width: str) -> Custom:
    """An inner width of four times the model's, which no key changes (another one is found when it is read back)."""
    return Custom(("d_ff",), lambda config: {"d_ff": 4 * config.whole(*width)}, lambda model: {})


def _read_scaled(config: Reading) -> Values:
    return {"attention_scale": None if config.flag("scale_attn_weights", default=True) else 1.0}


def _write_scaled(model: ModelConfig) -> Values:
    return {"scale_attn_weights": model.attention_scale != 1.0}


SCALED = Custom(("attention_scale",), _read_scaled, _write_scaled)
"""Scores divided by the root of a head's width, or left as they are."""

AROUND = (
    Map("transformer.wte", "embedding"),
    Map("transformer.wpe", "embedding_positions.0"),
    Map("transformer.ln_f", "norm"),
    Map("lm_head", "head"),
)
NORMS = (Map(f"{H}.ln_1", f"{BLOCK}.attention_norm"), Map(f"{H}.ln_2", f"{BLOCK}.feedforward_norm"))


def mlp(transposed: bool) -> tuple[Map, ...]:
    """The feed-forward; GPT-1 and GPT-2 store weights as (in, out)."""
    return (
        Map(f"{H}.mlp.c_fc", f"{BLOCK}.feedforward.up", transposed=transposed),
        Map(f"{H}.mlp.c_proj", f"{BLOCK}.feedforward.down", transposed=transposed),
    )


ATTENTION = (
    Map(f"{H}.attn.c_attn", f"{BLOCK}.attention.qkv", transposed=True),
    Map(f"{H}.attn.c_proj", f"{BLOCK}.attention.output", transposed=True),
)

GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    title="GPT-2",
    config=(
        *SIZES,
        *POSITIONS,
        inner("n_inner", "n_embd", "hidden_size"),
        *layer_norm("layer_norm_epsilon"),
        plain("activation_function"),
        BIASED,
        SCALED,
        Only("scale_attn_by_inverse_layer_idx", False, written=False),
        Harmless("reorder_and_upcast_attn"),  # when in the product numbers are widened
        *DROPOUTS,
        tied(True),
        SUMMARY,
    ),
    weights=(*AROUND, *NORMS, *ATTENTION, *mlp(transposed=True)),
    prefix="transformer.",
    ignored=(r"transformer\.h\.\d+\.attn\.(masked_)?bias",),
)

GPT1 = Family(
    model_type="openai-gpt",
    architecture="OpenAIGPTLMHeadModel",
    title="GPT",
    config=(
        *SIZES,
        Always(position=("learned",), norm_placement="post"),
        Key("n_positions", "context_length", also=("max_position_embeddings",), default=512),
        four_times("n_embd", "hidden_size"),
        *layer_norm("layer_norm_epsilon"),
        # What it calls gelu is the approximation by tanh.
        Choice(
            "afn",
            "feedforward",
            {"gelu": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"},
            default="gelu",
        ),
        BIASED,
        *DROPOUTS,
        tied(True),
        SUMMARY,
    ),
    weights=(
        Map("transformer.tokens_embed", "embedding"),
        Map("transformer.positions_embed", "embedding_positions.0"),
        Map("lm_head", "head"),
        Map(f"{H}.ln_1", f"{BLOCK}.attention_post_norm"),
        Map(f"{H}.ln_2", f"{BLOCK}.feedforward_post_norm"),
        *ATTENTION,
        *mlp(transposed=True),
    ),
    prefix="transformer.",
    ignored=(r"transformer\.h\.\d+\.attn\.bias", r"transformer\.position_ids"),
)

MASKS = {"global": "causal", "local": "sliding_window"}


def _read_layers(config: Reading) -> Values:
    layers = config.whole("num_layers", "num_hidden_layers")
    types = config.get("attention_types", default=[[["global", "local"], 12]])
    config.asked.add("attention_layers")  # the same, spelled out
    try:
        if sum(len(group) * max(0, times) for group, times in types) != layers:
            raise config.wrong("attention_types", types, f"num_layers = {layers} kinds are needed")
        kinds = [MASKS[kind] for group, times in types for _ in range(times) for kind in group]
    except (KeyError, TypeError, ValueError):
        raise config.wrong(
            "attention_types", types, "lists of global and local, each with its count, are needed"
        ) from None
    window = config.whole("window_size", default=256)
    return {"mask": shortest_pattern(kinds) or ("causal",)} | (
        {"window": window} if "sliding_window" in kinds else {}
    )


def _write_layers(model: ModelConfig) -> Values:
    names = {ours: theirs for theirs, ours in MASKS.items()}
    masks = per_layer(model, "mask")
    if set(masks) - set(names):
        raise Inexpressible("mask")
    kinds = [names[mask] for mask in masks]
    pattern: list[Any] = list(shortest_pattern(kinds))
    whole = len(kinds) // max(1, len(pattern)) * len(pattern) == len(kinds)
    types = [[pattern, len(kinds) // max(1, len(pattern))]] if whole else [[kinds, 1]]
    return {"attention_types": types, "attention_layers": kinds, "window_size": model.window}


GPT_NEO = Family(
    model_type="gpt_neo",
    architecture="GPTNeoForCausalLM",
    title="GPT-Neo",
    config=(
        Key("vocab_size", "vocab_size"),
        Key("hidden_size", "d_model"),
        Key("num_layers", "layers", also=("num_hidden_layers",)),
        Key("num_heads", "heads", also=("num_attention_heads",)),
        inner("intermediate_size", "hidden_size"),
        Always(position=("learned",)),
        Key("max_position_embeddings", "context_length", default=2048),
        Custom(("mask", "window"), _read_layers, _write_layers),
        *layer_norm("layer_norm_epsilon"),
        plain("activation_function"),
        Always(attention_scale=1.0, attention_bias=("o",), feedforward_bias=True),
        Key("attention_dropout", "attention_dropout", default=0.0),
        Key("embed_dropout", "embedding_dropout", default=0.0),
        Key("resid_dropout", "residual_dropout", default=0.0),
        tied(True),
        SUMMARY,
    ),
    weights=(
        *AROUND,
        *NORMS,
        *(
            Map(f"{H}.attn.attention.{name}_proj", f"{BLOCK}.attention.qkv", parts=(part,))
            for part, name in enumerate("qkv")
        ),
        Map(f"{H}.attn.attention.out_proj", f"{BLOCK}.attention.output"),
        *mlp(transposed=False),
    ),
    ignored=(r"transformer\.h\.\d+\.attn\.attention\.(masked_)?bias",),
)

FAMILIES = (GPT1, GPT2, GPT_NEO)
