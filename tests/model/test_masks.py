"""Masks: every one as pairs written down from its paper, against the rule, its matrix, its tiles and its plan."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scratchlm.kernels.visibility import (
    Visibility,
    columns_per_block,
    plan_of,
    scores_computed,
    spans_by_asking,
)
from scratchlm.model import ModelConfig, choices
from scratchlm.model.mask import (
    BlockSparse,
    Causal,
    Fixed,
    PrefixLM,
    SlidingWindow,
    Strided,
    StridedFar,
    visibility,
)

Pairs = set[tuple[int, int]]


def pairs_of(name: str, length: int, config: ModelConfig, prefix: int = 0) -> Pairs:
    """(query, key) for all that may be read, walked through as the papers tell it."""
    places = list(range(length))
    reads: dict[int, set[int]] = {}
    for q in places:
        before = places[: q + 1]
        if name == "causal":
            reads[q] = set(before)
        elif name == "sliding_window":
            reads[q] = set(before[-config.window :])
        elif name == "strided":  # Child et al.: A¹ the last ℓ positions, A² every ℓ-th one back from here
            reads[q] = set(before[-config.stride :]) | set(range(q, -1, -config.stride))
        elif (
            name == "fixed"
        ):  # A¹ its own stretch so far, A² the last c of the ℓ places of every stretch that is over
            stretches = [places[start : start + config.stride] for start in range(0, length, config.stride)]
            reads[q] = set()
            for stretch in stretches:
                if q in stretch:
                    reads[q] |= {k for k in stretch if k <= q}
                elif stretch[-1] < q:
                    reads[q] |= set(stretch[-config.stride_summary :])
        elif name == "block_sparse":  # blocks up to its own, and the global positions, as far as they have been
            blocks = [places[start : start + config.mask_block] for start in range(0, length, config.mask_block)]
            own = next(number for number, block in enumerate(blocks) if q in block)
            near = blocks[max(0, own + 1 - config.mask_local_blocks) : own + 1]
            reads[q] = {k for block in [*near, places[: config.global_tokens]] for k in block if k <= q}
        elif name == "prefix_lm":
            reads[q] = set(before) | (set(places[:prefix]) if q in places[:prefix] else set())
        else:
            raise AssertionError(name)
    return {(q, k) for q in places for k in reads[q]}


def square(pairs: Pairs, length: int) -> Tensor:
    return torch.tensor([[(q, k) in pairs for k in range(length)] for q in range(length)], dtype=torch.bool)


configs = st.builds(
    ModelConfig,
    window=st.integers(1, 9),
    stride=st.shared(st.integers(1, 7), key="stride"),
    stride_summary=st.shared(st.integers(1, 7), key="stride").flatmap(lambda stride: st.integers(1, stride)),
    mask_block=st.integers(1, 6),
    mask_local_blocks=st.integers(1, 4),
    global_tokens=st.integers(0, 5),
)


def planned_parts(seen: Visibility) -> list[Visibility]:
    """The parts with a plan of their own that a blocked kernel walks through."""
    return [part for one in seen.parts for part in planned_parts(one)] if seen.parts else [seen]


def read_by_blocks(seen: Visibility) -> tuple[Tensor, int]:
    """How often each pair (…, q, k) is read when every part's plan is followed, and how many scores that takes."""
    length = seen.queries.shape[-1]
    count = torch.zeros(*seen.matrix().shape, dtype=torch.int)
    computed = 0
    for part in planned_parts(seen):
        order = torch.arange(length) if part.order is None else part.order
        assert sorted(order.tolist()) == list(range(length)) and part.columns is not None
        assert len(part.columns) == -(-length // part.block)
        for number, columns in enumerate(part.columns):
            rows = slice(number * part.block, min(length, (number + 1) * part.block))
            listed = columns if isinstance(columns, Tensor) else torch.arange(*columns)
            if isinstance(columns, Tensor):
                assert (listed.diff() > 0).all() and (listed.diff() > 1).any(), "columns side by side are a span"
            tile = part.tile(rows, columns)
            count[..., order[rows, None], order[listed]] += tile.int()
            away = (order[rows, None] - order[listed]).abs()
            assert part.distance(rows, columns).expand_as(tile).equal(away.expand_as(tile))
            if part.query_documents is None:
                assert tile.any(dim=-2).all(), "a column that nobody in the block reads"
            computed += (rows.stop - rows.start) * len(listed)
    return count, computed


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(choices.MASK.names), configs, st.integers(1, 24), st.integers(0, 26), st.integers(1, 9))
def test_masks_are_their_pairs(name: str, config: ModelConfig, length: int, prefix: int, block: int) -> None:
    rule = choices.MASK.get(name).of(config)
    prefix = prefix if name == "prefix_lm" else 0
    expected = square(pairs_of(name, length, config, prefix), length)
    places = torch.arange(length)
    assert rule.allowed(places, places, prefix).equal(expected)
    assert expected.diagonal().all(), "everyone reads itself"
    assert (name == "causal") == rule.is_plain_causal
    if rule.shift_invariant:  # … and only then may positions be counted from anywhere
        assert rule.allowed(places + 5, places + 5).equal(expected)

    seen = Visibility.of_sequence(rule, length, block=block, prefix=prefix)
    assert seen.matrix().equal(expected)
    count, computed = read_by_blocks(seen)
    assert count.equal(expected.int()), "every pair once"
    assert scores_computed(rule, length, block, prefix) == computed


