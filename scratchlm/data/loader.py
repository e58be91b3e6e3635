"""Batches: random windows as the course draws them, exact epochs, and windows for evaluation.

The stream of a split is x₀, x₁, …, x_{N-1}, every document ending in the separator. A window of C targets at place p pairs
targets x_p … x_{p+C-1} with inputs x_{p-1} … x_{p+C-2}; before x₀ stands one more separator, so that every
token, the first one included, is predicted from the one before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from scratchlm.data.tokens import Ids, Tokens
from scratchlm.errors import UserError
from scratchlm.kernels.cross_entropy import IGNORE_INDEX


@dataclass(slots=True)
class Batch:
    """What one step trains on; all tensors int64, shape (batch, context).

    Attributes:
        inputs: token ids.
        targets: the id after each input; IGNORE_INDEX where nothing is to be learnt.
        positions: position of each input within its document, as far as the window shows it; None: 0, 1, 2, ….
        documents: number of each input's document within its window, from 0; None: all one document.
    """

    inputs: Tensor
    targets: Tensor
    positions: Tensor | None = None
    documents: Tensor | None = None

    def to(self, device: str | torch.device) -> Batch:
        """The batch on `device`; to a GPU through pinned memory, without waiting for the copy."""
        tensors = (self.inputs, self.targets, self.positions, self.documents)
        return Batch(*(None if tensor is None else _move(tensor, device) for tensor in tensors))  # type: ignore[arg-type]


def _move(tensor: Tensor, device: str | torch.device) -> Tensor:
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def as_tokens(tokens: np.ndarray | Tokens, separator_id: int | None = None) -> Tokens:
    """A 1-D integer array (or memmap) as :class:`Tokens`; Tokens as they are.

    Raises:
        UserError: not one-dimensional, or not integers.
    """
    if isinstance(tokens, Tokens):
        return tokens
    array = np.asarray(tokens)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise UserError(f"tokens must be a 1-D array of integers, not {array.ndim}-D of {array.dtype}")
    separator = -1 if separator_id is None else separator_id
    return Tokens([array], separator_id=separator, documents=0, bytes=0)


def _with_separator(tokens: np.ndarray | Tokens, separator_id: int | None) -> Tokens:
    source = as_tokens(tokens, separator_id)
    if source.separator_id < 0:
        raise UserError("a plain array of tokens does not say which id separates documents; pass separator_id=")
    return source


def get_batch(
    tokens: np.ndarray | Tokens,
    batch_size: int,
    context_length: int,
    device: str | torch.device,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Windows at uniformly random places (CS336, assignment 1): inputs and, one further, targets.

    Args:
        tokens: 1-D integer array, memmap, or Tokens.
        batch_size: number of windows B.
        context_length: tokens per window C.
        device: where the result goes; to a GPU through pinned memory, without waiting for the copy.
        generator: a CPU generator; None: torch's global one.

    Returns:
        (inputs, targets), both int64 of shape (B, C).

    Raises:
        UserError: fewer than C + 1 tokens.
    """
    source = as_tokens(tokens)
    _require(len(source), context_length + 1)
    starts = torch.randint(len(source) - context_length, (batch_size,), generator=generator).numpy()
    both = torch.from_numpy(source.windows(starts, context_length + 1))
    return _move(both[:, :-1].contiguous(), device), _move(both[:, 1:].contiguous(), device)


def _require(length: int, needed: int) -> None:
    if length < needed:
        raise UserError(
            f"the corpus has {length} tokens, fewer than the {needed} one window needs; give it more text or lower "
            "model.context_length"
        )


def gather(source: Tokens, starts: Ids, context_length: int) -> tuple[Ids, Ids]:
    """Windows whose first targets are at `starts`.

    Returns:
        (inputs, targets), int64, shape (len(starts), C). Beyond the stream's end inputs are separators and targets
        IGNORE_INDEX; the input before its beginning is a separator.
    """
    both = np.full((len(starts), context_length + 1), source.separator_id, dtype=np.int64)
    inside = (starts > 0) & (starts + context_length <= len(source))
    both[inside] = source.windows(starts[inside] - 1, context_length + 1)
    inputs, targets = both[:, :-1], both[:, 1:].copy()
    for row in np.flatnonzero(~inside):  # the first window and the ragged last one
        start = int(starts[row])
        known = source.read(max(start - 1, 0), min(start + context_length, len(source)))
        begin = 1 if start == 0 else 0
        both[row, begin : begin + len(known)] = known
        targets[row] = both[row, 1:]
        count = begin + len(known) - 1
        targets[row, count:] = IGNORE_INDEX
        inputs[row, count:] = source.separator_id  # the last token of all is a target only
    return inputs, targets


