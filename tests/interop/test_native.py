"""Our own folder format: what is saved is what is loaded, wherever it lies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from scratchlm.errors import UserError
from scratchlm.interop import load, save
from scratchlm.interop.folders import export_folder, import_folder
from scratchlm.interop.tensor_files import TensorFiles
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


def test_a_tokenizer_larger_than_the_model_is_not_saved(tmp_path: Path) -> None:
    model = Transformer(MODEL.model_copy(update={"vocab_size": 261}), seed=0)
    tokenizer = train_bpe(["some text, some more text"], vocab_size=262, special_tokens=["<|e|>"])
    for family in ("scratchlm", "standalone", "auto"):
        with pytest.raises(UserError, match="the tokenizer has 262 tokens, the model 261"):
            save(model, tmp_path / "model", family=family, tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options, said",
    [
        ({"dtype": "fp8"}, "dtype = 'fp8' is unknown; known are keep, fp32, bf16, fp16"),
        ({"shard_bytes": 0}, "shard_bytes = 0 leaves no room"),
        ({"shard_bytes": -1}, "shard_bytes = -1 leaves no room"),
    ],
)
def test_wrong_options(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    for family in ("scratchlm", "standalone", "auto"):
        with pytest.raises(UserError, match=said):
            save(Transformer(MODEL, seed=0), tmp_path / "model", family=family, **options)
    if "dtype" in options:
        save(Transformer(MODEL, seed=0), tmp_path / "llama")
        with pytest.raises(UserError, match=said):
            import_folder(tmp_path / "llama", tmp_path / "model", **options)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("content", ["[1]", "3", "null", '"text"'])
def test_a_config_that_is_no_object(tmp_path: Path, content: str) -> None:
    save(Transformer(MODEL, seed=0), tmp_path / "model", family="scratchlm")
    (tmp_path / "model/config.json").write_text(content)
    with pytest.raises(UserError, match=r"config.json is no JSON object"):
        load(tmp_path / "model")


CORRECTED = ModelConfig(
    vocab_size=300, d_model=16, layers=2, heads=4, moe={"experts": 4, "top_k": 2, "router": "sigmoid"}
)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_routers_correction_stays_in_fp32(tmp_path: Path, dtype: str) -> None:
    model = Transformer(CORRECTED, seed=0)
    name = next(name for name in model.state_dict() if name.endswith(".correction"))
    correction = model.state_dict()[name]
    correction += 1e-4 * torch.arange(1, 5)  # a change that sixteen bits of a sum near one would lose
    correction += 1
    save(model, tmp_path / "own", family="scratchlm", dtype=dtype)
    again = load(tmp_path / "own")[0]
    assert again.state_dict()[name].dtype == torch.float32 and again.state_dict()[name].equal(correction)
    assert again.embedding.weight.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_bytes", [None, 4000])
def test_a_standalone_export_comes_back(tmp_path: Path, tied: bool, shard_bytes: int | None) -> None:
    config = CORRECTED.model_copy(update={"attention": ("gated_delta", "mha"), "tied_embeddings": tied})
    model = Transformer(config, seed=0)
    tokenizer = train_bpe(["some text, some more text"], vocab_size=262, special_tokens=["<|e|>"])
    save(model, tmp_path / "out", family="standalone", tokenizer=tokenizer, shard_bytes=shard_bytes)
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == (shard_bytes is not None)
    ids = torch.randint(0, 300, (2, 8))
    opened = import_folder(tmp_path / "out", tmp_path / "ours")
    assert opened.model.config == config
    for folder in ("out", "ours"):
        again, its_tokenizer = load(tmp_path / folder)
        assert again.config == config and not again.training and again(ids).equal(model.eval()(ids))
        assert its_tokenizer is not None and its_tokenizer.content_hash == tokenizer.content_hash
    assert export_folder(tmp_path / "ours", tmp_path / "back", family="standalone") == "standalone"
    one, two = TensorFiles(tmp_path / "out"), TensorFiles(tmp_path / "back")
    assert one.stored.keys() == two.stored.keys() and all(one.read(n).equal(two.read(n)) for n in one.stored)
    halved = import_folder(tmp_path / "out", tmp_path / "halved", dtype="bf16").model
    assert halved.embedding.weight.equal(model.embedding.weight.bfloat16())


def test_a_damaged_standalone_export(tmp_path: Path) -> None:
    save(Transformer(MODEL, seed=0), tmp_path / "out", family="standalone")
    path = tmp_path / "out/config.json"
    values = json.loads(path.read_text())
    for architecture, said in (
        ([1], "architecture is no JSON object"),
        (values["architecture"] | {"d_model": 32}, "holds a different model"),
        (values["architecture"] | {"heads": "x"}, "architecture"),
    ):
        path.write_text(json.dumps(values | {"architecture": architecture}))
        with pytest.raises(UserError, match=said):
            load(tmp_path / "out")
