"""q‖k‖v split and rotated as one operation against the formula in float64: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_flash_attention_triton import ahead, compiles
from torch import Tensor
from triton_device import DEVICE

from scratchlm.kernels import rotary as kernels
from scratchlm.kernels import rotary_op, rotary_triton, rows_cpp, triton_probe
from scratchlm.kernels.rotary import turn_heads
from scratchlm.model.rope import half_split_pairs, interleaved_pairs

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDED = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Of a result that was computed in fp32: half the distance between two numbers of the dtype."""


@pytest.fixture(autouse=True)
def in_triton(interpreted: list[warnings.WarningMessage]) -> None:
    pass


@dataclass(frozen=True)
class Case:
    """A problem: `angles` are ``shared`` by the rows of the batch, ``own`` of each, or ``one`` of a batch of one for all."""

    batch: int = 2
    length: int = 7
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 6
    interleaved: bool = False
    angles: str = "shared"
    dtype: torch.dtype = torch.float32
    gradients: str = "heads inside"
    seed: int = 0

    def projected(self) -> Tensor:
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        return self._randn(self.batch, self.length, width).to(DEVICE, self.dtype)

    def table(self) -> tuple[Tensor, Tensor]:
        """cos and sin with a factor, as of a scaled RoPE: no pure rotation."""
        lead = {"shared": (), "own": (self.batch,), "one": (1,)}[self.angles]
        angles = 10 * self._randn(*lead, self.length, self.head_dim // 2)
        return (1.2 * angles.cos()).to(DEVICE), (1.2 * angles.sin()).to(DEVICE)

    def upstream(self) -> list[Tensor]:
        """Gradients of q, k and v as some attention lays them out."""
        return [self._laid_out(n) for n in (self.heads, self.kv_heads, self.kv_heads)]

    def _laid_out(self, heads: int) -> Tensor:
        x = self._randn(self.batch, heads, self.length, self.head_dim).to(DEVICE, self.dtype)
        if self.gradients == "heads inside":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if self.gradients == "numbers apart":
            return x.transpose(2, 3).contiguous().transpose(2, 3)
        if self.gradients == "with gaps":
            return torch.cat([x, x], dim=-1)[..., : self.head_dim]
        if self.gradients == "one number":
            return x.new_full((), 0.5).expand(x.shape)
        assert self.gradients == "heads outside"
        return x

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(self.seed + len(shape)))

    def answer(self) -> tuple[tuple[Tensor, ...], Tensor]:
        """q, k, v, and the gradient of the projection."""
        given = self.projected().requires_grad_()
        parts = turn_heads(given, *self.table(), self.heads, self.kv_heads, self.interleaved)
        (gradient,) = torch.autograd.grad(parts, given, self.upstream())
        return tuple(part.detach() for part in parts), gradient

    def exact(self) -> tuple[tuple[Tensor, ...], Tensor]:
        """The same by the formula, in float64."""
        given = self.projected().double().requires_grad_()
        cos, sin = (x.double() if self.angles == "shared" else x.double().unsqueeze(1) for x in self.table())
        heads = given.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        qk, v = heads.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
        turned = (interleaved_pairs if self.interleaved else half_split_pairs)(qk, cos, sin)
        parts = (*turned.split([self.heads, self.kv_heads], dim=1), v)
        (gradient,) = torch.autograd.grad(parts, given, [x.double() for x in self.upstream()])
        return tuple(part.detach() for part in parts), gradient


