"""Floating-point formats from their definition: what they hold, how they round, and what a long sum becomes in each.

::

    sign · 1.mantissa · 2^(exponent field − bias)        exponent field 1, 2, …: normal numbers
    sign · 0.mantissa · 2^(1 − bias)                     exponent field 0: subnormal numbers, and zero

                  ┌ sign
    fp32   32 bit │1│ exponent 8 │ mantissa 23 │         IEEE 754 binary32
    tf32   19 bit │1│ exponent 8 │ mantissa 10 │         what a tensor core keeps of an fp32 (NVIDIA A100 whitepaper, 2020)
    fp16   16 bit │1│ exponent 5 │ mantissa 10 │         IEEE 754 binary16
    bf16   16 bit │1│ exponent 8 │ mantissa  7 │         upper half of an fp32 (Kalamkar et al. 2019, arXiv 1905.12322)
    e4m3    8 bit │1│ exponent 4 │ mantissa  3 │ fp8 ─┐  no infinities, one NaN
    e5m2    8 bit │1│ exponent 5 │ mantissa  2 │ fp8 ─┴─ (Micikevicius et al. 2022, arXiv 2209.05433, table 1)

Exponents decide the range, mantissas the precision. Nothing here asks torch what a number becomes: tests do, to compare.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class NumberFormat:
    """A binary floating-point format.

    Attributes:
        name: as people call it.
        exponent_bits, mantissa_bits: widths of the two fields; the sign takes one more bit.
        infinities: whether the largest exponent field is kept for ±inf and NaN. Without, only its last mantissa is NaN and
            the others are numbers.
        bytes: what a number takes in memory (a tf32 lies there as an fp32).
        dtype: torch's name of it; None: it has none.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bytes: int
    dtype: torch.dtype | None
    infinities: bool = True

    @property
    def bias(self) -> int:
        """Half of the exponent field's range: 2^(bits − 1) − 1."""
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def min_exponent(self) -> int:
        """The smallest normal number is 2 to this; subnormal numbers share its spacing."""
        return 1 - self.bias

    @property
    def max_exponent(self) -> int:
        """The largest number lies between 2 to this and twice that."""
        return self.bias if self.infinities else self.bias + 1

    @property
    def largest(self) -> float:
        """Every mantissa bit set; without infinities the last one not, as that is the NaN."""
        unused = 1 if self.infinities else 2
        return (2 - unused * self.epsilon) * 2.0**self.max_exponent

    @property
    def smallest_normal(self) -> float:
        """The smallest number with full precision."""
        return 2.0**self.min_exponent

    @property
    def smallest_subnormal(self) -> float:
        """The smallest number above zero; half of it rounds to zero."""
        return 2.0 ** (self.min_exponent - self.mantissa_bits)

    @property
    def epsilon(self) -> float:
        """From 1 to the next number."""
        return 2.0**-self.mantissa_bits

    @property
    def digits(self) -> float:
        """Decimal digits that a normal number carries, the leading 1 counted: log₁₀ 2^(mantissa bits + 1)."""
        return (self.mantissa_bits + 1) * math.log10(2)


FP32 = NumberFormat("fp32", 8, 23, 4, torch.float32)
TF32 = NumberFormat("tf32", 8, 10, 4, None)
FP16 = NumberFormat("fp16", 5, 10, 2, torch.float16)
BF16 = NumberFormat("bf16", 8, 7, 2, torch.bfloat16)
E4M3 = NumberFormat("e4m3", 4, 3, 1, torch.float8_e4m3fn, infinities=False)
E5M2 = NumberFormat("e5m2", 5, 2, 1, torch.float8_e5m2)
FORMATS = (FP32, TF32, FP16, BF16, E4M3, E5M2)


# --- rounding ----------------------------------------------------------------------------------------------------


def nearest(x: float, fmt: NumberFormat, *, saturate: bool = False) -> float:
    """The number of `fmt` nearest to `x`, as the definition says; of two equally near the one with an even mantissa.

    What rounds to more than the largest number overflows to ±inf, or to NaN where there are no infinities.

    Args:
        x: any number.
        fmt: the format.
        saturate: what overflows, infinities too, becomes ± the largest number (OCP 8-bit floating point, section 5).
    """
    if math.isnan(x) or x == 0:
        return x
    if math.isinf(x):
        return _overflowed(x, fmt, saturate)
    exponent = math.frexp(x)[1] - 1  # 2^exponent ≤ |x| < 2^(exponent + 1)
    if exponent > fmt.max_exponent:
        return _overflowed(x, fmt, saturate)
    last_place = max(exponent, fmt.min_exponent) - fmt.mantissa_bits
    rounded = math.ldexp(round(math.ldexp(abs(x), -last_place)), last_place)  # Python rounds ties to even
    return _overflowed(x, fmt, saturate) if rounded > fmt.largest else math.copysign(rounded, x)


def _overflowed(x: float, fmt: NumberFormat, saturate: bool) -> float:
    beyond = fmt.largest if saturate else math.inf if fmt.infinities else math.nan
    return math.copysign(beyond, x)


def torch_saturates(fmt: NumberFormat) -> bool:
    """Whether this version of torch saturates in casts to the format; it is asked, as versions differ in e4m3."""
    return fmt.dtype is not None and bool(torch.tensor(math.inf).to(fmt.dtype).float().isfinite())


