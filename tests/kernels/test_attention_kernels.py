"""Attention: every implementation against loops in float64 and torch's own function."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scratchlm.kernels import attention as kernels
from scratchlm.kernels import blocked_attention as blocked
from scratchlm.kernels.attention import Scores, auto_attention, reference_attention, sdpa_attention
from scratchlm.kernels.blocked_attention import blocked_attention
from scratchlm.kernels.flash_attention import flash_attention
from scratchlm.kernels.flex_attention import flex_attention
from scratchlm.kernels.visibility import Rule, Visibility, columns_per_block, plan_of, scores_computed
from scratchlm.model.mask import SlidingWindow, Strided

KERNELS: dict[str, Callable[..., Tensor]] = {
    "reference": reference_attention,
    "sdpa": sdpa_attention,
    "blocked": functools.partial(blocked_attention, block=4),
    "blocked, 128": blocked_attention,
    "auto": auto_attention,
    "flash": functools.partial(flash_attention, tile=4),
    "flash, 128": flash_attention,
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


@dataclass(frozen=True, eq=False)
class Table(Rule):
    """A rule that looks every pair up in a matrix (…, positions, positions)."""

    matrix: Tensor

    def allowed(self, queries: Tensor, keys: Tensor, prefix: int | Tensor = 0) -> Tensor:
        return self.matrix[..., queries, :][..., keys]


def seen(matrix: Tensor, *, planned: bool = False, **more: Any) -> Visibility:
    rule, places = Table(matrix), torch.arange(matrix.shape[-1])
    plan = plan_of(rule, len(places), None, 4) if planned else None
    return Visibility(rule, places, places, columns=plan, block=4, **more)


@every_kernel
@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("shape", [(9, 9), (2, 9, 9)])
def test_any_rule_and_rows_that_may_read_nothing(
    kernel: Callable[..., Tensor], shape: tuple[int, ...], kv_heads: int
) -> None:
    """A row whose keys are all padding gives zeros, no NaN, and no gradient."""
    tensors = [t.requires_grad_() for t in drawn(9, kv_heads=kv_heads)]
    q, k, v = tensors
    matrix = (torch.rand(shape, generator=torch.Generator().manual_seed(5)) < 0.4) | torch.eye(9).bool()
    matrix[..., 3, :] = torch.arange(9) == 3
    valid = (torch.arange(9) != 3).expand(2, 9)
    full = (matrix & valid[:, None, :]).expand(2, 9, 9)
    ours = kernel(q, k, v, seen(matrix, key_mask=valid))
    for row in range(2):
        for head in range(4):
            reads = slice(head * kv_heads // 4, head * kv_heads // 4 + 1)
            one = by_loops(
                q[row, head : head + 1].detach(), k[row, reads].detach(), v[row, reads].detach(), full[row]
            )
            np.testing.assert_allclose(ours[row, head].detach().numpy(), one[0], rtol=1e-4, atol=1e-5)
    assert not ours[..., 3, :].any()
    d_q, d_k, d_v = torch.autograd.grad(ours.square().sum(), tensors)
    assert not d_q[..., 3, :].any()
    assert all(gradient.isfinite().all() and gradient.any() for gradient in (d_q, d_k, d_v))


def by_formula(
    q: Tensor, k: Tensor, v: Tensor, matrix: Tensor, scores: Scores, away: Callable[[int, int], int]
) -> np.ndarray:
    """One head's attention with everything that may happen to a score, number by number; q (heads, t, width)."""
    heads, length, width = q.shape
    out = np.zeros((heads, length, v.shape[-1]))
    for h in range(heads):
        kv = h // (heads // k.shape[0])
        for i in range(length):
            terms = []
            for j in range(length):
                if not matrix[i, j]:
                    continue
                score = float(q[h, i] @ k[kv, j]) * (width**-0.5 if scores.scale is None else scores.scale)
                if scores.soft_cap is not None:
                    score = scores.soft_cap * math.tanh(score / scores.soft_cap)
                if scores.slopes is not None:
                    score -= float(scores.slopes[h]) * away(i, j)
                terms.append((math.exp(score), v[kv, j].numpy()))
            total = sum(weight for weight, _ in terms)
            total += 0.0 if scores.sinks is None else math.exp(float(scores.sinks[h]))
            out[h, i] = sum(weight / total * value for weight, value in terms)
    return out


