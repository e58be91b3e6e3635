"""What a run ran on."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import scratchlm
from scratchlm.evaluate import environment
from scratchlm.evaluate.environment import cpu_name, describe_environment, git_commit
from scratchlm.processes import cores


def test_names_versions_and_machine() -> None:
    described = describe_environment()
    assert described["python"] == platform.python_version()
    assert described["torch"] == torch.__version__ and described["numpy"] == np.__version__
    assert described["scratchlm"] == scratchlm.__version__ and described["os"] == platform.platform()
    assert described["cpu"] and described["cores"] >= 1 and described["threads"] == torch.get_num_threads()
    assert len(described["devices"]) >= torch.cuda.device_count()
    assert "parameters" not in described and describe_environment(parameters=5)["parameters"] == 5
    assert json.loads(json.dumps(described, allow_nan=False)) == described


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs /proc/cpuinfo")
def test_cpu_name_is_the_makers() -> None:
    text = Path("/proc/cpuinfo").read_text()
    if "model name" not in text:
        pytest.skip("this processor's /proc/cpuinfo has no model name")
    assert cpu_name() and cpu_name() in " ".join(text.split())


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs sched_setaffinity")
def test_cores_are_those_this_process_may_use() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert cores() == 1
    finally:
        os.sched_setaffinity(0, before)


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_git_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if environment._output("git", "--version") is None:
        pytest.skip("git is not installed")
    package = tmp_path / "checkout" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("x = 1\n")
    assert git_commit(package) is None  # no checkout
    git(tmp_path / "checkout", "init", "-q")
    assert git_commit(package) is None  # inside a checkout, but no part of it: as in site-packages
    git(tmp_path / "checkout", "add", ".")
    git(tmp_path / "checkout", "commit", "-qm", "one")
    head = git(package, "rev-parse", "HEAD")
    assert git_commit(package) == head
    (tmp_path / "checkout" / "elsewhere").write_text("not the package's\n")
    assert git_commit(package) == head
    (package / "__init__.py").write_text("x = 2\n")
    assert git_commit(package) == head + "+changes"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit(package) is None  # no git


def test_active_parameters_stand_beside_all() -> None:
    described = describe_environment(parameters=5, active=3)
    assert described["parameters"] == 5 and described["active_parameters"] == 3
