"""Which combinations of choices cannot be, each with the sentence that says why."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scratchlm.model.config import ModelConfig

LINEAR = ("linear", "retention", "gla", "gated_delta")
"""Attention without a softmax: it keeps a state and has no scores."""


def check(config: ModelConfig) -> None:
    """Raise ValueError with one sentence if `config` asks for something that cannot be built.

    What some layers cannot obey is forbidden for those layers. A field that nothing reads (the window of a model without
    windows) is allowed, so that one flag can switch a choice off; where a name promises an effect that no layer would show
    (a soft cap without scores, a pattern longer than the stack, a factor without scaling), it is refused.
    """
    _widths(config)
    _positions(config)
    _attention(config)
    _experts(config)
    if config.block == "parallel_shared" and config.norm_placement not in ("pre", "double"):
        raise ValueError(
            f"block = parallel_shared shares the norm before the branches, and norm_placement = {config.norm_placement} "
            "has none there; use block = parallel"
        )


def _layers(config: ModelConfig) -> range:
    """Every layer, those of multi-token prediction included; at least one."""
    return range(max(1, config.layers + config.mtp_depth))


def _widths(config: ModelConfig) -> None:
    if config.head_dim is None and config.d_model % config.heads:
        raise ValueError(
            f"heads = {config.heads} does not divide d_model = {config.d_model}; "
            "change one of them or set head_dim explicitly"
        )
    if config.heads % config.resolved_kv_heads:
        raise ValueError(f"kv_heads = {config.kv_heads} does not divide heads = {config.heads}")
    for name, pattern in (
        ("attention", config.attention),
        ("mask", config.mask),
        ("position", config.position),
        ("rope.theta", config.rope.theta),
        ("rope.scaling", config.rope.scaling),
    ):
        if config.layers and len(pattern) > config.layers:
            raise ValueError(
                f"{name} has {len(pattern)} values for layers = {config.layers}: the last would never be used"
            )


def _positions(config: ModelConfig) -> None:
    names = {config.position_at(layer) for layer in _layers(config)}
    if "rope" in names:
        latent = {
            config.attention_at(layer) == "mla" for layer in _layers(config) if config.position_at(layer) == "rope"
        }
        if False in latent and (config.rotated_dims % 2 or not config.rotated_dims):
            share = f" · rope.fraction = {config.rope.fraction:g}, {config.rotated_dims},"
            raise ValueError(
                f"RoPE rotates pairs: head_dim = {config.resolved_head_dim}{share if config.rope.fraction < 1 else ''} "
                "must be even"
            )
        if True in latent and (config.latent.rope_dim % 2 or not config.latent.rope_dim):
            raise ValueError(
                f"RoPE rotates pairs: latent.rope_dim = {config.latent.rope_dim} must be even and not 0 with attention = mla"
            )
    if "yarn" in config.rope.scaling and min(config.rope.theta) <= 1:
        raise ValueError(
            f"rope.theta = {min(config.rope.theta):g} has no long waves for rope.scaling = yarn: set it above 1"
        )
    if config.rope.factor > 1 and set(config.rope.scaling) == {"none"}:
        raise ValueError(f"rope.factor = {config.rope.factor:g} stretches nothing while rope.scaling is none")
    if config.rope.low_freq_factor >= config.rope.high_freq_factor and "llama3" in config.rope.scaling:
        raise ValueError(
            f"rope.low_freq_factor = {config.rope.low_freq_factor:g} must be below rope.high_freq_factor = "
            f"{config.rope.high_freq_factor:g}"
        )


def _attention(config: ModelConfig) -> None:
    softmax = False
    for layer in _layers(config):
        attention, mask, position = config.attention_at(layer), config.mask_at(layer), config.position_at(layer)
        if attention not in LINEAR:
            softmax = True
        elif mask != "causal":
            raise ValueError(
                f"layer {layer} has attention = {attention} and mask = {mask}: linear attention keeps one state of all that "
                "came before and cannot leave positions out; give that layer the mask causal"
            )
        elif position == "alibi":
            raise ValueError(
                f"layer {layer} has attention = {attention} and position = alibi: ALiBi is added to scores, and linear "
                "attention has none; give that layer another position"
            )
    wanting = {
        "attention_soft_cap": config.attention_soft_cap is not None,
        "attention_sinks": config.attention_sinks,
        "attention_dropout": config.attention_dropout > 0,
    }
    for name, wanted in wanting.items():
        if wanted and not softmax:
            raise ValueError(f"{name} acts on the scores of softmax attention, and no layer has it")
    if config.qkv_clip is not None and all(config.attention_at(layer) != "mha" for layer in _layers(config)):
        raise ValueError("qkv_clip cuts the queries, keys and values of attention = mha, and no layer has it")
    if "prefix_lm" in config.mask and not 2 <= config.prefix_length < config.context_length:
        raise ValueError(
            f"mask = prefix_lm needs a prefix to train with: prefix_length = {config.prefix_length} must be at least 2 and below "
            f"context_length = {config.context_length}"
        )
    if set(config.attention) == {"mla"} and config.kv_heads not in (None, config.heads):
        raise ValueError(
            f"attention = mla reads the keys of all heads from one latent vector: kv_heads = {config.kv_heads} has no meaning"
        )
    if set(config.attention) == {"mla"} and config.qk_norm != "none":
        raise ValueError(
            "attention = mla norms its latent vectors; with qk_norm keys could not be read from the cached vector, "
            "so set qk_norm = none"
        )
    if "gla" in config.attention and config.linear.chunk & (config.linear.chunk - 1):
        raise ValueError(
            f"linear.chunk = {config.linear.chunk} must be a power of two for attention = gla, whose chunks are halved"
        )
    if config.linear.normalise and "linear" not in config.attention:
        raise ValueError("linear.normalise is read by attention = linear alone, and no layer has it")
    if config.stride_summary > config.stride and "fixed" in config.mask:
        raise ValueError(
            f"stride_summary = {config.stride_summary} is more than a stretch of stride = {config.stride}"
        )


def _experts(config: ModelConfig) -> None:
    moe = config.moe
    if not moe.experts:
        if moe.shared or moe.d_shared or moe.first_dense or moe.bias_update:
            raise ValueError("moe has settings but moe.experts = 0: set the number of experts")
        return
    if moe.d_shared and not moe.shared:
        raise ValueError(
            f"moe.d_shared = {moe.d_shared} is the width of the shared experts, and moe.shared = 0: set how many there are"
        )
    if moe.shared_gate and not moe.shared:
        raise ValueError("moe.shared_gate gates the shared experts, and moe.shared = 0")
    if moe.router == "topk_softmax" and not moe.normalise:
        raise ValueError(
            "moe.router = topk_softmax has gates that add up to 1 as they are: moe.normalise = false has no meaning"
        )
    if config.active_experts > config.n_experts:
        raise ValueError(f"moe.top_k = {moe.top_k} is more than moe.experts = {moe.experts}")
    if config.n_experts % moe.groups:
        raise ValueError(f"moe.groups = {moe.groups} does not divide the {config.n_experts} experts")
    top_groups = moe.top_groups or moe.groups
    if top_groups > moe.groups:
        raise ValueError(f"moe.top_groups = {moe.top_groups} is more than moe.groups = {moe.groups}")
    if top_groups * (config.n_experts // moe.groups) < config.active_experts:
        raise ValueError(
            f"moe.top_groups = {top_groups} groups hold {top_groups * (config.n_experts // moe.groups)} experts, fewer than "
            f"the {config.active_experts} a token goes to"
        )
    if config.layers and not any(config.has_experts(layer) for layer in range(config.layers)):
        raise ValueError(
            f"no layer would have experts: moe.first_dense = {moe.first_dense}, moe.every = {moe.every}, "
            f"layers = {config.layers}"
        )
