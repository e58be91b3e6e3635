"""The key/value cache: whatever the order in which tokens arrive, the logits are those of one full forward pass."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scratchlm.errors import UserError
from scratchlm.generate import KVCache
from scratchlm.model import ModelConfig, Transformer
from scratchlm.model.mask import window_slots

BASE = {"vocab_size": 50, "context_length": 24, "d_model": 32, "layers": 2, "heads": 4, "d_ff": 48}
VARIANTS = [
    {},
    {"kv_heads": 2},
    {"kv_heads": 1},
    {"kv_heads": 2, "attention_kernel": "reference"},
    {"kv_heads": 2, "attention_kernel": "blocked"},
    {"kernels": "reference", "kv_heads": 2},
    {"qk_norm": "head", "feedforward": "relu2", "tied_embeddings": True},
    {"position": "none"},
    {"head_dim": 6, "kv_heads": 2},
    {"layers": 0},
]


def build(**fields) -> Transformer:
    return Transformer(ModelConfig(**{**BASE, **fields}), seed=0).double().eval()


def named(fields) -> str:
    return "-".join(f"{name}={value}" for name, value in fields.items()) or "mha"


def read_in_pieces(model: Transformer, ids: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    cache = KVCache(model.config, ids.shape[0], ids.shape[1])
    pieces = []
    for piece in ids.split(sizes, dim=1):
        pieces.append(model(piece, cache=cache))
        cache.advance(piece.shape[1])
    assert cache.length == ids.shape[1]
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("sizes", [[1] * 20, [7, *[1] * 13], [5, 9, 6], [20]], ids=str)
@pytest.mark.parametrize("fields", VARIANTS, ids=named)
@torch.no_grad()
def test_logits_equal_the_full_forward_pass(fields, sizes):
    model = build(**fields)
    ids = torch.randint(50, (3, 20), generator=torch.Generator().manual_seed(1))
    # Double precision, but the angles of RoPE are in single: the last digits depend on how they came about.
    torch.testing.assert_close(read_in_pieces(model, ids, sizes), model(ids), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_padding_on_the_left_changes_no_row():
    model = build(kv_heads=2)
    lengths = [9, 4, 1, 6]
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(50, (length + 5,), generator=generator) for length in lengths]
    longest = max(lengths)
    padding = torch.tensor([longest - length for length in lengths])
    cache = KVCache(model.config, len(rows), longest + 5, padding=padding)
    first = torch.stack(
        [
            torch.cat([torch.zeros(longest - n, dtype=torch.int64), row[:n]])
            for n, row in zip(lengths, rows, strict=True)
        ]
    )
    logits = model(first, (torch.arange(longest) - padding[:, None]).clamp(min=0), cache=cache)[:, -1]
    cache.advance(longest)
    for step in range(6):
        for index, (length, row) in enumerate(zip(lengths, rows, strict=True)):
            expected = model(row[None, : length + step])[0, -1]
            torch.testing.assert_close(logits[index], expected, rtol=1e-5, atol=1e-5)
        if step < 5:
            newest = torch.stack([row[n + step] for n, row in zip(lengths, rows, strict=True)])[:, None]
            places = torch.tensor([[n + step] for n in lengths])
            logits = model(newest, places, cache=cache)[:, -1]
            cache.advance(1)


def test_padding_keys_and_values_are_zero_even_where_they_were_not_finite():
    config = ModelConfig(**BASE)
    cache = KVCache(config, 2, 6, padding=torch.tensor([2, 0]))
    k = torch.full((2, 4, 3, 8), float("nan"))
    k[0, :, 2], k[1] = 1.0, 2.0
    kept = cache.append(0, {"k": k, "v": k})
    keys, values = kept["k"], kept["v"]
    assert (keys[0, :, :2] == 0).all() and (values[0, :, :2] == 0).all()
    assert (keys[0, :, 2] == 1).all() and (keys[1] == 2).all()
    mask = cache.key_mask(2, 4)
    assert mask is not None and mask.tolist() == [[False, False, True, True], [True] * 4]


def test_steps_write_in_place_and_return_views():
    config = ModelConfig(**BASE)
    cache = KVCache(config, 1, 8, dtype=torch.bfloat16)
    first = cache.append(1, {"k": torch.ones(1, 4, 3, 8), "v": torch.ones(1, 4, 3, 8)})["k"]
    cache.advance(3)
    second = cache.append(1, {"k": torch.ones(1, 4, 1, 8), "v": torch.ones(1, 4, 1, 8)})["k"]
    assert first.dtype == second.dtype == torch.bfloat16
    assert first.data_ptr() == second.data_ptr()  # nothing was copied
    assert second.shape == (1, 4, 4, 8)


def test_memory_is_what_bytes_per_token_says():
    config = ModelConfig(**{**BASE, "kv_heads": 2})
    model = build(kv_heads=2).float()
    cache = KVCache(config, 3, 10)
    with torch.no_grad():
        model(torch.zeros(3, 4, dtype=torch.int64), cache=cache)
    rooms = [room for layer in cache._slots for room in layer.values()]
    assert sum(room.numel() * room.itemsize for room in rooms) == 3 * 10 * KVCache.bytes_per_token(config)
    assert (
        KVCache.bytes_per_token(config, torch.bfloat16) == 2 * 2 * 2 * 8 * 2
    )  # K and V, layers, heads, width, bytes


@torch.no_grad()
def test_rows_can_be_dropped():
    model = build(kv_heads=2)
    ids = torch.randint(50, (4, 7), generator=torch.Generator().manual_seed(3))
    cache = KVCache(model.config, 4, 12, padding=torch.tensor([0, 2, 1, 0]))
    model(ids[:, :6], (torch.arange(6) - torch.tensor([[0], [2], [1], [0]])).clamp(min=0), cache=cache)
    cache.advance(6)
    cache.keep([1, 3])
    logits = model(ids[[1, 3], 6:], torch.tensor([[4], [6]]), cache=cache)[:, -1]
    for row, (index, skipped) in enumerate([(1, 2), (3, 0)]):
        torch.testing.assert_close(
            logits[row], model(ids[index : index + 1, skipped:])[0, -1], rtol=1e-5, atol=1e-5
        )


def test_too_many_tokens_and_empty_caches_are_refused():
    config = ModelConfig(**BASE)
    cache = KVCache(config, 1, 4)
    with pytest.raises(UserError, match="holds 4 tokens, 5 were given"):
        cache.append(0, {"k": torch.zeros(1, 4, 5, 8)})
    for batch, length in ((0, 4), (1, 0)):
        with pytest.raises(UserError, match="holds nothing"):
            KVCache(config, batch, length)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(1, 3))
def test_a_window_holds_the_last_positions_whatever_the_pieces(reach: int, sizes: list[int], rows: int) -> None:
    total = sum(sizes)
    written = torch.arange(rows * total * 2, dtype=torch.float64).view(rows, 1, total, 2)
    cache = KVCache(ModelConfig(**{**BASE, "layers": 1}), rows, total)
    at = 0
    for size in sizes:
        piece = written[:, :, at : at + size]
        kept = cache.append(0, {"k": piece, "v": -piece}, reach)
        at += size
        first = max(0, at - size - reach + 1)
        assert kept["k"].equal(written[:, :, first:at]) and kept["v"].equal(-kept["k"])
        assert cache._slots[0]["k"].shape[-2] == min(window_slots(reach), total)
        cache.advance(size)


def test_most_steps_of_a_window_move_nothing() -> None:
    cache, moves = KVCache(ModelConfig(**{**BASE, "layers": 1}), 1, 2000), 0
    for step in range(2000):
        cache.append(0, {"k": torch.full((1, 1, 1, 2), float(step))}, 64)
        moves += cache._ends[0]["k"] == 63  # the window is at the front again
        cache.advance(1)
    assert 1 <= moves <= 2000 // 32


def test_dropping_rows_keeps_windows() -> None:
    cache = KVCache(ModelConfig(**{**BASE, "layers": 1}), 3, 50)
    cache.append(0, {"k": torch.arange(3.0).view(3, 1, 1, 1).expand(3, 1, 9, 2)}, 4)
    cache.advance(9)
    cache.keep([2, 0])
    kept = cache.append(0, {"k": torch.full((2, 1, 1, 2), 7.0)}, 4)["k"]
    assert kept[:, 0, :, 0].tolist() == [[2, 2, 2, 7], [0, 0, 0, 7]]
