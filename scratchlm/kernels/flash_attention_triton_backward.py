"""FlashAttention-2's way back in Triton, in two passes that recompute the softmax from L: nothing is added from two sides.

::

    pass 1: a tile of keys per program          pass 2: a tile of queries per program
            K V │ Q dO → along the queries              Q dO │ K V → along the keys
            dV += Pᵀ dO,  dK += dSᵀ Q                   dQ += dS K
            over all query heads of the group

    P = exp(S − L),  dS = P ∘ (dO Vᵀ − D),  D = rowsum(dO ∘ O)

Two products more than with atomic additions to dQ, and in exchange every number is summed in one order: two runs agree to the bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from scratchlm.kernels.attention import heads_inside
from scratchlm.kernels.flash_attention_triton import (
    LOG2_E,
    Tiles,
    batch_stride,
    bytes_of,
    launch,
    load_tile,
    may_read,
    rows_whole,
    scores_of,
    settings,
    strides,
    tuned,
    unit_of,
)


@triton.jit
def _delta(
    d_out_at, out_at, delta_at, d_out_batch, d_out_head, d_out_row, out_batch, out_head, out_row, heads, queries,
    VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """D = rowsum(dO ∘ O) of one tile of queries."""
    tiles = tl.cdiv(queries, BLOCK_M)
    row = (tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = pair // heads, pair % heads
    width = tl.arange(0, VALUE_WIDTH)
    inside = (row < queries)[:, None] & (width < VALUE_DIM)[None, :]
    out_at += batch * out_batch + head * out_head + row[:, None] * out_row + width[None, :]
    d_out_at += batch * d_out_batch + head * d_out_head + row[:, None] * d_out_row + width[None, :]
    out = tl.load(out_at, mask=inside, other=0.0).to(tl.float32)
    d_out = tl.load(d_out_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(delta_at + pair * queries + row, tl.sum(out * d_out, 1), mask=row < queries)


@triton.jit
def _sweep_queries(
    d_k, d_v, k, v, queries_at, d_out_at, sums_at, delta_at, documents_at, others, present, key, slope,
    stride_q, stride_d_out, queries, past, lo, hi, scale, cap, window,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, ALIBI: tl.constexpr, PACKED: tl.constexpr, PADDED: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The tiles of queries from lo to hi, transposed (keys × queries): dK, still without the scale, and dV after them."""
    line = tl.arange(0, BLOCK_M)
    width, value_width = tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)
    unit = unit_of(scale, CAPPED, ALIBI)
    start_at = tl.cast(lo, tl.int64)
    q_at = queries_at + start_at * stride_q + line[:, None] * stride_q + width[None, :]
    do_at = d_out_at + start_at * stride_d_out + line[:, None] * stride_d_out + value_width[None, :]
    for start in range(lo, hi, BLOCK_M):
        row = start + line
        place = row + past
        inside = row < queries
        q = load_tile(q_at, inside[:, None], (width < HEAD_DIM)[None, :], MASKED, HEAD_DIM != WIDTH)
        if MASKED:
            sums = tl.load(sums_at + row, mask=inside, other=float("inf"))  # no weight beyond the last query
            delta = tl.load(delta_at + row, mask=inside, other=0.0)
        else:
            sums = tl.load(sums_at + row)
            delta = tl.load(delta_at + row)
        products = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        found, bent = scores_of(products, place[None, :], key[:, None], slope, scale, cap, CAPPED, ALIBI)
        if MASKED:
            own = row
            if PACKED:
                own = tl.load(documents_at + row, mask=inside, other=-2)
            allowed = may_read(
                place[None, :], key[:, None], own[None, :], others[:, None], present[:, None], window,
                WINDOWED, PACKED, PADDED,
            )  # fmt: skip
            found = tl.where(allowed, found, float("-inf"))
        p = tl.exp2(found * unit - sums[None, :])
        do = load_tile(do_at, inside[:, None], (value_width < VALUE_DIM)[None, :], MASKED, VALUE_DIM != VALUE_WIDTH)
        d_v = tl.dot(p.to(do.dtype), do, d_v, input_precision=PRECISION)
        d_p = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        d_s = p * (d_p - delta[None, :])
        if CAPPED:
            d_s = d_s * (1.0 - bent * bent)
        d_k = tl.dot(d_s.to(q.dtype), q, d_k, input_precision=PRECISION)
        q_at += BLOCK_M * stride_q
        do_at += BLOCK_M * stride_d_out
    return d_k, d_v


