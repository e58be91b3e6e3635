"""Rows and verdicts from results, missed budgets, what goes wrong, and the three files."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from test_plan import POST, RESULT, planner

from scratchlm.experiments.comparison import Comparison, as_csv, as_markdown, as_records, compare
from scratchlm.experiments.pictures import band, differences_figure, rates_figure, sweep_figure
from scratchlm.experiments.plan import Choice, Planner, Trial
from scratchlm.experiments.report import render_report, write_pictures
from scratchlm.experiments.results import Failure, Result, count_spikes, curve_of, load_outcome
from scratchlm.experiments.statistics import Difference

LOSSES = {"base": [3.00, 3.02, 3.01], "post": [2.90, 2.92, 2.905]}


def judged(made: Planner, outcome) -> Comparison:  # type: ignore[no-untyped-def]
    return compare(made.experiment, made.plan(outcome), made.amount, outcome)


def by_losses(trial: Trial) -> Result:
    return replace(
        RESULT, loss=LOSSES[trial.variant][trial.seed], bits_per_byte=LOSSES[trial.variant][trial.seed] / 2
    )


def test_a_clear_difference_with_its_figures(small: Path) -> None:
    found = judged(planner(small, f"seeds = 3\n{POST}"), by_losses)
    base, post = found.rows
    assert (base.verdict, base.difference) == ("reference", None)
    assert post.verdict == "better" and post.seeds == (3, 3)
    assert post.difference is not None and post.difference.mean == pytest.approx(np.mean([-0.1, -0.1, -0.105]))
    assert post.loss == pytest.approx(np.mean(LOSSES["post"]))
    assert post.error == pytest.approx(np.std(LOSSES["post"], ddof=1) / math.sqrt(3))
    assert not post.notes and found.unit == "nats per token" and found.by_chance == pytest.approx(0.05)


def test_other_tokens_are_compared_in_bits_per_byte(small: Path) -> None:
    made = planner(small, "seeds = 3\n[variants.post]\ntokenizer.vocab_size = 280\n")
    found = judged(made, lambda trial: replace(by_losses(trial), loss=9.0))
    assert found.unit == "bits per byte" and found.rows[1].verdict == "better"
    assert found.rows[1].difference is not None and found.rows[1].difference.mean == pytest.approx(
        -0.0508, abs=1e-3
    )


def test_what_broke_is_a_row_with_its_error(small: Path) -> None:
    def outcome(trial: Trial) -> Result | Failure:
        return Failure(trial.key, "no more | memory") if trial.variant == "post" else by_losses(trial)

    found = judged(planner(small, f"seeds = 3\n{POST}"), outcome)
    post = found.rows[1]
    assert (post.verdict, post.seeds, post.notes) == ("failed", (0, 3), ("no more | memory (3 runs)",))
    page = as_markdown(found)
    assert "no more | memory (3 runs)" in page and "| failed |" in page


def test_seeds_that_diverged_are_said_and_left_out(small: Path) -> None:
    def outcome(trial: Trial) -> Result:
        broken = trial.variant == "post" and trial.seed == 1
        return replace(by_losses(trial), loss=math.nan) if broken else by_losses(trial)

    post = judged(planner(small, f"seeds = 3\n{POST}"), outcome).rows[1]
    assert post.seeds == (2, 3) and "1 of 3 runs diverged" in post.notes and post.loss == pytest.approx(2.9025)
    assert post.difference is not None and post.difference.pairs == 2
    all_broken = judged(planner(small, f"seeds = 3\n{POST}"), lambda t: replace(by_losses(t), loss=math.inf))
    assert all_broken.rows[1].verdict == "diverged" and "–" in as_markdown(all_broken)


@pytest.mark.parametrize(
    ("budget", "change", "note"),
    [
        ("", {"tokens": 3072 + 63}, None),
        ("", {"tokens": 3072 + 70}, "counted 3142 tokens of 3072 planned"),
        ("[budget]\nkind = 'flops'\namount = 1e9\n", {"tokens": 1000, "flops_per_token": 1e6}, None),
        (
            "[budget]\nkind = 'flops'\namount = 1e9\n",
            {"tokens": 1300, "flops_per_token": 1e6},
            "counted 1.3e+09 FLOPs of 1e+09",
        ),
        ("[budget]\nkind = 'parameters'\namount = 40000\n", {"parameters": 40300}, None),
        ("[budget]\nkind = 'parameters'\namount = 40000\n", {"parameters": 40500}, "40,500 parameters of 40,000"),
        (
            "[budget]\nkind = 'parameters'\namount = 40000\nactive = true\n",
            {"parameters": 9, "active_parameters": 40000},
            None,
        ),
        (
            "[budget]\nkind = 'parameters'\namount = 40000\nactive = true\n",
            {"parameters": 40000},
            "1,000 active parameters of",
        ),
        ("[budget]\nkind = 'seconds'\namount = 10\n", {"tokens": 10_900, "tokens_per_second": 1000.0}, None),
        (
            "[budget]\nkind = 'seconds'\namount = 10\n",
            {"tokens": 13_000, "tokens_per_second": 1000.0},
            "trained 13.0 s of 10 s planned",
        ),
    ],
)
def test_budgets_are_checked_by_what_was_counted(
    small: Path, budget: str, change: dict[str, float], note: str | None
) -> None:
    found = judged(planner(small, f"seeds = 1\n{POST}{budget}"), lambda trial: replace(RESULT, **change))
    for row in found.rows:
        assert ([note] if note else []) == [one.split(": ", 1)[1][: len(note or "")] for one in row.notes]


def test_own_rate_and_the_references(small: Path) -> None:
    made = planner(small, f"seeds = 2\n{POST}[rates]\nfactors = [1.0, 2.0, 4.0]\n")

    def outcome(trial: Trial) -> Result:
        best = {"base": 1.0, "post": 2.0}[trial.variant]
        return replace(RESULT, loss=3.0 + abs(math.log2(trial.factor / best)) + 0.001 * trial.seed)

    rows = judged(made, outcome).rows
    assert [(row.variant, row.rate, row.factor) for row in rows] == [
        ("base", "own = reference's", 1.0), ("post", "own", 2.0), ("post", "reference's", 1.0),
    ]  # fmt: skip
    assert [round(row.loss) for row in rows] == [3, 3, 4]
    assert [row.verdict for row in rows] == ["reference", "within noise", "worse"]
    assert "edge" in rows[0].notes[0] and not rows[1].notes


def test_an_unfinished_experiment_has_a_table(small: Path) -> None:
    found = judged(planner(small, f"seeds = 3\n{POST}"), lambda trial: by_losses(trial) if trial.seed < 1 else None)
    assert [row.seeds for row in found.rows] == [(1, 3), (1, 3)] and found.rows[1].verdict == "no verdict"
    empty = judged(planner(small, f"seeds = 3\n{POST}"), lambda trial: None)
    assert len(as_markdown(empty).splitlines()) > 4


def test_the_csv_has_every_number(small: Path) -> None:
    found = judged(planner(small, f"seeds = 3\n{POST}"), by_losses)
    read = list(csv.DictReader(io.StringIO(as_csv(found))))
    assert [row["variant"] for row in read] == ["base", "post"] and float(read[1]["loss"]) == found.rows[1].loss
    assert float(read[1]["flops_per_token"]) == 6000 and read[0]["difference"] == ""
    json.dumps(as_records(found), allow_nan=False)


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.opened: list[str] = []
        self.words: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.opened.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def write_metrics(trial: Trial, losses: list[float]) -> None:
    trial.folder.mkdir(parents=True)
    lines = [
        {
            "kind": "validation",
            "step": 8 * n,
            "loss": loss,
            "bits_per_byte": loss / 2,
            "tokens": 1024 * n,
            "seconds": 1.0 * n,
        }
        for n, loss in enumerate(losses, start=1)
    ]
    (trial.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_report_needs_nothing_but_itself_and_shows_all_of_it(small: Path) -> None:
    text = f"seeds = 3\nquestion = 'Is <b> & that better?'\ntarget_bits_per_byte = 1.6\n{POST}"
    made = planner(small, text)
    plan = made.plan(by_losses)
    for trial in plan.trials:
        end = LOSSES[trial.variant][trial.seed]
        write_metrics(trial, [end + 1, end + 0.3, end])
    page = render_report(judged(made, by_losses), plan, by_losses)
    assert "http" not in page and "<script" not in page and "@import" not in page
    read = Page()
    read.feed(page)
    words = " ".join(read.words)
    assert "Is <b> & that better?" in words and read.opened.count("svg") == 4  # differences, curves, costs, batches
    assert len(read.ids) == len(set(read.ids))
    for row in judged(made, by_losses).rows:
        assert row.variant in words and f"{row.loss:.4f}" in words
    assert "2 of 2 variants reached 1.6 bits per byte" in words
    assert "are finished" not in words
    part = render_report(judged(made, lambda t: None), made.plan(lambda t: None), lambda t: None)
    assert "0 of 6 runs are finished" in part

    folder = small / "pictures"
    write_pictures(judged(made, by_losses), plan, by_losses, folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "batches.png",
        "costs.png",
        "curves.png",
        "differences.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.iterdir())
    write_pictures(judged(made, lambda t: None), made.plan(lambda t: None), lambda t: None, folder)
    assert [path.name for path in folder.iterdir()] == ["batches.png"]  # drawn from curves, which are still there


def test_an_interval_is_drawn_whole_or_its_cut_is_marked(small: Path) -> None:
    found = judged(planner(small, f"seeds = 3\n{POST}"), by_losses)
    base, post = found.rows
    narrow = [replace(post, variant=f"v{n}", difference=Difference(0.001 * n, -0.04, 0.05, 3)) for n in range(3)]
    wild = replace(post, variant="wild", difference=Difference(0.01, -5.0, 0.02, 3))
    figure = differences_figure(replace(found, rows=(base, *narrow, wild)))
    assert figure is not None
    lines = figure.axes[0].lines
    drawn = [list(line.get_xdata()) for line in lines if len(line.get_xdata()) == 2 and line.get_marker() == "None"]
    assert drawn.count([-0.04, 0.05]) == 3
    cut = [line for line in lines if line.get_marker() in ("<", ">")]
    assert [line.get_marker() for line in cut] == ["<"] and -1 < cut[0].get_xdata()[0] < -0.1


def test_a_rate_at_which_a_variant_breaks_is_a_cross() -> None:
    choices = {
        "base": Choice(1.0, {0.5: 3.0, 1.0: 2.5, 2.0: 2.7}, False),
        "none": Choice(0.5, {0.5: 3.1, 1.0: math.inf, 2.0: math.nan}, True),
    }
    figure = rates_figure(choices, ["base", "none"])
    assert figure is not None
    axes = figure.axes[0]
    crosses = [list(line.get_xdata()) for line in axes.lines if line.get_marker() == "x"]
    assert (
        crosses[0] == [] and crosses[1] == pytest.approx([1.0, 2.0], rel=0.05) and "×: broken" in axes.get_xlabel()
    )
    lines = [
        list(line.get_ydata()) for line in axes.lines if line.get_marker() == "o" and len(line.get_xdata()) > 1
    ]
    assert lines == [[3.0, 2.5, 2.7]] and [3.1] in [list(line.get_ydata()) for line in axes.lines]


def test_a_slow_seed_does_not_stretch_the_axis_of_seconds(small: Path) -> None:
    """Seconds are those of the fastest seed: what slowed another from outside is not the choice's doing."""
    plan = planner(small, f"seeds = 2\n{POST}").plan(by_losses)
    trials = [trial for trial in plan.trials if trial.variant == "post"]
    for trial in trials:
        write_metrics(trial, [4.0 + trial.seed, 3.0, 2.0 + trial.seed])
    found = band(
        trials, "seconds", lambda t: replace(RESULT, tokens_per_second=100.0 / (1 + t.seed)), "nats per token"
    )
    assert found is not None
    seconds, mean, low, high = found
    assert (seconds[0], seconds[-1]) == (1024 / 100, 3 * 1024 / 100)
    assert (mean[0], low[0], high[0]) == (4.5, 4.0, 5.0) and (mean[-1], low[-1], high[-1]) == (2.5, 2.0, 3.0)


