"""Trackers, read back with the trackers' own readers."""

from __future__ import annotations

import contextlib
import json
import math
import struct
import sys
import time
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scratchlm.errors import UserError
from scratchlm.train import trackers
from scratchlm.train.trackers import Trackers

RECORDS = [
    {"kind": "train", "step": 10, "loss": 4.5, "lr": 0.001, "tokens": 640},
    {"kind": "validation", "step": 10, "loss": 4.25, "bits_per_byte": 2.125},
    {"kind": "event", "step": 10, "message": "saved checkpoint"},
    {"kind": "train", "step": 20, "loss": 3.5, "lr": 0.0005, "tokens": 1280},
]


def wandb_records(run_file: Path) -> Iterator:
    """Every protobuf record of a .wandb file.

    The file is a LevelDB log behind 7 bytes of its own: blocks of 32 KiB, in them pieces (checksum u32, length u16, type
    u8: 1 whole, 2 first, 3 middle, 4 last), and zeros where a block has no room for a piece's header.
    """
    from wandb.proto import wandb_internal_pb2

    content = run_file.read_bytes()
    assert content[:4] == b":W&B"
    position, data = 7, b""
    while position + 7 <= len(content):
        if (room := 32768 - position % 32768) < 7:
            position += room
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        data += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            yield record
            data = b""


def wait_for_the_end(run_file: Path) -> Path:
    """wandb's own process may still be writing when ``finish`` returns; its last record is ``exit``."""
    from google.protobuf.message import DecodeError

    end = time.monotonic() + 20
    while time.monotonic() < end:
        with contextlib.suppress(AssertionError, DecodeError, struct.error):  # as long as a record is half there
            if "exit" in [record.WhichOneof("record_type") for record in wandb_records(run_file)]:
                break
        time.sleep(0.05)
    return run_file


def wandb_history(run_file: Path) -> dict[int, dict]:
    """Step → logged values."""
    history: dict[int, dict] = {}
    for record in wandb_records(run_file):
        if record.WhichOneof("record_type") == "history":
            values = {
                "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
            }
            history.setdefault(values["_step"], {}).update(values)
    return history


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    return tmp_path / "run"


def test_wandb_offline_holds_what_was_logged_and_resumes_the_same_run(offline: Path) -> None:
    with Trackers(
        ["wandb"], folder=offline, project="proj", name="first", config={"train": {"steps": 20}}
    ) as tracking:
        for record in RECORDS:
            tracking.log(record)
    (run_file,) = offline.glob("wandb/offline-run-*/run-*.wandb")
    history = wandb_history(wait_for_the_end(run_file))
    assert history[10]["train/loss"] == 4.5 and history[10]["validation/bits_per_byte"] == 2.125
    assert history[10]["event/message"] == "saved checkpoint"
    assert history[20]["train/loss"] == 3.5 and history[20]["train/tokens"] == 1280
    (run,) = [record.run for record in wandb_records(run_file) if record.WhichOneof("record_type") == "run"]
    assert (run.project, run.display_name) == ("proj", "first")
    assert {item.key: json.loads(item.value_json) for item in run.config.update}["train"] == {"steps": 20}

    time.sleep(1.1)  # wandb tells the parts of a run apart by the second they began in
    with (
        pytest.raises(RuntimeError, match="boom"),
        Trackers(["wandb"], folder=offline, name="first", resumed_at=20) as tracking,
    ):
        tracking.log({"kind": "train", "step": 30, "loss": math.nan})
        raise RuntimeError("boom")
    (second,) = set(offline.glob("wandb/offline-run-*/run-*.wandb")) - {run_file}
    assert second.name == run_file.name == f"run-{(offline / 'wandb-id.txt').read_text().strip()}.wandb"
    assert math.isnan(float(wandb_history(wait_for_the_end(second))[30]["train/loss"]))
    (code,) = [
        record.exit.exit_code for record in wandb_records(second) if record.WhichOneof("record_type") == "exit"
    ]
    assert code == 1  # the failure is recorded as one


