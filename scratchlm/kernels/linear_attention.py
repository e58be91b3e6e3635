"""Linear attention: a state of constant size that every token decays, adds to and reads.

    S_t = Diag(a_t) S_{t−1} + k_t v_tᵀ          o_t = S_tᵀ q_t                    (d_k × d_v per head)
    z_t = Diag(a_t) z_{t−1} + k_t               o_t = S_tᵀ q_t / (q_t · z_t)      with the normaliser

Without decay, and normalised, this is Katharopoulos et al. 2020 (arXiv 2006.16236, eq. 16–20; queries and keys come
here *after* the feature map φ, which must not be negative then). One decay per head is RetNet (Sun et al. 2023, arXiv
2307.08621, eq. 5–7), one per head and step Mamba-2 (Dao & Gu 2024, arXiv 2405.21060), one per step and channel of the
keys gated linear attention (Yang et al. 2023, arXiv 2312.06635, section 4). Three forms give the same numbers:

    parallel     O = ((Q Kᵀ) ⊙ D) V,  D_ij = a_{j+1} ⋯ a_i for j ≤ i, else 0     t² work, no loop
    chunked      the same inside each chunk, a state from chunk to chunk         t · chunk work, log(t / chunk) steps
    recurrent    the two lines above                                             t work, t steps: for generation

Decays are given as logarithms, and every sum of them that is exponentiated is a sum of values ≤ 0, never a difference
of two running sums: nothing overflows and nothing cancels, and −∞ (forget everything) is a decay like any other. That
is how documents are kept apart: the first token of each decays by −∞.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from scratchlm.errors import UserError

Queries = Float[Tensor, "... heads t d_k"]
Values = Float[Tensor, "... heads t d_v"]
LogDecay = Float[Tensor, "... #heads #t #d_k"]
Documents = Int[Tensor, "... t"]
Form = Literal["auto", "parallel", "chunked", "recurrent"]

CHUNK = 64


@dataclass(frozen=True)
class State:
    """What a layer remembers, in fp32 (fp64 for fp64 inputs): its size does not depend on the tokens read.

    Attributes:
        s: Σ decayed k vᵀ, (…, heads, d_k, d_v).
        z: Σ decayed k, (…, heads, d_k); None without the normaliser.
    """

    s: Float[Tensor, "... heads d_k d_v"]
    z: Float[Tensor, "... heads d_k"] | None = None


def widened(
    q: Queries,
    k: Queries,
    v: Values,
    log_decay: LogDecay | None,
    documents: Documents | None,
    state: State | None,
    normalise: bool = False,
) -> tuple[Queries, Queries, Values, LogDecay | None, State]:
    """The inputs in at least fp32, documents' starts written into the decay as −∞, and a state to begin with."""
    if documents is not None and state is not None:
        raise UserError(
            "documents cannot be told apart behind a state: it does not keep which document its tokens belong to; give "
            "whole sequences without a state, or leave documents out"
        )
    if log_decay is not None and log_decay.shape[-1] not in (1, k.shape[-1]):
        raise UserError(
            f"log_decay has {log_decay.shape[-1]} channels, keys have {k.shape[-1]}: give it one, or as many as they"
        )
    if normalise and state is not None and state.z is None:
        raise UserError("the state has no z to normalise by: begin without a state, or go on with normalise=False")
    wide = torch.promote_types(torch.promote_types(q.dtype, k.dtype), torch.promote_types(v.dtype, torch.float32))
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    if log_decay is not None:
        log_decay = log_decay.to(wide).expand(*k.shape[:-1], -1)
    if documents is not None:
        starts = F.pad(documents[..., 1:] != documents[..., :-1], (1, 0))[..., None, :, None]
        kept = k.new_zeros(*k.shape[:-1], 1) if log_decay is None else log_decay
        log_decay = kept.masked_fill(starts, float("-inf"))
    if state is None:
        s = k.new_zeros(*k.shape[:-2], k.shape[-1], v.shape[-1])
        return q, k, v, log_decay, State(s, s[..., 0] if normalise else None)
    z = state.z.to(wide) if normalise and state.z is not None else None
    return q, k, v, log_decay, State(state.s.to(wide), z)


def log_decay_between(log_decay: Float[Tensor, "... t d"]) -> Float[Tensor, "... t t d"]:
    """Entry (i, j) is Σ log a_l over j < l ≤ i: what token j has decayed by when token i reads; −∞ for j > i."""
    length = log_decay.shape[-2]
    full = torch.ones(length, length, dtype=torch.bool, device=log_decay.device)
    steps = log_decay.unsqueeze(-2).masked_fill(full.triu().unsqueeze(-1), 0.0)
    return steps.cumsum(dim=-3).masked_fill(full.triu(1).unsqueeze(-1), float("-inf"))


