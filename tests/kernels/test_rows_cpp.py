"""RMSNorm, SwiGLU and RoPE in C++ for CPUs: the formulas' results and gradients, where they are chosen, and what happens where they cannot be had."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from scratchlm.kernels import cpp_here, rms_norm, rms_norm_op, rotary, rotary_op, swiglu, swiglu_op
from scratchlm.kernels import rows_cpp as cpp
from scratchlm.kernels.cpp_here import NoKernel
from scratchlm.model import ModelConfig, Transformer
from scratchlm.model.norm import RMSNorm, RMSNormNoScale
from scratchlm.model.rope import half_split_pairs, interleaved_pairs

DTYPES = [torch.float32, torch.bfloat16]
ROUNDED = {torch.float32: 0.0, torch.bfloat16: 2**-8}
"""Of a result that was computed in fp32: half the distance between two numbers of the dtype."""

pytestmark = pytest.mark.skipif(cpp_here.compiler() is None, reason="there is no C++ compiler")


@pytest.fixture(autouse=True)
def bf16_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that multiplies bf16 numbers: else nobody trains in it."""
    monkeypatch.setattr(cpp, "has_native_bf16", lambda _: True)


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def near(ours: Tensor, exact: Tensor, dtype: torch.dtype, size: float = 1.0) -> None:
    """But for the dtype's rounding, and the last digits of fp32 sums of numbers of this size."""
    bound = ROUNDED[dtype] * exact.abs() + 2e-6 * max(size, 1.0)
    assert ((ours.double() - exact).abs() <= bound).all()


# --- RMSNorm --------------------------------------------------------------------------------------------------------------


def check_norm(x: Tensor, gain: Tensor | None, upstream: Tensor, offset: float = 0.0, eps: float = 1e-5) -> None:
    given = [t.detach().requires_grad_() for t in (x, gain) if t is not None]
    y = rms_norm.trained(given[0], given[1] if gain is not None else None, eps, offset)
    assert y.dtype == x.dtype and y.shape == x.shape and "RMSNorm" in str(y.grad_fn)
    gradients = torch.autograd.grad(y, given, upstream)
    assert [g.dtype for g in gradients] == [t.dtype for t in given]
    wide = [t.detach().double().requires_grad_() for t in given]
    by = None if gain is None else wide[1] + offset
    right = F.rms_norm(wide[0], x.shape[-1:], by, eps)
    exact = torch.autograd.grad(right, wide, upstream.double())
    steep = (
        1 / (x.double().square().mean(-1) + eps).sqrt().min().item()
    )  # how much larger a gradient is than what comes
    high = max(1.0, float(upstream.abs().max())) * (
        1.0 if gain is None else 1 + abs(offset) + float(gain.abs().max())
    )
    near(y, right.detach(), x.dtype, high)
    near(gradients[0], exact[0], x.dtype, 4 * steep * high)
    if gain is not None:
        near(gradients[1], exact[1], gain.dtype, x.numel() ** 0.5 * high)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=0, max_size=4),
    width=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    gains=st.sampled_from([None, torch.float32, torch.bfloat16]),
    offset=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 1000),
)
def test_norms_of_any_shape(
    shape: list[int], width: int, dtype: torch.dtype, gains: torch.dtype | None, offset: float, seed: int
) -> None:
    x, upstream = drawn(*shape, width, dtype=dtype, seed=seed), drawn(*shape, width, dtype=dtype, seed=seed + 1)
    check_norm(x, None if gains is None else drawn(width, dtype=gains, seed=seed + 2), upstream, offset)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [31, 64, 65, 4100])
def test_a_gains_gradient_is_added_up_in_chunks(rows: int, dtype: torch.dtype) -> None:
    check_norm(drawn(rows, 24, dtype=dtype), drawn(24), drawn(rows, 24, dtype=dtype, seed=1))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads of a projection": lambda x: torch.cat([x, x], dim=-2)[..., : x.shape[-2], :].transpose(1, 2),
    "turned": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every second": lambda x: torch.stack([x, x], dim=2).flatten(1, 2)[:, ::2],
    "spread": lambda x: x[:1].expand_as(x),
    "an odd beginning": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "five dimensions, mixed": lambda x: x.unflatten(0, (1, -1)).transpose(1, 3),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_lie_in_memory_in_any_way(layout: str, dtype: torch.dtype) -> None:
    x, upstream = (LAYOUTS[layout](drawn(3, 5, 4, 18, dtype=dtype, seed=n)) for n in range(2))
    check_norm(x, drawn(18), upstream)
    check_norm(x, drawn(18), upstream.contiguous())
    assert rms_norm.trained(x.detach(), None, 1e-5).stride() == torch.empty_like(x).stride()


