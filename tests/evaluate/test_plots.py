"""Loss curves: what is drawn, read back from matplotlib's own objects, and the picture's file."""

from __future__ import annotations

import math
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from scratchlm.errors import UserError
from scratchlm.evaluate import plots
from scratchlm.evaluate.plots import bits_per_byte_per_nat, loss_figure, plot_loss, png_bytes, smooth
from scratchlm.train.metrics import MetricsFile

YARDSTICKS = {"gzip -9": 2.0, "xz -9e": 1.5}


def run(steps: int = 100, per_step: float = 0.5) -> list[dict]:
    records: list[dict] = []
    for step in range(1, steps + 1):
        loss = 2 + 6 / step
        records.append({"kind": "train", "step": step, "loss": loss, "seconds": step * per_step})
        if step % 10 == 0:
            records.append(
                {
                    "kind": "validation",
                    "step": step,
                    "loss": loss,
                    "bits_per_byte": loss / 2,
                    "seconds": step * per_step,
                }
            )
    return [*records, {"kind": "event", "step": steps, "message": "done"}]


def curve(axes, label: str):
    (line,) = [line for line in axes.lines if str(line.get_label()).startswith(label)]
    return line


def test_two_panels_show_the_data_by_step_and_by_time() -> None:
    by_step, by_time = loss_figure(run(), YARDSTICKS).axes
    assert by_step.get_xlabel() == "optimizer steps" and by_time.get_xlabel() == "training time (seconds)"
    for axes, scale in ((by_step, 1.0), (by_time, 0.5)):
        steps = np.arange(10, 101, 10)
        assert axes.get_ylabel() == "loss (nats per token)" and axes.get_title(loc="left")
        np.testing.assert_allclose(
            curve(axes, "validation").get_xydata(), np.stack([steps * scale, 2 + 6 / steps], 1)
        )
        raw = axes.lines[0]  # faint, and under the smoothed one
        np.testing.assert_allclose(raw.get_ydata(), 2 + 6 / np.arange(1, 101))
        assert raw.get_alpha() < 0.5
        smoothed = curve(axes, "training (smoothed)")
        np.testing.assert_allclose(smoothed.get_ydata(), smooth(raw.get_ydata()))
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        assert labels == [
            "training (smoothed)",
            "validation: best 2.060 = 1.030 bits/byte",
            "gzip -9: 2.00 bits/byte",
            "xz -9e: 1.50 bits/byte",
        ]


def test_second_axis_and_yardsticks_are_in_bits_per_byte() -> None:
    figure = loss_figure(run(), YARDSTICKS)
    png_bytes(figure)  # only a drawn figure has settled where its axes lie
    axes = figure.axes[0]
    (second,) = axes.child_axes
    assert second.get_ylabel().endswith("bits per byte")
    np.testing.assert_allclose(second.get_ylim(), np.array(axes.get_ylim()) / 2)
    # On this text a nat per token is half a bit per byte: 2 bits per byte lie at a loss of 4.
    assert set(curve(axes, "gzip -9").get_ydata()) == {4.0} and set(curve(axes, "xz -9e").get_ydata()) == {3.0}
    low, high = axes.get_ylim()
    assert low < 2.06 and high > 4.0


def test_without_validation_there_is_no_bits_axis_and_no_yardstick() -> None:
    records = [record for record in run() if record["kind"] == "train"]
    axes = loss_figure(records, YARDSTICKS).axes[0]
    assert not axes.child_axes and len(axes.lines) == 2
    assert bits_per_byte_per_nat(records) is None


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("layout", ["wide", "tall"])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 121])
def test_any_number_of_records_gives_a_picture(theme, layout, count: int) -> None:
    image = imread(
        BytesIO(png_bytes(loss_figure(run()[-count:] if count else [], theme=theme, layout=layout), dpi=40))
    )
    height, width = image.shape[:2]
    assert (width > height) == (layout == "wide")
    assert (image[0, 0, :3].mean() > 0.5) == (theme == "light")  # the page's colour, not a white box on black
    assert image[..., :3].std() > 0.01  # something is drawn


def test_single_records_are_visible_as_markers() -> None:
    axes = loss_figure([{"kind": "train", "step": 1, "loss": 3.0, "seconds": 1.0}]).axes[0]
    assert curve(axes, "training").get_marker() == "o"
    axes = loss_figure([{"kind": "validation", "step": 1, "loss": 3.0, "seconds": 1.0}]).axes[0]
    assert curve(axes, "validation").get_marker() == "o"
    assert loss_figure([]).axes[0].texts[0].get_text() == "nothing logged yet"


