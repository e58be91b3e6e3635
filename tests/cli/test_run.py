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
from scratchlm.config import Recipe, load_recipe
from scratchlm.pipeline import VERSIONS
from scratchlm.run_folder import _LATER, _ROUNDING, fields_of, what_is_learnt

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
    assert f"{evaluation['loss']:.4f}" in out
    assert f"{evaluation['perplexity']:.2f}" in out
    assert f"{evaluation['bits_per_byte']:.4f}" in out
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


@pytest.mark.parametrize("step", ["tokenizer", "data", "evaluate", "sample", "report"])
def test_code_versions_that_matter_are_inputs(
    step: str, small: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["run", "small.toml", *SIX]
    if step in ("tokenizer", "data"):
        command = ["data", "prepare", "small.toml"]
    lines(capfd, *command)
    monkeypatch.setitem(VERSIONS, step, 10_000)
    assert verbs(lines(capfd, *command))[step] == "done"


@pytest.mark.parametrize("name", sorted(_ROUNDING))
def test_another_way_to_compute_the_same_may_go_on(
    name: str, small: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {
        "device": "cpu",
        "threads": "1",
        "model.kernels": "reference",
        "model.attention_kernel": "sdpa",
        "train.precision": "bf16",
        "train.compile": "auto",
        "train.loss_kernel": "reference",
        "train.activation_checkpointing": "blocks",
        "optim.implementation": "reference",
        "model.linear.form": "recurrent",
        "model.linear.chunk": "8",
        "model.moe.dispatch": "reference",
        "train.accumulation": "2",
        "train.micro_batch": "1",
        "train.weights": "bf16",
        "train.compile_mode": "max_autotune",
        "train.fp8": "True",
        "train.cuda_graph": "True",
    }
    if name == "train.fp8":  # which no CPU has: it is pretended, here and where the machine is looked at
        monkeypatch.setattr("scratchlm.train.precision.has_native_fp8", lambda device: True)
        monkeypatch.setattr("scratchlm.train.loop.check_fp8", lambda precision, device: None)
    command = ["train", "small.toml", *SIX]
    if name in ("train.weights", "train.fp8"):  # of a run in bf16
        command += ["--train.precision", "bf16"]
    lines(capfd, *command)
    shutil.rmtree(last_checkpoint(small / "runs/small"))
    assert main([*command, f"--{name.replace('_', '-')}", values[name]]) == 0
    out = capfd.readouterr().out
    assert f"going on with another {name}: results may differ in the last digits" in out
    assert re.search(r"^train +resumed and done", out, re.MULTILINE)


def test_where_and_how_to_work_may_change_in_a_run(small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines(capfd, "run", "small.toml", *SIX)
    changes = [
        "--data.workers",
        "2",
        "--train.eval-interval",
        "3",
        "--train.keep-checkpoints",
        "1",
        "--train.log-interval",
        "2",
    ]
    said = lines(capfd, "run", "small.toml", *SIX, *changes, "--model.vocab-size", "300")
    assert verbs(said) == {**dict.fromkeys(ALL, "up"), "report": "done"}


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


def test_evaluating_otherwise_leaves_the_runs_own_figures(small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines(capfd, "run", "small.toml", *SIX)
    own = (small / "runs/small/evaluation.json").read_bytes()
    assert main(["evaluate", "runs/small", "--stride", "8", "--compressors", "False"]) == 0
    assert "gzip" not in capfd.readouterr().out
    assert (small / "runs/small/evaluation.json").read_bytes() == own
    assert verbs(lines(capfd, "run", "small.toml", *SIX)) == dict.fromkeys(ALL, "up")


def test_a_terminal_without_unicode_is_no_error(small: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    for command in (["--help"], ["run", "small.toml", "--train.steps", "0"]):
        done = subprocess.run([sys.executable, "-m", "scratchlm", *command], capture_output=True, env=environment)
        assert done.returncode == 0, done.stderr.decode()


def test_a_recipe_named_with_spaces(small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copy(small / "small.toml", small / "my first run.toml")
    lines(capfd, "data", "prepare", "my first run.toml")
    assert (small / "runs/my-first-run/tokenizer.json").exists()


def test_seconds_of_a_resumed_training_are_all_of_them(small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines(capfd, "train", "small.toml")
    whole = json.loads((last_checkpoint(small / "runs/small") / "state.json").read_text())["progress"]["seconds"]
    shutil.rmtree(last_checkpoint(small / "runs/small"))
    lines(capfd, "train", "small.toml")
    timings = json.loads((small / "runs/small/timings.json").read_text())
    state = json.loads((last_checkpoint(small / "runs/small") / "state.json").read_text())["progress"]
    assert timings["train"] == {"seconds": pytest.approx(state["seconds"], abs=0.01), "action": "resumed"}
    assert state["seconds"] > 0.5 * whole


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


def test_the_held_out_text_as_a_file_gives_the_runs_own_figure(
    small: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from scratchlm.data import open_corpus

    documents = open_corpus(load_recipe("small.toml").corpus).documents("validation")
    (small / "held-out.jsonl").write_text("".join(json.dumps({"text": d.text}) + "\n" for d in documents))
    for options in ([], ["--train.precision", "bf16", "--train.document-boundaries", "True"]):
        out = f"runs/{len(options)}"
        lines(capfd, "run", "small.toml", *SIX, "--out", out, *options)
        figures = json.loads((small / out / "evaluation.json").read_text())
        for named in (out, f"{out}/checkpoints"):  # which lie in the run that knows how they were trained
            assert main(["evaluate", named, "held-out.jsonl"]) == 0
            shown = capfd.readouterr().out
            for figure in ("loss", "bits_per_byte"):
                assert f"{figures[figure]:.4f}" in shown
            assert f"{figures['text_bytes']:,}" in shown


def test_a_run_is_not_judged_on_another_text(small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines(capfd, "run", "small.toml", *SIX)
    own = (small / "runs/small/evaluation.json").read_bytes()
    corpus = small / "corpus.txt"
    corpus.write_text("a new first document\n<|endoftext|>" + corpus.read_text())
    for options in ([], ["--stride", "8"]):
        assert main(["evaluate", "runs/small", *options]) == 2
        assert "the corpus or the tokenizer has changed since" in capfd.readouterr().err
    assert (small / "runs/small/evaluation.json").read_bytes() == own
    assert main(["evaluate", "runs/small", "corpus.txt"]) == 0


def test_files_are_read_as_the_run_reads_text(small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    texts = (small / "corpus.txt").read_text().split("<|endoftext|>")
    (small / "texts.jsonl").write_text("".join(json.dumps({"content": text}) + "\n" for text in texts))
    read = ["--corpus.kind", "jsonl", "--corpus.paths", "texts.jsonl", "--corpus.text_field", "content"]
    lines(capfd, "train", "small.toml", *SIX, *read)
    assert main(["evaluate", "runs/small", "texts.jsonl"]) == 0
    assert f"{len(texts)} documents" in capfd.readouterr().out


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


LATER = {
    "corpus.hold_out": {"corpus": {"hold_out": "ends"}},
    "train.weights": {"train": {"weights": "bf16"}},
    "train.fp8": {"train": {"fp8": True}},
    "train.compile_mode": {"train": {"compile_mode": "cuda_graphs"}},
    "train.cuda_graph": {"train": {"cuda_graph": True}},
}


def test_a_field_that_came_later_does_not_make_an_old_run_another_one() -> None:
    """Left at its default it is not part of what a run is; set, it is."""
    plain = Recipe()
    assert LATER.keys() == _LATER.keys()
    for name, changed in LATER.items():
        for part in (fields_of, what_is_learnt):
            assert name not in part(plain)
            expected = set() if part is what_is_learnt and name in _ROUNDING else {name}
            assert part(Recipe(**changed)).keys() - part(plain).keys() == expected


@pytest.mark.parametrize("back", [False, True])
def test_it_does_not_hide_another_way_to_hold_out(
    back: bool, small: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--corpus.hold-out", "ends"]
    first, second = (options, []) if back else ([], options)
    assert main(["train", "small.toml", *SIX, *first]) == 0
    assert main(["train", "small.toml", *SIX, *second]) != 0
    assert "corpus.hold_out" in capfd.readouterr().err


def test_the_speedrun_reads_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every character is a token, the last tenth of the text is held out, and all of it is judged."""
    monkeypatch.chdir(tmp_path)
    text = "".join(f"line {number}: to be, or not\n" for number in range(300))
    (tmp_path / "play.txt").write_text(text)
    recipe = Path(__file__).parents[2] / "recipes/speedrun/shakespeare-char.toml"
    options = ["--train.steps", "2", "--generate.max-tokens", "3", "--corpus.paths", "play.txt"]
    assert main(["run", str(recipe), *options]) == 0
    manifest = json.loads(next(tmp_path.glob("runs/cache/data/*/manifest.json")).read_text())
    whole = {name: sum(shard["tokens"] for shard in split["shards"]) for name, split in manifest["splits"].items()}
    cut = int(len(text) * 0.9)
    assert whole == {"train": cut + 1, "validation": len(text) - cut + 1}  # and the token that ends a document
    judged = [line for line in records(tmp_path / "runs/shakespeare-char") if line["kind"] == "validation"]
    assert len(judged) == 1 and 0 < judged[0]["bits_per_byte"] < 9
    evaluation = json.loads((tmp_path / "runs/shakespeare-char/evaluation.json").read_text())
    assert (evaluation["text_bytes"], evaluation["tokens"]) == (len(text) - cut, len(text) - cut + 1)


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


def test_the_bar_shows_loss_rate_speed_and_time_left(small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines(capfd, "data", "prepare", "small.toml")
    assert main(["train", "small.toml"]) == 0
    bar = capfd.readouterr().err.replace("\r", "\n").splitlines()[-1]
    assert re.search(
        r"train: 100%.* 24/24 \[\d\d:\d\d<\d\d:\d\d, .*step/s, loss=\d\.\d+, lr=\S+, mem=\d+\.\d\dGB, "
        r"(mfu=\d+\.\d%, )?tok_s=[\d,]+\]",
        bar,
    ), bar


def test_what_compiles_nothing_imports_no_compiler(small: Path) -> None:
    """An optimizer of torch's kind would, to be left alone by it."""
    script = (
        "import sys; from scratchlm.cli import main\n"
        "main(['run', 'small.toml', '--train.compile', 'off', '--train.steps', '4'])\n"
        "print('compiler', 'torch._dynamo' in sys.modules)\n"
        "import torch\n"
        "print(torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)).item())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == ["compiler False", "2.0"]
