"""What import and export do beside the weights: tokenizers, special ids, what separates documents, and where folders lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_exchange import SPECIAL, edited, run, their_model
from transformers_oracle import transformers

from scratchlm.interop import load
from scratchlm.interop.folders import end_tokens, export_folder, import_folder, separator_of
from scratchlm.tokenizer import Tokenizer, train_bpe


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    their_model(tmp_path / "theirs")
    return tmp_path / "theirs"


def mistral(folder: Path) -> Any:
    """A small Mistral, a function that a Llama computes too, with files of a kind of tokenizer we do not read."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.MistralConfig(
        **sizes,
        intermediate_size=56,
        vocab_size=64,
        sliding_window=None,
        bos_token_id=5,
        eos_token_id=7,
        pad_token_id=9,
    )
    model = transformers.MistralForCausalLM(config).eval()
    model.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(b"pieces")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    return model


@pytest.mark.parametrize("family", ["auto", "llama", "standalone"])
def test_an_export_gives_tokenizer_files_and_ids_back(family: str, tmp_path: Path) -> None:
    mistral(tmp_path / "theirs")
    with pytest.warns(UserWarning, match="SentencePiece"):
        import_folder(tmp_path / "theirs", tmp_path / "ours")
    written = export_folder(tmp_path / "ours", tmp_path / "back", family=family)
    assert written == ("mistral" if family == "auto" else family)
    for name in ("tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    said = json.loads((tmp_path / "back/config.json").read_text())
    assert [said[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [5, 7, 9]
    assert said["model_type"] == {"auto": "mistral", "standalone": "scratchlm"}.get(family, family)


def test_ids_that_the_original_leaves_to_its_family_are_left_to_it(theirs: Path, tmp_path: Path) -> None:
    path = theirs / "config.json"
    values = {key: value for key, value in json.loads(path.read_text()).items() if not key.endswith("_token_id")}
    path.write_text(json.dumps(values))
    import_folder(theirs, tmp_path / "ours")
    export_folder(tmp_path / "ours", tmp_path / "back")
    assert not [key for key in json.loads((tmp_path / "back/config.json").read_text()) if key.endswith("_token_id")]


def test_what_separates_documents_is_kept(
    small: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The second of the tokenizer's special tokens, which only the recipe says."""
    tokenizer = train_bpe(["some text"], vocab_size=260, special_tokens=["<|aa|>", "<|zz|>"])
    tokenizer.save(small / "own.json")
    expected = tokenizer.special_tokens["<|zz|>"]
    assert next(iter(tokenizer.special_tokens)) == "<|aa|>"
    recipe = (small / "small.toml").read_text().replace("vocab_size = 300", 'path = "own.json"')
    recipe = recipe.replace("[tokenizer]", '[tokenizer]\nspecial_tokens = ["<|zz|>"]')
    (small / "small.toml").write_text(recipe.replace("[generate]", '[generate]\nstop = ["<|zz|>"]'))
    assert run("run", "small.toml") == 0
    step = sorted((small / "runs/small/checkpoints").iterdir())[-1]
    monkeypatch.chdir(step.parent)
    assert separator_of(Path(step.name), tokenizer) == separator_of(step, tokenizer) == expected
    for family in ("scratchlm", "standalone", "auto"):
        export_folder(small / "runs/small", small / family, family=family)
        assert separator_of(small / family, tokenizer) == expected, family
        assert end_tokens(small / family, tokenizer) == ["<|zz|>"], family
    export_folder(small / "scratchlm", small / "again", family="scratchlm")
    assert separator_of(small / "again", tokenizer) == expected
    assert run("generate", small / "scratchlm", "--prompts", "", "--max-tokens", "4", "--seed", "1") == 0


@pytest.mark.parametrize("ids", [[[1]], {}, {"a": 1}, True, "x", 1.5])
def test_ids_of_a_wrong_kind_are_ignored(ids: Any, theirs: Path) -> None:
    tokenizer = Tokenizer.load(theirs)
    (theirs / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    assert end_tokens(theirs, tokenizer) == [SPECIAL]  # what config.json says
    edited(eos_token_id=ids)(theirs)
    assert end_tokens(theirs, tokenizer) == []


def test_what_ends_a_text_is_read_from_a_raw_folder(theirs: Path) -> None:
    tokenizer = Tokenizer.load(theirs)
    edited(eos_token_id=None)(theirs)
    path = theirs / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [3, tokenizer.vocab_size - 1]}))
    assert end_tokens(theirs, tokenizer) == [SPECIAL]


@pytest.mark.parametrize(
    "content", ["{", "[1]", '{"eos_token_id": ' + "9" * 5000 + "}"], ids=["{", "list", "digits"]
)
def test_a_broken_generation_config_is_ignored(
    content: str, theirs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (theirs / "generation_config.json").write_text(content)
    assert run("import", theirs, tmp_path / "ours") == 0
    said = capfd.readouterr().err
    assert (f"{theirs / 'generation_config.json'} is not valid JSON" in said) == (content != "[1]")
    recipe = (tmp_path / "ours/recipe.toml").read_text()
    assert f'"{SPECIAL}"' in recipe and "--corpus.paths 'notes/*.txt'" in recipe


def test_a_tokenizer_of_another_model(theirs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    large = train_bpe(
        ["some text, some more text, naïve 日本"], vocab_size=290, special_tokens=[SPECIAL, "<|more|>"]
    )
    large.save(theirs / "tokenizer.json")
    assert large.vocab_size > json.loads((theirs / "config.json").read_text())["vocab_size"]
    assert run("import", theirs, tmp_path / "ours") == 0
    said = capfd.readouterr()
    assert "is imported without a tokenizer" in said.err
    assert "a model without a tokenizer" in said.out and "take it" not in said.out
    assert not (tmp_path / "ours/tokenizer.json").exists()
    assert load(tmp_path / "ours")[1] is None
    export_folder(tmp_path / "ours", tmp_path / "back")
    assert (tmp_path / "back/tokenizer.json").read_bytes() == (theirs / "tokenizer.json").read_bytes()


def test_the_folder_one_is_in(
    theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for command in ("import", "export"):
        for out in (".", "", tmp_path / "empty", "../empty"):
            assert run(command, theirs, out) == 2
            assert "cannot write into the folder you are in" in capfd.readouterr().err
    assert not list((tmp_path / "empty").iterdir())


def test_the_home_folder_is_expanded(theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert run("import", "~/theirs", "~/ours") == 0
    assert load("~/ours")[0].config == load("~/theirs")[0].config
    assert run("export", "~/ours", "~/back") == 0
    assert (tmp_path / "back/config.json").exists()
    assert run("generate", "~/ours", "--prompts", "some", "--max-tokens", "2") == 0
    assert not list((tmp_path / "work").iterdir())
