"""Which family a configuration is written as: never one that computes something else, and never a crash."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_variants import VARIANTS
from transformers_oracle import ids_for, precision, randomise, reload

from scratchlm.errors import UserError
from scratchlm.interop import load, save
from scratchlm.interop.canonical import function_of
from scratchlm.interop.choose import choose, fit
from scratchlm.interop.family import families
from scratchlm.model import ModelConfig, Transformer


def distinct() -> dict[str, ModelConfig]:
    """The variants that compute different functions, by name, with a context that all families like."""
    found: dict[str, tuple[str, ModelConfig]] = {}
    for name, config in VARIANTS.items():
        function = repr(sorted(function_of(config).items(), key=lambda item: item[0]))
        found.setdefault(function, (name, config))
    return dict(found.values())


DISTINCT = distinct()


def opens_the_same_there(config: ModelConfig, family: str, folder: Path) -> None:
    """Random weights written in `family`, opened by transformers and by us: the same logits."""
    model = Transformer(config, seed=0).double().eval()
    randomise(model, 1)
    save(model, folder, family=family)
    ids = ids_for(config.vocab_size, 2, min(16, config.context_length), 0)
    with torch.no_grad():
        own = model(ids)
        assert (load(folder)[0](ids) - own).abs().max() <= 1e-12
        with precision(torch.float64):
            theirs = reload(folder, torch.float64)(ids, use_cache=False).logits
    assert (theirs - own).abs().max() <= 1e-7 * max(1.0, own.abs().max().item())


@pytest.mark.parametrize("name", DISTINCT)
def test_auto_writes_the_same_function_or_names_a_field(name: str, tmp_path: Path) -> None:
    config = DISTINCT[name]
    try:
        found = choose(config)
    except UserError as error:
        assert "no family of the hub has" in str(error) and "--family standalone" in str(error)
        return
    opens_the_same_there(config, found.family.model_type, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("name", DISTINCT)
def test_every_family_that_says_it_fits_does(name: str, tmp_path: Path) -> None:
    for family in families().values():
        if not fit(DISTINCT[name], family).unsaid:
            opens_the_same_there(DISTINCT[name], family.model_type, tmp_path / family.model_type)


def test_what_auto_takes_first() -> None:
    base = {"vocab_size": 50, "d_model": 32, "heads": 4, "layers": 2}
    wanted = {
        "llama": {},
        "qwen2": {"attention_bias": "q k v"},
        "qwen3": {"qk_norm": "head"},
        "mistral": {"mask": "sliding_window", "window": 8},
        "mixtral": {"moe": {"experts": 4}},
        "gpt2": {
            "norm": "layernorm",
            "feedforward": "gelu_tanh",
            "position": "learned",
            "attention_bias": "q k v o",
            "feedforward_bias": True,
            "tied_embeddings": True,
        },
    }
    for family, fields in wanted.items():
        assert choose(ModelConfig(**base, **fields)).family.model_type == family