def decay_since_start(log_decay: Float[Tensor, "... t d"]) -> Float[Tensor, "... t d"]:
    """a_1 ⋯ a_i: what the state before the first token has decayed by when token i reads."""
    return log_decay.cumsum(dim=-2).exp()


def decay_until_end(log_decay: Float[Tensor, "... t d"]) -> Float[Tensor, "... t d"]:
    """a_{j+1} ⋯ a_t: what token j has decayed by after the last token."""
    later = F.pad(log_decay[..., 1:, :], (0, 0, 0, 1))
    return later.flip(-2).cumsum(dim=-2).flip(-2).exp()


def decayed_scores(q: Queries, k: Queries, log_decay: LogDecay | None) -> Float[Tensor, "... heads t t"]:
    """(Q Kᵀ) ⊙ D, the definition; with a decay per channel Σ_c q_ic k_jc D_ijc, for which t² · d_k numbers are held."""
    if log_decay is None:
        return (q @ k.mT).tril()
    decay = log_decay_between(log_decay).exp()
    if log_decay.shape[-1] == 1:
        return (q @ k.mT) * decay.squeeze(-1)
    return (q.unsqueeze(-2) * k.unsqueeze(-3) * decay).sum(dim=-1)


def halved_scores(
    q: Float[Tensor, "... t d_k"], k: Float[Tensor, "... t d_k"], log_decay: Float[Tensor, "... t d_k"]
) -> Float[Tensor, "... t t"]:
    """:func:`decayed_scores` with a decay per channel in products of matrices; t must be a power of two.

    0               A decay per channel cannot be multiplied onto q · k, only onto q or k. Within a square below the
    1 0             diagonal it can be cut at the middle: a_{j+1} ⋯ a_i = (a_mid ⋯ a_i) · (a_{j+1} ⋯ a_{mid−1}), one
    2 2 0           factor for the query and one for the key, both ≤ 1. The squares of one size (1, 2, 4, … below
    2 2 1 0         the diagonal 0) are one batched product. Gated linear attention (section 4.3) has two such sizes.
    """
    length = q.shape[-2]
    scores = (q * k).sum(dim=-1)[..., None, None]  # blocks on the diagonal, (…, t / size, size, size)
    size = 1
    while size < length:
        q_pairs, k_pairs, decays = (x.unflatten(-2, (-1, 2, size)) for x in (q, k, log_decay))
        reads = q_pairs[..., 1, :, :] * decay_since_start(decays[..., 1, :, :])
        writes = k_pairs[..., 0, :, :] * decay_until_end(decays[..., 0, :, :])
        first, second = scores.unflatten(-3, (-1, 2)).unbind(dim=-3)
        below = torch.cat([reads @ writes.mT, second], dim=-1)
        scores = torch.cat([F.pad(first, (0, size)), below], dim=-2)
        size *= 2
    return scores.squeeze(-3)


def states_between(
    first: Float[Tensor, "... d_k d_v"],
    added: Float[Tensor, "... chunks d_k d_v"],
    decay: Float[Tensor, "... chunks #d_k 1"] | None,
) -> Float[Tensor, "... chunks+1 d_k d_v"]:
    """S_n = decay_n S_{n−1} + added_n from S_0 = `first`, all of them, in log2(chunks) steps.

    After the step with distance 2^i every entry holds the sum over the 2^(i+1) chunks up to its own (Hillis & Steele
    1986): a graph that stays small for long sequences, where a loop over chunks would be unrolled by the compiler.
    """
    states = torch.cat([first.unsqueeze(-3), added], dim=-3)
    if decay is None:
        return states.cumsum(dim=-3)
    decay = F.pad(decay, (0, 0, 0, 0, 1, 0), value=1.0)
    distance = 1
    while distance < states.shape[-3]:
        earlier = states[..., :-distance, :, :]
        later = states[..., distance:, :, :] + decay[..., distance:, :, :] * earlier
        states = torch.cat([states[..., :distance, :, :], later], dim=-3)
        both = decay[..., distance:, :, :] * decay[..., :-distance, :, :]
        decay = torch.cat([decay[..., :distance, :, :], both], dim=-3)
        distance *= 2
    return states


