"""The loss's Triton kernel against the formula in float64: on a GPU where there is one, else in Triton's interpreter on the CPU."""

from __future__ import annotations

import warnings
from importlib.metadata import version

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_flash_attention_triton import ahead, compiles
from torch import Tensor
from triton_device import DEVICE

from scratchlm.kernels import cross_entropy as loss
from scratchlm.kernels import cross_entropy_triton as kernels
from scratchlm.kernels import triton_probe
from scratchlm.kernels.cross_entropy import IGNORE_INDEX, HeadOptions, chunked_linear_cross_entropy
from scratchlm.kernels.cross_entropy_triton import loss_and_gradient

BLOCK = 256
"""Of the tests, so that a small vocabulary has several."""
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDED = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""Of the gradient: a number of the dtype apart, which is what Triton's interpreter rounds bf16 to; fp32's is the arithmetic's."""
OPTIONS = {
    "plain": HeadOptions(),
    "scale": HeadOptions(scale=0.3),
    "cap": HeadOptions(soft_cap=2.0),
    "z": HeadOptions(z_loss=0.1),
    "all": HeadOptions(scale=1.7, soft_cap=1.5, z_loss=0.02),
}


@pytest.fixture(autouse=True)
def small_blocks(interpreted: list[warnings.WarningMessage], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BLOCK", BLOCK)
    monkeypatch.setattr(kernels, "WARPS", 4)


def silent(told: list[warnings.WarningMessage]) -> bool:
    return not [w for w in told if "torch's kernels" in str(w.message)]


def drawn(rows: int, vocab: int, dtype: torch.dtype, ignored: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    products = (torch.randn(rows, vocab, generator=generator) * 4).to(dtype)
    targets = torch.randint(vocab, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < ignored] = IGNORE_INDEX
    return products.to(DEVICE), targets.to(DEVICE)


def check(products: Tensor, targets: Tensor, options: HeadOptions, rtol: float = 2e-6) -> None:
    """Values, gradient and NaN as by the formula in float64, where the logits were."""
    objective, nats, gradient = loss._loss_and_gradient(products.double(), targets, options)
    place, dtype = products.data_ptr(), products.dtype
    found = loss_and_gradient(products, targets, options)
    assert found[0].dtype == found[1].dtype == torch.float32
    assert found[2].data_ptr() == place and found[2].dtype == dtype
    rtol += 4e-7 * (options.soft_cap or 0.0)  # the tanh's last digits
    size = max(1.0, targets.shape[0] ** 0.5)  # of what rows round off
    torch.testing.assert_close(found[0].double(), objective, rtol=rtol, atol=rtol * size, equal_nan=True)
    torch.testing.assert_close(found[1].double(), nats, rtol=rtol, atol=rtol * size, equal_nan=True)
    near = {"rtol": ROUNDED[dtype] + rtol, "atol": 1e-6}
    torch.testing.assert_close(found[2].double(), gradient, **near, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("vocab", [1, 2, 50, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK + 5])
def test_values_and_gradients(vocab: int, options: HeadOptions, dtype: torch.dtype) -> None:
    check(*drawn(5, vocab, dtype, ignored=0.3), options)
    check(*drawn(1, vocab, dtype), options)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(0, 6),
    vocab=st.integers(1, 700),
    ignored=st.sampled_from([0.0, 0.5, 1.1]),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1.0, 0.1, -1.0, 2.5]),
    soft_cap=st.sampled_from([None, 1.0, 30.0]),
    z_loss=st.sampled_from([0.0, 1e-4, 1.0]),
    seed=st.integers(0, 99),
)
def test_any_problem(
    rows: int,
    vocab: int,
    ignored: float,
    dtype: torch.dtype,
    scale: float,
    soft_cap: float | None,
    z_loss: float,
    seed: int,
) -> None:
    check(*drawn(rows, vocab, dtype, ignored, seed), HeadOptions(scale, soft_cap, z_loss), rtol=1e-5)


def test_all_ignored_costs_and_teaches_nothing() -> None:
    products, targets = drawn(4, 300, torch.bfloat16, ignored=1.1)
    products[1, 7] = float("nan")
    objective, nats, gradient = loss_and_gradient(products, targets, OPTIONS["all"])
    assert objective.item() == nats.item() == 0.0
    assert gradient is products and not products.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [HeadOptions(), HeadOptions(z_loss=1e-4), HeadOptions(soft_cap=20.0)], ids=str)
