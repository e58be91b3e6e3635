"""FlashAttention-2 in Triton: the forward kernel, and what it shares with the way back (`flash_attention_triton_backward.py`).

The algorithm is that of `flash_attention.py`, one program per tile of queries and head. Its tiles of keys come in three sweeps,
so that only tiles through which an edge of the mask runs ask who may read whom:

::

    keys →        lo                full_lo              full_hi            hi
    tile of       ├── some masked ───┼──── no mask at all ─┼── some masked ───┤
    queries       the window's edge    the bulk of the work  the diagonal

Scores are in units of log 2, so that exp2 serves, which the hardware has. Products sum in fp32; fp32 inputs are multiplied in
fp32 (no tf32). Without a GPU the kernels run in Triton's interpreter: TRITON_INTERPRET=1, set before Triton is imported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from scratchlm.kernels.attention import heads_inside

LOG2_E = tl.constexpr(math.log2(math.e))
LARGEST = 128
"""Every tile's height divides it."""
INTERPRETER_TILES = (16, 16)
"""Queries and keys of a tile where no GPU chooses them."""
FIXED: dict[str, int] | None = None
"""Tiles, warps and stages to take without measuring: for tests on a GPU, which would else compile every candidate."""


# --- what all kernels share -----------------------------------------------------------------------------------------------


