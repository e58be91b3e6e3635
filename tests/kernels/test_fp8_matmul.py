"""Products in 8 bits: against the rounded operands multiplied in float64, and how far rounding itself is from the true product."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from scratchlm.data.loader import Batch
from scratchlm.errors import UserError
from scratchlm.kernels.fp8_matmul import BACKWARD, FORWARD, fits, fp8_linear, reference_fp8_linear, to_fp8
from scratchlm.model import ModelConfig, Transformer
from scratchlm.train.loss import NextTokenLoss
from scratchlm.train.precision import check_fp8

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
sizes = st.integers(1, 5).map(lambda n: 16 * n)


def drawn(rows: int, columns: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(rows, columns, generator=generator)).to(DEVICE, dtype)


@given(
    sizes, sizes, sizes, st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([1e-6, 1.0, 1e4]),
    st.integers(0, 9),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_product_and_gradients(
    rows: int, d_in: int, d_out: int, dtype: torch.dtype, scale: float, seed: int
) -> None:
    x = drawn(rows, d_in, seed, dtype, scale).requires_grad_()
    weight = drawn(d_out, d_in, seed + 100, dtype).requires_grad_()
    upstream = drawn(rows, d_out, seed + 200, torch.bfloat16)
    out = fp8_linear(x, weight)
    right = reference_fp8_linear(x, weight)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), right, rtol=2**-7, atol=2**-8 * float(right.detach().abs().max()))
    d_x, d_weight = torch.autograd.grad(out, (x, weight), upstream)
    (x8, x_scale), (w8, w_scale) = to_fp8(x, FORWARD), to_fp8(weight, FORWARD)
    d8, d_scale = to_fp8(upstream, BACKWARD)
    d = d8.double() * d_scale
    for ours, exact in (
        (d_x, d @ (w8.double() * w_scale)),
        (d_weight, d.T @ (x8.double() * x_scale)),
    ):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), exact, rtol=2**-6, atol=2**-7 * float(exact.detach().abs().max()))


@pytest.mark.parametrize(("dtype", "bits"), [(FORWARD, 3), (BACKWARD, 2)])
def test_rounding_is_as_fine_as_the_format(dtype: torch.dtype, bits: int) -> None:
    """Half a unit in the last place, for all that is not far below the largest."""
    x = drawn(64, 64, 0)
    rounded, scale = to_fp8(x, dtype)
    large = x.abs() > x.abs().max() / 1000
    error = ((rounded.float() * scale - x) / x)[large].abs().max()
    assert 2.0 ** -(bits + 3) < error <= 2.0 ** -(bits + 1)


@pytest.mark.parametrize("value", [0.0, 1e-30, 3e38])
def test_extremes_stay_finite(value: float) -> None:
    x = torch.full((16, 16), value)
    out = fp8_linear(x, torch.eye(16))
    assert out.isfinite().all()
    if value != 1e-30:  # so small a number is nothing beside the smallest scale
        torch.testing.assert_close(out.float(), x, rtol=0.01, atol=0)


def test_odd_sizes_are_left_to_others() -> None:
    weight = torch.zeros(32, 48)
    assert fits(torch.zeros(2, 8, 48), weight)
    assert not fits(torch.zeros(2, 7, 48), weight) and not fits(torch.zeros(0, 48), weight)
    assert not fits(torch.zeros(16, 48), torch.zeros(24, 48))


def test_a_model_in_training_uses_it_in_its_blocks_alone() -> None:
    config = ModelConfig(vocab_size=37, context_length=8, d_model=32, layers=2, heads=2, moe={"experts": 0})
    model = Transformer(config, seed=0)
    ids = torch.randint(0, 37, (4, 9), generator=torch.Generator().manual_seed(0))
    given_batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    found = {}
    for fp8 in (False, True):
        if fp8:
            model.multiply_in_fp8()
            assert not model.head.fp8
        loss = NextTokenLoss(model)(given_batch)
        found[fp8] = torch.autograd.grad(loss, list(model.parameters()))
    ours = torch.cat([g.flatten() for g in found[True]])
    exact = torch.cat([g.flatten() for g in found[False]])
    assert 0.01 < float((ours - exact).norm() / exact.norm()) < 0.2  # half a unit of e5m2 is an eighth
    model.eval()
    logits = model(given_batch.inputs)
    for module in model.modules():
        if hasattr(module, "fp8"):
            module.fp8 = False
    assert torch.equal(logits, model(given_batch.inputs))


def test_where_there_is_none_it_is_refused() -> None:
    with pytest.raises(UserError, match=r"train\.fp8 = true, but cpu does not multiply fp8"):
        check_fp8("bf16", torch.device("cpu"))


class Counting(TorchDispatchMode):
    """Products in fp8 that are computed: what checkpointing has kept does not come this far."""

    products = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += function is torch.ops.aten._scaled_mm.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["selective", "blocks"])
def test_checkpointing_keeps_or_repeats_its_products(kind: str) -> None:
    """`selective` keeps results of products, these too; the gradient is the same."""
    config = ModelConfig(vocab_size=37, context_length=8, d_model=32, layers=2, heads=2)
    ids = torch.randint(0, 37, (4, 9), generator=torch.Generator().manual_seed(0))
    found: dict[str, list[Tensor]] = {}
    products: dict[str, int] = {}
    for checkpointing in ("none", kind):
        model = Transformer(config, seed=0)
        model.multiply_in_fp8()
        loss = NextTokenLoss(model, checkpointing=checkpointing)
        with Counting() as seen:
            loss(Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())).backward()
        products[checkpointing] = seen.products
        found[checkpointing] = [p.grad for p in model.parameters() if p.grad is not None]
    for ours, right in zip(found[kind], found["none"], strict=True):
        assert torch.equal(ours, right)
    layers = 2 * 4
    assert products["none"] == 3 * layers
    assert products[kind] == (3 if kind == "selective" else 4) * layers