def test_a_new_wandb_run_gets_a_new_id(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    seen = []

    def init(**settings: object) -> types.SimpleNamespace:
        seen.append(settings)
        return types.SimpleNamespace(finish=lambda exit_code: None)

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.delenv("WANDB_MODE")
    for resumed_at in (None, 5, None):
        Trackers(["wandb"], folder=offline, resumed_at=resumed_at).close()
    assert seen[0]["id"] == seen[1]["id"] != seen[2]["id"]
    assert {settings["resume"] for settings in seen} == {"allow"} and seen[0]["dir"] == str(offline)


def test_wandb_that_does_not_start_is_one_line(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def init(**settings: object) -> None:
        raise wandb.errors.UsageError("no API key")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(UserError, match=r"no API key; log in, or set WANDB_MODE=offline"):
        Trackers(["wandb"], folder=offline)


def read_tensorboard(folder: Path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tensorboard"), size_guidance={accumulator.SCALARS: 0})
    return events.Reload()


def test_tensorboard_holds_what_was_logged(tmp_path: Path) -> None:
    with Trackers(["tensorboard"], folder=tmp_path, name="first", config={"seed": 7}) as tracking:
        for record in RECORDS:
            tracking.log(record)
    events = read_tensorboard(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(10, 4.5), (20, 3.5)]
    assert [(e.step, e.value) for e in events.Scalars("validation/bits_per_byte")] == [(10, 2.125)]
    (message,) = events.Tensors("event/message/text_summary")
    assert message.tensor_proto.string_val == [b"saved checkpoint"]
    (recipe,) = events.Tensors("recipe/text_summary")
    assert b"seed: 7" in recipe.tensor_proto.string_val[0]


def test_tensorboard_resume_voids_the_repeated_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Trackers(["tensorboard"], folder=tmp_path) as tracking:
        for step in range(1, 8):
            tracking.log({"kind": "train", "step": step, "loss": 1.0})
    # Event files are told apart, and ordered, by the second they were made in.
    monkeypatch.setattr(time, "time", lambda now=time.time: now() + 2)
    with Trackers(["tensorboard"], folder=tmp_path, resumed_at=4) as tracking:
        for step in range(5, 10):
            tracking.log({"kind": "train", "step": step, "loss": 2.0})
    values = [(event.step, event.value) for event in read_tensorboard(tmp_path).Scalars("train/loss")]
    assert values == [(step, 1.0) for step in range(1, 5)] + [(step, 2.0) for step in range(5, 10)]


@pytest.mark.parametrize(
    ("name", "module"),
    [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")],
    ids=["wandb", "tensorboard"],
)
@pytest.mark.parametrize("found", [None, "empty"])
def test_missing_package_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str, found: str | None
) -> None:
    # None makes the import fail; an empty module is what a folder ./wandb of earlier runs imports as.
    monkeypatch.setitem(sys.modules, module, found and types.ModuleType(module))
    with pytest.raises(UserError, match=rf"pip install 'scratchlm\[{name}\]'"):
        Trackers([name], folder=tmp_path)


def test_no_trackers_leave_no_trace_and_import_nothing(tmp_path: Path) -> None:
    with Trackers([], folder=tmp_path / "run") as tracking:
        tracking.log(RECORDS[0])
    assert not (tmp_path / "run").exists()


class Fake:
    made: list[Fake]

    def __init__(self, folder: Path, project: str, name: str, config: object, resumed_at: int | None) -> None:
        self.closed: list[bool] = []
        Fake.made.append(self)

    def log(self, kind: str, step: int, numbers: object, message: str | None) -> None:
        raise AssertionError

    def close(self, failed: bool) -> None:
        self.closed.append(failed)


class FakeThatFailsToClose(Fake):
    def close(self, failed: bool) -> None:
        super().close(failed)
        raise OSError("gone")


def test_all_are_closed_whatever_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Fake.made = []
    monkeypatch.setattr(trackers, "_TRACKERS", {"good": Fake, "bad": FakeThatFailsToClose, "other": Fake})
    with (
        pytest.warns(UserWarning, match=r"tracker bad could not be closed \(OSError: gone\)"),
        Trackers(["good", "bad", "other", "good"], folder=tmp_path) as tracking,
    ):
        pass
    tracking.close()
    assert [fake.closed for fake in Fake.made] == [[False]] * 3  # named twice, opened once

    Fake.made = []
    with pytest.raises(UserError, match="unknown tracker 'mlflow'; known: good, bad, other"):
        Trackers(["good", "mlflow"], folder=tmp_path)
    assert [fake.closed for fake in Fake.made] == [[True]]

    Fake.made = []
    with pytest.raises(KeyboardInterrupt), Trackers(["good"], folder=tmp_path):
        raise KeyboardInterrupt
    assert [fake.closed for fake in Fake.made] == [[True]]


class FakeThatTakesOne(Fake):
    """Its second record fails, and so does closing it then."""

    def __init__(self, *settings: Any) -> None:
        super().__init__(*settings)
        self.steps: list[int] = []

    def log(self, kind: str, step: int, numbers: object, message: str | None) -> None:
        self.steps.append(step)
        if len(self.steps) > 1:
            raise ConnectionError("no\nroute to host")

    def close(self, failed: bool) -> None:
        super().close(failed)
        if len(self.steps) > 1:
            raise OSError("still no route")


class FakeThatTakesAll(FakeThatTakesOne):
    def log(self, kind: str, step: int, numbers: object, message: str | None) -> None:
        self.steps.append(step)

    close = Fake.close


def test_a_tracker_that_fails_is_said_once_and_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Fake.made = []
    monkeypatch.setattr(trackers, "_TRACKERS", {"frail": FakeThatTakesOne, "sound": FakeThatTakesAll})
    with (
        warnings.catch_warnings(record=True) as caught,
        Trackers(["frail", "sound"], folder=tmp_path) as tracking,
    ):
        warnings.simplefilter("always")
        for step in range(4):
            tracking.log({"kind": "train", "step": step, "loss": 1.0})
    frail, sound = Fake.made
    assert frail.steps == [0, 1] and sound.steps == [0, 1, 2, 3]
    assert (frail.closed, sound.closed) == ([True], [False])
    (warning,) = caught
    assert warning.category is UserWarning
    assert str(warning.message) == (
        "tracker frail failed at step 1 (ConnectionError: no route to host): training goes on without it; "
        "metrics.jsonl has every record"
    )


def test_an_interrupt_is_not_a_failed_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*record: object) -> None:
        raise KeyboardInterrupt

    Fake.made = []
    monkeypatch.setattr(trackers, "_TRACKERS", {"sound": FakeThatTakesAll})
    monkeypatch.setattr(FakeThatTakesAll, "log", interrupted)
    with pytest.raises(KeyboardInterrupt), Trackers(["sound"], folder=tmp_path) as tracking:
        tracking.log(RECORDS[0])


def test_a_wandb_run_that_breaks_does_not_end_training(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def log(values: object, step: int) -> None:
        raise wandb.errors.CommError("network is unreachable")

    run = types.SimpleNamespace(log=log, finish=lambda exit_code: None)
    monkeypatch.setattr(wandb, "init", lambda **settings: run)
    with Trackers(["wandb"], folder=offline) as tracking:
        with pytest.warns(
            UserWarning, match=r"tracker wandb failed at step 10 \(CommError: network is unreachable"
        ):
            tracking.log(RECORDS[0])
        tracking.log(RECORDS[1])  # and is silent from then on