def test_rules_that_ask_for_positions_do_change_with_them() -> None:
    config = ModelConfig(stride=4, mask_block=4, global_tokens=1)
    places = torch.arange(12)
    for name in choices.MASK.names:
        rule = choices.MASK.get(name).of(config)
        moved = rule.allowed(places + 3, places + 3, 5)
        assert rule.allowed(places, places, 5).equal(moved) == rule.shift_invariant, name


def test_rules_are_equal_by_what_they_say() -> None:
    """Plans are kept per rule, so that equal rules share one and others do not."""
    assert SlidingWindow(3) == SlidingWindow(3) != SlidingWindow(4)
    assert hash(Fixed(4, 1)) == hash(Fixed(4, 1)) and Fixed(4, 1) != Fixed(4, 2)
    assert len({Causal(), Strided(2), Strided(2), BlockSparse(2, 1, 0), BlockSparse(2, 1, 1), PrefixLM()}) == 5
    narrow, wide = columns_per_block(SlidingWindow(3), 300), columns_per_block(SlidingWindow(130), 300)
    assert narrow == (((0, 128),), ((126, 256),), ((254, 300),))
    assert wide == (((0, 128),), ((0, 256),), ((127, 300),))
    assert isinstance(plan_of(BlockSparse(64, 1, 2), 300, None)[2], Tensor)


SMALL: dict[str, Any] = {
    "window": 3,
    "stride": 3,
    "stride_summary": 2,
    "mask_block": 2,
    "mask_local_blocks": 1,
    "global_tokens": 1,
}
CONFIG = ModelConfig(**SMALL)
every_mask = pytest.mark.parametrize("name", choices.MASK.names)


@every_mask
@pytest.mark.parametrize("past", [1, 4, 9])
def test_after_what_the_cache_holds(name: str, past: int) -> None:
    rule = choices.MASK.get(name).of(CONFIG)
    expected = square(pairs_of(name, past + 3, CONFIG), past + 3)[past:]
    positions = torch.arange(past, past + 3)
    for given_positions in (None, positions):
        seen = visibility(rule, 3, positions=given_positions, past=past)
        assert seen is not None and seen.columns is None
        assert seen.matrix().equal(expected)
        assert seen.distance(*seen.everything).equal((positions[:, None] - torch.arange(past + 3)).abs())


@every_mask
@pytest.mark.parametrize("past", [0, 4])
def test_padding_at_the_left_of_rows(name: str, past: int) -> None:
    """Positions are counted from the first real token of each row."""
    length, padding = 5, torch.tensor([0, 2, 3])
    total = past + length
    slots = torch.arange(total)
    key_mask = slots >= padding[:, None]
    positions = (slots[past:] - padding[:, None]).clamp(min=0)
    rule = choices.MASK.get(name).of(CONFIG)
    seen = visibility(rule, length, positions=positions, past=past, padding=padding, key_mask=key_mask, prefix=2)
    assert seen is not None
    found = seen.matrix()
    assert found.shape == (3, 1, length, total)
    assert seen.distance(*seen.everything).shape[-2:] == (length, total)
    for row, pad in enumerate(padding.tolist()):
        alone = square(pairs_of(name, total - pad, CONFIG, prefix=2), total - pad)
        real = max(0, pad - past)  # queries before this are padding themselves
        assert found[row, 0, real:, pad:].equal(alone[past + real - pad :])
        assert not found[row, 0, :, :pad].any(), "padding is never read"
        apart = seen.distance(*seen.everything).expand(3, 1, length, total)[row, 0, real:, pad:]
        assert apart.equal((slots[past + real :, None] - slots[pad:]).abs())


