"""A batch that grows: which sizes, which windows, and that nothing else of the training changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from small_run import last_checkpoint, records
from test_loop import MODEL, lines, trainer

from scratchlm.cli import main
from scratchlm.config import Recipe, TrainConfig
from scratchlm.data.loader import Batch, EpochLoader, RandomLoader
from scratchlm.errors import UserError
from scratchlm.model import Transformer
from scratchlm.train.batch_warmup import GrowingBatches

TOKENS = np.random.default_rng(0).integers(0, 19, 1000).astype(np.uint16)


def loader(kind: type = EpochLoader, batch_size: int = 8, seed: int = 3) -> Any:
    return kind(TOKENS, batch_size, 8, seed, separator_id=0)


def growing(start: int = 2, steps: int = 6, batch_size: int = 8) -> TrainConfig:
    return TrainConfig(batch_size=batch_size, batch_warmup_start=start, batch_warmup_steps=steps)


@pytest.mark.parametrize(
    ("start", "steps", "sizes"),
    [
        (2, 6, [2, 2, 4, 4, 6, 6, 8, 8]),
        (2, 7, [2, 2, 2, 4, 4, 6, 6, 8]),
        (4, 3, [4, 4, 4, 8, 8]),
        (8, 3, [8, 8, 8, 8]),
        (1, 2, [1, 4, 8]),  # fewer steps than sizes: some are left out
        (2, 0, [8, 8]),
        (1, 1, [1, 8]),
    ],
)
def test_sizes_as_drawn(start: int, steps: int, sizes: list[int]) -> None:
    train = growing(start, steps)
    assert [train.batch_size_at(step) for step in range(len(sizes))] == sizes


@given(start=st.integers(1, 20), pieces=st.integers(1, 20), steps=st.integers(0, 60))
def test_sizes_grow_in_pieces_that_last_about_equally_long(start: int, pieces: int, steps: int) -> None:
    train = growing(start, steps, start * pieces)
    sizes = [train.batch_size_at(step) for step in range(steps)]
    assert sizes == sorted(sizes)
    assert all(start <= size <= max(start, start * (pieces - 1)) and size % start == 0 for size in sizes)
    assert [train.batch_size_at(steps + after) for after in (0, 1, 10**6)] == [start * pieces] * 3
    assert not steps or sizes[0] == start
    if steps >= pieces > 1:
        lasting = [sizes.count(size) for size in range(start, start * pieces, start)]
        assert max(lasting) - min(lasting) <= 1
    for stopped in range(steps + 3):  # in mid-growth, too
        run = train.model_copy(update={"steps": stopped})
        assert run.sequences == sum(train.batch_size_at(step) for step in range(stopped))


def test_a_long_growth_is_counted_without_going_through_it() -> None:
    train = TrainConfig(steps=10**12, batch_size=4, batch_warmup_start=2, batch_warmup_steps=10**12 - 1)
    assert train.sequences == 2 * (10**12 - 1) + 4


def test_windows_come_in_the_order_they_would_have() -> None:
    batches, alone = GrowingBatches(loader(), growing()), loader(batch_size=1)
    sizes = []
    for _ in range(40):  # more than one epoch
        batch = batches.next_batch()
        sizes.append(len(batch.inputs))
        for inputs, targets in zip(batch.inputs, batch.targets, strict=True):
            one = alone.next_batch()
            assert torch.equal(one.inputs[0], inputs) and torch.equal(one.targets[0], targets)
    assert sizes[:8] == [2, 2, 4, 4, 6, 6, 8, 8]


@pytest.mark.parametrize("kind", [EpochLoader, RandomLoader])
@pytest.mark.parametrize("taken", [0, 3, 7])
def test_a_loader_goes_on_in_mid_growth(kind: type, taken: int) -> None:
    first, second = (GrowingBatches(loader(kind), growing()) for _ in range(2))
    for _ in range(taken):
        first.next_batch()
    second.next_batch()  # to be forgotten
    second.load_state_dict(first.state_dict())
    for _ in range(6):
        left, right = first.next_batch(), second.next_batch()
        assert torch.equal(left.inputs, right.inputs) and torch.equal(left.targets, right.targets)
    with pytest.raises(UserError, match="seed"):
        second.load_state_dict({**first.state_dict(), "seed": 9})


class Given:
    """Batches of the sizes drawn above, cut by hand."""

    def __init__(self) -> None:
        self.loader, self.sizes = loader(batch_size=1), iter([2, 2, 4, 4, 6, 6, 8, 8])

    def next_batch(self) -> Batch:
        rows = [self.loader.next_batch() for _ in range(next(self.sizes))]
        return Batch(torch.cat([r.inputs for r in rows]), torch.cat([r.targets for r in rows]), None, None)

    def state_dict(self) -> dict[str, Any]:
        return {}


WARMUP = {"steps": 8, "batch_size": 8, "batch_warmup_start": 2, "batch_warmup_steps": 6}


def train(folder: Path, batches: Any, **options: Any) -> Transformer:
    model = Transformer(MODEL, seed=0)
    train = {**WARMUP, **options}
    trainer(folder, model, loader=batches, train=train, optim={"lr": 0.01, "schedule": "constant"}).fit()
    return model


def test_training_is_that_with_batches_of_these_sizes(tmp_path: Path) -> None:
    own = train(tmp_path / "own", GrowingBatches(loader(), TrainConfig(**WARMUP)))
    by_hand = train(tmp_path / "hand", Given(), accumulation=1)
    # In parts of two, the size by which it grows; by hand whole: equal up to rounding.
    for left, right in zip(own.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)
    tokens = [record["tokens"] for record in lines(tmp_path / "own", "train")]
    assert tokens == (8 * np.cumsum([2, 2, 4, 4, 6, 6, 8, 8])).tolist()


@pytest.mark.parametrize("accumulation", [1, 2, 8])
def test_accumulation_equals_the_big_batch(tmp_path: Path, accumulation: int) -> None:
    whole = train(tmp_path / "whole", Given(), batch_warmup_steps=0, batch_warmup_start=1)
    config = TrainConfig(**WARMUP, accumulation=accumulation)
    parts = train(tmp_path / "parts", GrowingBatches(loader(), config), accumulation=accumulation)
    for left, right in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("accumulation", "sizes"), [(1, {2, 8}), (2, {2, 4}), (4, {2}), (8, {1})])
def test_a_compiled_model_meets_two_shapes_at_most(
    tmp_path: Path, accumulation: int, sizes: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    forward = Transformer.body

    def watched(self: Transformer, x: torch.Tensor, context: Any) -> Any:
        seen.append(len(x))
        return forward(self, x, context)

    monkeypatch.setattr(Transformer, "body", watched)
    config = TrainConfig(**WARMUP, accumulation=accumulation)
    train(tmp_path, GrowingBatches(loader(), config), accumulation=accumulation)
    assert set(seen) == sizes
    assert sum(seen) == 2 + 2 + 4 + 4 + 6 + 6 + 8 + 8


@pytest.mark.parametrize("stop", [1, 5])
def test_resuming_is_bit_exact(tmp_path: Path, stop: int) -> None:
    config = TrainConfig(**WARMUP, accumulation=2)
    train(tmp_path / "whole", GrowingBatches(loader(), config), accumulation=2)
    for steps in (stop, 8):
        train(tmp_path / "parts", GrowingBatches(loader(), config), accumulation=2, steps=steps)
    whole, parts = (last_checkpoint(tmp_path / name) for name in ("whole", "parts"))
    for file in ("model.safetensors", "optimizer.safetensors"):
        left, right = load_file(whole / file), load_file(parts / file)
        assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_from_the_command_line(small: Path) -> None:
    common = ["train", "small.toml", "--train.batch-size", "8", "--train.log-interval", "1"]
    warmup = ["--train.batch-warmup-start", "4", "--train.batch-warmup-steps", "2", "--train.steps", "4"]
    assert main([*common, *warmup]) == 0
    seen = [record["tokens"] for record in records(small / "runs/small") if record["kind"] == "train"]
    first = seen[0]
    assert seen == [first, 2 * first, 4 * first, 6 * first]


def test_a_start_that_does_not_divide_the_batch_is_refused() -> None:
    with pytest.raises(UserError, match=r"batch_warmup_start = 3 does not divide train\.batch_size = 8"):
        Recipe(train=growing(start=3))