def chunk_length(chunk: int, t: int, per_channel: bool = False) -> int:
    """The chunk for a sequence of t tokens: a short one is not padded to a whole chunk."""
    if chunk < 1 or (per_channel and chunk & (chunk - 1)):
        allowed = "a power of two, as log_decay is per channel" if per_channel else "1 or more"
        raise UserError(f"chunk = {chunk}: it must be {allowed}")
    if per_channel:
        return min(chunk, 1 << max(t - 1, 0).bit_length())
    return min(chunk, max(t, 1))


def in_chunks(x: Float[Tensor, "... t d"], chunk: int) -> Float[Tensor, "... chunks chunk d"]:
    """Cut along time; zeros fill the last chunk: a key that writes nothing, a decay (in log) that keeps everything."""
    return F.pad(x, (0, 0, 0, -x.shape[-2] % chunk)).unflatten(-2, (-1, chunk))


def parallel_linear_attention(
    q: Queries,
    k: Queries,
    v: Values,
    log_decay: LogDecay | None = None,
    *,
    normalise: bool = False,
    documents: Documents | None = None,
    state: State | None = None,
    eps: float = 1e-6,
) -> tuple[Values, State]:
    """All pairs of tokens at once, ((Q Kᵀ) ⊙ D) V: the definition.

    Args:
        q, k: queries and keys after the feature map, (…, heads, t, d_k), bf16, fp32 or fp64.
        v: values, (…, heads, t, d_v).
        log_decay: log a_t ≤ 0, (…, heads, t, 1) or per channel of the keys (…, heads, t, d_k); heads, t and what is
            before may be 1 or absent (RetNet: (heads, 1, 1)). None: nothing is forgotten.
        normalise: divide by q · z + eps; the features must not be negative.
        documents: number of the document each token belongs to, in runs, (…, t); each run starts from an empty state.
        state: what earlier tokens left; None: nothing.

    Returns:
        The outputs, (…, heads, t, d_v) in v's dtype, and the state after the last token.

    Raises:
        UserError: documents beside a state, a state without z for the normaliser, or a decay of another width.
    """
    t, dtype, given = v.shape[-2], v.dtype, state is not None
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, log_decay, state = widened(q, k, v, log_decay, documents, state, normalise)
        if t == 0:
            return v.to(dtype), state
        scores = decayed_scores(q, k, log_decay)
        mixed = scores @ v
        reads, writes, s, z = q, k, state.s, state.z
        if log_decay is not None:
            since_start = decay_since_start(log_decay)
            reads, writes = q * since_start, k * decay_until_end(log_decay)
            s = s * since_start[..., -1, :, None]
            z = None if z is None else z * since_start[..., -1, :]
        if given:
            mixed = mixed + reads @ state.s
        if state.z is not None and z is not None:
            total = scores.sum(dim=-1) + (reads * state.z.unsqueeze(-2)).sum(dim=-1)
            mixed, z = mixed / (total.unsqueeze(-1) + eps), z + writes.sum(dim=-2)
        return mixed.to(dtype), State(s + writes.mT @ v, z)


def chunked_linear_attention(
    q: Queries,
    k: Queries,
    v: Values,
    log_decay: LogDecay | None = None,
    *,
    normalise: bool = False,
    documents: Documents | None = None,
    state: State | None = None,
    eps: float = 1e-6,
    chunk: int = CHUNK,
) -> tuple[Values, State]:
    """Chunks of time: pairs of tokens within each, a state for all that came before it. Fast for training and prefill.

              keys →                    ◣ within a chunk: the parallel form, all chunks in one batched product
          q   ◣                         ■ before the chunk: o_i += (q_i ⊙ a_start ⋯ a_i)ᵀ S, with S the state that the
          ↓   ■ ◣                           chunks before left behind, each chunk adding
              ■ ■ ◣                         Σ_j (k_j ⊙ a_{j+1} ⋯ a_end) v_jᵀ

    Arguments, result and errors as in :func:`parallel_linear_attention`, and

    Args:
        chunk: tokens per chunk, of which t need not be a multiple; a power of two where the decay is per channel.
    """
    t, dtype = v.shape[-2], v.dtype
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, log_decay, state = widened(q, k, v, log_decay, documents, state, normalise)
        if t == 0:
            return v.to(dtype), state
        per_channel = log_decay is not None and log_decay.shape[-1] > 1
        chunk = chunk_length(chunk, t, per_channel)
        q, k, v = in_chunks(q, chunk), in_chunks(k, chunk), in_chunks(v, chunk)
        reads, writes, decay = q, k, None
        if log_decay is None:
            scores = decayed_scores(q, k, None)
        else:
            log_decay = in_chunks(log_decay, chunk)
            scores = halved_scores(q, k, log_decay) if per_channel else decayed_scores(q, k, log_decay)
            since_start = decay_since_start(log_decay)
            reads, writes = q * since_start, k * decay_until_end(log_decay)
            decay = since_start[..., -1, :, None]
        states = states_between(state.s, writes.mT @ v, decay)
        mixed, z = scores @ v + reads @ states[..., :-1, :, :], None
        if state.z is not None:
            added = writes.sum(dim=-2).unsqueeze(-1)
            sums = states_between(state.z.unsqueeze(-1), added, decay).squeeze(-1)
            total = scores.sum(dim=-1) + (reads * sums[..., :-1, None, :]).sum(dim=-1)
            mixed, z = mixed / (total.unsqueeze(-1) + eps), sums[..., -1, :]
        out = mixed.flatten(-3, -2)[..., :t, :]
        return out.to(dtype), State(states[..., -1, :, :], z)


