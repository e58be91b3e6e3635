"""Which positions may be attended to: each mask is a rule over pairs of positions.

Rules with `shift_invariant` depend on the distance alone; the others ask for positions within the document.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from scratchlm.kernels.visibility import Rule, Span, Visibility
from scratchlm.model.config import ModelConfig

Queries = Int[Tensor, "... q"]
Keys = Int[Tensor, "... k"]
Allowed = Bool[Tensor, "... q k"]


@dataclass(frozen=True)
class Causal(Rule):
    """Every position sees itself and what came before it (Vaswani et al. 2017, section 3.2.3).

    ::

        keys →
    q   ■ □ □ □ □ □
    ↓   ■ ■ □ □ □ □
        ■ ■ ■ □ □ □
        ■ ■ ■ ■ □ □
        ■ ■ ■ ■ ■ □
        ■ ■ ■ ■ ■ ■
    """

    is_plain_causal: ClassVar[bool] = True
    shift_invariant: ClassVar[bool] = True

    @classmethod
    def of(cls, config: ModelConfig) -> Causal:
        return cls()

    def allowed(self, queries: Queries, keys: Keys, prefix: int | Tensor = 0) -> Allowed:
        return queries[..., :, None] >= keys[..., None, :]

    def spans(self, start: int, end: int, length: int, prefix: int = 0) -> list[Span]:
        return [(0, end)]


@dataclass(frozen=True)
class SlidingWindow(Rule):
    """Itself and the window − 1 positions before it (Longformer: Beltagy et al. 2020, arXiv 2004.05150; Mistral).

    ::

        keys →               window = 3; through L layers a position still hears of 2 L + 1
    q   ■ □ □ □ □ □
    ↓   ■ ■ □ □ □ □
        ■ ■ ■ □ □ □
        □ ■ ■ ■ □ □
        □ □ ■ ■ ■ □
        □ □ □ ■ ■ ■
    """

    window: int
    shift_invariant: ClassVar[bool] = True
    reads_all_in_reach: ClassVar[bool] = True

    @classmethod
    def of(cls, config: ModelConfig) -> SlidingWindow:
        return cls(config.window)

    @property
    def reach(self) -> int:
        return self.window

    def allowed(self, queries: Queries, keys: Keys, prefix: int | Tensor = 0) -> Allowed:
        back = queries[..., :, None] - keys[..., None, :]
        return (back >= 0) & (back < self.window)

    def spans(self, start: int, end: int, length: int, prefix: int = 0) -> list[Span]:
        return [(max(0, start - self.window + 1), end)]


@dataclass(frozen=True)
class Strided(Rule):
    """The last `stride` positions, and every stride-th before them (Sparse Transformer: Child et al. 2019, arXiv 1904.10509).

    ::

        keys →               stride = 2: both patterns of the paper's section 4.3 in one head
    q   ■ □ □ □ □ □
    ↓   ■ ■ □ □ □ □
        ■ ■ ■ □ □ □
        □ ■ ■ ■ □ □
        ■ □ ■ ■ ■ □
        □ ■ □ ■ ■ ■
    """

    stride: int
    shift_invariant: ClassVar[bool] = True

    @classmethod
    def of(cls, config: ModelConfig) -> Strided:
        return cls(config.stride)

    def allowed(self, queries: Queries, keys: Keys, prefix: int | Tensor = 0) -> Allowed:
        back = queries[..., :, None] - keys[..., None, :]
        return (back >= 0) & ((back < self.stride) | (back % self.stride == 0))

    def spans(self, start: int, end: int, length: int, prefix: int = 0) -> list[Span]:
        near = (max(0, start - self.stride + 1), end)
        return [near, *((max(0, start - back), end - back) for back in range(self.stride, end, self.stride))]

    def parts(self) -> tuple[Rule, ...]:
        """The two patterns apart: together every block of queries needs every column, each alone only few."""
        return SlidingWindow(self.stride), StridedFar(self.stride)


@dataclass(frozen=True)
class StridedFar(Rule):
    """The far part of :class:`Strided`: every stride-th position, from one stride back.

    In the order 0, s, 2s, … 1, s + 1, … the positions that read each other stand side by side.
    """

    stride: int
    shift_invariant: ClassVar[bool] = True

    def allowed(self, queries: Queries, keys: Keys, prefix: int | Tensor = 0) -> Allowed:
        back = queries[..., :, None] - keys[..., None, :]
        return (back >= self.stride) & (back % self.stride == 0)

    def spans(self, start: int, end: int, length: int, prefix: int = 0) -> list[Span]:
        """Of each remainder r, whose positions stand in one stretch, the ones before the block's last of that remainder."""
        found, begin = [], 0
        for remainder in range(min(self.stride, length)):
            stop = begin + -(-(length - remainder) // self.stride)
            if begin < end and stop > start:
                found.append((begin, min(end, stop) - 1))
            begin = stop
        return found

    def order(self, length: int) -> Int[Tensor, " length"]:
        places = torch.arange(length, device="cpu")
        return torch.argsort((places % self.stride) * length + places)


@dataclass(frozen=True)
class Fixed(Rule):
    """Its own stretch, and the last `summary` positions of every earlier one (Child et al. 2019, section 4.3, "fixed").

    ::

        keys →               stride = 3, summary = 1: position 2 tells all later stretches about the first
    q   ■ □ □ □ □ □
    ↓   ■ ■ □ □ □ □
        ■ ■ ■ □ □ □
        □ □ ■ ■ □ □
        □ □ ■ ■ ■ □
        □ □ ■ ■ ■ ■
    """

    stride: int
    summary: int

    @classmethod
    def of(cls, config: ModelConfig) -> Fixed:
        return cls(config.stride, config.stride_summary)

    def allowed(self, queries: Queries, keys: Keys, prefix: int | Tensor = 0) -> Allowed:
        q, k = queries[..., :, None], keys[..., None, :]
        same_stretch = q // self.stride == k // self.stride
        return (q >= k) & (same_stretch | (k % self.stride >= self.stride - self.summary))

    def spans(self, start: int, end: int, length: int, prefix: int = 0) -> list[Span]:
        own = start // self.stride * self.stride
        ends = range(self.stride, own + 1, self.stride)  # of the stretches before
        return [(own, end), *((stop - self.summary, stop) for stop in ends)]


@dataclass(frozen=True)
class BlockSparse(Rule):
    """Its own block, the ones just before it, and the first positions of all (BigBird without its random blocks: Zaheer et
    al. 2020, arXiv 2007.14062).

    ::

        keys →               mask_block = 2, mask_local_blocks = 1, global_tokens = 1
    q   ■ □ □ □ □ □
    ↓   ■ ■ □ □ □ □
        ■ □ ■ □ □ □
        ■ □ ■ ■ □ □
        ■ □ □ □ ■ □
        ■ □ □ □ ■ ■
    """

    block: int
    local_blocks: int
    global_tokens: int

    @classmethod
    def of(cls, config: ModelConfig) -> BlockSparse:
        return cls(config.mask_block, config.mask_local_blocks, config.global_tokens)

    def allowed(self, queries: Queries, keys: Keys, prefix: int | Tensor = 0) -> Allowed:
        q, k = queries[..., :, None], keys[..., None, :]
        near = q // self.block - k // self.block < self.local_blocks
        return (q >= k) & (near | (k < self.global_tokens))

    def spans(self, start: int, end: int, length: int, prefix: int = 0) -> list[Span]:
        first = (start // self.block - self.local_blocks + 1) * self.block
        return [(max(0, first), end), (0, min(self.global_tokens, end))]


@dataclass(frozen=True)
class PrefixLM(Rule):
    """The prefix sees all of itself, the rest is causal (Liu et al. 2018, arXiv 1801.10198; T5, arXiv 1910.10683, figure 4).

    ::

        keys →               prefix = 3: the prompt in generation, `prefix_length` in training, where the prefix's own
    q   ■ ■ ■ □ □ □          tokens are not asked for (they have seen the answer)
    ↓   ■ ■ ■ □ □ □
        ■ ■ ■ □ □ □
        ■ ■ ■ ■ □ □
        ■ ■ ■ ■ ■ □
        ■ ■ ■ ■ ■ ■
    """

    @classmethod
    def of(cls, config: ModelConfig) -> PrefixLM:
        return cls()

    def allowed(self, queries: Queries, keys: Keys, prefix: int | Tensor = 0) -> Allowed:
        q, k = queries[..., :, None], keys[..., None, :]
        return (q >= k) | (k < prefix)

    def spans(self, start: int, end: int, length: int, prefix: int = 0) -> list[Span]:
        return [(0, max(end, min(prefix, length)) if start < prefix else end)]


def visibility(
    rule: Rule,
    length: int,
    *,
    positions: Int[Tensor, "... length"] | None = None,
    documents: Int[Tensor, "... length"] | None = None,
    past: int = 0,
    padding: Int[Tensor, " batch"] | None = None,
    key_mask: Bool[Tensor, "... total"] | None = None,
    prefix: int | Tensor = 0,
    distances: bool = False,
    device: torch.device | None = None,
) -> Visibility | None:
    """Who may read whom in a forward pass, or None where it is the plain causal triangle the kernels know themselves.

    Args:
        rule: the layer's mask.
        length: number of new tokens (queries).
        positions: position of each new token; None: they count on from `past`. Only rules that are not shift-invariant ask.
        documents: number of the document each token belongs to; attention stays within a document.
        past: tokens already in the cache, before the new ones.
        padding: padding slots at the left of each row of the cache.
        key_mask: False for keys that are padding, shape (batch, past + length).
        prefix: how many first positions see each other, if the rule asks: a number, or one per row.
        distances: the kernel needs distances (ALiBi), also for the plain triangle.
        device: where to build it.
    """
    undisturbed = documents is None and key_mask is None and not distances
    if rule.is_plain_causal and undisturbed and (past == 0 or length == 1):
        return None  # also the newest token alone, which reads all there is
    by_place = rule.shift_invariant or positions is None
    if by_place and past == 0 and key_mask is None and not isinstance(prefix, Tensor):
        return Visibility.of_sequence(rule, length, device, documents=documents, prefix=prefix)
    keys = torch.arange(past + length, device=device)
    if not by_place:
        if past or padding is not None:
            shift = 0 if padding is None else padding.to(keys.device)[:, None]
            keys = (keys - shift).clamp(min=0)
        else:
            assert positions is not None
            keys = positions
    if isinstance(prefix, Tensor):
        prefix = prefix.reshape(*prefix.shape, 1, 1)
    return Visibility(
        rule,
        keys[..., past:],
        keys,
        query_documents=documents,
        key_documents=documents,
        key_mask=key_mask,
        prefix=prefix,
    )


def window_slots(reach: int) -> int:
    """Slots that a cache keeps for a layer that reads `reach` positions: what the next token still reads, and room behind it for
    a quarter more, so that most steps move nothing."""
    return reach - 1 + reach // 4 + 16
