"""Whole experiments: real runs in processes of their own, killed, failing, and never repeated."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from small_run import RECIPE, records, write_corpus, write_recipe

from scratchlm.cli import main
from scratchlm.experiments import Ablation, Comparison, load_experiment
from scratchlm.experiments.comparison import as_records

SPEC = """\
base = "small.toml"
seeds = 2
[variants.post]
model.norm_placement = "post"
"""
CLOCK = ("seconds", "tokens_per_second", "peak_memory")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, a recipe and a spec, and the experiment run in it."""
    folder = tmp_path_factory.mktemp("experiment")
    write_corpus(folder / "corpus.txt")
    write_recipe(folder / "small.toml")
    (folder / "exp.toml").write_text(SPEC)
    return folder


def ablate(folder: Path, out: str = "whole", text: str | None = None, **options: Any) -> Comparison:
    before = Path.cwd()
    os.chdir(folder)
    try:
        if text is not None:
            (folder / f"{out}.toml").write_text(text)
        source = Path("exp.toml" if text is None else f"{out}.toml")
        options = {"jobs": 2, "show_progress": False, "say": lambda line: None, **options}
        return Ablation(load_experiment(source), source, Path("runs") / out, **options).run()
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def whole(place: Path) -> Comparison:
    return ablate(place)


def timeless(comparison: Comparison) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in as_records(comparison)]


def stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("result.json")}


def test_two_variants_with_two_seeds(place: Path, whole: Comparison) -> None:
    base, post = whole.rows
    assert (base.verdict, base.seeds, post.seeds) == ("reference", (2, 2), (2, 2)) and not base.notes + post.notes
    folder = place / "runs/whole"
    made = {path.name for path in folder.iterdir()}
    assert {
        "table.md",
        "table.csv",
        "results.json",
        "report.html",
        "pictures",
        "spec.toml",
        "runs",
        "trials",
        "data",
    } <= made
    runs = sorted((folder / "runs").iterdir())
    assert [run.name.rsplit("-", 1)[0] for run in runs] == ["base-s0", "base-s1", "post-s0", "post-s1"]
    for run in runs:
        found = json.loads((run / "result.json").read_text())
        metrics = records(run)
        judged = [line for line in metrics if line["kind"] == "validation"]
        assert found["loss"] == judged[-1]["loss"] and found["tokens"] == judged[-1]["tokens"]
        assert (run / "recipe.toml").exists() and list((run / "checkpoints").glob("step-*"))
    losses = [json.loads((run / "result.json").read_text())["loss"] for run in runs]
    assert len(set(losses)) == 4 and base.loss == pytest.approx(sum(losses[:2]) / 2)
    written = json.loads((folder / "results.json").read_text())
    assert len(written["runs"]) == 4 and written["environment"]["torch"] and written["spec"]["seeds"] == 2


def test_a_run_of_it_is_a_run(place: Path, whole: Comparison, capfd: pytest.CaptureFixture[str]) -> None:
    """The same recipe, run as `scratchlm train` does, learns the same; and its folder can be gone on with."""
    run = next((place / "runs/whole/runs").glob("post-s1-*"))
    before = Path.cwd()
    os.chdir(place)
    try:
        alone = ["--seed", "1", "--model.norm-placement", "post", "--out", "runs/alone"]
        assert main(["train", "small.toml", *alone]) == 0
        assert records(place / "runs/alone") == records(run)
        capfd.readouterr()
        assert main(["train", str(run / "recipe.toml")]) == 0
        assert "train      up to date, skipped" in capfd.readouterr().out
        assert main(["generate", str(run), "--prompts", "def ", "--max-tokens", "3"]) == 0
    finally:
        os.chdir(before)


def test_what_is_finished_is_never_repeated(place: Path, whole: Comparison) -> None:
    before = stamps(place / "runs/whole")
    assert timeless(ablate(place)) == timeless(whole)
    assert stamps(place / "runs/whole") == before
    third = ablate(
        place, text=SPEC.replace("seeds = 2", "seeds = 2\nfields.'train.eval_interval' = 3"), out="whole"
    )
    assert timeless(third) == timeless(whole) and stamps(place / "runs/whole") == before


def test_experiments_may_share_their_runs(place: Path, whole: Comparison) -> None:
    """The same runs under another name are not made again, only what is new."""
    runs = place / "runs/whole/runs"
    before = stamps(place / "runs/whole")
    text = SPEC.replace("[variants.post]", "[variants.double]").replace('"post"', '"double"')
    other = ablate(place, "other", text, runs=Path("runs/whole/runs"))
    after = stamps(place / "runs/whole")
    new = sorted(path.parent.name.rsplit("-", 1)[0] for path in after.keys() - before.keys())
    assert new == ["double-s0", "double-s1"] and {path: after[path] for path in before} == before
    assert timeless(other)[0] == timeless(whole)[0] and not (place / "runs/other/runs").exists()
    for path in new:
        shutil.rmtree(next(runs.glob(f"{path}-*")))


