"""Linear attention: three forms against loops over batch, head and time in float64, written from the recurrences."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from scratchlm.errors import UserError
from scratchlm.kernels.linear_attention import (
    State,
    chunked_linear_attention,
    halved_scores,
    linear_attention,
    linear_attention_flops,
    log_decay_between,
    parallel_linear_attention,
    recurrent_linear_attention,
    states_between,
)

FORMS: dict[str, Callable[..., tuple[Tensor, State]]] = {
    "parallel": parallel_linear_attention,
    "chunked": functools.partial(chunked_linear_attention, chunk=8),
    "chunked, 64": chunked_linear_attention,
    "recurrent": recurrent_linear_attention,
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
every_decay = pytest.mark.parametrize("decay", ["none", "scalar", "channel"])
either_way = pytest.mark.parametrize("normalise", [False, True])
WIDTH, VALUES = 5, 3


def drawn(
    t: int, decay: str = "none", *, lead: tuple[int, ...] = (2, 3), strength: float = 1.0, seed: int = 0
) -> list[Tensor | None]:
    """q, k > 0, v and the decay in float64."""
    generator = torch.Generator().manual_seed(1000 * seed + t)
    q, k = (torch.rand(*lead, t, WIDTH, generator=generator, dtype=torch.float64) + 0.05 for _ in range(2))
    v = torch.randn(*lead, t, VALUES, generator=generator, dtype=torch.float64)
    widths = {"none": 0, "scalar": 1, "channel": WIDTH}
    log_decay = -strength * torch.rand(*lead, t, widths[decay], generator=generator, dtype=torch.float64)
    return [q, k, v, None if decay == "none" else log_decay]


def by_loops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    normalise: bool = False,
    documents: list[int] | None = None,
    eps: float = 1e-6,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S ← Diag(a) S + k vᵀ and z ← a z + k, per row, head and token; (rows, heads, t, …) in, out, S, z out."""
    rows, heads, t, width = q.shape
    queries, keys, values = (x.detach().double().numpy() for x in (q, k, v))
    out = np.zeros((rows, heads, t, v.shape[-1]))
    last_s, last_z = np.zeros((rows, heads, width, v.shape[-1])), np.zeros((rows, heads, width))
    for row, head in itertools.product(range(rows), range(heads)):
        s, z = np.zeros((width, v.shape[-1])), np.zeros(width)
        for i in range(t):
            if documents is not None and i > 0 and documents[i] != documents[i - 1]:
                s, z = np.zeros_like(s), np.zeros_like(z)
            if log_decay is not None:
                a = np.exp(np.broadcast_to(log_decay[row, head, i].detach().double().numpy(), (width,)))
                s, z = np.diag(a) @ s, a * z
            s, z = s + np.outer(keys[row, head, i], values[row, head, i]), z + keys[row, head, i]
            out[row, head, i] = queries[row, head, i] @ s
            if normalise:
                out[row, head, i] /= queries[row, head, i] @ z + eps
        last_s[row, head], last_z[row, head] = s, z
    return out, last_s, last_z


def close(ours: Tensor, exact: np.ndarray, tolerance: float) -> None:
    """Errors relative to the largest number there is."""
    assert tuple(ours.shape) == exact.shape
    scale = max(float(np.abs(exact).max(initial=0.0)), 1e-30)
    np.testing.assert_allclose(ours.detach().double().numpy() / scale, exact / scale, rtol=0, atol=tolerance)


@every_form
@every_decay
@either_way
@pytest.mark.parametrize("t", [0, 1, 7, 8, 9, 16, 37])
def test_the_recurrence(form: Callable, decay: str, normalise: bool, t: int) -> None:
    inputs = drawn(t, decay)
    exact, s, z = by_loops(*inputs, normalise=normalise)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        out, state = form(*(None if x is None else x.to(dtype) for x in inputs), normalise=normalise)
        close(out, exact, tolerance)
        close(state.s, s, tolerance)
        assert out.dtype == state.s.dtype == dtype
        assert (state.z is not None) == normalise
        if normalise:
            close(state.z, z, tolerance)


