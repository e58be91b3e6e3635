"""Attention: three implementations against loops in float64 and torch's own function."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scratchlm.kernels import attention as kernels
from scratchlm.kernels.attention import (
    auto_attention,
    blocked_causal_attention,
    reference_attention,
    sdpa_attention,
)

KERNELS: dict[str, Callable[..., Tensor]] = {
    "reference": reference_attention,
    "sdpa": sdpa_attention,
    "blocked": functools.partial(blocked_causal_attention, block=4),
    "blocked, 128": blocked_causal_attention,
    "auto": auto_attention,
}
every_kernel = pytest.mark.parametrize("kernel", KERNELS.values(), ids=list(KERNELS))


def drawn(
    queries: int,
    keys: int | None = None,
    *,
    heads: int = 4,
    kv_heads: int = 4,
    lead: tuple[int, ...] = (2,),
    width: int = 6,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    keys = queries if keys is None else keys
    generator = torch.Generator().manual_seed(queries * 1000 + keys)
    shapes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    q, k, v = (torch.randn(*lead, *shape, width, generator=generator, dtype=torch.float64) for shape in shapes)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def by_loops(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> np.ndarray:
    """The definition, one query at a time, in float64; q (heads, queries, width)."""
    heads, queries, width = q.shape
    group, keys = heads // k.shape[0], k.shape[1]
    out = np.zeros((heads, queries, width))
    for head in range(heads):
        keys_of, values_of = k[head // group].double().numpy(), v[head // group].double().numpy()
        for i in range(queries):
            readable = [j for j in range(keys) if (j <= i + keys - queries if mask is None else bool(mask[i, j]))]
            scores = [float(q[head, i].double().numpy() @ keys_of[j]) / math.sqrt(width) for j in readable]
            if scores:
                weights = [math.exp(score - max(scores)) for score in scores]
                out[head, i] = sum(w * values_of[j] for w, j in zip(weights, readable, strict=True)) / sum(weights)
    return out


@every_kernel
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 7), (8, 8), (9, 9), (1, 5), (3, 8)])
def test_the_definition(kernel: Callable[..., Tensor], queries: int, keys: int, kv_heads: int) -> None:
    q, k, v = drawn(queries, keys, kv_heads=kv_heads, lead=())
    np.testing.assert_allclose(kernel(q, k, v).numpy(), by_loops(q, k, v), rtol=1e-4, atol=1e-5)


@every_kernel
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 127, 128, 129, 256, 300])
def test_torchs_own_function_and_its_gradients(kernel: Callable[..., Tensor], length: int, kv_heads: int) -> None:
    tensors = [t.requires_grad_() for t in drawn(length, kv_heads=kv_heads)]
    theirs = F.scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=kv_heads != 4)
    upstream = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad((theirs * upstream).sum(), tensors)
    ours = kernel(*tensors)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for gradient, exact in zip(torch.autograd.grad((ours * upstream).sum(), tensors), expected, strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-3, atol=1e-5)


@every_kernel
@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("shape", [(9, 9), (1, 1, 9, 9), (2, 1, 9, 9), (2, 4, 9, 9)])
def test_a_mask_and_rows_that_may_read_nothing(
    kernel: Callable[..., Tensor], shape: tuple[int, ...], kv_heads: int
) -> None:
    """Such a row gives zeros, no NaN, and no gradient."""
    tensors = [t.requires_grad_() for t in drawn(9, kv_heads=kv_heads)]
    q, k, v = tensors
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(5)) < 0.4
    mask[..., 3, :] = False
    full = mask.expand(2, 4, 9, 9)
    ours = kernel(q, k, v, mask)
    for row in range(2):
        for head in range(4):
            reads = slice(head * kv_heads // 4, head * kv_heads // 4 + 1)
            one = by_loops(
                q[row, head : head + 1].detach(), k[row, reads].detach(), v[row, reads].detach(), full[row, head]
            )
            np.testing.assert_allclose(ours[row, head].detach().numpy(), one[0], rtol=1e-4, atol=1e-5)
    assert not ours[..., 3, :].any()
    d_q, d_k, d_v = torch.autograd.grad(ours.square().sum(), tensors)
    assert not d_q[..., 3, :].any()
    assert all(gradient.isfinite().all() and gradient.any() for gradient in (d_q, d_k, d_v))


@every_kernel
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3)])
def test_leading_dimensions(kernel: Callable[..., Tensor], lead: tuple[int, ...]) -> None:
    q, k, v = drawn(6, kv_heads=2, lead=lead)
    out = kernel(q, k, v)
    assert out.shape == q.shape
    flat = [t.reshape(-1, *t.shape[-3:]) for t in (q, k, v)]
    for row, expected in enumerate(out.reshape(-1, *out.shape[-3:])):
        one = [t[row] for t in flat]
        np.testing.assert_allclose(expected.numpy(), by_loops(*one), rtol=1e-4, atol=1e-5)


@every_kernel
def test_nothing_gives_nothing(kernel: Callable[..., Tensor]) -> None:
    assert kernel(*drawn(0)).shape == (2, 4, 0, 6)
    assert kernel(*drawn(5, lead=(0,))).shape == (0, 4, 5, 6)


@every_kernel
def test_enormous_scores(kernel: Callable[..., Tensor]) -> None:
    """Scores of ±10⁴ pick one key and stay finite."""
    q = torch.full((1, 1, 5, 4), 100.0)
    k = torch.full((1, 1, 5, 4), -50.0)
    k[..., 2, :] = 50.0  # score 100 · 50 · 4 / √4 = +10⁴, all others −10⁴
    v = torch.arange(5.0).view(1, 1, 5, 1).expand(1, 1, 5, 4).clone()
    tensors = [t.requires_grad_() for t in (q, k, v)]
    out = kernel(*tensors)
    torch.testing.assert_close(out[0, 0, :, 0], torch.tensor([0.0, 0.5, 2.0, 2.0, 2.0]))
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(out.sum(), tensors))


@every_kernel
def test_bfloat16_stays_near_and_keeps_its_dtype(kernel: Callable[..., Tensor]) -> None:
    q, k, v = drawn(130, dtype=torch.bfloat16)
    out = kernel(q, k, v)
    assert out.dtype == torch.bfloat16
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    torch.testing.assert_close(out.double(), exact, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("length", [1, 3, 4, 6])
@pytest.mark.parametrize("kernel", [KERNELS["reference"], KERNELS["blocked"]], ids=["reference", "blocked"])
def test_gradcheck(kernel: Callable[..., Tensor], length: int) -> None:
    tensors = drawn(length, heads=2, kv_heads=1, lead=(1,), width=2, dtype=torch.float64)
    assert torch.autograd.gradcheck(kernel, [t.requires_grad_() for t in tensors])


def test_float64_is_computed_in_float64() -> None:
    tensors = drawn(9, dtype=torch.float64)
    exact = F.scaled_dot_product_attention(*tensors, is_causal=True)
    for kernel in KERNELS.values():
        torch.testing.assert_close(kernel(*tensors), exact, rtol=1e-12, atol=1e-12)


def test_auto_takes_blocks_in_short_compiled_cpu_graphs_only(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(kernels, "blocked_causal_attention", lambda *_: called.append("blocked"))
    monkeypatch.setattr(kernels, "sdpa_attention", lambda *_: called.append("sdpa"))
    auto_attention(*drawn(5))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    auto_attention(*drawn(1024, width=2, lead=()))
    auto_attention(*drawn(1025, width=2, lead=()))
    assert called == ["sdpa", "blocked", "sdpa"]