@every_mask
@pytest.mark.parametrize("restart", [False, True])
def test_documents_are_apart(name: str, restart: bool) -> None:
    """With positions that begin anew, each document is as if alone; without, a rule holds for places in the row."""
    rows = [[1, 4, 7], [12], [5, 7]]
    documents = torch.stack([torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n)) for n in rows])
    positions = torch.stack([torch.cat([torch.arange(part) for part in n]) for n in rows])
    rule = choices.MASK.get(name).of(CONFIG)
    seen = visibility(rule, 12, positions=positions if restart else None, documents=documents, prefix=4)
    assert seen is not None
    found, whole = seen.matrix(), square(pairs_of(name, 12, CONFIG, prefix=4), 12)
    assert found.shape == (3, 1, 12, 12)
    for row, parts in enumerate(rows):
        alone = torch.block_diag(*[square(pairs_of(name, n, CONFIG, prefix=4), n).int() for n in parts]).bool()
        same = documents[row, :, None] == documents[row]
        expected = alone if restart else whole & same
        assert found[row, 0].equal(expected)
        assert (alone.equal(whole & same)) or not rule.shift_invariant
    planned = all(part.columns is not None for part in planned_parts(seen))
    assert planned == (rule.shift_invariant or not restart)
    if planned:
        assert read_by_blocks(seen)[0].equal(found.int())


def test_a_prefix_per_row() -> None:
    prefixes = torch.tensor([0, 1, 3, 7])
    seen = visibility(PrefixLM(), 6, prefix=prefixes)
    assert seen is not None and seen.columns is None
    found = seen.matrix()
    assert found.shape == (4, 1, 6, 6)
    for row, prefix in enumerate(prefixes.tolist()):
        assert found[row, 0].equal(square(pairs_of("prefix_lm", 6, CONFIG, prefix), 6))
    one = visibility(PrefixLM(), 6, prefix=3)
    assert one is not None and one.matrix().equal(found[2, 0])


@every_mask
def test_only_the_plain_triangle_is_left_to_the_kernels(name: str) -> None:
    rule = choices.MASK.get(name).of(CONFIG)
    assert (visibility(rule, 5) is None) == (name == "causal")
    if name == "causal":
        documents = torch.tensor([0, 0, 1, 1, 1])
        key_mask = torch.tensor([[False, True, True, True, True]])
        assert visibility(rule, 5, positions=torch.arange(5), prefix=3) is None
        for asked in ({"past": 1}, {"documents": documents}, {"key_mask": key_mask}, {"distances": True}):
            assert visibility(rule, 5, **asked) is not None, asked


def test_a_tile_is_a_part_of_the_matrix() -> None:
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 2, 2, 2]])
    seen = visibility(SlidingWindow(3), 7, documents=documents)
    assert seen is not None
    rows = slice(2, 6)
    for columns, listed in (((1, 5), [1, 2, 3, 4]), (torch.tensor([0, 3, 4]), [0, 3, 4])):
        assert seen.tile(rows, columns).equal(seen.matrix()[..., rows, :][..., listed])
        away = seen.distance(rows, columns)
        assert away.equal((torch.arange(2, 6)[:, None] - torch.tensor(listed)).abs())


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([*choices.MASK.names, "strided far"]),
    st.integers(1, 40),
    st.integers(1, 12),
    st.integers(0, 45),
    st.tuples(st.integers(1, 12), st.integers(1, 9), st.integers(1, 4), st.integers(0, 12)),
)
def test_the_columns_a_rule_says_are_those_found_by_asking(
    name: str, length: int, block: int, prefix: int, sizes: tuple[int, int, int, int]
) -> None:
    window, stride, few, first = sizes
    config = ModelConfig(
        window=window,
        stride=stride,
        stride_summary=min(few, stride),
        mask_block=stride,
        mask_local_blocks=few,
        global_tokens=first,
    )
    rule = StridedFar(stride) if name == "strided far" else choices.MASK.get(name).of(config)
    plan = columns_per_block(rule, length, block, prefix)
    for start, spans in zip(range(0, length, block), plan, strict=True):
        assert spans == spans_by_asking(rule, start, min(start + block, length), length, prefix)


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("keys", [4, 5, 6])
def test_a_window_beyond_all_keys_is_the_triangle(queries: int, keys: int) -> None:
    places = torch.arange(keys)
    seen = Visibility(SlidingWindow(5), places[keys - queries :], places)
    plain = Visibility(Causal(), places[keys - queries :], places)
    assert seen.is_triangle == (keys <= 5 and queries in (1, keys))
    assert not seen.is_triangle or seen.matrix().equal(plain.matrix())
    for change in ({"key_mask": torch.ones(1, keys).bool()}, {"query_documents": places, "key_documents": places}):
        assert not replace(seen, **change).is_triangle
    assert not replace(seen, rule=Strided(5)).is_triangle
