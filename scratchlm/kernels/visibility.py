"""Who may read whom: a rule over pairs of positions, and which columns each block of queries has to look at.

A dense (queries × keys) matrix answers every question and costs length². A rule such as "the last 128 positions" needs far
less: per block of queries only the columns that some query of the block may read. `Visibility` offers both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

BLOCK = 128
"""Queries per block of the blocked kernels."""

Span = tuple[int, int]
Result = TypeVar("Result")


class Rule:
    """A mask as a rule over pairs of positions. It must be hashable: plans are kept per rule.

    Attributes:
        is_plain_causal: True only for the causal triangle, which kernels know without any matrix.
        shift_invariant: the answer depends on the distance alone, so that places in a row do as well as positions.
        reads_all_in_reach: a query reads each of the last `reach` positions.
    """

    is_plain_causal: ClassVar[bool] = False
    shift_invariant: ClassVar[bool] = False
    reads_all_in_reach: ClassVar[bool] = False

    def allowed(
        self, queries: Int[Tensor, "... q"], keys: Int[Tensor, "... k"], prefix: int | Tensor = 0
    ) -> Bool[Tensor, "... q k"]:
        """True where the query at one position may read the key at another; `prefix` as in :class:`Visibility`."""
        raise NotImplementedError

    @property
    def reach(self) -> int | None:
        """How many positions a query reads at most, itself included and counted back from it; None: no such number."""
        return None

    def parts(self) -> tuple[Rule, ...]:
        """Rules that share no pair and together are this one, where each alone needs fewer columns; empty: no such parts."""
        return ()

    def spans(self, start: int, end: int, length: int, prefix: int = 0) -> Iterable[Span]:
        """The columns that the queries [start, end) of a sequence may read, places in the rule's order.

        Asks about every pair, which is right for any rule and takes time that grows with the square of the length; a rule
        that knows its columns says them.
        """
        return spans_by_asking(self, start, end, length, prefix)

    def order(self, length: int) -> Int[Tensor, " length"] | None:
        """An order of the positions in which the rule's columns hang together; None: as they are."""
        return None


def spans_by_asking(rule: Rule, start: int, end: int, length: int, prefix: int) -> tuple[Span, ...]:
    """The columns that the queries [start, end) may read, by asking the rule about every pair; places in the rule's order."""
    order = rule.order(length)
    positions = torch.arange(length, device="cpu") if order is None else order
    needed = rule.allowed(positions[start:end], positions, prefix).any(dim=0).int()
    edges = torch.diff(needed, prepend=needed.new_zeros(1), append=needed.new_zeros(1))
    starts, ends = (edges == 1).nonzero().flatten().tolist(), (edges == -1).nonzero().flatten().tolist()
    return tuple(zip(starts, ends, strict=True))


@functools.lru_cache(maxsize=256)
def columns_per_block(rule: Rule, length: int, block: int = BLOCK, prefix: int = 0) -> tuple[tuple[Span, ...], ...]:
    """For each block of queries the columns that any of them may read, as spans [start, end) in the rule's order."""
    starts = range(0, length, block)
    return tuple(_joined(rule.spans(start, min(start + block, length), length, prefix)) for start in starts)


def _joined(spans: Iterable[Span]) -> tuple[Span, ...]:
    """The same columns in order, with spans that touch or overlap made one and empty ones left out."""
    joined: list[Span] = []
    for start, end in sorted(span for span in spans if span[0] < span[1]):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return tuple(joined)


def _in_one(rule: Rule, length: int, block: int, prefix: int) -> int:
    """Scores computed by the rule's own plan, undivided."""
    plan = columns_per_block(rule, length, block, prefix)
    rows = [min(block, length - start) for start in range(0, length, block)]
    return sum(count * sum(end - start for start, end in spans) for count, spans in zip(rows, plan, strict=True))


@functools.lru_cache(maxsize=256)
def parts_worth_taking(rule: Rule, length: int, block: int = BLOCK, prefix: int = 0) -> tuple[Rule, ...]:
    """The rule's parts where together they compute fewer scores than the rule undivided; else none."""
    parts = rule.parts()
    together = sum(_in_one(part, length, block, prefix) for part in parts)
    return parts if parts and together < _in_one(rule, length, block, prefix) else ()


def scores_computed(rule: Rule, length: int, block: int = BLOCK, prefix: int = 0) -> int:
    """How many scores (query, key) a blocked kernel computes in a sequence of `length`."""
    plans = parts_worth_taking(rule, length, block, prefix) or (rule,)
    return sum(_in_one(one, length, block, prefix) for one in plans)


