"""Experts of a mixture: y = Σ g_e · FFN_e(x) over a token's experts e (Shazeer et al. 2017, arXiv 1701.06538, eq. 1).

Two implementations with one signature. A pair is one (token, choice); both compute all tokens · k pairs whatever an
expert's load: nothing is dropped here. A choice with gate 0 adds nothing and sends no gradient to its expert.

::

    token     0   1   2   3         sort by expert       one grouped matmul        back in order, times gates
    expert    2   0   2   1    ►    0 │ 1 │ 2   2   ►    W₀x │ W₁x │ W₂x  W₂x  ►    y₀  y₁  y₂  y₃
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from scratchlm.kernels.matmul import linear

Tokens = Float[Tensor, "tokens d_model"]
Up = Float[Tensor, "experts inner d_model"]
Down = Float[Tensor, "experts d_model d_expert"]
UpBias = Float[Tensor, "experts inner"]
DownBias = Float[Tensor, "experts d_model"]


def reference_experts(
    x: Tokens,
    experts: Int[Tensor, "tokens k"],
    gates: Float[Tensor, "tokens k"],
    up: Up,
    down: Down,
    activate: Callable[[Tensor], Tensor],
    up_bias: UpBias | None = None,
    down_bias: DownBias | None = None,
) -> Tokens:
    """One expert after the other: its tokens, through its two matrices, times their gates.

    Args:
        x: the tokens' hidden states.
        experts: which experts each token goes to; a token names none twice.
        gates: what each of their outputs is multiplied by; the sum is computed in at least float32.
        up: first matrix of each expert; `inner` is 2 · d_expert where `activate` takes gate‖up.
        down: second matrix of each expert.
        activate: (…, inner) → (…, d_expert).
        up_bias, down_bias: added after the matrices.

    Returns:
        The mixture, in the dtype of the experts' outputs.
    """
    mixture = x.new_zeros(x.shape, dtype=torch.promote_types(gates.dtype, torch.float32))
    for expert in range(len(up)):
        token, choice = (experts == expert).nonzero(as_tuple=True)
        projected = einsum(x[token], up[expert], "n d, inner d -> n inner")
        inner = activate(projected if up_bias is None else projected + up_bias[expert].to(projected.dtype))
        y = einsum(inner, down[expert], "n d_expert, d d_expert -> n d")
        y = y if down_bias is None else y + down_bias[expert].to(y.dtype)
        mixture = mixture.index_add(0, token, (gates[token, choice, None] * y).to(mixture.dtype))
    return mixture.to(y.dtype)


def grouped_experts(
    x: Tokens,
    experts: Int[Tensor, "tokens k"],
    gates: Float[Tensor, "tokens k"],
    up: Up,
    down: Down,
    activate: Callable[[Tensor], Tensor],
    up_bias: UpBias | None = None,
    down_bias: DownBias | None = None,
) -> Tokens:
    """The same with pairs sorted by expert, so that two grouped matmuls serve all experts.

    Nothing is dropped and nothing padded to the busiest expert (MegaBlocks: Gale et al. 2022, arXiv 2211.15841): work
    and memory are those of tokens · k rows however unequal the load. Shapes do not depend on the choices, so a compiled
    model needs no graph break. Arguments as in :func:`reference_experts`; where autocast is on, matmuls run in its
    dtype.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, up, down = x.to(dtype), up.to(dtype), down.to(dtype)
    tokens, k = experts.shape
    alone = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    if alone and tokens and x.device.type == "cpu":
        each = _for_one_token if tokens == 1 else _each_where_it_lies
        return each(x, experts, gates, up, down, activate, up_bias, down_bias)
    owner, order = experts.flatten().sort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    numbers = torch.arange(len(up), device=owner.device, dtype=owner.dtype)
    ends = torch.searchsorted(owner, numbers, right=True, out_int32=True)

    inner = _GroupedLinear.apply(_Rows.apply(x, order, inverse, k), up, ends)
    if up_bias is not None:
        inner = inner + F.embedding(owner, up_bias.to(inner.dtype))
    y = _GroupedLinear.apply(activate(inner), down, ends)
    if down_bias is not None:
        y = y + F.embedding(owner, down_bias.to(y.dtype))
    chosen = _Rows.apply(y, inverse, order, 1).view(tokens, k, y.shape[1])
    return (chosen * gates[..., None]).sum(1).to(y.dtype)