def lines_of(comparison: Comparison) -> dict[str, list[tuple[float, float]]]:
    """Label → points of the sweep's picture."""
    figure = sweep_figure(comparison)
    assert figure is not None
    found = {}
    for bars in figure.axes[0].containers:
        line = bars.lines[0]
        found[str(bars.get_label())] = [(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)]
    return found


def test_a_sweep_is_drawn_over_the_number_swept(small: Path) -> None:
    """The recipe as it is (weight decay 0.1, cosine) takes its place among the points; what diverged is a cross, not a point."""
    text = (
        "seeds = 2\n[sweep.fields]\noptim.weight_decay = [0.0, 0.3, 1.0]\noptim.schedule = ['cosine', 'constant']\n"
    )
    made = planner(small, text)

    def outcome(trial: Trial) -> Result:
        optim = trial.recipe.optim
        loss = optim.weight_decay + (optim.schedule == "constant")
        return replace(RESULT, loss=math.nan if loss == 2 else loss + trial.seed)

    base = made.experiment.reference.recipe.optim
    found = judged(made, outcome)
    drawn = lines_of(found)
    cosine = sorted([(x, x + 0.5) for x in (0.0, 0.3, 1.0, base.weight_decay)])
    assert base.schedule == "cosine" and drawn["schedule = cosine"] == [pytest.approx(point) for point in cosine]
    assert drawn["schedule = constant"][:2] == [pytest.approx((0.0, 1.5)), pytest.approx((0.3, 1.8))]
    figure = sweep_figure(found)
    assert figure is not None and figure.axes[0].get_xscale() == "symlog"
    crosses = [line for line in figure.axes[0].lines if line.get_marker() == "x"]
    assert [list(line.get_xdata()) for line in crosses] == [[], [1.0]]
    assert "diverged or failed" in figure.axes[0].get_xlabel()


