"""Batches: exactness of epochs, resuming, document boundaries, evaluation windows."""

from __future__ import annotations

import json
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scratchlm.data import (
    IGNORE_INDEX,
    EpochLoader,
    Prefetcher,
    RandomLoader,
    Tokens,
    evaluation_windows,
    get_batch,
)
from scratchlm.errors import UserError

SEPARATOR = 0
sizes = st.integers(1, 120)
small = st.integers(1, 9)


def stream(length: int) -> np.ndarray:
    """Ids 1, 2, 3, …: a token's value tells its place."""
    return np.arange(1, length + 1, dtype=np.uint32)


def sharded(array: np.ndarray, shard: int) -> Tokens:
    pieces = [array[start : start + shard] for start in range(0, len(array), shard)]
    return Tokens(pieces, separator_id=SEPARATOR, documents=1, bytes=1)


def equal(one, two) -> bool:
    def same(a, b):
        return (a is None and b is None) or torch.equal(a, b)

    return all(
        same(getattr(one, name), getattr(two, name)) for name in ("inputs", "targets", "positions", "documents")
    )


# Reading


@settings(max_examples=200, deadline=None)
@given(length=sizes, shard=small, data=st.data())
def test_reading_across_shards(length, shard, data):
    array = stream(length)
    tokens = sharded(array, shard)
    assert len(tokens) == length
    start = data.draw(st.integers(0, length))
    stop = data.draw(st.integers(start, length))
    read = tokens.read(start, stop)
    assert read.dtype == np.int64
    assert read.tolist() == array[start:stop].tolist()
    width = data.draw(st.integers(1, length))
    starts = np.array(data.draw(st.lists(st.integers(0, length - width), max_size=6)), dtype=np.int64)
    windows = tokens.windows(starts, width)
    assert windows.dtype == np.int64
    assert windows.tolist() == [array[start : start + width].tolist() for start in starts]
    for bad in (
        lambda: tokens.read(0, length + 1),
        lambda: tokens.read(-1, 0),
        lambda: tokens.windows([length], 1),
    ):
        with pytest.raises(IndexError):
            bad()


# The course's get_batch


@pytest.mark.parametrize("kind", ["array", "memmap", "tokens"])
def test_get_batch(tmp_path, kind):
    array = np.arange(100, dtype=np.uint16)
    array.tofile(tmp_path / "a.bin")
    source = {
        "array": array,
        "memmap": np.memmap(tmp_path / "a.bin", dtype=np.uint16, mode="r"),
        "tokens": sharded(array, 7),
    }[kind]
    counts = np.zeros(100, dtype=int)
    for _ in range(200):
        inputs, targets = get_batch(source, 32, 7, "cpu")
        assert inputs.shape == targets.shape == (32, 7)
        assert inputs.dtype == targets.dtype == torch.int64
        assert torch.equal(inputs + 1, targets)
        assert torch.equal(inputs, inputs[:, :1] + torch.arange(7))
        counts += np.bincount(inputs[:, 0].numpy(), minlength=100)
    assert counts[93:].sum() == 0  # the last window starts at 92: its last target is token 99
    expected = 200 * 32 / 93
    assert abs(counts[:93] - expected).max() < 6 * expected**0.5
    assert counts[:93].min() > 0