@triton.jit
def load_tile(pointers, in_rows, in_columns, CHECK_ROWS: tl.constexpr, CHECK_COLUMNS: tl.constexpr):
    """A tile of a matrix, zeros outside of it; what is known to lie inside is not asked."""
    if CHECK_ROWS and CHECK_COLUMNS:
        tile = tl.load(pointers, mask=in_rows & in_columns, other=0.0)
    elif CHECK_ROWS:
        tile = tl.load(pointers, mask=in_rows, other=0.0)
    elif CHECK_COLUMNS:
        tile = tl.load(pointers, mask=in_columns, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def scores_of(products, place, key, slope, scale, cap, CAPPED: tl.constexpr, ALIBI: tl.constexpr):
    """Products q · k as scores, and tanh(product · scale / cap), which the way back asks for.

    Without cap and ALiBi they stay products: the unit that all later steps multiply by has the scale in it. `place` is the
    key beside which a query stands.
    """
    bent = products
    found = products
    if CAPPED:  # tanh x = 1 − 2 / (1 + exp 2x), right at ±∞ too
        bent = 1.0 - 2.0 / (1.0 + tl.exp2(products * (scale / cap * (2.0 * LOG2_E))))
        found = bent * (cap * LOG2_E)
    elif ALIBI:
        found = products * (scale * LOG2_E)
    if ALIBI:
        found = found - slope * (place - key).to(tl.float32)
    return found, bent


@triton.jit
def unit_of(scale, CAPPED: tl.constexpr, ALIBI: tl.constexpr):
    """What turns :func:`scores_of` into units of log 2."""
    if CAPPED or ALIBI:
        unit = 1.0
    else:
        unit = scale * LOG2_E
    return unit


@triton.jit
def may_read(
    place, key, own, others, present, window, WINDOWED: tl.constexpr, PACKED: tl.constexpr, PADDED: tl.constexpr
):
    """The mask of a tile, from queries and keys shaped to broadcast: causal, within the window, within the document, no padding."""
    allowed = place >= key
    if WINDOWED:
        allowed = allowed & (place - key < window)
    if PACKED:
        allowed = allowed & (own == others)
    if PADDED:
        allowed = allowed & (present != 0)
    return allowed


# --- forward --------------------------------------------------------------------------------------------------------------


@triton.jit
def _sweep(
    o, l, m, q, keys_at, values_at, documents_at, present_at, own, place, slope, stride_k, stride_v, keys, lo, hi,
    scale, cap, window,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, ALIBI: tl.constexpr, PACKED: tl.constexpr, PADDED: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The tiles of keys from lo to hi: o, l and m after them (the module `flash_attention` says what they are)."""
    column = tl.arange(0, BLOCK_N)
    width, value_width = tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)
    unit = unit_of(scale, CAPPED, ALIBI)
    start_at = tl.cast(lo, tl.int64)
    k_at = keys_at + start_at * stride_k + column[None, :] * stride_k + width[:, None]
    v_at = values_at + start_at * stride_v + column[:, None] * stride_v + value_width[None, :]
    for start in range(lo, hi, BLOCK_N):
        key = start + column
        k = load_tile(k_at, (key < keys)[None, :], (width < HEAD_DIM)[:, None], MASKED, HEAD_DIM != WIDTH)
        products = tl.dot(q, k, input_precision=PRECISION)
        found, _ = scores_of(products, place[:, None], key[None, :], slope, scale, cap, CAPPED, ALIBI)
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
        higher = tl.maximum(m, tl.max(found, 1) * unit)
        base = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has read nothing yet
        weights = tl.exp2(found * unit - base[:, None])
        shrink = tl.exp2(m - base)
        l = l * shrink + tl.sum(weights, 1)
        v = load_tile(
            v_at, (key < keys)[:, None], (value_width < VALUE_DIM)[None, :], MASKED, VALUE_DIM != VALUE_WIDTH
        )
        o = tl.dot(weights.to(v.dtype), v, o * shrink[:, None], input_precision=PRECISION)
        m = higher
        k_at += BLOCK_N * stride_k
        v_at += BLOCK_N * stride_v
    return o, l, m


@triton.jit
def _forward(
    q_at, k_at, v_at, slopes_at, sinks_at, documents_at, first_at, present_at, out_at, sums_at,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row,
    documents_batch, present_batch, heads, queries, keys, bucket, scale, cap, window,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, ALIBI: tl.constexpr,
    PACKED: tl.constexpr, PADDED: tl.constexpr, RAGGED: tl.constexpr, SUNK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head; the last tile, which reads most, comes first."""
    tiles = tl.cdiv(queries, BLOCK_M)
    start = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    pair = tl.program_id(0) // tiles
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    past = keys - queries
    row = start + tl.arange(0, BLOCK_M)
    place = row + past
    width, value_width = tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)
    q_at += batch * q_batch + head * q_head + row.to(tl.int64)[:, None] * q_row + width[None, :]
    q = load_tile(q_at, (row < queries)[:, None], (width < HEAD_DIM)[None, :], True, HEAD_DIM != WIDTH)
    k_at += batch * k_batch + head // GROUP * k_head
    v_at += batch * v_batch + head // GROUP * v_head

    # Which keys some query reads, [lo, hi), and which every query reads, [full_lo, full_hi), in whole tiles.
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
        own = tl.load(documents_at + row, mask=row < queries, other=-2)
        begin = tl.load(first_at + batch * documents_batch + row, mask=row < queries, other=keys)
        lo = tl.maximum(lo, tl.min(begin, 0) // BLOCK_N * BLOCK_N)
    if PADDED:
        present_at += batch * present_batch
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes_at + head).to(tl.float32) * LOG2_E

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    if SUNK:  # a score whose value is zero
        m = tl.zeros([BLOCK_M], tl.float32) + tl.load(sinks_at + head).to(tl.float32) * LOG2_E
        l += 1.0
    o = tl.zeros([BLOCK_M, VALUE_WIDTH], tl.float32)
    if PACKED or PADDED:
        o, l, m = _sweep(
            o, l, m, q, k_at, v_at, documents_at, present_at, own, place, slope, k_row, v_row, keys, lo, hi,
            scale, cap, window,
            HEAD_DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, WINDOWED, CAPPED, ALIBI, PACKED, PADDED, True, PRECISION, BLOCK_N,
        )  # fmt: skip
    else:
        if WINDOWED:
            o, l, m = _sweep(
                o, l, m, q, k_at, v_at, documents_at, present_at, own, place, slope, k_row, v_row, keys,
                lo, tl.minimum(full_lo, hi), scale, cap, window,
                HEAD_DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, WINDOWED, CAPPED, ALIBI, PACKED, PADDED, True, PRECISION,
                BLOCK_N,
            )  # fmt: skip
        o, l, m = _sweep(
            o, l, m, q, k_at, v_at, documents_at, present_at, own, place, slope, k_row, v_row, keys,
            full_lo, full_hi, scale, cap, window,
            HEAD_DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, WINDOWED, CAPPED, ALIBI, PACKED, PADDED, False, PRECISION, BLOCK_N,
        )  # fmt: skip
        o, l, m = _sweep(
            o, l, m, q, k_at, v_at, documents_at, present_at, own, place, slope, k_row, v_row, keys,
            tl.maximum(full_lo, full_hi), hi, scale, cap, window,
            HEAD_DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, WINDOWED, CAPPED, ALIBI, PACKED, PADDED, True, PRECISION, BLOCK_N,
        )  # fmt: skip

    empty = l == 0.0
    l = tl.where(empty, 1.0, l)
    o = o / l[:, None]
    sums = tl.where(empty, float("inf"), m + tl.log2(l))  # exp2(score − ∞) = 0: an empty row has no gradient
    tl.store(sums_at + pair.to(tl.int64) * queries + row, sums, mask=row < queries)
    out_at += batch * out_batch + head * out_head + row.to(tl.int64)[:, None] * out_row + value_width[None, :]
    tl.store(
        out_at, o.to(out_at.dtype.element_ty), mask=(row < queries)[:, None] & (value_width < VALUE_DIM)[None, :]
    )


# --- which tiles ----------------------------------------------------------------------------------------------------------

Tiles = Mapping[int, Sequence[tuple[int, int, int, int]]]
"""Candidates for heads up to a width: queries and keys of a tile, warps, stages of the pipeline.

They are those that the compiler fits into the registers of sm_90 with nothing worth mentioning spilled (but for fp32 heads of 256, backward), and
for each width at least one needs no more than the 99 KiB of shared memory that smaller GPUs have: `tests/kernels/test_flash_attention_triton.py`
asks the compiler.
"""

HALF: Tiles = {
    64: ((128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 8, 4), (128, 64, 4, 3), (64, 128, 4, 3), (64, 64, 4, 3)),
    128: ((128, 128, 8, 2), (128, 64, 8, 3), (128, 32, 8, 3), (64, 64, 4, 3), (64, 32, 4, 3)),
    256: ((128, 32, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2)),
}
FP32: Tiles = {
    64: ((64, 32, 8, 2), (32, 32, 4, 2), (32, 16, 4, 1)),
    128: ((32, 32, 8, 1), (32, 16, 4, 1)),
    256: ((32, 16, 8, 1), (16, 16, 8, 1)),
}


def candidates(tiles: Tiles, width: int) -> Sequence[tuple[int, int, int, int]]:
    """Those of the narrowest class that holds the width."""
    return tiles[min(widest for widest in tiles if width <= widest)]


def tuned(kernel: Any, half: Tiles, fp32: Tiles) -> Callable[..., Any]:
    """The kernel that on first use with a width, a kind of mask and a length's power of two measures its candidates.

    In the interpreter nothing is measured: tiles are of `INTERPRETER_TILES`.
    """
    if not isinstance(kernel, triton.JITFunction):
        return kernel

    def fitting(configs: list[triton.Config], named: dict[str, Any], **meta: Any) -> list[triton.Config]:
        tiles = fp32 if meta["PRECISION"] == "ieee" else half
        shapes = set(candidates(tiles, max(meta["WIDTH"], meta["VALUE_WIDTH"])))
        return [
            c for c in configs if (c.kwargs["BLOCK_M"], c.kwargs["BLOCK_N"], c.num_warps, c.num_stages) in shapes
        ]

    every = dict.fromkeys(tile for tiles in (half, fp32) for some in tiles.values() for tile in some)
    return triton.autotune(
        [triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=w, num_stages=s) for m, n, w, s in every],
        key=[
            "bucket",
            "GROUP",
            "HEAD_DIM",
            "VALUE_DIM",
            "WINDOWED",
            "CAPPED",
            "ALIBI",
            "PACKED",
            "PADDED",
            "RAGGED",
        ],
        prune_configs_by={"early_config_prune": fitting},
    )(kernel)