def check(case: Case) -> None:
    """Values, layout and gradient; what is not rotated to the bit."""
    parts, gradient = case.answer()
    right, right_gradient = case.exact()
    near = {"rtol": ROUNDED[case.dtype] + 1e-6, "atol": 2e-6}
    for part, exact in zip(parts, right, strict=True):
        assert part.dtype == case.dtype and part.transpose(1, 2).is_contiguous()
        torch.testing.assert_close(part.double(), exact, **near)
    assert torch.equal(parts[2].double(), right[2])
    assert gradient.dtype == case.dtype and gradient.is_contiguous()
    torch.testing.assert_close(gradient.double(), right_gradient, **near)
    values = case.kv_heads * case.head_dim
    assert torch.equal(gradient[..., -values:].double(), right_gradient[..., -values:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("angles", ["shared", "own", "one"])
def test_values_and_gradients(angles: str, interleaved: bool, dtype: torch.dtype) -> None:
    check(Case(interleaved=interleaved, angles=angles, dtype=dtype))


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("head_dim", [2, 64, 80, 128, 256])
def test_widths_of_heads_in_several_programs(head_dim: int, interleaved: bool) -> None:
    """Programs begin in the middle of a token, and end in the next row of the batch."""
    case = Case(batch=3, length=19, heads=5, kv_heads=1, head_dim=head_dim, interleaved=interleaved, angles="own")
    assert head_dim == 2 or rotary_triton.tiling(head_dim)["ROWS"] < case.length * 7
    check(case)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=st.builds(
        Case,
        batch=st.integers(0, 3),
        length=st.integers(0, 20),
        heads=st.integers(1, 7),
        kv_heads=st.integers(1, 3),
        head_dim=st.integers(1, 20).map(lambda half: 2 * half),
        interleaved=st.booleans(),
        angles=st.sampled_from(["shared", "own", "one"]),
        dtype=st.sampled_from(DTYPES),
        gradients=st.sampled_from(["heads inside", "heads outside", "numbers apart", "with gaps", "one number"]),
        seed=st.integers(0, 99),
    )
)
def test_any_problem(case: Case) -> None:
    check(case)


class Launches:
    """The tensors that the kernel is given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: list[tuple[Any, ...]] = []
        self.launch = rotary_triton._launch
        monkeypatch.setattr(rotary_triton, "_launch", self)

    def __call__(self, *given: Any, back: bool) -> None:
        self.found.append((*given, back))
        self.launch(*given, back=back)


@pytest.mark.parametrize("layout", ["heads inside", "heads outside", "with gaps", "numbers apart", "one number"])
def test_gradients_are_copied_only_where_a_head_is_not_in_one_piece(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches, case = Launches(monkeypatch), Case(gradients=layout)
    upstream = case.upstream()
    rotary_op.turn_heads_backward(*upstream, *case.table(), False)
    ((_, *gradients, _, _, _, back),) = launches.found
    same = [x.data_ptr() == y.data_ptr() for x, y in zip(gradients, upstream, strict=True)]
    assert back and same == 3 * [layout not in ("numbers apart", "one number")]


def test_a_table_that_is_part_of_a_larger_one() -> None:
    """cos and sin beside each other, or with positions side by side, need not lie in one piece."""
    case = Case(angles="own")
    apart, together = case.table(), torch.cat(case.table(), dim=-1)
    x, sizes = case.projected(), (case.heads, case.kv_heads, False)
    for cos, sin in (
        together.chunk(2, dim=-1),
        (apart[0], together[..., 3:]),
        [x.mT.contiguous().mT for x in apart],
    ):
        for ours, theirs in zip(turn_heads(x, cos, sin, *sizes), turn_heads(x, *apart, *sizes), strict=True):
            assert torch.equal(ours, theirs)


def test_a_projection_that_is_not_in_one_piece() -> None:
    case = Case()
    x, sizes = case.projected(), (case.heads, case.kv_heads, True)
    apart = x.mT.contiguous().mT
    assert not apart.is_contiguous()
    for ours, theirs in zip(
        turn_heads(apart, *case.table(), *sizes), turn_heads(x, *case.table(), *sizes), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_what_is_not_finite_stays_in_its_pair(interleaved: bool) -> None:
    """An infinite value of v is copied; one of q or k shows in both of its pair."""
    case = Case(batch=1, length=2, heads=1, kv_heads=1, interleaved=interleaved)
    x = case.projected()
    x[0, 0, 2 * 6 + 1] = float("inf")  # v
    x[0, 1, 1] = float("nan")  # q
    q, k, v = turn_heads(x, *case.table(), 1, 1, interleaved)
    assert torch.equal(v[0, 0], x[0, :, 12:])
    assert q.isnan().nonzero().tolist() == [[0, 0, 1, place] for place in ((0, 1) if interleaved else (1, 4))]
    assert k.isfinite().all()


def test_two_runs_agree_to_the_bit() -> None:
    (first, d_first), (second, d_second) = (Case(dtype=torch.bfloat16).answer() for _ in range(2))
    assert torch.equal(d_first, d_second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_sizes_that_do_not_fit_together() -> None:
    case = Case()
    x, (cos, sin) = case.projected(), case.table()
    with pytest.raises(ValueError, match=r"3 \+ 2 · 2 heads of an even width do not make up 48"):
        turn_heads(x, cos, sin, 3, 2, False)
    with pytest.raises(ValueError, match="of an even width"):
        turn_heads(x[..., :24], cos, sin, 4, 2, False)
    for wrong in (cos[:5], cos[:, :2], cos.expand(3, -1, -1)):
        with pytest.raises(ValueError, match="cos and sin of 2 × 7 tokens and 3 pairs cannot be"):
            turn_heads(x, wrong, wrong, 4, 2, False)
    with pytest.raises(ValueError, match="cannot be"):
        turn_heads(x, cos, sin[:5], 4, 2, False)


def test_when_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(2, 3, 8, device=DEVICE)
    assert [kernels.fits(x.to(dtype)) for dtype in (*DTYPES, torch.float64)] == [True, True, True, False]
    assert not kernels.fits(x[0]) and not kernels.fits(x[None])
    monkeypatch.undo()
    assert kernels.fits(x) == (DEVICE == "cuda" or rows_cpp.runs(x.dtype))
    monkeypatch.setattr(rows_cpp, "runs", lambda dtype: False)
    assert kernels.fits(x) == (DEVICE == "cuda")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_the_operations_keep_their_promises(interleaved: bool, dtype: torch.dtype) -> None:
    """Schema, shapes and strides without computing, gradients under torch.compile: torch's own check of custom operations."""
    case = Case(dtype=dtype, interleaved=interleaved, angles="own")
    near = {"rtol": 1e-2, "atol": 1e-2} if dtype in (torch.bfloat16, torch.float16) else {}
    given = (case.projected().requires_grad_(), *case.table(), case.heads, case.kv_heads, interleaved)
    torch.library.opcheck(rotary_op.turn_heads, given, **near)
    torch.library.opcheck(rotary_op.turn_heads_backward, (*case.upstream(), *case.table(), interleaved), **near)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_in_float64_by_the_formula(interleaved: bool) -> None:
    case = Case(dtype=torch.float64, interleaved=interleaved, length=3)
    given = case.projected().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: turn_heads(x, *case.table(), 4, 2, interleaved), (given,))


