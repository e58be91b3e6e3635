"""FlashAttention-2 in C++ for CPUs: the formula's results and gradients, where it is chosen, and what happens where it cannot be had."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flash_cases import Case, answer, exact, largest_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from scratchlm.kernels import cpp_here
from scratchlm.kernels import flash_attention_cpp as cpp
from scratchlm.kernels import flash_attention_op as op
from scratchlm.kernels.attention import PLAIN, Scores, auto_attention, causal_triangle, reference_attention
from scratchlm.kernels.cpp_here import NoKernel
from scratchlm.kernels.flash_attention import flash_attention, tiled_attention
from scratchlm.kernels.visibility import Visibility
from scratchlm.machine import find_compiler, processor
from scratchlm.model.mask import Causal, PrefixLM, SlidingWindow

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

pytestmark = pytest.mark.skipif(cpp_here.compiler() is None, reason="there is no C++ compiler")


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Visibility | None, scores: Scores) -> Tensor:
    """The kernels by themselves, also where another way would be faster."""
    assert cpp.objection(q, k, v, visible, scores) is None
    window = None if visible is None or visible.rule.is_plain_causal else visible.rule.reach
    return cpp.attention(q, k, v, scores.scale_of(q.shape[-1]), window)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any problem that the kernels take, tiles and vectors cut at any place."""
    queries = draw(st.integers(1, 110))
    more = draw(st.sampled_from([0, 0, 1, 50]))
    kv_heads = draw(st.sampled_from([1, 2]))
    return Case(
        queries=queries,
        keys=queries + more,
        batch=draw(st.integers(1, 2)),
        heads=kv_heads * draw(st.sampled_from([1, 3])),
        kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 40)),
        value_dim=draw(st.one_of(st.none(), st.integers(1, 40).map(lambda half: 2 * half))),
        window=draw(st.one_of(st.none(), st.integers(1, 120))),
        scale=draw(st.sampled_from([None, 1.0, 0.05])),
        magnitude=draw(st.sampled_from([1.0, 0.01, 5.0])),
        seed=draw(st.integers(0, 1000)),
    )


@settings(max_examples=40, deadline=None)
@given(case=cases(), dtype=st.sampled_from(DTYPES))
def test_the_formulas_answer_and_gradients(case: Case, dtype: torch.dtype) -> None:
    found, right = answer(attention, case, dtype), exact(case, dtype)
    for ours, exact_, size in zip(found, right, sizes(case, dtype), strict=True):
        assert (ours.double() - exact_).abs().max() < TOLERANCE[dtype] * max(size, 0.1)


def sizes(case: Case, dtype: torch.dtype) -> list[float]:
    """Of output and gradients of q, k, v: what is added up in them, without signs. In dP − D large numbers may leave next to nothing, to whose digits nobody
    is held."""
    q, k, v, upstream = (x.double() for x in case.tensors(dtype))
    k, v = (x.repeat_interleave(case.heads // case.kv_heads, dim=1) for x in (k, v))
    scale, visible = Scores(case.scale).scale_of(case.head_dim), case.visible()
    allowed = causal_triangle(case.queries, case.keys, q.device) if visible is None else visible.matrix()
    weights = (q @ k.mT * scale).masked_fill(~allowed, float("-inf")).softmax(dim=-1)
    d_weights = upstream.abs() @ v.abs().mT
    d_scores = weights * (d_weights + (weights * d_weights).sum(dim=-1, keepdim=True)) * scale
    added = weights @ v.abs(), d_scores @ k.abs(), d_scores.mT @ q.abs(), weights.mT @ upstream.abs()
    steep = max(
        1.0, float((q.abs() @ k.abs().mT).max()) * scale
    )  # a weight's error is its score's, not relative to it
    return [float(x.max()) * steep for x in added]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(queries=300, keys=300, batch=2, heads=4, kv_heads=4, head_dim=64),
        Case(queries=257, keys=401, heads=6, kv_heads=2, head_dim=256),
        Case(queries=200, keys=200, heads=2, head_dim=128, value_dim=64, window=33),
        Case(queries=1, keys=1),
        Case(queries=1, keys=97),
        Case(queries=48, keys=48, window=1),
    ],
    ids=str,
)
def test_sizes_worth_naming(case: Case, dtype: torch.dtype) -> None:
    assert largest_error(answer(attention, case, dtype), exact(case, dtype), cancelling=True) < TOLERANCE[dtype]


