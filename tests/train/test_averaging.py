"""A run with averaged weights: validated and saved beside the raw ones, resumed to the last digit, opened by path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_run import last_checkpoint, records
from test_loop import MODEL, RandomBatches, lines, trainer

from scratchlm.cli import main
from scratchlm.data.loader import Batch
from scratchlm.errors import UserError
from scratchlm.interop.native import best_checkpoint, load
from scratchlm.model import ModelConfig, Transformer
from scratchlm.train.checkpoint import checkpoint_at
from scratchlm.train.loop import Trainer


def weights(model: Transformer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_both_weights_are_validated_and_only_the_raw_ones_are_trained(tmp_path: Path) -> None:
    seen: dict[str, list[dict[str, torch.Tensor]]] = {"plain": [], "averaged": []}
    models = {}
    for name, ema in (("plain", 0.0), ("averaged", 0.6)):
        model = Transformer(MODEL, seed=0)

        def validate(model: Transformer = model, name: str = name) -> dict[str, float]:
            seen[name].append(weights(model))
            return {"loss": float(len(seen[name])), "perplexity": 2.0}

        said: list[str] = []
        options: dict[str, Any] = {"train": {"eval_interval": 2}, "optim": {"ema": ema, "lr": 0.05}}
        state = trainer(tmp_path / name, model, validate=validate, said=said, **options).fit()
        models[name] = model
        assert any("averaged weights 2.0000" in line for line in said) == (name == "averaged")
    assert (len(seen["plain"]), len(seen["averaged"])) == (3, 6)
    for raw, own, average in zip(seen["plain"], seen["averaged"][::2], seen["averaged"][1::2], strict=True):
        assert all(torch.equal(raw[key], own[key]) for key in raw)
        assert not torch.equal(own["embedding.weight"], average["embedding.weight"])
    assert all(
        torch.equal(a, b)
        for a, b in zip(models["plain"].parameters(), models["averaged"].parameters(), strict=True)
    )
    (first, *_), (plain, *_) = (lines(tmp_path / name, "validation") for name in ("averaged", "plain"))
    assert (first["loss"], first["loss_ema"], first["perplexity_ema"]) == (1.0, 2.0, 2.0)
    assert "loss_ema" not in plain
    assert state.best_loss == 1.0, "the best checkpoint is that of the trained weights"


def test_the_checkpoint_holds_the_average_of_the_weights_after_each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Transformer(MODEL, seed=0)
    run = trainer(tmp_path, model, optim={"ema": 0.6, "lr": 0.05})
    after: list[dict[str, torch.Tensor]] = []
    step = Trainer._step

    def watched(self: Trainer) -> Any:
        result = step(self)
        after.append(weights(self.model))
        return result

    monkeypatch.setattr(Trainer, "_step", watched)
    run.fit()
    checkpoint = last_checkpoint(tmp_path)
    saved = load_file(checkpoint / "ema/model.safetensors")
    shares = [0.6 ** (len(after) - 1 - i) for i in range(len(after))]
    for name, value in saved.items():
        mean = sum(share * one[name].double() for share, one in zip(shares, after, strict=True)) / sum(shares)
        torch.testing.assert_close(value.double(), mean, rtol=1e-5, atol=1e-6)
    raw = load_file(checkpoint / "model.safetensors")
    assert raw.keys() == saved.keys() and not torch.equal(raw["norm.weight"], saved["norm.weight"])
    optimizer = load_file(checkpoint / "optimizer.safetensors")
    assert optimizer["ema.updates.all"].item() == 6
    assert not [name for name in optimizer if name.startswith("ema.average")], "stored once"


@pytest.mark.parametrize("tied", [False, True])
def test_resuming_is_bit_exact(tmp_path: Path, tied: bool) -> None:
    config = ModelConfig(**{**MODEL.model_dump(), "tied_embeddings": tied})
    optim = {"ema": 0.8, "lr": 0.05, "optimizer": "muon", "schedule": "constant"}
    for name, stops in (("whole", [8]), ("parts", [3, 5, 8])):
        for steps in stops:
            model = Transformer(config, seed=0)
            trainer(
                tmp_path / name, model, train={"steps": steps}, optim=optim, validate=lambda: {"loss": 1.0}
            ).fit()
    whole, parts = (last_checkpoint(tmp_path / name) for name in ("whole", "parts"))
    for file in ("model.safetensors", "optimizer.safetensors", "ema/model.safetensors"):
        left, right = load_file(whole / file), load_file(parts / file)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left), file


def test_a_skipped_step_is_not_averaged(tmp_path: Path) -> None:
    class Spoilt(RandomBatches):
        def next_batch(self) -> Batch:
            batch = super().next_batch()
            if self.place == 3:
                batch.targets.fill_(-100)
            return batch

    model = Transformer(MODEL, seed=0)
    run = trainer(tmp_path, model, loader=Spoilt(), optim={"ema": 0.5})
    original = run.loss

    class Infinite:
        def __getattr__(self, name: str) -> Any:
            return getattr(original, name)

        def __call__(self, batch: Any) -> torch.Tensor:
            loss = original(batch)
            return loss / 0.0 if (batch.targets == -100).all() else loss

    run.loss = Infinite()
    state = run.fit()
    assert state.skipped == 1
    assert load_file(last_checkpoint(tmp_path) / "optimizer.safetensors")["ema.updates.all"].item() == 5


def test_a_run_with_an_average_is_not_resumed_without_it(tmp_path: Path) -> None:
    trainer(tmp_path, optim={"ema": 0.5}).fit()
    with pytest.raises(UserError, match=r"has ema\.updates\.all, which this model and optimizer do not have"):
        trainer(tmp_path, train={"steps": 8}).fit()
    (last_checkpoint(tmp_path) / "ema/model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors does not exist; the checkpoint is incomplete"):
        trainer(tmp_path, train={"steps": 8}, optim={"ema": 0.5}).fit()


def test_paths_name_the_average(tmp_path: Path) -> None:
    trainer(tmp_path / "run", optim={"ema": 0.5, "lr": 0.05}).fit()
    trainer(tmp_path / "without").fit()
    folder = last_checkpoint(tmp_path / "run") / "ema"
    for path in (tmp_path / "run/ema", tmp_path / "run/checkpoints/ema", folder):
        assert checkpoint_at(path).path == best_checkpoint(path).path == folder
    model, _ = load(tmp_path / "run/ema")
    saved = load_file(folder / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in saved.items())
    raw, _ = load(tmp_path / "run")
    assert not torch.equal(raw.embedding.weight, model.embedding.weight)
    with pytest.raises(UserError, match=r"holds no averaged weights; train with optim\.ema"):
        load(tmp_path / "without/ema")
    with pytest.raises(UserError, match="does not exist; name a run's folder"):
        load(tmp_path / "nowhere/ema")


def test_from_the_command_line(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "small.toml", "--optim.ema", "0.8", "--train.steps", "12"]) == 0
    validations = [record for record in records(small / "runs/small") if record["kind"] == "validation"]
    assert [sorted(key for key in record if key.endswith("_ema")) for record in validations] == [
        ["bits_per_byte_ema", "loss_ema", "perplexity_ema"]
    ] * 2
    assert all(record["loss"] != record["loss_ema"] for record in validations)
    capsys.readouterr()
    texts = []
    for folder in ("runs/small", "runs/small/ema"):
        arguments = ["--prompts", "def ", "--max-tokens", "12", "--temperature", "0", "--device", "cpu"]
        assert main(["generate", folder, *arguments]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[1].startswith("def ")
    assert main(["export", "runs/small/ema", "exported", "--family", "scratchlm"]) == 0
    exported = load_file(small / "exported/model.safetensors")
    saved = load_file(last_checkpoint(small / "runs/small") / "ema/model.safetensors")
    assert all(torch.equal(exported[name], saved[name]) for name in saved)
    assert json.loads((small / "exported/config.json").read_text())["d_model"] == 32
