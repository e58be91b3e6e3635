"""Folders that are written whole: where a user may put them, and what killed processes leave."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_files import content_of, fill

from scratchlm import files
from scratchlm.errors import UserError
from scratchlm.files import atomic_directory, expanded, new_folder, write_text


def test_the_folder_the_process_is_in_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for target in (".", "../here", tmp_path / "here"):
        for write in (atomic_directory, lambda target: contextlib.nullcontext(new_folder(target))):
            with pytest.raises(UserError, match=r"^cannot write into the folder you are in"), write(target):
                pass
    with pytest.raises(UserError, match=r"^cannot write"):
        write_text(".", "text")
    assert content_of(tmp_path) == {} and Path.cwd() == tmp_path / "here"


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    with atomic_directory(tmp_path / "link") as temporary:
        fill(temporary, "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there/a").read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"there", "link"}


def test_what_killed_processes_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"""
import os
from scratchlm.files import atomic_directory
with atomic_directory({str(tmp_path / "folder")!r}) as temporary:
    (temporary / "half").write_text("")
    os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    (dead,) = tmp_path.iterdir()
    alive = dead.with_name(re.sub(r"-\d+-", f"-{os.getppid()}-", dead.name))
    elsewhere = dead.with_name(re.sub(r"^(.folder.)\w+", r"\g<1>00000000", dead.name))
    others = [dead.with_name(dead.name.replace(".folder.", name)) for name in (".folder2.", ".a.folder.")]
    for path in (alive, elsewhere, *others):
        path.mkdir()
    with atomic_directory(tmp_path / "folder") as temporary:
        fill(temporary, "new")
    assert set(tmp_path.iterdir()) == {tmp_path / "folder", alive, elsewhere, *others}
    monkeypatch.setattr(os, "name", "nt")  # where there is no asking
    assert files._is_running(int(re.findall(r"-(\d+)-", dead.name)[0]))


def test_home_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert new_folder("~/out") == tmp_path / "out"
    assert expanded("~no-such-user/out") == Path("~no-such-user/out")
    (tmp_path / "out").write_text("")
    for name in ("~/out", "~"):
        with pytest.raises(UserError, match="exists and is not an empty folder"):
            new_folder(name)
