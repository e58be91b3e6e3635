"""One progress bar for everything that takes long, so that all of them look and behave alike."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress(
    iterable: Iterable[Any] | None = None,
    *,
    description: str,
    total: float | None = None,
    unit: str = "it",
    bytes_: bool = False,
    initial: int = 0,
    show: bool = True,
    leave: bool = True,
) -> tqdm:
    """A tqdm bar on standard error.

    Args:
        iterable: what to walk over; without it call ``bar.update(n)`` and ``bar.close()``.
        description: what is being done, e.g. ``"tokenise"``.
        total: how many units there are, if known.
        unit: name of one unit.
        bytes_: the unit is bytes: scale to kB, MB, GB.
        initial: units done before (a resumed job).
        show: False for silence (library callers, workers).
        leave: False: the bar vanishes when it is done, as one inside another bar should.
    """
    # A bar that redraws ten times a second floods a log file: without a terminal it prints every few seconds.
    terminal = os.isatty(2)
    return tqdm(
        iterable,
        desc=description,
        total=total,
        unit="B" if bytes_ else unit,
        unit_scale=bytes_,
        initial=initial,
        disable=not show,
        leave=leave,
        mininterval=0.2 if terminal else 10.0,
        dynamic_ncols=terminal,
    )