def test_get_batch_is_reproducible_and_checks_length():
    array = np.arange(50, dtype=np.int64)
    draws = [get_batch(array, 4, 5, "cpu", torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    inputs, targets = get_batch(array[:6], 2, 5, "cpu")  # exactly one window
    assert inputs.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert targets.tolist() == [[1, 2, 3, 4, 5]] * 2
    with pytest.raises(UserError, match="the corpus has 5 tokens, fewer than the 6"):
        get_batch(array[:5], 2, 5, "cpu")
    with pytest.raises(UserError, match="1-D array of integers"):
        get_batch(array.reshape(5, 10), 2, 5, "cpu")
    with pytest.raises((RuntimeError, AssertionError)):
        get_batch(array, 2, 5, "cuda:99")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_get_batch_on_a_gpu():
    inputs, targets = get_batch(np.arange(100), 4, 7, "cuda")
    assert inputs.device.type == targets.device.type == "cuda"
    assert torch.equal(inputs.cpu() + 1, targets.cpu())
    batch = EpochLoader(stream(100), 4, 7, seed=0, separator_id=0, document_boundaries=True).next_batch().to("cuda")
    assert batch.documents is not None and batch.documents.device.type == "cuda"


# Epochs


@settings(max_examples=150, deadline=None)
@given(length=sizes, batch=small, context=small, world=st.integers(1, 4), shard=small, seed=st.integers(0, 3))
def test_every_token_is_a_target_once_per_epoch(length, batch, context, world, shard, seed):
    if length < context:
        with pytest.raises(UserError, match="fewer than"):
            EpochLoader(sharded(stream(length), shard), batch, context, seed)
        return
    tokens = sharded(stream(length), shard)
    loaders = [EpochLoader(tokens, batch, context, seed, rank=rank, world_size=world) for rank in range(world)]
    windows = -(-length // context)
    epochs = 3
    rows: list[tuple[torch.Tensor, torch.Tensor]] = []  # in the order of the queue that the ranks share
    while len(rows) < windows * epochs:
        batches = [loader.next_batch() for loader in loaders]
        for one in batches:
            assert one.inputs.shape == one.targets.shape == (batch, context)
            assert one.inputs.dtype == one.targets.dtype == torch.int64
            assert one.positions is None and one.documents is None
        rows += [(one.inputs[row], one.targets[row]) for row in range(batch) for one in batches]
    for epoch in range(epochs):
        seen = []
        for inputs, targets in rows[epoch * windows : (epoch + 1) * windows]:
            known = targets != IGNORE_INDEX
            assert torch.equal(inputs[known], targets[known] - 1)  # before the first token stands the separator, 0
            assert (inputs[~known] == SEPARATOR).all()
            seen += targets[known].tolist()
        assert sorted(seen) == list(range(1, length + 1))


def test_epochs_are_shuffled_anew_and_by_the_seed():
    def order(seed, epoch):
        return EpochLoader(stream(1000), 1, 10, seed, separator_id=0).order(epoch).tolist()

    assert sorted(order(0, 0)) == list(range(100))
    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    # Written down once: a checkpoint must find the same order in every later version of numpy and of this package.
    assert order(0, 0)[:5] == [11, 92, 3, 20, 13]


@settings(max_examples=80, deadline=None)
@given(
    length=st.integers(9, 120),
    batch=small,
    context=small,
    before=st.integers(0, 30),
    kind=st.sampled_from([EpochLoader, RandomLoader]),
    prefetch=st.booleans(),
)
def test_resuming_anywhere_equals_going_on(length, batch, context, before, kind, prefetch):
    def make():
        if kind is RandomLoader and length == context:
            return RandomLoader(
                stream(length + 1), batch, context, seed=7, separator_id=0, document_boundaries=True
            )
        return kind(stream(length), batch, context, seed=7, separator_id=0, document_boundaries=True)

    going_on = make()
    interrupted = Prefetcher(make(), depth=3) if prefetch else make()
    for _ in range(before):
        assert equal(going_on.next_batch(), interrupted.next_batch())
    state = json.loads(json.dumps(interrupted.state_dict()))
    assert state == going_on.state_dict()
    resumed = Prefetcher(make()) if prefetch else make()
    resumed.load_state_dict(state)
    for _ in range(5):
        assert equal(going_on.next_batch(), resumed.next_batch())
    if prefetch:
        interrupted.close()
        resumed.close()


def test_an_epoch_goes_on_with_other_batch_sizes_and_ranks():
    tokens = sharded(stream(103), 50)
    one = EpochLoader(tokens, 4, 5, seed=1)
    targets = [one.next_batch().targets]
    two = [EpochLoader(tokens, 3, 5, seed=1, rank=rank, world_size=2) for rank in range(2)]
    for loader in two:
        loader.load_state_dict(one.state_dict())
    for _ in range(3):
        targets += [loader.next_batch().targets for loader in two]
    seen = torch.cat(targets).flatten()[: 22 * 5]  # 4 + 18 windows, and an epoch has 21
    assert two[0].epoch == 1
    values = seen[seen != IGNORE_INDEX].tolist()
    assert set(values) == set(range(1, 104))


def test_states_of_something_else_are_refused():
    loader = EpochLoader(stream(100), 4, 5, seed=1, separator_id=0)
    state = loader.state_dict()
    others = [
        EpochLoader(stream(100), 4, 5, seed=2, separator_id=0),
        EpochLoader(stream(99), 4, 5, seed=1, separator_id=0),
        EpochLoader(stream(100), 4, 6, seed=1, separator_id=0),
        RandomLoader(stream(100), 4, 5, seed=1),
    ]
    for other in others:
        before = other.state_dict()
        with pytest.raises(UserError, match="the saved place in the data was taken with"):
            other.load_state_dict(state)
        assert other.state_dict() == before
    with pytest.raises(UserError, match="pass separator_id="):
        EpochLoader(stream(100), 4, 5, seed=1)
    with pytest.raises(UserError, match="rank 2 is not below world size 2"):
        EpochLoader(stream(100), 4, 5, seed=1, rank=2, world_size=2)


def test_random_loader_draws_uniformly_and_differently_per_rank_and_step():
    loaders = [RandomLoader(np.arange(60), 64, 9, seed=3, rank=rank, world_size=2) for rank in range(2)]
    counts = np.zeros(60, dtype=int)
    firsts = set()
    for _ in range(60):
        for loader in loaders:
            batch = loader.next_batch()
            assert torch.equal(batch.inputs + 1, batch.targets)
            counts += np.bincount(batch.inputs[:, 0].numpy(), minlength=60)
            firsts.add(tuple(batch.inputs[:, 0].tolist()))
    assert len(firsts) == 120
    assert counts[51:].sum() == 0  # the last window starts at 50
    expected = 120 * 64 / 51
    assert abs(counts[:51] - expected).max() < 6 * expected**0.5
    assert loaders[0].epoch == 60 * 64 * 2 * 9 // 60
    with pytest.raises(UserError, match="fewer than"):
        RandomLoader(np.arange(9), 1, 9, seed=0)


# Documents


def boundaries_by_hand(inputs: list[int]) -> tuple[list[int], list[int]]:
    positions, documents = [], []
    position, document = 0, 0
    for place, token in enumerate(inputs):
        if token == SEPARATOR and place > 0:
            position, document = 0, document + 1
        positions.append(position)
        documents.append(document)
        position += 1
    return positions, documents


@settings(max_examples=100, deadline=None)
@given(tokens=st.lists(st.sampled_from([0, 1, 2, 3]), min_size=8, max_size=60), context=st.integers(1, 8))
def test_document_boundaries(tokens, context):
    array = np.array(tokens, dtype=np.uint16)
    epoch = EpochLoader(array, 3, context, seed=0, document_boundaries=True, separator_id=SEPARATOR)
    windows = evaluation_windows(array, context, batch_size=3, document_boundaries=True, separator_id=SEPARATOR)
    for batch in (epoch.next_batch(), *windows):
        assert batch.positions is not None and batch.documents is not None
        assert batch.positions.dtype == batch.documents.dtype == torch.int64
        for row in range(len(batch.inputs)):
            positions, documents = boundaries_by_hand(batch.inputs[row].tolist())
            assert batch.positions[row].tolist() == positions
            assert batch.documents[row].tolist() == documents


# Evaluation


@settings(max_examples=200, deadline=None)
@given(length=sizes, context=small, batch=small, data=st.data())
def test_evaluation_covers_each_token_once_in_order(length, context, batch, data):
    stride = data.draw(st.none() | st.integers(1, context))
    seen = []
    rows = 0
    for one in evaluation_windows(stream(length), context, stride, batch, separator_id=SEPARATOR):
        assert one.inputs.shape == one.targets.shape
        assert len(one.inputs) <= batch and one.inputs.shape[1] == context
        for inputs, targets in zip(one.inputs, one.targets, strict=True):
            known = targets != IGNORE_INDEX
            assert torch.equal(inputs[known], targets[known] - 1)
            counted = targets[known].tolist()
            assert len(counted) <= (context if rows == 0 else stride or context)
            # Each counted token but those of the first window sees at least context - stride tokens before its own.
            if rows and stride:
                assert known.nonzero()[0].item() == context - stride
            start = rows * (stride or context)
            assert inputs.tolist() == [n if n < length else SEPARATOR for n in range(start, start + context)]
            seen += counted
            rows += 1
    assert seen == list(range(1, length + 1))


def test_evaluation_refuses_what_makes_no_sense():
    with pytest.raises(UserError, match="stride = 6 must be between 1 and the context length 5"):
        evaluation_windows(stream(10), 5, 6, 2, separator_id=0)
    with pytest.raises(UserError, match="has 0 tokens"):
        evaluation_windows(np.array([], dtype=np.uint16), 5, None, 2, separator_id=0)


# Prefetching


class Failing:
    def __init__(self) -> None:
        self.loader = EpochLoader(stream(100), 2, 5, seed=0, separator_id=0)

    def next_batch(self):
        if self.loader.state_dict()["position"] == 4:
            raise UserError("the data went away")
        return self.loader.next_batch()

    def state_dict(self):
        return self.loader.state_dict()

    def load_state_dict(self, state):
        self.loader.load_state_dict(state)


def test_prefetcher_passes_errors_on_and_ends_its_thread():
    with Prefetcher(Failing()) as loader:
        loader.next_batch()
        loader.next_batch()
        with pytest.raises(UserError, match="the data went away"):
            loader.next_batch()
        with pytest.raises(RuntimeError, match="closed"):
            loader.next_batch()
        assert loader.state_dict()["position"] == 4
    before = set(threading.enumerate())
    forgotten = Prefetcher(EpochLoader(stream(100), 2, 5, seed=0, separator_id=0))
    (thread,) = set(threading.enumerate()) - before
    del forgotten
    thread.join(timeout=5)
    assert not thread.is_alive()


def test_prefetcher_keeps_its_place_when_a_state_is_refused():
    expected = EpochLoader(stream(100), 2, 5, seed=0, separator_id=0)
    with Prefetcher(EpochLoader(stream(100), 2, 5, seed=0, separator_id=0)) as loader:
        assert equal(loader.next_batch(), expected.next_batch())
        with pytest.raises(UserError):
            loader.load_state_dict({"loader": "epoch", "seed": 5})
        assert equal(loader.next_batch(), expected.next_batch())


def test_prefetcher_works_ahead():
    class Counting(Failing):
        taken = 0

        def next_batch(self):
            self.taken += 1
            return self.loader.next_batch()

    inner = Counting()
    with Prefetcher(inner, depth=2) as loader:
        end = time.monotonic() + 5
        while inner.taken < 3 and time.monotonic() < end:  # two in the queue, one in the thread's hand
            time.sleep(0.01)
        time.sleep(0.2)
        assert inner.taken == 3
        assert loader.state_dict()["position"] == 0  # nothing was handed out yet
