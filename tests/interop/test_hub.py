"""Fetching from the Hub: what is asked for, and what is said when it cannot be had. Nothing here touches the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scratchlm.cli import main
from scratchlm.errors import UserError
from scratchlm.interop.hub import fetch

huggingface_hub = pytest.importorskip("huggingface_hub", reason="downloads are its work")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """A Hub whose one model holds `files`; what was asked of it is noted."""
    seen: dict[str, Any] = {"files": ["config.json", "model.safetensors"]}

    def listed(self: Any, repo_id: str, revision: str | None = None) -> list[str]:
        seen["listed"] = (repo_id, revision)
        return list(seen["files"])

    def download(repo_id: str, **options: Any) -> str:
        seen["download"] = (repo_id, options)
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", listed)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return seen


def test_it_asks_for_safetensors_and_small_files_only(hub: dict[str, Any], tmp_path: Path) -> None:
    assert fetch("org/name", "v2") == tmp_path / "cache"
    repo, options = hub["download"]
    assert repo == "org/name" and options["revision"] == "v2" and hub["listed"] == ("org/name", "v2")
    assert "*.safetensors" in options["allow_patterns"] and "config.json" in options["allow_patterns"]
    assert not any("bin" in pattern for pattern in options["allow_patterns"])


@pytest.mark.parametrize("allowed", [True, False])
def test_pickles_are_fetched_only_where_they_are_allowed_and_alone(hub: dict[str, Any], allowed: bool) -> None:
    hub["files"] = ["config.json", "pytorch_model.bin"]
    fetch("org/name", allow_pickle=allowed)
    assert any("bin" in pattern for pattern in hub["download"][1]["allow_patterns"]) == allowed
    hub["files"].append("model.safetensors")
    fetch("org/name", allow_pickle=True)
    assert not any("bin" in pattern for pattern in hub["download"][1]["allow_patterns"])


def test_without_a_network_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Any, *_: Any, **__: Any) -> list[str]:
        raise ConnectionError("no route to the Hub\nand more")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", refused)
    with pytest.raises(
        UserError, match=r"cannot fetch org/name from the Hub \(no route to the Hub\); check the id"
    ):
        fetch("org/name")


def test_nothing_is_fetched_unasked(
    hub: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["import", "org/name", "out"]) == 2
    assert "--download True" in capfd.readouterr().err and "listed" not in hub
    assert main(["import", "no such/id!", "out", "--download", "True"]) == 2
    assert "is no id of the Hub" in capfd.readouterr().err and "listed" not in hub
    assert main(["import", "org/name", "out", "--download", "True", "--revision", "main"]) == 2  # an empty cache
    assert hub["download"][0] == "org/name" and "has no config.json" in capfd.readouterr().err