def test_killed_and_begun_again_the_table_is_the_same(place: Path, whole: Comparison) -> None:
    """kill -9 of the queue when one run is finished and others are at work; their processes notice."""
    folder = place / "runs/killed"
    command = [sys.executable, "-m", "scratchlm", "ablate", "exp.toml", "--out", "runs/killed", "--jobs", "2"]
    queue = subprocess.Popen(command, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(folder.glob("runs/*/result.json")) and queue.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    queue.send_signal(signal.SIGKILL)
    queue.wait()
    done = stamps(folder)
    assert 1 <= len(done) < 4
    again = ablate(place, "killed", SPEC)
    assert timeless(again) == timeless(whole)
    after = stamps(folder)
    assert {path: after[path] for path in done} == done


@pytest.mark.slow
def test_ctrl_c_leaves_checkpoints_and_a_table(place: Path, whole: Comparison) -> None:
    long = SPEC.replace("[variants", "fields.'train.steps' = 100000\n[variants", 1)
    (place / "stopped.toml").write_text(long)
    command = [sys.executable, "-m", "scratchlm", "ablate", "stopped.toml", "--jobs", "2"]
    queue = subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    folder = place / "runs/stopped"
    deadline = time.monotonic() + 120
    while (
        len(list(folder.glob("runs/*/checkpoints/step-*"))) < 2
        and queue.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    queue.send_signal(signal.SIGINT)
    _, err = queue.communicate(timeout=90)
    assert queue.returncode == 130 and "0 of 4 runs finished; the same command goes on from there" in err
    assert "0 of 4 runs are finished" in (folder / "report.html").read_text()
    assert not list(folder.glob("runs/*/*.json.tmp")) and not list(folder.glob("runs/*/failure.json"))


def test_a_variant_that_breaks_is_a_row_and_not_the_end(place: Path, whole: Comparison) -> None:
    text = (
        SPEC
        + "[variants.broken]\noptim.optimizer = 'sgd'\noptim.lr = 1000\noptim.grad_clip = 0\ntrain.max_non_finite = 0\n"
    )
    found = ablate(place, "whole", text)  # the others are there already
    base, post, broken = found.rows
    assert (broken.verdict, broken.seeds) == ("failed", (0, 2)) and "training stopped at step" in broken.notes[0]
    assert [row.verdict for row in (base, post)] == [row.verdict for row in whole.rows]
    failures = sorted((place / "runs/whole").glob("runs/broken-*/failure.json"))
    assert len(failures) == 2
    before = [path.stat().st_mtime_ns for path in failures]
    ablate(place, "whole", text)
    assert [path.stat().st_mtime_ns for path in failures] == before, "failures are results: --retry runs them again"
    assert ablate(place, "whole", text, retry=True).rows[2].verdict == "failed"
    assert all(new > old for new, old in zip([path.stat().st_mtime_ns for path in failures], before, strict=True))


def test_a_process_that_is_killed_is_a_failure(place: Path) -> None:
    """As the system does when memory is short."""
    text = SPEC.replace("seeds = 2", "seeds = 1\nfields.'train.steps' = 100000")

    def shoot(queue: Any, plan: Any) -> None:
        for one in queue.running:
            if one.process.poll() is None:
                one.process.kill()

    from scratchlm.experiments.ablate import _compiling
    from scratchlm.experiments.plan import Planner
    from scratchlm.experiments.queue import Queue
    from scratchlm.experiments.results import Failure

    (place / "shot.toml").write_text(text)
    before = Path.cwd()
    os.chdir(place)
    try:
        experiment = load_experiment("shot.toml")
        sized = [
            one.__class__(
                one.name,
                one.changes,
                one.recipe.model_copy(update={"model": one.recipe.model.model_copy(update={"vocab_size": 300})}),
            )
            for one in experiment.variants
        ]
        planner = Planner(
            experiment.__class__("shot", experiment.spec, tuple(sized)), Path("runs/shot"), _compiling
        )
        queue = Queue(planner, Path("runs/shot"), jobs=2, watch=shoot)
        plan = queue.run()
        found = [queue.outcome(trial) for trial in plan.trials]
        assert all(
            isinstance(one, Failure) and "killed by SIGKILL; is memory short?" in one.message for one in found
        )
    finally:
        os.chdir(before)


def test_other_folders_are_left_alone(small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (small / "exp.toml").write_text(SPEC)
    (small / "full").mkdir()
    (small / "full/thesis.txt").write_text("x")
    for out, message in (("full", "holds other content (thesis.txt)"), ("corpus.txt", "is a file")):
        assert main(["ablate", "exp.toml", "--out", out]) == 2
        assert message in capfd.readouterr().err
    assert (small / "full/thesis.txt").read_text() == "x"


def test_gpus_are_dealt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from scratchlm.experiments.queue import Queue

    queue = Queue(planner=None, folder=Path(), jobs=4, gpus=2)  # type: ignore[arg-type]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [queue._gpu(slot) for slot in range(4)] == ["0", "1", "0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [queue._gpu(slot) for slot in range(4)] == ["3", "5", "3", "5"]


def test_lines_say_what_is_going_on(place: Path, whole: Comparison, capfd: pytest.CaptureFixture[str]) -> None:
    text = SPEC.replace("seeds = 2", "seeds = [0, 1, 7]")
    found = ablate(place, "whole", text, show_progress=True, jobs=1)
    err = capfd.readouterr().err
    assert found.rows[0].seeds == (3, 3)
    begun = [line for line in err.splitlines() if line.startswith("begun")]
    ended = [line for line in err.splitlines() if line.startswith("finished")]
    assert len(begun) == 2 and "base-s7" in begun[0] and "loss" in ended[0]
    assert "6 of 6 runs" in ended[1]


def test_the_recipe_is_what_the_tests_think() -> None:
    assert "steps = 24" in RECIPE and "checkpoint_interval = 5" in RECIPE
