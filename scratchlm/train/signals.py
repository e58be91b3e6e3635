"""Ctrl-C and kill while training: the step is finished first, and a checkpoint written."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """SIGINT or SIGTERM ended the training; the message says where the run will go on."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class Signals:
    """Inside, SIGINT and SIGTERM are noted rather than obeyed; a second SIGINT is a KeyboardInterrupt.

    Attributes:
        arrived: the first one, or None.
    """

    def __init__(self) -> None:
        self.arrived: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        self._before = {number: self._install(number) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            if handler is not None:
                signal.signal(number, handler)

    def _install(self, number: int) -> Any:
        """Take over a signal; None where that is impossible (outside the main thread)."""
        try:
            return signal.signal(number, self._on_signal)
        except ValueError:
            return None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.arrived is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C: now
        self.arrived = number
        if number == signal.SIGINT:  # os.write: a handler may come in the middle of another print
            os.write(
                2, b"\nscratchlm: finishing this step, then writing a checkpoint; Ctrl-C again stops at once\n"
            )
