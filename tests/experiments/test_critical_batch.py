"""The critical batch size is recovered from points that lie on the law, and from noisy ones nearly."""

from __future__ import annotations

import math

import numpy as np
import pytest

from scratchlm.experiments.critical_batch import fit_critical_batch, tokens_to

SIZES = [512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16_384.0]


def on_the_law(least: float, critical: float) -> list[float]:
    """E with (S / S_min − 1)(E / E_min − 1) = 1, S_min = E_min / B_crit, S = E / B: solved for E by bisection, not by the line."""
    found = []
    for size in SIZES:
        low, high = least * (1 + 1e-12), least * 1e6
        for _ in range(200):
            tokens = (low + high) / 2
            if (tokens / size / (least / critical) - 1) * (tokens / least - 1) < 1:
                low = tokens
            else:
                high = tokens
        found.append(low)
    return found


def test_the_law_is_recovered() -> None:
    tokens = on_the_law(1e6, 3000.0)
    found = fit_critical_batch(SIZES, [[value] for value in tokens])
    assert found is not None
    assert (found.critical, found.least_tokens) == pytest.approx((3000.0, 1e6), rel=1e-6)
    assert math.isnan(found.low)


def test_noise_gives_an_interval_around_it() -> None:
    chance = np.random.default_rng(0)
    tokens = [
        [value * math.exp(0.03 * chance.standard_normal()) for _ in range(4)] for value in on_the_law(1e6, 3000.0)
    ]
    found = fit_critical_batch(SIZES, tokens)
    assert found is not None and found.low < 3000 < found.high and found.high / found.low < 1.6


def test_what_cannot_be_fitted() -> None:
    assert fit_critical_batch(SIZES[:3], [[1e6], [math.nan], [2e6]]) is None
    flat = fit_critical_batch(SIZES, [[1e6 - size] for size in SIZES])
    assert flat is not None and math.isinf(flat.critical)
    assert fit_critical_batch([100, 200, 300], [[1.0], [1000.0], [3000.0]]) is None  # would need less than no token


def test_tokens_to_a_target() -> None:
    tokens, losses = np.array([10.0, 20.0, 30.0]), np.array([3.0, 2.0, 2.5])
    assert tokens_to(tokens, losses, 2.5) == 15.0
    assert tokens_to(tokens, losses, 3.0) == 10.0
    assert math.isnan(tokens_to(tokens, losses, 1.0)) and math.isnan(tokens_to(tokens[:0], losses[:0], 1.0))
