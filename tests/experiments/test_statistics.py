"""Verdicts are wrong as often as they say: coverage of the intervals on made-up results with known differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scratchlm.experiments.statistics import LEVEL, mean_and_error, paired_difference, widening

TRIALS = 2000


def made_up(chance: np.random.Generator, seeds: int, difference: float) -> tuple[np.ndarray, np.ndarray]:
    """Losses of two variants: a part of the noise is the seed's and common to both."""
    common = 3.0 + 0.05 * chance.standard_normal(seeds)
    noise = 0.01 * chance.standard_normal((2, seeds))
    return common + noise[0] + difference, common + noise[1]


@pytest.mark.parametrize("seeds", [2, 3, 4, 5, 7, 12])
def test_equal_choices_look_different_as_rarely_as_stated(seeds: int) -> None:
    chance = np.random.default_rng(seeds)
    found = [paired_difference(*made_up(chance, seeds, 0.0)) for _ in range(TRIALS)]
    wrong = sum(one.verdict != "within noise" for one in found) / TRIALS
    error = math.sqrt(LEVEL * (1 - LEVEL) / TRIALS)
    assert wrong == pytest.approx(1 - LEVEL, abs=4 * error + 0.005)  # 0.005: the factor itself is simulated
    sides = [one.verdict for one in found]
    assert abs(sides.count("better") - sides.count("worse")) < 5 * math.sqrt(TRIALS * wrong)


@pytest.mark.parametrize(("seeds", "seen"), [(3, 0.55), (5, 0.97), (8, 0.99)])
def test_a_true_difference_is_seen(seeds: int, seen: float) -> None:
    """Of three standard deviations of the noise of one difference, with its sign."""
    chance = np.random.default_rng(1)
    shift = -3 * 0.01 * math.sqrt(2)
    found = [paired_difference(*made_up(chance, seeds, shift)) for _ in range(400)]
    assert sum(one.verdict == "better" for one in found) / 400 > seen
    assert not any(one.verdict == "worse" for one in found)
    covered = sum(one.low <= shift <= one.high for one in found) / 400
    assert covered > LEVEL - 0.04


def test_pairing_takes_out_what_the_seed_does_to_both() -> None:
    chance = np.random.default_rng(2)
    variant, base = made_up(chance, 5, -0.02)
    assert paired_difference(variant, base).verdict == "better"
    shuffled = paired_difference(variant, np.roll(base, 1))
    assert shuffled.high - shuffled.low > 3 * (
        paired_difference(variant, base).high - paired_difference(variant, base).low
    )


def test_two_seeds_are_student_s_interval() -> None:
    one = paired_difference([1.0, 1.2], [0.0, 0.0])
    half = 12.706 * 0.1  # t₀.₉₇₅ with one degree of freedom, s / √2 = 0.1
    assert (one.mean, one.low, one.high) == pytest.approx((1.1, 1.1 - half, 1.1 + half))


def test_few_results() -> None:
    assert paired_difference([1.0], [2.0]).verdict == "no verdict"
    assert paired_difference([], []).pairs == 0
    assert paired_difference([1.0, 1.0], [1.0, 1.0]).verdict == "within noise"
    assert paired_difference([0.5, 0.5, 0.5], [1.0, 1.0, 1.0]).verdict == "better"
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_difference([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="no spread"):
        widening(1)
    assert math.isnan(mean_and_error([])[0]) and math.isnan(mean_and_error([1.0])[1])
    assert mean_and_error([1.0, 3.0]) == (2.0, pytest.approx(1.0))


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=9), st.floats(-5, 5), st.floats(0.01, 100))
def test_it_moves_and_stretches_with_the_differences(differences: list[float], shift: float, scale: float) -> None:
    zeros = [0.0] * len(differences)
    one = paired_difference(differences, zeros)
    assert one.low <= one.mean + 1e-12 and one.mean <= one.high + 1e-12
    other = paired_difference([scale * d + shift for d in differences], zeros)
    wanted = [scale * value + shift for value in (one.mean, one.low, one.high)]
    assert [other.mean, other.low, other.high] == pytest.approx(wanted, abs=1e-6 * (1 + scale))


def test_the_factor_falls_with_the_number_of_pairs_to_one() -> None:
    factors = [widening(pairs) for pairs in range(2, 200)]
    assert factors == sorted(factors, reverse=True) and 1 < factors[-1] < 1.02
