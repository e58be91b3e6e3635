"""Synthetic tasks, each of which one mechanism solves and nothing else does.

A task makes batches of ids and targets from a ``torch.Generator``. The target at a position is what the logits there
are asked for, IGNORE_INDEX where nothing is asked. Letters are symbols, ``|`` is the separator, targets stand below::

    copying              d b d a | d b d         recall     k₁ v₁ k₂ v₂ k₃ v₃ | · k₃ · · k₁
                         - - - - d b d a                    -  -  -  -  -  -  - - v₃ - - v₁

    induction            a b c d e | c a d b     modular addition         a b |
                         - - - - - - d b e c                              - - (a + b) mod p
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from scratchlm.errors import UserError
from scratchlm.kernels.cross_entropy import IGNORE_INDEX


class ProbeBatch(NamedTuple):
    """Sequences and what is asked of them, two int64 tensors (rows, length)."""

    ids: Int[Tensor, "rows length"]
    targets: Int[Tensor, "rows length"]


@dataclass(frozen=True)
class Task(ABC):
    """What every task has. Tasks are frozen dataclasses: equal parameters are the same task."""

    name: ClassVar[str]

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids."""

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens of a sequence; in training the longest."""

    @property
    @abstractmethod
    def chance(self) -> float:
        """Accuracy of guessing among all possible answers, without looking at the sequence."""

    @property
    @abstractmethod
    def without_mechanism(self) -> float:
        """Accuracy that can be had from all of the sequence but what the task is about: a score counts from here."""

    @abstractmethod
    def batch(self, rows: int, generator: torch.Generator, *, held_out: bool = False) -> ProbeBatch:
        """`rows` sequences, on the CPU.

        Args:
            rows: how many.
            generator: where all randomness comes from.
            held_out: draw from what is kept for evaluation, at the task's full length.
        """

    @abstractmethod
    def longer(self, times: int) -> Task:
        """The same task in sequences `times` as long, over the same vocabulary.

        Raises:
            UserError: the task has no such length.
        """


def _require(holds: bool, task: Task, what: str) -> None:
    if not holds:
        raise UserError(f"probe {task.name}: {what}; got {task}")


def _permutations(rows: int, size: int, generator: torch.Generator) -> Int[Tensor, "rows size"]:
    """A random order of 0 … size − 1 in every row."""
    return torch.rand(rows, size, generator=generator, dtype=torch.float64).argsort(dim=-1)


@functools.cache
def _expected_largest(items: int, kinds: int) -> tuple[float, ...]:
    """Mean count of the most frequent kind among 0 … `items` draws, each uniform over `kinds`.

    With F_k(i, m) the probability that i draws over k kinds hold none more than m times, and j of them of the k-th:
    F_k(i, m) = Σ_{j ≤ m} Binomial(j; i, 1/k) F_{k−1}(i − j, m). The mean is Σ_m (1 − F(i, m)).
    """
    counts = np.arange(items + 1)
    log_factorial = np.array([math.lgamma(count + 1) for count in counts])
    within = (counts[:, None] <= counts).astype(np.float64)  # (draws, most), of one kind
    for k in range(2, kinds + 1):
        wider = np.zeros_like(within)
        for j in range(items + 1):
            others = counts[: items + 1 - j]
            log_binomial = log_factorial[j:] - log_factorial[j] - log_factorial[others]
            share = np.exp(log_binomial - j * math.log(k) + others * math.log1p(-1 / k))
            wider[j:, j:] += share[:, None] * within[others, j:]
        within = wider
    return tuple((1 - within).clip(0).sum(axis=1).tolist())


@dataclass(frozen=True)
class Copying(Task):
    """Random symbols, a separator, the same symbols again: every answer stands exactly `count` positions back.

    With `shortest` below `count` the number of symbols is another in every training batch, so that no fixed distance
    solves it and longer sequences can be asked for at all: one has to find one's place by what came before
    (Jelassi et al. 2024, arXiv 2402.01032).

    Args:
        count: symbols to copy, at least 2; the sequence has twice as many tokens.
        symbols: different symbols, at least 2.
        shortest: fewest symbols in a training batch; None: always `count`.

    Raises:
        UserError: a parameter out of its range.
    """

    name: ClassVar[str] = "copying"
    count: int = 16
    symbols: int = 16
    shortest: int | None = None

    def __post_init__(self) -> None:
        _require(self.count >= 2, self, "count must be at least 2")
        _require(self.symbols >= 2, self, "symbols must be at least 2")
        _require(self.shortest is None or 2 <= self.shortest <= self.count, self, "shortest must be 2 … count")

    @property
    def vocab_size(self) -> int:
        return self.symbols + 1

    @property
    def length(self) -> int:
        return 2 * self.count

    @property
    def chance(self) -> float:
        return 1 / self.symbols

    @property
    def without_mechanism(self) -> float:
        """Knowing which symbols are still to come, but not their order: always naming the most frequent of them."""
        largest = _expected_largest(self.count, self.symbols)
        return sum(largest[left] / left for left in range(1, self.count + 1)) / self.count

    def batch(self, rows: int, generator: torch.Generator, *, held_out: bool = False) -> ProbeBatch:
        count = self.count
        if self.shortest is not None and not held_out:
            count = int(torch.randint(self.shortest, self.count + 1, (), generator=generator))
        text = torch.randint(self.symbols, (rows, count), generator=generator)
        separator = torch.full((rows, 1), self.symbols)
        ids = torch.cat([text, separator, text[:, :-1]], dim=1)
        return ProbeBatch(ids, torch.cat([torch.full_like(text, IGNORE_INDEX), text], dim=1))

    def longer(self, times: int) -> Copying:
        return replace(self, count=times * self.count)


@dataclass(frozen=True)
class Recall(Task):
    """Multi-query associative recall: pairs of a key and its value, then keys, each of which asks for its value.

    After Arora et al. 2023 (arXiv 2312.04927). Keys, values and noise are different ids; within a sequence no key and
    no value occurs in two pairs, no key is asked twice, and no value occurs after the separator. A state of fixed size
    has to hold all pairs; attention looks them up.

    Args:
        pairs: key-value pairs, at least 2.
        queries: keys asked for, at most `pairs`; None: all of them.
        tail: tokens after the separator: the queries at random places, noise at the others; None: only queries.
        keys: different keys, at least `pairs`.
        values: different values, at least `pairs`.
        noise: different noise symbols, at least 1.

    Raises:
        UserError: a parameter out of its range.
    """

    name: ClassVar[str] = "recall"
    pairs: int = 8
    queries: int | None = None
    tail: int | None = None
    keys: int = 64
    values: int = 64
    noise: int = 16

    def __post_init__(self) -> None:
        _require(self.pairs >= 2, self, "pairs must be at least 2")
        _require(1 <= self._queries <= self.pairs, self, "queries must be 1 … pairs")
        _require(self._tail >= self._queries, self, "tail must have room for the queries")
        _require(self.keys >= self.pairs, self, "keys must be at least pairs, as each pair has another key")
        _require(self.values >= self.pairs, self, "values must be at least pairs, as each pair has another value")
        _require(self.noise >= 1, self, "noise must be at least 1")

    @property
    def _queries(self) -> int:
        return self.pairs if self.queries is None else self.queries

    @property
    def _tail(self) -> int:
        return self._queries if self.tail is None else self.tail

    @property
    def vocab_size(self) -> int:
        return self.keys + self.values + self.noise + 1

    @property
    def length(self) -> int:
        return 2 * self.pairs + 1 + self._tail

    @property
    def chance(self) -> float:
        return 1 / self.values

    @property
    def without_mechanism(self) -> float:
        """Knowing which values occurred, but not whose they are."""
        return 1 / self.pairs

    def batch(self, rows: int, generator: torch.Generator, *, held_out: bool = False) -> ProbeBatch:
        keys = _permutations(rows, self.keys, generator)[:, : self.pairs]
        values = self.keys + _permutations(rows, self.values, generator)[:, : self.pairs]
        asked = _permutations(rows, self.pairs, generator)[:, : self._queries]
        places = _permutations(rows, self._tail, generator)[:, : self._queries]
        first_noise = self.keys + self.values
        tail = torch.randint(first_noise, first_noise + self.noise, (rows, self._tail), generator=generator)
        tail.scatter_(1, places, keys.gather(1, asked))
        answers = torch.full_like(tail, IGNORE_INDEX).scatter_(1, places, values.gather(1, asked))
        head = torch.cat(
            [torch.stack([keys, values], dim=-1).flatten(1), torch.full((rows, 1), self.vocab_size - 1)], dim=1
        )
        return ProbeBatch(
            torch.cat([head, tail], dim=1), torch.cat([torch.full_like(head, IGNORE_INDEX), answers], dim=1)
        )

    def longer(self, times: int) -> Recall:
        """As many pairs and queries among more noise: what is remembered stays, how long it is remembered grows."""
        return replace(self, tail=times * self.length - 2 * self.pairs - 1)


@dataclass(frozen=True)
class Induction(Task):
    """After A, say what followed A before: the task of induction heads (Olsson et al. 2022, arXiv 2209.11895).

    `count` different symbols in random order, then all but the last of them in another order; each asks for the one
    that stood behind it the first time. Every symbol may be an A or a B, and the second order is no copy of the first:
    neither the place nor the kind of a token tells the answer. It takes one step to mark each token by the one before
    it and another to look the mark up, which one layer of attention cannot do unless it is very large (Sanford et al.
    2024, arXiv 2408.14332). Where the answer happens to stand right before the query, nothing is asked.

    Args:
        count: symbols of a sequence, at least 5; it has twice as many tokens.
        symbols: different symbols, at least `count`.

    Raises:
        UserError: a parameter out of its range.
    """

    name: ClassVar[str] = "induction"
    count: int = 16
    symbols: int = 64

    def __post_init__(self) -> None:
        _require(self.count >= 5, self, "count must be at least 5")
        _require(self.symbols >= self.count, self, "symbols must be at least count, as each occurs once")

    @property
    def vocab_size(self) -> int:
        return self.symbols + 1

    @property
    def length(self) -> int:
        return 2 * self.count

    @property
    def chance(self) -> float:
        return 1 / self.symbols

    @property
    def without_mechanism(self) -> float:
        """Naming one of the first part's symbols, but not its first, the query itself or the token before the query."""
        return 1 / (self.count - 3)

    def batch(self, rows: int, generator: torch.Generator, *, held_out: bool = False) -> ProbeBatch:
        first = _permutations(rows, self.symbols, generator)[:, : self.count]
        order = _permutations(rows, self.count - 1, generator)
        second, followers = first.gather(1, order), first.gather(1, order + 1)
        head = torch.cat([first, torch.full((rows, 1), self.symbols)], dim=1)
        ids = torch.cat([head, second], dim=1)
        answers = followers.masked_fill(followers == ids[:, self.count : -1], IGNORE_INDEX)
        return ProbeBatch(ids, torch.cat([torch.full_like(head, IGNORE_INDEX), answers], dim=1))

    def longer(self, times: int) -> Induction:
        """More symbols in a sequence; `symbols` has to allow it."""
        return replace(self, count=times * self.count)


