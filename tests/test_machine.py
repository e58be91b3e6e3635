"""What a machine has, beside what torch says of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from scratchlm import machine


def test_without_a_driver_torch_finds_only_a_cpu() -> None:
    if machine.surely_no_accelerator():
        assert not torch.cuda.is_available() and not torch.backends.mps.is_available()


def test_a_driver_or_another_system_leaves_it_to_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine.sys, "platform", "linux")
    monkeypatch.setattr(machine, "_DRIVERS", (str(tmp_path / "a"), str(tmp_path / "b")))
    assert machine.surely_no_accelerator()
    (tmp_path / "b").touch()
    assert not machine.surely_no_accelerator()
    monkeypatch.setattr(machine, "_DRIVERS", ())
    monkeypatch.setattr(machine.sys, "platform", "darwin")
    assert not machine.surely_no_accelerator()


def test_main_memory_is_what_the_system_says_at_most() -> None:
    memory = machine.main_memory()
    if hasattr(os, "sysconf"):
        assert memory is not None and 0 < memory <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_the_compiler_of_the_environment_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = tmp_path / "my-c++"
    own.write_text("#!/bin/sh\n", encoding="utf-8")
    own.chmod(0o755)
    monkeypatch.setenv("CXX", str(own))
    assert machine.find_compiler() == str(own)
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.find_compiler() is None