COMPILERS = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler"),
        ],
    ),
]


@pytest.mark.parametrize("backend", COMPILERS)
@pytest.mark.parametrize("angles", ["shared", "own"])
def test_compiled_it_gives_the_same(angles: str, backend: str) -> None:
    """With views of one table as cos and sin, as a model hands them over."""
    torch._dynamo.reset()
    case = Case(angles=angles)
    table = torch.stack(case.table())

    def layer(x: Tensor, table: Tensor) -> Tensor:
        cos, sin = table
        q, k, v = turn_heads(x * 2.0, cos, sin, case.heads, case.kv_heads, case.interleaved)
        return q.mean(dim=1) + k.mean(dim=1) * v.mean(dim=1)

    found = []
    for function in (layer, torch.compile(layer, backend=backend, fullgraph=True, dynamic=False)):
        given = case.projected().requires_grad_()
        out = function(given, table)
        found.append((out.detach(), torch.autograd.grad(out.square().sum(), given)[0]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_a_machine_without_a_compiler_gets_torchs_kernels_and_is_told_once(
    interleaved: bool, monkeypatch: pytest.MonkeyPatch, told: list[warnings.WarningMessage]
) -> None:
    def fails(device: torch.device) -> None:
        raise RuntimeError("Failed to find C compiler.\nmore")

    monkeypatch.setattr(triton_probe, "probe", fails)
    launches = Launches(monkeypatch)
    for angles in ("shared", "own", "one"):
        for dtype in DTYPES:
            check(Case(interleaved=interleaved, angles=angles, dtype=dtype))
    check(Case(batch=1, length=1, interleaved=interleaved))  # where a part of the projection is in one piece, too
    assert not launches.found
    assert [str(w.message) for w in told] == [
        "queries and keys are rotated by torch's kernels, which is slower: triton does not run here "
        "(RuntimeError: Failed to find C compiler.)"
    ]


def test_how_it_is_launched() -> None:
    tiles = {width: rotary_triton.tiling(width) for width in (2, 64, 80, 128, 256)}
    assert {width: (tile["WIDTH"], tile["ROWS"], tile["num_warps"]) for width, tile in tiles.items()} == {
        2: (2, 2048, 8),
        64: (64, 64, 8),
        80: (128, 32, 8),
        128: (128, 32, 8),
        256: (256, 16, 8),
    }


# --- what the compiler and a GPU say --------------------------------------------------------------------------------------


@compiles
@pytest.mark.parametrize("capability", ["90", pytest.param("80", marks=pytest.mark.slow)])
def test_the_compiler_reads_and_writes_16_bytes_at_once(capability: str) -> None:
    rows = [row for row in ahead(capability, "--pointwise") if row["kernel"] == "turn"]
    assert {(row["dtype"], row["width"], row["interleaved"], row["back"]) for row in rows} == {
        (dtype, width, interleaved, back)
        for dtype in ("*bf16", "*fp32")
        for width in (64, 80, 128)
        for interleaved in (False, True)
        for back in (False, True)
    }
    for row in rows:
        assert row["stack"] == 0, row
        accesses, pieces = row["accesses"], 2 if row["dtype"] == "*fp32" else 1  # eight pairs per thread
        exchanges = accesses.pop("exchanges")
        assert accesses == {"ld 128": 4 + 2 * pieces, "st 128": 2 * pieces}, row
        if row["dtype"] == "*bf16":
            assert exchanges == 0 and row["registers"] <= 48, row


on_a_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="there is no GPU here")


@on_a_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("head_dim", [40, 64, 80, 128])
def test_on_a_gpu(head_dim: int, interleaved: bool, dtype: torch.dtype) -> None:
    for angles, gradients in (("shared", "heads inside"), ("own", "heads outside")):
        case = Case(4, 500, 12, 4, head_dim, interleaved, angles, dtype, gradients)
        check(case)


@on_a_gpu
def test_more_numbers_than_an_int32_counts() -> None:
    tokens, heads, head_dim = 2**31 // 4096 + 8, 16, 64
    case = Case(1, 3, heads, heads, head_dim, dtype=torch.bfloat16)
    width = 3 * heads * head_dim
    projected = torch.zeros(1, tokens, width, dtype=torch.bfloat16, device=DEVICE)
    projected[:, -3:] = case.projected()
    table = torch.zeros(2, tokens, head_dim // 2, device=DEVICE)
    table[:, -3:] = torch.stack(case.table())
    parts = turn_heads(projected, table[0], table[1], heads, heads, False)
    right, right_gradient = case.exact()
    near = {"rtol": 2**-8 + 1e-6, "atol": 2e-6}
    for part, exact in zip(parts, right, strict=True):
        torch.testing.assert_close(part[:, :, -3:].double(), exact, **near)
        assert not part[:, :, :-3].any()
    upstream = [torch.zeros_like(part) for part in parts]
    for whole, last in zip(upstream, case.upstream(), strict=True):
        whole[:, :, -3:] = last
    del parts, projected
    gradient = rotary_op.turn_heads_backward(*upstream, table[0], table[1], False)
    torch.testing.assert_close(gradient[:, -3:].double(), right_gradient, **near)
    assert not gradient[:, :-3].any()
