"""The configuration of a ScratchLM model for `transformers`: the architecture as ScratchLM writes it, and what follows from it.

This file and ``modeling_scratchlm.py`` are copied beside exported weights; they need torch and transformers alone.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

from transformers import PretrainedConfig

DEFAULTS: dict[str, Any] = {
    "vocab_size": 0,
    "context_length": 256,
    "d_model": 256,
    "layers": 4,
    "heads": 8,
    "kv_heads": None,
    "head_dim": None,
    "d_ff": None,
    "d_ff_ratio": None,
    "d_ff_multiple": 64,
    "norm": "rmsnorm",
    "norm_eps": 1e-5,
    "norm_placement": "pre",
    "final_norm": None,
    "embedding_norm": False,
    "qk_norm": "none",
    "qk_norm_kind": None,
    "qk_norm_eps": None,
    "block": "serial",
    "residual": "plain",
    "residual_init": 1.0,
    "feedforward": "swiglu",
    "feedforward_bias": False,
    "moe": {
        "experts": 0,
        "top_k": 2,
        "fine_grained": 1,
        "d_expert": None,
        "shared": 0,
        "d_shared": None,
        "shared_gate": False,
        "first_dense": 0,
        "every": 1,
        "router": "softmax_topk",
        "router_bias": False,
        "normalise": True,
        "gate_scale": 1.0,
        "groups": 1,
        "top_groups": None,
        "bias_update": 0.0,
    },
    "position": ["rope"],
    "rope": {
        "theta": [10_000.0],
        "fraction": 1.0,
        "pairs": "half",
        "scaling": ["none"],
        "factor": 1.0,
        "original_context": None,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": True,
        "attention_factor": None,
    },
    "attention": ["mha"],
    "attention_bias": [],
    "attention_scale": None,
    "attention_soft_cap": None,
    "attention_sinks": False,
    "qkv_clip": None,
    "latent": {"q_rank": None, "kv_rank": 64, "rope_dim": 16, "value_dim": None, "norm_eps": None},
    "linear": {"feature_map": "elu1", "normalise": None, "conv_width": 4, "output_gate": True},
    "mask": ["causal"],
    "window": 128,
    "stride": 16,
    "stride_summary": 1,
    "mask_block": 64,
    "mask_local_blocks": 2,
    "global_tokens": 0,
    "prefix_length": 0,
    "tied_embeddings": False,
    "head_bias": False,
    "embedding_scale": 1.0,
    "logit_scale": 1.0,
    "logit_soft_cap": None,
    "mtp_depth": 0,
    "embedding_dropout": 0.0,
    "attention_dropout": 0.0,
    "residual_dropout": 0.0,
}
"""Every field these files read, with the value it has where an architecture leaves it out."""

UNREAD: dict[str, set[str]] = {
    "": {"init", "init_linear_std", "init_embedding_std", "init_output_std", "kernels", "attention_kernel"},
    "moe": {"jitter", "balance_loss", "balance_over", "router_z_loss", "capacity_factor", "dispatch"},
    "linear": {"form", "chunk"},
}
"""Fields by section that say how a model starts, learns or is computed, not which function it is."""

CHOICES: dict[str, set[str]] = {
    "norm": {
        "rmsnorm", "rmsnorm_noscale", "rmsnorm_unit_offset",
        "layernorm", "layernorm_nobias", "layernorm_noparams", "none",
    },
    "norm_placement": {"pre", "post", "reordered", "double", "none"},
    "qk_norm": {"none", "head", "each", "full"},
    "block": {"serial", "parallel", "parallel_shared"},
    "residual": {"plain", "depth", "fixed", "scalar", "vector"},
    "feedforward": {
        "relu", "relu2", "gelu", "gelu_tanh", "silu",
        "glu", "reglu", "geglu", "geglu_tanh", "swiglu", "swiglu_clamped",
    },
    "position": {"rope", "alibi", "sinusoidal", "learned", "none"},
    "rope.pairs": {"half", "interleaved"},
    "rope.scaling": {"none", "linear", "ntk", "yarn", "llama3"},
    "attention": {"mha", "mla", "linear", "retention", "gla", "gated_delta"},
    "attention_bias": {"q", "k", "v", "o"},
    "linear.feature_map": {"elu1", "relu", "identity"},
    "mask": {"causal", "sliding_window", "strided", "fixed", "block_sparse", "prefix_lm"},
    "moe.router": {"softmax_topk", "topk_softmax", "sigmoid"},
}  # fmt: skip
"""The names each choice knows."""
CHOICES["qk_norm_kind"] = CHOICES["norm"]

GATED = {"glu", "reglu", "geglu", "geglu_tanh", "swiglu", "swiglu_clamped"}
SOFTMAX = {"mha", "mla"}


def complete(
    architecture: dict[str, Any], defaults: dict[str, Any] = DEFAULTS, section: str = ""
) -> dict[str, Any]:
    """The architecture with every field that these files read.

    Raises:
        ValueError: a field or a name that these files do not know: they are older than the model.
    """
    unknown = sorted(set(architecture) - set(defaults) - UNREAD.get(section, set()))
    if unknown:
        where = f"{section}." if section else ""
        raise ValueError(
            f"architecture.{where}{unknown[0]} is unknown to this version of the model's code: use the "
            "configuration_scratchlm.py and modeling_scratchlm.py that were exported with the model"
        )
    known = {name: value for name, value in architecture.items() if name in defaults}
    merged: dict[str, Any] = copy.deepcopy(defaults) | copy.deepcopy(known)
    for name, default in defaults.items():
        field = f"{section}.{name}" if section else name
        if isinstance(default, dict):
            merged[name] = complete(known.get(name) or {}, default, name)
        elif field in CHOICES:
            for value in merged[name] if isinstance(merged[name], list) else [merged[name]]:
                if value not in CHOICES[field] and not (value is None and default is None):
                    allowed = ", ".join(sorted(CHOICES[field]))
                    raise ValueError(f"architecture.{field} = {value!r} is unknown; known: {allowed}")
    return merged


class ScratchLMConfig(PretrainedConfig):
    """What `transformers` asks of a configuration, read from the architecture.

    Args:
        architecture: what ScratchLM's ``ModelConfig.model_dump(mode="json")`` gives; fields may be left out.
        vocab_size: replaces the architecture's, as after ``resize_token_embeddings``.
        use_cache: whether `generate` keeps what earlier tokens left.
        kwargs: of `PretrainedConfig`.

    Raises:
        ValueError: a field or a name that is unknown.
    """

    model_type = "scratchlm"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  # the base class has a list, too

    def __init__(
        self,
        architecture: dict[str, Any] | None = None,
        vocab_size: int | None = None,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.architecture = complete(architecture or {})
        if vocab_size is not None:
            self.architecture["vocab_size"] = vocab_size
        self.vocab_size = self.architecture["vocab_size"]
        self.use_cache = use_cache
        a = self.resolved()
        self.hidden_size, self.num_hidden_layers = a.d_model, a.layers
        self.num_attention_heads, self.num_key_value_heads, self.head_dim = a.heads, a.kv_heads, a.head_dim
        self.intermediate_size, self.max_position_embeddings = a.d_ff, a.context_length
        derived = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
        for name in (*derived, "intermediate_size", "max_position_embeddings"):
            kwargs.pop(name, None)  # from a saved file
        super().__init__(**(kwargs | {"tie_word_embeddings": a.tied_embeddings}))

    def resolved(self) -> SimpleNamespace:
        """The architecture's fields as attributes, with a value where one follows from others."""
        a = SimpleNamespace(**copy.deepcopy(self.architecture))
        for section in ("moe", "rope", "latent", "linear"):
            setattr(a, section, SimpleNamespace(**getattr(a, section)))
        a.vocab_size = self.vocab_size
        a.kv_heads = a.kv_heads or a.heads
        a.head_dim = a.head_dim or a.d_model // a.heads
        if a.d_ff is None:
            ratio = a.d_ff_ratio or (8 / 3 if a.feedforward in GATED else 4.0)
            a.d_ff = max(1, round(ratio * a.d_model / a.d_ff_multiple)) * a.d_ff_multiple
        if a.final_norm is None:
            a.final_norm = a.norm_placement not in ("post", "none")
        if a.embedding_scale == "sqrt_d_model":
            a.embedding_scale = a.d_model**0.5
        a.qk_norm_kind = a.qk_norm_kind or ("rmsnorm" if a.norm == "none" else a.norm)
        a.qk_norm_eps, a.latent.norm_eps = a.qk_norm_eps or a.norm_eps, a.latent.norm_eps or a.norm_eps
        a.latent.value_dim = a.latent.value_dim or a.head_dim
        a.rope.original_context = a.rope.original_context or a.context_length / a.rope.factor
        if a.linear.normalise is None:
            a.linear.normalise = a.linear.feature_map != "identity"
        a.moe.d_expert = a.moe.d_expert or max(1, a.d_ff // a.moe.fine_grained)
        a.moe.d_shared = a.moe.d_shared or a.moe.shared * a.moe.d_expert
        a.moe.n_experts, a.moe.active = a.moe.experts * a.moe.fine_grained, a.moe.top_k * a.moe.fine_grained
        a.moe.top_groups = a.moe.top_groups or a.moe.groups
        return a


ScratchLMConfig.register_for_auto_class()
