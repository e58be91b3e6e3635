"""``scratchlm model draw``: from presets, recipes and runs, with flags; what is wrong is said in a line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scratchlm.cli import main
from scratchlm.model import ModelConfig
from scratchlm.model.draw.page import MARK

TINY = """name = "tiny"
[tokenizer]
vocab_size = 300
[model]
context_length = 16
d_model = 16
layers = 1
heads = 2
d_ff = 16
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(TINY)
    return tmp_path


def page_of(folder: Path) -> str:
    return (folder / "index.html").read_text(encoding="utf-8")


def test_a_recipe_with_flags(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask = ["--model.layers", "2", "--model.mask", "sliding_window", "causal"]
    options = [*mask, "--model.window", "4", "--length", "12"]
    assert main(["model", "draw", "tiny.toml", *options]) == 0
    drawn = folder / "drawings" / "tiny"
    assert capsys.readouterr().out.startswith(f"{Path('drawings/tiny/index.html')}: open it")
    names = {"layers", "block", "masks", "rope", "costs", "cache"}
    assert {path.name for path in drawn.iterdir()} == {f"{name}.png" for name in names} | {"index.html", MARK}
    page = page_of(drawn)
    assert (
        "The recipe tiny.toml. Drawn with changes. Its vocabulary is the tokenizer&#39;s; of 300 tokens here."
        in page
    )
    assert "window = 4" in page and "mask = &#34;sliding_window causal&#34;" in page
    assert set(json.loads((drawn / MARK).read_text())["files"]) == {f"{name}.png" for name in names} | {
        "index.html"
    }


def test_a_preset_and_its_source(folder: Path) -> None:
    assert (
        main(["model", "draw", "gpt2-tiny", "--out", "here", "--model.layers", "0", "--model.vocab-size", "64"])
        == 0
    )
    page = page_of(folder / "here")
    assert "GPT-2 – Radford et al. 2019" in page and "Drawn with changes." in page
    assert "tokenizer" not in page


def test_a_run_with_its_routers(folder: Path) -> None:
    run = folder / "run"
    run.mkdir()
    (run / "recipe.toml").write_text(TINY + "vocab_size = 64\n[model.moe]\nexperts = 4\n")
    lines = [{"kind": "train", "step": step, "loss": 1.0, "expert_load": [[1, 2, 3, step]]} for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["model", "draw", "run", "--out", "drawn"]) == 0
    assert (folder / "drawn" / "routers.png").read_bytes().startswith(b"\x89PNG")
    assert "The run in run." in page_of(folder / "drawn")
    assert sorted(path.name for path in run.iterdir()) == ["metrics.jsonl", "recipe.toml"]


def test_drawing_again_replaces_and_nothing_else_is_touched(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["model", "draw", "tiny.toml", "--model.layers", "0", "--out"]
    assert main([*command, "drawn"]) == 0
    assert main([*command, "drawn"]) == 0
    mine = folder / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("important")
    capsys.readouterr()
    assert main([*command, "mine"]) == 2
    assert (
        capsys.readouterr().err
        == "scratchlm: error: mine exists and holds no drawings of ours; choose another --out\n"
    )
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "draw what? usage: scratchlm model draw"),
        ("--out x", "name what to draw first"),
        ("llama3-8b", "did you mean llama-3-8b?"),
        ("gone.toml", "recipe gone.toml does not exist"),
        ("empty", "empty is no run: it has no recipe.toml"),
        ("tiny.toml --model.heads 3", "heads = 3 does not divide d_model = 16"),
        ("tiny.toml --model.norm rmsnrom", "rmsnorm"),
        ("tiny.toml --length 0", "length = 0"),
        ("tiny.toml --layers 3", "did you mean --model.layers?"),
        ("tiny.toml other", "unexpected argument 'other'"),
        ("tiny.toml --out tiny.toml --model.layers 0", "tiny.toml is a file; choose another --out"),
        ("broken.toml", "broken.toml is not valid TOML"),
        ("wrong", "line 1 is not a JSON object"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    folder: Path, command: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "empty").mkdir()
    (folder / "broken.toml").write_text("= 1")
    (folder / "wrong").mkdir()
    (folder / "wrong" / "recipe.toml").write_text(TINY)
    (folder / "wrong" / "metrics.jsonl").write_text("no\n{}\n")
    before = sorted(folder.rglob("*"))
    assert main(["model", "draw", *command.split()]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("scratchlm: error: ") and printed.err.count("\n") == 1
    assert message in printed.err
    assert printed.out == ""
    assert sorted(folder.rglob("*")) == before


def test_help_names_the_models_fields(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["model", "draw", "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "--model.d-model" in printed and "--out" in printed
    assert len(ModelConfig.model_fields) < printed.count("--model.")
