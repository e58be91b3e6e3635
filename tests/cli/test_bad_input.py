"""Whatever a user gets wrong: one line that says what, where and what to do; exit status 2; nothing lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small_run import RECIPE, last_checkpoint

from scratchlm.cli import main
from scratchlm.files import lock


def edited(old: str, new: str) -> Callable[[Path], None]:
    """The small recipe with one line changed."""

    def change(folder: Path) -> None:
        assert old in RECIPE
        (folder / "small.toml").write_text(RECIPE.replace(old, new))

    return change


def added(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "small.toml").write_text(text + RECIPE)


def wrote(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content)


def nothing(folder: Path) -> None:
    pass


RUN = "run small.toml"

BEFORE_ANYTHING: dict[str, tuple[Callable[[Path], None], str, str]] = {
    # name: what is wrong, the command, what the message must say
    "no such command": (nothing, "runn small.toml", r"no command 'runn'; did you mean run\?"),
    "no such subcommand": (nothing, "tokenizer trian", r"did you mean tokenizer train\?"),
    "no recipe": (nothing, "run", r"which recipe\?"),
    "option before recipe": (nothing, "run --train.steps 3", r"name the recipe first"),
    "recipe missing": (nothing, "run none.toml", r"recipe none.toml does not exist"),
    "recipe is a folder": (lambda f: (f / "d.toml").mkdir(), "run d.toml", r"recipe d.toml is a folder"),
    "recipe is not TOML": (wrote("bad.toml", b"steps = = 3"), "run bad.toml", r"not valid TOML.*line 1"),
    "recipe is not UTF-8": (wrote("bad.toml", b"name = '\xff'"), "run bad.toml", r"bad.toml is not valid TOML"),
    "misspelt field in the recipe": (
        edited("layers", "layrs"),
        RUN,
        r"small.toml: .*model.layrs; did you mean model.layers\?",
    ),
    "misspelt section": (edited("[optim]", "[optimm]"), RUN, r"unknown field optimm; did you mean optim\?"),
    "field in the wrong section": (added("steps = 3\n"), RUN, r"unknown field steps; did you mean train.steps\?"),
    "wrong type in the recipe": (edited("steps = 24", 'steps = "many"'), RUN, r"train.steps = 'many': .*integer"),
    "boolean for a number": (edited("steps = 24", "steps = true"), RUN, r"train.steps"),
    "misspelt option": (nothing, RUN + " --model.layrs 3", r"--model.layrs; did you mean --model.layers\?"),
    "option without its section": (nothing, RUN + " --steps 3", r"--steps; did you mean --train.steps\?"),
    "wrong type on the command line": (nothing, RUN + " --train.steps many", r"--train.steps: .*'many'"),
    "value missing": (nothing, RUN + " --train.steps", r"--train.steps"),
    "choice that is none": (nothing, RUN + " --model.norm layernrom", r"layernrom.*rmsnorm"),
    "negative size": (nothing, RUN + " --model.layers -1", r"model.layers = -1.*greater than or equal to 0"),
    "stray word": (nothing, RUN + " more", r"unexpected argument 'more'"),
    "heads not dividing d_model": (nothing, RUN + " --model.heads 3", r"heads = 3 does not divide d_model = 32"),
    "kv_heads not dividing heads": (
        nothing,
        RUN + " --model.heads 4 --model.kv-heads 3",
        r"kv_heads = 3 does not divide",
    ),
    "odd head_dim for RoPE": (nothing, RUN + " --model.head-dim 15", r"head_dim = 15 must be even"),
    "accumulation not dividing the batch": (nothing, RUN + " --train.accumulation 3", r"train.accumulation = 3"),
    "unknown device": (nothing, RUN + " --device gpu", r"device = 'gpu'"),
    "duplicate specials": (
        edited("vocab_size = 300", 'special_tokens = ["<a>", "<b>", "<a>"]'),
        RUN,
        r"'<a>' twice",
    ),
    "path through a file": (nothing, "run small.toml/x.toml", r"small.toml/x.toml cannot be read"),
    "a name too long for any system": (nothing, f"run {'x' * 300}.toml", r"cannot be read: File name too long"),
    "a run's name too long": (nothing, f"evaluate {'x' * 300}", r"File name too long"),
    "output through a file": (nothing, RUN + " --out corpus.txt/run", r"corpus.txt/run.*Not a directory"),
    "seed beyond 64 bits": (nothing, RUN + " --seed 99999999999999999999", r"seed = 99999999999999999999"),
    "stride longer than the context": (nothing, RUN + " --evaluate.stride 64", r"evaluate.stride = 64 is longer"),
    "window longer than the context": (
        nothing,
        RUN + " --evaluate.context-length 64",
        r"evaluate.context_length = 64",
    ),
    "device that is not there": (nothing, RUN + " --device cuda:63", r"cuda:63 is not available"),
    "fresh over something else": (
        lambda folder: ((folder / "out").mkdir(), (folder / "out/thesis.tex").write_text("mine"))[0],
        RUN + " --out out --fresh",
        r"not a run's folder, so --fresh leaves it alone",
    ),
    "fresh over the working directory": (nothing, RUN + " --out . --fresh", r"--fresh"),
    "no special token": (edited("vocab_size = 300", "special_tokens = []"), RUN, r"special_tokens is empty"),
    "vocabulary smaller than bytes and specials": (
        edited("vocab_size = 300", 'vocab_size = 257\nspecial_tokens = ["<a>", "<b>"]'),
        RUN,
        r"vocab_size = 257 .* 258",
    ),
    "pattern that is no regular expression": (edited("vocab_size = 300", "pattern = '(a'"), RUN, r"pattern"),
    "corpus file missing": (edited("corpus.txt", "none.txt"), RUN, r"none.txt does not exist"),
    "glob that matches nothing": (edited("corpus.txt", "data/*.txt"), RUN, r"data/\*\.txt"),
    "no paths": (edited('paths = ["corpus.txt"]', ""), RUN, r"corpus.paths"),
    "corpus empty": (wrote("corpus.txt", b""), RUN, r"empty"),
    "corpus of separators only": (wrote("corpus.txt", b"<|endoftext|>" * 3), RUN, r"empty"),
    "corpus shorter than the context": (
        wrote("corpus.txt", b"<|endoftext|>".join(b"abc %d" % n for n in range(9))),
        RUN + " --model.context-length 4096 --corpus.validation-fraction 0.5",
        r"context",
    ),
    "nothing held out": (wrote("corpus.txt", b"one document"), RUN, r"held out|validation"),
    "text that is not UTF-8": (
        wrote("corpus.txt", b"fine <|endoftext|> not\xfffine"),
        RUN,
        r"corpus.txt: byte 22 .*not UTF-8.*encoding_errors",
    ),
    "broken JSON line": (
        wrote("corpus.jsonl", b'{"text": "a"}\n{"text": \n'),
        RUN + " --corpus.kind jsonl --corpus.paths corpus.jsonl",
        r"corpus.jsonl.*line 2",
    ),
    "text field missing": (
        wrote("corpus.jsonl", b'{"body": "a"}\n'),
        RUN + " --corpus.kind jsonl --corpus.paths corpus.jsonl",
        r"text.*body",
    ),
    "broken gzip": (
        wrote("corpus.jsonl.gz", b"\x1f\x8b\x08\x00broken"),
        RUN + " --corpus.kind jsonl --corpus.paths corpus.jsonl.gz",
        r"corpus.jsonl.gz",
    ),
    "not a parquet file": (
        wrote("corpus.parquet", b"PAR1 but not really"),
        RUN + " --corpus.kind parquet --corpus.paths corpus.parquet",
        r"corpus.parquet",
    ),
    "vocabulary too large for the shards": (
        nothing,
        RUN + " --tokenizer.path big.json --data.dtype uint16",
        r"uint16",
    ),
    "vocabulary larger than the model's": (nothing, RUN + " --model.vocab-size 290", r"model.vocab_size = 290"),
    "tokenizer file missing": (nothing, RUN + " --tokenizer.path none.json", r"none.json"),
    "tokenizer file cut off": (
        wrote("t.json", b'{"model": {"type": "B'),
        RUN + " --tokenizer.path t.json",
        r"t.json",
    ),
    "output is a file": (wrote("out", b"mine"), RUN + " --out out", r"out is a file"),
    "output holds other content": (
        lambda folder: ((folder / "out").mkdir(), (folder / "out/thesis.tex").write_text("mine"))[0],
        RUN + " --out out",
        r"out exists and holds other content \(thesis.tex\)",
    ),
    "unknown stop token": (edited("max_tokens = 12", 'stop = ["<end>"]'), RUN + " --train.steps 0", r"<end>"),
    "evaluating nothing": (nothing, "evaluate", r"which run\?"),
    "evaluating no run": (nothing, "evaluate none", r"none does not exist"),
    "generating from no run": (nothing, "generate none", r"none does not exist"),
    "generating from a folder without checkpoint": (lambda f: (f / "d").mkdir(), "generate d", r"no checkpoint"),
    "tokenizer over an existing file": (
        wrote("t.json", b"mine"),
        "tokenizer train corpus.txt --out t.json",
        r"t.json exists.*--overwrite",
    ),
    "encoding a file that is not there": (nothing, "tokenizer encode big.json none.txt", r"none.txt.*No such file"),
    "encoding a file that is not UTF-8": (
        wrote("bad.txt", b"a" * 70_000 + b"\xff"),
        "tokenizer encode big.json bad.txt",
        r"bad.txt: byte 70000 is not UTF-8",
    ),
    "decoding words": (
        wrote("ids.txt", b"12 and 13"),
        "tokenizer decode big.json ids.txt",
        r"'and' is no token id",
    ),
    "tokenizer into a file of another kind": (
        nothing,
        "tokenizer train corpus.txt --out t.txt",
        r"neither a .json",
    ),
    "decoding a number too long": (
        wrote("ids.txt", b"9" * 5000),
        "tokenizer decode big.json ids.txt",
        r"is no token id",
    ),
    "decoding an id that is none": (
        wrote("ids.txt", b"99999999"),
        "tokenizer decode big.json ids.txt",
        r"99999999",
    ),
    "files of two kinds": (nothing, "tokenizer train a.txt b.jsonl", r"different kinds"),
}


def big_tokenizer(path: Path) -> None:
    """A tokenizer with more ids than 16 bits hold."""
    from scratchlm.tokenizer import Tokenizer

    vocab = {number: bytes([number]) for number in range(256)}
    pairs = [(bytes([a]), bytes([b])) for a in range(256) for b in range(256)]
    merges = pairs[:65_400]
    vocab |= {256 + number: a + b for number, (a, b) in enumerate(merges)}
    Tokenizer(vocab, merges, special_tokens=["<|endoftext|>"]).save(path)


@pytest.fixture(scope="session")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "big.json"
    big_tokenizer(path)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def fails(command: str, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    assert main(command.split()) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("scratchlm: error")]
    assert len(errors) == 1
    assert re.search(message, errors[0]), errors[0]
    assert "Traceback" not in errors[0] and "pydantic" not in errors[0]


@pytest.mark.parametrize("case", BEFORE_ANYTHING)
def test_bad_input(case: str, small: Path, big: Path, capfd: pytest.CaptureFixture[str]) -> None:
    prepare, command, message = BEFORE_ANYTHING[case]
    shutil.copy(big, small / "big.json")
    prepare(small)
    before = contents(small)
    fails(command, message, capfd)
    after = contents(small)
    assert {name: after.get(name) for name in before} == before  # nothing of the user's is lost or changed


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, to be damaged in copies."""
    from small_run import write_corpus, write_recipe

    folder = tmp_path_factory.mktemp("finished")
    write_corpus(folder / "corpus.txt")
    write_recipe(folder / "small.toml")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["run", "small.toml", "--train.steps", "6"]) == 0
    return folder