@pytest.mark.parametrize("kernel", [*KERNELS.values(), flex_attention], ids=[*KERNELS, "flex"])
@pytest.mark.parametrize("plan", ["causal", "rule", "planned rule", "documents"])
@pytest.mark.parametrize("what", ["scale", "soft_cap", "slopes", "sinks", "scale soft_cap slopes sinks"])
def test_everything_that_happens_to_scores(kernel: Callable[..., Tensor], plan: str, what: str) -> None:
    q, k, v = (2 * t for t in drawn(9, kv_heads=2, dtype=torch.float64))
    v = torch.cat([v, v.flip(-1)], dim=-1)[..., :8]  # values wider than keys
    options = {
        "scale": 0.7,
        "soft_cap": 1.5,
        "slopes": torch.tensor([0.5, 0.25, 0.1, 0.7], dtype=torch.float64),
        "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64),
    }
    scores = Scores(**{name: options[name] for name in what.split()})  # type: ignore[arg-type]
    matrix = torch.ones(9, 9).tril().bool()
    visible = None
    if plan in ("rule", "planned rule"):
        matrix = matrix & (torch.rand(9, 9, generator=torch.Generator().manual_seed(1)) < 0.5) | torch.eye(9).bool()
        visible = seen(matrix, planned=plan == "planned rule")
    elif plan == "documents":
        documents = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 2, 2]] * 2)
        visible = seen(matrix, query_documents=documents, key_documents=documents)
        matrix = matrix & (documents[0][:, None] == documents[0])
    ours = kernel(q, k, v, visible, scores)
    for row in range(2):
        expected = by_formula(q[row], k[row], v[row], matrix, scores, lambda i, j: abs(i - j))
        np.testing.assert_allclose(ours[row].numpy(), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("what", ["sinks", "slopes", "both", "sinks and a window"])
@pytest.mark.parametrize("length", [1, 2, 9, 140, 600])
def test_reading_without_gradients(
    length: int, what: str, kv_heads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sinks from the sums that flash attention tells, ALiBi as one mask: as the formula; with gradients nothing is asked."""
    flash, real = [], kernels._flash_with_sinks
    monkeypatch.setattr(kernels, "_flash_with_sinks", lambda *given: flash.append(1) or real(*given))
    q, k, v = (t.to(dtype) for t in drawn(length, kv_heads=kv_heads, dtype=torch.float64))
    sinks = torch.tensor([0.5, -30.0, 2.0, 40.0], dtype=dtype)
    slopes = torch.tensor([0.5, 0.25, 0.125, 1.0], dtype=torch.float64)
    scores = Scores(0.7, None, slopes if what in ("slopes", "both") else None, None if what == "slopes" else sinks)
    visible = Visibility.of_sequence(SlidingWindow(5), length) if "window" in what else None
    with torch.no_grad():
        found = auto_attention(q, k, v, visible, scores)
    exact = reference_attention(q.double(), k.double(), v.double(), visible, scores)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    assert found.dtype == dtype
    assert (found.double() - exact).abs().max() <= tolerance * (1 + exact.abs().max())
    short = length <= kernels.SHORT or visible is None
    assert bool(flash) == (what.startswith("sinks") and length > 1 and short)
    flash.clear()
    sinks.requires_grad_()
    auto_attention(q, k, v, visible, scores)
    assert not flash


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sunk", [False, True])
def test_layers_share_what_follows_from_the_mask(
    dtype: torch.dtype, sunk: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mask and ALiBi's distances are computed for the first layer of a pass, and are each layer's own where they differ."""
    asked: list[int] = []
    visible = seen(torch.ones(9, 9).tril().bool() & (torch.rand(9, 9) < 0.7) | torch.eye(9).bool())
    tile = Visibility.tile
    monkeypatch.setattr(Visibility, "tile", lambda self, *given: asked.append(1) or tile(self, *given))
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0]) if sunk else None
    for slopes in (torch.tensor([0.5, 0.25, 0.1, 0.7]), torch.tensor([0.1, 0.2, 0.3, 0.4])):
        for seed in (1, 2):
            q, k, v = (seed * t for t in drawn(9, kv_heads=2, dtype=dtype))
            scores = Scores(slopes=slopes, sinks=sinks)
            found = sdpa_attention(q, k, v, visible, scores)
            fresh = replace(visible, memo={})
            exact = reference_attention(q.double(), k.double(), v.double(), fresh, scores)
            asked.pop()  # by the formula
            assert (found.double() - exact).abs().max() < (0.03 if dtype == torch.bfloat16 else 1e-5) * 4
    assert len(asked) == 1


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("kernel", [blocked_attention, auto_attention, flash_attention])
def test_reading_in_place_changes_nobodys_tensors(kernel: Callable[..., Tensor], cap: float | None) -> None:
    q, k, v = drawn(140, kv_heads=2)
    before = [t.clone() for t in (q, k, v)]
    visible = Visibility.of_sequence(SlidingWindow(9), 140)
    slow = kernel(q.clone().requires_grad_(), k, v, visible, Scores(0.7, cap))
    with torch.no_grad():
        fast = kernel(q, k, v, visible, Scores(0.7, cap))
        assert all(a.equal(b) for a, b in zip((q, k, v), before, strict=True))
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("widths", [(6, 4), (4, 6)])
def test_keys_and_values_of_different_widths_reach_the_fused_kernel(
    widths: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen_by_torch: list[tuple[int, int]] = []
    real = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda q, k, v, **o: seen_by_torch.append((k.shape[-1], v.shape[-1])) or real(q, k, v, **o),
    )
    q, k, v = drawn(9, kv_heads=2)
    q, k, v = q[..., : widths[0]], k[..., : widths[0]], v[..., : widths[1]]
    found = sdpa_attention(q, k, v)
    assert seen_by_torch == [(6, 6)] and found.shape[-1] == widths[1]
    torch.testing.assert_close(found, reference_attention(q, k, v), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "visible", [None, seen(torch.ones(9, 9).tril(-1).bool() | torch.eye(9).bool())], ids=["causal", "mask"]
)
def test_where_torch_does_not_share_keys_they_are_repeated(
    visible: Visibility | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads: list[int] = []
    real = F.scaled_dot_product_attention
    monkeypatch.setattr(kernels, "shares_keys", lambda q: False)
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, k, v, **o: heads.append(k.shape[-3]) or real(q, k, v, **o)
    )
    q, k, v = drawn(9, kv_heads=2)
    torch.testing.assert_close(
        sdpa_attention(q, k, v, visible), reference_attention(q, k, v, visible), rtol=1e-5, atol=1e-6
    )
    sdpa_attention(q[..., -1:, :], k, v)
    assert heads == [q.shape[-3], 2]  # one query needs no copies


