"""FlashAttention-2 tile by tile in torch, and its operations: the formula's results, its memory, its ways out."""

from __future__ import annotations

import functools
import re
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from flash_cases import Case, answer, exact, largest_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from scratchlm.kernels import attention, blocked_attention, flash_attention_cpp, triton_here
from scratchlm.kernels import flash_attention as flash
from scratchlm.kernels import flash_attention_op as op
from scratchlm.kernels.attention import PLAIN, Scores, auto_attention, reference_attention
from scratchlm.kernels.flash_attention import flash_attention, tiled_attention
from scratchlm.kernels.flash_attention_op import fused_attention, supports
from scratchlm.kernels.visibility import Visibility
from scratchlm.model.mask import Causal, PrefixLM, SlidingWindow, Strided

small_tiles = functools.partial(tiled_attention, tile=8)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any problem that both the formula and the kernels take."""
    queries = draw(st.integers(2, 40))
    more = draw(st.sampled_from([0, 0, 1, 9]))
    batch, kv_heads = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2]))
    cut = draw(st.integers(1, queries)) if more == 0 and draw(st.booleans()) else 0
    padding = draw(st.lists(st.integers(0, queries), min_size=batch, max_size=batch)) if draw(st.booleans()) else []
    return Case(
        queries=queries,
        keys=queries + more,
        batch=batch,
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head_dim=draw(st.integers(1, 20)),
        value_dim=draw(st.one_of(st.none(), st.integers(1, 20))),
        window=draw(st.one_of(st.none(), st.integers(1, 45))),
        documents=(cut, queries - cut) if cut else (),
        padding=tuple(padding),
        scale=draw(st.sampled_from([None, 0.4])),
        cap=draw(st.sampled_from([None, 1.5, 50.0])),
        alibi=draw(st.booleans()),
        sinks=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )


@settings(max_examples=60, deadline=None)
@given(case=cases(), tile=st.sampled_from([3, 8, 16, 128]))
def test_outputs_and_gradients_are_the_formulas(case: Case, tile: int) -> None:
    right = exact(case, torch.float64)
    for kernel in (functools.partial(tiled_attention, tile=tile), functools.partial(flash_attention, tile=tile)):
        found = answer(kernel, case, torch.float64)
        for ours, theirs in zip(found, right, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_the_operation_by_tiles_is_the_formula(case: Case) -> None:
    """What runs where Triton cannot: the same function, from the masks as the kernels get them."""
    q, k, v, _ = case.tensors(torch.float32)
    assert supports(case.visible(), case.scores(), q, k, v) is None
    assert largest_error(answer(fused_attention, case, torch.float32), exact(case, torch.float32)) < 1e-4


EVERYTHING = Case(
    queries=7,
    keys=7,
    heads=4,
    kv_heads=2,
    head_dim=3,
    value_dim=2,
    scale=0.7,
    cap=2.0,
    alibi=True,
    sinks=True,
)


@pytest.mark.parametrize(
    "case",
    [
        EVERYTHING,
        replace(EVERYTHING, window=4),
        replace(EVERYTHING, documents=(3, 4)),
        replace(EVERYTHING, batch=2, padding=(0, 3)),
        replace(EVERYTHING, queries=3),
    ],
    ids=str,
)
def test_gradcheck_of_everything_that_can_be_learnt(case: Case) -> None:
    q, k, v, _ = (x.requires_grad_() for x in case.tensors(torch.float64))
    scores = case.scores(torch.float64)
    assert scores.slopes is not None and scores.sinks is not None
    visible = case.visible()

    def function(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, sinks: Tensor) -> Tensor:
        return tiled_attention(q, k, v, visible, replace(scores, slopes=slopes, sinks=sinks), tile=4)

    given_ = q, k, v, scores.slopes.requires_grad_(), scores.sinks
    assert torch.autograd.gradcheck(function, given_)


@pytest.mark.parametrize(
    "rule", [PrefixLM(), Strided(3), Strided(40)], ids=["prefix_lm", "strided", "strided wide"]
)
def test_masks_that_only_the_tiles_know(rule: Any) -> None:
    case = replace(EVERYTHING, queries=23, keys=23)
    q, k, v, _ = case.tensors(torch.float64)
    visible = Visibility.of_sequence(rule, 23, block=4, prefix=7)
    found = tiled_attention(q, k, v, visible, case.scores(torch.float64), tile=4)
    torch.testing.assert_close(found, reference_attention(q, k, v, visible, case.scores(torch.float64)))


# --- precision ------------------------------------------------------------------------------------------------------------

BOUNDS = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Largest error, relative to the largest entry: a few roundings of the dtype (ε = 2e-16, 1.2e-7, 1e-3, 8e-3)."""


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(queries=300, keys=300, head_dim=64),
        Case(queries=300, keys=300, head_dim=128, window=100, magnitude=2.0),
        Case(queries=200, keys=300, cap=30.0, sinks=True, alibi=True),
    ],
    ids=str,
)
def test_errors_against_float64(case: Case, dtype: torch.dtype) -> None:
    found = answer(tiled_attention, case, dtype)
    assert found.out.dtype == dtype
    assert largest_error(found, exact(case, dtype)) < BOUNDS[dtype]


