"""The gated delta rule: three forms against loops over row, head and time in float64, with the matrix of eq. 10."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from scratchlm.errors import UserError
from scratchlm.kernels.delta_rule import (
    chunked_delta_rule,
    delta_rule,
    delta_rule_flops,
    parallel_delta_rule,
    recurrent_delta_rule,
)
from scratchlm.kernels.linear_attention import State, chunked_linear_attention

FORMS: dict[str, Callable[..., tuple[Tensor, State]]] = {
    "parallel": parallel_delta_rule,
    "chunked": functools.partial(chunked_delta_rule, chunk=8),
    "chunked, 64": chunked_delta_rule,
    "recurrent": recurrent_delta_rule,
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
either_decay = pytest.mark.parametrize("decays", [False, True], ids=["no decay", "decay"])
WIDTH, VALUES = 5, 3


def drawn(t: int, decays: bool = False, *, lead: tuple[int, ...] = (2, 3)) -> list[Tensor | None]:
    """q, k of norm 1, v, β in (0, 2) and the decay, in float64."""
    generator = torch.Generator().manual_seed(t)
    q, k = (torch.randn(*lead, t, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    v = torch.randn(*lead, t, VALUES, generator=generator, dtype=torch.float64)
    beta, log_decay = (torch.rand(*lead, t, 1, generator=generator, dtype=torch.float64) for _ in range(2))
    return [q, F.normalize(k, dim=-1), v, 2 * beta, -log_decay if decays else None]


def by_loops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    documents: list[int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """S ← a (I − β k kᵀ) S + β k vᵀ, for each row, head and token; (rows, heads, t, …) in, outputs and last S out."""
    rows, heads, t, width = q.shape
    queries, keys, values, betas = (x.detach().double().numpy() for x in (q, k, v, beta))
    out, last = np.zeros((rows, heads, t, v.shape[-1])), np.zeros((rows, heads, width, v.shape[-1]))
    for row, head in itertools.product(range(rows), range(heads)):
        s = np.zeros((width, v.shape[-1]))
        for i in range(t):
            if documents is not None and i > 0 and documents[i] != documents[i - 1]:
                s = np.zeros_like(s)
            key, b = keys[row, head, i], float(betas[row, head, i, 0])
            a = 1.0 if log_decay is None else float(log_decay[row, head, i, 0].double().exp())
            s = a * (np.eye(width) - b * np.outer(key, key)) @ s + b * np.outer(key, values[row, head, i])
            out[row, head, i] = queries[row, head, i] @ s
        last[row, head] = s
    return out, last


def close(ours: Tensor, exact: np.ndarray, tolerance: float) -> None:
    """Errors relative to the largest number there is."""
    assert tuple(ours.shape) == exact.shape
    scale = max(float(np.abs(exact).max(initial=0.0)), 1e-30)
    np.testing.assert_allclose(ours.detach().double().numpy() / scale, exact / scale, rtol=0, atol=tolerance)


@every_form
@either_decay
@pytest.mark.parametrize("t", [0, 1, 7, 8, 9, 16, 37])
def test_the_recurrence(form: Callable, decays: bool, t: int) -> None:
    inputs = drawn(t, decays)
    exact, s = by_loops(*inputs)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        out, state = form(*(None if x is None else x.to(dtype) for x in inputs))
        close(out, exact, tolerance)
        close(state.s, s, tolerance)
        assert out.dtype == state.s.dtype == dtype
        assert state.z is None


@every_form
def test_a_key_written_again_holds_the_last_value(form: Callable) -> None:
    """β = 1 replaces: orthonormal keys, each written twice, read back as what was written last."""
    keys = torch.eye(4).repeat(2, 1)[None]
    values = torch.randn(1, 8, VALUES, generator=torch.Generator().manual_seed(0))
    out, state = form(keys, keys, values, torch.ones(1, 8, 1))
    torch.testing.assert_close(state.s, values[:, 4:])
    torch.testing.assert_close(out, values)


@every_form
def test_orthogonal_keys_are_linear_attention(form: Callable) -> None:
    """Where no key finds another there is nothing to replace: values β v, added up."""
    q, _, v, beta, log_decay = drawn(WIDTH, True)
    k = torch.eye(WIDTH, dtype=torch.float64).expand_as(q)
    expected, state = chunked_linear_attention(q, k, beta * v, log_decay)
    out, mine = form(q, k, v, beta, log_decay)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(mine.s, state.s)


@every_form
@either_decay
def test_transformers_qwen3_next(form: Callable, decays: bool) -> None:
    """Its layout is (batch, t, heads, width), and it scales queries by 1 / √width itself."""
    theirs = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    q, k, v, beta, log_decay = (None if x is None else x.float() for x in drawn(50, decays))
    log_decay = torch.zeros_like(beta) if log_decay is None else log_decay
    expected, s = theirs.torch_recurrent_gated_delta_rule(
        *(x.transpose(1, 2) for x in (q, k, v)),
        *(x.squeeze(-1).transpose(1, 2) for x in (log_decay, beta)),
        initial_state=None,
        output_final_state=True,
    )
    out, state = form(q * WIDTH**-0.5, k, v, beta, log_decay if decays else None)
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state.s, s, rtol=1e-4, atol=1e-5)


@every_form
@either_decay
def test_gradients(form: Callable, decays: bool) -> None:
    """Those of the recurrent form, through the outputs and the state left behind."""
    inputs = [x.requires_grad_() for x in drawn(21, decays) if x is not None]
    first = torch.rand(2, 3, WIDTH, VALUES, dtype=torch.float64).requires_grad_()

    def gradients(of: Callable) -> tuple[Tensor, ...]:
        out, state = of(*inputs, state=State(first))
        generator = torch.Generator().manual_seed(3)
        loss = (out * torch.randn(out.shape, generator=generator, dtype=out.dtype)).sum() + state.s.square().sum()
        return torch.autograd.grad(loss, [*inputs, first])

    for ours, exact in zip(gradients(form), gradients(recurrent_delta_rule), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-10)


@either_decay
@pytest.mark.parametrize("form", [functools.partial(chunked_delta_rule, chunk=2), parallel_delta_rule])
def test_gradients_against_differences(form: Callable, decays: bool) -> None:
    inputs = [x.requires_grad_() for x in drawn(5, decays, lead=(1,)) if x is not None]

    def numbers(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        out, state = form(*tensors)
        return out, state.s

    assert torch.autograd.gradcheck(numbers, inputs)


@settings(max_examples=40, deadline=None)
@given(
    t=st.integers(0, 30),
    cuts=st.lists(st.integers(0, 30), max_size=3),
    chunk=st.integers(1, 33),
    decays=st.booleans(),
    forms=st.lists(st.sampled_from(["auto", "parallel", "chunked", "recurrent"]), min_size=4, max_size=4),
)
def test_pieces_with_a_state_are_the_whole(
    t: int, cuts: list[int], chunk: int, decays: bool, forms: list[str]
) -> None:
    inputs = drawn(t, decays)
    exact, s = by_loops(*inputs)
    bounds = [0, *sorted(min(cut, t) for cut in cuts), t]
    state, outputs = None, []
    for (start, end), form in zip(itertools.pairwise(bounds), forms, strict=False):
        piece = [None if x is None else x[..., start:end, :] for x in inputs]
        out, state = delta_rule(*piece, state=state, form=form, chunk=chunk)
        outputs.append(out)
    close(torch.cat(outputs, dim=-2), exact, 1e-9)
    close(state.s, s, 1e-9)


@every_form
@either_decay
def test_documents_are_what_they_are_alone(form: Callable, decays: bool) -> None:
    inputs = drawn(24, decays)
    documents = torch.tensor([[0] * 5 + [1] + [0] * 11 + [3] * 7, [4] * 8 + [5] * 8 + [9] * 8])
    out, state = form(*inputs, documents=documents)
    for row in range(2):
        mine = [None if x is None else x[row : row + 1] for x in inputs]
        exact, s = by_loops(*mine, documents=documents[row].tolist())
        close(out[row : row + 1], exact, 1e-9)
        close(state.s[row : row + 1], s, 1e-9)
    last = [None if x is None else x[:1, :, 17:] for x in inputs]
    torch.testing.assert_close(out[:1, :, 17:], form(*last)[0])
    leaves = [x.requires_grad_() for x in inputs if x is not None]
    for gradient in torch.autograd.grad(form(*leaves, documents=documents)[0][0, :, 17:].sum(), leaves):
        assert gradient.isfinite().all()
        assert not gradient[0, :, :17].any()


@every_form
@either_decay
def test_causality(form: Callable, decays: bool) -> None:
    """Changing one token changes its own output and leaves those before it bit for bit."""
    inputs = drawn(20, decays)
    before, _ = form(*inputs)
    for token in (0, 7, 8, 19):
        changed = [None if x is None else x.clone() for x in inputs]
        for x in changed:
            if x is not None:
                x[..., token, :] *= 0.7
        after, _ = form(*changed)
        assert torch.equal(before[..., :token, :], after[..., :token, :])
        assert not torch.isclose(before[..., token, :], after[..., token, :], rtol=1e-6, atol=0).all(dim=-1).any()


@every_form
@pytest.mark.parametrize("strength", [50.0, 1e4])
def test_strong_decay(form: Callable, strength: float) -> None:
    """exp never sees a positive number, and a weak decay behind a strong one keeps its digits, in fp32 too."""
    inputs = drawn(70, True)
    inputs[-1][..., 1::3, :] = -strength
    exact, s = by_loops(*inputs)
    single = [x.float().requires_grad_() for x in inputs]
    out, state = form(*single)
    close(out, exact, 2e-6)
    close(state.s, s, 2e-6)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(out.sum(), single))


@every_form
@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0])
def test_keys_alike_are_stable_in_fp32(form: Callable, strength: float) -> None:
    """Where the inverse as a sum of powers fails: the triangle's 30th power has entries of 10¹⁷ at β = 1 already."""
    t = 64
    q, k, v, beta, _ = drawn(t)
    k = F.normalize(torch.ones_like(k) + 1e-3 * k, dim=-1)
    inputs = [q, k, v, torch.full_like(beta, strength)]
    exact, s = by_loops(*inputs)
    out, state = form(*(x.float() for x in inputs))
    close(out, exact, 1e-4)
    close(state.s, s, 1e-4)
    triangle = (strength * k @ k.mT).tril(-1)
    assert torch.linalg.matrix_power(triangle, 30).max() > 1e8