@every_form
def test_the_quadratic_sum(form: Callable) -> None:
    """o_i = Σ_{j≤i} Σ_c q_ic k_jc (Π_{j<l≤i} a_lc) v_j: which decays stand between two tokens, written out."""
    q, k, v, log_decay = drawn(11, "channel", lead=(1, 1))
    a = log_decay.exp()[0, 0].tolist()
    expected = np.zeros((11, VALUES))
    for i in range(11):
        for j in range(i + 1):
            between = [math.prod(a[step][c] for step in range(j + 1, i + 1)) for c in range(WIDTH)]
            weight = sum(float(q[0, 0, i, c]) * float(k[0, 0, j, c]) * between[c] for c in range(WIDTH))
            expected[i] += weight * v[0, 0, j].numpy()
    close(form(q, k, v, log_decay)[0][0, 0], expected, 1e-12)


@every_form
def test_without_decay_the_normalised_weights_are_those_of_attention_without_softmax(form: Callable) -> None:
    q, k, v, _ = drawn(19)
    similarity = torch.einsum("bhid,bhjd->bhij", q, k).tril()
    weights = similarity / similarity.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(form(q, k, v, normalise=True, eps=0.0)[0], weights @ v)
    same = torch.ones_like(v)
    torch.testing.assert_close(form(q, k, same, normalise=True, eps=0.0)[0], same)


@every_form
def test_retnet(form: Callable) -> None:
    """One decay per head, broadcast over batch and time: D_ij = γ^(i−j)."""
    q, k, v, _ = drawn(13)
    gamma = torch.tensor([0.5, 0.9, 1.0], dtype=torch.float64)
    distance = torch.arange(13)[:, None] - torch.arange(13)
    decay = (gamma[:, None, None] ** distance.clamp(min=0)).tril()
    torch.testing.assert_close(form(q, k, v, gamma.log()[:, None, None])[0], (q @ k.mT * decay) @ v)


@every_form
@every_decay
@either_way
def test_gradients(form: Callable, decay: str, normalise: bool) -> None:
    """Those of the recurrent form, through the outputs and the state left behind."""
    inputs = [x.requires_grad_() for x in drawn(21, decay) if x is not None]
    first = State(*(torch.rand(2, 3, *shape, dtype=torch.float64) for shape in ((WIDTH, VALUES), (WIDTH,))))
    inputs += [first.s.requires_grad_(), first.z.requires_grad_()]

    def gradients(of: Callable) -> tuple[Tensor | None, ...]:
        out, state = of(*inputs[:-2], state=first, normalise=normalise)
        generator = torch.Generator().manual_seed(3)
        loss = (out * torch.randn(out.shape, generator=generator, dtype=out.dtype)).sum() + state.s.square().sum()
        loss = loss + (state.z.square().sum() if state.z is not None else 0.0)
        return torch.autograd.grad(loss, inputs, allow_unused=not normalise)

    for ours, exact in zip(gradients(form), gradients(recurrent_linear_attention), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-10)


