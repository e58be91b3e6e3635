"""The kernels of flash attention as operations of torch, Triton's and those in C++ for CPUs: what they can do, shapes without computing, FLOPs, gradients.

As one operation each, forward and backward, they pass through torch.compile whole, run on tensors without memory, and are
counted by torch's counter of FLOPs. Nothing here needs Triton before a kernel is really run, and where it cannot run (no Triton, no C
compiler for its launcher, an old GPU) the operations do the same tile by tile in torch and say so once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from scratchlm.kernels import flash_attention_cpp
from scratchlm.kernels.attention import Keys, Mixed, Queries, Scores, Values, heads_inside
from scratchlm.kernels.cpp_here import is_transformed, is_watched
from scratchlm.kernels.triton_here import constant_in_graphs, is_offered, runs_on, takes, warn_once
from scratchlm.kernels.visibility import BLOCK, Rule, Span, Visibility

if TYPE_CHECKING:
    from scratchlm.kernels.flash_attention import Sheet

WIDEST = 256
"""Widest head that a kernel holds in registers."""


@constant_in_graphs
def say_once(what: str) -> None:
    """A warning, the first time in a process; also while a graph is being traced."""
    warn_once(what)


TILED = "attention_kernel = flash is computed tile by tile in torch"
IN_BLOCKS = "attention under a mask or a soft cap is computed by torch"


def supports(visible: Visibility | None, scores: Scores, q: Queries, k: Keys, v: Values) -> str | None:
    """Why the Triton kernels cannot compute this, or None: they can.

    Of the masks they know the causal triangle and windows, each with documents and padding keys. That the positions of these count
    up by one, the last query beside the last key, is taken for granted, as the model's visibility makes them.
    """
    if scores.dropout:
        return "weights are dropped out"
    if len({q.dtype, k.dtype, v.dtype}) > 1 or q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the dtypes are {q.dtype}, {k.dtype}, {v.dtype}: one of fp16, bf16 and fp32 is needed"
    if max(q.shape[-1], v.shape[-1]) > WIDEST:
        return f"a head is wider than {WIDEST}"
    if 0 in q.shape or 0 in k.shape or 0 in v.shape:
        return "there is nothing to compute"
    if scores.scale_of(q.shape[-1]) <= 0:
        return "the scale is not positive"
    if scores.slopes is not None and scores.slopes.requires_grad:
        return "ALiBi's slopes are learnt"
    return None if visible is None else _unknown_mask(visible, q, k)


def _unknown_mask(visible: Visibility, q: Tensor, k: Tensor) -> str | None:
    rule = visible.rule
    if not (rule.is_plain_causal or rule.reads_all_in_reach):
        return f"the mask is {type(rule).__name__}"
    if visible.queries.ndim > 1 or visible.keys.ndim > 1:
        return "positions differ between the rows of the batch"
    if visible.queries.shape[-1] != q.shape[-2] or visible.keys.shape[-1] != k.shape[-2]:
        return "the mask is of another length"
    documents = visible.query_documents
    if documents is not None and (documents is not visible.key_documents or q.shape[-2] != k.shape[-2]):
        return "queries and keys have documents of their own"
    for of_keys in (documents, visible.key_mask):
        if of_keys is not None and of_keys.ndim > 1 and (of_keys.ndim, of_keys.shape[0]) != (2, q.shape[0]):
            return "documents or padding are not (batch, keys)"
        if of_keys is not None and of_keys.ndim > 1 and q.ndim != 4:
            return "the batch has more than one dimension"
    return None


def is_the_way(q: Queries, k: Keys, v: Values, visible: Visibility | None, scores: Scores) -> bool:
    """Whether whole sequences on CUDA had better go through the Triton kernels: they can, and the attention is not the plain causal one, for which torch has a kernel.

    For a mask, a soft cap, slopes or sinks torch has products and softmax of blocks, or a mask of queries × keys: more memory, and many launches.
    """
    if visible is None and scores.soft_cap is None and scores.slopes is None and scores.sinks is None:
        return False
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.get_autocast_dtype(q.device.type):
        return False
    if (
        not torch.compiler.is_compiling() and is_transformed()
    ):  # the operation can neither be mapped over nor differentiated forwards
        return False
    return _is_offered(q) and q.ndim == 4 and supports(visible, scores, q, k, v) is None


def _is_offered(q: Tensor) -> bool:
    return q.device.type == "cuda" and is_offered(q, IN_BLOCKS)


def document_reach(documents: Int[Tensor, "... length"]) -> tuple[Tensor, Tensor]:
    """The first and the last place of each token's document, int32: beyond them no tile has to look."""
    ordered, places = documents.sort(dim=-1, stable=True)
    first = torch.searchsorted(ordered, documents)
    last = torch.searchsorted(ordered, documents, right=True) - 1
    return places.gather(-1, first).int(), places.gather(-1, last).int()


