"""The trainer with choices that draw random numbers, keep statistics, or ask for fewer targets."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_loop import MODEL, lines, trainer

from scratchlm.interop import load
from scratchlm.model import ModelConfig, Transformer
from scratchlm.train.checkpoint import checkpoints, save_weights

RANDOM: dict[str, dict[str, Any]] = {
    "dropout": {"embedding_dropout": 0.1, "attention_dropout": 0.2, "residual_dropout": 0.1},
    "jitter and bias": {"moe": {"experts": 4, "top_k": 1, "jitter": 0.2, "bias_update": 0.01}},
}


def model_of(**changes: Any) -> Transformer:
    return Transformer(ModelConfig(**{**MODEL.model_dump(), **changes}), seed=0)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoints(folder / "checkpoints")[-1].weights()


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", list(RANDOM))
def test_random_choices_follow_the_seed_and_survive_a_resume(name: str, tmp_path: Path) -> None:
    torch.manual_seed(12345)  # whatever the process did before
    trainer(tmp_path / "whole", model_of(**RANDOM[name])).fit()
    torch.rand(7)
    trainer(tmp_path / "again", model_of(**RANDOM[name])).fit()
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "again"))
    trainer(tmp_path / "other", model_of(**RANDOM[name]), seed=1).fit()
    assert not equal(weights(tmp_path / "whole"), weights(tmp_path / "other"))
    halves = {"checkpoint_interval": 3, "keep_checkpoints": 9}
    trainer(tmp_path / "cut", model_of(**RANDOM[name]), train=halves).fit()
    shutil.rmtree(checkpoints(tmp_path / "cut" / "checkpoints")[-1].path)
    torch.manual_seed(999)
    trainer(tmp_path / "cut", model_of(**RANDOM[name]), train=halves).fit()
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_the_mean_is_over_the_targets_that_are_asked_for(tmp_path: Path) -> None:
    """With half of each row a prefix, an untrained model's loss is still that of guessing, and only asked tokens count."""
    prefix = MODEL.context_length // 2
    model = model_of(mask="prefix_lm", prefix_length=prefix, init_output_std=0.0)
    trainer(tmp_path, model, train={"steps": 1}).fit()
    (record,) = lines(tmp_path, "train")
    assert record["loss"] == pytest.approx(math.log(MODEL.vocab_size), rel=1e-5)
    assert record["tokens"] == 4 * (MODEL.context_length - prefix + 1)


@pytest.mark.parametrize("init", ["truncated_normal", "normal", "gpt2", "depth_scaled"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_first_guess_is_near_uniform(init: str, tied: bool) -> None:
    config = ModelConfig(
        vocab_size=1000, d_model=256, layers=2, heads=4, context_length=64, init=init, tied_embeddings=tied
    )
    ids = torch.randint(1000, (4, 65), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = Transformer(config, seed=0)(ids[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert loss < math.log(1000) + 1.5


def test_a_checkpoint_of_the_first_version_opens(tmp_path: Path) -> None:
    """Its model section had other names for the same choices, and norms of queries and keys lay elsewhere."""
    model = model_of(qk_norm="head", rope={"theta": 500.0})
    folder = tmp_path / "old"
    folder.mkdir()
    save_weights(model, folder)
    (folder / "state.json").write_text("{}")
    config = {
        k: v for k, v in MODEL.model_dump(mode="json").items() if k in ("vocab_size", "d_model", "layers", "heads")
    }
    config |= {
        "context_length": MODEL.context_length,
        "d_ff_multiple": MODEL.d_ff_multiple,
        "kv_heads": MODEL.kv_heads,
    }
    config |= {"d_ff": MODEL.d_ff, "rope_theta": 500.0, "qk_norm": "rmsnorm", "block": "pre_norm"}
    config |= {
        "norm": "rmsnorm",
        "mask": "causal",
        "position": "rope",
        "attention": "mha",
        "init_embedding_std": 1.0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    renamed = {n.replace("_norm.norm.", "_norm."): t for n, t in load_file(folder / "model.safetensors").items()}
    assert any("q_norm.weight" in name for name in renamed)
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    opened, _ = load(folder)
    ids = torch.arange(5)
    with torch.no_grad():
        assert torch.equal(opened(ids), model.eval()(ids))