def shard(folder: Path) -> Path:
    return next(folder.glob("runs/cache/data/*/train-*.bin"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def other_tokenizer(folder: Path) -> None:
    main(["tokenizer", "train", "corpus.txt", "--vocab-size", "400", "--out", "other.json"])
    for path in folder.glob("runs/small/checkpoints/*/tokenizer.json"):
        shutil.copy(folder / "other.json", path)


def equal_size_tokenizer(folder: Path) -> None:
    """As many ids as the checkpoint's, but others."""
    (folder / "zeros.txt").write_text("".join(f"{n:04d} " for n in range(3000)))
    main(["tokenizer", "train", "zeros.txt", "--vocab-size", "300", "--out", "other.json"])
    for path in folder.glob("runs/small/checkpoints/*/tokenizer.json"):
        shutil.copy(folder / "other.json", path)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


def damaged_state(folder: Path) -> None:
    edit_json(last_checkpoint(folder / "runs/small") / "state.json", progress={"format_version": 1, "step": "x"})


def without_checkpoints(folder: Path) -> None:
    shutil.rmtree(folder / "runs/small/checkpoints")


AGAIN = "run small.toml --train.steps 6"

AFTER_A_RUN: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "shard cut off": (lambda f: cut(shard(f)), AGAIN + " --out runs/b", r"train-00000.bin"),
    "shard with one bit changed": (
        lambda f: flip(shard(f)),
        AGAIN + " --out runs/b",
        r"train-00000.bin is damaged.*digest",
    ),
    "equally large tokenizer of another text": (equal_size_tokenizer, "generate runs/small", r"does not belong"),
    "damaged state": (damaged_state, "evaluate runs/small", r"state.json is damaged"),
    "another process at work": (nothing, AGAIN + " --fresh --out runs/locked", r"another process is working"),
    "shard gone": (lambda f: shard(f).unlink(), AGAIN + " --out runs/b", r"train-00000.bin"),
    "manifest cut off": (
        lambda f: cut(next(f.glob("runs/cache/data/*/manifest.json"))),
        AGAIN + " --out runs/b",
        r"manifest.json",
    ),
    "shards of another tokenizer": (
        lambda f: edit_json(next(f.glob("runs/cache/data/*/manifest.json")), tokenizer="0" * 32),
        AGAIN + " --out runs/b",
        r"tokenizer",
    ),
    "other model, same folder": (nothing, AGAIN + " --model.layers 3", r"model.layers = 2, now it is 3.*--fresh"),
    "other seed, same folder": (nothing, AGAIN + " --seed 5", r"seed = 0, now it is 5"),
    "corpus changed, same folder": (
        lambda f: (f / "corpus.txt").write_text((f / "corpus.txt").read_text() + "<|endoftext|>more text\n" * 9),
        AGAIN,
        r"corpus or the tokenizer has changed",
    ),
    "weights cut off": (
        lambda f: cut(last_checkpoint(f / "runs/small") / "model.safetensors"),
        "generate runs/small",
        r"model.safetensors cannot be read",
    ),
    "checkpoint of another model": (
        lambda f: edit_json(last_checkpoint(f / "runs/small") / "config.json", d_ff=128),
        "generate runs/small",
        r"different model",
    ),
    "checkpoint's tokenizer is another's": (other_tokenizer, "generate runs/small", r"does not belong"),
    "no checkpoint any more": (without_checkpoints, "evaluate runs/small", r"holds no checkpoint"),
    "stride longer than the window": (nothing, "evaluate runs/small --stride 64", r"stride"),
    "window longer than the model's": (nothing, "evaluate runs/small --context-length 64", r"context"),
    "misspelt option of generate": (nothing, "generate runs/small --prompt x", r"did you mean --prompts\?"),
    "negative temperature": (nothing, "generate runs/small --temperature -1", r"temperature"),
    "no prompt": (nothing, "generate runs/small --prompts", r"prompts is empty"),
    "files to evaluate that are not there": (nothing, "evaluate runs/small none.txt", r"none.txt does not exist"),
    "ids that are no ids": (
        lambda f: np.save(f / "ids.npy", np.zeros((2, 2))),
        "tokenizer decode runs/small ids.npy",
        r"flat array of integers",
    ),
}


@pytest.mark.parametrize("case", AFTER_A_RUN)
def test_bad_input_after_a_run(
    case: str,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    damage, command, message = AFTER_A_RUN[case]
    shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    shutil.copytree("runs/small", "runs/locked")
    busy = lock("runs/locked/.lock", wait=False)
    damage(tmp_path / "copy")
    before = contents(tmp_path / "copy/runs/small")
    with busy:
        fails(command, message, capfd)
    assert contents(tmp_path / "copy/runs/small") | before == contents(tmp_path / "copy/runs/small")


@pytest.mark.parametrize("name", ["tokenizer.json", "train-00000.bin", "model.safetensors", "samples.txt"])
def test_a_full_disk(
    small: Path, name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The system says ENOSPC when the named file is about to appear."""
    original = os.fsync

    def full(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if name.split(".")[0] in path.name:
            raise OSError(28, "No space left on device")
        original(descriptor)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to know which file is being synced")
    monkeypatch.setattr(os, "fsync", full)
    fails("run small.toml --train.steps 6", r"no space left while writing .*: nothing was changed there", capfd)
    monkeypatch.setattr(os, "fsync", original)
    assert not list(small.rglob(f"{name}"))
    assert main(["run", "small.toml", "--train.steps", "6"]) == 0  # with space again, it goes on


def test_no_compiler_is_an_error_only_if_one_is_demanded(
    small: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("scratchlm.train.precision.find_compiler", lambda: None)
    fails("train small.toml --train.compile on", r"no C\+\+ compiler was found", capfd)
    assert main(["train", "small.toml", "--train.compile", "auto", "--train.steps", "120"]) == 0
    assert "no C++ compiler found: running eager" in capfd.readouterr().out


def test_a_real_full_disk_while_a_checkpoint_is_written(small: Path) -> None:
    """The system refuses to let a file grow beyond 100 kB, as it does on a full disk."""
    resource = pytest.importorskip("resource")
    script = (
        "import resource, signal, sys\n"
        "from scratchlm.cli import main\n"
        "main(['data', 'prepare', 'small.toml'])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "sys.exit(main(['train', 'small.toml']))\n"
    )
    assert resource
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("scratchlm: error")]
    assert len(errors) == 1 and "safetensors" in errors[0]
    assert not list((small / "runs/small/checkpoints").glob("*step*"))
    assert main(["train", "small.toml", "--train.steps", "24"]) == 0