def test_two_points_or_words_are_no_sweep_to_draw_and_draws_have_no_lines(small: Path) -> None:
    for fields in ("optim.lr = [0.5]", "optim.schedule = ['constant', 'linear', 'wsd']"):
        made = planner(small, f"seeds = 1\n[sweep.fields]\n{fields}\n")
        assert sweep_figure(judged(made, lambda trial: RESULT)) is None
    assert sweep_figure(judged(planner(small, f"seeds = 1\n{POST}"), lambda trial: RESULT)) is None
    for fields in (
        "model.preset = ['llama-3-tiny', 'gemma-3-tiny', 'mixtral-tiny']",
        "generate.stop = [[], ['<|endoftext|>']]",
    ):
        assert (
            sweep_figure(judged(planner(small, f"seeds = 1\n[sweep.fields]\n{fields}\n"), lambda trial: RESULT))
            is None
        )
    widths = planner(
        small, "seeds = 1\n[sweep.fields]\nmodel.d_ff = [16, 32, 64]\n"
    )  # the recipe as it is has None
    figure = sweep_figure(judged(widths, lambda trial: RESULT))
    assert figure is not None and list(figure.axes[0].containers[0].lines[0].get_xdata()) == [16, 32, 64]
    ranges = "{low = 1e-4, high = 1e-1, log = true}"
    text = f"seeds = 1\n[sweep]\nkind = 'random'\nsamples = 6\n[sweep.fields]\noptim.lr = {ranges}\noptim.eps = {ranges}\n"
    figure = sweep_figure(judged(planner(small, text), lambda trial: RESULT))
    assert figure is not None and figure.axes[0].get_xscale() == "log"
    (bars,) = figure.axes[0].containers
    assert bars.lines[0].get_linestyle() == "None" and len(bars.lines[0].get_xdata()) == 7


