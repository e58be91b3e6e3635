"""The cache of tokenizers and shards: shared by runs at the same time, and rebuilt when it was deleted."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from small_run import last_checkpoint, records

from scratchlm.cli import main


def contents(folder: Path) -> dict[str, bytes]:
    """Every file; not the empty locks, nor the dates of shards that were found sound."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {
        name: path.read_bytes()
        for name, path in found.items()
        if not path.name.endswith("lock") and path.name != "verified.json"
    }


def test_two_runs_at_once_make_one_cache_entry(small: Path) -> None:
    command = [sys.executable, "-m", "scratchlm", "data", "prepare", "small.toml"]
    two = [
        subprocess.Popen([*command, "--out", out], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for out in ("one", "two")
    ]
    said = [process.communicate(timeout=120) for process in two]
    assert [process.returncode for process in two] == [0, 0], said
    assert main(["data", "prepare", "small.toml", "--out", "alone", "--data.cache", "other"]) == 0
    for kind in ("tokenizer", "data"):
        entry, alone = contents(small / "runs/cache" / kind), contents(small / "other" / kind)
        assert entry == alone, "the same entry, and nothing half-made beside it"
        assert len({name.split("/")[0] for name in entry}) == 1
    for name in ("tokenizer.json", "steps.json"):
        assert (small / "one" / name).read_bytes() == (small / "two" / name).read_bytes()


def test_a_deleted_cache_is_rebuilt_and_training_goes_on_as_if_nothing_had_happened(small: Path) -> None:
    cut = ["train", "small.toml", "--out", "cut", "--data.cache", "cache"]
    straight = ["train", "small.toml", "--out", "straight", "--data.cache", "cache"]
    assert main(straight) == 0
    built = contents(small / "cache")
    assert main(cut) == 0
    for path in (small / "cut/checkpoints").glob("step-*"):
        if path.name != "step-00000020":  # as a run that was stopped some steps before its end
            shutil.rmtree(path)
    shutil.rmtree(small / "cache")
    assert main(cut) == 0
    assert contents(small / "cache") == built
    ends = [contents(last_checkpoint(small / run)) for run in ("straight", "cut")]
    assert ends[0].keys() == ends[1].keys()
    same = [name for name in ends[0] if ends[0][name] == ends[1][name]]
    assert any(name.endswith(".safetensors") for name in same), (list(ends[0]), same)
    assert records(small / "cut")[-1] == records(small / "straight")[-1]