def _batch(inputs: Ids, targets: Ids, separator_id: int, document_boundaries: bool) -> Batch:
    batch = Batch(torch.from_numpy(np.ascontiguousarray(inputs)), torch.from_numpy(targets))
    if document_boundaries:
        positions, documents = boundaries(inputs, separator_id)
        batch.positions, batch.documents = torch.from_numpy(positions), torch.from_numpy(documents)
    return batch


def boundaries(inputs: Ids, separator_id: int) -> tuple[Ids, Ids]:
    """Where documents lie in windows of inputs, shape (batch, context).

    A separator among the inputs opens the document after it: from it alone the first token is predicted.

    Returns:
        (positions, documents), int64, same shape: see :class:`Batch`.
    """
    opens = inputs == separator_id
    opens[:, 0] = True
    documents = np.cumsum(opens, axis=1) - 1
    place = np.arange(inputs.shape[1])
    positions = place - np.maximum.accumulate(np.where(opens, place, 0), axis=1)
    return positions, documents


class _WindowLoader:
    """What both loaders are told, and the checks on it; see :class:`EpochLoader` for the arguments."""

    _pads: ClassVar[bool]
    """Whether windows are padded with separators, so that one must be known; else a window needs one token more."""

    def __init__(
        self,
        tokens: np.ndarray | Tokens,
        batch_size: int,
        context_length: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        document_boundaries: bool = False,
        *,
        separator_id: int | None = None,
    ) -> None:
        _check_sizes(batch_size, context_length, rank, world_size)
        needs_separator = document_boundaries or self._pads
        self.tokens = (_with_separator if needs_separator else as_tokens)(tokens, separator_id)
        _require(len(self.tokens), context_length if self._pads else context_length + 1)
        self.batch_size, self.context_length, self.seed = batch_size, context_length, seed
        self.rank, self.world_size = rank, world_size
        self.document_boundaries = document_boundaries


class EpochLoader(_WindowLoader):
    """Every token is a target exactly once per epoch, in windows shuffled anew each time.

    The stream is cut into ceil(N / C) windows; the last one is padded. Epoch after epoch of shuffled windows forms one
    endless queue, of which rank r of R takes every R-th window: together the ranks see each window once per epoch,
    and a batch that reaches the end of an epoch is filled from the next. The state is a place in that queue, so it can be
    continued with another batch size or number of ranks.

    Args:
        tokens: Tokens, or a 1-D integer array together with `separator_id`.
        batch_size: windows per batch of this rank.
        context_length: targets per window C.
        seed: the order of epoch e follows from (seed, e).
        rank: this process's number, below `world_size`.
        world_size: number of processes that share the epoch.
        document_boundaries: also give positions and documents.
        separator_id: for plain arrays, the id that ends each document.

    Raises:
        UserError: fewer tokens than one window.
    """

    _pads = True
    _position = 0  # in the queue of all ranks: windows taken so far
    _order: tuple[int, Ids] | None = None  # of the epoch used last

    @property
    def windows(self) -> int:
        """Windows of an epoch."""
        return count_windows(len(self.tokens), self.context_length)

    @property
    def epoch(self) -> int:
        """Whole epochs taken so far."""
        return self._position // self.windows

    def order(self, epoch: int) -> Ids:
        """The order of the windows in `epoch`, a permutation, int64, shape (windows,).

        Sorting raw 64-bit draws rather than calling numpy's shuffle: numpy guarantees a bit generator's stream for good,
        but not what its distributions make of it, and a run must continue the same after an upgrade.
        """
        if self._order is None or self._order[0] != epoch:
            draws = np.random.PCG64([self.seed, epoch]).random_raw(self.windows)
            self._order = epoch, np.argsort(draws, kind="stable").astype(np.int64, copy=False)
        return self._order[1]

    def next_batch(self) -> Batch:
        """The next batch of this rank."""
        places = self._position + self.rank + self.world_size * np.arange(self.batch_size, dtype=np.int64)
        epochs, places = np.divmod(places, self.windows)
        numbers = np.empty(self.batch_size, dtype=np.int64)
        for epoch in np.unique(epochs):
            numbers[epochs == epoch] = self.order(int(epoch))[places[epochs == epoch]]
        self._position += self.batch_size * self.world_size
        inputs, targets = gather(self.tokens, numbers * self.context_length, self.context_length)
        return _batch(inputs, targets, self.tokens.separator_id, self.document_boundaries)

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch begins, as plain JSON values."""
        return {"loader": "epoch", **self._identity(), "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the batch after the one `state` was taken behind.

        Raises:
            UserError: the state belongs to other data, another seed or context length.
        """
        _same(state, {"loader": "epoch", **self._identity()})
        self._position = int(state["position"])

    def _identity(self) -> dict[str, Any]:
        return {"seed": self.seed, "context_length": self.context_length, "tokens": len(self.tokens)}


