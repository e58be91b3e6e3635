"""benchmarks/train.py: every contender gets the model that ours is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from scratchlm.model import ModelConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from train import SHAPES


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_as_wide_inside_as_the_model_makes_it(name: str) -> None:
    shape = SHAPES[name]
    config = ModelConfig(vocab_size=shape.vocab, d_model=shape.d_model, layers=shape.layers, heads=shape.heads)
    assert config.resolved_d_ff == shape.d_ff and config.resolved_head_dim == shape.head_dim