def test_norms_of_tiny_large_and_strange_rows() -> None:
    x = torch.stack([torch.zeros(20), torch.full((20,), 1e-25), torch.full((20,), 1e18), drawn(20)])
    check_norm(x, None, torch.full_like(x, 1e-3))
    x[1, 3], x[2, 0] = float("nan"), float("inf")
    y = rms_norm.trained(x, None, 1e-5)
    right = F.rms_norm(x, (20,), None, 1e-5)
    assert y[1].isnan().all() and y[[0, 3]].isfinite().all()
    assert y[2].isnan().equal(right[2].isnan()) and not y[2, 1:].any()


# --- SwiGLU ---------------------------------------------------------------------------------------------------------------


def check_gated(gate_up: Tensor, upstream: Tensor) -> None:
    given = gate_up.detach().requires_grad_()
    out = swiglu.swiglu(given)
    assert "SwiGLU" in str(out.grad_fn) and out.is_contiguous()
    (gradient,) = torch.autograd.grad(out, given, upstream)
    wide = gate_up.detach().double().requires_grad_()
    gate, up = wide.chunk(2, dim=-1)
    right = F.silu(gate) * up
    size = float(gate_up.abs().max()) ** 2
    near(out, right.detach(), gate_up.dtype, size)
    near(gradient, torch.autograd.grad(right, wide, upstream.double())[0], gate_up.dtype, size)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 8), min_size=0, max_size=3),
    width=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([0.1, 3.0, 40.0]),
    seed=st.integers(0, 1000),
)
def test_gated_units_of_any_shape(
    shape: list[int], width: int, dtype: torch.dtype, scale: float, seed: int
) -> None:
    check_gated(
        (scale * drawn(*shape, 2 * width, seed=seed)).to(dtype), drawn(*shape, width, dtype=dtype, seed=seed + 1)
    )


def test_gates_at_the_end_of_the_numbers() -> None:
    gates = torch.tensor(
        [-1e30, -1000.0, -200.0, -89.0, -87.0, 0.0, 87.0, 200.0, 1e30, float("inf"), float("-inf"), float("nan")]
    )
    given = torch.cat([gates, torch.ones_like(gates)]).requires_grad_()
    out = swiglu.swiglu(given)
    (gradient,) = torch.autograd.grad(out, given, torch.ones_like(out))
    right = F.silu(gates)
    assert out.isnan().equal(right.isnan())
    torch.testing.assert_close(out[:10].detach(), right[:10], rtol=1e-5, atol=1e-30)
    assert gradient[:9].isfinite().all()
    torch.testing.assert_close(gradient[12:22], right[:10], rtol=1e-5, atol=1e-30)


def test_a_gate_without_its_other_half() -> None:
    with pytest.raises(ValueError, match="two halves"):
        swiglu.swiglu(torch.ones(3, 5, requires_grad=True))


# --- RoPE -----------------------------------------------------------------------------------------------------------------


def check_turned(
    heads: int, kv_heads: int, half: int, dtype: torch.dtype, interleaved: bool, own: bool, seed: int = 0
) -> None:
    batch, length, width = 2, 7, 2 * half
    angles = 3 * drawn(*([batch] if own else []), length, half, seed=seed)
    cos, sin = angles.cos(), angles.sin()
    projected = drawn(batch, length, (heads + 2 * kv_heads) * width, dtype=dtype, seed=seed + 1).requires_grad_()
    found = rotary.turn_heads(projected, cos, sin, heads, kv_heads, interleaved)
    assert all("TurnHeads" in str(part.grad_fn) and part.transpose(1, 2).is_contiguous() for part in found)
    upstream = [drawn(*part.shape, dtype=dtype, seed=seed + 2 + n) for n, part in enumerate(found)]
    (gradient,) = torch.autograd.grad(found, projected, upstream)
    wide = projected.detach().double().requires_grad_()
    q, k, v = wide.view(batch, length, -1, width).transpose(1, 2).split([heads, kv_heads, kv_heads], dim=1)
    tables = (t.double().unsqueeze(-3) if own else t.double() for t in (cos, sin))
    table = tuple(tables)
    pairs = interleaved_pairs if interleaved else half_split_pairs
    right = pairs(q, *table), pairs(k, *table), v
    for ours, exact in zip(found, right, strict=True):
        near(ours, exact.detach(), dtype)
    near(gradient, torch.autograd.grad(right, wide, [u.double() for u in upstream])[0], dtype)
    given = found[0].detach().requires_grad_()
    turned = rotary.turn(given, cos, sin, interleaved)
    wide_q = given.detach().double().requires_grad_()
    exact = pairs(wide_q, *table)
    near(turned, exact.detach(), dtype)
    near(
        torch.autograd.grad(turned, given, upstream[0])[0],
        torch.autograd.grad(exact, wide_q, upstream[0].double())[0],
        dtype,
    )


