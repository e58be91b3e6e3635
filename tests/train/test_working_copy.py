"""bf16 weights with fp32 masters: the same numbers as a step written out by hand, and nothing lost between steps."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_loop import MODEL, RandomBatches, trainer

from scratchlm.config import Recipe
from scratchlm.data.loader import Batch
from scratchlm.errors import UserError
from scratchlm.model import ModelConfig, Transformer
from scratchlm.section import validate
from scratchlm.train.loop import Trainer
from scratchlm.train.loss import NextTokenLoss
from scratchlm.train.working_copy import WorkingCopy

BF16 = {"precision": "bf16", "weights": "bf16"}


def trained(folder: Path, steps: int, model: Transformer | None = None, **options: Any) -> Trainer:
    train = {"steps": steps, "batch_size": 4} | BF16 | options.pop("train", {})
    made = trainer(folder, model, train=train, **options)
    made.fit()
    return made


@pytest.mark.parametrize("tied", [False, True])
def test_three_steps_equal_those_written_out_by_hand(tmp_path: Path, tied: bool) -> None:
    config = MODEL.model_copy(update={"tied_embeddings": tied})
    model = Transformer(config, seed=0)
    masters = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(masters.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    batches = RandomBatches()
    for _ in range(3):
        narrow = copy.deepcopy(masters).bfloat16()
        batch = batches.next_batch()
        loss = NextTokenLoss(narrow)(batch) / batch.targets.numel()
        loss.backward()
        for master, rounded in zip(masters.parameters(), narrow.parameters(), strict=True):
            assert rounded.grad is not None and rounded.grad.dtype == torch.bfloat16
            master.grad = rounded.grad.float()
        optimizer.step()
    optim = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.0, "schedule": "constant", "grad_clip": 0.0}
    trained(tmp_path, 3, model, optim=optim)
    for ours, right in zip(model.parameters(), masters.parameters(), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-6)


def test_micro_batches_are_summed_in_fp32() -> None:
    """In bf16 a sum of 1 and 1/512 stays 1."""
    model = Transformer(MODEL, seed=0)
    working = WorkingCopy(model)
    for value in (1.0, 1 / 512):
        for parameter in working.model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        working.collect()
    for parameter in model.parameters():
        assert parameter.grad is not None and parameter.grad.eq(1 + 1 / 512).all()
    assert all(parameter.grad is None for parameter in working.model.parameters())


def test_steps_too_small_for_bf16_are_not_lost(tmp_path: Path) -> None:
    model = Transformer(MODEL, seed=0)
    before = copy.deepcopy(model)
    optim = {"lr": 1e-6, "schedule": "constant", "weight_decay": 0.0}
    run = trained(tmp_path, 4, model, optim=optim)
    moved = [bool((a != b).any()) for a, b in zip(model.parameters(), before.parameters(), strict=True)]
    assert all(moved)
    assert run._computing.copy is not None
    for master, rounded in zip(model.parameters(), run._computing.model.parameters(), strict=True):
        assert rounded.dtype == torch.bfloat16 and torch.equal(rounded, master.bfloat16())


def test_what_is_not_trained_by_gradient_is_one_and_the_same() -> None:
    config = ModelConfig(
        vocab_size=19, context_length=8, d_model=16, layers=2, heads=2, tied_embeddings=True,
        moe={"experts": 4, "top_k": 2, "bias_update": 0.1, "balance_loss": 0.0},
    )  # fmt: skip
    model = Transformer(config, seed=0)
    working = WorkingCopy(model)
    assert working.model.head.weight is working.model.embedding.weight
    loss = NextTokenLoss(model)
    loss.use(working.model)
    ids = torch.randint(19, (4, 8), generator=torch.Generator().manual_seed(0))
    loss(Batch(ids, ids)).backward()
    assert not any(buffer.any() for name, buffer in model.named_buffers() if name.endswith("correction"))
    loss.after_step()
    corrections = [buffer for name, buffer in model.named_buffers() if name.endswith("correction")]
    assert corrections and all(buffer.any() for buffer in corrections)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_residual_stream_is_bf16() -> None:
    working = WorkingCopy(Transformer(MODEL, seed=0))
    ids = torch.zeros(1, 8, dtype=torch.int64)
    assert working.model.embed(ids).dtype == working.model.hidden(ids).dtype == torch.bfloat16


@pytest.mark.parametrize("compile", ["off", "on"])
def test_a_resumed_run_goes_on_to_the_last_digit(tmp_path: Path, compile: str) -> None:
    train = {"compile": compile, "checkpoint_interval": 3, "accumulation": 2}
    whole = trained(tmp_path / "whole", 6, train=train).model
    trained(tmp_path / "parts", 6, train=train)
    newest = tmp_path / "parts" / "checkpoints" / "step-00000006"
    assert newest.is_dir(), sorted((tmp_path / "parts" / "checkpoints").iterdir())
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    said: list[str] = []
    again = trained(tmp_path / "parts", 6, train=train, said=said)
    assert any("resuming from step 3" in line for line in said) and any("weights too" in line for line in said)
    for ours, right in zip(again.model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, right)


def test_in_fp32_they_are_refused() -> None:
    with pytest.raises(UserError, match=r"weights = bf16 with train\.precision = fp32"):
        validate(Recipe, {"train": {"weights": "bf16", "precision": "fp32"}}, "recipe")


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_products_in_fp8_are_those_of_the_computing_model(
    tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU only because it is pretended to have them: its products in fp8 are right, and slow."""
    monkeypatch.setattr("scratchlm.train.precision.has_native_fp8", lambda device: True)
    said: list[str] = []
    run = trained(tmp_path, 2, train={"weights": weights, "fp8": True}, said=said, loader=RandomBatches(4))
    assert "products in fp8" in said[0]
    computing = run._computing.model
    assert all(module.fp8 for block in computing.blocks for module in block.modules() if hasattr(module, "fp8"))
    assert run.model.blocks[0].feedforward.gate_up.fp8 == (weights == "fp32")
    other = trained(tmp_path / "without", 2, train={"weights": weights}, loader=RandomBatches(4))
    differing = [
        not torch.equal(a, b) for a, b in zip(run.model.parameters(), other.model.parameters(), strict=True)
    ]
    assert any(differing)


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here, whose graphs would be replayed")
@pytest.mark.parametrize("weights", ["fp32", "bf16"])
@pytest.mark.parametrize("parts", [1, 2])
def test_graphs_replayed_give_the_same_run(tmp_path: Path, weights: str, parts: int) -> None:
    found = []
    for mode in ("default", "cuda_graphs"):
        train = {"weights": weights, "accumulation": parts, "compile": "on", "compile_mode": mode}
        run = trained(tmp_path / mode, 5, train=train, device=torch.device("cuda"))
        found.append(list(run.model.parameters()))
    for ours, right in zip(*found, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)