# --- results ---------------------------------------------------------------------------------------------------------


def test_results_are_read_back_by_their_key_alone(tmp_path: Path) -> None:
    result = replace(RESULT, key="a", loss=math.nan, grad_norm_max=math.inf)
    Failure("a", "broke").save(tmp_path)
    assert load_outcome(tmp_path, "a") == Failure("a", "broke")
    result.save(tmp_path)
    found = load_outcome(tmp_path, "a")
    assert isinstance(found, Result) and found.diverged and found.grad_norm_max == math.inf
    assert replace(found, loss=0.0) == replace(result, loss=0.0)
    assert load_outcome(tmp_path, "b") is None and load_outcome(tmp_path / "none", "a") is None
    (tmp_path / "result.json").write_text('{"key": "a"}')
    with pytest.raises(Exception, match="damaged or of another version"):
        load_outcome(tmp_path, "a")


def test_spikes_are_jumps_above_the_usual_noise() -> None:
    chance = np.random.default_rng(0)
    calm = list(4 * np.exp(-np.arange(200) / 60) + 2 + 0.02 * chance.standard_normal(200))
    assert count_spikes(calm) == 0
    assert count_spikes([*calm[:90], 5.0, *calm[91:]]) == 1
    lasting = [*calm[:90], *(x + 1.5 for x in calm[90:94]), *calm[94:]]
    assert count_spikes(lasting) == 1
    assert count_spikes([*calm[:50], math.nan, *calm[51:90], 6.0, *calm[91:]]) == 2
    assert count_spikes([]) == 0 and count_spikes([math.inf]) == 1 and count_spikes([3.0]) == 0


def test_a_run_without_metrics_has_an_empty_curve(tmp_path: Path) -> None:
    assert all(len(values) == 0 for values in curve_of(tmp_path).values())
