"""docs/architecture.md: its pictures, and the parts of it that the code writes itself.

Between ``<!-- costs -->`` and ``<!-- /costs -->`` (and so for each name in :func:`generated`) stands what the code says; the
rest of the page is written by hand. ``python -m scratchlm.model.draw`` renews both.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from scratchlm.errors import UserError
from scratchlm.model import choices, presets
from scratchlm.model.config import ModelConfig
from scratchlm.model.draw.ascii import drawing_in, drawing_of
from scratchlm.model.draw.cost import cache_picture, cost_picture, growing_and_bounded_bytes
from scratchlm.model.draw.hollow import hollow
from scratchlm.model.draw.layouts import block_picture, steps_of
from scratchlm.model.draw.masks import Grid, mask_picture
from scratchlm.model.draw.patterns import pattern_picture
from scratchlm.model.draw.positions import alibi_picture, rope_picture, ropes_of, sinusoid_picture
from scratchlm.model.draw.style import Picture

BASE: dict[str, Any] = {"vocab_size": 10_000, "context_length": 1024, "d_model": 512, "layers": 4, "heads": 8}
"""The model whose costs the page shows."""

_EXPERTS = {"experts": 8, "top_k": 2}
_WINDOW = {"mask": "sliding_window", "window": 128}

NEEDED: dict[str, dict[str, Any]] = {
    "mask = sliding_window": {"window": 128},
    "mask = strided": {"stride": 32},
    "mask = fixed": {"stride": 128, "stride_summary": 8},
    "mask = block_sparse": {"mask_block": 64, "global_tokens": 16},
    "mask = prefix_lm": {"prefix_length": 256},
    "rope.scaling = linear": {"rope": {"scaling": "linear", "factor": 4.0}},
    "rope.scaling = ntk": {"rope": {"scaling": "ntk", "factor": 4.0}},
    "rope.scaling = yarn": {"rope": {"scaling": "yarn", "factor": 4.0}},
    "rope.scaling = llama3": {"rope": {"scaling": "llama3", "factor": 4.0}},
    "attention = mla": {"latent": {"kv_rank": 128, "rope_dim": 32}},
    **{f"attention_kernel = {name}": _WINDOW for name in choices.ATTENTION_KERNEL.names},
}
"""What a choice is shown with."""

BESIDE: dict[str, dict[str, Any]] = {
    "kv_heads = 2": {"kv_heads": 2},
    "kv_heads = 1": {"kv_heads": 1},
    "head_dim = 128": {"head_dim": 128},
    "attention_bias = q k v": {"attention_bias": "q k v"},
    "attention_sinks": {"attention_sinks": True},
    "feedforward_bias": {"feedforward_bias": True},
    "tied_embeddings": {"tied_embeddings": True},
    "head_bias": {"head_bias": True},
    "embedding_norm": {"embedding_norm": True},
    "mtp_depth = 1": {"mtp_depth": 1},
    "latent.q_rank = 256": {"attention": "mla", "latent": {"q_rank": 256, "kv_rank": 128, "rope_dim": 32}},
    "moe.fine_grained = 4, shared = 1": {"moe": {**_EXPERTS, "fine_grained": 4, "shared": 1}},
    "moe.shared = 1, d_shared = 500": {"moe": {**_EXPERTS, "shared": 1, "d_shared": 500}},
    "moe.every = 2": {"moe": {**_EXPERTS, "every": 2}},
    "mask = sliding_window ×3, causal": {
        "mask": "sliding_window sliding_window sliding_window causal",
        "window": 128,
    },
    "attention = gated_delta ×3, mha": {"attention": "gated_delta gated_delta gated_delta mha"},
}
"""Rows of the cost table that are no value of an axis."""

REFUSED: tuple[dict[str, Any], ...] = (
    {"d_model": 100, "heads": 8},
    {"heads": 8, "kv_heads": 3},
    {"layers": 2, "mask": "sliding_window sliding_window causal"},
    {"d_model": 72, "heads": 8},
    {"attention": "mla", "latent": {"rope_dim": 7}},
    {"rope": {"scaling": "yarn", "theta": 1.0}},
    {"rope": {"factor": 4.0}},
    {"rope": {"scaling": "llama3", "low_freq_factor": 4.0}},
    {"attention": "retention", "mask": "sliding_window"},
    {"attention": "gla", "position": "alibi"},
    {"attention": "linear", "attention_soft_cap": 50.0},
    {"attention": "mla", "qkv_clip": 8.0},
    {"attention": "mla", "kv_heads": 2},
    {"attention": "mla", "qk_norm": "head"},
    {"mask": "prefix_lm"},
    {"attention": "gla", "linear": {"chunk": 48}},
    {"attention": "retention", "linear": {"normalise": True}},
    {"mask": "fixed", "stride": 8, "stride_summary": 9},
    {"moe": {"shared": 1}},
    {"moe": {"experts": 4, "d_shared": 500}},
    {"moe": {"experts": 4, "shared_gate": True}},
    {"moe": {"experts": 4, "router": "topk_softmax", "normalise": False}},
    {"moe": {"experts": 4, "top_k": 8}},
    {"moe": {"experts": 8, "groups": 3}},
    {"moe": {"experts": 8, "groups": 2, "top_groups": 4}},
    {"moe": {"experts": 8, "groups": 8, "top_groups": 1}},
    {"layers": 2, "moe": {"experts": 8, "first_dense": 2}},
    {"block": "parallel_shared", "norm_placement": "post"},
)
"""One configuration for every sentence in `legality.py`."""


def example(axis: str, name: str) -> ModelConfig:
    """The base with one axis set to one name, and what that needs beside it."""
    section, _, field = axis.rpartition(".")
    fields: dict[str, Any] = {section: {field: name}} if section else {field: name}
    if section == "moe":
        fields["moe"] |= _EXPERTS
    if section == "linear":
        fields["attention"] = "linear"
    return ModelConfig(**{**BASE, **fields, **NEEDED.get(f"{axis} = {name}", {})})


def examples() -> Iterator[tuple[str, ModelConfig]]:
    """Every choice of the cost table."""
    for axis in choices.AXES:
        for name in axis.names:
            yield f"{axis.axis} = {name}", example(axis.axis, name)
    for title, changes in BESIDE.items():
        yield title, ModelConfig(**{**BASE, **changes})


def costs_of(config: ModelConfig) -> tuple[int, int, float, int, int]:
    """Parameters, those one token meets, FLOPs per token at the full context, and bytes in bfloat16 that generation keeps: per
    token, and whatever the length."""
    model = hollow(config)
    flops = model.flops_per_token(config.context_length)
    return model.num_params(), model.num_active_params(), flops, *growing_and_bounded_bytes(config)


def cost_table() -> str:
    """The costs of every choice, as Markdown: values of an axis that cost the same in one row, a dot where the base costs that."""
    base: tuple[float, ...] = costs_of(ModelConfig(**BASE))
    rows: dict[tuple[str, tuple[float, ...]], list[str]] = {}
    for title, config in examples():
        costs: tuple[float, ...] = costs_of(config)
        axis, _, name = title.partition(" = ")
        key = (axis if title not in BESIDE else title, costs)
        rows.setdefault(key, []).append(f"`{name or axis}`" if title not in BESIDE else "")
    lines = [
        "| choice | parameters | met by one token | FLOPs per token | cache, bytes per token | states and windows, bytes |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        f"| the base | {' | '.join(f'{cost:,.0f}' for cost in base)} |",
    ]
    for (axis, costs), names in rows.items():
        shown = [f"{cost:,.0f}" if cost != base[at] else "·" for at, cost in enumerate(costs)]
        listed = f" = {', '.join(names)}" if any(names) else ""
        lines.append(f"| `{axis}`{listed} | {' | '.join(shown)} |")
    return "\n".join(lines)


def refusal_of(changes: Mapping[str, Any]) -> str:
    """The sentence a configuration is refused with; empty if it is not."""
    try:
        ModelConfig(**changes)
    except UserError as error:
        return str(error).removeprefix("ModelConfig: ")
    return ""


def refusal_list() -> str:
    """Every refused combination and its sentence, as Markdown."""
    return "\n".join(f"- {refusal_of(changes)}" for changes in REFUSED)


def layouts() -> str:
    """The drawings of blocks, placements, attention, feed-forward, experts, routers and positions, as Markdown."""
    import scratchlm.model.moe as moe
    import scratchlm.model.position as position
    import scratchlm.model.router as router

    shown = [(choices.BLOCK, name) for name in choices.BLOCK.names]
    shown += [(choices.NORM_PLACEMENT, name) for name in choices.NORM_PLACEMENT.names]
    shown += [(choices.ATTENTION, name) for name in ("mha", "mla", "retention")]
    drawn = {f"{axis.axis} = {name}": drawing_of(axis, name) for axis, name in shown}
    drawn["attention = linear, retention, gla, gated_delta"] = drawn.pop("attention = retention")
    drawn["feedforward"] = drawing_of(choices.FEEDFORWARD, "swiglu")
    drawn |= {name: drawing_in(module.__doc__) for name, module in (("moe", moe), ("moe.router", router))}
    drawn["position"] = drawing_in(position.__doc__)
    return (
        "```\n"
        + "\n\n".join(f"{title}\n\n{textwrap.indent(text, '    ')}" for title, text in drawn.items())
        + "\n```"
    )


def generated() -> dict[str, str]:
    """Every part of the page that is not written by hand."""
    return {"costs": cost_table(), "refused": refusal_list(), "layouts": layouts()}


def filled(page: str, parts: Mapping[str, str] | None = None) -> str:
    """The page with those parts renewed.

    Args:
        page: Markdown with marks ``<!-- name -->`` and ``<!-- /name -->``.
        parts: what stands between them; None: those of architecture.md.

    Raises:
        UserError: the page lacks a mark.
    """
    for name, text in (generated() if parts is None else parts).items():
        mark = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)", re.DOTALL)
        if not mark.search(page):
            raise UserError(f"the page has no <!-- {name} --> … <!-- /{name} -->; add both marks")
        page = mark.sub(lambda found, text=text: f"{found[1]}{text}{found[2]}", page)  # type: ignore[misc]
    return page


def _blocks(axis: str, changes: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Any]]:
    drawn = []
    for title, fields in changes.items():
        config = ModelConfig(**{**BASE, **fields})
        drawn.append((f"{axis} = {title}", steps_of(hollow(config).blocks[0], config, 0)))
    return drawn


def _mask_grids() -> list[Grid]:
    """All masks on 24 positions, with blocks of 4."""
    small = {"window": 6, "stride": 6, "stride_summary": 2, "mask_block": 4, "global_tokens": 2}
    notes = {
        "sliding_window": "window = 6",
        "strided": "stride = 6",
        "fixed": "stride = 6, stride_summary = 2",
        "block_sparse": "mask_block = 4, global_tokens = 2",
        "prefix_lm": "prefix = 6",
        "causal": "the plain triangle",
    }
    config = ModelConfig(**small)
    return [
        Grid(f"{name}\n{notes.get(name, '')}", choices.MASK.get(name).of(config), 24, block=4, prefix=6)
        for name in choices.MASK.names
    ]


def pictures() -> list[Picture]:
    """The pictures of the page."""
    stretched = {"factor": 8.0, "original_context": 256}
    ropes = []
    for scaling in choices.ROPE_SCALING.names:
        rope = {"scaling": scaling, "theta": 10_000.0} | ({} if scaling == "none" else stretched)
        config = ModelConfig(**{**BASE, "context_length": 2048, "heads": 16, "rope": rope})
        ropes += [replace(found, title=f"rope.scaling = {scaling}") for found in ropes_of(config, 64)]
    families = ("gpt3-125m", "gemma-3-1b", "smollm3-3b", "deepseek-v3-671b", "gpt-oss-20b")
    heads: dict[str, dict[str, Any]] = {
        "gated_delta ×3, mha": BESIDE["attention = gated_delta ×3, mha"],
        "mha, 8 kv_heads": {},
        "kv_heads = 2 (GQA)": {"kv_heads": 2},
        "kv_heads = 1 (MQA)": {"kv_heads": 1},
        "mla, kv_rank 128 + 32": NEEDED["attention = mla"] | {"attention": "mla"},
        "retention": {"attention": "retention"},
    }
    kept = {title: ModelConfig(**{**BASE, "context_length": 65_536, **fields}) for title, fields in heads.items()}
    deepseek = presets.load("deepseek-v3-671b")
    return [
        pattern_picture({name: presets.load(name) for name in families}),
        block_picture(_blocks("block", {name: {"block": name} for name in choices.BLOCK.names}), "blocks"),
        block_picture(
            _blocks("norm_placement", {name: {"norm_placement": name} for name in choices.NORM_PLACEMENT.names}),
            "placements",
        ),
        mask_picture(_mask_grids()),
        rope_picture(ropes),
        sinusoid_picture(ModelConfig(**{**BASE, "d_model": 128, "context_length": 128})),
        alibi_picture(ModelConfig(**BASE)),
        cost_picture(hollow(deepseek), 4096),
        cache_picture(kept),
    ]