@triton.jit
def _backward_keys(
    q_at, k_at, v_at, d_out_at, sums_at, delta_at, slopes_at, documents_at, last_at, present_at, d_k_at, d_v_at,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, d_out_batch, d_out_head, d_out_row,
    d_k_batch, d_k_head, d_k_row, d_v_batch, d_v_head, d_v_row,
    documents_batch, present_batch, heads, queries, keys, bucket, scale, cap, window,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, ALIBI: tl.constexpr,
    PACKED: tl.constexpr, PADDED: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys, from all query heads that share it; the first tile, which most queries read, comes first."""
    tiles = tl.cdiv(keys, BLOCK_N)
    start = tl.program_id(0) % tiles * BLOCK_N
    pair = tl.program_id(0) // tiles
    kv_heads = heads // GROUP
    batch, kv_head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    past = keys - queries
    key = start + tl.arange(0, BLOCK_N)
    width, value_width = tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)
    k_at += batch * k_batch + kv_head * k_head + key.to(tl.int64)[:, None] * k_row + width[None, :]
    v_at += batch * v_batch + kv_head * v_head + key.to(tl.int64)[:, None] * v_row + value_width[None, :]
    k = load_tile(k_at, (key < keys)[:, None], (width < HEAD_DIM)[None, :], True, HEAD_DIM != WIDTH)
    v = load_tile(v_at, (key < keys)[:, None], (value_width < VALUE_DIM)[None, :], True, VALUE_DIM != VALUE_WIDTH)

    # Which queries read some key, [lo, hi), and which read every key, [full_lo, full_hi), in whole tiles.
    lo = tl.maximum(start - past, 0) // BLOCK_M * BLOCK_M
    hi = queries
    full_lo = tl.cdiv(tl.maximum(start + BLOCK_N - 1 - past, 0), BLOCK_M) * BLOCK_M
    full_hi = queries // BLOCK_M * BLOCK_M
    if WINDOWED:
        hi = tl.minimum(hi, tl.maximum(start + BLOCK_N - 1 - past + window, 0))
        full_hi = tl.minimum(full_hi, tl.maximum(start - past + window, 0) // BLOCK_M * BLOCK_M)
    others, present = key, key
    if PACKED:
        documents_at += batch * documents_batch
        others = tl.load(documents_at + key, mask=key < keys, other=-1)
        end = tl.load(last_at + batch * documents_batch + key, mask=key < keys, other=-1)
        hi = tl.minimum(hi, tl.max(end, 0) + 1)
    if PADDED:
        present = tl.load(present_at + batch * present_batch + key, mask=key < keys, other=0)

    d_k = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    d_v = tl.zeros([BLOCK_N, VALUE_WIDTH], tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        queries_at = q_at + batch * q_batch + head * q_head
        gradients_at = d_out_at + batch * d_out_batch + head * d_out_head
        of_head = (batch * heads + head) * queries
        slope = 0.0
        if ALIBI:
            slope = tl.load(slopes_at + head).to(tl.float32) * LOG2_E
        if PACKED or PADDED:
            d_k, d_v = _sweep_queries(
                d_k, d_v, k, v, queries_at, gradients_at, sums_at + of_head, delta_at + of_head, documents_at, others,
                present, key, slope, q_row, d_out_row, queries, past, lo, hi, scale, cap, window,
                HEAD_DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, WINDOWED, CAPPED, ALIBI, PACKED, PADDED, True, PRECISION,
                BLOCK_M,
            )  # fmt: skip
        else:
            d_k, d_v = _sweep_queries(
                d_k, d_v, k, v, queries_at, gradients_at, sums_at + of_head, delta_at + of_head, documents_at, others,
                present, key, slope, q_row, d_out_row, queries, past, lo, tl.minimum(full_lo, hi), scale, cap, window,
                HEAD_DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, WINDOWED, CAPPED, ALIBI, PACKED, PADDED, True, PRECISION,
                BLOCK_M,
            )  # fmt: skip
            d_k, d_v = _sweep_queries(
                d_k, d_v, k, v, queries_at, gradients_at, sums_at + of_head, delta_at + of_head, documents_at, others,
                present, key, slope, q_row, d_out_row, queries, past, full_lo, full_hi, scale, cap, window,
                HEAD_DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, WINDOWED, CAPPED, ALIBI, PACKED, PADDED, False, PRECISION,
                BLOCK_M,
            )  # fmt: skip
            if WINDOWED or RAGGED:
                d_k, d_v = _sweep_queries(
                    d_k, d_v, k, v, queries_at, gradients_at, sums_at + of_head, delta_at + of_head, documents_at, others,
                    present, key, slope, q_row, d_out_row, queries, past, tl.maximum(full_lo, full_hi), hi,
                    scale, cap, window,
                    HEAD_DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, WINDOWED, CAPPED, ALIBI, PACKED, PADDED, True, PRECISION,
                    BLOCK_M,
                )  # fmt: skip

    inside = (key < keys)[:, None]
    d_k_at += batch * d_k_batch + kv_head * d_k_head + key.to(tl.int64)[:, None] * d_k_row + width[None, :]
    d_v_at += batch * d_v_batch + kv_head * d_v_head + key.to(tl.int64)[:, None] * d_v_row + value_width[None, :]
    tl.store(d_k_at, (d_k * scale).to(d_k_at.dtype.element_ty), mask=inside & (width < HEAD_DIM)[None, :])
    tl.store(d_v_at, d_v.to(d_v_at.dtype.element_ty), mask=inside & (value_width < VALUE_DIM)[None, :])


@triton.jit
def _sweep_keys(
    d_q, q, do, sums, delta, keys_at, values_at, documents_at, present_at, own, place, slope, stride_k, stride_v,
    keys, lo, hi, scale, cap, window,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, ALIBI: tl.constexpr, PACKED: tl.constexpr, PADDED: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The tiles of keys from lo to hi: dQ, still without the scale, after them."""
    column = tl.arange(0, BLOCK_N)
    width, value_width = tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)
    unit = unit_of(scale, CAPPED, ALIBI)
    start_at = tl.cast(lo, tl.int64)
    k_at = keys_at + start_at * stride_k + column[:, None] * stride_k + width[None, :]
    v_at = values_at + start_at * stride_v + column[:, None] * stride_v + value_width[None, :]
    for start in range(lo, hi, BLOCK_N):
        key = start + column
        inside = (key < keys)[:, None]
        k = load_tile(k_at, inside, (width < HEAD_DIM)[None, :], MASKED, HEAD_DIM != WIDTH)
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        found, bent = scores_of(products, place[:, None], key[None, :], slope, scale, cap, CAPPED, ALIBI)
        if MASKED:
            others, present = key, key
            if PACKED:
                others = tl.load(documents_at + key, mask=key < keys, other=-1)
            if PADDED:
                present = tl.load(present_at + key, mask=key < keys, other=0)
            allowed = may_read(
                place[:, None], key[None, :], own[:, None], others[None, :], present[None, :], window,
                WINDOWED, PACKED, PADDED,
            )  # fmt: skip
            found = tl.where(allowed, found, float("-inf"))
        p = tl.exp2(found * unit - sums[:, None])
        v = load_tile(v_at, inside, (value_width < VALUE_DIM)[None, :], MASKED, VALUE_DIM != VALUE_WIDTH)
        d_p = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        d_s = p * (d_p - delta[:, None])
        if CAPPED:
            d_s = d_s * (1.0 - bent * bent)
        d_q = tl.dot(d_s.to(k.dtype), k, d_q, input_precision=PRECISION)
        k_at += BLOCK_N * stride_k
        v_at += BLOCK_N * stride_v
    return d_q


