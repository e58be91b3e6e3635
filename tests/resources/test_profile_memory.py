"""What a profile says of memory, against tensors of known sizes; its data; its files."""

from __future__ import annotations

import gzip
import itertools
import json
import pickle
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from profile_recipes import MODEL, recipe

from scratchlm.allocator import keep_freed_memory
from scratchlm.data.loader import EpochLoader, RandomLoader
from scratchlm.errors import UserError
from scratchlm.model import ModelConfig, Transformer
from scratchlm.model.feedforward import FeedForward
from scratchlm.resources import profile as profile_module
from scratchlm.resources import profile_memory as memory
from scratchlm.resources.profile import default_folder, profile
from scratchlm.resources.profile_data import material, open_loader
from scratchlm.resources.profile_table import MODULE
from scratchlm.resources.profile_timing import PHASES, PhaseClock


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """One profile that several tests look at."""
    out = tmp_path_factory.mktemp("profiles") / "one"
    return profile(recipe(), out, steps=4, warmup=1, say=lambda line: None), out


# --- memory ----------------------------------------------------------------------------------------------------------

SIZE = 200 << 20


def test_memory_sees_a_large_tensor_in_its_phase(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A feed-forward fills 200 MB and lets go of them: both curves see them in the forward phase, and not after it.

    Also where the C library keeps what is freed, as the command asks it to.
    """
    keep_freed_memory()
    forward = FeedForward.forward

    def large(self: Any, *arguments: Any) -> Any:
        torch.ones(SIZE // 4, dtype=torch.float32)
        return forward(self, *arguments)

    monkeypatch.setattr(FeedForward, "forward", large)
    found = profile(recipe(model={"layers": 1}), "out", steps=1, warmup=1, say=lambda line: None)
    peaks = found.memory.by_phase()
    for curve in ("live", "resident"):
        above = {phase: peak[curve] - peaks["loader"][curve] for phase, peak in peaks.items()}
        assert above["forward"] == pytest.approx(SIZE, rel=0.1), (curve, above)
        assert max(above["optimizer"], above["other"]) < SIZE // 10, (curve, above)
    spans = found.memory.spans
    assert [span.phase for span in spans] == [*PHASES] * 2
    assert all(span.start <= span.end for span in spans)
    assert all(one.end <= other.start for one, other in itertools.pairwise(spans))


def test_what_stays_is_counted_to_the_byte(measured: tuple[Any, Path]) -> None:
    found, _ = measured
    model = Transformer(ModelConfig(**MODEL), seed=0)
    parameters = 4 * model.num_params()
    standing = found.memory.standing
    assert standing["parameters"] == standing["gradients"] == parameters
    assert standing["optimizer"] == 2 * parameters  # two moments of AdamW
    # After a step nothing lives but what stays, within it much more.
    assert found.memory.live[0][1] == found.memory.live[-1][1] == sum(standing.values())
    assert found.memory.peak > sum(standing.values()) + 4 * 4 * 8 * 64  # at least the logits


def test_peaks_of_phases_and_thin_curves() -> None:
    curve = [(0.0, 5), (1.0, 9), (2.0, 3), (3.0, 4)]
    timeline = memory.MemoryTimeline("cpu", {}, live=curve)
    timeline.spans = [
        memory.Span("a", 0.5, 1.5),
        memory.Span("b", 1.5, 2.5),
        memory.Span("a", 2.5, 3.5, live_peak=11),
    ]
    timeline.fill_spans()
    assert [span.live_peak for span in timeline.spans] == [9, 9, 11]  # b begins with what a left
    assert timeline.by_phase() == {"a": {"live": 11, "resident": None}, "b": {"live": 9, "resident": None}}
    assert (timeline.peak, timeline.resident_peak) == (9, None)
    assert memory.thin(curve, most=2) == [(1.0, 9), (3.0, 4)]
    long = [(float(n), n % 997) for n in range(10_001)]
    assert len(memory.thin(long)) <= 2000 and max(s for _, s in memory.thin(long)) == 996


def test_live_memory_follows_every_change_in_the_order_of_time() -> None:
    assert memory.live_curve([(2.0, -30), (1.0, 50), (3.0, 7)], 100) == [
        (0.0, 100),
        (1.0, 150),
        (2.0, 120),
        (3.0, 127),
    ]


def test_the_snapshot_of_a_cuda_allocator() -> None:
    """In the form torch.cuda.memory._snapshot() gives: releases count when they are complete, segments do not."""
    trace = [
        {"action": "segment_alloc", "size": 1000, "time_us": 1_000_000},
        {"action": "alloc", "size": 300, "time_us": 2_000_000},
        {"action": "free_requested", "size": 300, "time_us": 2_500_000},
        {"action": "free_completed", "size": 300, "time_us": 3_000_000},
    ]
    found = memory.snapshot_changes({"device_traces": [[], trace]}, 1)
    assert found == [(2.0, 300), (3.0, -300)]


def test_memory_on_cuda_by_a_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Phases take the allocator's peaks, which are begun anew at each; recording is switched off again."""
    state = {"peak": 0, "recording": []}
    cuda = SimpleNamespace(
        memory=SimpleNamespace(
            _record_memory_history=lambda enabled="all", **_: state["recording"].append(enabled),
            _snapshot=lambda device: {"device_traces": [[{"action": "alloc", "size": 7, "time_us": int(time.time() * 1e6)}]]},
        ),
        max_memory_allocated=lambda device: state["peak"],
        reset_peak_memory_stats=lambda device: state.update(peak=10),
        memory_allocated=lambda device: 10,
        current_device=lambda: 0,
    )  # fmt: skip
    monkeypatch.setattr(memory.torch, "cuda", cuda)
    clock = PhaseClock()

    def step() -> None:
        clock.enter("forward")
        state["peak"] = 60
        clock.enter("optimizer")
        clock.leave()

    path = tmp_path / "snapshot.pickle"
    found = memory.on_cuda(step, clock.observers, {"parameters": 10}, 2, path, torch.device("cuda"))
    assert found.by_phase() == {
        "forward": {"live": 60, "resident": None},
        "optimizer": {"live": 10, "resident": None},
    }
    assert [size for _, size in found.live] == [10, 17]
    assert state["recording"] == ["all", None] and clock.observers == []
    assert pickle.loads(path.read_bytes())["device_traces"]
    assert memory.picture(found, "on a GPU").startswith(b"\x89PNG")


def test_where_resident_memory_is_not_known_its_curve_is_empty() -> None:
    with memory.ResidentSampler(interval=0.001, read=lambda: None) as sampler:
        sampler.mark("forward")
        time.sleep(0.01)
    assert sampler.curve == [] and [span.phase for span in sampler.spans] == ["forward"]
    assert sampler.spans[0].end - sampler.spans[0].start >= 0.01


# --- data and files --------------------------------------------------------------------------------------------------


def test_random_ids_where_the_run_has_no_data(folder: Path) -> None:
    found = material(recipe(model={"vocab_size": 0}, tokenizer={"vocab_size": 300}))
    assert found.vocab_size == 300 and not found.own and "random ids of a vocabulary of 300" in found.source
    ids = found.tokens.read(0, 50_000)
    assert ids.min() == 0 and ids.max() == 299 and len(np.unique(ids)) == 300
    whole = recipe(train={"document_boundaries": True})
    batch = open_loader(whole, material(whole)).next_batch()
    assert batch.inputs.shape == (4, 8) and batch.documents is not None
    assert isinstance(open_loader(whole, material(whole)), EpochLoader)
    drawn = recipe(train={"loader": "random"})
    assert isinstance(open_loader(drawn, material(drawn)), RandomLoader)
    assert list(folder.iterdir()) == []


def test_all_is_in_the_file_and_the_picture_is_one(measured: tuple[Any, Path]) -> None:
    found, out = measured
    assert (
        sorted(path.name for path in out.iterdir())
        == ["memory.png", "profile.json", "trace.json.gz"]
        == found.files
    )
    saved = json.loads((out / "profile.json").read_text())
    assert saved.pop("recipe")["model"]["d_model"] == 16
    assert saved == json.loads(json.dumps(found.plain()))
    assert saved["environment"]["torch"] and saved["compile_seconds"] is None and saved["skipped_steps"] == 0
    assert (out / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_replaced_unasked_and_only_profiles_ever(folder: Path, measured: tuple[Any, Path]) -> None:
    options: dict[str, Any] = {"steps": 1, "warmup": 1, "say": lambda line: None}
    mine = folder / "thesis"
    mine.mkdir()
    (mine / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"thesis exists; choose another --out, or --overwrite True"):
        profile(recipe(), mine, **options)
    with pytest.raises(UserError, match=r"something else than a profile"):
        profile(recipe(), mine, overwrite=True, **options)
    assert (mine / "thesis.tex").read_text() == "mine"
    old = folder / "old"
    old.mkdir()
    (old / "profile.json").write_text("{}")
    (old / "leftover").write_text("")
    with pytest.raises(UserError, match="old exists"):
        profile(recipe(), old, **options)
    profile(recipe(), old, overwrite=True, **options)
    assert not (old / "leftover").exists() and json.loads((old / "profile.json").read_text())["name"] == "tiny"
    assert default_folder(recipe()) == Path("runs/tiny.profile-1")
    Path("runs/tiny.profile-1").mkdir(parents=True)
    assert default_folder(recipe()) == Path("runs/tiny.profile-2")


def test_what_fails_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("no picture")

    monkeypatch.setattr(profile_module.memory, "picture", fail)
    with pytest.raises(ValueError, match="no picture"):
        profile(recipe(), "out", steps=1, warmup=1, say=lambda line: None)
    assert list(folder.iterdir()) == []
    with pytest.raises(UserError, match="steps = 0 and warmup = 1"):
        profile(recipe(), "out", steps=0, warmup=1)


def test_compiled_runs_say_so_and_keep_both_traces(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a compiler that compiles nothing: what runs is traced without modules, the table is the eager model's."""
    calls: list[Any] = []

    def compile(function: Any, **_: Any) -> Any:
        def compiled(*arguments: Any) -> Any:
            calls.append(1)
            return function(*arguments)

        return compiled

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr("scratchlm.train.precision.find_compiler", lambda: "cc")
    found = profile(
        recipe(train={"compile": "on", "loss_kernel": "reference"}), "out", steps=2, warmup=2, say=lambda line: None
    )
    assert found.settings["compile"] == "on" and found.compile_seconds is not None and found.modules_eager
    assert len(calls) == 2 + 2 + 3 + 3  # warm-up, timed, traced, memory: none of the eager ones
    assert found.files == ["memory.png", "profile.json", "trace-eager.json.gz", "trace.json.gz"]
    named = [MODULE in gzip.decompress(Path("out", name).read_bytes()).decode() for name in found.files[2:]]
    assert named == [True, False]
    assert {"blocks.0", "blocks.1"} <= {row.path for row in found.modules}
