"""ModelConfig: its derived widths and its errors."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scratchlm.errors import UserError
from scratchlm.model import ModelConfig


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"heads": 3, "d_model": 64}, "heads = 3 does not divide d_model = 64"),
        ({"heads": 8, "kv_heads": 3}, "kv_heads = 3 does not divide heads = 8"),
        ({"heads": 4, "kv_heads": 8}, "kv_heads = 8 does not divide heads = 4"),
        ({"d_model": 24, "heads": 8}, "head_dim = 3 must be even"),
        ({"head_dim": 5}, "head_dim = 5 must be even"),
        ({"norm": "rmsnrom"}, r"norm = 'rmsnrom' is unknown; did you mean rmsnorm\?"),
        ({"feedforward": "SwiGlu"}, r"did you mean swiglu\?; allowed: relu, relu2"),
        ({"position": "rop"}, r"did you mean rope\?"),
        ({"attention_kernel": "block"}, r"did you mean blocked\?"),
        ({"kernels": "slow"}, "allowed: fast, reference"),
        ({"n_layers": 2}, r"unknown field n_layers; did you mean layers\?"),
        ({"layers": -1}, "layers = -1"),
        ({"layers": True}, "layers: true is a boolean"),
        ({"layers": 2.5}, "layers = 2.5"),
        ({"context_length": 0}, "context_length = 0"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"rope": {"theta": float("nan")}}, r"rope\.theta"),
        ({"rope": {"theta": float("inf")}}, r"rope\.theta"),
        ({"rope": {"theta": "1e4 zero"}}, r"rope\.theta\.1 = 'zero'"),
        ({"rope": {"thetas": 1.0}}, r"unknown field rope\.thetas; did you mean rope\.theta\?"),
        ({"rope_theta": 1e4}, r"unknown field rope_theta; did you mean rope\.theta\?"),
        ({"rope": {"factor": 0.5}}, r"rope\.factor = 0\.5"),
        ({"rope": {"scaling": "yam"}}, r"rope\.scaling\.0 = 'yam' is unknown; did you mean yarn\?"),
        ({"position": ""}, "position"),
        ({"position": []}, "position"),
        ({"mask": "causal slidingwindow"}, r"mask\.1 = 'slidingwindow' is unknown; did you mean sliding_window\?"),
        ({"attention_bias": "q k w"}, r"attention_bias\.2 = 'w' is unknown.*allowed: q, k, v, o"),
        ({"norm_placement": "before"}, r"norm_placement = 'before' is unknown"),
        ({"moe": {"expert": 4}}, r"unknown field moe\.expert; did you mean moe\.experts\?"),
        ({"embedding_scale": "sqrt"}, "embedding_scale"),
        ({"embedding_scale": 0.0}, "embedding_scale"),
        ({"residual_dropout": 1.0}, "residual_dropout"),
        ({"attention_soft_cap": 0.0}, "attention_soft_cap"),
        ({"init_linear_std": -0.1}, "init_linear_std"),
    ],
)
def test_errors_are_one_line_and_name_the_field(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        ModelConfig(**wrong)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("ModelConfig: ")


def test_what_is_allowed() -> None:
    assert ModelConfig(d_model=64, heads=3, head_dim=10).resolved_head_dim == 10
    assert ModelConfig(d_model=24, heads=8, position="none").resolved_head_dim == 3
    assert ModelConfig(heads=8).resolved_kv_heads == 8
    assert ModelConfig(heads=8, kv_heads=2).resolved_kv_heads == 2
    assert ModelConfig(layers=0).layers == 0


def test_the_default_inner_width() -> None:
    """8/3 · d_model to the nearest 64: the course's 1344 for 512."""
    for d_model, d_ff in ((512, 1344), (256, 704), (768, 2048), (64, 192), (16, 64)):
        assert ModelConfig(d_model=d_model).resolved_d_ff == d_ff
    assert ModelConfig(d_model=512, feedforward="relu2").resolved_d_ff == 2048
    assert ModelConfig(d_model=512, d_ff=1000).resolved_d_ff == 1000
    assert ModelConfig(d_model=512, d_ff_ratio=2.0, d_ff_multiple=100).resolved_d_ff == 1000


@given(st.integers(1, 1024), st.integers(1, 300), st.floats(0.1, 10))
def test_a_derived_inner_width_is_the_nearest_multiple(d_model: int, multiple: int, ratio: float) -> None:
    config = ModelConfig(d_model=8 * d_model, heads=1, d_ff_ratio=ratio, d_ff_multiple=multiple)
    assert config.resolved_d_ff % multiple == 0 and config.resolved_d_ff >= multiple
    if config.resolved_d_ff > multiple:
        assert abs(config.resolved_d_ff - ratio * 8 * d_model) <= multiple / 2 + 1e-6