def test_extreme_logits(options: HeadOptions, dtype: torch.dtype) -> None:
    """±10⁴, −∞ in some columns, in the whole first block, in all but one column: as the formula, and finite."""
    vocab = 2 * BLOCK + 3
    products, targets = drawn(6, vocab, dtype)
    products[0] = torch.where(products[0] > 0, 1e4, -1e4)
    products[1, ::3] = float("-inf")
    products[2, :BLOCK] = float("-inf")
    products[3] = float("-inf")
    products[3, BLOCK + 7] = 2.0
    products[4] = -1e4
    products[4, vocab - 1] = 1e4
    products[5, BLOCK:] = 1e4
    targets[:] = torch.tensor([5, 1, BLOCK + 1, BLOCK + 7, vocab - 1, 3])
    check(products, targets, options)
    assert products.isfinite().all()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_shows(value: float) -> None:
    """A target that cannot be costs ∞; an infinite logit, a NaN or a row of −∞ give NaN, in their row alone."""
    products, targets = drawn(3, 300, torch.float32)
    products[1, 290] = value
    check(products, targets, HeadOptions())
    assert products.isfinite().all(dim=-1).tolist() == [True, False, True]
    products, targets = drawn(2, 300, torch.float32)
    products[0] = float("-inf")
    check(products, targets, HeadOptions())
    products, targets = drawn(2, 300, torch.float32)
    products[0, targets[0]] = float("-inf")
    check(products, targets, HeadOptions())
    assert products.isfinite().all()


@pytest.mark.parametrize("target", [300, -1, 2**40])
def test_a_target_that_is_no_token_is_not_passed_over(target: int) -> None:
    products, targets = drawn(3, 300, torch.float32)
    targets[1] = target
    objective, nats, gradient = loss_and_gradient(products, targets, HeadOptions())
    assert objective.isnan() and nats.isnan()
    assert gradient.isnan().all(dim=-1).tolist() == [False, True, False] and gradient[::2].isfinite().all()


def test_rows_that_lie_apart_and_what_lies_between_them() -> None:
    wide, targets = drawn(4, 400, torch.float32)
    untouched = wide[:, 300:].clone()
    targets = (targets % 300).repeat_interleave(2)[::2]
    check(wide[:, :300], targets, OPTIONS["all"])
    assert torch.equal(wide[:, 300:], untouched)
    with pytest.raises(ValueError, match="one piece"):
        loss_and_gradient(wide.T, targets, HeadOptions())


def test_without_a_gradient_the_logits_stay() -> None:
    products, targets = drawn(4, 300, torch.bfloat16, ignored=0.3)
    before = products.clone()
    exact = loss._loss_and_gradient(products.double(), targets, OPTIONS["all"])
    found = loss_and_gradient(products, targets, OPTIONS["all"], wants_gradient=False)
    assert torch.equal(products, before)
    torch.testing.assert_close(torch.stack(found[:2]).double(), torch.stack(exact[:2]), rtol=2e-6, atol=1e-6)