@every_decay
@pytest.mark.parametrize("form", [chunked_linear_attention, parallel_linear_attention])
def test_gradients_against_differences(form: Callable, decay: str) -> None:
    inputs = [x.requires_grad_() for x in drawn(5, decay, lead=(1,)) if x is not None]
    if form is chunked_linear_attention:
        form = functools.partial(form, chunk=2)

    def numbers(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        out, state = form(*tensors, normalise=True)
        return out, state.s

    assert torch.autograd.gradcheck(numbers, inputs)


@settings(max_examples=40, deadline=None)
@given(
    t=st.integers(0, 30),
    cuts=st.lists(st.integers(0, 30), max_size=3),
    chunk=st.integers(0, 5).map(lambda power: 2**power),
    decay=st.sampled_from(["none", "scalar", "channel"]),
    forms=st.lists(st.sampled_from(["auto", "parallel", "chunked", "recurrent"]), min_size=4, max_size=4),
)
def test_pieces_with_a_state_are_the_whole(
    t: int, cuts: list[int], chunk: int, decay: str, forms: list[str]
) -> None:
    inputs = drawn(t, decay)
    exact, s, z = by_loops(*inputs, normalise=True)
    bounds = [0, *sorted(min(cut, t) for cut in cuts), t]
    state, outputs = None, []
    for (start, end), form in zip(itertools.pairwise(bounds), forms, strict=False):
        piece = [None if x is None else x[..., start:end, :] for x in inputs]
        out, state = linear_attention(*piece, normalise=True, state=state, form=form, chunk=chunk)
        outputs.append(out)
    close(torch.cat(outputs, dim=-2), exact, 1e-9)
    close(state.s, s, 1e-9)
    close(state.z, z, 1e-9)


@pytest.mark.parametrize("chunk", [1, 3, 7, 12, 100])
@pytest.mark.parametrize("decay", ["none", "scalar"])
def test_any_chunk(chunk: int, decay: str) -> None:
    inputs = drawn(12, decay)
    exact, s, _ = by_loops(*inputs)
    out, state = chunked_linear_attention(*inputs, chunk=chunk)
    close(out, exact, 1e-9)
    close(state.s, s, 1e-9)


@every_form
@every_decay
@either_way
def test_documents_are_what_they_are_alone(form: Callable, decay: str, normalise: bool) -> None:
    """One row begins a document in the middle of a chunk, the other at the start of one, and one has a single token."""
    inputs = drawn(24, decay)
    documents = torch.tensor([[0] * 5 + [1] + [0] * 11 + [3] * 7, [4] * 8 + [5] * 8 + [9] * 8])
    out, state = form(*inputs, documents=documents, normalise=normalise)
    for row in range(2):
        mine = [None if x is None else x[row : row + 1] for x in inputs]
        exact, s, _ = by_loops(*mine, documents=documents[row].tolist(), normalise=normalise)
        close(out[row : row + 1], exact, 1e-9)
        close(state.s[row : row + 1], s, 1e-9)
    last = [None if x is None else x[:1, :, 17:] for x in inputs]
    torch.testing.assert_close(out[:1, :, 17:], form(*last, normalise=normalise)[0])
    leaves = [x.requires_grad_() for x in inputs if x is not None]
    outputs, _ = form(*leaves, documents=documents, normalise=normalise)
    for gradient in torch.autograd.grad(outputs[0, :, 17:].sum(), leaves):
        assert gradient.isfinite().all()
        assert not gradient[0, :, :17].any()


@every_form
@every_decay
def test_causality(form: Callable, decay: str) -> None:
    """Changing one token changes its own output and leaves those before it bit for bit."""
    inputs = drawn(20, decay)
    before, _ = form(*inputs, normalise=True)
    for token in (0, 7, 8, 19):
        changed = [None if x is None else x.clone() for x in inputs]
        for x in changed:
            if x is not None:
                x[..., token, :] *= 1.5
        after, _ = form(*changed, normalise=True)
        assert torch.equal(before[..., :token, :], after[..., :token, :])
        assert not torch.isclose(before[..., token, :], after[..., token, :], rtol=1e-6).any()


@every_form
@pytest.mark.parametrize("decay", ["scalar", "channel"])
@pytest.mark.parametrize("strength", [50.0, 1e4])
def test_strong_decay(form: Callable, decay: str, strength: float) -> None:
    """exp never sees a positive number, and a weak decay behind a strong one keeps its digits, in fp32 too."""
    q, k, v, log_decay = drawn(70, decay)
    log_decay[..., 1::3, :] = -strength
    exact, s, _ = by_loops(q, k, v, log_decay)
    inputs = [x.float().requires_grad_() for x in (q, k, v, log_decay)]
    out, state = form(*inputs)
    close(out, exact, 1e-6)
    close(state.s, s, 1e-6)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(out.sum(), inputs))


def test_a_decay_that_forgets_everything() -> None:
    q, k, v, log_decay = drawn(9, "channel")
    log_decay[..., 4, :] = float("-inf")
    for form in FORMS.values():
        expected, _ = form(*(x[..., 4:, :] for x in (q, k, v, log_decay)))
        torch.testing.assert_close(form(q, k, v, log_decay)[0][..., 4:, :], expected)


@every_form
@every_decay
def test_bf16(form: Callable, decay: str) -> None:
    """Computed in fp32: what the inputs were rounded to, exactly, and the one rounding of the outputs (2⁻⁸)."""
    inputs = [None if x is None else x.bfloat16() for x in drawn(40, decay)]
    exact, s, _ = by_loops(*inputs, normalise=True)
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out, state = form(*inputs, normalise=True)
        assert out.dtype == torch.bfloat16 and state.s.dtype == state.z.dtype == torch.float32
        np.testing.assert_allclose(out.double().numpy(), exact, rtol=2**-8, atol=1e-5)
        close(state.s, s, 1e-6)


