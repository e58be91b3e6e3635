"""Problems for FlashAttention: shapes, masks and options, with the formula's answer in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from scratchlm.kernels.attention import Scores, reference_attention
from scratchlm.kernels.visibility import Rule, Visibility
from scratchlm.model.mask import Causal, SlidingWindow


@dataclass(frozen=True)
class Case:
    """One problem, drawn from its seed; documents are given as their lengths, padding as slots at the left of each row."""

    queries: int = 37
    keys: int = 37
    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 16
    value_dim: int | None = None
    window: int | None = None
    documents: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    scale: float | None = None
    cap: float | None = None
    alibi: bool = False
    sinks: bool = False
    magnitude: float = 1.0
    seed: int = 0

    def __str__(self) -> str:
        plain = Case()
        changed = [f"{name}={entry}" for name, entry in vars(self).items() if entry != getattr(plain, name)]
        return " ".join(changed).replace(", ", "-") or "plain"

    def tensors(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
        """q, k, v and the upstream gradient; the same numbers, as `dtype` holds them, for every dtype."""
        generator = torch.Generator().manual_seed(self.seed)
        value_dim = self.head_dim if self.value_dim is None else self.value_dim
        shapes = (
            (self.heads, self.queries, self.head_dim),
            (self.kv_heads, self.keys, self.head_dim),
            (self.kv_heads, self.keys, value_dim),
            (self.heads, self.queries, value_dim),
        )
        drawn = [torch.randn(self.batch, *shape, generator=generator) * self.magnitude for shape in shapes]
        return tuple(x.to(device, dtype) for x in drawn)

    def visible(self, device: torch.device | str = "cpu") -> Visibility | None:
        rule: Rule = Causal() if self.window is None else SlidingWindow(self.window)
        documents = None
        if self.documents:
            numbers = torch.arange(len(self.documents)).repeat_interleave(torch.tensor(self.documents))
            documents = torch.stack([numbers.roll(row) for row in range(self.batch)]).to(device)
        if not self.padding and self.queries == self.keys:
            if self.window is None and documents is None:
                return None
            return Visibility.of_sequence(rule, self.keys, torch.device(device), documents=documents)
        places = torch.arange(self.keys, device=device)
        mask = None
        if self.padding:
            mask = places >= torch.tensor(self.padding, device=device)[:, None]
        if self.window is None and mask is None:
            return None
        own = places if self.queries == self.keys else places[self.keys - self.queries :]
        return Visibility(rule, own, places, documents, documents, mask)

    def scores(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Scores:
        slopes = 2.0 ** -torch.arange(1.0, self.heads + 1) if self.alibi else None
        sinks = torch.linspace(-1.0, 2.0, self.heads) if self.sinks else None
        return Scores(
            self.scale,
            self.cap,
            None if slopes is None else slopes.to(device, dtype),
            None if sinks is None else sinks.to(device, dtype).requires_grad_(),
        )


@dataclass(frozen=True)
class Answer:
    """An output and the gradients of q, k, v and the sinks."""

    out: Tensor
    gradients: tuple[Tensor, ...]

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.out, *self.gradients))


def answer(
    kernel: Callable[..., Tensor],
    case: Case,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    drawn_as: torch.dtype | None = None,
) -> Answer:
    """What `kernel` says of the problem, computed in `dtype` from inputs that `drawn_as` can hold (`dtype` itself by default)."""
    q, k, v, upstream = (x.to(dtype) for x in case.tensors(drawn_as or dtype, device))
    tensors = [x.requires_grad_() for x in (q, k, v)]
    scores = case.scores(torch.promote_types(dtype, torch.float32), device)
    out = kernel(*tensors, case.visible(device), scores)
    wanted = tensors if scores.sinks is None else [*tensors, scores.sinks]
    return Answer(out.detach(), torch.autograd.grad((out * upstream).sum(), wanted))


def exact(case: Case, dtype: torch.dtype) -> Answer:
    """The formula in float64, on the CPU, from the inputs as `dtype` holds them."""
    return answer(reference_attention, case, torch.float64, drawn_as=dtype)


def largest_error(found: Answer, right: Answer, *, cancelling: bool = False) -> float:
    """The largest difference in output and gradients, each relative to the largest entry of its tensor, 0.1 at least.

    Args:
        found, right: ours, and in float64.
        cancelling: where larger numbers cancel, relative to those: to one in a gradient that is zero as it stands (dP less its row's D, when a
            query reads one key), to √width / 4 in the sinks', which add up D = Σ dO O over the width and over all queries.
    """
    worst, width = 0.0, right.out.shape[-1]
    for ours, theirs in zip(found, right, strict=True):
        assert ours.shape == theirs.shape
        largest, least = float(theirs.abs().max()), 0.1  # a gradient that is zero has no size
        if cancelling and theirs.ndim == 1:
            least = max(1.0, width**0.5 / 4)
        elif cancelling and largest < 1e-9:
            least = 1.0
        size = max(largest, least)
        difference = (ours.double().cpu() - theirs).abs().max() / size
        worst = max(worst, float("inf") if difference.isnan() else float(difference))
    return worst
