"""What the backward pass needs: traced without computing = noted in a real pass = counted by hand = what memory shows."""

from __future__ import annotations

import resource
import subprocess
import sys
from typing import Any

import pytest
import torch
from model_variants import VARIANTS, random_ids

from scratchlm.errors import UserError
from scratchlm.kernels import rows_cpp
from scratchlm.model import ModelConfig, Transformer
from scratchlm.model.activations import Kept, activation_bytes


@pytest.mark.parametrize("config", VARIANTS.values(), ids=list(VARIANTS))
def test_traced_is_what_a_real_pass_keeps(config: ModelConfig) -> None:
    if config.attention_kernel == "flex":
        pytest.skip("torch's FlexAttention has no backward on a CPU")
    if config.moe.dispatch == "reference":
        with pytest.raises(UserError, match="cannot be traced"):
            activation_bytes(config, 2, 24)
        return
    model = Transformer(config)
    kept = Kept(model)
    with kept.active():
        model.hidden(random_ids(config, 2, 24))
    assert activation_bytes(config, 2, 24) == kept.by_component
    assert sum(kept.by_component.values()) > 0


def test_counted_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each operation of a feed-forward and a norm keeps what its derivative is a function of; torch's, that is: our own keep less."""
    monkeypatch.setattr(rows_cpp, "runs", lambda dtype: False)
    config = ModelConfig(vocab_size=7, d_model=16, heads=2, layers=1, d_ff=24, context_length=8)
    tokens, word = 3 * 8, 4
    kept = activation_bytes(config, 3, 8)
    # gate‖up (inside one tensor), SiLU(gate), and SiLU(gate) ⊙ up; the input was kept by the norm's output's reader before.
    assert kept["blocks.0.feedforward"] == tokens * word * (16 + 2 * 24 + 24 + 24)
    # the norm: the stream x that it reads, 1 / RMS per token, and x / RMS, which the gain is multiplied by
    assert kept["blocks.0.feedforward_norm"] == tokens * word * (16 + 1 + 16)


@pytest.mark.parametrize(
    "fields",
    [
        {"attention": "gla mha", "attention_soft_cap": 5.0},
        {"attention": "linear mha", "qkv_clip": 5.0},
        {"attention": "mha linear", "linear": {"normalise": True}},
    ],
    ids=str,
)
def test_what_one_layer_of_a_mixture_obeys_does_not_stop_the_trace(fields: dict[str, Any]) -> None:
    config = ModelConfig(
        vocab_size=7, d_model=16, heads=2, layers=2, context_length=8, moe={"experts": 4}, **fields
    )
    kept = activation_bytes(config, 1, 8)
    assert {"blocks.0.feedforward", "blocks.1.feedforward", "blocks.1.attention"} <= set(kept)


def test_it_grows_as_it_must() -> None:
    config = ModelConfig(
        vocab_size=7, d_model=32, heads=2, layers=2, context_length=512, attention_kernel="reference"
    )
    small, longer = (sum(activation_bytes(config, 2, length).values()) for length in (128, 256))
    assert longer > 2 * small, "the reference keeps all scores"
    flash = ModelConfig(**{**config.model_dump(), "attention_kernel": "sdpa"})
    small, longer = (sum(activation_bytes(flash, 2, length).values()) for length in (128, 256))
    assert longer == pytest.approx(2 * small, rel=0.01)
    assert sum(activation_bytes(flash, 4, 256).values()) == pytest.approx(2 * longer, rel=0.01)
    half = sum(activation_bytes(flash, 2, 256, autocast=torch.bfloat16).values())
    assert 0.4 * longer < half < 0.9 * longer


BIG = {"vocab_size": 64, "d_model": 512, "heads": 8, "layers": 4, "context_length": 1024}
MEASURE = """
import ctypes, sys, torch
from scratchlm.errors import UserError
from scratchlm.model import ModelConfig, Transformer
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
torch.manual_seed(0)
model = Transformer(ModelConfig(**eval(sys.argv[1])))
ids = torch.zeros(8, 1024, dtype=torch.int64)
model.hidden(ids[:1, :64])
ctypes.CDLL("libc.so.6").malloc_trim(0)
before = resident()
hidden = model.hidden(ids)
ctypes.CDLL("libc.so.6").malloc_trim(0)
print(resident() - before - hidden.numel() * 4)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc and calls glibc")
@pytest.mark.parametrize("changes", [{}, {"feedforward": "relu2", "norm": "layernorm"}], ids=["llama", "plain"])
def test_memory_shows_it(changes: dict[str, str]) -> None:
    """The resident memory of a process after the forward, in hundreds of megabytes."""
    fields = {**BIG, **changes}
    expected = sum(activation_bytes(ModelConfig(**fields), 8, 1024).values())
    assert expected > 500e6
    limits = resource.getrlimit(resource.RLIMIT_AS)
    assert limits
    printed = subprocess.run(
        [sys.executable, "-c", MEASURE, repr(fields)], check=True, capture_output=True, text=True
    ).stdout
    assert int(printed) == pytest.approx(expected, rel=0.1)
