"""docs/results/lecture3: the page shows what the tables say, and its pictures are there."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs/results/lecture3"
sys.path.insert(0, str(ROOT / "benchmarks"))

from lecture3 import SPECS, filled  # noqa: E402


def test_the_page_shows_the_tables_and_pictures_that_are_there() -> None:
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert filled(page, FOLDER) == page, "python benchmarks/lecture3.py fills it anew"
    named = set(re.findall(r"<!-- table ([\w-]+) -->", page))
    assert named == {path.name for path in FOLDER.iterdir() if path.is_dir()} and named
    assert named <= {path.stem for path in SPECS.glob("*.toml")}
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page):
        assert (FOLDER / picture).is_file(), picture


def test_a_short_table(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one/results.json").write_text('{"judged_by": "bits per byte"}')
    (tmp_path / "one/table.csv").write_text(
        "variant,rate,factor,loss,loss_error,bits_per_byte,bits_per_byte_error,difference,low,high,verdict\n"
        "base,own = reference's,1.0,9,1,1.5,0.01,,,,reference\n"
        "two,own,2.0,9,1,1.25,,-0.25,-0.3,-0.2,better\n"
        "three,own,1.0,,,,,,,,diverged\n"
    )
    page = "before\n<!-- table one -->\nold\n<!-- end -->\nafter\n"
    assert filled(page, tmp_path) == (
        "before\n<!-- table one -->\n"
        "| variant | learning rates | bits per byte | difference, 95 % interval | verdict |\n"
        "| --- | --- | ---: | ---: | --- |\n"
        "| base | ×1 (own = reference's) | 1.500 ± 0.010 |  | reference |\n"
        "| two | ×2 (own) | 1.250 | −0.250 [−0.300, −0.200] | better |\n"
        "| three | ×1 (own) | – |  | diverged |\n"
        "<!-- end -->\nafter\n"
    )