@every_form
@either_decay
def test_bf16(form: Callable, decays: bool) -> None:
    """Computed in fp32: what the inputs were rounded to, exactly, and the one rounding of the outputs (2⁻⁸)."""
    inputs = [None if x is None else x.bfloat16() for x in drawn(40, decays)]
    exact, s = by_loops(*inputs)
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out, state = form(*inputs)
        assert out.dtype == torch.bfloat16 and state.s.dtype == torch.float32
        np.testing.assert_allclose(out.double().numpy(), exact, rtol=2**-8, atol=1e-5)
        close(state.s, s, 1e-5)


@every_form
@pytest.mark.parametrize("lead", [(1,), (4, 2), (2, 2, 3)])
def test_leading_dimensions(form: Callable, lead: tuple[int, ...]) -> None:
    inputs = drawn(10, True, lead=lead)
    documents = torch.tensor([0] * 6 + [1] * 4)
    exact, s = by_loops(*(x.reshape(-1, 1, *x.shape[-2:]) for x in inputs), documents=documents.tolist())
    out, state = form(*inputs, documents=documents.expand(*lead[:-1], 10))
    close(out, exact.reshape(out.shape), 1e-9)
    close(state.s, s.reshape(state.s.shape), 1e-9)


@either_decay
@pytest.mark.parametrize("form", ["parallel", "chunked", "recurrent", "auto"])
@pytest.mark.parametrize(("t", "chunk"), [(0, 8), (1, 8), (5, 8), (8, 8), (9, 8), (33, 12)])
def test_flops(form: str, decays: bool, t: int, chunk: int) -> None:
    with FlopCounterMode(display=False) as counter:
        delta_rule(*drawn(t, decays), form=form, chunk=chunk)
    assert counter.get_total_flops() == 6 * delta_rule_flops(form, t, WIDTH, VALUES, chunk)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_without_a_break(backend: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(chunked_delta_rule, fullgraph=True, backend=backend)
    inputs = [x.float().requires_grad_() for x in drawn(7, True, lead=(2,))]
    first = State(torch.rand(2, WIDTH, VALUES))
    wanted, wanted_state = chunked_delta_rule(*inputs, state=first, chunk=4)
    with torch.set_grad_enabled(backend == "aot_eager"):  # one graph is enough for the slow one
        out, state = compiled(*inputs, state=first, chunk=4)
    torch.testing.assert_close(out, wanted.detach() if backend == "inductor" else wanted)
    torch.testing.assert_close(state.s, wanted_state.s)
    if backend == "aot_eager":
        for ours, exact in zip(
            torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(wanted.sum(), inputs), strict=True
        ):
            torch.testing.assert_close(ours, exact)


def test_errors_name_the_cause() -> None:
    q, k, v, beta, log_decay = drawn(6, True)
    for form in FORMS.values():
        state = form(q, k, v, beta)[1]
        with pytest.raises(UserError, match="documents cannot be told apart behind a state"):
            form(q, k, v, beta, documents=torch.zeros(6, dtype=torch.int64), state=state)
        with pytest.raises(UserError, match="5 channels: the delta rule takes one per head and step"):
            form(q, k, v, beta, log_decay.expand(2, 3, 6, WIDTH))
    with pytest.raises(UserError, match="1 or more"):
        chunked_delta_rule(q, k, v, beta, chunk=0)
    with pytest.raises(UserError, match="'serial' is unknown"):
        delta_rule(q, k, v, beta, form="serial")
