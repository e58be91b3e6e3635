"""Checkpoints: complete or not there, readable without code, honest about damage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scratchlm.errors import UserError
from scratchlm.model import ModelConfig, Transformer
from scratchlm.train.checkpoint import (
    Checkpoint,
    checkpoint_at,
    checkpoints,
    generator_states,
    load_weights,
    prune,
    remove_leftovers,
    restore_generators,
    save_checkpoint,
)

MODEL = ModelConfig(vocab_size=19, context_length=8, d_model=16, layers=1, heads=2)


def save(folder: Path, step: int, config: ModelConfig = MODEL) -> Checkpoint:
    model = Transformer(config, seed=step)
    return save_checkpoint(folder, step, model, {"m": torch.arange(3.0)}, {"progress": {"step": step}})


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_saved_comes_back(tmp_path: Path, tied: bool) -> None:
    config = MODEL.model_copy(update={"tied_embeddings": tied})
    saved = save(tmp_path, 7, config)
    assert saved.config() == config
    assert saved.state() == {"progress": {"step": 7}}
    assert saved.optimizer()["m"].tolist() == [0, 1, 2]
    model = Transformer(config, seed=1)
    load_weights(model, saved)
    for left, right in zip(model.parameters(), Transformer(config, seed=7).parameters(), strict=True):
        assert left.equal(right)
    assert ("head.weight" in load_file(saved.path / "model.safetensors")) is not tied
    assert (model.head.weight is model.embedding.weight) is tied


def test_files_are_safetensors_json_and_a_page_only(tmp_path: Path) -> None:
    names = {path.suffix for path in save(tmp_path, 1).path.iterdir()}
    assert names == {".safetensors", ".json", ".md"}


def test_listing_is_by_step_and_passes_over_everything_else(tmp_path: Path) -> None:
    for step in (100, 9, 20):
        save(tmp_path, step)
    (tmp_path / ".step-00000030.tmp").mkdir()
    (tmp_path / "notes").mkdir()
    assert [found.step for found in checkpoints(tmp_path)] == [9, 20, 100]
    assert checkpoints(tmp_path / "nowhere") == []
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
    assert (tmp_path / "notes").exists()


def test_prune_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in range(1, 7):
        save(tmp_path, step)
    prune(tmp_path, keep=2, best_step=3)
    assert [found.step for found in checkpoints(tmp_path)] == [3, 5, 6]


def test_a_folder_a_run_and_a_checkpoint_are_all_understood(tmp_path: Path) -> None:
    save(tmp_path / "checkpoints", 1)
    newest = save(tmp_path / "checkpoints", 2)
    for path in (tmp_path, tmp_path / "checkpoints", newest.path):
        assert checkpoint_at(path).path == newest.path
    with pytest.raises(UserError, match="does not exist"):
        checkpoint_at(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint_at(tmp_path / "empty")


def test_damage_is_named(tmp_path: Path) -> None:
    saved = save(tmp_path, 1)
    weights = saved.path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"model.safetensors cannot be read .* cut off or damaged"):
        saved.weights()
    weights.unlink()
    with pytest.raises(UserError, match="incomplete"):
        saved.weights()
    (saved.path / "config.json").write_text('{"d_model": ')
    with pytest.raises(UserError, match=r"config.json"):
        saved.config()
    (saved.path / "config.json").write_text(json.dumps({"d_modell": 16}))
    with pytest.raises(UserError, match="did you mean d_model"):
        saved.config()


def test_weights_of_another_architecture_are_refused_before_anything_changes(tmp_path: Path) -> None:
    saved = save(tmp_path, 1)
    other = Transformer(MODEL.model_copy(update={"layers": 2}), seed=0)
    before = [parameter.clone() for parameter in other.parameters()]
    with pytest.raises(UserError, match=r"different model .*blocks\.1"):
        load_weights(other, saved)
    assert all(left.equal(right) for left, right in zip(before, other.parameters(), strict=True))


def test_random_generators_go_on_where_they_were() -> None:
    device = torch.device("cpu")
    torch.manual_seed(3)
    states = generator_states(device)
    first = torch.rand(5)
    torch.manual_seed(99)
    restore_generators(states, device)
    assert torch.rand(5).equal(first)


def test_a_full_disk_leaves_earlier_checkpoints_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("scratchlm.train.checkpoint.write_json", full)
    with pytest.raises(UserError, match="no space left"):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
