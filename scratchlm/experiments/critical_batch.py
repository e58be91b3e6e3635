"""How large a batch pays: tokens to a given loss against the batch's size, and the critical batch size.

With a larger batch a run needs fewer steps S and more tokens E to reach the same loss. McCandlish et al. 2018 (arXiv 1812.06162, eq. 2.11)
find that the two trade as ::

    (S / S_min − 1) (E / E_min − 1) = 1        ⇔        E = E_min (1 + B / B_crit)      with B = E / S tokens per step

so the tokens grow linearly in the batch: a line through (B, E) has E_min where B = 0 and twice that at the critical batch size. Below it a
larger batch costs little; above it most of what is added is wasted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class CriticalBatch:
    """The fitted line.

    Attributes:
        critical: B_crit, tokens per step; infinite where more tokens are not needed with larger batches.
        least_tokens: E_min.
        low, high: of B_crit over bootstrap draws of the seeds, the middle 90 %; NaN with one seed.
    """

    critical: float
    least_tokens: float
    low: float
    high: float


def tokens_to(tokens: np.ndarray, losses: np.ndarray, target: float) -> float:
    """Tokens at which a curve first reaches `target`, linear between its points; NaN where it does not.

    Args:
        tokens, losses: of validations, in order.
        target: in the unit of the losses.
    """
    below = np.flatnonzero(losses <= target)
    if not len(below):
        return math.nan
    at = int(below[0])
    if at == 0:
        return float(tokens[0])
    share = (losses[at - 1] - target) / (losses[at - 1] - losses[at])
    return float(tokens[at - 1] + share * (tokens[at] - tokens[at - 1]))


def fit_critical_batch(batches: Sequence[float], tokens: Sequence[Sequence[float]]) -> CriticalBatch | None:
    """Fit the line; every batch's relative error counts alike.

    Args:
        batches: tokens per step.
        tokens: of each batch, the tokens to the target by seed; NaN where it was not reached.

    Returns:
        None where fewer than three batches reached the target, or the line makes no sense.
    """
    table = [
        (size, [value for value in found if math.isfinite(value)])
        for size, found in zip(batches, tokens, strict=True)
    ]
    table = [(size, found) for size, found in table if found]
    if len(table) < 3:
        return None
    line = _line([size for size, _ in table], [float(np.mean(found)) for _, found in table])
    if line is None:
        return None
    chance = np.random.default_rng(0)
    drawn = []
    if any(len(found) > 1 for _, found in table):
        for _ in range(1000):
            means = [float(np.mean(chance.choice(found, len(found)))) for _, found in table]
            if (again := _line([size for size, _ in table], means)) is not None:
                drawn.append(again[0])
    low, high = (
        (float(q) for q in np.quantile(drawn, [0.05, 0.95], method="nearest")) if drawn else (math.nan, math.nan)
    )
    return CriticalBatch(line[0], line[1], low, high)


def _line(sizes: Sequence[float], tokens: Sequence[float]) -> tuple[float, float] | None:
    """(B_crit, E_min) by least squares of the relative error."""
    weights = 1 / np.asarray(tokens)
    matrix = np.stack([weights, weights * np.asarray(sizes)], axis=1)
    (least, slope), *_ = np.linalg.lstsq(matrix, np.ones(len(sizes)), rcond=None)
    if least <= 0:
        return None
    return (float(least / slope) if slope > 0 else math.inf), float(least)