@triton.jit
def _backward_queries(
    q_at, k_at, v_at, d_out_at, sums_at, delta_at, slopes_at, documents_at, first_at, present_at, d_q_at,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, d_out_batch, d_out_head, d_out_row,
    d_q_batch, d_q_head, d_q_row, documents_batch, present_batch, heads, queries, keys, bucket, scale, cap, window,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, ALIBI: tl.constexpr,
    PACKED: tl.constexpr, PADDED: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries of one head; sweeps as in the forward kernel."""
    tiles = tl.cdiv(queries, BLOCK_M)
    start = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    pair = tl.program_id(0) // tiles
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    past = keys - queries
    row = start + tl.arange(0, BLOCK_M)
    place = row + past
    inside = row < queries
    width, value_width = tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)
    q_at += batch * q_batch + head * q_head + row.to(tl.int64)[:, None] * q_row + width[None, :]
    d_out_at += (
        batch * d_out_batch + head * d_out_head + row.to(tl.int64)[:, None] * d_out_row + value_width[None, :]
    )
    q = load_tile(q_at, inside[:, None], (width < HEAD_DIM)[None, :], True, HEAD_DIM != WIDTH)
    do = load_tile(d_out_at, inside[:, None], (value_width < VALUE_DIM)[None, :], True, VALUE_DIM != VALUE_WIDTH)
    of_head = pair.to(tl.int64) * queries
    sums = tl.load(sums_at + of_head + row, mask=inside, other=float("inf"))
    delta = tl.load(delta_at + of_head + row, mask=inside, other=0.0)
    k_at += batch * k_batch + head // GROUP * k_head
    v_at += batch * v_batch + head // GROUP * v_head

    hi = tl.maximum(tl.minimum(start + BLOCK_M + past, keys), 0)
    lo = 0
    full_lo = 0
    full_hi = tl.maximum(start + past + 1, 0) // BLOCK_N * BLOCK_N
    if WINDOWED:
        lo = tl.maximum(start + past - window + 1, 0) // BLOCK_N * BLOCK_N
        full_lo = tl.cdiv(tl.maximum(start + BLOCK_M + past - window, 0), BLOCK_N) * BLOCK_N
    own = row
    if PACKED:
        documents_at += batch * documents_batch
        own = tl.load(documents_at + row, mask=inside, other=-2)
        begin = tl.load(first_at + batch * documents_batch + row, mask=inside, other=keys)
        lo = tl.maximum(lo, tl.min(begin, 0) // BLOCK_N * BLOCK_N)
    if PADDED:
        present_at += batch * present_batch
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes_at + head).to(tl.float32) * LOG2_E

    d_q = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    if PACKED or PADDED:
        d_q = _sweep_keys(
            d_q, q, do, sums, delta, k_at, v_at, documents_at, present_at, own, place, slope, k_row, v_row, keys,
            lo, hi, scale, cap, window,
            HEAD_DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, WINDOWED, CAPPED, ALIBI, PACKED, PADDED, True, PRECISION, BLOCK_N,
        )  # fmt: skip
    else:
        if WINDOWED:
            d_q = _sweep_keys(
                d_q, q, do, sums, delta, k_at, v_at, documents_at, present_at, own, place, slope, k_row, v_row, keys,
                lo, tl.minimum(full_lo, hi), scale, cap, window,
                HEAD_DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, WINDOWED, CAPPED, ALIBI, PACKED, PADDED, True, PRECISION,
                BLOCK_N,
            )  # fmt: skip
        d_q = _sweep_keys(
            d_q, q, do, sums, delta, k_at, v_at, documents_at, present_at, own, place, slope, k_row, v_row, keys,
            full_lo, full_hi, scale, cap, window,
            HEAD_DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, WINDOWED, CAPPED, ALIBI, PACKED, PADDED, False, PRECISION, BLOCK_N,
        )  # fmt: skip
        d_q = _sweep_keys(
            d_q, q, do, sums, delta, k_at, v_at, documents_at, present_at, own, place, slope, k_row, v_row, keys,
            tl.maximum(full_lo, full_hi), hi, scale, cap, window,
            HEAD_DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, WINDOWED, CAPPED, ALIBI, PACKED, PADDED, True, PRECISION, BLOCK_N,
        )  # fmt: skip
    d_q_at += batch * d_q_batch + head * d_q_head + row.to(tl.int64)[:, None] * d_q_row + width[None, :]
    tl.store(d_q_at, (d_q * scale).to(d_q_at.dtype.element_ty), mask=inside[:, None] & (width < HEAD_DIM)[None, :])


# --- which tiles ----------------------------------------------------------------------------------------------------------

KEYS_HALF: Tiles = {
    64: ((64, 128, 8, 3), (64, 128, 8, 2), (32, 128, 8, 3), (64, 64, 4, 3), (64, 64, 4, 2), (32, 64, 4, 3)),
    128: ((32, 128, 8, 3), (64, 64, 8, 2), (32, 64, 8, 2)),
    256: ((32, 32, 8, 1), (16, 32, 8, 1)),
}
KEYS_FP32: Tiles = {
    64: ((32, 32, 8, 1), (16, 32, 4, 1)),
    128: ((16, 32, 8, 1), (16, 32, 4, 1)),
    256: ((16, 16, 8, 1),),
}
QUERIES_HALF: Tiles = {
    64: ((128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 3), (64, 64, 4, 3), (64, 32, 4, 3)),
    128: ((128, 64, 8, 2), (128, 32, 8, 3), (64, 64, 4, 3), (64, 32, 4, 3)),
    256: ((64, 64, 8, 2), (64, 32, 8, 2), (32, 32, 8, 1)),
}
QUERIES_FP32: Tiles = {
    64: ((32, 32, 8, 1), (32, 16, 4, 1)),
    128: ((16, 16, 8, 1),),
    256: ((16, 16, 8, 1),),
}

_keys_kernel = tuned(_backward_keys, KEYS_HALF, KEYS_FP32)
_queries_kernel = tuned(_backward_queries, QUERIES_HALF, QUERIES_FP32)


def backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sums: Tensor,
    slopes: Tensor | None,
    documents: Tensor | None,
    first: Tensor | None,
    last: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    soft_cap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operation ``scratchlm::flash_attention_backward`` (`flash_attention_op.py`)."""
    d_out, q, k, v, out, key_mask = *(rows_whole(x) for x in (d_out, q, k, v, out)), bytes_of(key_mask)
    batch, heads, queries, _ = q.shape
    kv_heads, keys = k.shape[1:3]
    d_q, d_k, d_v = (heads_inside(x, x.shape[1], x.shape[2], x.shape[3]) for x in (q, k, v))
    delta = torch.empty_like(log_sums)
    compiled_for = settings(q, k, v, slopes, documents, key_mask, soft_cap, window)
    block = 64
    with torch.cuda.device_of(q):
        _delta[(triton.cdiv(queries, block) * batch * heads,)](
            *(d_out, out, delta, *strides(d_out, out), heads, queries),
            VALUE_DIM=v.shape[-1],
            VALUE_WIDTH=compiled_for["VALUE_WIDTH"],
            BLOCK_M=block,
        )
    sizes = batch_stride(documents), batch_stride(key_mask), heads, queries, keys, triton.next_power_of_2(keys)
    numbers = scale, soft_cap or 0.0, window or 0
    read = q, k, v, d_out, log_sums, delta, slopes, documents
    launch(
        _keys_kernel,
        lambda meta: (triton.cdiv(keys, meta["BLOCK_N"]) * batch * kv_heads,),
        *(*read, last, key_mask, d_k, d_v),
        *(*strides(q, k, v, d_out, d_k, d_v), *sizes, *numbers),
        **compiled_for,
    )
    launch(
        _queries_kernel,
        lambda meta: (triton.cdiv(queries, meta["BLOCK_M"]) * batch * heads,),
        *(*read, first, key_mask, d_q),
        *(*strides(q, k, v, d_out, d_q), *sizes, *numbers),
        **compiled_for,
    )
    return d_q, d_k, d_v, delta