def test_two_runs_agree_to_the_bit() -> None:
    first, second = (loss_and_gradient(*drawn(4, 700, torch.bfloat16), OPTIONS["all"]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_small_vocabulary_takes_few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert kernels.tiling(50304) == {"BLOCK": 4096, "num_warps": 8}
    assert kernels.tiling(2000) == {"BLOCK": 2048, "num_warps": 4}
    assert kernels.tiling(65) == {"BLOCK": 128, "num_warps": 1}
    assert kernels.tiling(1) == {"BLOCK": 1, "num_warps": 1}


# --- as the loss of a model -----------------------------------------------------------------------------------------------


def problem(tokens: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((tokens, 16), (vocab, 16), (vocab,)))
    targets = torch.randint(vocab, (tokens,), generator=generator)
    targets[1::4] = IGNORE_INDEX
    x, weight, bias = (given.to(DEVICE, dtype).requires_grad_() for given in (x, weight, bias))
    return x, weight, bias, targets.to(DEVICE)


class Counted:
    """The kernel, and how often it was asked, for what gradients."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[bool] = []
        monkeypatch.setattr(kernels, "loss_and_gradient", self)

    def __call__(self, *args: Tensor, wants_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
        self.asked.append(wants_gradient)
        return loss_and_gradient(*args, wants_gradient=wants_gradient)  # type: ignore[arg-type]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rows", [4, 13, 64])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_chunked_loss_takes_it(
    with_bias: bool,
    rows: int,
    compiled: bool,
    monkeypatch: pytest.MonkeyPatch,
    told: list[warnings.WarningMessage],
) -> None:
    counted = Counted(monkeypatch)
    x, weight, bias, targets = problem(13, 300, torch.float32)
    learnt = (x, weight, bias) if with_bias else (x, weight)
    options = OPTIONS["all"]
    given = {"bias": bias if with_bias else None}
    found = chunked_linear_cross_entropy(x, weight, targets, options, **given, rows=rows, compiled=compiled)
    exact = loss.reference_linear_cross_entropy(
        x.double(), weight.double(), targets, options, bias=bias.double() if with_bias else None
    )
    assert counted.asked == [True] * (-(-13 // rows)) and silent(told)
    near = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(torch.stack(found).double(), torch.stack(exact), **near)
    theirs = torch.autograd.grad(2.5 * exact[0], learnt)
    torch.testing.assert_close(torch.autograd.grad(2.5 * found[0], learnt), theirs, **near)


@pytest.mark.parametrize("rows", [5, 64])
def test_in_bfloat16_under_autocast(
    rows: int, monkeypatch: pytest.MonkeyPatch, told: list[warnings.WarningMessage]
) -> None:
    counted = Counted(monkeypatch)
    x, weight, _, targets = problem(32, 300, torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = chunked_linear_cross_entropy(x, weight, targets, rows=rows)[0]
    assert counted.asked and silent(told) and found.dtype == torch.float32
    exact = loss.reference_linear_cross_entropy(x.double(), weight.double(), targets)[0]
    torch.testing.assert_close(found.double(), exact, rtol=5e-3, atol=0)
    theirs = torch.autograd.grad(exact, (x, weight))
    for gradient, right in zip(torch.autograd.grad(found, (x, weight)), theirs, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - right).norm() < 0.02 * right.norm()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.sampled_from([(0,), (1,), (BLOCK,), (7, 300), (3, BLOCK)]),
    dtype=st.sampled_from(DTYPES),
    wanted=st.sampled_from(DTYPES),
    by=st.sampled_from([0.0, 1.0, -1.7, 1 / 4097]),
)
def test_scaling_is_one_rounding(
    shape: tuple[int, ...], dtype: torch.dtype, wanted: torch.dtype, by: float
) -> None:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    factor = torch.tensor(by, device=DEVICE)
    found = kernels.scaled(x, factor, wanted)
    assert found.shape == x.shape and torch.equal(found, (x.float() * factor).to(wanted))


def test_gradients_are_scaled_by_it_and_products_added_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """With blocks of one row each, whose products of 1 and 1/512 a sum in bf16 would lose."""
    scaled: list[torch.dtype] = []
    scale = kernels.scaled
    monkeypatch.setattr(kernels, "scaled", lambda x, by, dtype: (scaled.append(dtype), scale(x, by, dtype))[1])
    monkeypatch.setattr(loss, "multiplies_wide", lambda device, dtype: True)
    total = torch.ones(2, 3, device=DEVICE)
    a, b = torch.full((2, 1), 2**-9, device=DEVICE), torch.ones(1, 3, device=DEVICE)
    for _ in range(4):
        assert loss._plus_product(total, a.bfloat16(), b.bfloat16(), torch.float32) is total
    assert torch.equal(loss._plus_product(None, a.bfloat16(), b.bfloat16(), torch.float32), a @ b)
    assert torch.equal(total, torch.full_like(total, 1 + 2**-7))
    x, weight, _, targets = problem(32, 300, torch.bfloat16)
    given = (x.double(), weight.double())
    found = chunked_linear_cross_entropy(x, weight, targets, rows=5)[0]
    exact = loss.reference_linear_cross_entropy(*given, targets)[0]
    ours = torch.autograd.grad(found / 3, (x, weight))
    assert scaled == [torch.bfloat16, torch.bfloat16]
    for gradient, right in zip(ours, torch.autograd.grad(exact / 3, given), strict=True):
        assert gradient.dtype == torch.bfloat16 and (gradient - right).norm() < 0.01 * right.norm()


def test_without_gradients_none_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch)
    x, weight, _, targets = problem(13, 300, torch.float32)
    with torch.no_grad():
        found = chunked_linear_cross_entropy(x, weight, targets, rows=5)
    assert counted.asked == [False] * 3
    torch.testing.assert_close(found, loss.reference_linear_cross_entropy(x, weight, targets))


def test_float64_stays_with_torch_without_a_word(
    monkeypatch: pytest.MonkeyPatch, told: list[warnings.WarningMessage]
) -> None:
    counted = Counted(monkeypatch)
    x, weight, _, targets = problem(5, 9, torch.float64)
    assert chunked_linear_cross_entropy(x, weight, targets)[0].dtype == torch.float64
    assert not counted.asked and silent(told)


def test_a_machine_without_a_compiler_gets_torchs_kernels_and_is_told_once(
    monkeypatch: pytest.MonkeyPatch, told: list[warnings.WarningMessage]
) -> None:
    def fails(device: torch.device) -> None:
        raise RuntimeError("Failed to find C compiler.\nmore")

    monkeypatch.setattr(triton_probe, "probe", fails)
    counted = Counted(monkeypatch)
    x, weight, _, targets = problem(5, 9, torch.float32)
    for _ in range(2):
        found = chunked_linear_cross_entropy(x, weight, targets)
        torch.testing.assert_close(found, loss.reference_linear_cross_entropy(x, weight, targets))
    assert not counted.asked
    assert [str(w.message) for w in told] == [
        "the loss and the logits' gradient are computed by torch's kernels, which is slower: triton does not run here "
        "(RuntimeError: Failed to find C compiler.)"
    ]


def test_a_gpu_gets_large_blocks() -> None:
    sizes = [
        loss.rows_for(vocab, compiled=compiled, device_type="cuda")
        for compiled in (False, True)
        for vocab in (1, 2**15, 2**15 + 1, 50304, 2**19, 2**24)
    ]
    assert sizes == [16384, 16384, 8192, 8192, 1024, 1024] * 2


# --- what the compiler and a GPU say --------------------------------------------------------------------------------------


@compiles
def test_the_compiler_needs_few_registers() -> None:
    """Of 65,536 on a processor: six programs of 256 threads fit with 40 (five with 48, which Triton 3.6 takes); two with 128, where rows begin anywhere."""
    few = 48 if version("triton").startswith("3.6.") else 40
    rows = ahead("90", "--loss")
    assert {(row["dtype"], row["capped"], row["vocab"]) for row in rows} == {
        (dtype, capped, vocab)
        for dtype in ("*bf16", "*fp32")
        for capped in (False, True)
        for vocab in (65, 50257, 50304)
    }
    for row in rows:
        most = 128 if row["vocab"] % 16 and row["vocab"] > 128 else few
        assert row["registers"] <= most and row["stack"] == 0, row


on_a_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="there is no GPU here")


@on_a_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [50304, 50257])
@pytest.mark.parametrize("options", [HeadOptions(), OPTIONS["all"]], ids=["plain", "all"])
def test_as_it_is_launched_on_a_gpu(
    options: HeadOptions, vocab: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    check(*drawn(512, vocab, dtype, ignored=0.1), options, rtol=1e-5)


@on_a_gpu
def test_more_than_two_to_the_31_logits() -> None:
    rows, vocab = 2**31 // 8192 + 3, 8192  # 4.3 GB
    if torch.cuda.mem_get_info()[0] < 6e9:
        pytest.skip("the GPU has less than 6 GB free")
    products = torch.zeros(rows, vocab, dtype=torch.bfloat16, device=DEVICE)
    last, targets = drawn(3, vocab, torch.bfloat16)
    products[-3:] = last
    ignored = torch.full((rows,), IGNORE_INDEX, device=DEVICE)
    ignored[-3:] = targets
    found = loss_and_gradient(products, ignored, HeadOptions())
    exact = loss._loss_and_gradient(last.double(), targets, HeadOptions())
    torch.testing.assert_close(found[1].double(), exact[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(products[-3:].double(), exact[2], rtol=2**-7, atol=1e-6)
    assert not products[:3].any()
