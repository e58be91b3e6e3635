"""The page of an estimate: needs nothing but itself, shows every component, and its pictures hold the estimate's figures."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from scratchlm.config import OptimConfig, Recipe, TrainConfig
from scratchlm.model.config import ModelConfig
from scratchlm.resources import page
from scratchlm.resources.answer import Estimate
from scratchlm.resources.devices import find
from scratchlm.resources.estimate import estimate
from scratchlm.resources.tables import Target
from scratchlm.resources.timing import Datasheet

RECIPE = Recipe(
    name="tiny",
    model=ModelConfig(vocab_size=300, context_length=16, d_model=32, layers=2, heads=2, d_ff=48),
    optim=OptimConfig(optimizer="adamw"),
    train=TrainConfig(steps=10, batch_size=4),
)
VOID = {"meta", "link", "br"}


@pytest.fixture(scope="module")
def tiny() -> Estimate:
    return estimate(
        RECIPE, precision="bf16", machine=Datasheet(find("h100")), memory_bytes=80e9, price_per_hour=2.0
    )


TARGET = Target(find("h100"), 80e9, 2.0)


class Reader(HTMLParser):
    """What a browser would fetch, and whether tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self._note(attributes)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._note(attributes)

    def _note(self, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "srcset", "action"):
                self.fetched.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert not reader.open
    return reader


def test_it_needs_nothing_but_itself(tiny: Estimate) -> None:
    text = page.render_page(tiny, TARGET)
    reader = read(text)
    assert "http" not in text and "@import" not in text and "<script" not in text
    assert all(address.startswith(("#", "data:")) for address in reader.fetched)
    inside = {address[1:] for address in reader.fetched if address.startswith("#")}
    inside |= set(re.findall(r"url\(#([^)]+)\)", text))
    assert inside and inside <= set(reader.ids)
    assert len(reader.ids) == len(set(reader.ids))  # two pictures, no name twice


def test_light_and_dark_are_the_pages_own_colours(tiny: Estimate) -> None:
    text = page.render_page(tiny, TARGET)
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert "var(--ink)" in drawn and "var(--hue0)" in drawn
    assert not re.search(r"#[0-9a-fA-F]{6}", drawn)  # a fixed colour would not turn dark
    defined = set(re.findall(r"(--[\w]+):", text))
    assert set(re.findall(r"var\((--\w+)\)", text)) <= defined
    assert "prefers-color-scheme: dark" in text
    assert page.variables("light") != page.variables("dark")


def test_every_component_and_figure_appears(tiny: Estimate) -> None:
    reader = read(page.render_page(tiny, TARGET))
    words = "\n".join(reader.words)
    for component in tiny.components:
        assert component.path.split(".")[-1] in words
    assert f"{tiny.params:,}" in words and tiny.memory.moment in words
    assert "h100" not in words and "NVIDIA H100 SXM" in words
    for kind in tiny.memory.at_peak:
        assert kind in words


def test_the_kinds_make_up_the_timeline_of_the_estimate(tiny: Estimate) -> None:
    live = [size for _, size in tiny.memory.timeline]
    assert np.array_equal(np.sum([tiny.memory.by_kind[kind] for kind in page.KINDS], axis=0), live)
    moment = int(np.argmax(live))
    assert {
        kind: sizes[moment] for kind, sizes in tiny.memory.by_kind.items() if sizes[moment]
    } == tiny.memory.at_peak
    assert all(size >= 0 for sizes in tiny.memory.by_kind.values() for size in sizes)


def test_thinned_keeps_the_peak() -> None:
    generator = np.random.default_rng(0)
    for length in (1, 2, 399, 400, 401, 1234):
        live = generator.integers(0, 10**9, length).tolist()
        shown = page.thinned(live)
        assert len(shown) == min(length, page.MOMENTS) and shown == sorted(set(shown))
        assert max(live[moment] for moment in shown) == max(live)


def test_memory_is_drawn_to_scale(tiny: Estimate) -> None:
    figure = page.memory_figure(tiny, Target(memory_bytes=0.5 * tiny.memory.peak))
    (axes,) = figure.axes
    (marker, limit) = axes.lines
    unit = {"MB": 1e6, "kB": 1e3}[axes.get_ylabel().split()[0]]
    live = [size for _, size in tiny.memory.timeline]
    assert marker.get_xydata().tolist() == [[int(np.argmax(live)), tiny.memory.peak / unit]]
    assert limit.get_ydata()[0] == pytest.approx(0.5 * tiny.memory.peak / unit)
    kinds = [kind for kind in page.KINDS if any(tiny.memory.by_kind[kind])]
    assert [one.get_label() for one in axes.collections] == kinds
    highest = max(point[1] for one in axes.collections for path in one.get_paths() for point in path.vertices)
    assert highest == pytest.approx(tiny.memory.peak / unit)
    words = {text.get_text() for text in axes.texts}
    assert {"forward", "backward"} <= words and any(word.strip() == "optimizer" for word in words)


def test_points_lie_under_the_roofs(tiny: Estimate) -> None:
    figure = page.roofline_figure(tiny, TARGET)
    assert figure is not None
    (axes,) = figure.axes
    points = np.concatenate([one.get_offsets() for one in axes.collections])
    groups = page.roofline_groups(tiny)
    assert len(points) == len(groups) > 10
    expected = {(group.intensity, group.flops / group.seconds) for group in groups if group.seconds}
    assert {tuple(point) for point in points.tolist()} == expected
    assert TARGET.device is not None and TARGET.bandwidth is not None
    for intensity, rate in points:
        assert rate <= min(TARGET.device.peak("bf16"), intensity * TARGET.bandwidth)
    bends = [line.get_xdata()[0] for line in axes.lines[:2]]
    assert bends == [TARGET.device.peak(dtype) / TARGET.bandwidth for dtype in ("bf16", "fp32")]
    named = next(text.get_text() for text in axes.texts if text.get_text().startswith("1  "))
    assert page.label(groups[0])[-20:] in named.splitlines()[0]
    assert "blocks.*.attention · fused attention" in {page.label(group) for group in groups}


def test_without_roofs_there_is_no_roofline(tiny: Estimate) -> None:
    assert page.roofline_figure(tiny, Target()) is None
    assert "The roofs are not known" in page.render_page(tiny, Target())


def test_markup_in_names_is_text(tiny: Estimate) -> None:
    text = page.render_page(replace(tiny, name="<i>x"), TARGET)
    assert "<i>x" not in text and "&lt;i&gt;x" in text


def test_it_is_written_whole(tiny: Estimate, tmp_path: Path) -> None:
    page.write_page(tiny, TARGET, tmp_path / "new" / "page.html")
    assert (tmp_path / "new" / "page.html").read_text(encoding="utf-8").rstrip().endswith("</html>")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]