@pytest.mark.parametrize("given", ["rope none alibi", ("rope", "none", "alibi"), ["rope", "none", "alibi"]])
def test_a_pattern_is_words_a_list_or_one_value(given: Any) -> None:
    config = ModelConfig(layers=7, position=given)
    assert config.position == ("rope", "none", "alibi")
    assert [config.position_at(layer) for layer in range(7)] == ["rope", "none", "alibi"] * 2 + ["rope"]
    alone = ModelConfig(position="none", rope={"theta": 500, "scaling": "none"}, attention_bias="")
    assert alone.position == ("none",) and alone.rope.theta == (500.0,) and alone.attention_bias == ()
    assert (
        ModelConfig(rope={"theta": "1e4 1000000"}).rope.theta == ModelConfig(rope={"theta": [1e4, 1e6]}).rope.theta
    )
    assert ModelConfig(attention_bias="q v") == ModelConfig(attention_bias=["q", "v"])
    assert (
        ModelConfig(**config.model_dump()) == config
        and ModelConfig.model_validate_json(config.model_dump_json()) == config
    )


def test_what_a_layer_has() -> None:
    masks = "causal causal sliding_window causal causal causal"
    config = ModelConfig(layers=6, attention="gla gla mha", mask=masks, position="rope none")
    assert [config.attention_at(layer) for layer in range(6)] == ["gla", "gla", "mha"] * 2
    assert [layer for layer in range(6) if config.mask_at(layer) == "sliding_window"] == [2]
    assert config.attention_at(8) == "mha" and config.mask_at(8) == "sliding_window", "beyond the last: prediction"
    assert [config.position_at(layer) for layer in range(4)] == ["rope", "none", "rope", "none"]


@pytest.mark.parametrize(
    ("moe", "layers"),
    [
        ({}, []),
        ({"experts": 4}, [0, 1, 2, 3, 4, 5, 6]),
        ({"experts": 4, "first_dense": 3}, [3, 4, 5, 6]),
        ({"experts": 4, "every": 2}, [1, 3, 5]),
        ({"experts": 4, "first_dense": 1, "every": 3}, [3, 6]),
        ({"experts": 4, "first_dense": 6}, [6]),
    ],
)
def test_which_layers_have_experts(moe: dict[str, int], layers: list[int]) -> None:
    config = ModelConfig(layers=7, moe=moe)
    assert [layer for layer in range(7) if config.has_experts(layer)] == layers


def test_what_is_derived() -> None:
    config = ModelConfig(d_model=64, heads=4, d_ff=120, moe={"experts": 6, "top_k": 2, "fine_grained": 3})
    assert (config.n_experts, config.active_experts, config.resolved_d_expert) == (18, 6, 40)
    assert ModelConfig(d_ff=120, moe={"experts": 6, "d_expert": 33}).resolved_d_expert == 33
    assert ModelConfig().n_experts == ModelConfig().resolved_d_shared == 0
    shared = {"experts": 6, "shared": 2, "d_expert": 33}
    assert ModelConfig(moe=shared).resolved_d_shared == 66
    assert ModelConfig(moe={**shared, "d_shared": 35}).resolved_d_shared == 35
    for placement, final in (
        ("pre", True),
        ("post", False),
        ("reordered", True),
        ("double", True),
        ("none", False),
    ):
        assert ModelConfig(norm_placement=placement).resolved_final_norm is final
        assert ModelConfig(norm_placement=placement, final_norm=not final).resolved_final_norm is not final
    assert ModelConfig(norm="layernorm").resolved_qk_norm_kind == "layernorm"
    assert ModelConfig(norm="none").resolved_qk_norm_kind == "rmsnorm"
    assert ModelConfig(norm="layernorm", qk_norm_kind="rmsnorm_noscale").resolved_qk_norm_kind == "rmsnorm_noscale"
    assert ModelConfig(d_model=64, heads=4).resolved_value_dim == 16
    assert ModelConfig(d_model=64, heads=4, latent={"value_dim": 9}).resolved_value_dim == 9
    assert ModelConfig(d_model=64, heads=4).rotated_dims == 16
    for fraction, rotated in ((0.25, 4), (0.5, 8), (0.9999, 15), (0.99999999, 16)):
        kind = "none" if rotated % 2 else "rope"
        assert ModelConfig(d_model=64, heads=4, rope={"fraction": fraction}, position=kind).rotated_dims == rotated
    assert ModelConfig(head_dim=80, rope={"fraction": 0.4}).rotated_dims == 32, (
        "0.4 · 80 is 32, whatever a float thinks"
    )


def test_a_configuration_does_not_change() -> None:
    config = ModelConfig()
    with pytest.raises(Exception, match="frozen"):
        config.layers = 3
    assert config == ModelConfig() and config != ModelConfig(layers=3)


def test_reading_a_configuration_does_not_load_torch() -> None:
    code = (
        "import sys; from scratchlm.model import ModelConfig; ModelConfig(); import scratchlm.config; "
        "print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
