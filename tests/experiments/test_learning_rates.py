"""A rising learning rate: what is read off a curve, and a real run of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from scratchlm.cli import main
from scratchlm.config import load_recipe
from scratchlm.errors import UserError
from scratchlm.experiments.learning_rates import read_off, rising, smoothed
from scratchlm.optim import lr_multiplier


def curve(losses: list[float], low: float = 1e-5, high: float = 10.0) -> list[dict[str, object]]:
    rates = np.geomspace(low, high, len(losses))
    return [
        {"kind": "train", "step": n + 1, "lr": float(r), "loss": x}
        for n, (r, x) in enumerate(zip(rates, losses, strict=True))
    ]


def test_the_three_rates_of_a_typical_curve() -> None:
    """Flat, then down most steeply at 10⁻³, least at 10⁻¹·⁵, broken from about 10⁻⁰·⁵ on (smoothed, a little later)."""
    exponents = np.linspace(-5, 1, 601)
    losses = 9 - 3 / (1 + np.exp(-4 * (exponents + 3))) + 4 * np.maximum(0, exponents + 1.5) ** 2
    found = read_off(curve(list(losses)))
    assert math.log10(found.steepest) == pytest.approx(-3, abs=0.2)
    assert math.log10(found.least) == pytest.approx(-1.4, abs=0.3)
    assert found.edge is not None and math.log10(found.edge) == pytest.approx(-1.0, abs=0.25)
    assert found.suggested == pytest.approx(min(found.edge / 3, found.least)) and not found.non_finite


def test_a_run_that_never_breaks_and_one_that_ends() -> None:
    falling = curve(list(np.linspace(9, 3, 60)))
    found = read_off(falling)
    assert found.edge is None and found.suggested == found.least == pytest.approx(10.0)
    event = {"kind": "event", "step": 61, "message": "loss nan, gradient norm nan: step skipped (1 in a row)"}
    found = read_off([*falling, event])
    assert found.non_finite and found.edge == pytest.approx(10.0)
    with pytest.raises(UserError, match="only 5 steps before training broke"):
        read_off(falling[:5])


def test_smoothing_starts_unbiased() -> None:
    assert smoothed([4.0, 4.0, 4.0]) == pytest.approx([4, 4, 4])
    assert smoothed([1.0, 2.0])[1] == pytest.approx((0.9 * 0.1 * 1 + 0.1 * 2) / 0.19)


def test_the_rates_rise_by_equal_factors(small: Path) -> None:
    recipe = rising(load_recipe("small.toml"), 0.01, 100.0, 41)
    rates = [recipe.optim.lr * lr_multiplier(step, 41, recipe.optim) for step in range(41)]
    own = load_recipe("small.toml").optim
    assert (rates[0], rates[-1]) == pytest.approx((own.lr * 0.01, own.lr * 100))
    assert np.diff(np.log(rates)) == pytest.approx(np.full(40, math.log(1e4) / 40))
    assert recipe.optim.muon_lr == pytest.approx(100 * own.muon_lr)
    assert recipe.folder == Path("runs/small-lr")
    with pytest.raises(UserError, match="above 0 and below"):
        rising(load_recipe("small.toml"), 3, 2, 41)
    with pytest.raises(UserError, match="the most there is is 1000"):
        rising(load_recipe("small.toml"), 1, 1e6, 41)


def test_a_run_to_the_end_that_breaks(small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["lr", "small.toml", "--rise-steps", "60", "--low", "0.01", "--high", "1e5", "--optim.optimizer", "sgd", "--optim.muon-lr", "0.001",
               "--optim.grad-clip", "0", "--optim.lr", "0.01"]  # fmt: skip
    assert main(command) == 0
    out = capfd.readouterr().out
    found = json.loads((small / "runs/small-lr/lr.json").read_text())
    assert found["edge"] is not None and f"optim.lr = {found['suggested']:.3g}" in out
    assert found["suggested"] < found["edge"]
    assert (small / "runs/small-lr/lr.png").read_bytes().startswith(b"\x89PNG")
    metrics = (small / "runs/small-lr/metrics.jsonl").read_bytes()
    assert main(command) == 0, "the run is there: it is only read"
    assert (small / "runs/small-lr/metrics.jsonl").read_bytes() == metrics
    assert json.loads((small / "runs/small-lr/lr.json").read_text()) == found


def test_bad_input(small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for command, message in (
        (["lr"], "which recipe"),
        (["lr", "none.toml"], "does not exist"),
        (["lr", "--low", "1"], "name the recipe first"),
        (["lr", "small.toml", "--hihg", "3"], "unknown option --hihg"),
        (["lr", "small.toml", "--low", "9", "--high", "1"], "below --high"),
    ):
        assert main(command) == 2
        assert message in capfd.readouterr().err
    assert not (small / "runs").exists()
