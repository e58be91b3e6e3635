"""Options that are read without tyro come out as tyro reads them, and whatever is unusual is left to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field

from scratchlm import arguments
from scratchlm.arguments import parse
from scratchlm.errors import UserError
from scratchlm.section import Section


class Inner(Section):
    depth: int = 3


class Options(Section):
    name: str = "x"
    size: int | None = Field(default=None, ge=1)
    rate: float = 0.5
    kind: Literal["a", "b"] = "a"
    place: Path | None = None
    many: tuple[str, ...] = ()
    on: bool = False
    long_name: int = 1
    inner: Inner = Inner()


def by_tyro(given: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(arguments, "_without_tyro", lambda *_: None)
        return parse(Options, given, prog="test", default=Options(rate=0.25))


@pytest.mark.parametrize(
    "given",
    [
        [],
        ["--name", "some text"],
        ["--name", "8", "--size", "8", "--rate", "1e-3"],
        ["--kind", "b", "--place", "some/where.html"],
        ["--long-name", "7"],
        ["--long_name", "7"],
        ["--size", "3", "--size", "4"],
        ["--name", "ä€😀", "--rate", "3"],
    ],
)
def test_plain_options_are_those_of_tyro(given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = by_tyro(given, monkeypatch)
    found = arguments._without_tyro(Options(rate=0.25), given)
    assert found is not None and found == wanted == parse(Options, given, prog="test", default=Options(rate=0.25))
    assert found.place is None or isinstance(found.place, Path)


@pytest.mark.parametrize(
    "given",
    [
        ["--size", "None"],
        ["--on", "True"],
        ["--inner.depth", "4"],
        ["--size=3"],
        ["--many", "a", "b"],
        ["--many", "a", "--rate", "2", "--name", "y"],
        ["--rate", "-1.5"],
    ],
)
def test_unusual_ones_are_left_to_tyro(given: list[str]) -> None:
    assert arguments._without_tyro(Options(), given) is None
    assert parse(Options, given, prog="test", default=Options()) is not None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--size", "0"], "size"),
        (["--size", "1.5"], "1.5"),
        (["--kind", "c"], "kind"),
        (["--colour", "red"], "--colour"),
        (["--name"], "name"),
        (["name", "x"], "unexpected argument"),
        (["--inner", "x"], "--inner"),
    ],
)
def test_what_is_wrong_is_said_by_tyro(given: list[str], message: str) -> None:
    assert arguments._without_tyro(Options(), given) is None
    with pytest.raises(UserError, match=message):
        parse(Options, given, prog="test", default=Options())


def test_a_default_of_another_kind_goes_through_tyro() -> None:
    class More(Options):
        extra: int = 0

    found = parse(More, ["--extra", "2"], prog="test", default=More(extra=1))
    assert found == More(extra=2)
