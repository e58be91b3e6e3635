"""Model FLOPs utilisation: the part of a device's peak that a training step turns into the model's own products.

MFU = (FLOPs of the model per token · tokens per second) / peak (PaLM, Chowdhery et al. 2022, appendix B). Work that is not the
model's, such as a forward pass done twice to save memory, counts as time and not as FLOPs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scratchlm.errors import UserError
from scratchlm.resources.devices import MEASURE, Device, known, this_machine

if TYPE_CHECKING:
    import torch

NOISE = 0.02
"""How far above 1 a utilisation may come out before it is refused: two timings of one machine differ by as much. What lies
between is returned as it is, above 1."""


def mfu(
    flops_per_second: float, peak: float, *, of: str = "this device", name: str = "given", tolerance: float = NOISE
) -> float:
    """The part of `peak` that `flops_per_second` is.

    Args:
        flops_per_second: FLOPs of the model's products, per second of wall time.
        peak: FLOP/s of the device, dense and in the dtype of those products.
        of: whose peak it is, for the error.
        name: which peak it is, ``measured`` or ``datasheet``, for the error.
        tolerance: how much above 1 is put down to noise of the timings. Never clipped: 1.01 comes back as 1.01.

    Raises:
        UserError: more than 1 + `tolerance` (nothing runs faster than it can, so a figure is wrong), or a peak or a
            speed that is none.
    """
    if not 0 < peak < float("inf"):
        raise UserError(f"the {name} peak of {of} is {peak:g} FLOP/s, which is none; {MEASURE}")
    if not 0 <= flops_per_second < float("inf"):
        raise UserError(f"{flops_per_second:g} FLOP/s is no speed; give the model's FLOPs per second")
    found = flops_per_second / peak
    if found > 1 + tolerance:
        raise UserError(
            f"model FLOPs utilisation of {100 * found:.0f} %: the {name} peak of {peak / 1e12:,.4g} TFLOP/s of {of} is "
            f"wrong (up to {100 * tolerance:.0f} % above it would be timing noise): measure it with "
            "`scratchlm resources measure`"
        )
    return found


@dataclass(frozen=True)
class Utilisation:
    """A speed beside the peaks it is a part of, each named; one that nobody knows is None.

    Attributes:
        flops_per_second: FLOPs of the model's products, per second.
        dtype: what they are computed in.
        device: the device's title.
        measured_peak: FLOP/s that products reach on this machine.
        datasheet_peak: FLOP/s that the maker prints.
    """

    flops_per_second: float
    dtype: str
    device: str
    measured_peak: float | None = None
    datasheet_peak: float | None = None

    @classmethod
    def on(cls, device: Device, dtype: str, flops_per_second: float) -> Utilisation:
        """That of a speed on `device`: a known one, or :func:`scratchlm.resources.devices.this_machine`.

        A machine that was measured is compared with its maker's figure as well, where it is a known device.

        Raises:
            UserError: `dtype` has neither peak.
        """
        peaks: dict[str, float] = {str(name): peak for name, peak in device.peak_flops.items()}
        printed: dict[str, float] = peaks
        if device.measured:
            same = known().get(device.name)
            printed = {str(name): peak for name, peak in same.peak_flops.items()} if same else {}
        if dtype not in peaks and dtype not in printed:
            device.peak(dtype)  # says what is missing
        return cls(
            flops_per_second,
            dtype,
            device.title,
            measured_peak=peaks.get(dtype) if device.measured else None,
            datasheet_peak=printed.get(dtype),
        )

    @property
    def of_measured(self) -> float | None:
        """The part of the measured peak; errors as :func:`mfu`."""
        return self._of(self.measured_peak, "measured")

    @property
    def of_datasheet(self) -> float | None:
        """The part of the printed peak; errors as :func:`mfu`."""
        return self._of(self.datasheet_peak, "datasheet")

    def _of(self, peak: float | None, name: str) -> float | None:
        if peak is None:
            return None
        return mfu(self.flops_per_second, peak, of=f"{self.device} in {self.dtype}", name=name)

    def describe(self) -> str:
        """One sentence with every peak named: ``41.0 % of the measured peak of 0.412 TFLOP/s in bf16``."""
        parts = [
            f"{100 * part:.1f} % of the {name} peak of {peak / 1e12:,.4g} TFLOP/s in {self.dtype}"
            for name, part, peak in (
                ("measured", self.of_measured, self.measured_peak),
                ("datasheet", self.of_datasheet, self.datasheet_peak),
            )
            if part is not None and peak is not None
        ]
        above = any(part is not None and part > 1 for part in (self.of_measured, self.of_datasheet))
        noise = f" (above 100 % by no more than the {100 * NOISE:.0f} % that timings vary)" if above else ""
        return (
            ", ".join(parts) + noise if parts else f"no peak of {self.device} in {self.dtype} is known; {MEASURE}"
        )


def mfu_on(device: torch.device) -> Callable[[float, str], float | None]:
    """(FLOP/s, precision) → share of the peak that was measured on this machine, else of that which the maker of a known device
    prints; None where there is neither. Errors as :func:`mfu`."""

    @functools.cache
    def peak_in(precision: str) -> tuple[float, str, str] | None:
        machine = this_machine(device)
        try:
            peaks = Utilisation.on(machine, precision, 0.0)
        except UserError:  # this machine has no peak in this dtype
            return None
        for peak, name in ((peaks.measured_peak, "measured"), (peaks.datasheet_peak, "datasheet")):
            if peak is not None:
                return peak, f"{peaks.device} in {precision}", name
        return None

    def share(flops_per_second: float, precision: str) -> float | None:
        found = peak_in(precision)
        return None if found is None else mfu(flops_per_second, found[0], of=found[1], name=found[2])

    return share
