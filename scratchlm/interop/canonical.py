"""What a configuration computes, apart from how it is written: two configurations with equal functions compare equal.

Fields that nothing reads are left out (the window of a model without windows), patterns are spelled out layer by layer,
values that None stands for are filled in. How a model is trained and initialised is no part of it, nor how it is computed.
"""

from __future__ import annotations

import math
from typing import Any

from scratchlm.interop.rules import per_layer, value_of
from scratchlm.model.config import ModelConfig
from scratchlm.model.legality import LINEAR
from scratchlm.section import flat_fields

NOT_THE_FUNCTION = {
    *(
        "embedding_dropout",
        "attention_dropout",
        "residual_dropout",
        "init",
        "init_linear_std",
        "init_embedding_std",
    ),
    *("init_output_std", "attention_kernel", "kernels", "moe.dispatch", "moe.jitter", "moe.balance_loss"),
    *(
        "moe.balance_over",
        "moe.router_z_loss",
        "moe.bias_update",
        "moe.capacity_factor",
        "linear.form",
        "linear.chunk",
    ),
    *("d_ff_ratio", "d_ff_multiple", "moe.fine_grained", "prefix_length"),
}
"""Training, initial weights, implementation, and what only derives another field."""

PATTERNS = ("attention", "mask", "position", "rope.theta", "rope.scaling")


def function_of(config: ModelConfig) -> dict[str, Any]:
    """Dotted field → value, of every field that changes what the model computes."""
    fields = {name: value_of(config, name) for name in flat_fields(config) if name not in NOT_THE_FUNCTION}
    for name in PATTERNS:
        fields[name] = tuple(per_layer(config, name))
    for name in _unread(config, fields):
        fields.pop(name, None)
    _fill_in(config, fields)
    return fields


def _unread(config: ModelConfig, fields: dict[str, Any]) -> set[str]:
    """Fields of choices that this model does not make."""
    attention, masks, positions = set(fields["attention"]), set(fields["mask"]), set(fields["position"])
    has = {
        "window": "sliding_window" in masks,
        "stride": bool(masks & {"strided", "fixed"}),
        "stride_summary": "fixed" in masks,
        **dict.fromkeys(("mask_block", "mask_local_blocks", "global_tokens"), "block_sparse" in masks),
        "norm_eps": any(value_of(config, name) != "none" for name in ("norm", "qk_norm")) or "mla" in attention,
        "qk_norm_kind": config.qk_norm != "none",
        "qk_norm_eps": config.qk_norm != "none",
        "residual_init": config.residual == "fixed",
        "attention_scale": bool(attention - set(LINEAR)),
    }
    unread = {name for name, read in has.items() if not read}
    if "rope" not in positions:
        unread |= {name for name in fields if name.startswith("rope.")}
    if "mla" not in attention:
        unread |= {name for name in fields if name.startswith("latent.")}
    if not attention & set(LINEAR):
        unread |= {name for name in fields if name.startswith("linear.")}
    if not config.moe.experts:
        unread |= {name for name in fields if name.startswith("moe.")}
    elif all(config.has_experts(layer) for layer in range(config.layers)):
        unread |= {"d_ff"}
    if not config.moe.shared:
        unread |= {"moe.shared_gate", "moe.d_shared"}
    return unread | _unread_scalings(config, fields)


def _unread_scalings(config: ModelConfig, fields: dict[str, Any]) -> set[str]:
    kinds = set(fields["rope.scaling"])
    read = {"linear": {"factor"}, "ntk": {"factor"}}
    read["yarn"] = {"factor", "original_context", "beta_fast", "beta_slow", "attention_factor", "truncate"}
    read["llama3"] = {"factor", "original_context", "low_freq_factor", "high_freq_factor"}
    used = set().union(*(read.get(kind, set()) for kind in kinds))
    return {f"rope.{name}" for name in set().union(*read.values()) - used}


def _fill_in(config: ModelConfig, fields: dict[str, Any]) -> None:
    """What None and derived fields stand for."""
    rope = config.rope
    if "rope.original_context" in fields:
        fields["rope.original_context"] = rope.original_context or config.context_length / rope.factor
    if fields.get("rope.attention_factor", 0) is None:
        fields["rope.attention_factor"] = 0.1 * math.log(rope.factor) + 1.0
    if "rope.theta" in fields:  # of layers that turn nothing it says nothing
        for name in ("rope.theta", "rope.scaling"):
            values = zip(fields[name], fields["position"], strict=True)
            fields[name] = tuple(value if position == "rope" else None for value, position in values)
    if "rope.fraction" in fields:
        fields["rope.fraction"] = config.rotated_dims
    if "attention_scale" in fields and config.attention_scale is None:
        latent = "mla" in fields["attention"]
        fields["attention_scale"] = (config.resolved_head_dim + (config.latent.rope_dim if latent else 0)) ** -0.5
    if config.embedding_scale == "sqrt_d_model":
        fields["embedding_scale"] = math.sqrt(config.d_model)
    if "qk_norm_kind" in fields:
        fields["qk_norm_kind"] = config.resolved_qk_norm_kind
        fields["qk_norm_eps"] = config.norm_eps if fields.get("qk_norm_eps") is None else fields["qk_norm_eps"]
    if "latent.norm_eps" in fields and fields["latent.norm_eps"] is None:
        fields["latent.norm_eps"] = config.norm_eps
    fields["attention_bias"] = "".join(sorted(config.attention_bias))
    if config.moe.experts:
        fields["moe.layers"] = tuple(config.has_experts(layer) for layer in range(config.layers))
        for name in ("moe.first_dense", "moe.every"):
            fields.pop(name, None)
        if "moe.top_groups" in fields:
            fields["moe.top_groups"] = config.moe.top_groups or config.moe.groups
        if config.moe.shared:
            width = fields.pop("moe.d_shared", None) or config.moe.shared * config.resolved_d_expert
            fields["moe.shared"] = width
        if config.moe.router in ("topk_softmax", "softmax_topk") and config.moe.normalise:
            fields["moe.router"] = "softmax"  # over the chosen scores: that over all, divided by their sum
        fields["moe.correction"] = config.moe.router == "sigmoid" or config.moe.bias_update > 0


def differences(one: ModelConfig, other: ModelConfig) -> list[str]:
    """The fields in which two configurations compute different functions."""
    first, second = function_of(one), function_of(other)
    return sorted(name for name in first.keys() | second.keys() if not _same(first.get(name), second.get(name)))


def _same(one: Any, other: Any) -> bool:
    numbers = isinstance(one, float | int) and isinstance(other, float | int)
    if numbers and not isinstance(one, bool) and not isinstance(other, bool):
        return math.isclose(one, other, rel_tol=1e-12)
    return bool(one == other)
