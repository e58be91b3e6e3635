"""The terminal's tables and the JSON of an estimate: readable units, sums that are the totals, nothing left out."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scratchlm.config import OptimConfig, Recipe, TrainConfig
from scratchlm.model.config import ModelConfig
from scratchlm.resources.answer import Component, Estimate
from scratchlm.resources.as_json import as_json
from scratchlm.resources.devices import find
from scratchlm.resources.estimate import estimate
from scratchlm.resources.tables import (
    Figures,
    Target,
    component_rows,
    memory_rows,
    money,
    operation_headers,
    operation_rows,
    ridge,
    saving_rows,
    seconds,
    show,
    si,
    summary,
)
from scratchlm.resources.timing import Datasheet

RECIPE = Recipe(
    name="tiny",
    model=ModelConfig(vocab_size=300, context_length=16, d_model=32, layers=3, heads=2, d_ff=48),
    optim=OptimConfig(optimizer="adamw"),
    train=TrainConfig(steps=10, batch_size=8, accumulation=2),
)


@pytest.fixture(scope="module")
def tiny() -> Estimate:
    return estimate(
        RECIPE,
        precision="bf16",
        machine=Datasheet(find("h100")),
        memory_bytes=80e9,
        price_per_hour=2.0,
    )


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(find("h100"), 80e9, 2.0, "a wish", ("a note",))


def test_every_row_of_the_tree_is_the_sum_of_the_rows_below_it(tiny: Estimate) -> None:
    rows = component_rows(tiny)
    depth = [len(row.branch) // 2 for row in rows]
    assert depth[0] == 0 and rows[0].name == "model"
    parents = 0
    for at, row in enumerate(rows):
        below = []
        for other in range(at + 1, len(rows)):
            if depth[other] <= depth[at]:
                break
            if depth[other] == depth[at] + 1:
                below.append(rows[other])
        if below:
            parents += 1
            for figure in Figures._fields:
                inside = sum(getattr(one.figures, figure) for one in below)
                assert math.isclose(getattr(row.figures, figure), inside), (row, figure)
    assert parents >= 4  # the model, a block, attention, feed-forward


def test_the_root_has_the_totals(tiny: Estimate) -> None:
    root = component_rows(tiny)[0].figures
    assert root.params == tiny.params == sum(component.params for component in tiny.components)
    assert math.isclose(root.forward, tiny.forward_flops) and math.isclose(root.backward, tiny.backward_flops)
    assert root.active == tiny.active_params
    assert (root.weights, root.gradients) == (4 * tiny.params, 4 * tiny.params)
    assert root.state == tiny.memory.at_peak["optimizer state"] == 8 * tiny.params
    passing = ("activations", "temporaries")
    assert root.at_peak == sum(tiny.memory.at_peak.get(kind, 0) for kind in passing)


def test_every_component_has_a_row(tiny: Estimate) -> None:
    rows = component_rows(tiny)
    stack: list[str] = []
    paths = set()
    for row in rows[1:]:
        stack[len(row.branch) // 2 - 1 :] = [row.name]
        paths.add(".".join(name for name in stack if name != "(itself)"))
    assert {component.path for component in tiny.components} <= paths
    attention = next(row for row in rows if row.name == "attention")
    assert attention.copies == str(RECIPE.model.layers)


def test_what_is_not_shown_leaves_a_whole_tree(tiny: Estimate) -> None:
    """RoPE has no parameters and no products: the row above it is the last, and says so."""
    rows = component_rows(tiny, lambda figures: figures.counts_something)
    names = [row.name for row in rows]
    assert "position" not in names and "position" in [row.name for row in component_rows(tiny)]
    for at, row in enumerate(rows[1:], 1):
        depth = len(row.branch)
        after = next((other for other in rows[at + 1 :] if len(other.branch) <= depth), None)
        assert row.branch.endswith("└ ") == (after is None or len(after.branch) < depth), row


def test_figures_of_its_own_come_first_and_are_named() -> None:
    bare = _bare()
    components = [
        Component("a", 2, params=1, active=1, weights=4, forward=4.0, backward=8.0, kept=3),
        Component("a.b.*.c", 6, params=10, active=5, gradients=40, state=80, forward=1.0, backward=2.0, kept=5),
    ]
    made = replace(bare, components=components, memory=replace(bare.memory, by_component={"a.b.*.c": 7}))
    rows = component_rows(made)
    assert [row.branch + row.name for row in rows] == ["model", "└ a", "  ├ (itself)", "  └ b.*.c"]
    assert [row.figures.params for row in rows] == [11, 11, 1, 10]
    assert [row.copies for row in rows] == ["", "2", "2", "6"]
    assert rows[1].counts() == ["11", "6", "5", "10"] and rows[1].bytes() == ["4 B", "40 B", "80 B", "8 B", "7 B"]
    assert rows[2].counts() == ["1", "1", "4", "8"] and rows[2].bytes() == ["4 B", "–", "–", "3 B", "–"]


def _bare() -> Estimate:
    return estimate(
        RECIPE.model_copy(update={"model": RECIPE.model.model_copy(update={"layers": 0})}),
        precision="fp32",
        savings=False,
    )


def test_memory_adds_up(tiny: Estimate) -> None:
    *kinds, peak = memory_rows(tiny)
    assert sum(tiny.memory.at_peak.values()) == tiny.memory.peak
    assert [kind for kind, _, _ in kinds] == list(tiny.memory.at_peak) and peak == (
        "peak",
        si(tiny.memory.peak, "B"),
        "100.0%",
    )
    assert sum(float(share.rstrip("%")) for _, _, share in kinds) == pytest.approx(100, abs=0.3)


def test_operations_add_up(tiny: Estimate, target: Target) -> None:
    headers, rows = operation_headers(tiny), operation_rows(tiny, target, most=4)
    assert len(rows) == 6 and all(len(row) == len(headers) for row in rows)
    calls = [int(row[3].replace(",", "")) for row in rows]
    assert sum(calls[:-1]) == calls[-1] == len(tiny.memory.timeline)
    shares = [float(row[8].rstrip("%")) for row in rows]
    assert shares[-1] == 100 and sum(shares[:-1]) == pytest.approx(100, abs=0.3)
    assert rows[-2][1] == f"{len(tiny.operations) - 4} others"
    every = operation_rows(tiny, target, most=10**6)
    assert len(every) == len(tiny.operations) + 1
    product = next(row for row in every if row[0] == "forward" and row[2] == "mm")
    group = next(one for one in tiny.operations if one.phase == "forward" and one.name == "mm")
    assert group.seconds is not None
    assert product[4] == si(group.flops / (tiny.micro_batch * tiny.length))
    passes = [one for one in tiny.operations if one.phase in ("forward", "backward")]
    assert sum(map(tiny.flops_per_token, passes)) == pytest.approx(tiny.forward_flops + tiny.backward_flops)
    assert product[6] == f"{group.flops / group.moved:.3g}"
    assert product[9] == f"{group.flops / group.seconds / 989.4e12:.0%}"


def test_without_a_machine_there_are_no_times(target: Target) -> None:
    bare = _bare()
    assert bare.time is None
    assert operation_headers(bare)[-1] == "FLOP/B"
    assert all(len(row) == 7 for row in operation_rows(bare, target))
    assert not {"step time", "speed", "whole run", "money"} & {what for what, _ in summary(bare, Target())}
    json.dumps(as_json(bare), allow_nan=False)


def test_the_summary_says_what_was_found(tiny: Estimate, target: Target) -> None:
    found = dict(summary(tiny, target))
    assert tiny.time is not None
    assert f"{tiny.params:,}" in found["parameters"]
    assert found["a step"].startswith("2 × 4 sequences × 16 tokens = 128 tokens, in bf16")
    assert si(tiny.memory.peak, "B") in found["peak memory"] and tiny.memory.moment in found["peak memory"]
    assert "fits in 80 GB" in found["peak memory"]
    assert f"at most {tiny.largest_micro_batch:,} at once" in found["micro-batch"]
    assert f"{tiny.time.model_flops_per_second / 989.4e12:.1%} of the bf16 peak" in found["speed"]
    assert "1.28 k tokens" in found["whole run"]
    assert "at 2 USD/h, a wish" in found["money"]


def test_what_does_not_fit_is_said(tiny: Estimate) -> None:
    small = Target(memory_bytes=1000.0)
    found = dict(summary(replace(tiny, largest_micro_batch=0), small))
    assert "does not fit in 1 kB" in found["peak memory"]
    assert "not one sequence fits in 1 kB" in found["micro-batch"]


def test_savings_most_first_and_losses_marked(tiny: Estimate) -> None:
    peak = tiny.memory.peak
    rows = saving_rows(replace(tiny, savings={"worse": 2 * peak, "half": peak // 2, "little": peak - peak // 10}))
    assert [(name, saved) for name, _, saved in rows] == [("half", "+50%"), ("little", "+10%"), ("worse", "−100%")]


def test_ridge(target: Target) -> None:
    assert ridge(target, "bf16") == pytest.approx(989.4e12 / 3.35e12)
    assert ridge(target, "int4") is None and ridge(Target(), "bf16") is None


def test_nothing_is_wider_than_the_terminal(
    tiny: Estimate, target: Target, capsys: pytest.CaptureFixture[str]
) -> None:
    show(tiny, target)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 110
    text = "\n".join(lines)
    assert "a note" in text and "bound" in text
    for kind in tiny.memory.at_peak:
        assert kind in text
    for change in tiny.savings:
        assert change in text


def test_json_is_plain_and_holds_the_estimate(tiny: Estimate, target: Target) -> None:
    made = as_json(tiny, target)
    back = json.loads(json.dumps(made, allow_nan=False))
    assert back == made
    assert tiny.time is not None
    assert back["params"] == tiny.params and back["tokens"] == tiny.tokens == 10 * 8 * 16
    assert back["flops_per_token"]["forward"] == tiny.forward_flops
    assert back["flops_per_token"]["backward"] == tiny.backward_flops
    assert max(back["memory"]["timeline"]["live"]) == back["memory"]["peak"] == tiny.memory.peak
    assert len(back["memory"]["timeline"]["phases"]) == len(back["memory"]["timeline"]["live"])
    assert [Component(**one) for one in back["components"]] == tiny.components
    assert back["time"]["step"] == tiny.time.step and back["target"]["device"] == "h100-sxm"
    product = next(one for one in back["operations"] if one["flops"])
    assert product["intensity"] == product["flops"] / product["moved"]
    assert product["flops_per_second"] == product["flops"] / product["seconds"]


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "B", "0 B"),
        (999, "B", "999 B"),
        (1000, "B", "1 kB"),
        (666_671_128, "B", "666.7 MB"),
        (80e9, "B", "80 GB"),
        (989.4e12, "FLOP/s", "989.4 TFLOP/s"),
        (7, "", "7"),
    ],
)
def test_prefixes(value: float, unit: str, text: str) -> None:
    assert si(value, unit) == text


@given(st.floats(min_value=1.0, max_value=1e20))
def test_a_prefixed_figure_is_the_figure_to_four_digits(value: float) -> None:
    number, _, prefix = si(value).partition(" ")
    power = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}[prefix]
    assert float(number) * power == pytest.approx(value, rel=6e-4)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (4.39e-4, "439 µs"),
        (0.00475, "4.75 ms"),
        (2.85, "2.85 s"),
        (0.9994, "999 ms"),
        (0.9997, "1 s"),
        (59.99, "1 min"),
        (1500 * 86400, "1,500 days"),
        (90, "1.5 min"),
        (5400, "1.5 h"),
        (86400, "24 h"),
        (2 * 86400, "2 days"),
        (100 * 86400, "100 days"),
    ],
)
def test_durations(value: float, text: str) -> None:
    assert seconds(value) == text


def test_money() -> None:
    assert [money(value) for value in (0.00091, 0.98, 1558.3)] == ["0.00091 USD", "0.98 USD", "1,558.30 USD"]