@pytest.mark.parametrize("defines", [("VECTOR=4",), ("VECTOR=16",), ("VECTOR=16", "BF16")], ids=" ".join)
def test_vectors_of_other_processors(defines: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiles and tails of vectors of 4 and 16 numbers, whatever this processor's are."""
    dtype = torch.bfloat16 if "BF16" in defines else torch.float32
    library = cpp_here.built(cpp.SOURCE, defines)
    monkeypatch.setattr(cpp, "library", lambda _: library)
    for case in (Case(queries=150, keys=163, heads=4, kv_heads=2, head_dim=40), Case(head_dim=22, window=9)):
        assert largest_error(answer(attention, case, dtype), exact(case, dtype)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_lie_in_memory_in_any_way(dtype: torch.dtype) -> None:
    """Views of one projection, heads outside, every second row, an odd beginning, a last dimension that is not contiguous."""
    drawn = torch.randn(2, 20, 3, 4, 18, generator=torch.Generator().manual_seed(0)).to(dtype)
    ways: list[Callable[[Tensor], Tensor]] = [
        lambda x: x,
        lambda x: x.contiguous(),
        lambda x: torch.stack([x, x], dim=-2).flatten(2, 3)[:, :, ::2],
        lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
        lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    ]
    plain = [drawn[:, :, n, :, :16].transpose(1, 2) for n in range(3)]
    out, sums = cpp.forward(*plain, 0.25, None)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    right = [out, sums, *cpp.backward(upstream, *plain, out, sums, 0.25, None)]
    for way in ways:
        moved = [way(x) for x in plain]
        found, found_sums = cpp.forward(moved[0], moved[1], moved[2], 0.25, None)
        gradients = cpp.backward(way(upstream), moved[0], moved[1], moved[2], way(out), sums, 0.25, None)
        for ours, theirs in zip([found, found_sums, *gradients], right, strict=True):
            assert ours.equal(theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_threads_to_the_bit(dtype: torch.dtype) -> None:
    case = Case(queries=130, keys=130, batch=3, heads=2, head_dim=32)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            found.append(answer(attention, case, dtype))
        finally:
            torch.set_num_threads(before)
    for other in found[1:]:
        assert all(ours.equal(theirs) for ours, theirs in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_no_number_comes_out_as_the_formula_has_it(dtype: torch.dtype) -> None:
    """NaN reaches who reads it and nobody else; a score of −∞ weighs nothing; nothing but −∞ is nothing read."""
    q, k, v = (torch.randn(1, 1, 60, 16, generator=torch.Generator().manual_seed(n)).to(dtype) for n in range(3))
    k[0, 0, 50, 3] = float("nan")
    out, sums = cpp.forward(q, k, v, 1.0, None)
    assert out[0, 0, 50:].isnan().all() and sums[0, 0, 50:].isnan().all()
    assert out[0, 0, :50].isfinite().all()
    q, k = q.abs() + 1, k.nan_to_num().abs()
    k[0, 0, 20:30] = float("-inf")
    out, _ = cpp.forward(q, k, v, 1.0, None)
    rest = torch.cat([torch.arange(20), torch.arange(30, 60)])
    scores = (q[0, 0, -1:].double() @ k[0, 0, rest].double().T).softmax(-1) @ v[0, 0, rest].double()
    assert (out[0, 0, -1].double() - scores[0]).abs().max() < TOLERANCE[dtype]
    k[:] = float("-inf")
    out, sums = cpp.forward(q, k, v, 1.0, None)
    assert not out.any() and (sums == float("inf")).all()
    gradients = cpp.backward(torch.ones_like(out), q, k.clone().fill_(1.0), v, out, sums, 1.0, None)
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("magnitude", [1e-30, 3e2, 1e4])
def test_tiny_and_large_numbers(magnitude: float) -> None:
    case = Case(queries=70, keys=70, magnitude=magnitude, scale=1e-4)
    found = answer(attention, case, torch.float32)
    assert all(x.isfinite().all() for x in found)
    assert largest_error(Answered(found.out), Answered(exact(case, torch.float32).out)) < 1e-2


class Answered:
    """An output alone, scaled to 1: to compare without gradients."""

    def __init__(self, out: Tensor) -> None:
        self.out = out.double() / out.double().abs().max()

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.out,))


# --- where it is chosen -------------------------------------------------------------------------------------------------


def _training(dtype: torch.dtype = torch.float32, **changes: int) -> tuple[Tensor, Tensor, Tensor]:
    case = replace(Case(batch=max(2, torch.get_num_threads())), **changes)
    q, k, v = (x.to(dtype).requires_grad_() for x in case.tensors(torch.float32)[:3])
    return q, k, v


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of our kernels as they are called."""
    calls: list[str] = []
    for name in ("forward", "backward"):
        function = getattr(cpp, name)
        monkeypatch.setattr(
            cpp, name, lambda *given, name=name, function=function: calls.append(name) or function(*given)
        )
    return calls


def test_training_on_a_cpu_takes_it_and_reading_does_not(counted: list[str]) -> None:
    q, k, v = _training()
    auto_attention(q, k, v).sum().backward()
    assert counted == ["forward", "backward"]
    with torch.no_grad():
        auto_attention(q, k, v)
    auto_attention(q.detach(), k.detach(), v.detach())
    assert counted == ["forward", "backward"]
    flash_attention(q.detach(), k.detach(), v.detach())  # it was asked for by name
    assert counted == ["forward", "backward", "forward"]


def test_what_it_does_not_know_goes_elsewhere(counted: list[str]) -> None:
    q, k, v = _training()
    rule = PrefixLM()
    others = [
        (None, Scores(soft_cap=5.0)),
        (None, Scores(slopes=torch.ones(2))),
        (None, Scores(sinks=torch.ones(2))),
        (None, Scores(dropout=0.5)),
        (Visibility.of_sequence(rule, 37, torch.device("cpu")), PLAIN),
        (Visibility.of_sequence(Causal(), 37, torch.device("cpu"), documents=torch.arange(37) // 9), PLAIN),
    ]
    for visible, scores in others:
        auto_attention(q, k, v, visible, scores)
    few = _training(batch=1)
    if torch.get_num_threads() > 1:
        auto_attention(*few)  # a thread would have nothing to do
    odd = [x[..., :15].to(torch.bfloat16) for x in (q, k, v)]
    assert cpp.objection(odd[0], odd[1], odd[2], None, PLAIN) == "the width of a head is odd"
    assert counted == []
    auto_attention(q, k, v, Visibility.of_sequence(SlidingWindow(8), 37, torch.device("cpu")), Scores(scale=0.3))
    assert counted == ["forward"]


def test_shapes_that_do_not_fit_are_nothing_for_it(counted: list[str]) -> None:
    """What others would spread or refuse, its addresses must not read beyond the end."""
    q, k, v = _training(batch=4, kv_heads=2, heads=4)
    misfits = [
        (q, k[:1], v[:1]),
        (q, k, v[:1]),
        (q, k, v[:, :, :20]),
        (q[:, :3], k, v),
        (q, k[..., :8], v),
        (q[0], k[0], v[0]),
        (q, k.double(), v),
        (q, k.to("meta"), v),
    ]
    for case in misfits:
        assert cpp.objection(*case, None, PLAIN) is not None and cpp.misfit(*case) is not None
    assert (
        auto_attention(q, k[:1], v[:1]) - auto_attention(q, k[:1].expand_as(k), v[:1].expand_as(v))
    ).abs().max() < 1e-5
    assert counted == ["forward"]


def test_functorch_goes_elsewhere(counted: list[str]) -> None:
    q, k, v = _training()
    found = torch.func.grad(lambda x: auto_attention(x, k, v).square().sum())(q)
    assert counted == []
    auto_attention(q, k, v).square().sum().backward()
    assert q.grad is not None and (found - q.grad).abs().max() < 1e-4


@pytest.mark.parametrize("score", [1e5, 4e6, 1e10])
def test_large_scores_keep_their_digits(score: float) -> None:
    """The largest weight is 1, whatever the rounding of a large score times the scale: gradients of values say so."""
    case = Case(queries=70, keys=70, head_dim=8, magnitude=(score / 8 / 0.3) ** 0.5, scale=0.3)
    _, _, _, found = answer(attention, case, torch.float32)
    exact_ = exact(case, torch.float32)
    assert largest_error(Answered(found), Answered(exact_.gradients[2])) < 1e-3


def test_fewer_keys_than_queries() -> None:
    """The first queries read nothing; the operation, which a compiled graph holds, does these, too."""
    case = Case(queries=60, keys=33, heads=4, kv_heads=2)
    q, k, v, upstream = case.tensors(torch.float32)
    given_ = [x.requires_grad_() for x in (q, k, v)]
    out, sums = op._attention(*given_, *[None] * 6, 0.25, None, None)
    assert (sums[:, :, :27] == float("inf")).all() and not out[:, :, :27].any()
    gradients = torch.autograd.grad(out, given_, upstream)
    wide = [x.detach().double().requires_grad_() for x in given_]
    right = reference_attention(*wide, scores=Scores(scale=0.25))
    for ours, theirs in zip(gradients, torch.autograd.grad(right, wide, upstream.double()), strict=True):
        assert (ours - theirs).abs().max() < 1e-5


def test_bf16_is_for_processors_that_multiply_it(counted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    given_ = _training(torch.bfloat16)
    for native, tiles, known in itertools.product((True, False), repeat=3):
        monkeypatch.setattr(cpp, "has_native_bf16", lambda _, native=native: native)
        monkeypatch.setattr(cpp, "has_amx", lambda tiles=tiles: tiles)
        monkeypatch.setattr(cpp, "multiplies_bf16", lambda known=known: known)
        counted.clear()
        auto_attention(*given_)
        assert counted == (["forward"] if native and not tiles and known else [])


def test_under_autocast_fp32_is_left_to_the_others(counted: list[str]) -> None:
    q, k, v = _training()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        auto_attention(q, k, v)
    assert counted == []


def test_who_watches_sees_an_operation() -> None:
    """A counter of FLOPs gets what it counts for torch's kernel: all pairs, and two and a half times as much backward."""
    q, k, v = _training()
    with FlopCounterMode(display=False) as counter:
        auto_attention(q, k, v).sum().backward()
    assert counter.get_total_flops() == 4 * 37**2 * 16 * q.shape[0] * 2 * 3.5
    with torch.profiler.profile() as quiet:
        auto_attention(q, k, v).sum().backward()
    assert not any("flash_attention" in event.key for event in quiet.key_averages())


def test_a_compiled_graph_calls_it(counted: list[str]) -> None:
    torch._dynamo.reset()
    q, k, v = _training()
    compiled = torch.compile(auto_attention, backend="aot_eager", fullgraph=True)
    out = compiled(q, k, v)
    right = tiled_attention(*(x.detach().clone().requires_grad_() for x in (q, k, v)))
    assert (out - right).abs().max() < 1e-5
    out.sum().backward()
    assert counted == ["forward", "backward"]


def test_checked_by_torch() -> None:
    q, k, v = _training(value_dim=8)
    given_ = (q, k, v, *[None] * 6, 0.25, None, 9)
    torch.library.opcheck(op._attention, given_)
    out, sums = op._attention(*given_)
    detached = [x.detach() for x in (torch.ones_like(out), q, k, v, out, sums)]
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(op._backward, (*detached, *[None] * 5, 0.25, None, 9), test_utils=tests)


# --- building it --------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_kernels_yet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty folder of kept kernels, and nobody has asked for any in this process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def forget() -> None:
        for asked in (cpp.library, cpp_here.compiler, cpp_here._tried):
            asked.cache_clear()

    forget()
    yield tmp_path / "scratchlm" / "kernels"
    monkeypatch.undo()
    forget()


def test_what_was_compiled_is_kept(no_kernels_yet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *given, **how: made.append(given) or run(*given, **how))
    source = no_kernels_yet.parent / "one.cpp"
    source.parent.mkdir(parents=True)
    source.write_text('extern "C" int one() { return NUMBER; }\n', encoding="utf-8")
    for number in (1, 2, 2):
        assert cpp_here.built(source, [f"NUMBER={number}"]).one() == number
    assert len(made) == 2 and len(list(no_kernels_yet.iterdir())) == 2
    broken = sorted(no_kernels_yet.iterdir())
    assert all(path.name.startswith("one-") and path.suffix == ".so" for path in broken)


def test_a_broken_file_is_made_anew(no_kernels_yet: Path) -> None:
    source = no_kernels_yet.parent / "two.cpp"
    source.parent.mkdir(parents=True)
    source.write_text('extern "C" int two() { return 2; }\n', encoding="utf-8")
    script = (
        "import sys; from pathlib import Path; from scratchlm.kernels import cpp_here; "
        "assert cpp_here.built(Path(sys.argv[1])).two() == 2"
    )
    for _ in range(2):  # a process of its own: what is mapped must not be cut off under it
        subprocess.run([sys.executable, "-c", script, str(source)], check=True)
        (kept,) = no_kernels_yet.iterdir()
        whole = kept.read_bytes()
        kept.write_bytes(whole[:100])
    subprocess.run([sys.executable, "-c", script, str(source)], check=True)
    assert len(kept.read_bytes()) == len(whole)


def test_where_nothing_can_be_kept_it_works_all_the_same(
    no_kernels_yet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_kernels_yet.parent.mkdir(parents=True)
    no_kernels_yet.write_text("a file where the folder should be", encoding="utf-8")
    source = no_kernels_yet.parent / "three.cpp"
    source.write_text('extern "C" int three() { return 3; }\n', encoding="utf-8")
    assert cpp_here.built(source).three() == 3


def test_a_compiler_that_fails_is_told_of_once_and_torch_computes(
    no_kernels_yet: Path, monkeypatch: pytest.MonkeyPatch, told: list
) -> None:
    fails = no_kernels_yet.parent.parent / "bad-compiler"
    tries = fails.with_name("tries")
    said = "kernel.cpp:1: error: no such thing"
    fails.write_text(f"#!/bin/sh\necho x >> {tries}\necho '{said}' >&2\nexit 1\n", encoding="utf-8")
    fails.chmod(0o755)
    monkeypatch.setenv("CXX", str(fails))
    q, k, v = _training()
    for _ in range(3):
        out = auto_attention(q, k, v)
        assert (out - tiled_attention(q, k, v)).abs().max() < 1e-5
    (warning,) = [str(warning.message) for warning in told]
    assert "error: no such thing" in warning and "attention is computed by torch" in warning
    assert tries.read_text(encoding="utf-8") == "x\n"  # once
    with pytest.raises(NoKernel, match="no such thing"):
        cpp.forward(q, k, v, 1.0, None)


def test_without_a_compiler_nothing_is_said(
    no_kernels_yet: Path, monkeypatch: pytest.MonkeyPatch, told: list, counted: list[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert find_compiler() is None
    q, k, v = _training()
    auto_attention(q, k, v).sum().backward()
    flash_attention(q, k, v)
    assert not told and not counted
    with pytest.raises(NoKernel, match="no C\\+\\+ compiler"):
        cpp.library(torch.float32)


def test_it_can_be_switched_off(no_kernels_yet: Path, monkeypatch: pytest.MonkeyPatch, counted: list[str]) -> None:
    monkeypatch.setenv(cpp_here.SWITCH, "0")
    auto_attention(*_training())
    assert not counted and not cpp.is_worth_it(torch.float32)


def test_the_library_tells_of_its_processor() -> None:
    said = " ".join(processor()).split()
    assert cpp.multiplies_bf16() <= ("avx512_bf16" in said)  # an old compiler may not know it


def test_how_a_workspace_grows_is_known_before_anything_is_compiled() -> None:
    """The formula says what the kernels ask for, but for what does not grow with the keys."""
    for back in (False, True):
        asked = [
            cpp.library(torch.float32).attention_workspace(
                cpp._given(*(torch.empty(1, 1, keys, width) for width in (64, 64, 32)), None), int(back)
            )
            for keys in (0, 1024, 4096)
        ]
        told = [cpp.workspace(keys, 64, 32, back=back) for keys in (0, 1024, 4096)]
        assert [a - asked[0] for a in asked] == told
        assert asked[0] < 2**20