@every_form
@pytest.mark.parametrize("lead", [(1,), (4, 2), (2, 2, 3)])
def test_leading_dimensions(form: Callable, lead: tuple[int, ...]) -> None:
    inputs = drawn(10, "scalar", lead=lead)
    documents = torch.tensor([0] * 6 + [1] * 4)
    exact, s, _ = by_loops(*(x.reshape(-1, 1, *x.shape[-2:]) for x in inputs), documents=documents.tolist())
    out, state = form(*inputs, documents=documents.expand(*lead[:-1], 10))
    close(out, exact.reshape(out.shape), 1e-9)
    close(state.s, s.reshape(state.s.shape), 1e-9)


@pytest.mark.parametrize("size", [1, 2, 4, 32])
def test_halved_scores_are_the_pairwise_sum(size: int) -> None:
    q, k, _, log_decay = drawn(size, "channel", strength=3.0)
    pairs = (q.unsqueeze(-2) * k.unsqueeze(-3) * log_decay_between(log_decay).exp()).sum(dim=-1)
    torch.testing.assert_close(halved_scores(q, k, log_decay), pairs)


@pytest.mark.parametrize("chunks", [1, 2, 3, 8, 13])
def test_states_between_chunks(chunks: int) -> None:
    generator = torch.Generator().manual_seed(chunks)
    first, decay = torch.rand(4, 3, generator=generator), torch.rand(chunks, 4, 1, generator=generator)
    added = torch.randn(chunks, 4, 3, generator=generator)
    for factors in (decay, None):
        s, states = first, [first]
        for n in range(chunks):
            s = added[n] + (s if factors is None else factors[n] * s)
            states.append(s)
        torch.testing.assert_close(states_between(first, added, factors), torch.stack(states))


@every_decay
@pytest.mark.parametrize("form", ["parallel", "chunked", "recurrent", "auto"])
@pytest.mark.parametrize(("t", "chunk"), [(0, 8), (1, 8), (5, 8), (8, 8), (9, 8), (33, 16)])
def test_flops(form: str, decay: str, t: int, chunk: int) -> None:
    """Of all rows and heads together; the normaliser and documents add none."""
    inputs = drawn(t, decay)
    for arguments in ({}, {"normalise": True, "documents": torch.arange(t) // 3}):
        with FlopCounterMode(display=False) as counter:
            linear_attention(*inputs, form=form, chunk=chunk, **arguments)
        per_head = linear_attention_flops(form, t, WIDTH, VALUES, chunk, per_channel=decay == "channel")
        assert counter.get_total_flops() == 6 * per_head


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_without_a_break(backend: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(chunked_linear_attention, fullgraph=True, backend=backend)
    inputs = [x.float().requires_grad_() for x in drawn(11, "channel", lead=(2,))]
    first = State(torch.rand(2, WIDTH, VALUES), torch.rand(2, WIDTH))
    wanted, wanted_state = chunked_linear_attention(*inputs, state=first, normalise=True, chunk=4)
    with torch.set_grad_enabled(backend == "aot_eager"):  # one graph is enough for the slow one
        out, state = compiled(*inputs, state=first, normalise=True, chunk=4)
    torch.testing.assert_close(out, wanted.detach() if backend == "inductor" else wanted)
    torch.testing.assert_close((state.s, state.z), (wanted_state.s, wanted_state.z))
    if backend == "aot_eager":
        for ours, exact in zip(
            torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(wanted.sum(), inputs), strict=True
        ):
            torch.testing.assert_close(ours, exact)


def test_errors_name_the_cause() -> None:
    q, k, v, log_decay = drawn(6, "channel")
    for form in FORMS.values():
        state = form(q, k, v)[1]
        with pytest.raises(UserError, match="documents cannot be told apart behind a state"):
            form(q, k, v, documents=torch.zeros(6, dtype=torch.int64), state=state)
        with pytest.raises(UserError, match="no z to normalise by"):
            form(q, k, v, state=state, normalise=True)
        with pytest.raises(UserError, match="log_decay has 2 channels"):
            form(q, k, v, log_decay[..., :2])
    with pytest.raises(UserError, match="a power of two"):
        chunked_linear_attention(q, k, v, log_decay, chunk=12)
    with pytest.raises(UserError, match="1 or more"):
        chunked_linear_attention(q, k, v, chunk=0)
    with pytest.raises(UserError, match="'serial' is unknown"):
        linear_attention(q, k, v, form="serial")