class RandomLoader(_WindowLoader):
    """The course's random windows behind the same interface; batch n of a rank follows from (seed, rank, n) alone.

    Arguments as for :class:`EpochLoader`; a plain array needs `separator_id` only with `document_boundaries`.

    Raises:
        UserError: fewer than C + 1 tokens.
    """

    _pads = False
    _batches = 0  # taken so far

    @property
    def epoch(self) -> int:
        """As many tokens as this many epochs hold have been drawn so far, by all ranks."""
        return self._batches * self.batch_size * self.world_size * self.context_length // len(self.tokens)

    def next_batch(self) -> Batch:
        """The next batch of this rank."""
        draws = np.random.PCG64([self.seed, self.rank, self._batches]).random_raw(self.batch_size)
        # The remainder of 64 random bits: for any real corpus uniform to better than one in a million million.
        starts = (draws % np.uint64(len(self.tokens) - self.context_length)).astype(np.int64)
        self._batches += 1
        both = self.tokens.windows(starts, self.context_length + 1)
        return _batch(both[:, :-1], both[:, 1:].copy(), self.tokens.separator_id, self.document_boundaries)

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch begins, as plain JSON values."""
        return {"loader": "random", **self._identity(), "batches": self._batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the batch after the one `state` was taken behind.

        Raises:
            UserError: the state belongs to other data, another seed, batch size or context length.
        """
        _same(state, {"loader": "random", **self._identity()})
        self._batches = int(state["batches"])

    def _identity(self) -> dict[str, Any]:
        sizes = {"context_length": self.context_length, "tokens": len(self.tokens), "batch_size": self.batch_size}
        return {"seed": self.seed, **sizes}


def _check_sizes(batch_size: int, context_length: int, rank: int, world_size: int) -> None:
    if batch_size < 1 or context_length < 1:
        raise UserError(f"batch size {batch_size} and context length {context_length} must be at least 1")
    if not 0 <= rank < world_size:
        raise UserError(f"rank {rank} is not below world size {world_size}")


def _same(state: dict[str, Any], mine: dict[str, Any]) -> None:
    for name, value in mine.items():
        if state.get(name) != value:
            raise UserError(
                f"the saved place in the data was taken with {name} = {state.get(name)}, this run has {value}; continue with "
                "the same data and settings, or start a new run"
            )


def count_windows(tokens: int, context_length: int, stride: int | None = None) -> int:
    """Windows of `context_length` targets, `stride` apart (None: no overlap), that cover so many tokens; at least one."""
    return 1 + -(-max(0, tokens - context_length) // (stride or context_length))


def evaluation_windows(
    tokens: np.ndarray | Tokens,
    context_length: int,
    stride: int | None = None,
    batch_size: int = 32,
    *,
    document_boundaries: bool = False,
    separator_id: int | None = None,
) -> Iterator[Batch]:
    """The whole split, every token a target exactly once, in order.

    Windows begin every `stride` tokens. With a stride below the context length C a window reads the C - stride tokens before
    its own again, as context: only its last `stride` targets count (in the first window all), the others are
    IGNORE_INDEX. Text shorter than one window is padded; the last batch may have fewer rows.

    Args:
        tokens: Tokens, or a 1-D integer array together with `separator_id`.
        context_length: targets per window C.
        stride: 1 … C; None: C, no overlap.
        batch_size: windows per batch, at most.
        document_boundaries: also give positions and documents.
        separator_id: for plain arrays, the id that ends each document.

    Raises:
        UserError: no tokens, or a stride out of range.
    """
    source = _with_separator(tokens, separator_id)
    stride = context_length if stride is None else stride
    _check_sizes(batch_size, context_length, 0, 1)
    if not 1 <= stride <= context_length:
        raise UserError(f"evaluate.stride = {stride} must be between 1 and the context length {context_length}")
    _require(len(source), 1)
    count = count_windows(len(source), context_length, stride)

    def batches() -> Iterator[Batch]:  # apart, so that the checks above run at the call
        for first in range(0, count, batch_size):
            starts = np.arange(first, min(first + batch_size, count), dtype=np.int64) * stride
            inputs, targets = gather(source, starts, context_length)
            targets[starts > 0, : context_length - stride] = IGNORE_INDEX
            yield _batch(inputs, targets, source.separator_id, document_boundaries)

    return batches()
