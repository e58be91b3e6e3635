"""metrics.jsonl: torn lines, resumes, non-finite numbers."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scratchlm.errors import UserError
from scratchlm.train.metrics import MetricsFile, read_metrics


def train(step: int, **more: object) -> dict[str, object]:
    return {"kind": "train", "step": step, "loss": 3.5, "lr": 1e-3, "tokens": step * 64, **more}


def test_records_come_back_in_order_and_each_line_is_json(tmp_path: Path) -> None:
    records = [
        train(1),
        {"kind": "validation", "step": 1, "loss": 3.4},
        {"kind": "event", "step": 1, "message": "né\n"},
    ]
    with MetricsFile(tmp_path / "deep" / "metrics.jsonl") as file:
        for number, record in enumerate(records, start=1):
            file.log(record)
            assert read_metrics(file.path) == records[:number]  # readable while still open
    lines = file.path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == records


def test_appends_to_what_is_there(tmp_path: Path) -> None:
    for step in (1, 2):
        with MetricsFile(tmp_path / "m.jsonl") as file:
            file.log(train(step))
    assert [record["step"] for record in read_metrics(file.path)] == [1, 2]


def test_tensors_and_numpy_scalars_become_numbers(tmp_path: Path) -> None:
    with MetricsFile(tmp_path / "m.jsonl") as file:
        file.log({"kind": "train", "step": np.int64(7), "loss": torch.tensor(1.5), "lr": np.float32(0.25)})
    assert read_metrics(file.path) == [{"kind": "train", "step": 7, "loss": 1.5, "lr": 0.25}]


def test_non_finite_numbers_are_strict_json_and_come_back(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    with MetricsFile(tmp_path / "m.jsonl") as file:
        file.log({"kind": "train", "step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": -math.inf})
        file.log({"kind": "event", "step": 1, "message": "NaN"})
    for line in file.path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    first, second = read_metrics(file.path)
    assert math.isnan(first["loss"]) and first["grad_norm"] == math.inf and first["lr"] == -math.inf
    assert second["message"] == "NaN"  # text stays text


# A few nasty characters instead of all of Unicode, whose table hypothesis builds for seconds.
TEXT = st.text('aé\n\r"\\\0\u2028…𝄞{}NaInfity-', max_size=12)


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.fixed_dictionaries(
            {"kind": st.sampled_from(["train", "validation"]), "step": st.integers(0, 10**12)},
            optional={"loss": st.floats(), "message": TEXT, "tokens": st.integers()},
        ),
        max_size=8,
    )
)
def test_any_record_comes_back(tmp_path_factory: pytest.TempPathFactory, records: list[dict]) -> None:
    path = tmp_path_factory.mktemp("any") / "m.jsonl"
    with MetricsFile(path) as file:
        for record in records:
            file.log(record)
    assert repr(read_metrics(path)) == repr(records)  # repr: NaN is equal to itself there


@pytest.mark.parametrize(
    "torn", [b'{"kind": "train", "st', b'{"kind"', b"{", b"\0\0\0\0", b'{"kind": "event", "message": "\xc3']
)
def test_torn_last_line_is_passed_over_and_then_removed(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "m.jsonl"
    with MetricsFile(path) as file:
        file.log(train(1))
    path.write_bytes(path.read_bytes() + torn)
    assert read_metrics(path) == [train(1)]
    with MetricsFile(path) as file:
        file.log(train(2))
    assert read_metrics(path) == [train(1), train(2)]
    assert path.read_bytes().count(b"\n") == 2 and torn not in path.read_bytes().replace(
        b'{"kind": "train", "step"', b""
    )


def test_every_cut_of_a_file_reads_and_continues(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with MetricsFile(path) as file:
        file.log(train(1))
        file.log({"kind": "event", "step": 1, "message": "é…"})
    content = path.read_bytes()
    records = read_metrics(path)
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        whole = sum(
            length >= end - 1 for end in (content.index(b"\n") + 1, len(content))
        )  # the line end may be missing
        assert read_metrics(path) == records[:whole], length
        with MetricsFile(path) as file:
            file.log(train(9))
        assert read_metrics(path) == [*records[:whole], train(9)], length


def test_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"kind": "train", "step": 1}\nnonsense\n{"kind": "train", "step": 2}\n')
    with pytest.raises(UserError, match="line 2"):
        read_metrics(path)


def test_empty_missing_and_unreadable(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").touch()
    assert read_metrics(tmp_path / "m.jsonl") == []
    with pytest.raises(UserError, match="does not exist"):
        read_metrics(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="cannot read"):
        read_metrics(tmp_path)
    with pytest.raises(UserError, match="cannot"):
        MetricsFile(tmp_path / "m.jsonl" / "below" / "a file")


def test_resumed_file_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    def run(file: MetricsFile, steps: range) -> None:
        for step in steps:
            file.log(train(step))
            if step % 4 == 0:
                file.log({"kind": "validation", "step": step, "loss": 3.0})

    with MetricsFile(tmp_path / "whole.jsonl") as whole:
        run(whole, range(1, 21))
    with MetricsFile(tmp_path / "cut.jsonl") as cut:
        run(cut, range(1, 15))  # killed after step 14, in the midst of a line …
    cut.path.write_bytes(cut.path.read_bytes() + b'{"kind": "train", "step": 15, "lo')
    with MetricsFile(tmp_path / "cut.jsonl") as cut:
        cut.truncate_after(12)  # … resumed from the checkpoint of step 12
        run(cut, range(13, 21))
    assert cut.path.read_bytes() == whole.path.read_bytes()


def test_truncate_keeps_everything_up_to_the_step_and_nothing_else(tmp_path: Path) -> None:
    with MetricsFile(tmp_path / "m.jsonl") as file:
        for step in (0, 1, 2, 3):
            file.log(train(step, loss=math.nan))
            file.log({"kind": "event", "step": step, "message": "x"})
        file.truncate_after(1)
        assert [record["step"] for record in read_metrics(file.path)] == [0, 0, 1, 1]
        file.truncate_after(-1)
        assert file.path.read_bytes() == b""
        file.log(train(1))
    assert read_metrics(file.path) == [train(1)]
    assert [path.name for path in tmp_path.iterdir()] == ["m.jsonl"]  # nothing temporary is left


def test_truncate_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    with MetricsFile(tmp_path / "m.jsonl") as file:
        file.log(train(1))
        file.log(train(2))
        before = file.path.read_bytes()
        monkeypatch.setattr(Path, "replace", full)
        with pytest.raises(UserError, match="no space"):
            file.truncate_after(1)
        monkeypatch.undo()
        assert file.path.read_bytes() == before
        file.log(train(3))  # and goes on
    assert [record["step"] for record in read_metrics(file.path)] == [1, 2, 3]


def test_lines_survive_a_kill(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\n"
        "from scratchlm.train.metrics import MetricsFile\n"
        "file = MetricsFile(sys.argv[1])\n"
        "for step in range(100): file.log({'kind': 'train', 'step': step})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "m.jsonl")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [record["step"] for record in read_metrics(tmp_path / "m.jsonl")] == list(range(100))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_is_said_plainly(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.jsonl")
    file.close()
    file._file = Path("/dev/full").open("ab", buffering=0)  # noqa: SIM115
    with pytest.raises(UserError, match="no space left"):
        file.log(train(1))
    file.close()


def test_misuse_is_refused(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.jsonl")
    with pytest.raises(ValueError, match="kind and step"):
        file.log({"loss": 1.0})
    file.close()
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.log(train(1))
