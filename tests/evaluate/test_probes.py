"""Synthetic probes: questions and answers read from the ids in plain Python; models that learn them, or cannot."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scratchlm.errors import UserError
from scratchlm.evaluate.probes import (
    Copying,
    Induction,
    ModularAddition,
    ProbeBatch,
    ProbeResult,
    Recall,
    Task,
    probe,
)
from scratchlm.evaluate.probes.tasks import _expected_largest
from scratchlm.kernels.cross_entropy import IGNORE_INDEX
from scratchlm.model import ModelConfig

TASKS = [
    Copying(count=6, symbols=5),
    Copying(count=6, symbols=5, shortest=2),
    Recall(pairs=4, keys=9, values=7),
    Recall(pairs=4, queries=2, tail=11, keys=9, values=7, noise=3),
    Induction(count=6, symbols=13),
    ModularAddition(modulus=11),
]
every_task = pytest.mark.parametrize("task", TASKS, ids=str)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows_of(batch: ProbeBatch) -> list[tuple[list[int], list[int]]]:
    return list(zip(batch.ids.tolist(), batch.targets.tolist(), strict=True))


def asked(targets: list[int]) -> list[int]:
    return [place for place, target in enumerate(targets) if target != IGNORE_INDEX]


# What each task's sequences must be, read from the ids alone.


def read_copying(task: Copying, ids: list[int], targets: list[int]) -> None:
    separator = task.symbols
    count = ids.index(separator)
    assert len(ids) == len(targets) == 2 * count and ids.count(separator) == 1
    assert all(0 <= symbol < task.symbols for symbol in ids if symbol != separator)
    assert asked(targets) == list(range(count, 2 * count))
    for place in asked(targets):
        assert targets[place] == ids[place - count], "the answer stands `count` back"
    assert ids[count + 1 :] == targets[count:-1], "each answer is the next token"


def read_recall(task: Recall, ids: list[int], targets: list[int]) -> None:
    separator = ids.index(task.vocab_size - 1)
    assert ids.count(task.vocab_size - 1) == 1 and separator == 2 * task.pairs
    keys, values = ids[:separator:2], ids[1:separator:2]
    assert all(0 <= key < task.keys for key in keys) and len(set(keys)) == task.pairs
    assert all(task.keys <= value < task.keys + task.values for value in values)
    assert len(set(values)) == task.pairs
    table = dict(zip(keys, values, strict=True))
    queries = [place for place in range(separator + 1, len(ids)) if ids[place] in table]
    assert asked(targets) == queries and len(queries) == (task.queries or task.pairs)
    assert [targets[place] for place in queries] == [table[ids[place]] for place in queries]
    assert len({ids[place] for place in queries}) == len(queries), "no key is asked twice"
    first_noise = task.keys + task.values
    for place in set(range(separator + 1, len(ids))) - set(queries):
        assert first_noise <= ids[place] < first_noise + task.noise


def read_induction(task: Induction, ids: list[int], targets: list[int]) -> None:
    count = ids.index(task.symbols)
    assert count == task.count and ids.count(task.symbols) == 1
    first, second = ids[:count], ids[count + 1 :]
    assert len(set(first)) == count and set(first) <= set(range(task.symbols))
    assert sorted(second) == sorted(first[:-1])
    for place in range(count + 1):
        assert targets[place] == IGNORE_INDEX
    for place in range(count + 1, len(ids)):
        follower = first[first.index(ids[place]) + 1]
        assert targets[place] == (IGNORE_INDEX if ids[place - 1] == follower else follower)


def read_addition(task: ModularAddition, ids: list[int], targets: list[int]) -> None:
    a, b, separator = ids
    assert 0 <= a < task.modulus and 0 <= b < task.modulus and separator == task.modulus
    assert targets == [IGNORE_INDEX, IGNORE_INDEX, (a + b) % task.modulus]


READERS: dict[type, Any] = {
    Copying: read_copying,
    Recall: read_recall,
    Induction: read_induction,
    ModularAddition: read_addition,
}


def check(task: Task, seed: int, held_out: bool, rows: int = 8) -> None:
    batch = task.batch(rows, generator(seed), held_out=held_out)
    assert batch.ids.dtype == batch.targets.dtype == torch.int64
    assert batch.ids.shape == batch.targets.shape and len(batch.ids) == rows
    assert batch.ids.shape[1] <= task.length
    if held_out:
        assert batch.ids.shape[1] == task.length
    assert int(batch.ids.min()) >= 0 and int(batch.ids.max()) < task.vocab_size
    assert int(batch.targets.max()) < task.vocab_size
    for ids, targets in rows_of(batch):
        READERS[type(task)](task, ids, targets)
        if isinstance(task, Recall | Induction):
            assert all(targets[place] != ids[place - 1] for place in asked(targets)), "the answer stands beside"


seeds = st.integers(0, 2**32)


@st.composite
def copyings(draw: st.DrawFn) -> Task:
    count = draw(st.integers(2, 20))
    return Copying(count, draw(st.integers(2, 30)), draw(st.none() | st.integers(2, count)))


@st.composite
def recalls(draw: st.DrawFn) -> Task:
    pairs = draw(st.integers(2, 12))
    queries = draw(st.none() | st.integers(1, pairs))
    tail = draw(st.none() | st.integers(queries or pairs, 30))
    keys, values = draw(st.integers(pairs, 40)), draw(st.integers(pairs, 40))
    return Recall(pairs, queries, tail, keys, values, draw(st.integers(1, 9)))


@st.composite
def inductions(draw: st.DrawFn) -> Task:
    count = draw(st.integers(5, 20))
    return Induction(count, draw(st.integers(count, 60)))


additions = st.builds(ModularAddition, st.integers(2, 23), st.floats(0.01, 0.99), st.integers(0, 9))


@settings(deadline=None, max_examples=120)
@given(copyings() | recalls() | inductions() | additions, seeds, st.booleans())
def test_batches_are_what_the_task_says(task: Task, seed: int, held_out: bool) -> None:
    check(task, seed, held_out)


@settings(deadline=None, max_examples=40)
@given(copyings() | recalls() | inductions(), seeds, st.integers(1, 4))
def test_longer_sequences_are_the_same_task(task: Task, seed: int, times: int) -> None:
    if isinstance(task, Induction):
        task = replace(task, symbols=times * task.symbols)
    longer = task.longer(times)
    assert longer.length == times * task.length and longer.vocab_size == task.vocab_size
    check(longer, seed, held_out=True, rows=3)
    if isinstance(task, Recall) and isinstance(longer, Recall):
        assert (longer.pairs, longer._queries) == (task.pairs, task._queries)


@every_task
def test_the_seed_decides(task: Task) -> None:
    for held_out in (False, True):
        one, again, other = (task.batch(20, generator(seed), held_out=held_out) for seed in (3, 3, 4))
        assert torch.equal(one.ids, again.ids) and torch.equal(one.targets, again.targets)
        assert one.ids.shape != other.ids.shape or not torch.equal(one.ids, other.ids)
    drawing = generator(3)
    first, second = task.batch(20, drawing), task.batch(20, drawing)
    assert first.ids.shape != second.ids.shape or not torch.equal(first.ids, second.ids)
    assert len({tuple(row) for row in first.ids.tolist()}) > 10, "rows differ"


def test_copying_trains_on_all_counts_and_is_asked_the_longest() -> None:
    task, drawing = Copying(count=5, symbols=3, shortest=2), generator()
    assert {task.batch(1, drawing).ids.shape[1] for _ in range(100)} == {4, 6, 8, 10}
    assert {task.batch(1, drawing, held_out=True).ids.shape[1] for _ in range(20)} == {10}
    assert {Copying(count=5, symbols=3).batch(1, drawing).ids.shape[1] for _ in range(20)} == {10}


def test_additions_sides_are_apart_together_everything_and_hold_mirror_images() -> None:
    for share in (0.001, 0.3, 0.5, 0.9, 0.999):
        task = ModularAddition(modulus=13, train_share=share, split_seed=4)
        sides = [{tuple(pair) for pair in task.pairs(held_out=held_out).tolist()} for held_out in (False, True)]
        assert sides[0] and sides[1] and not sides[0] & sides[1]
        assert sides[0] | sides[1] == {(a, b) for a in range(13) for b in range(13)}
        assert all({(b, a) for a, b in side} == side for side in sides)
        assert abs(len(sides[0]) - share * 169) < 10
        for held_out, side in enumerate(sides):
            drawn = task.batch(3000, generator(), held_out=bool(held_out)).ids[:, :2].tolist()
            assert {tuple(pair) for pair in drawn} <= side
            assert len({tuple(pair) for pair in drawn}) == len(side) or len(side) > 140
    other = replace(task, train_share=0.5, split_seed=5).pairs(held_out=True)
    assert not torch.equal(other, replace(task, train_share=0.5).pairs(held_out=True))


def test_addition_draws_all_pairs_of_a_side_and_all_symbols_evenly() -> None:
    ids = Copying(count=20, symbols=4).batch(2000, generator()).ids[:, :20]
    shares = torch.bincount(ids.flatten(), minlength=4) / ids.numel()
    assert shares.tolist() == pytest.approx([0.25] * 4, abs=0.01)
    answers = ModularAddition(5, train_share=0.5).batch(4000, generator())
    pairs = {tuple(pair) for pair in ModularAddition(5, train_share=0.5).pairs(held_out=False).tolist()}
    assert {tuple(pair) for pair in answers.ids[:, :2].tolist()} == pairs


# What a task calls chance and the best without its mechanism, by players who play just that.


def score(task: Task, player: Any, rows: int = 1500) -> float:
    right = total = 0
    for ids, targets in rows_of(task.batch(rows, generator(1), held_out=True)):
        for place in asked(targets):
            right += player(ids, place) == targets[place]
            total += 1
    return right / total


def test_without_mechanism_is_what_a_player_without_it_reaches() -> None:
    rng = random.Random(0)

    def copier(ids: list[int], place: int) -> int:  # knows what is left to come, not in which order
        count = ids.index(max(ids))
        left = ids[:count]
        for symbol in ids[count + 1 : place + 1]:
            left.remove(symbol)
        return max(rng.sample(left, len(left)), key=left.count)

    def recaller(ids: list[int], place: int) -> int:  # knows the values, not their keys
        return rng.choice(ids[1 : 2 * recall.pairs : 2])

    def inductor(ids: list[int], place: int) -> int:  # knows the symbols, not their order
        return rng.choice(
            [symbol for symbol in ids[1 : induction.count] if symbol not in ids[place - 1 : place + 1]]
        )

    copying, recall, induction = Copying(9, 6), Recall(5, 3, 20), Induction(9, 20)
    assert score(copying, copier) == pytest.approx(copying.without_mechanism, abs=0.015)
    assert score(recall, recaller) == pytest.approx(recall.without_mechanism, abs=0.015)
    # A bound here: what the player may leave out is not always among the nine.
    assert induction.without_mechanism - 0.035 < score(induction, inductor) <= induction.without_mechanism + 0.01
    for task in TASKS:
        # Exactly: every answer the task can give is as likely as any other.
        answers = sorted(
            {t for _, ts in rows_of(task.batch(4000, generator(), held_out=True)) for t in ts} - {-100}
        )
        assert len(answers) == round(1 / task.chance) or isinstance(task, ModularAddition)
        assert score(task, lambda ids, place, answers=answers: rng.choice(answers)) == pytest.approx(
            1 / len(answers), abs=0.03
        )
        assert 0 < task.chance <= task.without_mechanism < 1


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 7), st.integers(1, 4))
def test_expected_largest_is_the_mean_over_all_draws(items: int, kinds: int) -> None:
    draws = torch.cartesian_prod(*[torch.arange(kinds)] * items).reshape(-1, items)
    largest = torch.stack([(draws == kind).sum(dim=1) for kind in range(kinds)]).amax(dim=0)
    assert _expected_largest(items, kinds)[-1] == pytest.approx(float(largest.double().mean()), rel=1e-9)


def test_expected_largest_where_numbers_are_large() -> None:
    draws = torch.randint(16, (4000, 256), generator=generator())
    largest = torch.stack([(draws == kind).sum(dim=1) for kind in range(16)]).amax(dim=0)
    assert _expected_largest(256, 16)[256] == pytest.approx(float(largest.double().mean()), rel=0.01)


# Models.

SMALL: dict[str, Any] = {"d_model": 32, "layers": 2, "heads": 2, "context_length": 64, "d_ff_multiple": 8}


def shuffled(task: Task) -> Task:
    """The same sequences, with the answers of other rows: there is nothing to learn."""

    class Shuffled(type(task)):  # type: ignore[misc]
        def batch(self, rows: int, generator: torch.Generator, *, held_out: bool = False) -> ProbeBatch:
            ids, targets = super().batch(rows, generator, held_out=held_out)
            return ProbeBatch(ids, targets if held_out else targets.roll(1, dims=0))

    return Shuffled(**task.__dict__)


def test_copying_is_learnt_and_not_from_wrong_answers() -> None:
    task = Copying(count=5, symbols=8)
    training: dict[str, Any] = {"steps": 100, "batch": 32, "lr": 1e-2, "evaluate_rows": 200}
    learnt = probe(ModelConfig(**SMALL), task, **training)
    assert learnt.accuracy > 0.95 > 0.6 > task.without_mechanism
    assert learnt.by_length[1].questions == 200 * 5
    broken = probe(ModelConfig(**SMALL), shuffled(task), **training)
    assert broken.accuracy < task.chance + 0.08 and broken.loss > learnt.loss + 1


def test_induction_takes_two_layers() -> None:
    task = Induction(count=6, symbols=9)
    training: dict[str, Any] = {"steps": 200, "batch": 32, "lr": 1e-2, "evaluate_rows": 200}
    two, one = (probe(ModelConfig(**{**SMALL, "layers": layers}), task, **training) for layers in (2, 1))
    assert two.accuracy > 0.95
    assert one.accuracy < task.without_mechanism and one.parameters < two.parameters


def test_same_seed_same_result_and_the_caller_keeps_its_generator() -> None:
    task = Copying(count=3, symbols=4, shortest=2)
    training: dict[str, Any] = {"steps": 6, "batch": 4, "evaluate_rows": 10, "evaluate_lengths": (1, 3)}
    before = torch.get_rng_state()
    results = []
    for seed in (5, 5, 6):
        torch.rand(seed)  # as somebody else would
        results.append(probe(ModelConfig(**SMALL), task, seed=seed, **training).model_dump(exclude={"seconds"}))
        torch.set_rng_state(before)
    assert results[0] == results[1] != results[2]
    state = torch.get_rng_state()
    probe(ModelConfig(**SMALL), task, **training)
    assert torch.equal(torch.get_rng_state(), state)


def test_result_says_what_was_asked_and_survives_json() -> None:
    task = Recall(pairs=3, queries=2, tail=6, keys=5, values=5, noise=2)
    config = ModelConfig(**SMALL)
    found = probe(config, task, steps=3, batch=7, evaluate_rows=10, evaluate_lengths=(4, 1))
    assert {times: at.length for times, at in found.by_length.items()} == {1: 13, 4: 52}
    assert found.accuracy == found.by_length[1].accuracy and found.loss == found.by_length[1].loss
    assert all(at.questions == 20 and 0 <= at.accuracy <= 1 for at in found.by_length.values())
    assert found.by_length[4].chance == 1 / 5 and found.by_length[4].without_mechanism == 1 / 3
    assert found.steps == 3 and found.seconds > 0
    larger = probe(ModelConfig(**{**SMALL, "vocab_size": 20}), task, steps=1)
    assert larger.parameters - found.parameters == 2 * 32 * (20 - task.vocab_size), "embedding and head"
    assert ProbeResult.model_validate(json.loads(found.model_dump_json())) == found


def test_accuracy_and_loss_are_those_of_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that knows the answers for even ids and is sure of a wrong one for odd ones."""

    class Knowing(torch.nn.Module):
        def __init__(self, config: ModelConfig, seed: int) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(3, 3))

        def forward(self, ids: Tensor) -> Tensor:
            answer = (ids[:, :1] + ids[:, 1:2]) % 7
            said = torch.where(answer % 2 == 0, answer, (answer + 1) % 7).expand(-1, 3)
            return 4 * torch.nn.functional.one_hot(said, 8) + 0 * self.weight.sum()

    monkeypatch.setattr("scratchlm.evaluate.probes.training.Transformer", Knowing)
    task = ModularAddition(7, 0.5)
    found = probe(ModelConfig(**SMALL), task, steps=1, evaluate_rows=4000, batch=333, seed=1)
    held_out = task.pairs(held_out=True).sum(dim=1) % 7
    share = float((held_out % 2 == 0).double().mean())
    assert found.accuracy == pytest.approx(share, abs=0.03) and 0.2 < share < 0.9
    log_total = torch.tensor([4.0] + [0.0] * 7).logsumexp(0).item()
    assert found.loss == pytest.approx(log_total - 4 * found.accuracy, abs=1e-5)
    assert found.by_length[1].questions == 4000 and found.parameters == 9


