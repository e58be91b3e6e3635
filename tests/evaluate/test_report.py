"""report.html: whole and partial run folders, escaping, self-containedness."""

from __future__ import annotations

import base64
import json
import math
import re
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import pytest
from matplotlib.image import imread

from scratchlm.config import Recipe, save_recipe
from scratchlm.errors import UserError
from scratchlm.evaluate.compressors import CompressorResult
from scratchlm.evaluate.metrics import Evaluation, LossSum
from scratchlm.evaluate.report import _thinned, amount, decimals, duration, write_report
from scratchlm.evaluate.samples import write_samples
from scratchlm.train.metrics import MetricsFile

FILES = ("recipe.toml", "metrics.jsonl", "evaluation.json", "samples.txt", "timings.json", "environment.json")


class Page(HTMLParser):
    """Text, tags and attributes of a page; complains about tags that are not closed."""

    VOID = frozenset({"meta", "link", "img", "source", "br"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        assert self._open == [], self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self.text += data.replace("\u00a0", " ")
        if self._open and self._open[-1] in ("td", "th"):
            self.rows[-1][-1] += data.replace("\u00a0", " ")


def run_folder(folder: Path) -> Path:
    """A run's folder with every file."""
    folder.mkdir(exist_ok=True)
    save_recipe(Recipe(name="my-run"), folder / "recipe.toml")
    with MetricsFile(folder / "metrics.jsonl") as file:
        for step in range(10, 101, 10):
            loss = 2 + 60 / step
            file.log({"kind": "train", "step": step, "loss": loss, "tokens": step * 1000, "seconds": step * 7.0,
                      "tokens_per_second": 5000.0 + step})  # fmt: skip
            file.log({"kind": "validation", "step": step, "loss": loss, "perplexity": math.exp(loss),
                      "bits_per_byte": loss / 2, "tokens": step * 1000, "seconds": step * 7.0})  # fmt: skip
        file.log({"kind": "event", "step": 50, "message": "resumed <b>here</b>"})
    results = {
        "gzip -9": CompressorResult(bytes=400, bits_per_byte=2.0, seconds=0.1),
        "xz -9e": CompressorResult(bytes=300, bits_per_byte=1.5, seconds=0.2),
    }
    Evaluation.from_sum(
        LossSum(nats=2500.0, tokens=1000), text_bytes=3000, documents=4, context_length=64, stride=16, seconds=2.0,
        compressors=results,
    ).save(folder / "evaluation.json")  # fmt: skip
    write_samples(folder / "samples.txt", [("\ndef ", "f():\n  '<script>alert(1)</script>' & \"é\" {{ 7 * 7 }}\n")])
    steps = {"tokenizer": {"seconds": 3.25, "action": "built"}, "train": {"seconds": 725.4, "action": "resumed"}}
    (folder / "timings.json").write_text(json.dumps(steps))
    (folder / "environment.json").write_text(
        json.dumps(
            {
                "torch": "2.99",
                "cpu": "Quick & Co",
                "commit": None,
                "devices": ["GPU 1"],
                "threads": 2,
                "memory_bytes": 3 << 30,
                "parameters": 14_500_000,
            }
        )
    )
    return folder


def test_shows_every_figure(tmp_path: Path) -> None:
    path = write_report(run_folder(tmp_path))
    assert path == tmp_path / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    for figure in ("my-run", "2.500", "12.18", "1.202", "2.000", "1.500", "5,055", "14.5 M", "14,500,000", "100 k"):
        assert figure in page.text, figure
    assert ["tokenizer", "built", "3.2 s"] in page.rows and ["train", "resumed", "12 min 05 s"] in page.rows
    assert ["together", "", "12 min 09 s"] in page.rows
    assert ["50", "3.200", "24.53", "1.600", "50.0 k", "5 min 50 s"] in page.rows
    assert ["final", "2.500", "12.18", "1.202", "", ""] in page.rows
    assert "1,000 tokens of 4 documents in windows of 64, starting every 16 tokens" in " ".join(page.text.split())
    assert (
        ["torch", "2.99"] in page.rows and ["cpu", "Quick & Co"] in page.rows and ["devices", "GPU 1"] in page.rows
    )
    assert ["memory", "3.0 GiB"] in page.rows and not any(row[0] == "commit" for row in page.rows)
    assert ["optim.lr", "0.001"] in page.rows and ["corpus.kind", "python-stdlib"] in page.rows
    widths = [value for tag, name, value in page.attributes if (tag, name) == ("div", "style")]
    assert widths == ["width: 60.11%", "width: 100.00%", "width: 75.00%"]  # model, gzip, xz


def test_text_from_elsewhere_is_escaped(tmp_path: Path) -> None:
    html = write_report(run_folder(tmp_path)).read_text(encoding="utf-8")
    page = Page(html)
    assert "script" not in page.tags and "<script" not in html.lower()
    assert "\ndef f():\n  '<script>alert(1)</script>' & \"é\" {{ 7 * 7 }}\n" in page.text  # shown as it was written
    assert "resumed <b>here</b>" in page.text


def test_title_and_names_are_escaped_too(tmp_path: Path) -> None:
    evil = '"><img src=x onerror=alert(1)>'
    (tmp_path / "recipe.toml").write_text(f"name = {json.dumps(evil)}\n{json.dumps(evil)} = 1\n")
    (tmp_path / "timings.json").write_text(json.dumps({evil: {"seconds": 1, "action": evil}}))
    (tmp_path / "environment.json").write_text(json.dumps({evil: evil}))
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "img" not in page.tags and page.text.count(evil) == 8


def test_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    html = write_report(run_folder(tmp_path)).read_text(encoding="utf-8")
    page = Page(html)
    addresses = [value for _, name, value in page.attributes if name in ("src", "srcset", "href")]
    assert len(addresses) == 5 and all(address.startswith("data:") for address in addresses)
    outside_data = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", html)
    assert not re.search(r"https?:|//|url\(|@import", outside_data)
    assert ("meta", "name", "viewport") in page.attributes and "prefers-color-scheme: dark" in html
    pictures = [address.split(",", 1)[1] for address in addresses if address.startswith("data:image/png")]
    assert len(set(pictures)) == 4  # light and dark, wide and tall
    for picture in pictures:
        assert imread(BytesIO(base64.b64decode(picture, validate=True))).shape[0] > 300


@pytest.mark.parametrize("missing", FILES)
def test_any_missing_file_is_left_out(tmp_path: Path, missing: str) -> None:
    (run_folder(tmp_path) / missing).unlink()
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    heading = {
        "recipe.toml": "Recipe", "metrics.jsonl": "Training speed", "evaluation.json": "gzip -9", "samples.txt": "Samples",
        "timings.json": "together", "environment.json": "Versions",
    }  # fmt: skip
    shown = {name: text in page.text for name, text in heading.items()}
    assert shown == {name: name != missing for name in FILES}


@pytest.mark.parametrize("only", FILES)
def test_any_file_alone_makes_a_page(tmp_path: Path, only: str) -> None:
    run_folder(tmp_path / "whole")
    (tmp_path / "run").mkdir()
    (tmp_path / "whole" / only).rename(tmp_path / "run" / only)
    Page(write_report(tmp_path / "run").read_text(encoding="utf-8"))


def test_empty_folder_and_empty_metrics(tmp_path: Path) -> None:
    assert tmp_path.name in Page(write_report(tmp_path).read_text(encoding="utf-8")).text
    (tmp_path / "metrics.jsonl").touch()
    assert "img" not in Page(write_report(tmp_path).read_text(encoding="utf-8")).tags


def test_run_cut_off_before_its_final_evaluation_shows_the_last_one(tmp_path: Path) -> None:
    (run_folder(tmp_path) / "evaluation.json").unlink()
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "last evaluation while training" in page.text and "2.600" in page.text and "this model" not in page.text


def test_diverged_run_is_reported(tmp_path: Path) -> None:
    run_folder(tmp_path)
    with MetricsFile(tmp_path / "metrics.jsonl") as file:
        file.log({"kind": "train", "step": 110, "loss": math.nan, "seconds": 800.0, "tokens_per_second": math.inf})
        file.log(
            {"kind": "validation", "step": 110, "loss": math.nan, "perplexity": math.inf, "bits_per_byte": math.nan}
        )
    Evaluation.from_sum(
        LossSum(nats=math.nan, tokens=10), text_bytes=0, documents=0, context_length=8, stride=8, seconds=0.0,
        compressors={"gzip -9": CompressorResult(bytes=20, bits_per_byte=math.nan, seconds=0.0)},
    ).save(tmp_path / "evaluation.json")  # fmt: skip
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert ["110", "—", "∞", "—", "—", "—"] in page.rows


def test_parameters_given_win_over_the_file(tmp_path: Path) -> None:
    page = Page(write_report(run_folder(tmp_path), parameters=1234).read_text(encoding="utf-8"))
    assert "1,234" in page.text and "14,500,000" not in page.text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("recipe.toml", "= 1"),
        ("evaluation.json", "{}"),
        ("timings.json", "[1]"),
        ("timings.json", '{"train": 3}'),
        ("environment.json", "{"),
        ("metrics.jsonl", "x\n{}\n"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(name)):
        write_report(tmp_path)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        write_report(tmp_path / "none")


def test_long_tables_are_thinned_evenly() -> None:
    rows = [{"step": step} for step in range(1000)]
    thinned = [row["step"] for row in _thinned(rows, 40)]
    assert len(thinned) == len(set(thinned)) == 40 and thinned[0] == 0 and thinned[-1] == 999
    assert _thinned(rows[:40], 40) == rows[:40]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0.0 s"), (59.94, "59.9 s"), (60, "1 min 00 s"), (125.4, "2 min 05 s"), (3599, "59 min 59 s"),
     (3600, "1 h 00 min"), (11400, "3 h 10 min"), (None, "—"), (math.inf, "—"), ("x", "—")],
)  # fmt: skip
def test_durations(value: object, shown: str) -> None:
    assert duration(value).replace("\u00a0", " ") == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (950, "950"), (9999, "9,999"), (10_000, "10.0 k"), (999_999, "1.00 M"), (14_500_000, "14.5 M"),
     (1.28e9, "1.28 B"), (3e12, "3.00 T"), (None, "—"), (math.nan, "—")],
)  # fmt: skip
def test_amounts(value: object, shown: str) -> None:
    assert amount(value).replace("\u00a0", " ") == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1.23456, "1.235"), (999.9, "999.900"), (14328.2, "14,328"), (math.inf, "∞"), (-math.inf, "−∞"), ("NaN", "—"), (None, "—")],
)  # fmt: skip
def test_decimals(value: object, shown: str) -> None:
    assert decimals(value) == shown
