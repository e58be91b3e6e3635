"""samples.txt comes back exactly, whatever a model writes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scratchlm.errors import UserError
from scratchlm.evaluate.samples import Sample, read_samples, write_samples

HEADER = "# sample 1 of 1: prompt of 0 characters, continuation of 1 characters\n"
PIECES = st.lists(
    st.sampled_from([HEADER, "def ", "\n", "\r\n", "\r", "é", "𝄞", "\0", "\u2028", "#"]), max_size=6
).map("".join)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(samples=st.lists(st.tuples(PIECES, PIECES), max_size=4))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, samples: list[tuple[str, str]]) -> None:
    path = tmp_path_factory.mktemp("samples") / "samples.txt"
    write_samples(path, samples)
    assert read_samples(path) == samples


def test_is_readable_text(tmp_path: Path) -> None:
    write_samples(tmp_path / "s.txt", [("def ", "f():\n    pass"), ("", "é")])
    assert (tmp_path / "s.txt").read_text(encoding="utf-8") == (
        "# sample 1 of 2: prompt of 4 characters, continuation of 13 characters\ndef f():\n    pass\n\n"
        "# sample 2 of 2: prompt of 0 characters, continuation of 1 characters\né\n\n"
    )


def test_lone_surrogates_and_foreign_files(tmp_path: Path) -> None:
    write_samples(tmp_path / "s.txt", [("a", "b\ud800")])
    assert read_samples(tmp_path / "s.txt") == [Sample("a", "b?")]
    (tmp_path / "s.txt").write_bytes(b"just text \xff")
    assert read_samples(tmp_path / "s.txt") == [Sample("", "just text \ufffd")]
    with pytest.raises(UserError, match="cannot read samples"):
        read_samples(tmp_path / "none.txt")
