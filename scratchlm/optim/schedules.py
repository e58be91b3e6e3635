"""Learning-rate schedules: the share of the peak at each step."""

from __future__ import annotations

import math
from collections.abc import Callable

from scratchlm.config import OptimConfig
from scratchlm.errors import UserError

_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "sqrt": lambda progress: 1 - math.sqrt(progress),
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
}
"""From 1 to 0 while the decay progresses from 0 to 1."""


def lr_multiplier(step: int, total_steps: int, config: OptimConfig) -> float:
    """The learning rate of optimizer step `step`, as a multiple of its peak.

    Let t = step + 1 count steps from one, W = `warmup_steps`, T = `total_steps`, r = `min_lr_ratio`:

    ========  ==================================================================================================
    warm-up   t / W while t ≤ W: the first step has 1/W, step W − 1 the peak
    constant  1
    linear    1 − (1 − r) p with p = (t − W) / (T − W)
    cosine    r + (1 − r) (1 + cos πp) / 2 (Loshchilov & Hutter 2017, without restarts)
    wsd       1, then r + (1 − r) f(p) over the last D = round(`decay_fraction` · T) steps (Hu et al. 2024), never
              starting before the warm-up ends; p = (t − (T − D)) / D, f by `decay_shape`:

              linear 1 − p, sqrt 1 − √p (Hägele et al. 2024, arXiv 2405.18392), cosine (1 + cos πp) / 2
    rise      r^(1 − q) with q = (t − W − 1) / (T − W − 1): from r up to 1 by equal factors, to find where training breaks
              (Smith 2017, arXiv 1506.01186, §3.3, there linearly)
    ========  ==================================================================================================

    So the last step, T − 1, has exactly r, the first one of the decay to have it (except under ``constant``, ``rise``, and ``wsd`` with D = 0); steps
    beyond it keep that value. With r = 0 the last step therefore leaves the weights as they are. A warm-up that is longer
    than the run is just cut off. With ``total_steps`` = 0 no step is ever taken; the value is the warm-up's or r.

    Args:
        step: 0-based.
        total_steps: steps of the whole run.
        config: the schedule's fields.

    Raises:
        UserError: an unknown schedule or shape, or a negative `step` or `total_steps`.
    """
    if step < 0 or total_steps < 0:
        raise UserError(f"step = {step} and total_steps = {total_steps} must be at least 0")
    t = step + 1
    warmup = config.warmup_steps
    if t <= warmup:
        return t / warmup
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "rise":
        if not config.min_lr_ratio:
            raise UserError("optim.schedule = rise begins at min_lr_ratio times the peak: set it above 0")
        rising = total_steps - warmup - 1
        return config.min_lr_ratio ** (1 - min((t - warmup - 1) / rising, 1.0)) if rising > 0 else 1.0
    decay = total_steps - warmup
    shape: str = config.schedule
    if shape == "wsd":
        shape = config.decay_shape
        if shape not in _SHAPES:
            raise UserError(f"optim.decay_shape = {shape!r} is unknown; allowed: {', '.join(_SHAPES)}")
        decay = min(decay, round(config.decay_fraction * total_steps))
    elif shape not in ("cosine", "linear"):
        raise UserError(
            f"optim.schedule = {config.schedule!r} is unknown; allowed: cosine, linear, wsd, constant, rise"
        )
    if decay > 0:
        progress = min(max((t - (total_steps - decay)) / decay, 0.0), 1.0)
    else:  # nothing to decay over: wsd stays at the peak, the others are past their end
        progress = 0.0 if config.schedule == "wsd" else 1.0
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * _SHAPES[shape](progress)
