"""``scratchlm profile``: tables on the screen, JSON, the run's own data, and one line for whatever is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scratchlm.cli import main

FEW = ["--steps", "2", "--warmup", "1"]


def test_the_tables_say_where_time_and_memory_go(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "small.toml", *FEW, "--top", "4", "--model.layers", "3"]) == 0
    out = capsys.readouterr().out
    for phase in ("loader", "forward", "backward", "optimizer", "forward + backward", "step"):
        assert any(line.strip().startswith(phase) for line in out.splitlines()), phase
    assert "random ids of a vocabulary of 300" in out and "tokens/s" in out
    assert "blocks.*" in out and "aten::" in out
    assert "memory that stays: parameters" in out and "at most live" in out
    folder = Path("runs/small.profile-1")
    assert f"{folder}: memory.png, profile.json, trace.json.gz" in out
    saved = json.loads((folder / "profile.json").read_text())
    assert saved["recipe"]["model"]["layers"] == 3
    assert {f"blocks.{layer}" for layer in range(3)} <= {row["path"] for row in saved["modules"]}
    assert not Path("runs/small").exists()  # the run is still to be begun


def test_the_runs_own_tokens_are_taken_and_its_folder_stays_as_it_is(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "prepare", "small.toml"]) == 0
    before = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    assert main(["profile", "small.toml", *FEW, "--out", "here", "--json"]) == 0
    out, err = capsys.readouterr()
    printed = json.loads(out[out.index("{\n") :])
    assert printed["settings"]["own_data"] and "the recipe's own tokens" in printed["settings"]["data"]
    assert "profiling on" in err
    saved = json.loads(Path("here/profile.json").read_text())
    saved.pop("recipe")
    assert printed == saved
    assert {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()} == before
    # Another vocabulary is other data: none of that has been made, and none is.
    assert main(["profile", "small.toml", *FEW, "--out", "there", "--tokenizer.vocab-size", "280"]) == 0
    assert "random ids of a vocabulary of 280" in capsys.readouterr().out
    assert main(["profile", "small.toml", "--out", "more", "--model.vocab-size", "9"]) == 2
    assert "model.vocab_size = 9 is smaller than the tokenizer's 300" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which recipe?"),
        (["--steps", "3"], "name the recipe first"),
        (["none.toml"], "recipe none.toml does not exist"),
        (["small.toml", "--model.layrs", "3"], "did you mean --model.layers?"),
        (["small.toml", "--steps", "0"], "steps = 0"),
        (["small.toml", "--warmup", "0"], "warmup = 0"),
        (["small.toml", "--model.heads", "3"], "heads = 3 does not divide d_model = 32"),
        (["small.toml", "--device", "cuda:63"], "cuda:63 is not available"),
        (["small.toml", "--out", "corpus.txt"], "corpus.txt exists"),
        (["small.toml", "--out", "."], ". exists"),
        (["small.toml", "--out", ".", "--overwrite", "True"], "something else than a profile"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    small: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    before = sorted(path.name for path in small.iterdir())
    assert main(["profile", *arguments]) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and out == ""
    assert sorted(path.name for path in small.iterdir()) == before


def test_help_names_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["profile", "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert "--warmup" in out and "--train.batch-size" in out and "--overwrite" in out
