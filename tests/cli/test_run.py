"""`scratchlm run` and each step alone: what they leave, skip, resume and say."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import last_checkpoint, records

from scratchlm.cli import main
from scratchlm.config import load_recipe

SIX = ["--train.steps", "6"]


def lines(capfd: pytest.CaptureFixture[str], *command: str) -> dict[str, str]:
    """Run a command; its step lines by step."""
    capfd.readouterr()
    assert main(list(command)) == 0
    out = capfd.readouterr().out
    return dict(re.findall(r"^(tokenizer|data|train|evaluate|sample|report) +(\S.*)$", out, re.MULTILINE))


def verbs(said: dict[str, str]) -> dict[str, str]:
    return {step: re.split(r"[ ,:]", text)[0] for step, text in said.items()}


ALL = ["tokenizer", "data", "train", "evaluate", "sample", "report"]


def test_a_run_leaves_what_it_promises(small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "small.toml", *SIX]) == 0
    out = capfd.readouterr().out
    run = small / "runs/small"
    names = {path.name for path in run.iterdir()}
    promised = {
        "recipe.toml",
        "tokenizer.json",
        "metrics.jsonl",
        "loss.png",
        "report.html",
        "samples.txt",
        "checkpoints",
    }
    assert promised <= names
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    evaluation = json.loads((run / "evaluation.json").read_text())
    for figure in ("loss", "perplexity", "bits_per_byte"):
        assert f"{evaluation[figure]:.4f}"[:5] in out
    for name in ("gzip -9", "xz -9e"):
        assert f"{evaluation['compressors'][name]['bits_per_byte']:.4f}" in out
    assert "training speed, tokens/s" in out
    assert "a sample, from the prompt 'def '" in out
    assert "run folder: runs/small" in out
    page = (run / "report.html").read_text(encoding="utf-8")
    assert f"{evaluation['bits_per_byte']:.3f}" in page
    text = (run / "samples.txt").read_text(encoding="utf-8")
    assert "prompt of 4 characters" in text and "prompt of 1 characters" in text


def test_the_held_out_bytes_are_those_the_compressors_saw(small: Path) -> None:
    assert main(["run", "small.toml", *SIX]) == 0
    evaluation = json.loads((small / "runs/small/evaluation.json").read_text())
    import lzma

    from scratchlm.data import open_corpus

    text = b"".join(open_corpus(load_recipe("small.toml").corpus).bytes_of("validation"))
    assert evaluation["text_bytes"] == len(text)
    size = len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
    assert evaluation["compressors"]["xz -9e"]["bits_per_byte"] == pytest.approx(8 * size / len(text), rel=0.01)


def test_the_saved_recipe_is_resolved_and_runs_again_as_it_is(
    small: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "small.toml", *SIX, "--model.layers", "1"]) == 0
    saved = small / "runs/small/recipe.toml"
    recipe = load_recipe(saved)
    assert (recipe.train.steps, recipe.model.layers, recipe.model.d_model) == (6, 1, 32)
    shutil.copy(saved, small / "again.toml")
    said = lines(capfd, "run", "again.toml")
    assert set(verbs(said).values()) == {"up"}
    said = lines(capfd, "run", "again.toml", "--out", "runs/other")
    assert verbs(said)["train"] == "done"
    assert records(small / "runs/small") == records(small / "runs/other")


def test_what_is_up_to_date_is_skipped_and_said(small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["run", "small.toml", *SIX]
    assert verbs(lines(capfd, *command)) == dict.fromkeys(ALL, "done")
    before = {path: path.stat().st_mtime_ns for path in (small / "runs").rglob("*.safetensors")}
    assert verbs(lines(capfd, *command)) == dict.fromkeys(ALL, "up")
    assert before == {path: path.stat().st_mtime_ns for path in (small / "runs").rglob("*.safetensors")}
    # other sampling: only the samples, and the report that shows them
    said = verbs(lines(capfd, *command, "--generate.seed", "1"))
    assert said == {**dict.fromkeys(ALL, "up"), "sample": "done", "report": "done"}
    # another run of the same text shares tokenizer and shards
    said = verbs(lines(capfd, *command, "--out", "runs/b", "--seed", "1"))
    assert said == {**dict.fromkeys(ALL, "done"), "tokenizer": "up", "data": "up"}
    # another vocabulary: everything anew
    said = verbs(lines(capfd, *command, "--out", "runs/c", "--tokenizer.vocab-size", "280"))
    assert said == dict.fromkeys(ALL, "done")
    # the same text under another document separator is another corpus
    said = verbs(lines(capfd, *command, "--out", "runs/d", "--corpus.separator", "\n    "))
    assert said["tokenizer"] == said["data"] == "done"


def test_touching_a_file_changes_nothing_but_its_content_does(
    small: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["data", "prepare", "small.toml"]
    lines(capfd, *command)
    os.utime(small / "corpus.txt", (1, 1))
    assert verbs(lines(capfd, *command)) == {"tokenizer": "up", "data": "up"}
    with (small / "corpus.txt").open("a") as file:
        file.write("<|endoftext|>one more document")
    assert verbs(lines(capfd, *command)) == {"tokenizer": "done", "data": "done"}


def test_code_versions_that_matter_are_inputs(
    small: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines(capfd, "data", "prepare", "small.toml")
    monkeypatch.setattr("scratchlm.pipeline.TOKENIZER_VERSION", 10_000)
    assert verbs(lines(capfd, "data", "prepare", "small.toml"))["tokenizer"] == "done"


def test_training_that_was_cut_off_is_resumed_and_said(small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole = ["train", "small.toml", "--out", "runs/whole"]
    lines(capfd, *whole)
    # the folder as it would be had the run stopped after step 10
    shutil.copytree(small / "runs/whole", small / "runs/cut")
    script = (
        "import sys; from scratchlm.train import loop; from scratchlm.cli import main\n"
        "original = loop.Trainer._save\n"
        "def save(self):\n"
        "    original(self)\n"
        "    if self.state.step == 10: sys.stdout.flush(); import os; os._exit(9)\n"
        "loop.Trainer._save = save\n"
        "main(['train', 'small.toml', '--out', 'runs/small'])\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    capfd.readouterr()
    assert main(["train", "small.toml", "--out", "runs/small"]) == 0
    out = capfd.readouterr().out
    assert "resuming from step 10 of 24" in out
    assert re.search(r"^train +resumed and done", out, re.MULTILINE)
    assert records(small / "runs/small") == records(small / "runs/whole")


def test_each_step_alone_builds_on_those_before(small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert list(lines(capfd, "data", "prepare", "small.toml", *SIX)) == ["tokenizer", "data"]
    said = verbs(lines(capfd, "train", "small.toml", *SIX))
    assert said == {"tokenizer": "up", "data": "up", "train": "done"}
    assert not (small / "runs/small/report.html").exists()
    assert main(["evaluate", "runs/small"]) == 0
    assert "bits per byte, gzip -9" in capfd.readouterr().out
    said = verbs(lines(capfd, "run", "small.toml", *SIX))
    assert said == {**dict.fromkeys(ALL, "up"), "sample": "done", "report": "done"}


def test_fresh_moves_the_old_run_aside(small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines(capfd, "train", "small.toml", *SIX)
    weights = (last_checkpoint(small / "runs/small") / "model.safetensors").read_bytes()
    said = lines(capfd, "train", "small.toml", *SIX, "--fresh", "--seed", "3")
    assert verbs(said)["train"] == "done"
    old = last_checkpoint(small / "runs/small.old-1") / "model.safetensors"
    assert old.read_bytes() == weights
    assert (last_checkpoint(small / "runs/small") / "model.safetensors").read_bytes() != weights
    lines(capfd, "train", "small.toml", *SIX, "--fresh")
    assert (small / "runs/small.old-2").exists()


def test_a_second_process_is_kept_out(small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fcntl = pytest.importorskip("fcntl")
    lines(capfd, "data", "prepare", "small.toml")
    with (small / "runs/small/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["train", "small.toml"]) == 2
    assert "another process is working in runs/small" in capfd.readouterr().err


def test_evaluating_files(small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines(capfd, "train", "small.toml", *SIX)
    capfd.readouterr()
    (small / "other.jsonl").write_text(
        json.dumps({"text": "def total(x):"}) + "\n" + json.dumps({"text": "é"}) + "\n"
    )
    assert main(["evaluate", "runs/small", "other.jsonl", "--compressors", "False"]) == 0
    out = capfd.readouterr().out
    assert "15 held-out bytes in 2 documents" in out
    assert "gzip" not in out
    # the same figure as a loop over the text by hand
    import torch

    from scratchlm.interop import load

    model, tokenizer = load("runs/small")
    assert tokenizer is not None
    end = tokenizer.special_tokens["<|endoftext|>"]
    ids = [*tokenizer.encode("def total(x):"), end, *tokenizer.encode("é"), end]
    logits = model.double()(torch.tensor([ids[:-1]]))
    first = torch.nn.functional.cross_entropy(logits[0], torch.tensor(ids[1:]))
    shown = float(re.search(r"nats per token\s*│\s*([\d.]+)", out)[1])  # type: ignore[index]
    assert shown == pytest.approx(float(first), abs=0.15 * float(first))


def test_generate_streams_and_batches(small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines(capfd, "train", "small.toml", *SIX)
    capfd.readouterr()
    options = ["--max-tokens", "9", "--seed", "4"]
    assert main(["generate", "runs/small", "--prompts", "def ", *options]) == 0
    alone = capfd.readouterr().out
    assert alone.startswith("def ") and len(alone) > 5
    assert main(["generate", "runs/small", "--prompts", "def ", "日本", *options]) == 0
    both = capfd.readouterr().out
    assert both.startswith(alone.rstrip("\n") + "\n")
    assert "日本" in both
    assert main(["generate", "runs/small", "--prompts", "def ", "--max-tokens", "9", "--seed", "5"]) == 0
    assert capfd.readouterr().out != alone


def test_tokenizer_commands_round_trip(small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = (small / "corpus.txt").read_text(encoding="utf-8")
    assert main(["tokenizer", "train", "corpus.txt", "--vocab-size", "320", "--out", "t.json"]) == 0
    capfd.readouterr()
    assert main(["tokenizer", "encode", "t.json", "corpus.txt"]) == 0
    printed = capfd.readouterr().out
    from scratchlm.tokenizer import Tokenizer

    assert [int(word) for word in printed.split()] == Tokenizer.load("t.json").encode(text)
    (small / "ids.txt").write_text(printed)
    assert main(["tokenizer", "decode", "t.json", "ids.txt", "--out", "back.txt"]) == 0
    assert (small / "back.txt").read_text(encoding="utf-8") == text
    assert main(["tokenizer", "encode", "t.json", "corpus.txt", "--out", "ids.npy"]) == 0
    capfd.readouterr()
    assert main(["tokenizer", "decode", "t.json", "ids.npy"]) == 0
    assert capfd.readouterr().out == text
    assert main(["tokenizer", "inspect", "t.json", "--text", "naïve total"]) == 0
    shown = capfd.readouterr().out
    assert "320" in shown and "bytes per token" in shown
    # GPT-2's two files
    assert main(["tokenizer", "train", "corpus.txt", "--vocab-size", "320", "--out", "gpt2"]) == 0
    capfd.readouterr()
    assert main(["tokenizer", "encode", "gpt2", "corpus.txt"]) == 0
    assert capfd.readouterr().out == printed


def test_the_embedded_corpus_needs_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.toml").write_text(
        "[corpus]\nmax_documents = 30\nvalidation_fraction = 0.2\n[tokenizer]\nvocab_size = 300\n"
    )
    assert main(["data", "prepare", "r.toml"]) == 0
    manifest = json.loads(next(tmp_path.glob("runs/cache/data/*/manifest.json")).read_text())
    assert sum(split["documents"] for split in manifest["splits"].values()) == 30


def test_help_names_every_command_and_every_field(capfd: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    overview = capfd.readouterr().out
    from scratchlm.cli import COMMANDS

    assert all(command in overview for command in COMMANDS)
    with pytest.raises(SystemExit) as stopped:
        main(["run", "--help"])
    assert stopped.value.code == 0
    shown = capfd.readouterr().out
    from scratchlm.config import Recipe
    from scratchlm.section import field_paths

    for path in field_paths(Recipe):
        if path.split(".")[-1] not in (
            "corpus",
            "tokenizer",
            "data",
            "model",
            "optim",
            "train",
            "evaluate",
            "generate",
        ):
            assert "--" + path.replace("_", "-") in shown, path
    for command in (
        "evaluate",
        "generate",
        "tokenizer train",
        "tokenizer encode",
        "tokenizer decode",
        "tokenizer inspect",
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*command.split(), "--help"])
        assert stopped.value.code == 0
    assert main(["--version"]) == 0
    assert re.search(r"scratchlm \d+\.\d+", capfd.readouterr().out)


def test_a_reader_that_has_seen_enough_is_no_error(small: Path) -> None:
    assert main(["tokenizer", "train", "corpus.txt", "--vocab-size", "300", "--out", "t.json"]) == 0
    (small / "long.txt").write_text("x y " * 500_000)
    command = f"{sys.executable} -m scratchlm tokenizer encode t.json long.txt | head -c 20"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert len(done.stdout) == 20
    assert done.stderr == ""


def test_ctrl_c_outside_training_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("scratchlm.commands.recipes.run", interrupted)
    assert main(["run"]) == 130
    assert "interrupted; nothing is lost" in capfd.readouterr().err
