"""Splitting q‖k‖v and rotating in Triton: the operations of `rotary_op.py`, one kernel for both directions.

The heads of all tokens are rows of one matrix, as they lie in the projection. A program takes a few of them, whichever tokens they belong
to, so that it is always full; the row's number says which head of which token it is, and so where it goes:

::

    projection    q q q q k k v v │ q q q q k k v v │ q q q q k k v v │ …      a row per head, head_dim wide: halves a│b,
                  token 0           token 1           token 2                  or interleaved a b a b …
                  └──── program 0 ────┘└──── program 1 ────┘

    q             q q q q │ q q q q │ …       rotated        forward    reads the projection, writes q, k and v
    k             k k │ k k │ …               rotated        backward   reads their gradients, wherever these lie, rotates by the
    v             v v │ v v │ …               copied                    negative angle and writes the projection's

Each number is read once and written once, in pieces of 16 bytes per thread where the halves of a head allow it. The table of angles is read
per head, but the heads of a token find it in the processor's cache. Arithmetic is in fp32. Without a GPU it runs in Triton's interpreter, as
flash attention does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from scratchlm.kernels.attention import heads_inside

PAIRS = 2048
"""Of a program."""
OF_WARP = 256
"""Pairs of a warp: eight per thread, whose halves are 16 bytes each in half precision."""


@triton.jit
def _turn(
    projected_at, q_at, k_at, v_at, cos_at, sin_at,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    angles_batch, length, rows,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr, BACK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Some heads of q‖k‖v, from the projection or (BACK) to it; WIDTH: the next power of two of HEAD_DIM."""
    ALL: tl.constexpr = HEADS + 2 * KV_HEADS
    HALF: tl.constexpr = HEAD_DIM // 2

    # Which head of which token a row is: divisions of 64 bits are slow, so there is one of each kind per program.
    start = tl.program_id(0).to(tl.int64) * ROWS
    first = start // ALL
    batch = first // length
    row = (start - first * ALL).to(tl.int32) + tl.arange(0, ROWS)  # from the first head of token `first`
    head = row % ALL
    token = (first - batch * length).to(tl.int32) + row // ALL
    batch = batch + token // length
    token = (token % length).to(tl.int64)  # offsets below may exceed 2³¹
    there = start + tl.arange(0, ROWS) < rows
    is_value = head >= HEADS + KV_HEADS

    ours = projected_at + start * HEAD_DIM + tl.arange(0, ROWS) * HEAD_DIM
    in_q = q_at + batch * q_batch + head.to(tl.int64) * q_head + token * q_token
    in_k = k_at + batch * k_batch + (head - HEADS).to(tl.int64) * k_head + token * k_token
    in_v = v_at + batch * v_batch + (head - HEADS - KV_HEADS).to(tl.int64) * v_head + token * v_token
    theirs = tl.where(head < HEADS, in_q, tl.where(is_value, in_v, in_k))
    source, target = ours[:, None], theirs[:, None]
    if BACK:
        source, target = theirs[:, None], ours[:, None]

    column = tl.arange(0, WIDTH)
    pair = tl.arange(0, WIDTH // 2)
    in_half = there[:, None] & (pair < HALF)[None, :]
    if INTERLEAVED:
        inside = there[:, None] & (column < HEAD_DIM)[None, :]
        x = tl.load(source + column[None, :], mask=inside, other=0.0)
        a, b = tl.split(tl.reshape(x, (ROWS, WIDTH // 2, 2)))
    else:
        a = tl.load(source + pair[None, :], mask=in_half, other=0.0)
        b = tl.load(source + HALF + pair[None, :], mask=in_half, other=0.0)

    turns = in_half & (head < HEADS + KV_HEADS)[:, None]
    angle = ((batch * angles_batch + token) * HALF)[:, None] + pair[None, :]
    cos = tl.load(cos_at + angle, mask=turns, other=1.0).to(tl.float32)
    sin = tl.load(sin_at + angle, mask=turns, other=0.0).to(tl.float32)
    if BACK:
        sin = -sin
    wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
    # A value is chosen, not multiplied by 1 and 0: its other half may be ∞.
    a = tl.where(is_value[:, None], wide_a, wide_a * cos - wide_b * sin).to(a.dtype)
    b = tl.where(is_value[:, None], wide_b, wide_a * sin + wide_b * cos).to(b.dtype)

    if INTERLEAVED:
        tl.store(target + column[None, :], tl.reshape(tl.join(a, b), (ROWS, WIDTH)), mask=inside)
    else:
        tl.store(target + pair[None, :], a, mask=in_half)
        tl.store(target + HALF + pair[None, :], b, mask=in_half)


def tiling(head_dim: int) -> dict[str, int]:
    """What the kernel is launched with for heads of a width."""
    width = triton.next_power_of_2(head_dim)
    rows = max(1, 2 * PAIRS // width)
    return {"WIDTH": width, "ROWS": rows, "num_warps": max(1, min(rows * width // 2, PAIRS) // OF_WARP)}


def _launch(
    projected: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool
) -> None:
    """Run the kernel from `projected`, contiguous, to q, k and v, or `back`, whose rows each lie in one piece."""
    if not projected.numel():
        return
    heads, length, head_dim = q.shape[1:]
    chosen, rows = tiling(head_dim), projected.numel() // head_dim
    with torch.cuda.device_of(projected):
        _turn[(triton.cdiv(rows, chosen["ROWS"]),)](
            *(projected, q, k, v, cos.contiguous(), sin.contiguous()),
            *(x.stride(dimension) for x in (q, k, v) for dimension in range(3)),
            length if cos.ndim > 2 and cos.shape[0] > 1 else 0,
            *(length, rows),
            HEADS=heads,
            KV_HEADS=k.shape[1],
            HEAD_DIM=head_dim,
            INTERLEAVED=interleaved,
            BACK=back,
            **chosen,
        )


def forward(
    projected: Float[Tensor, "batch length width"],
    cos: Float[Tensor, "... length half"],
    sin: Float[Tensor, "... length half"],
    heads: int,
    kv_heads: int,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operation ``scratchlm::turn_heads``: bf16, fp16 or fp32."""
    length, width = projected.shape[1:]
    head_dim = width // (heads + 2 * kv_heads)
    q, k, v = (heads_inside(projected, n, length, head_dim) for n in (heads, kv_heads, kv_heads))
    _launch(projected.contiguous(), q, k, v, cos, sin, interleaved, back=False)
    return q, k, v


def backward(
    d_q: Float[Tensor, "batch heads length head_dim"],
    d_k: Float[Tensor, "batch kv_heads length head_dim"],
    d_v: Float[Tensor, "batch kv_heads length head_dim"],
    cos: Float[Tensor, "... length half"],
    sin: Float[Tensor, "... length half"],
    interleaved: bool,
) -> Float[Tensor, "batch length width"]:
    """The operation ``scratchlm::turn_heads_backward``: gradients of one dtype, bf16, fp16 or fp32, in any order of dimensions."""
    d_q, d_k, d_v = (x if x.stride(-1) == 1 else x.contiguous() for x in (d_q, d_k, d_v))
    batch, heads, length, head_dim = d_q.shape
    projected = d_q.new_empty(batch, length, (heads + 2 * d_k.shape[1]) * head_dim)
    _launch(projected, d_q, d_k, d_v, cos, sin, interleaved, back=True)
    return projected