@dataclass(frozen=True)
class Visibility:
    """Who may read whom in one forward pass.

    Attributes:
        rule: the mask's rule.
        queries, keys: positions, (…, q) and (…, k).
        query_documents, key_documents: document numbers, (…, q) and (…, k); reading stays within one. None: one document.
        key_mask: False for keys that are padding, (…, k).
        prefix: how many first positions see each other, for rules that ask: a number, or one per row (…, 1, 1).
        columns: for each block of `block` queries the columns worth looking at, a span or int64 indices; None: all.
        block: queries per block.
        parts: the same in parts that share no pair, each with a plan of its own; empty: in one.
        order: the order in which this part takes the positions, (length,); None: as they are.
        memo: what kernels computed from it for one layer and other layers ask for again.
    """

    rule: Rule
    queries: Int[Tensor, "... q"]
    keys: Int[Tensor, "... k"]
    query_documents: Int[Tensor, "... q"] | None = None
    key_documents: Int[Tensor, "... k"] | None = None
    key_mask: Bool[Tensor, "... k"] | None = None
    prefix: int | Tensor = 0
    columns: Sequence[Span | Tensor] | None = None
    block: int = BLOCK
    parts: tuple[Visibility, ...] = ()
    order: Int[Tensor, " length"] | None = None
    memo: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of_sequence(
        cls,
        rule: Rule,
        length: int,
        device: torch.device | None = None,
        *,
        documents: Int[Tensor, "... length"] | None = None,
        block: int = BLOCK,
        prefix: int = 0,
    ) -> Visibility:
        """The whole of one sequence at positions 0 … length − 1, with its plan of columns."""
        order = rule.order(length)
        if order is None:
            positions = torch.arange(length, device=device)
        else:
            positions = order = order.to(device)
            documents = None if documents is None else documents[..., order]
        parts = parts_worth_taking(rule, length, block, prefix)
        return cls(
            rule,
            positions,
            positions,
            query_documents=documents,
            key_documents=documents,
            prefix=prefix,
            columns=plan_of(rule, length, device, block, prefix) if not parts else None,
            block=block,
            parts=tuple(
                cls.of_sequence(part, length, device, documents=documents, block=block, prefix=prefix)
                for part in parts
            ),
            order=order,
        )

    @property
    def planned(self) -> bool:
        """Whether it is known which columns are worth looking at."""
        return self.columns is not None or bool(self.parts)

    def tile(self, rows: slice, columns: Span | Tensor) -> Bool[Tensor, "... q k"]:
        """The part of the matrix for these rows and columns; with a heads dimension of 1 if rows of a batch differ."""
        queries, keys = self.queries[..., rows], take(self.keys, columns, -1)
        allowed = self.rule.allowed(queries, keys, self.prefix)
        if self.query_documents is not None and self.key_documents is not None:
            documents = self.query_documents[..., rows, None], take(self.key_documents, columns, -1)[..., None, :]
            allowed = allowed & (documents[0] == documents[1])
        if self.key_mask is not None:
            allowed = allowed & take(self.key_mask, columns, -1)[..., None, :]
        return allowed.unsqueeze(-3) if allowed.ndim > 2 else allowed

    def distance(self, rows: slice, columns: Span | Tensor) -> Int[Tensor, "... q k"]:
        """How far each key is from each query, in positions; with a heads dimension of 1 if rows of a batch differ."""
        queries, keys = self.queries[..., rows], take(self.keys, columns, -1)
        away = (queries[..., :, None] - keys[..., None, :]).abs()
        return away.unsqueeze(-3) if away.ndim > 2 else away

    def last(self, columns: int) -> Visibility:
        """The same for the last `columns` keys alone, as a cache of a window holds them."""
        if columns == self.keys.shape[-1]:
            return self
        cut = slice(self.keys.shape[-1] - columns, None)
        documents = None if self.key_documents is None else self.key_documents[..., cut]
        mask = None if self.key_mask is None else self.key_mask[..., cut]
        return replace(self, keys=self.keys[..., cut], key_documents=documents, key_mask=mask, memo={})

    @property
    def is_triangle(self) -> bool:
        """Whether it is the plain causal triangle after all: nothing lies beyond a window's reach."""
        queries, keys = self.queries.shape[-1], self.keys.shape[-1]
        plain = self.rule.reads_all_in_reach and self.rule.reach is not None and keys <= self.rule.reach
        undisturbed = self.key_mask is None and self.query_documents is None
        return plain and undisturbed and self.queries.ndim == 1 and (queries == keys or queries == 1)

    @property
    def everything(self) -> tuple[slice, Span]:
        """All rows and all columns."""
        return slice(0, self.queries.shape[-1]), (0, self.keys.shape[-1])

    def matrix(self) -> Bool[Tensor, "... q k"]:
        """The dense mask."""
        return self.kept("matrix", lambda: self.tile(*self.everything))

    def kept(self, key: Any, compute: Callable[[], Result]) -> Result:
        """The result of `compute`, which is called once per key. Without gradient: it serves several passes backward."""
        if torch.compiler.is_compiling():
            return compute()
        if key not in self.memo:
            with torch.no_grad():
                self.memo[key] = compute()
        return self.memo[key]


@functools.lru_cache(maxsize=64)
def plan_of(
    rule: Rule, length: int, device: torch.device | None, block: int = BLOCK, prefix: int = 0
) -> tuple[Span | Tensor, ...]:
    """:func:`columns_per_block` for a kernel: one span where the columns hang together, indices where they do not."""
    plan: list[Span | Tensor] = []
    with torch.inference_mode(False):  # kept for later passes, which may want gradients
        for spans in columns_per_block(rule, length, block, prefix):
            if len(spans) <= 1:
                plan.append(spans[0] if spans else (0, 0))
            else:
                plan.append(torch.cat([torch.arange(start, end, device=device) for start, end in spans]))
    return tuple(plan)


def take(x: Tensor, columns: Span | Tensor, dim: int) -> Tensor:
    """These columns of `x` along `dim`: a view for a span, a copy for indices."""
    if isinstance(columns, Tensor):
        return x.index_select(dim, columns)
    start, end = columns
    return x.narrow(dim, start, end - start)