def launch(kernel: Any, programs: Callable[[dict[str, Any]], tuple[int, ...]], *given: Any, **meta: Any) -> None:
    """Run a kernel of :func:`tuned` on the device of its first argument."""
    if not isinstance(kernel, triton.runtime.autotuner.Autotuner):
        meta |= {"BLOCK_M": INTERPRETER_TILES[0], "BLOCK_N": INTERPRETER_TILES[1]}
    elif FIXED is not None:
        kernel, meta = kernel.fn, meta | FIXED
    with torch.cuda.device_of(given[0]):
        kernel[programs](*given, **meta)


def settings(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None,
    documents: Tensor | None,
    key_mask: Tensor | None,
    soft_cap: float | None,
    window: int | None,
) -> dict[str, Any]:
    """What the kernels are compiled for."""
    return {
        "GROUP": q.shape[1] // k.shape[1],
        "HEAD_DIM": q.shape[-1],
        "VALUE_DIM": v.shape[-1],
        "WIDTH": max(16, triton.next_power_of_2(q.shape[-1])),
        "VALUE_WIDTH": max(16, triton.next_power_of_2(v.shape[-1])),
        "WINDOWED": window is not None,
        "CAPPED": soft_cap is not None,
        "ALIBI": slopes is not None,
        "PACKED": documents is not None,
        "PADDED": key_mask is not None,
        "RAGGED": q.shape[2] % LARGEST != 0,  # the last tile of queries is not full
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }


def rows_whole(x: Tensor) -> Tensor:
    """The same with each row in one piece, as the kernels read it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides(*tensors: Tensor) -> list[int]:
    """Of each tensor (batch, heads, length, width): how far apart batches, heads and rows lie."""
    return [x.stride(dimension) for x in tensors for dimension in range(3)]


def batch_stride(x: Tensor | None) -> int:
    """How far apart the rows of a (batch, length) lie; 0: one for the whole batch, or none."""
    return x.stride(0) if x is not None and x.ndim > 1 else 0


def bytes_of(key_mask: Tensor | None) -> Tensor | None:
    return None if key_mask is None else key_mask.contiguous().view(torch.uint8)


_kernel = tuned(_forward, HALF, FP32)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None,
    sinks: Tensor | None,
    documents: Tensor | None,
    first: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    soft_cap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """The operation ``scratchlm::flash_attention`` (`flash_attention_op.py`)."""
    q, k, v, key_mask = rows_whole(q), rows_whole(k), rows_whole(v), bytes_of(key_mask)
    batch, heads, queries, _ = q.shape
    out = heads_inside(q, heads, queries, v.shape[-1])
    sums = q.new_empty(batch, heads, queries, dtype=torch.float32)
    launch(
        _kernel,
        lambda meta: (triton.cdiv(queries, meta["BLOCK_M"]) * batch * heads,),
        *(q, k, v, slopes, sinks, documents, first, key_mask, out, sums),
        *strides(q, k, v, out),
        *(batch_stride(documents), batch_stride(key_mask), heads, queries, k.shape[2]),
        *(triton.next_power_of_2(k.shape[2]), scale, soft_cap or 0.0, window or 0),
        **settings(q, k, v, slopes, documents, key_mask, soft_cap, window),
        SUNK=sinks is not None,
    )
    return out, sums
