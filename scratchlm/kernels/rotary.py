"""q‖k‖v of a projection split into heads, queries and keys rotated, as one operation: when, and the way there.

The operation itself is in `rotary_op.py`, which is not read before it is wanted; its kernels are in `rotary_triton.py` and `rows.cpp`. The formula it is
held equal to: :class:`scratchlm.model.rope.RoPE`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from scratchlm.kernels import rows_cpp, triton_here
from scratchlm.kernels.cpp_here import is_watched

IN_TORCH = "queries and keys are rotated by torch's kernels"


def fits(projected: Tensor) -> bool:
    """Whether :func:`turn_heads` is the way: one dimension of rows, in half or single precision, where Triton's kernels run, or those for CPUs."""
    return projected.ndim == 3 and (rows_cpp.is_offered(projected) or triton_here.is_offered(projected, IN_TORCH))


def turn_heads(
    projected: Float[Tensor, "batch length width"],
    cos: Float[Tensor, "... length half"],
    sin: Float[Tensor, "... length half"],
    heads: int,
    kv_heads: int,
    interleaved: bool,
) -> tuple[
    Float[Tensor, "batch heads length head_dim"],
    Float[Tensor, "batch kv_heads length head_dim"],
    Float[Tensor, "batch kv_heads length head_dim"],
]:
    """q, k and v of q‖k‖v, the first two rotated (Su et al. 2021, arXiv 2104.09864, eq. 34); computed in fp32 at least.

    The heads of a token lie side by side in memory, in all three.

    Args:
        projected: width = (heads + 2 kv_heads) · head_dim.
        cos, sin: fp32, of each position and pair of dimensions, half = head_dim / 2; (length, half) for the whole batch or
            (batch, length, half). They have no gradient.
        heads, kv_heads: of the queries; of the keys, and as many of the values.
        interleaved: pairs are (0, 1), (2, 3), …; else (0, half), (1, half + 1), ….

    Raises:
        ValueError: the heads do not make up the width, or the tables are of another length or width.
    """
    given = projected, cos, sin, heads, kv_heads, interleaved
    if not is_watched(projected) and rows_cpp.is_offered(projected):
        width_of_heads(projected, cos, sin, heads, kv_heads)
        q, k, v = rows_cpp.TurnHeads.apply(*given)
        return q, k, v
    from scratchlm.kernels import rotary_op

    q, k, v = rotary_op.turn_heads(*given)
    return q, k, v


def fits_heads(x: Tensor) -> bool:
    """Whether :func:`turn` is the way: heads that are there already, where no compiler makes one loop of norm and rotation; in Triton, if a gradient is wanted."""
    if x.ndim != 4 or torch.compiler.is_compiling():
        return False
    return rows_cpp.is_offered(x) or (torch.is_grad_enabled() and triton_here.computes(x, IN_TORCH))


def turn(
    x: Float[Tensor, "batch heads length head_dim"],
    cos: Float[Tensor, "... length half"],
    sin: Float[Tensor, "... length half"],
    interleaved: bool,
) -> Float[Tensor, "batch heads length head_dim"]:
    """Heads rotated; arguments as for :func:`turn_heads`, and so is the result's memory."""
    return turn_heads(x.transpose(1, 2).flatten(-2), cos, sin, x.shape[1], 0, interleaved)[0]


def width_of_heads(projected: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int) -> int:
    """head_dim.

    Raises:
        ValueError: arguments that are not for each other.
    """
    batch, length, width = projected.shape
    head_dim = width // (heads + 2 * kv_heads)
    if width != (heads + 2 * kv_heads) * head_dim or head_dim % 2:
        raise ValueError(f"{heads} + 2 · {kv_heads} heads of an even width do not make up {width}")
    check_tables(batch, length, head_dim, cos, sin)
    return head_dim


def check_tables(batch: int, length: int, head_dim: int, cos: Tensor, sin: Tensor) -> None:
    """A kernel would read beyond a smaller table.

    Raises:
        ValueError: they are of another size.
    """
    rows, *rest = (1, *cos.shape)[-3:]
    if cos.shape != sin.shape or rest != [length, head_dim // 2] or rows not in (1, batch):
        raise ValueError(
            f"cos and sin of {batch} × {length} tokens and {head_dim // 2} pairs cannot be {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