def _for_one_token(
    x: Tokens,
    experts: Int[Tensor, "1 k"],
    gates: Float[Tensor, "1 k"],
    up: Up,
    down: Down,
    activate: Callable[[Tensor], Tensor],
    up_bias: UpBias | None,
    down_bias: DownBias | None,
) -> Tokens:
    """The same for the newest token alone: nothing to sort."""
    chosen = experts[0].tolist()
    inner = torch.cat([linear(x, up[expert]) for expert in chosen])
    inner = activate(inner if up_bias is None else inner + up_bias[experts[0]].to(inner.dtype))
    y = torch.cat([linear(row, down[expert]) for row, expert in zip(inner.split(1), chosen, strict=True)])
    y = y if down_bias is None else y + down_bias[experts[0]].to(y.dtype)
    wide = torch.promote_types(y.dtype, gates.dtype)
    return (gates.to(wide) @ y.to(wide)).to(y.dtype)


def _each_where_it_lies(
    x: Tokens,
    experts: Int[Tensor, "tokens k"],
    gates: Float[Tensor, "tokens k"],
    up: Up,
    down: Down,
    activate: Callable[[Tensor], Tensor],
    up_bias: UpBias | None,
    down_bias: DownBias | None,
) -> Tokens:
    """The same on a CPU without gradients: expert by expert of those that are asked, their weights read where they lie."""
    order = experts.flatten().argsort(stable=True)
    ends = experts.flatten().bincount(minlength=len(up)).cumsum(0).tolist()
    shares = [
        (expert, start, end) for expert, (start, end) in enumerate(itertools.pairwise([0, *ends])) if start < end
    ]

    def product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        bias = bias if bias is None else bias.to(rows.dtype)
        multiply = F.linear if rows.dtype == torch.bfloat16 else linear
        parts = [multiply(rows[s:e], weight[n], None if bias is None else bias[n]) for n, s, e in shares]
        return torch.cat(parts)

    inner = product(x.index_select(0, order // experts.shape[1]), up, up_bias)
    y = product(activate(inner), down, down_bias)
    chosen = torch.empty_like(y).index_copy_(0, order, y).view(*experts.shape, -1)
    # At once: a product of two dtypes converts number by number.
    wide = chosen.to(torch.promote_types(y.dtype, gates.dtype))
    return (wide * gates[..., None]).sum(1).to(y.dtype)


class _Rows(torch.autograd.Function):
    """Row index[i] // copies of x as row i, where `back` undoes the permutation `index`.

    The gradient of a plain x[index] adds rows up one by one; here it is a second gather and a sum, in a fixed order.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.copies = copies
        return x.index_select(0, index // copies if copies > 1 else index)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (back,) = ctx.saved_tensors
        rows = upstream[0].index_select(0, back)
        copies = ctx.copies
        return rows.unflatten(0, (len(back) // copies, copies)).sum(1) if copies > 1 else rows, None, None, None


class _GroupedLinear(torch.autograd.Function):
    """W_e x for the rows x of each expert e; x (rows, d_in) sorted by expert, W (experts, d_out, d_in)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        return _product(x, weight, ends)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, ends = ctx.saved_tensors
        d_y = upstream[0].contiguous()
        needs_x, needs_weight, _ = ctx.needs_input_grad
        d_x = _product(d_y, weight.transpose(1, 2), ends) if needs_x else None
        d_weight = _weight_gradient(d_y, x, ends) if needs_weight else None
        return d_x, d_weight, None


# Two operators of our own around torch's: a compiler takes them as they are (the shape rule of torch's grouped matmul
# knows only bfloat16), and which implementation serves a device and a dtype is found out when they run.


@torch.library.custom_op(
    "scratchlm::grouped_product", mutates_args=(), schema="(Tensor x, Tensor w, Tensor e) -> Tensor"
)
def _product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x Wᵀ by groups of rows: x (rows, d_in), W (experts, d_out, d_in), ends (experts,) int32 → (rows, d_out)."""
    if len(x) and _aligned(x, weight.shape[1]) and _torch_has_grouped_mm(x.device.type, x.dtype):
        return torch._grouped_mm(x.contiguous(), weight.transpose(1, 2), offs=ends)
    slot, owner, size = _blocks(ends, len(x))
    return torch.bmm(_filled(x, slot, owner, size), weight[owner].transpose(1, 2)).flatten(0, 1)[slot]


@torch.library.custom_op(
    "scratchlm::grouped_outer", mutates_args=(), schema="(Tensor d, Tensor x, Tensor e) -> Tensor"
)
def _weight_gradient(d_y: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """d_yᵀ x by groups of rows: d_y (rows, d_out), x (rows, d_in) → (experts, d_out, d_in), 0 for an empty group."""
    if len(x) and _aligned(x, d_y.shape[1]) and _torch_has_grouped_mm(x.device.type, x.dtype):
        return torch._grouped_mm(d_y.t(), x.contiguous(), offs=ends)
    slot, owner, size = _blocks(ends, len(x))
    products = torch.bmm(_filled(d_y, slot, owner, size).transpose(1, 2), _filled(x, slot, owner, size))
    return products.new_zeros(len(ends), *products.shape[1:]).index_add_(0, owner, products)


@_product.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@_weight_gradient.register_fake
def _(d_y: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], d_y.shape[1], x.shape[1])


def _aligned(x: Tensor, width: int) -> bool:
    """torch's grouped matmul wants rows that start at multiples of 16 bytes."""
    return x.shape[1] * x.element_size() % 16 == 0 and width * x.element_size() % 16 == 0


@functools.cache
@torch.no_grad()
def _torch_has_grouped_mm(device: str, dtype: torch.dtype) -> bool:
    """Whether torch's grouped matmul gives the right answer here: it was a CUDA function of bfloat16 alone at first."""
    if not hasattr(torch, "_grouped_mm"):
        return False
    rows = torch.arange(16 * 16, device=device).remainder(5).view(16, 16).to(dtype)
    stack = torch.stack([rows, rows + 1])
    ends = torch.tensor([4, 16], dtype=torch.int32, device=device)
    try:
        product = torch._grouped_mm(rows, stack.transpose(1, 2), offs=ends)
        outer = torch._grouped_mm(rows.t(), rows, offs=ends)
    except (RuntimeError, NotImplementedError, TypeError):
        return False
    rows, stack = rows.double().cpu(), stack.double().cpu()  # autocast leaves float64 alone
    expected = torch.cat([rows[:4] @ stack[0].t(), rows[4:] @ stack[1].t()])
    expected_outer = torch.stack([part.t() @ part for part in (rows[:4], rows[4:])])
    close = functools.partial(torch.allclose, rtol=0.02)
    return close(product.double().cpu(), expected) and close(outer.double().cpu(), expected_outer)


def _blocks(ends: Tensor, rows: int) -> tuple[Tensor, Tensor, int]:
    """Where rows sorted by expert stand when each expert's are filled up to whole blocks, each block of one expert.

    ::

        rows        0 0 0 │ 1 │ 2 2 2 2                 experts; blocks of 2, at most rows // 2 + experts = 7 of them
        blocks      0 0   0 ·   1 ·   2 2   2 2   · ·   · ·

    A block is half an expert's even share, so there are at most three blocks per expert: at most 1.5 times the rows and
    three copies of the weights, whatever the load. The number of blocks does not depend on the load either.

    Returns:
        slot (rows,) of each row, owner (blocks,) of each block, and the rows of a block.
    """
    experts = len(ends)
    size = max(1, -(-rows // (2 * experts)))
    blocks = min(rows, rows // size + experts)
    ends = ends.long()
    starts = F.pad(ends[:-1], (1, 0))
    block_ends = ((ends - starts + size - 1) // size).cumsum(0)
    row = torch.arange(rows, device=ends.device)
    expert = torch.searchsorted(ends, row, right=True)
    slot = F.pad(block_ends[:-1], (1, 0))[expert] * size + row - starts[expert]
    owner = torch.searchsorted(block_ends, torch.arange(blocks, device=ends.device), right=True)
    return slot, owner.clamp(max=experts - 1), size


def _filled(x: Tensor, slot: Tensor, owner: Tensor, size: int) -> Tensor:
    """x (rows, width) laid out in blocks (blocks, size, width), 0 where a block has no row."""
    blocks = x.new_zeros(len(owner), size, x.shape[1])
    blocks.flatten(0, 1).index_copy_(0, slot, x)
    return blocks
