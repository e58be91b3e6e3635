"""What cannot be built is refused with the sentence that says why; what is just legal is built."""

from __future__ import annotations

import ast
import inspect
import traceback
from typing import Any

import pytest
import torch

from scratchlm.errors import UserError
from scratchlm.model import ModelConfig, Transformer, legality

ROPE = {"position": "rope"}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"block": "parallel_shared", "norm_placement": "post"}, "parallel_shared shares the norm before the branches"),
    ({"block": "parallel_shared", "norm_placement": "reordered"}, "norm_placement = reordered has none there"),
    ({"block": "parallel_shared", "norm_placement": "none"}, "norm_placement = none has none"),
    ({"heads": 3, "d_model": 64}, "heads = 3 does not divide d_model = 64; change one of them or set head_dim"),
    ({"heads": 8, "kv_heads": 3}, "kv_heads = 3 does not divide heads = 8"),
    ({"heads": 4, "kv_heads": 8}, "kv_heads = 8 does not divide heads = 4"),
    ({"layers": 2, "attention": "mha gla mha"}, "attention has 3 values for layers = 2: the last would never be used"),
    ({"layers": 1, "mask": "causal sliding_window"}, "mask has 2 values for layers = 1"),
    ({"layers": 1, "position": "rope none"}, "position has 2 values"),
    ({"layers": 1, "rope": {"theta": "1e4 1e6"}}, r"rope\.theta has 2 values"),
    ({"layers": 1, "rope": {"scaling": "none linear"}}, r"rope\.scaling has 2 values"),
    ({"d_model": 24, "heads": 8}, "RoPE rotates pairs: head_dim = 3 must be even"),
    ({"head_dim": 12, "rope": {"fraction": 0.25}}, r"head_dim = 12 · rope\.fraction = 0\.25, 3, must be even"),
    ({"head_dim": 12, "rope": {"fraction": 0.01}}, r"rope\.fraction = 0\.01, 0, must be even"),
    ({"head_dim": 5, "position": "none none none rope"}, "head_dim = 5 must be even"),
    ({"head_dim": 5, "attention": "mla mha"}, "head_dim = 5 must be even"),
    ({"attention": "mla", "latent": {"rope_dim": 5}}, r"latent\.rope_dim = 5 must be even and not 0"),
    ({"attention": "mla", "latent": {"rope_dim": 0}}, r"latent\.rope_dim = 0 must be even and not 0"),
    ({"rope": {"scaling": "yarn", "factor": 2.0, "theta": "1 100"}}, r"rope\.theta = 1 has no long waves for .* yarn"),
    ({"rope": {"factor": 2.0}}, r"rope\.factor = 2 stretches nothing while rope\.scaling is none"),
    (
        {"rope": {"scaling": "llama3", "factor": 2.0, "low_freq_factor": 4.0}},
        r"rope\.low_freq_factor = 4 must be below rope\.high_freq_factor = 4",
    ),
    ({"attention": "mha gla", "mask": "sliding_window"}, "layer 1 has attention = gla and mask = sliding_window"),
    ({"attention": "retention", "mask": "prefix_lm"}, "cannot leave positions out; give that layer the mask causal"),
    ({"attention": "linear", "position": "alibi"}, "layer 0 has attention = linear and position = alibi"),
    ({"attention": "gated_delta", "attention_soft_cap": 5.0}, "attention_soft_cap acts on the scores of softmax"),
    ({"attention": "gla linear", "attention_sinks": True}, "attention_sinks acts on the scores"),
    ({"attention": "gla", "attention_dropout": 0.1}, "attention_dropout acts on the scores"),
    ({"attention": "mla", "heads": 8, "kv_heads": 2}, "kv_heads = 2 has no meaning"),
    ({"attention": "mla", "qk_norm": "head"}, "so set qk_norm = none"),
    ({"attention": "gla mla", "qkv_clip": 8.0}, "qkv_clip cuts the queries, keys and values of attention = mha, and no"),
    ({"mask": "causal prefix_lm"}, "prefix_length = 0 must be at least 2 and below context_length"),
    ({"mask": "prefix_lm", "prefix_length": 256}, "prefix_length = 256 must be at least 2 and below context_length = 256"),
    ({"attention": "mha gla", "linear": {"chunk": 48}}, "linear.chunk = 48 must be a power of two"),
    ({"attention": "retention", "linear": {"normalise": True}}, "linear.normalise is read by attention = linear alone"),
    ({"moe": {"experts": 4, "shared_gate": True}}, "moe.shared_gate gates the shared experts, and moe.shared = 0"),
    ({"moe": {"experts": 4, "router": "topk_softmax", "normalise": False}}, "normalise = false has no meaning"),
    ({"mask": "fixed", "stride": 4, "stride_summary": 5}, "stride_summary = 5 is more than a stretch of stride = 4"),
    ({"moe": {"shared": 1}}, r"moe has settings but moe\.experts = 0"),
    ({"moe": {"d_shared": 1}}, r"moe has settings but moe\.experts = 0"),
    ({"moe": {"experts": 4, "d_shared": 9}}, r"moe\.d_shared = 9 is the width of the shared experts, and moe\.shared = 0"),
    ({"moe": {"first_dense": 1}}, r"moe\.experts = 0: set the number of experts"),
    ({"moe": {"bias_update": 0.1}}, r"moe\.experts = 0"),
    ({"moe": {"experts": 2, "top_k": 3}}, r"moe\.top_k = 3 is more than moe\.experts = 2"),
    ({"moe": {"experts": 6, "groups": 4}}, r"moe\.groups = 4 does not divide the 6 experts"),
    ({"moe": {"experts": 8, "groups": 2, "top_groups": 3}}, r"moe\.top_groups = 3 is more than moe\.groups = 2"),
    (
        {"moe": {"experts": 8, "groups": 4, "top_groups": 1, "top_k": 3}},
        r"moe\.top_groups = 1 groups hold 2 experts, fewer than the 3 a token goes to",
    ),
    ({"layers": 3, "moe": {"experts": 4, "first_dense": 3}}, r"no layer would have experts: moe\.first_dense = 3"),
    ({"layers": 3, "moe": {"experts": 4, "every": 4}}, r"no layer would have experts: .* moe\.every = 4, layers = 3"),
    # the blocks of multi-token prediction are layers after the last one
    (
        {"layers": 3, "mtp_depth": 1, "attention": "mha gla", "mask": "sliding_window causal causal"},
        "layer 3 has attention = gla and mask = sliding_window",
    ),
]  # fmt: skip

