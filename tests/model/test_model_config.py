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
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"rope_theta": float("inf")}, "rope_theta"),
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


def test_a_configuration_does_not_change() -> None:
    config = ModelConfig()
    with pytest.raises(Exception, match="frozen"):
        config.layers = 3
    assert config == ModelConfig() and config != ModelConfig(layers=3)


def test_reading_a_configuration_does_not_load_torch() -> None:
    code = "import sys; from scratchlm.model import ModelConfig; ModelConfig(); import scratchlm.config; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