BAD_TASKS: dict[str, Any] = {
    "count must be at least 2": lambda: Copying(count=1),
    "symbols must be at least 2": lambda: Copying(symbols=1),
    "shortest must be 2 … count": lambda: Copying(count=4, shortest=5),
    "pairs must be at least 2": lambda: Recall(pairs=1),
    "queries must be 1 … pairs": lambda: Recall(pairs=4, queries=5),
    "tail must have room": lambda: Recall(pairs=4, tail=3),
    "keys must be at least pairs": lambda: Recall(pairs=9, keys=8),
    "values must be at least pairs": lambda: Recall(pairs=9, values=8),
    "noise must be at least 1": lambda: Recall(noise=0),
    "count must be at least 5": lambda: Induction(count=4),
    "symbols must be at least count": lambda: Induction(count=9, symbols=8),
    "as each occurs once": lambda: Induction(count=9, symbols=30).longer(4),
    "modulus must be at least 2": lambda: ModularAddition(modulus=1),
    "train_share must be between": lambda: ModularAddition(train_share=1.0),
    "three tokens, not 2 times": lambda: ModularAddition().longer(2),
}
BAD_PROBES: dict[str, dict[str, Any]] = {
    "steps = 0 must be": {"steps": 0},
    "batch = 0 must be": {"batch": 0},
    "evaluate_rows = -1 must be": {"evaluate_rows": -1},
    "evaluate_lengths = \\[\\] must": {"evaluate_lengths": ()},
    "evaluate_lengths = \\[0, 1\\] must": {"evaluate_lengths": (0, 1)},
    "lr = 0": {"lr": 0},
    "it has 17 ids, model.vocab_size is 16": {"config": ModelConfig(**SMALL, vocab_size=16)},
    "sequences of 96 tokens are asked for, model.context_length is 64; set it to 96": {"evaluate_lengths": (1, 3)},
}


@pytest.mark.parametrize("message", BAD_TASKS)
def test_impossible_parameters_are_refused(message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        BAD_TASKS[message]()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("message", BAD_PROBES)
def test_impossible_probes_are_refused(message: str) -> None:
    arguments = {"config": ModelConfig(**SMALL), "task": Copying(), "steps": 1, **BAD_PROBES[message]}
    with pytest.raises(UserError, match=message) as error:
        probe(**arguments)
    assert "\n" not in str(error.value)