@every_kernel
def test_gradients_of_everything_at_once(kernel: Callable[..., Tensor]) -> None:
    tensors = [t.requires_grad_() for t in drawn(9, kv_heads=2, dtype=torch.float64)]
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True)
    scores = Scores(0.7, 1.5, torch.tensor([0.5, 0.25, 0.1, 0.7], dtype=torch.float64), sinks)
    matrix = (torch.ones(9, 9).tril() * (torch.rand(9, 9, generator=torch.Generator().manual_seed(1)) < 0.5)).bool()
    visible = seen(matrix | torch.eye(9).bool(), planned=True)
    wanted = [*tensors, sinks]
    ours = torch.autograd.grad(kernel(*tensors, visible, scores).sin().sum(), wanted)
    theirs = torch.autograd.grad(reference_attention(*tensors, visible, scores).sin().sum(), wanted)
    for gradient, exact in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("block", [4, 128])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("stride", [1, 3, 5, 40])
def test_a_mask_in_parts(stride: int, packed: bool, block: int) -> None:
    """The strided mask's two patterns, computed apart in their own orders, are the whole mask; and so are the gradients."""
    length = 23
    tensors = [t.requires_grad_() for t in drawn(length, kv_heads=2, dtype=torch.float64)]
    sinks = torch.tensor([0.5, -1.0, 60.0, 0.0], dtype=torch.float64, requires_grad=True)
    scores = Scores(0.7, 1.5, torch.tensor([0.5, 0.25, 0.1, 0.7], dtype=torch.float64), sinks)
    documents = torch.tensor([[0] * 9 + [1] * 14, [0] * 23]) if packed else None
    whole = Visibility.of_sequence(Strided(stride), length, documents=documents, block=block)
    places = torch.arange(length)
    table = torch.tensor([[i >= j and (i - j < stride or (i - j) % stride == 0) for j in places] for i in places])
    dense = Visibility(Table(table), places, places, query_documents=documents, key_documents=documents)
    undivided = sum(
        len(range(start, min(start + block, length))) * sum(b - a for a, b in spans)
        for start, spans in zip(
            range(0, length, block), columns_per_block(Strided(stride), length, block), strict=True
        )
    )
    computed = scores_computed(Strided(stride), length, block)
    assert computed <= undivided and bool(whole.parts) == (computed < undivided)
    assert bool(whole.parts) == (block == 4 and stride in (3, 5)), "parts only where they save"
    assert torch.equal(whole.matrix(), dense.matrix())
    ours, theirs = blocked_attention(*tensors, whole, scores), reference_attention(*tensors, dense, scores)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(flash_attention(*tensors, whole, scores), theirs, rtol=1e-9, atol=1e-11)
    wanted = [*tensors, sinks]
    gradients = [torch.autograd.grad(out.sin().sum(), wanted) for out in (ours, theirs)]
    for gradient, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-8, atol=1e-10)


