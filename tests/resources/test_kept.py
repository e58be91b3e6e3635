"""Answers that are kept: found when the same is asked on the same ground, and never otherwise."""

from __future__ import annotations

import gzip
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scratchlm import machine
from scratchlm.cli import main
from scratchlm.config import Recipe, load_recipe
from scratchlm.errors import UserError
from scratchlm.files import write_json
from scratchlm.resources import kept
from scratchlm.resources.devices import find as find_device
from scratchlm.resources.estimate import estimate
from scratchlm.resources.kept import Answer
from scratchlm.resources.tables import Target
from scratchlm.resources.timing import Datasheet

MODEL: dict[str, Any] = {"vocab_size": 400, "context_length": 64, "d_model": 48, "layers": 2, "heads": 4}


@pytest.fixture(autouse=True)
def keeping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Answers are kept, in a folder of this test."""
    monkeypatch.setenv(kept.SWITCH, "1")
    monkeypatch.setattr(kept, "default_path", lambda: tmp_path / "cache" / "device.json")
    return tmp_path / "cache" / "answers"


def recipe(**changes: Any) -> Recipe:
    return Recipe(model=MODEL | changes, train={"batch_size": 4})


def answer() -> Answer:
    device = find_device("h100")
    found = estimate(recipe(), precision="bf16", machine=Datasheet(device), memory_bytes=1e9, price_per_hour=2.0)
    return Answer(found, Target(device, 1e9, 2.0, "somebody's", ("a note",)))


def test_it_is_what_was_kept(keeping: Path) -> None:
    assert kept.find("a") is None
    given = answer()
    assert kept.keep("a", given) == given == kept.find("a")
    assert [path.name for path in keeping.iterdir()] == ["a.json.gz"]


@pytest.mark.parametrize(
    "content",
    [b"", b"no archive", gzip.compress(b"{"), gzip.compress(b"{}"), gzip.compress(b"[1]" * 1000)[:-9]],
    ids=["empty", "no archive", "no JSON", "no answer", "cut off"],
)
def test_what_cannot_be_read_is_not_there(keeping: Path, content: bytes) -> None:
    keeping.mkdir(parents=True)
    (keeping / "a.json.gz").write_bytes(content)
    assert kept.find("a") is None
    assert kept.keep("a", answer()) == kept.find("a") == answer()


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way", encoding="utf-8")
    assert kept.keep("a", answer()) == answer()
    assert kept.find("a") is None


def test_a_folder_that_cannot_be_written_to_is_read(keeping: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = kept.keep("a", answer())

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(kept.os, "utime", refuse)
    assert kept.find("a") == given
    monkeypatch.setattr(kept, "write_bytes", lambda *_: (_ for _ in ()).throw(UserError("the disk is full")))
    assert kept.keep("b", given) == given and kept.find("b") is None


@pytest.mark.parametrize("price", [math.inf, math.nan])
def test_what_json_has_no_words_for_is_not_kept(price: float) -> None:
    given = answer()
    assert given.estimate.time is not None
    given.estimate.time.price = price
    assert kept.keep("a", given) is given and kept.find("a") is None


def test_the_ones_not_asked_for_the_longest_go_first(keeping: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "MOST", 3)
    given = answer()
    for at, name in enumerate("abc"):
        kept.keep(name, given)
        os.utime(keeping / f"{name}.json.gz", (at, at))
    assert kept.find("a") is not None  # asked for now
    kept.keep("d", given)
    assert sorted(path.name[0] for path in keeping.iterdir()) == ["a", "c", "d"]


def test_every_part_of_a_question_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = {"dtype": "auto", "micro_batch": None}
    same = kept.name_of(recipe(), options, None)
    assert same is not None and same == kept.name_of(recipe(), dict(reversed(options.items())), None)
    others = [
        kept.name_of(recipe(layers=3), options, None),
        kept.name_of(recipe(), {**options, "dtype": "bf16"}, None),
        kept.name_of(recipe(), {**options, "micro_batch": 2}, None),
        kept.name_of(recipe(), options, "cpu"),
    ]
    with monkeypatch.context() as one:
        one.setenv("OMP_NUM_THREADS", "77")
        others.append(kept.name_of(recipe(), options, None))
    for function in ("cores", "main_memory", "find_compiler"):
        with monkeypatch.context() as one:
            one.setattr(kept, function, lambda: 12345)
            others.append(kept.name_of(recipe(), options, None))
    with monkeypatch.context() as one:
        one.setattr(kept, "FORMAT", kept.FORMAT + 1)
        others.append(kept.name_of(recipe(), options, None))
    for said in ("model name : one\n\nsecond core", "flags : avx512\n\nsecond core", ""):
        (tmp_path / "cpuinfo").write_text(said, encoding="utf-8")
        with monkeypatch.context() as one:
            one.setattr(machine, "PROCESSOR", tmp_path / "cpuinfo")
            one.setattr(kept, "processor", machine.processor.__wrapped__)
            others.append(kept.name_of(recipe(), options, None))
    for version in ("2.13.0", "2.14.0"):
        (tmp_path / "version.py").write_text(version, encoding="utf-8")
        with monkeypatch.context() as one:
            torch = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
            one.setattr(kept.importlib.util, "find_spec", lambda name, torch=torch: torch)
            others.append(kept.name_of(recipe(), options, None))
    write_json(kept.default_path(), {"measured": 1})
    others.append(kept.name_of(recipe(), options, None))
    write_json(kept.default_path(), {"measured": 2})
    others.append(kept.name_of(recipe(), options, None))
    assert len({same, *others}) == 1 + len(others) and None not in others
    kept.default_path().unlink()
    assert kept.name_of(recipe(), options, None) == same


def test_every_source_file_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "scratchlm" / "model"
    inside.mkdir(parents=True)
    (inside / "norm.py").write_text("a = 1\n", encoding="utf-8")
    (inside / "notes.txt").write_text("", encoding="utf-8")
    (inside / "__pycache__").mkdir()
    monkeypatch.setattr(kept.scratchlm, "__file__", str(tmp_path / "scratchlm" / "__init__.py"))
    names = [kept.name_of(recipe(), {}, None)]
    (inside / "notes.txt").write_text("b", encoding="utf-8")
    (inside / "__pycache__" / "norm.py").write_text("b", encoding="utf-8")
    assert kept.name_of(recipe(), {}, None) == names[0]
    before = (inside / "norm.py").stat()
    (inside / "norm.py").write_text("a = 2\n", encoding="utf-8")
    os.utime(inside / "norm.py", ns=(before.st_atime_ns, before.st_mtime_ns))
    names.append(kept.name_of(recipe(), {}, None))
    for new in ("new.py", "devices.toml", "preset.json"):
        (inside / new).write_text("", encoding="utf-8")
        names.append(kept.name_of(recipe(), {}, None))
    (inside / ".#norm.py").symlink_to(tmp_path / "nowhere")  # an editor's lock
    assert kept.name_of(recipe(), {}, None) is not None
    assert len(set(names)) == 5


def test_what_only_torch_or_a_file_knows_is_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kept, "surely_no_accelerator", lambda: False)
    assert kept.name_of(recipe(), {}, "auto") is None and kept.name_of(recipe(), {}, "cuda:0") is None
    assert kept.name_of(recipe(), {}, "cpu") is not None and kept.name_of(recipe(), {}, None) is not None
    monkeypatch.setattr(kept, "surely_no_accelerator", lambda: True)
    assert kept.name_of(recipe(), {}, "auto") is not None
    trained = recipe(vocab_size=0)
    assert kept.name_of(trained, {}, None) is not None
    tokenizer = trained.tokenizer.model_copy(update={"path": tmp_path / "tokenizer.json"})
    assert kept.name_of(trained.model_copy(update={"tokenizer": tokenizer}), {}, None) is None
    with monkeypatch.context() as one:
        one.setattr(kept, "default_path", Path("~nobody-of-this-name/a").expanduser)
        assert kept.name_of(recipe(), {}, None) is None
    monkeypatch.setenv(kept.SWITCH, "0")
    assert kept.name_of(recipe(), {}, None) is None


@pytest.mark.parametrize("options", [["--json"], ["--device", "h100"], ["--device", "cpu", "--price", "2"]])
def test_the_command_says_the_same_again(
    small: Path,
    keeping: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
) -> None:
    monkeypatch.setenv(kept.SWITCH, "0")
    main(["resources", "small.toml", *options])
    fresh = capsys.readouterr().out
    monkeypatch.setenv(kept.SWITCH, "1")
    assert not keeping.exists()
    for _ in range(2):
        main(["resources", "small.toml", *options])
        assert capsys.readouterr().out == fresh
    assert len(list(keeping.iterdir())) == 1
    main(["resources", "small.toml", *options, "--model.layers", "3"])
    assert capsys.readouterr().out != fresh
    assert len(list(keeping.iterdir())) == 2


def test_a_page_is_written_of_a_kept_answer(small: Path, keeping: Path) -> None:
    for name in ("one", "two"):
        main(["resources", "small.toml", "--device", "h100", "--html", f"{name}.html"])
    assert len(list(keeping.iterdir())) == 1
    assert (small / "one.html").read_bytes() == (small / "two.html").read_bytes()


ASK = """
import json, sys
from scratchlm.cli import main
main(["resources", "small.toml", "--device", "h100"])
print(json.dumps("torch" in sys.modules), file=sys.stderr)
"""


def test_a_kept_answer_needs_no_torch(small: Path, tmp_path: Path) -> None:
    paths = os.pathsep.join(str(path) for path in (Path(kept.__file__).parents[2],))
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "home"), "PYTHONPATH": paths}
    said = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", ASK], capture_output=True, text=True, check=True, env=environment, cwd=small
        )
        said.append((done.stdout, json.loads(done.stderr.splitlines()[-1])))
    assert said[0][1] is True and said[1][1] is False
    assert said[0][0] == said[1][0] and load_recipe(Path("small.toml")).name in said[0][0]
