"""What `make` would do, as `make --dry-run` shows it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_an_install_without_constraints() -> None:
    def shown(*variables: str) -> list[str]:
        done = subprocess.run(
            ["make", "--dry-run", "--always-make", "install", *variables], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return [line.split(" install ")[1] for line in done.stdout.splitlines() if "--editable" in line]

    assert shown("CONSTRAINTS=") == ['--quiet  --editable ".[dev]"']
    assert shown("CONSTRAINTS=README.md") == ['--quiet --constraint README.md --editable ".[dev]"']
    assert shown() == ['--quiet --constraint constraints.txt --editable ".[dev]"']