def recurrent_linear_attention(
    q: Queries,
    k: Queries,
    v: Values,
    log_decay: LogDecay | None = None,
    *,
    normalise: bool = False,
    documents: Documents | None = None,
    state: State | None = None,
    eps: float = 1e-6,
) -> tuple[Values, State]:
    """One token after the other, as the recurrences are written: for generation, where t is 1.

    Arguments, result and errors as in :func:`parallel_linear_attention`.
    """
    dtype = v.dtype
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, log_decay, state = widened(q, k, v, log_decay, documents, state, normalise)
        s, z = state.s, state.z
        decay = None if log_decay is None else log_decay.exp()
        outputs = []
        for step in range(v.shape[-2]):
            query, key, value = q[..., step, :], k[..., step, :], v[..., step, :]
            if decay is not None:
                s = s * decay[..., step, :, None]
                z = None if z is None else z * decay[..., step, :]
            s = s + key.unsqueeze(-1) * value.unsqueeze(-2)
            read = (query.unsqueeze(-2) @ s).squeeze(-2)
            if z is not None:
                z = z + key
                read = read / ((query * z).sum(dim=-1, keepdim=True) + eps)
            outputs.append(read)
        out = torch.stack(outputs, dim=-2) if outputs else v
        return out.to(dtype), State(s, z)


def linear_attention(
    q: Queries,
    k: Queries,
    v: Values,
    log_decay: LogDecay | None = None,
    *,
    normalise: bool = False,
    documents: Documents | None = None,
    state: State | None = None,
    eps: float = 1e-6,
    form: Form = "auto",
    chunk: int = CHUNK,
) -> tuple[Values, State]:
    """The form that is named; ``auto``: recurrent for a single token, else chunked.

    Arguments, result and errors as in :func:`chunked_linear_attention`.
    """
    if form not in get_args(Form):
        raise UserError(f"form = {form!r} is unknown for linear attention; allowed: {', '.join(get_args(Form))}")
    if form == "auto":
        form = "recurrent" if v.shape[-2] == 1 else "chunked"
    if form == "chunked":
        return chunked_linear_attention(
            q, k, v, log_decay, normalise=normalise, documents=documents, state=state, eps=eps, chunk=chunk
        )
    kernel = parallel_linear_attention if form == "parallel" else recurrent_linear_attention
    return kernel(q, k, v, log_decay, normalise=normalise, documents=documents, state=state, eps=eps)


def linear_attention_flops(
    form: Form, t: int, d_k: int, d_v: int, chunk: int = CHUNK, *, per_channel: bool = False
) -> int:
    """Operations in the matrix products of a forward pass over t tokens from an empty state, per head.

    Equal to torch's ``FlopCounterMode``. What is elementwise counts nothing: decays, the normaliser, the scores of the
    parallel form with a decay per channel, and k vᵀ in the recurrent form, of which the counter sees only the reading
    of the state. A parallel form that is given a state counts 2 · t · d_k · d_v more, to read it.

    Args:
        form, chunk: as in :func:`linear_attention`.
        per_channel: the decay is one per channel of the keys.

    Raises:
        UserError: a chunk of less than one, or not a power of two where the decay is per channel.
    """
    if form == "auto":
        form = "recurrent" if t == 1 else "chunked"
    state = 2 * d_k * d_v
    if form == "recurrent":
        return t * state
    if form == "parallel":
        return 2 * t * t * ((0 if per_channel else d_k) + d_v) + t * state
    chunk = chunk_length(chunk, t, per_channel)
    tokens = -(-t // chunk) * chunk  # with those that fill the last chunk
    scores = (chunk - 1) * d_k if per_channel else 2 * chunk * d_k
    return tokens * (scores + 2 * chunk * d_v + 2 * state)