@settings(max_examples=40, deadline=None)
@given(
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    half=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    interleaved=st.booleans(),
    own=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_heads_are_turned(
    kv_heads: int, group: int, half: int, dtype: torch.dtype, interleaved: bool, own: bool, seed: int
) -> None:
    check_turned(group * kv_heads, kv_heads, half, dtype, interleaved, own, seed)


def test_a_table_that_does_not_fit_is_refused() -> None:
    projected = drawn(2, 7, 48).requires_grad_()
    for shape in ((6, 4), (7, 3), (3, 7, 4)):
        with pytest.raises(ValueError, match="cos and sin"):
            rotary.turn_heads(projected, torch.ones(shape), torch.ones(shape), 2, 2, False)
    with pytest.raises(ValueError, match="do not make up"):
        rotary.turn_heads(projected, torch.ones(7, 4), torch.ones(7, 4), 5, 2, False)


# --- all of them ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("defines", [("VECTOR=4",), ("VECTOR=16",), ("VECTOR=16", "BF16")], ids=" ".join)
def test_vectors_of_other_processors(defines: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = torch.bfloat16 if "BF16" in defines else torch.float32
    library = cpp_here.built(cpp.SOURCE, defines)
    monkeypatch.setattr(cpp, "library", lambda _: library)
    check_norm(drawn(9, 21, dtype=dtype), drawn(21), drawn(9, 21, dtype=dtype, seed=1))
    check_gated(3 * drawn(9, 42, dtype=dtype), drawn(9, 21, dtype=dtype))
    for interleaved in (False, True):
        check_turned(4, 2, 21, dtype, interleaved, own=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_threads_to_the_bit(dtype: torch.dtype) -> None:
    """More than enough numbers for several threads to be woken."""
    x, gain, upstream = drawn(700, 48, dtype=dtype), drawn(48), drawn(700, 48, dtype=dtype, seed=1)
    angles = drawn(700, 8)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            y, inverses = cpp.norm_forward(x, gain, 1e-5)
            found.append(
                [
                    y,
                    *cpp.norm_backward(upstream, x, gain, inverses),
                    cpp.swiglu_forward(x),
                    cpp.swiglu_backward(upstream[:, :24], x),
                    *cpp.turn_forward(x[None], angles.cos(), angles.sin(), 1, 1, False),
                ]
            )
        finally:
            torch.set_num_threads(before)
    for other in found[1:]:
        assert all(ours is not None and ours.equal(theirs) for ours, theirs in zip(found[0], other, strict=True))


def test_as_operations_they_are_what_torch_asks_of_one() -> None:
    x, gain = drawn(4, 6, 16).requires_grad_(), drawn(16).requires_grad_()
    for given_ in ((x, gain, 1e-5), (x, None, 1e-5), (x.transpose(0, 1), gain, 1e-5)):
        torch.library.opcheck(rms_norm_op.rms_norm, given_)
    torch.library.opcheck(swiglu_op.swiglu, (x,))
    tables = drawn(6, 2).cos(), drawn(6, 2).sin()
    torch.library.opcheck(rotary_op.turn_heads, (x, *tables, 2, 1, False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_operation_gives_the_same_without_the_kernels(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, gain = drawn(5, 6, 16, dtype=dtype).transpose(0, 1), drawn(16)
    upstream = drawn(6, 5, 16, dtype=dtype, seed=1)

    def answers() -> list[Tensor]:
        found = []
        for gains in (gain, None):
            y, inverses = rms_norm_op.rms_norm(x, gains, 1e-5)
            found += [y, inverses, *rms_norm_op.rms_norm_backward(upstream, x, gains, inverses)]
        return found

    ours = answers()
    monkeypatch.setattr(cpp, "runs", lambda dtype: False)
    for one, other in zip(ours, answers(), strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype and one.stride() == other.stride()
        near(one, other.double(), one.dtype, 4.0)


# --- where they are chosen ------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of our kernels as they are called."""
    calls: list[str] = []
    for name in ("norm", "swiglu", "turn"):
        for way in ("forward", "backward"):
            function = getattr(cpp, f"{name}_{way}")

            def noting(
                *given: object, name: str = name, way: str = way, function: Callable = function, **how: object
            ) -> object:  # type: ignore[type-arg]
                calls.append(f"{name} {way}")
                return function(*given, **how)

            monkeypatch.setattr(cpp, f"{name}_{way}", noting)
    return calls


TINY = ModelConfig(vocab_size=50, context_length=16, d_model=32, layers=1, heads=2)
IDS = torch.arange(32).view(2, 16)


def test_a_model_that_is_trained_takes_them_and_one_that_is_read_does_not(counted: list[str]) -> None:
    model = Transformer(TINY, seed=0)
    model(IDS).sum().backward()
    forward = ["norm forward", "turn forward", "norm forward", "swiglu forward", "norm forward"]
    assert counted == forward + [name.replace("forward", "backward") for name in reversed(forward)]
    counted.clear()
    with torch.no_grad():
        model(IDS)
        assert counted == []
        large = Transformer(TINY.model_copy(update={"d_model": 512}), seed=0)
        large(IDS.expand(4, 2, 16).flatten(0, 1))
    assert set(counted) == {"turn forward", "swiglu forward"}, "norms without gradients have a kernel of their own"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": "head", "kv_heads": 1},
        {"norm": "rmsnorm_unit_offset", "rope": {"pairs": "interleaved"}},
        {"norm": "rmsnorm_noscale", "qk_norm": "head"},
        {"attention": "mla", "latent": {"kv_rank": 16, "rope_dim": 8}},
    ],
    ids=str,
)
def test_a_models_loss_and_gradients_are_torchs(
    changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig.model_validate(TINY.model_dump() | changes)
    model = Transformer(config, seed=0)

    def answers() -> list[Tensor]:
        loss = F.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten())
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    ours = answers()
    monkeypatch.setattr(cpp, "runs", lambda dtype: False)
    for one, other in zip(ours, answers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_who_watches_sees_operations(counted: list[str]) -> None:
    model = Transformer(TINY, seed=0)
    with FlopCounterMode(display=False) as counter:
        model(IDS).sum().backward()
    assert counter.get_total_flops() > 0
    assert "norm backward" in counted and "turn backward" in counted and "swiglu backward" in counted
    with torch.profiler.profile() as quiet:
        model(IDS).sum().backward()
    names = {event.key for event in quiet.key_averages()}
    assert {"RMSNorm", "SwiGLU", "TurnHeads", "RMSNormBackward"} <= names and not any(
        "scratchlm::rms" in n for n in names
    )


def test_what_they_do_not_know_goes_elsewhere(counted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    x = drawn(4, 16).requires_grad_()
    assert cpp.is_offered(x)
    assert not cpp.is_offered(x.double()) and not cpp.is_offered(x.half()) and not cpp.is_offered(x[:0])
    assert not cpp.is_offered(x.to("meta"))
    assert not cpp.is_offered(torch.view_as_complex(x.view(4, 8, 2)).conj().imag)  # its sign is a promise
    norm = Transformer(TINY, seed=0).norm
    found = torch.func.grad(lambda x: norm(x).square().sum())(drawn(3, 32))
    _, along = torch.func.jvp(norm, (drawn(3, 32),), (drawn(3, 32, seed=1),))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(drawn(3, 32), drawn(3, 32, seed=1))
        forwards = torch.autograd.forward_ad.unpack_dual(norm(dual)).tangent
    assert counted == [] and found.shape == along.shape
    assert forwards is not None and (forwards - along).abs().max() < 1e-6
    monkeypatch.setattr(cpp, "has_native_bf16", lambda _: False)
    assert not cpp.is_offered(x.bfloat16()) and cpp.is_offered(x)


def test_a_compiler_that_fails_is_told_of_once(monkeypatch: pytest.MonkeyPatch, told: list) -> None:  # type: ignore[type-arg]
    def fail(dtype: torch.dtype) -> None:
        raise NoKernel("g++ fails: no space")

    monkeypatch.setattr(cpp, "library", fail)
    model = Transformer(TINY, seed=0)
    for _ in range(2):
        model(IDS).sum().backward()
    assert [str(warning.message) for warning in told if "norms" in str(warning.message)] == [
        "norms, SwiGLU and rotation are computed by torch, which is slower: g++ fails: no space"
    ]


def test_a_second_derivative_is_refused() -> None:
    x = drawn(4, 16).requires_grad_()
    for y in (rms_norm.trained(x, None, 1e-5), swiglu.swiglu(x)):
        with pytest.raises(RuntimeError, match="has no derivative of its own"):
            torch.autograd.grad(y.sum(), x, create_graph=True)


def test_a_gain_that_does_not_fit_is_refused() -> None:
    x = drawn(3, 64).requires_grad_()
    for gain in (drawn(8), drawn(1), drawn(65), drawn(64, 1), drawn(64).to("meta")):
        with pytest.raises(ValueError, match="a gain of"):
            rms_norm.trained(x, gain, 1e-5)
        if gain.device == x.device:
            with pytest.raises(ValueError, match="a gain of"):
                rms_norm_op.rms_norm(x, gain, 1e-5)
    for norm in (RMSNorm(8), RMSNormNoScale(8)):
        with pytest.raises(RuntimeError):  # torch's words
            norm(x)
        with torch.no_grad(), pytest.raises(RuntimeError):
            norm(x)


def test_results_lie_beside_their_arguments() -> None:
    x, gain = drawn(300, 16).requires_grad_(), drawn(16).requires_grad_()
    with torch.device("meta"):  # where new tensors go unless told otherwise
        y = rms_norm.trained(x, gain, 1e-5)
        gradients = torch.autograd.grad(y, (x, gain), torch.ones_like(y))
        gates = swiglu.swiglu(x)
    assert {t.device.type for t in (y, *gradients, gates)} == {"cpu"}
    near(y, F.rms_norm(x.double(), (16,), gain.double(), 1e-5), torch.float32, 4.0)


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00000, -1, 0x7F800001])
def test_every_nan_stays_one_in_bf16(bits: int) -> None:
    """A GPU's own has all bits set, which rounding would carry over into a zero."""
    gain = torch.full((36,), bits, dtype=torch.int32).view(torch.float32)
    y = rms_norm.trained(drawn(2, 36, dtype=torch.bfloat16).requires_grad_(), gain, 1e-5)
    assert y.isnan().all()
    inverses = torch.full((2,), bits, dtype=torch.int32).view(torch.float32)
    d_x, _ = cpp.norm_backward(
        drawn(2, 36, dtype=torch.bfloat16), drawn(2, 36, dtype=torch.bfloat16), None, inverses
    )
    assert d_x.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_tables_of_any_dtype(dtype: torch.dtype) -> None:
    projected, cos, sin = drawn(2, 7, 48).requires_grad_(), drawn(7, 4).to(dtype), drawn(7, 4, seed=1).to(dtype)
    found = rotary.turn_heads(projected, cos, sin, 2, 2, False)
    right = rotary.turn_heads(projected, cos.float(), sin.float(), 2, 2, False)
    assert all(ours.equal(theirs) for ours, theirs in zip(found, right, strict=True))


def test_heads_that_nobody_used_get_no_gradient() -> None:
    projected, tables = drawn(2, 7, 48).requires_grad_(), (drawn(7, 4), drawn(7, 4, seed=1))
    q, _, _ = rotary.turn_heads(projected, *tables, 2, 2, False)
    (gradient,) = torch.autograd.grad(q.sum(), projected)
    assert gradient[..., :16].any() and not gradient[..., 16:].any()


def test_batches_of_gradients_are_the_formulas() -> None:
    x, gain, tables = drawn(2, 3, 24), drawn(24), (drawn(3, 4), drawn(3, 4, seed=1))
    functions: list[Callable[[Tensor], Tensor]] = [
        lambda x: rms_norm.trained(x, gain, 1e-5),
        lambda x: rms_norm.trained(x, None, 1e-5),
        swiglu.swiglu,
        lambda x: torch.cat(rotary.turn_heads(x, *tables, 1, 1, False), dim=1),
    ]
    for function in functions:
        one_by_one, at_once = (
            torch.autograd.functional.jacobian(function, x, vectorize=vectorize) for vectorize in (False, True)
        )
        assert (one_by_one - at_once).abs().max() < 1e-5


def test_a_frozen_gain_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, gain = drawn(4, 16).requires_grad_(), drawn(16)
    wanted: list[object] = []
    backward = cpp.norm_backward
    monkeypatch.setattr(cpp, "norm_backward", lambda *a, **k: wanted.append(k["wants_gain"]) or backward(*a, **k))
    rms_norm.trained(x, gain, 1e-5).sum().backward()
    rms_norm.trained(x, gain.requires_grad_(), 1e-5).sum().backward()
    assert wanted == [False, True]