def test_autocast_decides_the_dtype() -> None:
    q, k, v, _ = Case().tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = flash_attention(q.requires_grad_(), k, v)
        assert out.dtype == torch.bfloat16
        assert flash_attention(q.double(), k.double(), v.double()).dtype == torch.float64
    exactly = flash_attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert torch.equal(out, exactly)
    out.float().sum().backward()
    assert q.grad is not None and q.grad.dtype == torch.float32


# --- −inf and NaN ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [small_tiles, fused_attention, reference_attention])
def test_rows_that_read_nothing_are_zero_and_learn_nothing(kernel: Any) -> None:
    case = Case(batch=2, padding=(37, 20), sinks=False)
    found = answer(kernel, case, torch.float32)
    assert not found.out[0].any() and not found.out[1, :, :20].any()
    assert found.out[1, :, 20:].abs().sum(dim=-1).min() > 0
    d_q, d_k, d_v = found.gradients
    assert not d_q[0].any() and not d_k[0].any() and not d_v[0].any()
    assert not d_q[1, :, :20].any() and not d_v[1, :, :20].any()
    assert all(x.isfinite().all() and x.any() for x in found.gradients)


@pytest.mark.parametrize("kernel", [small_tiles, fused_attention, reference_attention])
def test_a_key_of_minus_infinity_is_as_if_masked(kernel: Any) -> None:
    """Also where it is the first that a row reads, and where a row reads nothing else."""
    q, k, v, _ = Case(heads=1, head_dim=4).tensors(torch.float32)
    q = q.abs() + 0.1
    hidden = torch.tensor([0, 1, 9, 10, 36])
    k[:, :, hidden] = float("-inf")
    out = kernel(q, k, v, None, PLAIN)
    places = torch.arange(37)
    mask = torch.ones(1, 37, dtype=torch.bool)
    mask[:, hidden] = False
    right = reference_attention(q, k.nan_to_num(neginf=0.0), v, Visibility(Causal(), places, places, key_mask=mask))
    torch.testing.assert_close(out, right, rtol=1e-5, atol=1e-6)
    assert not out[:, :, :2].any()


@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("kernel", [small_tiles, fused_attention])
def test_nan_is_not_swallowed_and_not_spread_to_earlier_tiles(kernel: Any, where: str) -> None:
    """Whoever reads a NaN shows it; tiles before it, which do not look at it, stay clean."""
    names = dict(zip("qkv", Case(queries=300, keys=300, heads=1).tensors(torch.float32)[:3], strict=True))
    names[where][:, :, 200] = float("nan")
    out = kernel(*names.values(), None, PLAIN)
    shown = out.isnan().any(dim=-1)[0, 0]
    assert shown[200]
    assert not shown[:128].any()
    assert shown[201:].all() if where != "q" else not shown[201:].any()


def test_a_score_of_plus_infinity_is_nan_as_by_the_formula() -> None:
    q, k, v, _ = Case(heads=1).tensors(torch.float32)
    k[:, :, 5] = float("inf")
    q = q.abs() + 0.1
    torch.testing.assert_close(small_tiles(q, k, v).isnan(), reference_attention(q, k, v).isnan(), rtol=0, atol=0)