def test_non_finite_and_incomplete_records_are_left_out() -> None:
    bad = [
        {"kind": "train", "step": 101, "loss": math.nan, "seconds": 51.0},
        {"kind": "train", "step": 102, "loss": math.inf, "seconds": 51.0},
        {"kind": "train", "step": 103},
        {"kind": "validation", "step": 104, "loss": math.nan, "bits_per_byte": math.nan, "seconds": math.nan},
    ]
    axes = loss_figure(run() + bad).axes[0]
    assert axes.lines[0].get_xdata()[-1] == 100 and curve(axes, "validation").get_xdata()[-1] == 100
    assert loss_figure(bad, YARDSTICKS).axes[0].texts  # nothing but bad ones: still a picture


@pytest.mark.parametrize(
    ("per_step", "unit", "last"), [(1, "seconds", 100), (60, "minutes", 100), (3600, "hours", 100)]
)
def test_time_has_a_readable_unit(per_step: float, unit: str, last: float) -> None:
    axes = loss_figure(run(per_step=per_step)).axes[1]
    assert axes.get_xlabel() == f"training time ({unit})" and axes.lines[0].get_xdata()[-1] == last


def test_long_runs_are_thinned_but_end_where_they_end() -> None:
    axes = loss_figure(run(steps=12_345)).axes[0]
    assert len(axes.lines[0].get_xdata()) <= plots._MOST_POINTS and axes.lines[0].get_xdata()[-1] == 12_345


def test_smoothing() -> None:
    assert len(smooth([])) == 0
    np.testing.assert_array_equal(smooth([3.0, 1.0, 2.0]), [3.0, 1.0, 2.0])  # few values: as they are
    np.testing.assert_allclose(smooth(np.full(200, 2.5)), 2.5)
    line = np.linspace(5, 1, 300)
    np.testing.assert_allclose(smooth(line), line, atol=1e-12)  # centred: no lag
    spike = line.copy()
    spike[150] = 1000
    np.testing.assert_allclose(smooth(spike), line, atol=0.02)
    noise = np.random.default_rng(0).normal(size=1000)
    assert smooth(noise).std() < 0.4
    # Medians 1, 2, 8, 3, 3 first, then their means.
    np.testing.assert_allclose(smooth([1, 9, 2, 8, 3], window=3), [1, 11 / 3, 13 / 3, 14 / 3, 3])


def test_a_spike_does_not_flatten_the_curve() -> None:
    records = run()
    records.append({"kind": "train", "step": 50, "loss": 1e4, "seconds": 25.0})
    assert loss_figure(sorted(records, key=lambda record: record["step"])).axes[0].get_ylim()[1] < 10


def test_plot_loss_writes_a_png_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with MetricsFile(tmp_path / "metrics.jsonl") as file:
        for record in run(20):
            file.log(record)
    picture = tmp_path / "loss.png"
    plot_loss(file.path, picture, YARDSTICKS, title="a run")
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and imread(BytesIO(content)).shape[1] >= 1200

    def fail(*_: object) -> bytes:
        raise RuntimeError("cut off")

    monkeypatch.setattr(plots, "png_bytes", fail)
    with pytest.raises(RuntimeError):
        plot_loss(file.path, picture)
    assert picture.read_bytes() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]
    with pytest.raises(UserError, match="does not exist"):
        plot_loss(tmp_path / "none.jsonl", picture)


def test_no_global_state_of_matplotlib_is_touched() -> None:
    import matplotlib
    import matplotlib.pyplot as plt

    backend, open_figures = matplotlib.get_backend(), plt.get_fignums()
    png_bytes(loss_figure(run(10)), dpi=40)
    assert matplotlib.get_backend() == backend and plt.get_fignums() == open_figures


def test_another_theme_lies_as_the_first_one() -> None:
    first = loss_figure(run(), YARDSTICKS)
    png_bytes(first)
    second = loss_figure(run(), YARDSTICKS, theme="dark", placed_as=first)
    png_bytes(second)
    for one, other in zip(first.axes, second.axes, strict=True):
        assert one.get_position().bounds == other.get_position().bounds