_DOUBLE_MANTISSA, _DOUBLE_BIAS = 52, 1023
_BELOW_HALF = 54
"""A float64 significand has 53 bits: shifted by so many or more, less than half of the last place is left."""


def round_to(x: Float[Tensor, " ..."], fmt: NumberFormat, *, saturate: bool = False) -> Float[Tensor, " ..."]:
    """:func:`nearest` for a whole tensor, in integer arithmetic on the bits of its numbers.

    ::

        significand   1 0 1 1 0 1 | 1 0 0 1 …        kept = significand >> shift, one more if the rest is above half, or
                          kept    |  rest            just half and kept is odd

    Args:
        x: any floating dtype.
        fmt: the format to round to.
        saturate: see :func:`nearest`.

    Returns:
        Numbers of `fmt`, in float64 for float64 input, else in float32, which holds all formats here.
    """
    wide = x.double()
    bits = wide.view(torch.int64)
    magnitude = bits & ((1 << 63) - 1)  # without the sign
    field = magnitude >> _DOUBLE_MANTISSA
    # The leading 1, also where there is none: float64's own subnormal numbers are zero in all formats here.
    significand = (magnitude & ((1 << _DOUBLE_MANTISSA) - 1)) | (1 << _DOUBLE_MANTISSA)
    # Infinity becomes a number that is too large; NaN is seen to below.
    exponent = (field - _DOUBLE_BIAS).clamp(max=_DOUBLE_BIAS)
    last_place = exponent.clamp(min=fmt.min_exponent) - fmt.mantissa_bits
    shift = (_DOUBLE_MANTISSA + last_place - exponent).clamp(max=_BELOW_HALF)

    kept = significand >> shift
    rest = significand - (kept << shift)
    half = torch.ones_like(shift) << (shift - 1)
    kept = kept + ((rest > half) | ((rest == half) & (kept % 2 == 1)))
    power = ((last_place + _DOUBLE_BIAS) << _DOUBLE_MANTISSA).view(torch.float64)
    rounded = kept.double() * power

    beyond = torch.tensor(
        fmt.largest if saturate else math.inf if fmt.infinities else math.nan, dtype=torch.float64
    )
    rounded = torch.where(rounded > fmt.largest, beyond.to(x.device), rounded)
    rounded = torch.where(wide.isnan(), wide, rounded.copysign(wide))
    return rounded if x.dtype == torch.float64 else rounded.float()


# --- what becomes of a number ------------------------------------------------------------------------------------

Fate = Literal["kept", "rounded", "0", "largest", "inf", "NaN"]

TYPICAL = (
    ("a gradient; Adam's ε", 1e-8),
    ("its square, in Adam's v", 1e-16),
    ("a weight of 1 after an update of 0.001", 1.001),
    ("a token's position", 2049.0),
    ("an activation", 500.0),
    ("a logit", 1e4),
    ("just above fp16's largest", 65_520.0),
    ("a sum of squares gone wild", 1e39),
)
"""Numbers that training meets, each at the edge of some format."""


def becomes(x: float, fmt: NumberFormat, *, saturate: bool = False) -> tuple[Fate, float]:
    """What `x` is in `fmt`: one word for it, and the number."""
    y = nearest(x, fmt, saturate=saturate)
    if math.isnan(y):
        return "NaN", y
    if math.isinf(y):
        return "inf", y
    if y == x:
        return "kept", y
    if y == 0:
        return "0", y
    return ("rounded" if math.isfinite(nearest(x, fmt)) else "largest"), y


# --- a long sum --------------------------------------------------------------------------------------------------

Method = Literal["in itself", "in fp32", "compensated"]
METHODS: tuple[Method, ...] = ("in itself", "in fp32", "compensated")


@dataclass(frozen=True)
class Sum:
    """One number, added to a sum again and again.

    Attributes:
        format: what the number is stored in.
        method: ``in itself``: the sum is kept in the same format. ``in fp32``: in fp32, as tensor cores do with products.
            ``compensated``: in the same format with a second number that carries what rounding lost (Kahan 1965).
        value: the sum.
        error: value − the exact sum.
        last_change: the last addition that changed the sum; 0: none did.
    """

    format: str
    method: Method
    value: float
    error: float
    last_change: int


def add_up(fmt: NumberFormat, method: Method, addend: float = 0.01, times: int = 10_000) -> Sum:
    """Add `addend` so many times, every result rounded.

    float64 in between does no harm: it has more than twice fp32's digits, and then rounding twice is rounding once (Figueroa 1995).

    Args:
        fmt: the format of the addend, and of the sum unless the method says otherwise.
        method: see :class:`Sum`.
        addend: what is added; it is rounded to `fmt` first.
        times: how often.
    """
    held = FP32 if method == "in fp32" else fmt
    each = nearest(addend, fmt)
    total, lost, last_change = 0.0, 0.0, 0
    for step in range(1, times + 1):
        if method == "compensated":
            corrected = nearest(each - lost, fmt)
            after = nearest(total + corrected, fmt)
            lost = nearest(nearest(after - total, fmt) - corrected, fmt)
        else:
            after = nearest(total + each, held)
        if after != total:
            total, last_change = after, step
    return Sum(fmt.name, method, total, total - addend * times, last_change)
