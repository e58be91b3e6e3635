"""The gated delta rule: linear attention whose state replaces what a key held instead of adding to it.

    S_t = a_t (I − β_t k_t k_tᵀ) S_{t−1} + β_t k_t v_tᵀ          o_t = S_tᵀ q_t                   (d_k × d_v per head)

(Yang et al. 2024, Gated DeltaNet, arXiv 2412.06464, eq. 10, with the state transposed; a = 1: DeltaNet, Yang et al.
2024, arXiv 2406.06484.) Read as one step of gradient descent on ‖Sᵀk − v‖² / 2 at rate β, it needs ‖k_t‖ = 1 and
0 ≤ β ≤ 2 to be stable, which is for the module to see to. There is no normaliser: values are replaced, not summed up.
With

    u_t = β_t (v_t − a_t S_{t−1}ᵀ k_t)                           S_t = a_t S_{t−1} + k_t u_tᵀ

it is linear attention with values u, so within a stretch of tokens that starts from S, with γ_i = a_1 ⋯ a_i and
D_ij = a_{j+1} ⋯ a_i, the u solve a triangular system (the UT form; its solutions make the WY representation):

    (I + tril(diag(β) (K Kᵀ ⊙ D), −1)) U = diag(β) (V − diag(γ) K S)

:func:`torch.linalg.solve_triangular` solves it, by substitution, which is stable in fp32. The inverse as a product of
(I + (−L)^(2^i)), matrix products only, is not: for keys that are alike the powers of the triangle L grow before they
vanish, and cancel. The forms, decays, documents and states are those of :mod:`~scratchlm.kernels.linear_attention`.
"""

from __future__ import annotations

from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from scratchlm.errors import UserError
from scratchlm.kernels.linear_attention import (
    CHUNK,
    Documents,
    Form,
    LogDecay,
    Queries,
    State,
    Values,
    chunk_length,
    decay_since_start,
    decay_until_end,
    decayed_scores,
    in_chunks,
    widened,
)

Beta = Float[Tensor, "... heads t 1"]


def _widened(
    q: Queries,
    k: Queries,
    v: Values,
    beta: Beta,
    log_decay: LogDecay | None,
    documents: Documents | None,
    state: State | None,
) -> tuple[Queries, Queries, Values, Beta, LogDecay | None, Tensor]:
    if log_decay is not None and log_decay.shape[-1] != 1:
        raise UserError(f"log_decay has {log_decay.shape[-1]} channels: the delta rule takes one per head and step")
    q, k, v, log_decay, state = widened(q, k, v, log_decay, documents, state)
    return q, k, v, beta.to(v.dtype), log_decay, state.s


def _system(k: Queries, beta: Beta, log_decay: LogDecay | None) -> Float[Tensor, "... heads t t"]:
    """tril(diag(β) (K Kᵀ ⊙ D), −1): how much of each earlier u a key finds. I is left to the solver."""
    return (beta * decayed_scores(k, k, log_decay)).tril(-1)


def parallel_delta_rule(
    q: Queries,
    k: Queries,
    v: Values,
    beta: Beta,
    log_decay: LogDecay | None = None,
    *,
    documents: Documents | None = None,
    state: State | None = None,
) -> tuple[Values, State]:
    """All pairs of tokens at once, O = ((Q Kᵀ) ⊙ D) U.

    Args:
        q, k: queries and keys, (…, heads, t, d_k), bf16, fp32 or fp64; keys of norm 1.
        v: values, (…, heads, t, d_v).
        beta: strength β_t of the replacement, (…, heads, t, 1).
        log_decay: log a_t ≤ 0, (…, heads, t, 1) or what broadcasts to it. None: nothing is forgotten.
        documents: number of the document each token belongs to, in runs, (…, t); each run starts from an empty state.
        state: what earlier tokens left; None: nothing.

    Returns:
        The outputs, (…, heads, t, d_v) in v's dtype, and the state after the last token (its z is None).

    Raises:
        UserError: documents beside a state, or a decay of more than one channel.
    """
    t, dtype, given = v.shape[-2], v.dtype, state is not None
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, beta, log_decay, s = _widened(q, k, v, beta, log_decay, documents, state)
        if t == 0:
            return v.to(dtype), State(s)
        reads, finds, writes, kept = q, k, k, s
        if log_decay is not None:
            since_start = decay_since_start(log_decay)
            reads, finds, writes = q * since_start, k * since_start, k * decay_until_end(log_decay)
            kept = s * since_start[..., -1:, :]
        target = v - finds @ s if given else v
        u = torch.linalg.solve_triangular(
            _system(k, beta, log_decay), beta * target, upper=False, unitriangular=True
        )
        out = decayed_scores(q, k, log_decay) @ u
        if given:
            out = out + reads @ s
        return out.to(dtype), State(kept + writes.mT @ u)