@dataclass(frozen=True)
class ModularAddition(Task):
    """a, b, separator: what is (a + b) mod p? Some pairs are never trained on (Power et al. 2022, arXiv 2201.02177).

    A pair and its mirror image are always on the same side of the split, so that knowing a + b = b + a gains nothing.

    Args:
        modulus: p, at least 2.
        train_share: share of the (unordered) pairs to train on; at least one is left on either side.
        split_seed: decides which.

    Raises:
        UserError: a parameter out of its range.
    """

    name: ClassVar[str] = "modular addition"
    modulus: int = 97
    train_share: float = 0.5
    split_seed: int = 0

    def __post_init__(self) -> None:
        _require(self.modulus >= 2, self, "modulus must be at least 2")
        _require(0 < self.train_share < 1, self, "train_share must be between 0 and 1")

    @property
    def vocab_size(self) -> int:
        return self.modulus + 1

    @property
    def length(self) -> int:
        return 3

    @property
    def chance(self) -> float:
        return 1 / self.modulus

    @property
    def without_mechanism(self) -> float:
        """Knowing the training pairs by heart says nothing of the others."""
        return self.chance

    def pairs(self, *, held_out: bool) -> Int[Tensor, "pairs two"]:
        """All ordered pairs of one side of the split."""
        unordered = torch.combinations(torch.arange(self.modulus), with_replacement=True)
        order = torch.randperm(len(unordered), generator=torch.Generator().manual_seed(self.split_seed))
        trained = min(max(round(self.train_share * len(unordered)), 1), len(unordered) - 1)
        chosen = unordered[order[trained:] if held_out else order[:trained]]
        return torch.cat([chosen, chosen.flip(1)[chosen[:, 0] != chosen[:, 1]]])

    def batch(self, rows: int, generator: torch.Generator, *, held_out: bool = False) -> ProbeBatch:
        pairs = self.pairs(held_out=held_out)
        drawn = pairs[torch.randint(len(pairs), (rows,), generator=generator)]
        ids = torch.cat([drawn, torch.full((rows, 1), self.modulus)], dim=1)
        targets = torch.full_like(ids, IGNORE_INDEX)
        targets[:, -1] = drawn.sum(dim=1) % self.modulus
        return ProbeBatch(ids, targets)

    def longer(self, times: int) -> ModularAddition:
        if times != 1:
            raise UserError(f"probe {self.name}: its sequences have three tokens, not {times} times as many")
        return self