@pytest.mark.filterwarnings("ignore:attention_kernel = flash has no dropout")
@every_kernel
def test_dropout_keeps_the_mean(kernel: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    q, k, v = drawn(6, lead=(1,))
    exact = kernel(q, k, v)
    many = torch.stack([kernel(q, k, v, None, Scores(dropout=0.3)) for _ in range(2000)])
    assert many.std(dim=0).max() > 0.1
    torch.testing.assert_close(many.mean(dim=0), exact, rtol=0, atol=0.1)


def test_columns_of_a_plan_are_those_that_are_read() -> None:
    """Brute force over pairs, for rules whose columns hang together and for those whose do not."""
    for seed in range(5):
        matrix = (torch.rand(11, 11, generator=torch.Generator().manual_seed(seed)) < 0.2) | torch.eye(11).bool()
        plan = columns_per_block(Table(matrix), 11, 4)
        for block, spans in enumerate(plan):
            read = {j for i in range(4 * block, min(11, 4 * block + 4)) for j in range(11) if matrix[i, j]}
            assert {j for start, end in spans for j in range(start, end)} == read
        sizes = [4, 4, 3]
        expected = sum(n * sum(e - s for s, e in spans) for n, spans in zip(sizes, plan, strict=True))
        assert scores_computed(Table(matrix), 11, 4) == expected


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
@pytest.mark.parametrize("kernel", [KERNELS[name] for name in ("reference", "blocked", "flash")])
def test_gradcheck(kernel: Callable[..., Tensor], length: int) -> None:
    tensors = drawn(length, heads=2, kv_heads=1, lead=(1,), width=2, dtype=torch.float64)
    assert torch.autograd.gradcheck(kernel, [t.requires_grad_() for t in tensors])


def test_float64_is_computed_in_float64() -> None:
    tensors = drawn(9, dtype=torch.float64)
    exact = F.scaled_dot_product_attention(*tensors, is_causal=True)
    for kernel in KERNELS.values():
        torch.testing.assert_close(kernel(*tensors), exact, rtol=1e-12, atol=1e-12)


def test_auto_takes_blocks_on_a_cpu_where_they_are_faster_only(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(blocked, "blocked_attention", lambda *_: called.append("blocked"))
    monkeypatch.setattr(kernels, "sdpa_attention", lambda *_: called.append("sdpa"))
    auto_attention(*drawn(5))
    auto_attention(*drawn(5, dtype=torch.bfloat16))  # no backward pass
    for length in (256, 257):
        q, k, v = drawn(length, width=2, lead=(), dtype=torch.bfloat16)
        auto_attention(q.requires_grad_(), k, v)
    assert called == ["sdpa", "sdpa", "blocked", "sdpa"]
    called.clear()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    auto_attention(*drawn(1024, width=2, lead=()))
    auto_attention(*drawn(1025, width=2, lead=()))
    assert called == ["blocked", "sdpa"]


@pytest.mark.parametrize("which", range(3))
def test_sinks_beside_tensors_whose_last_dimension_is_not_contiguous(which: int) -> None:
    """torch's flash attention for CPUs does not ask, and would read beyond the end."""
    tensors = [torch.randn(1, 2, 20, 8, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    tensors[which] = tensors[which].mT.contiguous().mT
    scores = Scores(sinks=torch.zeros(2))
    with torch.no_grad():
        found = sdpa_attention(tensors[0], tensors[1], tensors[2], None, scores)
    assert (found - reference_attention(tensors[0], tensors[1], tensors[2], None, scores)).abs().max() < 1e-5