# --- what is kept, what is held, what is computed ------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Notes the most numbers that any tensor made meanwhile has."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("window", [None, 50])
def test_the_scores_never_exist_as_a_whole(window: int | None) -> None:
    """Forward and backward, at a length whose scores would be 25 times the largest tensor that there is."""
    case = Case(queries=1600, keys=1600, heads=2, kv_heads=1, head_dim=32, window=window)
    q, k, v, upstream = case.tensors(torch.float32)
    tensors = [x.requires_grad_() for x in (q, k, v)]
    watched = Largest()
    with watched:
        (tiled_attention(*tensors, case.visible()) * upstream).sum().backward()
    assert watched.numel <= 2 * 1600 * 32
    by_formula = Largest()
    with by_formula:
        reference_attention(*tensors, case.visible())
    assert by_formula.numel == 2 * 1600 * 1600


def test_kept_for_the_way_back_are_inputs_output_and_one_sum_per_query() -> None:
    kept: list[Tensor] = []
    case = Case(queries=300, keys=300, sinks=True)
    tensors = [x.requires_grad_() for x in case.tensors(torch.float32)[:3]]
    scores = case.scores()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = tiled_attention(*tensors, None, scores)
    assert {x.shape for x in kept} == {*(x.shape for x in tensors), out.shape, (1, 2, 300, 1), scores.sinks.shape}  # type: ignore[union-attr]
    assert len(kept) == 6


@pytest.mark.parametrize("window", [None, 100])
def test_tiles_that_the_mask_leaves_out_are_not_computed(window: int | None) -> None:
    case = Case(queries=1000, keys=1000, window=window)
    q, k, v, _ = case.tensors(torch.float32)
    with FlopCounterMode(display=False) as counter:
        tiled_attention(q, k, v, case.visible())
    starts = range(0, 1000, 128)
    pairs = sum((min(s + 128, 1000) - s) * (min(s + 128, 1000) - max(0, s - (window or 10**6) + 1)) for s in starts)
    assert counter.get_total_flops() == 2 * 2 * pairs * (16 + 16)
    assert pairs < (0.6 if window is None else 0.3) * 1000 * 1000


def test_two_runs_agree_to_the_bit() -> None:
    case = Case(queries=300, keys=300, sinks=True, window=90)
    first, second = (answer(tiled_attention, case, torch.bfloat16) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_second_derivative_is_refused_and_not_wrong() -> None:
    q, k, v, _ = Case(queries=5, keys=5).tensors(torch.float32)
    q.requires_grad_()
    for kernel in (tiled_attention, fused_attention):
        for out in (
            kernel(q, k, v, None, PLAIN).sin(),
            kernel(q, k, v, None, PLAIN),
        ):  # what comes from above: a function of q, a constant
            with pytest.raises(RuntimeError):
                (gradient,) = torch.autograd.grad(out.sum(), q, create_graph=True)
                gradient.sum().backward()


# --- the operations -------------------------------------------------------------------------------------------------------


def operands(case: Case, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    q, k, v, _ = (x.requires_grad_() for x in case.tensors(dtype))
    visible, scores = case.visible(), case.scores()
    documents = first = last = None
    if visible is not None and visible.query_documents is not None:
        documents = visible.query_documents
        first, last = op.document_reach(documents)
    mask = None if visible is None else visible.key_mask
    return q, k, v, scores.slopes, scores.sinks, documents, first, last, mask, 0.3, case.cap, case.window


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(batch=2, cap=3.0, sinks=True, alibi=True, documents=(9, 28), value_dim=5),
        Case(padding=(4,), window=9),
    ],
    ids=str,
)
def test_torch_accepts_the_operations(case: Case) -> None:
    """Schema, fakes (shapes and strides), autograd and compilation, by torch's own check."""
    given_ = operands(case)
    torch.library.opcheck(op._attention, given_)
    out, sums = op._attention(*given_)
    q, k, v, slopes, _, documents, first, last, mask, *numbers = given_
    masks = documents, first, last, mask
    tests = ("test_schema", "test_faketensor")
    detached = [x.detach() for x in (torch.ones_like(out), q, k, v, out, sums)]
    torch.library.opcheck(op._backward, (*detached, slopes, *masks, *numbers), test_utils=tests)


