"""docs/interop.md says what the rules say and what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scratchlm.errors import UserError
from scratchlm.interop import document
from scratchlm.interop.family import families
from scratchlm.model.draw.document import filled

DOCS = Path(__file__).parent.parent.parent / "docs"
PAGE = (DOCS / "interop.md").read_text(encoding="utf-8")


def test_the_generated_parts_are_up_to_date() -> None:
    assert filled(PAGE, document.parts(DOCS)) == PAGE


def test_every_family_is_in_the_matrix_and_was_measured() -> None:
    rows = {line.split("**")[1] for line in document.matrix().splitlines() if line.startswith("| **")}
    assert rows == set(families())
    measured = {row["case"] for row in json.loads((DOCS / document.MEASURED).read_text())["results"]}
    assert all(any(case == name or case.startswith(f"{name}-") for case in measured) for name in families())


def test_measured_errors_are_those_the_tests_allow() -> None:
    from all_cases import CASES

    allowed = {case.id: case for case in CASES}
    for row in json.loads((DOCS / document.MEASURED).read_text())["results"]:
        case = allowed[row["case"]]
        assert row["logits_fp64"] <= case.tolerance and row["gradients_fp64"] <= max(1e-9, case.tolerance)
        assert row["logits_fp32"] <= 1e-4 and row["tokens_equal"] == row["tokens"] >= 128


def test_a_familys_file_is_short() -> None:
    for path in (Path(document.__file__).parent / "families").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 500


def test_cells() -> None:
    known = families()
    assert document.cell(known["llama"], "norm") == "rmsnorm"
    assert document.cell(known["llama"], "norm_placement") == ""
    assert document.cell(known["llama"], "rope.pairs") == "half"
    assert document.cell(known["llama"], "attention_bias") == "none or q k v o"
    assert document.cell(known["llama"], "tied_embeddings") == "any"
    assert document.default_of("rope.pairs") == "half"


def test_a_page_without_marks_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "results/interop").mkdir(parents=True)
    (tmp_path / document.MEASURED).write_text('{"results": []}')
    with pytest.raises(UserError, match="does not exist"):
        document.main(tmp_path)
    (tmp_path / "interop.md").write_text("# Interop")
    with pytest.raises(UserError, match="has no <!-- matrix -->"):
        document.main(tmp_path)
