"""Pictures show what the modules do: masks pair by pair, graphs that compute the block's result, counts that add up."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_variants import SMALL, VARIANTS, build, random_ids
from PIL import Image

from scratchlm.errors import UserError
from scratchlm.generate.cache import KVCache
from scratchlm.model import ModelConfig, Transformer, choices, presets
from scratchlm.model.draw.ascii import drawing_of, drawings_of
from scratchlm.model.draw.cost import (
    beside_it,
    cache_bytes,
    components,
    cost_picture,
    growing_and_bounded_bytes,
    kept_by,
)
from scratchlm.model.draw.hollow import hollow
from scratchlm.model.draw.layouts import Step, block_picture, blocks_of, steps_of
from scratchlm.model.draw.masks import Grid, allowed_pairs, grids_of, telling_length
from scratchlm.model.draw.page import MARK, PAGE, draw_model, pictures_of, refuse_foreign
from scratchlm.model.draw.patterns import kinds_by_layer
from scratchlm.model.draw.positions import ropes_of
from scratchlm.model.draw.routers import MOST_STEPS, router_picture, router_records
from scratchlm.model.draw.style import Theme, layers_in_words
from scratchlm.model.position import Positions

every_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=list(VARIANTS))
SIZES = {"window": 5, "stride": 4, "stride_summary": 2, "mask_block": 4, "global_tokens": 2}
THEMES: tuple[Theme, ...] = ("light", "dark")


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(choices.MASK.names), st.integers(1, 40), st.integers(1, 12), st.integers(0, 9))
def test_a_grid_is_the_mask_and_the_blocks_pair_by_pair(name: str, length: int, block: int, prefix: int) -> None:
    rule = choices.MASK.get(name).of(ModelConfig(**SIZES))
    grid = Grid("", rule, length, block, prefix)
    allowed, computed = grid.coverage()
    place = torch.arange(length)
    expected = np.array([[bool(rule.allowed(q[None], k[None], prefix)) for k in place] for q in place])
    assert (allowed == expected).all()
    often = np.zeros((length, length))
    for part in grid.parts or (rule,):
        order = place if part.order(length) is None else part.order(length)
        for rows in order.split(block):
            needed = part.allowed(rows, place, prefix).any(dim=0).numpy()
            often[np.ix_(rows.numpy(), needed)] += 1
    assert (computed == often).all()
    assert grid.shares() == pytest.approx((expected.mean(), computed.mean()))


@pytest.mark.parametrize("name", choices.MASK.names)
def test_cells_of_long_masks_are_means(name: str) -> None:
    rule = choices.MASK.get(name).of(ModelConfig(window=100, stride=50, mask_block=64))
    grid = Grid("", rule, 1024, prefix=200)
    assert grid.side == 4
    allowed, computed = grid.coverage()
    assert allowed.shape == (256, 256)
    assert (allowed <= computed).all()
    assert grid.shares() == pytest.approx((allowed.mean(), computed.mean()))
    assert grid.shares()[0] == allowed_pairs(rule, 1024, 200) / 1024**2


def test_a_length_is_chosen_at_which_the_mask_shows() -> None:
    causal, window = (choices.MASK.get(name) for name in ("causal", "sliding_window"))
    assert telling_length(causal.of(ModelConfig()), 131_072) == 512
    assert telling_length(window.of(ModelConfig(window=1024)), 131_072) == 4096
    assert telling_length(window.of(ModelConfig(window=4096)), 3000) == 3000
    assert telling_length(choices.MASK.get("prefix_lm").of(ModelConfig()), 4096, 100) == 512
    grids = grids_of(presets.load("gemma-2-tiny"), 64)
    assert [grid.title for grid in grids] == ["sliding_window 128\nlayers 0, 2", "causal\nlayers 1, 3"]
    assert [grid.length for grid in grids] == [64, 64]


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([3], "layer 3"),
        ([0, 1, 2, 5], "layers 0–2, 5"),
        (list(range(0, 40, 2)), "layers 0, 2, 4, 6, … (20 in all)"),
    ],
)
def test_layers_in_words(layers: list[int], words: str) -> None:
    assert layers_in_words(layers) == words


def run_steps(steps: list[Step], block: Any, x: torch.Tensor, context: Any) -> torch.Tensor:
    """What a drawn graph computes."""
    values: dict[int, torch.Tensor] = {}
    for step in steps:
        inputs = [values[id(read)] for read in step.inputs]
        if step.name == "x":
            values[id(step)] = x
        elif step.name == "+":
            values[id(step)] = inputs[0] + inputs[1]
        else:
            extra = (context,) if step.name in ("attention", "feedforward") else ()
            values[id(step)] = block.get_submodule(step.name)(*inputs, *extra)
    return values[id(steps[-1])]


LAYOUTS: dict[str, ModelConfig] = VARIANTS | {
    f"{block}, {placement}": ModelConfig(
        **SMALL, block=block, norm_placement=placement, residual="vector", residual_init=0.7
    )
    for block in choices.BLOCK.names
    for placement in choices.NORM_PLACEMENT.names
    if block != "parallel_shared" or placement in ("pre", "double")
}


@pytest.mark.parametrize("config", LAYOUTS.values(), ids=list(LAYOUTS))
def test_the_drawn_block_computes_what_the_block_does(config: ModelConfig) -> None:
    if not config.layers:
        return
    model = build(config).eval()
    ids = random_ids(config, 2, 11)
    context, block = model.context(ids), model.blocks[0]
    x = model.embed(ids)
    steps = steps_of(block, config, 0)
    torch.testing.assert_close(run_steps(steps, block, x, context), block(x, context), rtol=0, atol=0)
    assert sum(getattr(block, step.name).num_params() for step in steps if len(step.name) > 1) == block.num_params()
    places = [(step.column, step.lane) for step in steps]
    assert len(set(places)) == len(places)
    assert steps[0].lane == steps[-1].lane == 0
    assert all(read.column < step.column for step in steps for read in step.inputs)


def test_dropout_is_drawn_where_it_acts() -> None:
    config = ModelConfig(**SMALL, residual_dropout=0.1)
    names = [step.name for step in steps_of(hollow(config).blocks[0], config, 0)]
    assert names.count("dropout") == 2
    assert "dropout" not in [step.name for step in steps_of(hollow(ModelConfig(**SMALL)).blocks[0], config, 0)]


def test_a_drawing_per_kind_of_layer() -> None:
    model = hollow(presets.load("deepseek-v3-tiny").model_copy(update={"vocab_size": 64}))
    titles, graphs = zip(*blocks_of(model), strict=True)
    assert titles == ("layer 0", "layers 1–2")
    labels = [next(step.label for step in graph if step.name == "feedforward") for graph in graphs]
    assert labels[0].startswith("feed-forward") and labels[1].startswith("4 of 32 + 1 experts")


@every_variant
@pytest.mark.parametrize("length", [1, 24])
def test_components_add_up(config: ModelConfig, length: int) -> None:
    model = hollow(config)
    parts = components(model, length)
    built = Transformer(config, seed=0)
    assert sum(part.params for part in parts) == sum(p.numel() for p in built.parameters())
    assert sum(part.active for part in parts) == built.num_active_params()
    assert sum(part.flops for part in parts) == pytest.approx(built.flops_per_token(length))
    assert all(part.flops >= 0 for part in parts)


@pytest.mark.parametrize(
    "name", ["gqa", "mla and mha", "delta and window", "attention = linear", "mask = sliding_window"]
)
@torch.no_grad()
def test_what_is_kept_is_what_a_cache_holds(name: str) -> None:
    config = VARIANTS[name]
    model, ids = build(config).eval(), random_ids(config, 1, 9)
    cache = KVCache(config, 1, 9)
    model(ids, cache=cache)
    held = sum(
        tensor.numel() for store in (cache._slots, cache._states) for layer in store for tensor in layer.values()
    )
    assert held == sum(layer.numbers(9) for layer in kept_by(config))
    assert cache_bytes(config, 9, 4) == held * 4
    half, rough = model.bfloat16(), KVCache(config, 1, 9, dtype=torch.bfloat16)
    half(ids, cache=rough)
    stores = (rough._slots, rough._states)
    filled = sum(t.numel() * t.itemsize for store in stores for layer in store for t in layer.values())
    assert cache_bytes(config, 9, 2) == filled
    assert growing_and_bounded_bytes(config, 2) == (
        KVCache.bytes_per_token(config, torch.bfloat16),
        KVCache.state_bytes(config, torch.bfloat16),
    )
    bounds = KVCache.bytes_per_token(config), KVCache.state_bytes(config)
    assert growing_and_bounded_bytes(config, 4) == bounds


def test_comparison_of_caches_only_where_there_is_something_to_compare() -> None:
    assert list(beside_it(ModelConfig(**SMALL))) == ["this model"]
    compared = beside_it(VARIANTS["mla and mha"])
    assert list(compared) == ["this model", "plain MHA"]
    assert cache_bytes(compared["plain MHA"], 10) == 2 * 10 * 2 * 2 * 24


@pytest.mark.parametrize("scaling", choices.ROPE_SCALING.names)
def test_short_tables_are_the_beginning_of_the_models(scaling: str) -> None:
    rope = {"scaling": scaling, "theta": "100 10000"} | ({} if scaling == "none" else {"factor": 4.0})
    config = ModelConfig(**{**SMALL, "context_length": 400, "head_dim": 16, "rope": rope})
    drawn = ropes_of(config)
    assert len(drawn) == 2
    for layer, one in enumerate(drawn):
        whole = Positions(config).at(layer, 16).table
        assert one.module.table.shape[1] == 256
        torch.testing.assert_close(one.module.table, whole[:, :256], rtol=0, atol=0)
        assert one.context == 400 and one.original == (100 if scaling != "none" else 400)
        assert f"layer {layer}" in one.title


def test_drawings_in_text_are_those_of_the_code() -> None:
    for axis in (choices.BLOCK, choices.NORM_PLACEMENT, choices.ATTENTION, choices.FEEDFORWARD):
        for name in axis.names:
            drawn = drawing_of(axis, name)
            assert set("─►") <= set(drawn), f"{axis.axis} = {name}"
            assert not re.search(r"^(Args|Attributes|Raises):", drawn, re.MULTILINE)
    placed = drawing_of(choices.NORM_PLACEMENT, "pre").splitlines()
    assert placed[0].index("┬") == placed[1].index("└")
    drawings = drawings_of(VARIANTS["moe, fine-grained, shared"])
    assert list(drawings) == [
        "block = serial",
        "norm_placement = pre",
        "attention = mha",
        "feedforward = relu2",
        "moe",
    ]


def test_what_each_layer_has() -> None:
    kinds = kinds_by_layer(presets.load("gemma-3-27b"))
    assert kinds["mask"].count("causal") == 10 and kinds["mask"][:6].count("sliding_window 1,024") == 5
    assert kinds["position"][5] == "rope θ 1,000,000, linear × 8"
    assert set(kinds["attention"]) == {"mha"} and all(len(values) == 62 for values in kinds.values())


@every_variant
def test_every_variant_has_its_pictures(config: ModelConfig) -> None:
    pictures = pictures_of(config, "a variant")
    names = [picture.name for picture in pictures]
    assert len(set(names)) == len(names)
    if config.layers:
        assert {"layers", "block", "masks", "costs", "cache"} <= set(names)
        assert ("rope" in names) == ("rope" in config.position)


@pytest.mark.parametrize(
    "name",
    ["attention = gated_delta", "position = sinusoidal", "alibi, sinks, cap", "no layers"],
)
def test_pictures_are_painted(name: str) -> None:
    for number, picture in enumerate(pictures_of(VARIANTS[name], name)):
        with Image.open(BytesIO(picture.png(THEMES[number % 2]))) as image:
            assert image.format == "PNG" and min(image.size) > 80
            colours = image.convert("RGB").getcolors(1 << 20)
            assert colours is not None and len(colours) > 8


def test_themes_differ() -> None:
    corners = []
    for theme in THEMES:
        with Image.open(BytesIO(cost_picture(hollow(ModelConfig(**SMALL)), 8).png(theme))) as image:
            corners.append(image.convert("RGB").getpixel((0, 0)))
    assert corners == [(255, 255, 255), (20, 24, 29)]
    assert block_picture([]).heading == "Block"


def router_lines(count: int, layers: int = 2) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [{"kind": "event", "step": 0, "message": "begun"}]
    for step in range(1, count + 1):
        load = [[1.0, 2.0, 3.0, float(step)] for _ in range(layers)]
        lines.append(
            {"kind": "train", "step": step, "expert_load": load, "expert_max_over_mean": 2.0, "router_entropy": 1.0}
        )
    return lines


def test_routers_over_a_run() -> None:
    assert router_picture([], [0]) is None
    assert router_picture([{"kind": "train", "step": 1, "loss": 2.0}], [0]) is None
    assert [record["step"] for record in router_records(router_lines(3))] == [1, 2, 3]
    many = router_records(router_lines(5 * MOST_STEPS))
    assert len(many) == MOST_STEPS and (many[0]["step"], many[-1]["step"]) == (1, 5 * MOST_STEPS)
    changed = [*router_lines(2), *router_lines(3, layers=1)[1:]]
    assert len(router_records(changed)) == 3
    for lines, layers in ((router_lines(1), [0, 1]), (router_lines(9), [1]), (router_lines(4, 8), list(range(8)))):
        picture = router_picture(lines, layers)
        assert picture is not None and picture.png().startswith(b"\x89PNG")


class Sources(HTMLParser):
    """Everything a page asks for, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.asked += [value or "" for key, value in attrs if key in ("src", "srcset", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    config = VARIANTS["moe, fine-grained, shared"]
    page = draw_model(config, "<b>a & b</b>", tmp_path / "out", source="<i>x</i>", records=router_lines(3, 1))
    assert page == tmp_path / "out" / PAGE
    parser = Sources()
    parser.feed(page.read_text(encoding="utf-8"))
    assert all(source.startswith("data:") for source in parser.asked)
    pictures = [path.stem for path in page.parent.glob("*.png")]
    assert len(parser.asked) == 2 * len(pictures) + 1 and "routers" in pictures
    assert "<b>a & b</b>" in parser.text and "b" not in parser.tags and "i" not in parser.tags
    assert f"{hollow(config).num_params():,}" in parser.text
    assert drawing_of(choices.BLOCK, "serial").splitlines()[0] in parser.text
    assert page.read_text(encoding="utf-8").count("http") == 0


def test_only_what_is_ours_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    config = ModelConfig(**{**SMALL, "layers": 0})
    refuse_foreign(folder)
    folder.mkdir()
    draw_model(config, "first", folder)  # an empty folder holds nothing to lose
    draw_model(config, "second", folder)
    assert "second" in (folder / PAGE).read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]

    def refused(match: str) -> None:
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        with pytest.raises(UserError, match=match):
            draw_model(config, "third", folder)
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before

    (folder / "notes.txt").write_text("mine")
    refused("notes.txt is not as")
    (folder / "notes.txt").unlink()
    content = (folder / "costs.png").read_bytes()
    (folder / "costs.png").write_bytes(b"changed")
    refused("costs.png is not as")
    (folder / "costs.png").write_bytes(content)
    (folder / MARK).rename(tmp_path / "kept.json")
    refused("holds no drawings of ours")
    (folder / MARK).write_text("[]")
    refused("is not as")
    (folder / MARK).write_text("{")
    refused("not valid JSON")
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        draw_model(config, "third", file)
    assert file.read_text() == "mine"


def test_nothing_is_computed_that_a_large_model_would_cost() -> None:
    model = hollow(presets.load("llama-3.1-405b"))
    assert model.num_params() == 405_853_388_800
    assert all(parameter.is_meta for parameter in model.parameters())