def chunked_delta_rule(
    q: Queries,
    k: Queries,
    v: Values,
    beta: Beta,
    log_decay: LogDecay | None = None,
    *,
    documents: Documents | None = None,
    state: State | None = None,
    chunk: int = CHUNK,
) -> tuple[Values, State]:
    """Chunks of time: the triangular systems of all chunks at once, then the state from chunk to chunk.

        U = U₀ − W S       with  [U₀ | W] = (I + tril(…))⁻¹ diag(β) [V | diag(γ) K], which needs no state;
        S ← a_start ⋯ a_end S + Σ_j (a_{j+1} ⋯ a_end) k_j u_jᵀ,    two products per chunk, the only loop.

    Arguments, result and errors as in :func:`parallel_delta_rule`, and

    Args:
        chunk: tokens per chunk, of which t need not be a multiple.
    """
    t, d_v, dtype = v.shape[-2], v.shape[-1], v.dtype
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, beta, log_decay, s = _widened(q, k, v, beta, log_decay, documents, state)
        if t == 0:
            return v.to(dtype), State(s)
        chunk = chunk_length(chunk, t)
        q, k, v, beta = (in_chunks(x, chunk) for x in (q, k, v, beta))
        reads, finds, writes, decay = q, k, k, None
        if log_decay is not None:
            log_decay = in_chunks(log_decay, chunk)
            since_start = decay_since_start(log_decay)
            reads, finds, writes = q * since_start, k * since_start, k * decay_until_end(log_decay)
            decay = since_start[..., -1:, :]
        targets = beta * torch.cat([v, finds], dim=-1)
        solved = torch.linalg.solve_triangular(
            _system(k, beta, log_decay), targets, upper=False, unitriangular=True
        )
        u_alone, w = solved.split([d_v, k.shape[-1]], dim=-1)
        states, values = [], []
        for n in range(k.shape[-3]):
            u = u_alone[..., n, :, :] - w[..., n, :, :] @ s
            states.append(s)
            values.append(u)
            s = (s if decay is None else decay[..., n, :, :] * s) + writes[..., n, :, :].mT @ u
        u, before = torch.stack(values, dim=-3), torch.stack(states, dim=-3)
        out = decayed_scores(q, k, log_decay) @ u + reads @ before
        return out.flatten(-3, -2)[..., :t, :].to(dtype), State(s)


def recurrent_delta_rule(
    q: Queries,
    k: Queries,
    v: Values,
    beta: Beta,
    log_decay: LogDecay | None = None,
    *,
    documents: Documents | None = None,
    state: State | None = None,
) -> tuple[Values, State]:
    """One token after the other: decay, look up what the key holds, move it towards the value. For generation.

    Arguments, result and errors as in :func:`parallel_delta_rule`.
    """
    dtype = v.dtype
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, beta, log_decay, s = _widened(q, k, v, beta, log_decay, documents, state)
        decay = None if log_decay is None else log_decay.exp()
        outputs = []
        for step in range(v.shape[-2]):
            query, key, value = q[..., step, None, :], k[..., step, None, :], v[..., step, None, :]
            if decay is not None:
                s = s * decay[..., step, :, None]
            u = beta[..., step, None, :] * (value - key @ s)
            s = s + key.mT * u
            outputs.append(query @ s)
        out = torch.cat(outputs, dim=-2) if outputs else v
        return out.to(dtype), State(s)


def delta_rule(
    q: Queries,
    k: Queries,
    v: Values,
    beta: Beta,
    log_decay: LogDecay | None = None,
    *,
    documents: Documents | None = None,
    state: State | None = None,
    form: Form = "auto",
    chunk: int = CHUNK,
) -> tuple[Values, State]:
    """The form that is named; ``auto``: recurrent for a single token, else chunked.

    Arguments, result and errors as in :func:`chunked_delta_rule`.
    """
    if form not in get_args(Form):
        raise UserError(f"form = {form!r} is unknown for the delta rule; allowed: {', '.join(get_args(Form))}")
    if form == "auto":
        form = "recurrent" if v.shape[-2] == 1 else "chunked"
    if form == "chunked":
        return chunked_delta_rule(q, k, v, beta, log_decay, documents=documents, state=state, chunk=chunk)
    kernel = parallel_delta_rule if form == "parallel" else recurrent_delta_rule
    return kernel(q, k, v, beta, log_decay, documents=documents, state=state)


def delta_rule_flops(form: Form, t: int, d_k: int, d_v: int, chunk: int = CHUNK) -> int:
    """Operations in the matrix products of a forward pass over t tokens from an empty state, per head.

    Equal to torch's ``FlopCounterMode``, which does not see the triangular solver (chunk · (d_k + d_v) per token in the
    chunked form, t · d_v in the parallel one) nor the elementwise k uᵀ of the recurrent form. A parallel form that is
    given a state counts 4 · t · d_k · d_v more.

    Args:
        form, chunk: as in :func:`delta_rule`.

    Raises:
        UserError: a chunk of less than one.
    """
    if form == "auto":
        form = "recurrent" if t == 1 else "chunked"
    state = 2 * d_k * d_v
    if form == "recurrent":
        return t * 2 * state
    if form == "parallel":
        return 2 * t * t * (2 * d_k + d_v) + t * state
    chunk = chunk_length(chunk, t)
    tokens = -(-t // chunk) * chunk  # with those that fill the last chunk
    return tokens * (2 * chunk * (2 * d_k + d_v) + 3 * state)
