"""What many families have in common: the names that Llama gave, and those of mixtures of experts after it."""

from __future__ import annotations

from collections.abc import Callable

from scratchlm.interop.rules import Always, Choice, Custom, Inexpressible, Key, Reading, Rule, Values
from scratchlm.interop.weights import Map
from scratchlm.model.config import ModelConfig

FAMILIES: tuple[()] = ()


def head_width(config: Reading) -> int:
    """d_model / heads, where a file has no ``head_dim``."""
    heads = config.whole("num_attention_heads")
    return config.whole("hidden_size") // max(1, heads)


WIDTHS: tuple[Rule, ...] = (
    Key("vocab_size", "vocab_size"),
    Key("hidden_size", "d_model"),
    Key("num_hidden_layers", "layers"),
    Key("num_attention_heads", "heads"),
    Key("intermediate_size", "d_ff"),
    Key("max_position_embeddings", "context_length", default=2048),
)
"""The usual names of the widths."""

GROUPED: tuple[Rule, ...] = (
    Key("num_key_value_heads", "kv_heads", default=lambda config: config.get("num_attention_heads")),
    Key("head_dim", "head_dim", default=head_width),
)
"""Fewer key/value heads, and heads of a width of their own."""


def grouped(kv_heads: int | None = None, head_dim: int | None = None) -> tuple[Rule, ...]:
    """As :data:`GROUPED`, where files that leave a key out mean these numbers; null still means that of Multi-head attention."""

    def absent(key: str, value: int | None, null: Callable[[Reading], int]) -> Callable[[Reading], int]:
        return lambda config: null(config) if value is None or key in config.values else value

    heads = absent("num_key_value_heads", kv_heads, lambda config: config.whole("num_attention_heads"))
    return (
        Key("num_key_value_heads", "kv_heads", default=heads),
        Key("head_dim", "head_dim", default=absent("head_dim", head_dim, head_width)),
    )


def _heads_divide(model: ModelConfig) -> Values:
    if model.d_model % model.heads:
        raise Inexpressible("heads")
    return {}


HEADS_DIVIDE = Custom((), lambda config: {}, _heads_divide)
"""Of families whose configuration class refuses heads that do not divide the width, whatever ``head_dim`` says."""

GATED_ACTIVATIONS = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu_pytorch_tanh": "geglu_tanh",
    "gelu_new": "geglu_tanh",
    "gelu": "geglu",
    "relu": "reglu",
    "sigmoid": "glu",
}
"""transformers' name of f in W_down (f(W_gate x) ⊙ W_up x) → ours."""

PLAIN_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
}
"""transformers' name of f in W_down f(W_up x) → ours."""


def gated(key: str = "hidden_act", default: str = "silu") -> Choice:
    """A gated feed-forward and its activation."""
    return Choice(key, "feedforward", GATED_ACTIVATIONS, default=default)


def plain(key: str = "hidden_act", default: str = "gelu_new") -> Choice:
    """A plain feed-forward and its activation; of several names for one, the family's own is written."""
    names = {default: PLAIN_ACTIVATIONS[default], **PLAIN_ACTIVATIONS}
    return Choice(key, "feedforward", names, default=default)


def rms_norm(default: float = 1e-6) -> tuple[Rule, ...]:
    """RMSNorm and its ε."""
    return (Always(norm="rmsnorm"), Key("rms_norm_eps", "norm_eps", default=default))


def tied(default: bool) -> Key:
    """Whether the head is the embedding."""
    return Key("tie_word_embeddings", "tied_embeddings", default=default)


DROPOUT = Key("attention_dropout", "attention_dropout", default=0.0)

LAYER = "model.layers.{layer}"
BLOCK = "blocks.{layer}"

AROUND = (
    Map("model.embed_tokens", "embedding"),
    Map("model.norm", "norm"),
    Map("lm_head", "head"),
)
"""What stands around Llama's layers."""

ATTENTION = (
    Map(f"{LAYER}.self_attn.q_proj", f"{BLOCK}.attention.qkv", parts=(0,)),
    Map(f"{LAYER}.self_attn.k_proj", f"{BLOCK}.attention.qkv", parts=(1,)),
    Map(f"{LAYER}.self_attn.v_proj", f"{BLOCK}.attention.qkv", parts=(2,)),
    Map(f"{LAYER}.self_attn.o_proj", f"{BLOCK}.attention.output"),
)
QK_NORMS = (
    Map(f"{LAYER}.self_attn.q_norm", f"{BLOCK}.attention.q_norm.norm"),
    Map(f"{LAYER}.self_attn.k_norm", f"{BLOCK}.attention.k_norm.norm"),
)
GATED_MLP = (
    Map(f"{LAYER}.mlp.gate_proj", f"{BLOCK}.feedforward.gate_up", parts=(0,)),
    Map(f"{LAYER}.mlp.up_proj", f"{BLOCK}.feedforward.gate_up", parts=(1,)),
    Map(f"{LAYER}.mlp.down_proj", f"{BLOCK}.feedforward.down"),
)
FUSED_MLP = (
    Map(f"{LAYER}.mlp.gate_up_proj", f"{BLOCK}.feedforward.gate_up"),
    Map(f"{LAYER}.mlp.down_proj", f"{BLOCK}.feedforward.down"),
)
PRE_NORMS = (
    Map(f"{LAYER}.input_layernorm", f"{BLOCK}.attention_norm"),
    Map(f"{LAYER}.post_attention_layernorm", f"{BLOCK}.feedforward_norm"),
)
REORDERED_NORMS = (
    Map(f"{LAYER}.post_attention_layernorm", f"{BLOCK}.attention_post_norm"),
    Map(f"{LAYER}.post_feedforward_layernorm", f"{BLOCK}.feedforward_post_norm"),
)
EXPERTS = (
    Map(f"{LAYER}.mlp.gate", f"{BLOCK}.feedforward.router.score"),
    Map(f"{LAYER}.mlp.experts.{{index}}.gate_proj", f"{BLOCK}.feedforward.up", parts=(0,)),
    Map(f"{LAYER}.mlp.experts.{{index}}.up_proj", f"{BLOCK}.feedforward.up", parts=(1,)),
    Map(f"{LAYER}.mlp.experts.{{index}}.down_proj", f"{BLOCK}.feedforward.down"),
)
"""Beside :data:`GATED_MLP`, which then is of the dense layers."""

LLAMA_WEIGHTS = (*AROUND, *ATTENTION, *GATED_MLP, *PRE_NORMS)
