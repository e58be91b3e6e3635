"""What mixtures of experts have in common: which layers have experts, how many there are, shared ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scratchlm.interop.families.shared import BLOCK, LAYER
from scratchlm.interop.rope_rules import unless_null
from scratchlm.interop.rules import (
    MISSING,
    Always,
    Custom,
    Harmless,
    Inexpressible,
    Key,
    Only,
    Reading,
    Rule,
    Values,
)
from scratchlm.interop.weights import Map
from scratchlm.model.config import ModelConfig

FAMILIES: tuple[()] = ()

LOSSES = Harmless("router_aux_loss_coef", "router_jitter_noise", "router_z_loss_coef")
"""How routers are trained. transformers' loss is k times ours and pools all layers, so its weight is not ours; its noise
reaches the experts as well."""


def widths(context: int = 2048) -> tuple[Rule, ...]:
    """The usual names of the widths but those of feed-forwards; `context`: what an absent length stands for."""
    return (
        Key("vocab_size", "vocab_size"),
        Key("hidden_size", "d_model"),
        Key("num_hidden_layers", "layers"),
        Key("num_attention_heads", "heads"),
        Key("max_position_embeddings", "context_length", default=context),
    )


def counts(
    experts: int = MISSING,
    top_k: int = MISSING,
    d_expert: int = MISSING,
    *,
    key: str = "num_experts",
    width: str = "moe_intermediate_size",
) -> tuple[Rule, ...]:
    """How many experts there are, how many a token goes to, and how wide they are.

    Args:
        experts, top_k, d_expert: what absent keys stand for; none: they are required.
        key: of the number of experts, which newer files call ``num_experts`` or ``num_local_experts``.
        width: the key of an expert's inner width.
    """
    others = tuple(name for name in ("num_experts", "num_local_experts") if name != key)
    return (
        Key(key, "moe.experts", default=experts, also=others),
        Key("num_experts_per_tok", "moe.top_k", default=top_k),
        Key(width, "moe.d_expert", default=d_expert),
    )


def sigmoid_router(
    groups: int = 1, top_groups: int = 1, scale: float = 1.0, normalise: bool = True
) -> tuple[Rule, ...]:
    """DeepSeek-V3's router, with what absent keys stand for; null of groups is none."""

    def write(model: ModelConfig) -> Values:
        return {"n_group": model.moe.groups, "topk_group": model.moe.top_groups or model.moe.groups}

    return (
        Always(moe__router="sigmoid"),
        Key("routed_scaling_factor", "moe.gate_scale", default=scale),
        Key("norm_topk_prob", "moe.normalise", default=normalise),
        Key("n_group", "moe.groups", default=unless_null("n_group", groups, 1)),
        Key("topk_group", "moe.top_groups", default=unless_null("topk_group", top_groups)),
        Custom((), lambda config: {}, write),
        Only("topk_method", "noaux_tc", written=False),
        Only("scoring_func", "sigmoid", written=False, accepted=("noaux_tc",)),
    )


PREDICTION = Harmless("num_nextn_predict_layers", "num_mtp_layers")
"""How many modules of multi-token prediction there are, which generation leaves out."""

BEYOND = r"model\.layers\.{beyond}\..*"
"""Their tensors: further layers."""


def layers_with_experts(config: Reading, key: str, having: Sequence[int]) -> Values:
    """Our fields for the numbers of the layers that have experts.

    Raises:
        UserError: they are no run of every n-th layer to the end; `key` is named.
    """
    layers = config.whole("num_hidden_layers")
    if len(having) > 1:
        every = having[1] - having[0]
    elif having:
        every = max(1, layers - having[0])
    else:
        every = 2  # the last layer is the first of a pair that is not there
    first = having[0] - every + 1 if having else layers - 1
    if every > 0 and first >= 0 and list(range(first + every - 1, layers, every)) == list(having):
        return {"moe.first_dense": first, "moe.every": every}
    raise config.wrong(key, config.values.get(key), "layers with experts must be every n-th one to the last")


