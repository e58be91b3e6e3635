"""A model whose SwiGLU and rotation are operations of their own gives what it gives without; and which layers take them.

On a GPU where there is one, else in Triton's interpreter on the CPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from test_checkpointing import Calls
from test_variants import Batch
from torch import Tensor
from triton_device import DEVICE

from scratchlm.generate import KVCache
from scratchlm.kernels import rotary, rotary_triton, swiglu, swiglu_triton
from scratchlm.model import ModelConfig, Transformer
from scratchlm.train.loss import NextTokenLoss

SMALL: dict[str, Any] = {
    "vocab_size": 50, "context_length": 24, "d_model": 32, "layers": 2, "heads": 4, "kv_heads": 2, "d_ff": 40,
}  # fmt: skip
LAYERS = SMALL["layers"]


class Kernels(Counter[str]):
    """How often each kernel ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        for module, name in (
            (swiglu_triton, "swiglu"),
            (rotary_triton, "turn"),
        ):
            for way in ("forward", "backward"):
                monkeypatch.setattr(module, way, self._counted(f"{name} {way}", getattr(module, way)))

    def _counted(self, name: str, kernel: Any) -> Any:
        def counted(*args: Any) -> Any:
            self[name] += 1
            return kernel(*args)

        return counted

    def taken(self) -> dict[str, int]:
        """Since it was asked last."""
        found = dict(self)
        self.clear()
        return found


EACH = {"swiglu forward": LAYERS, "swiglu backward": LAYERS, "turn forward": LAYERS, "turn backward": LAYERS}
AGAIN = EACH | {"swiglu forward": 2 * LAYERS, "turn forward": 2 * LAYERS}


@pytest.fixture
def kernels(interpreted: list[warnings.WarningMessage], monkeypatch: pytest.MonkeyPatch) -> Kernels:
    return Kernels(monkeypatch)