@pytest.mark.parametrize("case", [Case(), Case(sinks=True, window=9, documents=(20, 17))], ids=str)
def test_a_compiled_graph_holds_one_operation(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    calls: list[str] = []
    monkeypatch.setattr(flash_attention_cpp, "runs", lambda dtype: False)
    walk = flash.walk_forward
    monkeypatch.setattr(flash, "walk_forward", lambda *given: calls.append("tiles") or walk(*given))
    compiled = torch.compile(flash_attention, backend="aot_eager", fullgraph=True)
    assert largest_error(answer(compiled, case, torch.float32), exact(case, torch.float32)) < 1e-5
    assert calls == ["tiles"]


def test_the_counter_of_flops_knows_the_operations() -> None:
    case = Case(queries=300, keys=300, heads=4, kv_heads=2, value_dim=8)
    with FlopCounterMode(display=False) as counter:
        given_ = operands(case)
        out, _ = op._attention(*given_)
    forward = 2 * 4 * 300 * 300 * (16 + 8)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * 4 * 300 * 300 * (3 * 16 + 2 * 8)
    windowed = operands(replace(case, window=50))
    pairs = 128 * 128 + 128 * (256 - 79) + 44 * (300 - 207)
    with FlopCounterMode(display=False) as counter:
        op._attention(*windowed)
    assert counter.get_total_flops() == 2 * 4 * pairs * (16 + 8)


@pytest.mark.parametrize("shape", [(23,), (2, 23)])
def test_where_documents_begin_and_end(shape: tuple[int, ...]) -> None:
    documents = torch.randint(4, shape, generator=torch.Generator().manual_seed(1))
    first, last = op.document_reach(documents)
    for row, starts, ends in zip(documents.view(-1, 23), first.view(-1, 23), last.view(-1, 23), strict=True):
        for place, number in enumerate(row.tolist()):
            members = [i for i, other in enumerate(row.tolist()) if other == number]
            assert (int(starts[place]), int(ends[place])) == (members[0], members[-1])


# --- ways out -------------------------------------------------------------------------------------------------------------


def words(told: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in told]


def sequence(rule: Any = None, length: int = 9, **more: Any) -> Visibility:
    return Visibility.of_sequence(Causal() if rule is None else rule, length, **more)


NINE = torch.arange(9)
OBJECTIONS: dict[str, tuple[dict[str, Any], dict[str, Any], Visibility | None]] = {
    "dropped out": ({}, {"dropout": 0.1}, None),
    "dtypes": ({"dtype": torch.float64}, {}, None),
    "wider than 256": ({"width": 264}, {}, None),
    "nothing to compute": ({"width": 0}, {}, None),
    "not positive": ({}, {"scale": -1.0}, None),
    "learnt": ({}, {"slopes": torch.ones(4, requires_grad=True)}, None),
    "PrefixLM": ({}, {}, sequence(PrefixLM(), prefix=3)),
    "Strided": ({}, {}, sequence(Strided(2))),
    "positions differ": ({}, {}, Visibility(Causal(), NINE.expand(2, 9), NINE)),
    "another length": ({}, {}, sequence(length=8)),
    "of their own": ({}, {}, Visibility(Causal(), NINE, NINE, NINE // 2, NINE // 3)),
    "not .batch, keys.": ({}, {}, Visibility(Causal(), NINE, NINE, key_mask=torch.ones(3, 9).bool())),
    "more than one dimension": (
        {"lead": (1, 2)},
        {},
        Visibility(Causal(), NINE, NINE, key_mask=torch.ones(1, 9).bool()),
    ),
}


@pytest.mark.parametrize("says", list(OBJECTIONS))
def test_what_the_triton_kernels_do_not_do_they_say(says: str) -> None:
    inputs, options, visible = OBJECTIONS[says]
    shape = *inputs.get("lead", (2,)), 4, 9, inputs.get("width", 16)
    q = torch.zeros(shape, dtype=inputs.get("dtype", torch.float32))
    found = supports(visible, Scores(**options), q, q, q)
    assert found is not None
    assert re.search(says, found)


def test_on_cuda_an_unknown_mask_goes_to_another_kernel_and_is_told_once(
    told: list[warnings.WarningMessage], monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere: list[Any] = []
    monkeypatch.setattr(flash, "auto_attention", lambda *given: elsewhere.append(given) or given[0])
    with FakeTensorMode():
        q = torch.empty(2, 4, 9, 16, device="cuda")
        for _ in range(2):
            flash_attention(q, q, q, sequence(PrefixLM(), prefix=3, device=q.device))
        out = flash_attention(q, q, q, sequence(SlidingWindow(3), device=q.device), Scores(None, 30.0))
    assert len(elsewhere) == 2
    assert out.stride() == (9 * 4 * 16, 16, 4 * 16, 1), "the operation's own layout"
    assert words(told) == ["attention_kernel = flash leaves attention to another kernel: the mask is PrefixLM"]


def test_on_cuda_auto_takes_it_for_all_but_plain_causal_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch would go block by block, or make a mask of queries × keys."""
    monkeypatch.setattr(triton_here, "trouble", lambda device: None)
    taken: list[Any] = []
    for place, way in ((attention, "sdpa_attention"), (blocked_attention, "blocked_attention")):
        monkeypatch.setattr(place, way, lambda q, *_: q)
    monkeypatch.setattr(op, "fused_attention", lambda *given: taken.append(given) or given[0])
    with FakeTensorMode():
        q = torch.empty(2, 4, 300, 16, device="cuda", dtype=torch.bfloat16)
        k = torch.empty(2, 2, 300, 16, device="cuda", dtype=torch.bfloat16)
        documents = torch.zeros(2, 300, device="cuda", dtype=torch.int64)
        ones = torch.ones(4, device="cuda")

        def takes(rule: Any, *options: Any, q: Tensor = q, k: Tensor = k, **kinds: Any) -> bool:
            before = len(taken)
            visible = None if rule is None else sequence(rule, 300, device=q.device, **kinds)
            auto_attention(q, k, k, visible, Scores(*options))
            return len(taken) > before

        assert takes(SlidingWindow(30)) and takes(Causal(), documents=documents) and takes(None, None, 30.0)
        assert takes(None, None, None, ones) and takes(None, None, None, None, ones)
        assert not takes(None) and not takes(None, 0.5) and not takes(PrefixLM(), prefix=3)
        assert not takes(SlidingWindow(30), None, None, None, None, 0.1), "weights are dropped out"
        assert not takes(SlidingWindow(30), q=q.double(), k=k.double())
        assert not takes(None, None, None, ones.clone().requires_grad_()), "slopes are learnt"
        monkeypatch.setattr(triton_here, "trouble", lambda device: "no compiler")
        with pytest.warns(UserWarning, match="attention under a mask or a soft cap is computed by torch"):
            assert not takes(SlidingWindow(30))


def test_dropout_is_torchs_and_told_once(told: list[warnings.WarningMessage]) -> None:
    q, k, v, _ = Case().tensors(torch.float32)
    for _ in range(2):
        flash_attention(q, k, v, None, Scores(dropout=0.5))
    flash_attention(q[:, :, -1:], k, v)
    flash_attention(q, k, v)
    assert words(told) == ["attention_kernel = flash has no dropout; torch's attention computes it"]


def test_without_triton_the_operation_runs_and_says_so_once(
    told: list[warnings.WarningMessage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU without Triton: the device is taken for one on which the kernels should run."""
    monkeypatch.setattr(triton_here, "INTERPRETED", True)
    monkeypatch.setattr(triton_here.importlib.util, "find_spec", lambda name: None)
    case = Case(sinks=True, window=9)
    for _ in range(2):
        assert largest_error(answer(fused_attention, case, torch.float32), exact(case, torch.float32)) < 1e-5
    assert words(told) == [
        "attention_kernel = flash is computed tile by tile in torch, which is slower: triton is not installed"
    ]