def dense_layers(model: ModelConfig) -> list[int]:
    """The numbers of the layers without experts."""
    return [layer for layer in range(model.layers) if not model.has_experts(layer)]


@dataclass(frozen=True)
class FirstDense:
    """The first layers are dense, all others have experts; where all are dense, none of the experts' fields is read.

    Stands after the rules of experts, whose fields it takes back for a dense model.

    Attributes:
        theirs: the key.
        default: what an absent key stands for.
    """

    theirs: str = "first_k_dense_replace"
    default: int = 0

    def fields(self) -> Sequence[str]:
        return ("moe.first_dense",)

    def read(self, config: Reading) -> Values:
        first = config.whole(self.theirs, default=self.default)
        if first >= config.whole("num_hidden_layers"):
            return {"moe.experts": 0, "moe.shared": 0, "moe.d_shared": None, "moe.first_dense": 0}
        return {"moe.first_dense": first, "moe.every": 1}

    def write(self, model: ModelConfig) -> Values:
        dense = dense_layers(model)
        if dense != list(range(len(dense))):
            raise Inexpressible("moe.every")
        return {self.theirs: len(dense)}


def shared_experts(theirs: str = "n_shared_experts", default: int = MISSING) -> Custom:
    """How many experts of the routed ones' width every token goes through; at least one."""

    def read(config: Reading) -> Values:
        count = config.whole(theirs, default=default)
        if count < 1:
            raise config.wrong(theirs, count, "at least one shared expert is needed")
        return {"moe.shared": count}

    def write(model: ModelConfig) -> Values:
        if not model.moe.experts:
            return {theirs: 1}
        count, rest = divmod(model.resolved_d_shared, model.resolved_d_expert)
        if not count or rest:
            raise Inexpressible("moe.d_shared" if rest else "moe.shared")
        return {theirs: count}

    return Custom(("moe.shared",), read, write)


def shared_of_width(theirs: str, default: int) -> Custom:
    """One shared expert of a width of its own."""

    def write(model: ModelConfig) -> Values:
        if not model.moe.shared:
            raise Inexpressible("moe.shared")
        return {theirs: model.resolved_d_shared}

    return Custom(
        ("moe.shared", "moe.d_shared"),
        lambda config: {"moe.shared": 1, "moe.d_shared": config.whole(theirs, default=default)},
        write,
    )


def shared_weights(name: str = "mlp.shared_experts") -> tuple[Map, ...]:
    """The shared experts as one network."""
    return (
        Map(f"{LAYER}.{name}.gate_proj", f"{BLOCK}.feedforward.shared.gate_up", parts=(0,)),
        Map(f"{LAYER}.{name}.up_proj", f"{BLOCK}.feedforward.shared.gate_up", parts=(1,)),
        Map(f"{LAYER}.{name}.down_proj", f"{BLOCK}.feedforward.shared.down"),
    )


def correction(name: str = "mlp.gate.e_score_correction_bias", unsqueezed: bool = False) -> Map:
    """The bias that experts are chosen with."""
    return Map(f"{LAYER}.{name}", f"{BLOCK}.feedforward.router.correction", unsqueezed=unsqueezed)


BLOCK_SPARSE = (
    Map(f"{LAYER}.block_sparse_moe.gate", f"{BLOCK}.feedforward.router.score"),
    Map(f"{LAYER}.block_sparse_moe.experts.{{index}}.w1", f"{BLOCK}.feedforward.up", parts=(0,)),
    Map(f"{LAYER}.block_sparse_moe.experts.{{index}}.w3", f"{BLOCK}.feedforward.up", parts=(1,)),
    Map(f"{LAYER}.block_sparse_moe.experts.{{index}}.w2", f"{BLOCK}.feedforward.down"),
)
"""Experts under Mixtral's names."""