def fused_attention(q: Queries, k: Keys, v: Values, visible: Visibility | None, scores: Scores) -> Mixed:
    """Attention by the kernels, for what :func:`supports`, or on a CPU `flash_attention_cpp`, has no objection to; shapes as in `flash_attention`."""
    window = None if visible is None or visible.rule.is_plain_causal else visible.rule.reach
    if not is_watched(q) and flash_attention_cpp.computes(q, k, v, visible, scores):
        return flash_attention_cpp.attention(q, k, v, scores.scale_of(q.shape[-1]), window)
    lead = q.shape[:-3]
    if q.ndim != 4:
        q, k, v = (x.reshape(-1, *x.shape[-3:]) for x in (q, k, v))
    documents = first = last = key_mask = None
    if visible is not None:
        key_mask = visible.key_mask
        if visible.query_documents is not None:
            documents = ids = visible.query_documents.contiguous()
            first, last = visible.kept("reach of documents", lambda: document_reach(ids))
    given = scores.slopes, scores.sinks, documents, first, last, key_mask
    out: Tensor = _attention(q, k, v, *given, scores.scale_of(q.shape[-1]), scores.soft_cap, window)[0]
    return out if len(lead) == 1 else out.reshape(*lead, *out.shape[1:])


def _in_cpp(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> bool:
    """Whether the kernels for CPUs compute this: they know none of the options."""
    if takes(q.device) or any(option is not None for option in options):
        return False
    return flash_attention_cpp.misfit(q, k, v) is None and flash_attention_cpp.runs(q.dtype)


@torch.library.custom_op("scratchlm::flash_attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None,
    sinks: Tensor | None,
    documents: Tensor | None,
    first: Tensor | None,
    last: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    soft_cap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """The output and, per query, L in units of log 2, fp32, (batch, heads, queries); +inf where nothing is read."""
    if _in_cpp(q, k, v, slopes, sinks, documents, key_mask, soft_cap):
        return flash_attention_cpp.forward(q, k, v, scale, window)
    if not runs_on(q.device, TILED):
        return _tiled_forward(q, k, v, slopes, sinks, documents, key_mask, scale, soft_cap, window)
    from scratchlm.kernels.flash_attention_triton import forward

    return forward(q, k, v, slopes, sinks, documents, first, key_mask, scale, soft_cap, window)


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    out = heads_inside(q, q.shape[1], q.shape[2], v.shape[-1])
    return out, q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("scratchlm::flash_attention_backward", mutates_args=())
def _backward(
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
    """The gradients of q, k and v, and D = rowsum(dO ∘ O), fp32, (batch, heads, queries)."""
    if _in_cpp(q, k, v, slopes, documents, key_mask, soft_cap):
        return flash_attention_cpp.backward(d_out, q, k, v, out, log_sums, scale, window)
    if not runs_on(q.device, TILED):
        return _tiled_backward(d_out, q, k, v, out, log_sums, slopes, documents, key_mask, scale, soft_cap, window)
    from scratchlm.kernels.flash_attention_triton_backward import backward

    masks = documents, first, last, key_mask
    return backward(d_out, q, k, v, out, log_sums, slopes, *masks, scale, soft_cap, window)


@_backward.register_fake
def _(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, *_: Any) -> Any:
    gradients = [heads_inside(q, x.shape[1], x.shape[2], x.shape[3]) for x in (q, k, v)]
    return *gradients, torch.empty_like(log_sums)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, scale, soft_cap, window = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.numbers = scale, soft_cap, window


def _gradients(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    from scratchlm.kernels.flash_attention import gradient_of_sinks

    q, k, v, slopes, sinks, documents, first, last, key_mask, out, log_sums = ctx.saved_tensors
    masks = documents, first, last, key_mask
    d_q, d_k, d_v, delta = _backward(d_out, q, k, v, out, log_sums, slopes, *masks, *ctx.numbers)
    d_sinks = None
    if sinks is not None:
        d_sinks = gradient_of_sinks(sinks, (log_sums * math.log(2)).unsqueeze(-1), delta.unsqueeze(-1))
    return d_q, d_k, d_v, None, d_sinks, *([None] * 7)


_attention.register_autograd(_gradients, setup_context=_setup)


FORWARD, BACKWARD = (
    torch.ops.scratchlm.flash_attention.default,
    torch.ops.scratchlm.flash_attention_backward.default,
)


def workspace(operation: Any, arguments: Sequence[Any]) -> int:
    """Bytes that a call takes besides its results, while it runs: those of the kernels for CPUs, on all threads; nothing is known of others.

    Args:
        operation: one of torch; any but :data:`FORWARD` and :data:`BACKWARD` takes none.
        arguments: of the call, in the schema's order.
    """
    if operation is FORWARD:
        q, k, v, slopes, sinks, documents, _, _, key_mask, _, soft_cap, _ = arguments
        options = [slopes, sinks, documents, key_mask, soft_cap]
    elif operation is BACKWARD:
        _, q, k, v, _, _, slopes, documents, _, _, key_mask, _, soft_cap, _ = arguments
        options = [slopes, documents, key_mask, soft_cap]
    else:
        return 0
    if not _in_cpp(q, k, v, *options):
        return 0
    each = flash_attention_cpp.workspace(k.shape[-2], k.shape[-1], v.shape[-1], back=operation is BACKWARD)
    return each * torch.get_num_threads()


# --- the same by tiles in torch -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Last(Rule):
    """The last `window` positions, or all of them."""

    window: int | None
    reads_all_in_reach: ClassVar[bool] = True

    def allowed(self, queries: Tensor, keys: Tensor, prefix: int | Tensor = 0) -> Tensor:
        away = queries[..., :, None] - keys[..., None, :]
        return away >= 0 if self.window is None else (away >= 0) & (away < self.window)

    def columns(self, queries: int, keys: int) -> Iterable[Span]:
        """What each block of queries may read, the last query beside the last key."""
        past = keys - queries
        for start in range(0, queries, BLOCK):
            end = min(start + BLOCK, queries) + past
            yield (0 if self.window is None else max(0, start + past - self.window + 1)), max(0, end)


def _sheet(
    q: Tensor,
    k: Tensor,
    documents: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    cap: float | None,
    window: int | None,
) -> Sheet:
    from scratchlm.kernels.flash_attention import Sheet

    queries, keys = q.shape[-2], k.shape[-2]
    visible = None
    if window is not None or documents is not None or key_mask is not None:
        places = torch.arange(keys, device=q.device)
        own = torch.arange(keys - queries, keys, device=q.device)
        rule = _Last(window)
        columns = list(rule.columns(queries, keys))
        visible = Visibility(rule, own, places, documents, documents, key_mask, columns=columns)
    return Sheet.of(q, k, visible, scale, cap)


def _tiled_forward(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, sinks: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    from scratchlm.kernels.flash_attention import walk_forward

    out, log_sums = walk_forward(q, k, v, slopes, sinks, _sheet(q, k, *rest))
    return _laid_out(out), log_sums.squeeze(-1) * math.log2(math.e)


def _tiled_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sums: Tensor,
    slopes: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from scratchlm.kernels.flash_attention import walk_backward

    sums = log_sums.unsqueeze(-1) * math.log(2)
    d_q, d_k, d_v, _, delta = walk_backward(d_out, q, k, v, slopes, out, sums, _sheet(q, k, *rest))
    return _laid_out(d_q), _laid_out(d_k), _laid_out(d_v), delta.squeeze(-1)


def _laid_out(x: Tensor) -> Tensor:
    """A copy as :func:`heads_inside` lays it out, which is what a compiled graph expects."""
    return heads_inside(x, *x.shape[1:]).copy_(x)


# --- FLOPs ----------------------------------------------------------------------------------------------------------------


def _pairs(q: Sequence[int], k: Sequence[int], window: int | None) -> int:
    """Scores (query, key): all of them for the plain triangle, as is the convention; under a window, blocks of 128 queries."""
    queries, keys = q[-2], k[-2]
    if window is None:
        return queries * keys
    starts, past = range(0, queries, BLOCK), keys - queries
    ends = [min(start + BLOCK, queries) for start in starts]
    widths = [
        max(0, end + past - max(0, start + past - window + 1)) for start, end in zip(starts, ends, strict=True)
    ]
    return sum((end - start) * width for start, end, width in zip(starts, ends, widths, strict=True))


@register_flop_formula(torch.ops.scratchlm.flash_attention)
def flash_flops(q: Sequence[int], k: Sequence[int], v: Sequence[int], *rest: Any, **_: Any) -> int:
    """Scores and mixture."""
    return 2 * q[0] * q[1] * _pairs(q, k, rest[-1]) * (q[-1] + v[-1])


@register_flop_formula(torch.ops.scratchlm.flash_attention_backward)
def flash_backward_flops(
    _: Sequence[int], q: Sequence[int], k: Sequence[int], v: Sequence[int], *rest: Any, **__: Any
) -> int:
    """Scores again, and four products for the gradients of values, weights, queries and keys (what is computed twice counts once)."""
    return 2 * q[0] * q[1] * _pairs(q, k, rest[-1]) * (3 * q[-1] + 2 * v[-1])
