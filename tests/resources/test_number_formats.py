"""Formats, their rounding and sums in them, against torch's own: every code of the small ones, ties, and random bits."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from scratchlm.resources import number_formats as nf
from scratchlm.resources.number_formats import BF16, E4M3, E5M2, FORMATS, FP16, FP32, TF32, NumberFormat

SMALL = (FP16, BF16, E4M3, E5M2)


def same(one: Tensor, other: Tensor) -> bool:
    """Equal, NaN to NaN and −0 to −0."""
    one, other = one.double(), other.double()
    signs = one.signbit() == other.signbit()
    return bool((torch.isnan(one) & torch.isnan(other) | (one == other) & signs).all())


def every_code(fmt: NumberFormat) -> Tensor:
    """All numbers of a format, by torch, in fp32."""
    if fmt.bytes == 2:
        codes = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    else:
        codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    assert fmt.dtype is not None
    return codes.view(fmt.dtype).float()


def cast(x: Tensor, fmt: NumberFormat) -> Tensor:
    """By torch."""
    assert fmt.dtype is not None
    return x.to(fmt.dtype).double()


def ours(x: Tensor, fmt: NumberFormat) -> Tensor:
    """By us, with what is too large as this torch has it: casts to e4m3 gave NaN before they saturated."""
    return nf.round_to(x, fmt, saturate=nf.torch_saturates(fmt))


@pytest.mark.parametrize("fmt", [f for f in FORMATS if f.dtype], ids=lambda f: f.name)
def test_what_follows_from_the_definition_is_what_torch_says(fmt: NumberFormat) -> None:
    assert fmt.dtype is not None
    said = torch.finfo(fmt.dtype)
    assert fmt.largest == said.max
    assert fmt.smallest_normal == said.tiny
    assert fmt.epsilon == said.eps
    assert fmt.digits == pytest.approx(-math.log10(said.eps / 2))
    assert fmt.bytes * 8 == said.bits == 1 + fmt.exponent_bits + fmt.mantissa_bits


def test_the_smallest_of_fp32() -> None:
    assert FP32.smallest_subnormal == float(torch.zeros(()).nextafter(torch.ones(())))
    assert FP32.smallest_subnormal < TF32.smallest_subnormal == FP32.smallest_normal * TF32.epsilon


def test_the_rule_of_e4m3_is_nan_and_the_option_is_the_largest() -> None:
    edge = torch.tensor([448.0, 464.0, 464.1, 480.0, math.inf, -464.1])
    nan = math.nan
    assert same(nf.round_to(edge, E4M3), torch.tensor([448.0, 448.0, nan, nan, nan, nan]).copysign(edge))
    assert same(nf.round_to(edge, E4M3, saturate=True), torch.tensor([448.0] * 5 + [-448.0]))
    assert not any(map(nf.torch_saturates, (FP32, TF32, FP16, BF16, E5M2)))


@pytest.mark.parametrize("fmt", SMALL, ids=lambda f: f.name)
def test_every_code_stays_and_the_extremes_are_among_them(fmt: NumberFormat) -> None:
    numbers = every_code(fmt)
    assert same(nf.round_to(numbers, fmt), numbers)
    finite = numbers[numbers.isfinite()].double().unique()
    above = finite[finite > 0]
    assert (above.max(), above.min()) == (fmt.largest, fmt.smallest_subnormal)
    assert above[above > 1].min() - 1 == fmt.epsilon
    assert bool(numbers.isinf().any()) == fmt.infinities


@pytest.mark.parametrize("fmt", SMALL, ids=lambda f: f.name)
def test_ties_and_their_neighbours_round_as_torch_casts(fmt: NumberFormat) -> None:
    numbers = every_code(fmt)
    finite = numbers[numbers.isfinite()].double().unique()
    step = finite[-1] - finite[-2]
    finite = torch.cat(
        [finite, finite[-1:] + step]
    )  # where the next number would be: overflow begins at half the way
    ties = ((finite[1:] + finite[:-1]) / 2).float()
    assert torch.equal(ties.double(), (finite[1:] + finite[:-1]) / 2)  # fp32 holds them: they are ties
    infinity = torch.tensor(math.inf)
    for x in (ties, ties.nextafter(infinity), ties.nextafter(-infinity), -ties):
        assert same(ours(x, fmt), cast(x, fmt))
    assert not same(nf.round_to(ties.nextafter(infinity), fmt), nf.round_to(ties.nextafter(-infinity), fmt))


@pytest.mark.parametrize("fmt", SMALL, ids=lambda f: f.name)
def test_random_fp32_rounds_as_torch_casts(fmt: NumberFormat) -> None:
    chance = torch.Generator().manual_seed(0)
    any_bits = torch.randint(-(2**31), 2**31, (200_000,), generator=chance).to(torch.int32).view(torch.float32)
    assert any_bits.isnan().any() and (any_bits.abs() < FP32.smallest_normal).any()
    exponents = torch.randint(-26, 18, (200_000,), generator=chance)
    near = torch.randn(200_000, generator=chance) * 2.0**exponents
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 3.4028235e38])
    for x in (any_bits, near, special):
        assert same(ours(x, fmt), cast(x, fmt))


def test_fp32_rounds_as_torch_casts_float64() -> None:
    chance = torch.Generator().manual_seed(1)
    x = torch.randint(-(2**63), 2**63 - 1, (200_000,), generator=chance).view(torch.float64)
    exponents = torch.randint(-155, 130, (200_000,), generator=chance)
    near = torch.randn(200_000, generator=chance, dtype=torch.float64) * 2.0 ** exponents.double()
    special = torch.tensor(
        [0.0, -0.0, math.inf, -math.inf, math.nan, 5e-324, 1.7976931348623157e308], dtype=torch.float64
    )
    for given_ in (x, near, special):
        rounded = nf.round_to(given_, FP32)
        assert rounded.dtype == torch.float64 and same(rounded, given_.float())


def test_tf32_cuts_fp32_after_ten_bits_to_the_nearest() -> None:
    chance = torch.Generator().manual_seed(2)
    x = torch.randint(-(2**31), 2**31, (100_000,), generator=chance).to(torch.int32)
    x = x[x.view(torch.float32).isfinite()]
    rounded = nf.round_to(x.view(torch.float32), TF32)
    last_13 = rounded.view(torch.int32) & 0x1FFF
    assert not last_13.any()
    # The classic trick on the bits, which carries into the exponent by itself.
    trick = (x + 0xFFF + ((x >> 13) & 1)) & ~0x1FFF
    assert torch.equal(rounded.view(torch.int32), trick)
    assert TF32.largest == float(torch.tensor(0x7F7FE000, dtype=torch.int32).view(torch.float32))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("saturate", [False, True])
def test_the_definition_and_its_integer_twin_agree(fmt: NumberFormat, saturate: bool) -> None:
    @given(st.floats(width=64) | st.floats(width=32) | st.floats(-1000, 1000, width=16))
    def check(x: float) -> None:
        one = torch.tensor([x], dtype=torch.float64)
        expected = torch.tensor([nf.nearest(x, fmt, saturate=saturate)], dtype=torch.float64)
        assert same(nf.round_to(one, fmt, saturate=saturate), expected)

    check()


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_what_saturates_is_the_largest_number_and_nothing_else_changes(fmt: NumberFormat) -> None:
    big = torch.tensor([fmt.largest * 1.5, -fmt.largest * 1.5, math.inf, -math.inf], dtype=torch.float64)
    edge = torch.tensor([fmt.largest, -fmt.largest, -fmt.largest, fmt.largest], dtype=torch.float64)
    assert torch.equal(nf.round_to(big, fmt, saturate=True), edge[[0, 1, 0, 1]])
    assert nf.round_to(torch.tensor([math.nan]), fmt, saturate=True).isnan().all()
    small = torch.linspace(-fmt.largest, fmt.largest, 1001, dtype=torch.float64)
    assert torch.equal(nf.round_to(small, fmt, saturate=True), nf.round_to(small, fmt))
    overflowed = nf.round_to(big, fmt)
    assert overflowed.isinf().all() if fmt.infinities else overflowed.isnan().all()


def test_shapes_devices_and_dtypes() -> None:
    x = torch.randn(3, 5, 2)
    for given_ in (x, x.mT, x[:, ::2], x.half(), x.bfloat16(), x[:0]):
        rounded = nf.round_to(given_, E4M3)
        assert rounded.shape == given_.shape and rounded.dtype == torch.float32
        assert same(rounded, given_.float().to(torch.float8_e4m3fn))


def torch_sum(dtype: torch.dtype, held: torch.dtype, times: int) -> float:
    """0.01 added again and again by torch, the sum kept in `held`."""
    each, total = torch.tensor(0.01).to(dtype), torch.zeros((), dtype=held)
    for _ in range(times):
        total = (total.float() + each.float()).to(held)
    return float(total)


@pytest.mark.parametrize("fmt", [f for f in FORMATS if f.dtype], ids=lambda f: f.name)
@pytest.mark.parametrize("method", ["in itself", "in fp32"])
def test_a_long_sum_is_torchs(fmt: NumberFormat, method: nf.Method) -> None:
    found = nf.add_up(fmt, method, times=6000)
    assert fmt.dtype is not None
    assert found.value == torch_sum(fmt.dtype, fmt.dtype if method == "in itself" else torch.float32, 6000)
    assert found.error == found.value - 60


@pytest.mark.parametrize("fmt", [TF32, FP16, BF16, E4M3, E5M2], ids=lambda f: f.name)
def test_a_sum_stops_where_half_of_its_last_place_exceeds_what_is_added(fmt: NumberFormat) -> None:
    found = nf.add_up(fmt, "in itself")
    each = nf.nearest(0.01, fmt)
    place = 2.0 ** (math.floor(math.log2(found.value)) - fmt.mantissa_bits)
    assert each <= place / 2
    assert 0 < found.last_change < 10_000
    stopped = nf.add_up(fmt, "in itself", times=found.last_change)
    assert stopped.value == found.value
    assert nf.add_up(fmt, "in itself", times=found.last_change - 1).value < found.value


def test_compensation_helps_as_far_as_the_format_reaches() -> None:
    for fmt in (FP32, TF32, FP16, BF16):
        plain, compensated = (nf.add_up(fmt, method) for method in ("in itself", "compensated"))
        exact = float(Fraction(nf.nearest(0.01, fmt)) * 10_000)  # what was added, was rounded once before
        # Higham 2002, section 4.3: 2 u + O(n u²) of the sum, u being half of ε.
        bound = fmt.epsilon + 10_000 * (fmt.epsilon / 2) ** 2
        assert abs(compensated.value - exact) <= bound * exact
        assert abs(compensated.value - exact) < abs(plain.value - exact) / 10
    assert abs(nf.add_up(FP32, "compensated").error) < abs(nf.add_up(FP32, "in itself").error) / 10
    for fmt in (E4M3, E5M2):  # the correction itself stops growing, but later
        assert nf.add_up(fmt, "in itself").value < nf.add_up(fmt, "compensated").value < 50


def test_what_becomes_of_a_number() -> None:
    fate = {(fmt.name, x): nf.becomes(x, fmt)[0] for fmt in FORMATS for _, x in nf.TYPICAL}
    assert [fate[f.name, 1e-8] for f in FORMATS] == ["rounded", "rounded", "0", "rounded", "0", "0"]
    assert [fate[f.name, 65_520.0] for f in FORMATS] == ["kept", "rounded", "inf", "rounded", "NaN", "inf"]
    assert [fate[f.name, 500.0] for f in FORMATS] == ["kept", "kept", "kept", "kept", "NaN", "rounded"]
    assert {fate[f.name, 1e39] for f in FORMATS} == {"inf", "NaN"} and fate["e4m3", 1e39] == "NaN"
    assert nf.becomes(2049.0, FP16) == ("rounded", 2048.0)
    assert nf.becomes(1.001, BF16) == ("rounded", 1.0)
    assert nf.becomes(500.0, E4M3, saturate=True) == ("largest", 448.0)
    assert nf.becomes(450.0, E4M3, saturate=True) == ("rounded", 448.0)
    assert nf.becomes(-math.inf, E5M2) == ("inf", -math.inf)
    assert nf.becomes(0.0, E4M3) == ("kept", 0.0)
    for fmt in SMALL:  # the words say what torch's cast gives
        for _, x in nf.TYPICAL:
            word, value = nf.becomes(x, fmt, saturate=nf.torch_saturates(fmt))
            assert same(torch.tensor(value), cast(torch.tensor(x), fmt))
            assert (word == "inf") == math.isinf(value) and (word == "NaN") == math.isnan(value)
