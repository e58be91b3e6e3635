"""Our own folder format: what is saved is what is loaded, wherever it lies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scratchlm.errors import UserError
from scratchlm.interop import load, save
from scratchlm.model import ModelConfig, Transformer
from scratchlm.tokenizer import train_bpe
from scratchlm.train.checkpoint import save_checkpoint

MODEL = ModelConfig(vocab_size=300, context_length=8, d_model=16, layers=2, heads=4, kv_heads=2)


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_gives_the_same_logits(tmp_path: Path, tied: bool) -> None:
    model = Transformer(MODEL.model_copy(update={"tied_embeddings": tied}), seed=0)
    tokenizer = train_bpe(["some text, some more text"], vocab_size=262, special_tokens=["<|endoftext|>"])
    save(model, tmp_path / "model", family="scratchlm", tokenizer=tokenizer)
    loaded, its_tokenizer = load(tmp_path / "model")
    ids = torch.randint(0, 300, (2, 8))
    assert loaded(ids).equal(model(ids))
    assert loaded.config == model.config
    assert not loaded.training
    assert its_tokenizer is not None and its_tokenizer.encode("some text") == tokenizer.encode("some text")


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    save(Transformer(MODEL, seed=0), tmp_path / "model", family="scratchlm")
    assert load(tmp_path / "model")[1] is None


def test_of_a_run_the_best_checkpoint_is_loaded(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        state = {"progress": {"step": step, "best_step": 2}}
        save_checkpoint(tmp_path / "checkpoints", step, Transformer(MODEL, seed=step), {"m": torch.zeros(1)}, state)
    best = Transformer(MODEL, seed=2)
    assert load(tmp_path)[0].head.weight.equal(best.head.weight)
    newest = tmp_path / "checkpoints/step-00000003"
    assert load(newest)[0].head.weight.equal(Transformer(MODEL, seed=3).head.weight)


def test_a_folder_with_content_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not an empty folder"):
        save(Transformer(MODEL, seed=0), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_errors_say_what_the_folder_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no checkpoint"):
        load(tmp_path)
    with pytest.raises(UserError, match="'lama' is unknown; did you mean llama"):
        save(Transformer(MODEL, seed=0), tmp_path / "model", family="lama")
    save(Transformer(MODEL, seed=0), tmp_path / "model", family="scratchlm")
    (tmp_path / "model/model.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="cut off or damaged"):
        load(tmp_path / "model")


def test_a_foreign_tokenizer_is_refused(tmp_path: Path) -> None:
    save(Transformer(MODEL.model_copy(update={"vocab_size": 257}), seed=0), tmp_path / "model", family="scratchlm")
    train_bpe(["some text, some more text"], vocab_size=262, special_tokens=["<|e|>"]).save(
        tmp_path / "model/tokenizer.json"
    )
    with pytest.raises(UserError, match="does not belong to this checkpoint"):
        load(tmp_path / "model")
