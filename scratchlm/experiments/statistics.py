"""Is a difference between two choices more than noise? Means over seeds, and a paired bootstrap that stays honest with few of them.

Both choices are trained with the same seeds: same order of the data, initial weights from the same generator. What a seed does to
both alike falls out of the differences::

    seed        0        1        2
    variant   3.071    3.064    3.080
    base      3.090    3.085    3.092
    d        −0.019   −0.021   −0.012   ──► draw three of the three, with replacement, again and again: their means
                                        ──► interval of the middle 95 %, widened by what the bootstrap is known to lack

The bootstrap (Efron 1979) draws from k points and cannot see beyond them: with three seeds its 95 % interval holds the truth in
79 % of all cases. So it is calibrated (Loh 1987, "Calibrating confidence coefficients"): the factor that makes the interval hold the
truth in 95 % when differences are normal is known by simulation, 2.7 for three seeds, 1.2 for ten. With two seeds it is Student's 12.7:
hardly anything can be shown with two, and that is as it is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

Verdict = Literal["better", "worse", "within noise", "no verdict"]

LEVEL = 0.95
"""Share of cases in which an interval holds the true difference, so that 1 − LEVEL of equal choices look unequal."""

_WIDENING = {
    2: 12.706,
    3: 2.706,
    4: 1.966,
    5: 1.628,
    6: 1.454,
    8: 1.312,
    10: 1.230,
    16: 1.139,
    30: 1.065,
    1000: 1.0,
}
"""Pairs → factor on the bootstrap's interval for 95 %; simulated with 40,000 draws each (standard error 1 %), 2 by Student's t."""

_EXACT = 6
"""Up to so many pairs every draw there is is counted; beyond, `_DRAWS` random ones stand for them."""
_DRAWS = 20_000


@dataclass(frozen=True)
class Difference:
    """Variant minus base, over the seeds that both have.

    Attributes:
        mean: of the differences; NaN without a pair.
        low, high: interval at :data:`LEVEL`; infinite with a single pair.
        pairs: how many seeds.
    """

    mean: float
    low: float
    high: float
    pairs: int

    @property
    def verdict(self) -> Verdict:
        """Lower is better; "no verdict" with fewer than two pairs."""
        if self.pairs < 2:
            return "no verdict"
        return "better" if self.high < 0 else "worse" if self.low > 0 else "within noise"


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error, s / √n with s² over n − 1; the error is NaN for one value, both for none."""
    array = np.asarray(values, dtype=np.float64)
    if not len(array):
        return math.nan, math.nan
    error = float(array.std(ddof=1)) / math.sqrt(len(array)) if len(array) > 1 else math.nan
    return float(array.mean()), error


def paired_difference(variant: Sequence[float], base: Sequence[float]) -> Difference:
    """Compare results with the same seeds, place by place.

    Args:
        variant, base: a finite result per seed, in the same order of seeds.

    Raises:
        ValueError: they differ in length.
    """
    if len(variant) != len(base):
        raise ValueError(f"{len(variant)} results cannot be paired with {len(base)}")
    found = np.asarray(variant, dtype=np.float64) - np.asarray(base, dtype=np.float64)
    pairs = len(found)
    if pairs == 0:
        return Difference(math.nan, -math.inf, math.inf, 0)
    mean = float(found.mean())
    if pairs == 1:
        return Difference(mean, -math.inf, math.inf, 1)
    low, high = _quantiles(found - mean)
    factor = widening(pairs)
    return Difference(mean, mean + factor * low, mean + factor * high, pairs)


def widening(pairs: int) -> float:
    """The calibration's factor: between the simulated numbers of pairs linear in 1 / pairs.

    Raises:
        ValueError: fewer than two pairs.
    """
    if pairs < 2:
        raise ValueError("one pair has no spread")
    known = sorted(_WIDENING)
    return float(np.interp(-1 / pairs, [-1 / number for number in known], [_WIDENING[number] for number in known]))


def _quantiles(centred: np.ndarray) -> tuple[float, float]:
    """The bootstrap's quantiles (1 ∓ LEVEL) / 2 of the mean of as many draws as there are `centred` differences."""
    counts, weights = _draws(len(centred))
    means = counts @ centred / len(centred)
    order = np.argsort(means)
    below = np.cumsum(weights[order])
    tail = (1 - LEVEL) / 2
    low, high = np.searchsorted(below, [tail - 1e-12, 1 - tail - 1e-12])
    return float(means[order[low]]), float(means[order[high]])


@cache
def _draws(number: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each of `number` points is drawn, (draws, number), and the probability of each draw."""
    if number > _EXACT:
        counts = np.random.default_rng(0).multinomial(number, [1 / number] * number, size=_DRAWS)
        return counts.astype(np.float64), np.full(_DRAWS, 1 / _DRAWS)
    rows = [
        np.bincount(chosen, minlength=number)
        for chosen in itertools.combinations_with_replacement(range(number), number)
    ]
    ways = [math.factorial(number) / math.prod(math.factorial(int(times)) for times in row) for row in rows]
    return np.array(rows, dtype=np.float64), np.array(ways) / float(number) ** number