ACCEPTED: list[dict[str, Any]] = [
    {"block": "parallel_shared", "norm_placement": "pre"},
    {"block": "parallel_shared", "norm_placement": "double"},
    {"block": "parallel", "norm_placement": "post"},
    {"heads": 3, "d_model": 64, "head_dim": 10},
    {"heads": 8, "kv_heads": 8},
    {"heads": 8, "kv_heads": 1},
    {"layers": 3, "attention": "mha gla mha"},
    {"layers": 2, "mask": "causal sliding_window", "position": "rope none", "rope": {"theta": "1e4 1e6"}},
    {"layers": 0, "mask": "causal sliding_window"},
    {"d_model": 24, "heads": 8, "position": "none"},
    {"d_model": 24, "heads": 8, "position": "alibi"},
    {"head_dim": 12, "rope": {"fraction": 0.17}},
    {"head_dim": 5, "attention": "mla"},
    {"attention": "mla", "latent": {"rope_dim": 2}},
    {"attention": "mla", "latent": {"rope_dim": 0}, "position": "none"},
    {"rope": {"factor": 1.0}},
    {"rope": {"factor": 2.0, "scaling": "none linear"}},
    {"rope": {"scaling": "llama3", "factor": 2.0, "low_freq_factor": 3.9}},
    {"rope": {"low_freq_factor": 5.0}},
    {"attention": "mha gla", "mask": "sliding_window causal"},
    {"attention": "linear mha", "position": "rope alibi"},
    {"attention": "gla mha", "attention_soft_cap": 5.0, "attention_sinks": True, "attention_dropout": 0.1},
    {"attention": "mla", "heads": 8, "kv_heads": 8},
    {"mask": "fixed", "stride": 4, "stride_summary": 4},
    {"stride": 4, "stride_summary": 5},
    {"moe": {"experts": 2, "top_k": 2}},
    {"attention": "mla mha", "qk_norm": "head", "kv_heads": 2, "latent": {"kv_rank": 8, "rope_dim": 2}},
    {"attention": "mla mha", "qkv_clip": 8.0, "latent": {"kv_rank": 8, "rope_dim": 2}},
    {"layers": 1, "mtp_depth": 1, "attention": "mha", "qkv_clip": 8.0},
    {"moe": {"experts": 4, "shared": 3, "d_shared": 1}},
    {"mask": "prefix_lm", "prefix_length": 2},
    {"attention": "linear", "linear": {"chunk": 48, "normalise": False}},
    {"moe": {"experts": 8, "groups": 4, "top_groups": 1, "top_k": 2}},
    {"moe": {"experts": 8, "groups": 4, "top_groups": 4, "top_k": 8}},
    {"moe": {"experts": 3, "fine_grained": 2, "groups": 2, "top_groups": 1, "top_k": 1}},
    {"layers": 3, "moe": {"experts": 4, "first_dense": 2}},
    {"layers": 3, "moe": {"experts": 4, "every": 3}},
    {"layers": 0, "moe": {"experts": 4}},
    {"layers": 3, "mtp_depth": 1, "attention": "mha gla", "mask": "causal causal sliding_window"},
]


@pytest.mark.parametrize(
    ("fields", "sentence"), REFUSED, ids=lambda value: value if isinstance(value, str) else None
)
def test_what_cannot_be_is_refused_in_one_line(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        ModelConfig(**fields)
    message = str(caught.value)
    assert message.startswith("ModelConfig: ") and "\n" not in message and len(message) < 250
    assert not message.endswith(".")


def test_every_sentence_is_reached() -> None:
    """Each `raise` of the module is where one of the cases above ends."""
    tree = ast.parse(inspect.getsource(legality))
    raises = {node.lineno for node in ast.walk(tree) if isinstance(node, ast.Raise)}
    reached = set()
    for fields, _ in REFUSED:
        with pytest.raises(UserError) as caught:
            ModelConfig(**fields)
        cause: Any = caught.value.__cause__
        frames = traceback.extract_tb(cause.errors()[0]["ctx"]["error"].__traceback__)
        reached |= {frame.lineno for frame in frames if frame.filename == legality.__file__}
    assert raises <= reached


@pytest.mark.parametrize("fields", ACCEPTED, ids=str)
def test_what_is_just_legal_is_built_and_runs(fields: dict[str, Any]) -> None:
    small = {"vocab_size": 11, "context_length": 16, "d_model": 32, "heads": 4, "d_ff": 16}
    model = Transformer(ModelConfig(**{**small, **fields}), seed=0).eval()
    with torch.no_grad():
        assert model(torch.arange(9)).isfinite().all()