def batch(documents: bool) -> Batch:
    ids = torch.randint(50, (2, 21), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    if not documents:
        return Batch(ids[:, :-1], ids[:, 1:])
    lengths = torch.tensor([[9, 11], [4, 16]], device=DEVICE)
    numbers = (torch.arange(20, device=DEVICE) >= lengths[:, :1]).long()
    positions = torch.arange(20, device=DEVICE) - numbers * lengths[:, :1]
    return Batch(ids[:, :-1], ids[:, 1:], positions, numbers)


def objective_and_gradients(
    fields: dict[str, Any],
    *,
    documents: bool = False,
    checkpointing: str = "none",
    backend: str | None = None,
    precision: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Of a small model with kernels or without, whichever is the way now."""
    torch._dynamo.reset()
    model = Transformer(ModelConfig(**SMALL | fields), seed=0).to(DEVICE)
    loss = NextTokenLoss(model, "reference", checkpointing=checkpointing)
    if backend is not None:
        loss.body = torch.compile(model.body, backend=backend, fullgraph=True, dynamic=False)
    with torch.autocast(DEVICE, precision, enabled=precision != torch.float32):
        objective = loss(batch(documents))
    objective.backward()
    torch._dynamo.reset()
    return [objective.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def without(monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], **options: Any) -> list[Tensor]:
    """The same by torch's operations."""
    with monkeypatch.context() as changed:
        changed.setattr(swiglu, "fits", lambda _: False)
        changed.setattr(rotary, "fits", lambda _: False)
        changed.setattr(rotary, "fits_heads", lambda _: False)
        return objective_and_gradients(fields, **options)


def assert_near(found: list[Tensor], right: list[Tensor], **near: float) -> None:
    assert len(found) == len(right)
    for ours, theirs in zip(found, right, strict=True):
        torch.testing.assert_close(ours, theirs, **near)


FIELDS: dict[str, dict[str, Any]] = {
    "halves": {},
    "interleaved": {"rope": {"pairs": "interleaved"}},
    "all keys": {"kv_heads": 4, "head_dim": 6},
    "one key, parallel": {"kv_heads": 1, "block": "parallel_shared"},
    "scaled, flash": {"rope": {"scaling": ["yarn"], "original_context": 8}, "attention_kernel": "flash"},
    "no position in one layer": {"position": ["rope", "none"]},
}


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("fields", FIELDS.values(), ids=list(FIELDS))
def test_loss_and_gradients(
    fields: dict[str, Any], documents: bool, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = objective_and_gradients(fields, documents=documents)
    turned = 1 if "position" in fields else LAYERS
    assert kernels.taken() == EACH | {"turn forward": turned, "turn backward": turned}
    right = without(monkeypatch, fields, documents=documents)
    assert not kernels.taken()
    assert_near(found, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("checkpointing", "documents"), [("none", False), ("none", True), ("selective", True), ("blocks", False)]
)
def test_compiled_and_checkpointed(
    checkpointing: str, documents: bool, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One graph; and what is cheap to compute again is, also where products are kept."""
    fields = FIELDS["halves"]
    right = without(monkeypatch, fields, documents=documents)
    given: dict[str, Any] = {"documents": documents, "checkpointing": checkpointing}
    assert_near(objective_and_gradients(fields, **given), right, rtol=1e-4, atol=1e-6)
    assert kernels.taken() == (EACH if checkpointing == "none" else AGAIN)
    assert_near(objective_and_gradients(fields, **given, backend="aot_eager"), right, rtol=1e-4, atol=1e-6)
    assert kernels.taken() == (EACH if checkpointing == "none" else AGAIN)


NORMED: dict[str, dict[str, Any]] = {
    "norms": {"qk_norm": "head"},
    "clipped": {"qkv_clip": 0.5},
    "clipped norms, interleaved": {"qk_norm": "head", "qkv_clip": 0.5, "rope": {"pairs": "interleaved"}},
    "latent attention": {"attention": "mla", "kv_heads": None, "latent": {"kv_rank": 8, "rope_dim": 4}},
}


@pytest.mark.parametrize(
    ("fields", "documents"), zip(NORMED.values(), [False, True, True, False], strict=True), ids=list(NORMED)
)
def test_queries_and_keys_that_are_there_already_are_turned_where_nothing_is_compiled(
    fields: dict[str, Any], documents: bool, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries and keys together, where nothing but a clip came before, else one after the other. A compiler makes one loop of norm and rotation."""
    right = without(monkeypatch, fields, documents=documents)
    assert not kernels.taken()
    assert_near(objective_and_gradients(fields, documents=documents), right, rtol=1e-4, atol=1e-6)
    each = LAYERS if "qk_norm" not in fields and "attention" not in fields else 2 * LAYERS
    assert kernels.taken() == EACH | {"turn forward": each, "turn backward": each}
    found = objective_and_gradients(fields, documents=documents, backend="aot_eager")
    assert_near(found, right, rtol=1e-4, atol=1e-6)
    assert "turn forward" not in kernels.taken()


def test_under_autocast(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16 as near to fp32 as torch's operations come."""
    exact = objective_and_gradients({}, documents=True)
    kernels.taken()
    ours = objective_and_gradients({}, documents=True, precision=torch.bfloat16)
    assert kernels.taken() == EACH
    theirs = without(monkeypatch, {}, documents=True, precision=torch.bfloat16)

    def away(found: list[Tensor]) -> Tensor:
        return torch.stack([(x - y).norm() / y.norm() for x, y in zip(found, exact, strict=True)])

    assert away(ours).max() < 0.02 and (away(ours) < 1.5 * away(theirs) + 1e-3).all()


def test_experts_take_it_too(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"moe": {"experts": 4, "top_k": 2, "shared": 1}}
    found = objective_and_gradients(fields)
    assert kernels.taken() == EACH | {"swiglu forward": 2 * LAYERS, "swiglu backward": 2 * LAYERS}
    assert_near(found, without(monkeypatch, fields), rtol=1e-4, atol=1e-6)


OTHERS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "norms of queries and keys": ({"qk_norm": "head"}, {"swiglu", "turn"}),
    "clipped": ({"qkv_clip": 0.5}, {"swiglu", "turn"}),
    "half of a head": ({"rope": {"fraction": 0.5}}, {"swiglu"}),
    "latent attention": (
        {"attention": "mla", "kv_heads": None, "latent": {"kv_rank": 8, "rope_dim": 4}},
        {"swiglu", "turn"},
    ),
    "alibi": ({"position": "alibi"}, {"swiglu"}),
    "another activation": ({"feedforward": "geglu"}, {"turn"}),
    "a clamped SwiGLU": ({"feedforward": "swiglu_clamped"}, {"turn"}),
    "by the formulas": ({"kernels": "reference"}, set()),
}


@pytest.mark.parametrize(("fields", "takes"), OTHERS.values(), ids=list(OTHERS))
def test_which_layers_take_which(fields: dict[str, Any], takes: set[str], kernels: Kernels) -> None:
    objective_and_gradients(fields)
    assert {name.split()[0] for name in kernels.taken()} == takes


def test_in_float64_nothing_is_in_triton(kernels: Kernels) -> None:
    model = Transformer(ModelConfig(**SMALL), seed=0).to(DEVICE).double()
    model(batch(False).inputs).sum().backward()
    assert not kernels.taken()


@pytest.mark.parametrize("shape", [(9,), (2, 3, 9)], ids=["one sequence", "two dimensions of a batch"])
def test_other_batches_are_split_by_torch(shape: tuple[int, ...], kernels: Kernels) -> None:
    model = Transformer(ModelConfig(**SMALL), seed=0).to(DEVICE)
    ids = torch.randint(50, shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    logits = model(ids)
    logits.sum().backward()
    assert kernels.taken() == {"swiglu forward": LAYERS, "swiglu backward": LAYERS}
    torch.testing.assert_close(model(ids.reshape(-1, 9)).view(logits.shape), logits, rtol=1e-4, atol=1e-5)
    assert kernels.taken()["turn forward"] == LAYERS


@torch.no_grad()
def test_with_a_cache_and_without_gradients(kernels: Kernels) -> None:
    """Text is written by torch's operations; a whole sequence that is only read is turned by the kernel."""
    model = Transformer(ModelConfig(**SMALL), seed=0).to(DEVICE).eval()
    ids = batch(False).inputs
    logits = model(ids)
    assert kernels.taken() == {"turn forward": LAYERS}
    cache = KVCache(model.config, *ids.shape, device=DEVICE)
    pieces = []
    for piece in ids.split([13, 1, 6], dim=1):
        pieces.append(model(piece, cache=cache))
        cache.advance(piece.shape[1])
    assert not kernels.taken()
    torch.testing.assert_close(torch.cat(pieces, dim=1), logits, rtol=1e-4, atol=1e-5)


def test_positions_are_looked_up_once_for_all_layers(kernels: Kernels) -> None:
    given = batch(True)
    model = Transformer(ModelConfig(**SMALL), seed=0).to(DEVICE)
    with Calls() as calls:
        model(given.inputs, given.positions)
    assert calls.found["aten::index"] == 1 and kernels["turn forward"] == LAYERS


SCRIPT = """
import sys

import scratchlm.kernels.triton_here
import scratchlm.model
import scratchlm.train.loss

ours = [f"scratchlm.kernels.{name}" for name in ("swiglu_op", "rotary_op")]
assert not [name for name in (*ours, "torch._dynamo", "triton") if name in sys.modules]

import torch

scratchlm.kernels.triton_here.INTERPRETED = True
model = scratchlm.model.Transformer(
    scratchlm.model.ModelConfig(vocab_size=50, context_length=24, d_model=32, layers=2, heads=4), seed=0
)
ids = torch.arange(40).view(2, 20)
with torch._dynamo.config.patch(error_on_recompile=True):
    body = torch.compile(model.body, backend="aot_eager", fullgraph=True, dynamic=False)
    for _ in range(2):
        model.run(ids, model.context(ids), body)[0].sum().backward()
assert set(ours) <= set(sys.modules)
"""


def test_they_are_read_when_they_are_wanted_also_by_the_compiler() -> None:
    """Neither the operations nor torch's compiler, which they import, is part of the model's start."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
