"""Files: the old content or the new one, never half of it."""

from __future__ import annotations

import concurrent.futures
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scratchlm import files
from scratchlm.errors import UserError
from scratchlm.files import (
    atomic_directory,
    atomic_path,
    file_hash,
    lock,
    read_json,
    stable_hash,
    write_bytes,
    write_json,
    write_text,
)


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refuse(code: int) -> object:
    def raising(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    return raising


def test_writing_and_reading(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "below" / "file"
    write_bytes(target, b"\x00\xff")
    assert target.read_bytes() == b"\x00\xff"
    write_text(target, "zwei\r\nZeilen: ü 🙂")
    assert target.read_bytes() == "zwei\r\nZeilen: ü 🙂".encode()
    write_text(str(target), "")
    assert target.read_bytes() == b""
    assert content_of(tmp_path).keys() == {"deep/below/file"}, "nothing else is left"
    value = {"ü": [1, 2.5, None, {"nested": "🙂"}]}
    write_json(target, value)
    assert read_json(target) == value and "ü" in target.read_text(encoding="utf-8")


def test_a_writer_that_fails_changes_nothing(tmp_path: Path) -> None:
    target = tmp_path / "file"
    write_text(target, "old")
    with pytest.raises(ZeroDivisionError), atomic_path(target) as temporary:
        temporary.write_text("half of the n")
        raise ZeroDivisionError
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "new") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert content_of(tmp_path) == {"file": b"old"}
    with pytest.raises(FileNotFoundError), atomic_path(target):
        pass  # nothing was written at all
    assert content_of(tmp_path) == {"file": b"old"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, code: int
) -> None:
    target = tmp_path / "file"
    write_text(target, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse(code)) if function == "fsync" else patch.setattr(
            Path, "replace", refuse(code)
        )
        with pytest.raises(UserError, match=r"no space left while writing .*file: nothing was changed there; free"):
            write_text(target, "new")
        with pytest.raises(UserError, match="no space left"):
            write_text(tmp_path / "other", "new")
    assert content_of(tmp_path) == {"file": b"old"}


@pytest.mark.skipif(sys.platform == "win32", reason="limits are POSIX")
def test_a_refusal_of_the_operating_system_itself(tmp_path: Path) -> None:
    """A limit on the size of files makes the kernel cut a write short, as a full disk does."""
    code = f"""
import resource
from pathlib import Path
from scratchlm.errors import UserError
from scratchlm.files import write_bytes
target = Path({str(tmp_path)!r}) / "file"
write_bytes(target, b"old")
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    write_bytes(target, b"n" * 1_000_000)
except UserError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.startswith("no space left while writing")
    assert content_of(tmp_path) == {"file": b"old"}


def test_a_killed_process_leaves_the_old_file(tmp_path: Path) -> None:
    code = f"""
import os
from scratchlm.files import atomic_path, write_text
write_text({str(tmp_path / "file")!r}, "old")
with atomic_path({str(tmp_path / "file")!r}) as temporary:
    temporary.write_text("half of the n")
    os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert (tmp_path / "file").read_text() == "old"
    (leftover,) = set(content_of(tmp_path)) - {"file"}
    assert leftover.startswith(".file.") and leftover.endswith(".tmp")


def test_content_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(handle: int) -> None:
        calls.append("sync folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "sync file")  # noqa: PTH112
        real_fsync(handle)

    def replace(self: Path, target: Path) -> Path:
        assert self.read_text() == "new" and Path(target).read_text() == "old"
        assert self.parent == Path(target).parent, "a rename within one file system"
        calls.append("rename")
        return real_replace(self, target)

    write_text(tmp_path / "file", "old")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    write_text(tmp_path / "file", "new")
    if Path("/proc/self/fd").exists():
        assert calls == ["sync file", "rename", "sync folder"]
    else:
        assert calls[:2] == ["sync file", "rename"] or "rename" in calls


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_a_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(Path, "write_bytes", refuse(code))
    with pytest.raises(UserError, match=r"cannot write .*choose another place"):
        write_text(tmp_path / "file", "new")
    assert content_of(tmp_path) == {}


def test_a_file_in_the_way_and_a_folder_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises((UserError, FileExistsError)):
        write_text(tmp_path / "file" / "below", "new")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*folder"):
        write_text(tmp_path / "folder", "new")
    assert content_of(tmp_path) == {"file": b"in the way"}


def test_other_errors_of_the_operating_system_are_not_disguised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        write_text(tmp_path / "file", "new")
    assert content_of(tmp_path) == {}


def test_many_threads_and_one_file(tmp_path: Path) -> None:
    contents = [str(i) * 10_000 for i in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            list(pool.map(lambda content: write_text(tmp_path / "file", content), contents))
            assert (tmp_path / "file").read_text() in contents
    assert content_of(tmp_path).keys() == {"file"}


def fill(folder: Path, word: str) -> None:
    (folder / "inner").mkdir()
    (folder / "a").write_text(word)
    (folder / "inner" / "b").write_text(word)


def test_a_folder_appears_complete_and_replaces_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "above" / "folder"
    with atomic_directory(target) as temporary:
        fill(temporary, "old")
        assert not target.exists()
    with atomic_directory(target) as temporary:
        fill(temporary, "new")
        (temporary / "inner" / "b").unlink()
        assert (target / "inner" / "b").read_text() == "old"
    assert content_of(tmp_path) == {"above/folder/a": b"new"}
    assert [path.name for path in target.parent.iterdir()] == ["folder"]


def test_a_folder_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), atomic_directory(tmp_path / "folder") as temporary:
            fill(temporary, "new")
            raise ZeroDivisionError
        assert list(tmp_path.iterdir()) == []
    with atomic_directory(tmp_path / "folder") as temporary:
        fill(temporary, "old")
    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path / "folder") as temporary:
        fill(temporary, "new")
        raise KeyboardInterrupt
    assert content_of(tmp_path) == {"folder/a": b"old", "folder/inner/b": b"old"}


@pytest.mark.parametrize("fails_at", ["fsync", "first rename", "second rename"])
def test_a_full_disk_keeps_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: str) -> None:
    target = tmp_path / "folder"
    with atomic_directory(target) as temporary:
        fill(temporary, "old")
    real, calls = Path.rename, []

    def rename(self: Path, to: Path) -> Path:
        calls.append(self)
        if len(calls) == (1 if fails_at == "first rename" else 2):
            raise OSError(errno.ENOSPC, "full")
        return real(self, to)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse(errno.ENOSPC)) if fails_at == "fsync" else patch.setattr(
            Path, "rename", rename
        )
        with pytest.raises(UserError, match="no space left"), atomic_directory(target) as temporary:
            fill(temporary, "new")
    assert content_of(tmp_path) == {"folder/a": b"old", "folder/inner/b": b"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_every_file_of_a_folder_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(files, "_sync_file", lambda path: synced.append(path.name))
    monkeypatch.setattr(files, "_sync_directory", lambda path: synced.append(f"{path.name}/"))
    with atomic_directory(tmp_path / "folder") as temporary:
        fill(temporary, "new")
    assert set(synced) == {"a", "b", "inner/", f"{temporary.name}/", f"{tmp_path.name}/"}
    assert synced[-1] == f"{tmp_path.name}/"


RACER = """
import sys
from pathlib import Path
from scratchlm.files import atomic_directory
sys.stdin.readline()
for turn in range(40):
    with atomic_directory(sys.argv[1]) as folder:
        for name in ("a", "b"):
            (folder / name).write_text(sys.argv[2] + str(turn))
"""


@pytest.mark.parametrize("there", [False, True])
def test_processes_that_make_the_same_folder(tmp_path: Path, there: bool) -> None:
    target = tmp_path / "target"
    if there:
        with atomic_directory(target) as folder:
            (folder / "a").write_text("first")
    command = [sys.executable, "-c", RACER, str(target)]
    racers = [
        subprocess.Popen([*command, name], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for name in ("x", "y", "z")
    ]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("\n")
        racer.stdin.flush()
    for racer in racers:
        error = racer.communicate(timeout=60)[1]
        assert racer.returncode == 0, error
    content = content_of(tmp_path)
    assert content.keys() == {"target/a", "target/b"} and content["target/a"] == content["target/b"], "whole, alone"


def test_a_folder_that_appears_at_the_last_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, rename = tmp_path / "target", Path.rename
    moments = iter([True, True])

    def late(self: Path, to: Path) -> Path:
        if self.suffix == ".tmp" and next(moments, False):
            target.mkdir()
            (target / "theirs").write_text("")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", late)
    with atomic_directory(target) as folder:
        (folder / "ours").write_text("")
    assert content_of(tmp_path).keys() == {"target/ours"}

    def always(self: Path, to: Path) -> Path:
        if self.suffix == ".tmp":
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", always)
    with pytest.raises(UserError, match=r"cannot write .*target: Directory not empty"), atomic_directory(target):
        pass
    assert content_of(tmp_path).keys() == {"target/ours"}, "after all attempts it is as it was"


HOLDER = """
import sys, time
from scratchlm.files import lock
with lock(sys.argv[1], wait=False):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock until it is sent a line."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "runs" / ".lock")], stdin=pipe, stdout=pipe, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    assert process.stdin is not None
    process.stdin.close()
    process.stdout.close()


def test_a_lock_held_elsewhere_is_refused_until_its_holder_ends(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    path = tmp_path / "runs" / ".lock"
    with pytest.raises(UserError, match=r"^another process is working in .*runs; wait"), lock(path, wait=False):
        raise AssertionError
    with pytest.raises(UserError, match=r"^busy with it$"), lock(path, wait=False, busy="busy with it"):
        raise AssertionError
    holder.kill()  # a killed holder leaves nothing behind
    holder.wait()
    with lock(path, wait=False), pytest.raises(UserError), lock(path, wait=False):  # nor may a thread enter twice
        raise AssertionError
    with lock(path, wait=False):
        pass


def test_waiting_for_a_lock(
    tmp_path: Path, holder: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "runs" / ".lock"
    assert holder.stdin is not None
    timer = threading.Timer(0.2, lambda: (holder.stdin.write("\n"), holder.stdin.flush()))  # type: ignore[union-attr]
    timer.start()
    with lock(path, busy="waiting for the other"):
        assert holder.wait(timeout=10) == 0
    assert capsys.readouterr().err == "waiting for the other\n"


def test_a_lock_whose_folder_was_deleted_while_waiting(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    path = tmp_path / "runs" / ".lock"
    assert holder.stdin is not None

    def delete_and_end() -> None:
        shutil.rmtree(path.parent)
        holder.stdin.write("\n")  # type: ignore[union-attr]
        holder.stdin.flush()  # type: ignore[union-attr]

    timer = threading.Timer(0.2, delete_and_end)
    timer.start()
    with (
        lock(path),
        pytest.raises(UserError),
        lock(path, wait=False),
    ):  # the new file is locked, not the deleted one
        raise AssertionError


def test_where_there_are_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / ".lock"
    for code in (errno.ENOLCK, errno.ENOTSUP):
        monkeypatch.setattr("fcntl.flock", refuse(code))
        with lock(path, wait=False), lock(path):
            pass
    monkeypatch.setattr("fcntl.flock", refuse(errno.EIO))  # no lock, but not because another process has it
    with pytest.raises(OSError, match="Input/output"), lock(path, wait=False):
        raise AssertionError
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with lock(path, wait=False):
        pass


def test_a_lock_file_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "file", "")
    with pytest.raises(UserError, match=r"cannot write .*choose another place"), lock(tmp_path / "file" / ".lock"):
        raise AssertionError
    monkeypatch.setattr("os.open", refuse(errno.ENOSPC))
    with pytest.raises(UserError, match="no space left"), lock(tmp_path / ".lock"):
        raise AssertionError
    monkeypatch.undo()
    with pytest.raises(OSError, match="theirs"), lock(tmp_path / ".lock"):  # the block's errors are its own
        raise OSError(errno.EACCES, "theirs")


def test_json_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics .*absent.json does not exist"):
        read_json(tmp_path / "absent.json", "metrics")
    with pytest.raises(UserError, match="is a folder"):
        read_json(tmp_path)
    for content in (b'{"a": ', b"", b'{"a": "\xff"}', b"[" * 100_000, b"9" * 5000):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(UserError, match="not valid JSON"):
            read_json(tmp_path / "bad.json")


VALUE = {"b": [1, 2.5, None, True, "ü"], "a": {"path": "x", "deep": {"z": 1, "y": 2}}}


def test_the_same_hash_in_every_process() -> None:
    code = (
        "import json, sys; from scratchlm.files import stable_hash; from pathlib import Path\n"
        "value = json.loads(sys.argv[1]); print(stable_hash(value), stable_hash({**value, 'p': Path('a/b')}))"
    )
    seen = set()
    for seed in ("0", "1", "12345"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", code, json.dumps(VALUE)]
        seen.add(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)
    assert seen == {f"{stable_hash(VALUE)} {stable_hash({**VALUE, 'p': Path('a/b')})}\n"}
    # Folders of earlier runs are found by this name: it must not change with a new version either.
    assert (
        stable_hash(VALUE)
        == hashlib.blake2b(
            b'{"a":{"deep":{"y":2,"z":1},"path":"x"},"b":[1,2.5,null,true,"\\u00fc"]}', digest_size=8
        ).hexdigest()
    )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), json_values, max_size=4), json_values)
def test_hashes_do_not_depend_on_order_but_on_content(value: dict[str, object], other: object) -> None:
    assert stable_hash(dict(reversed(value.items()))) == stable_hash(value)
    same = json.dumps(value, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (stable_hash(value) == stable_hash(other)) == same
    assert len(stable_hash(value, length=24)) == 24 and len(stable_hash(value)) == 16


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 5 << 19])
def test_file_hash(tmp_path: Path, size: int) -> None:
    content = bytes(i * 7 % 251 for i in range(1000)) * (size // 1000 + 1)
    path = tmp_path / "file"
    path.write_bytes(content[:size])
    assert file_hash(path) == hashlib.blake2b(content[:size], digest_size=16).hexdigest()
    assert len(file_hash(path, length=10)) == 10
