"""Memory that is used again: never while an array refers to it, and no more than the limit is kept."""

from __future__ import annotations

import gc
import random
import threading

import bpe_oracle as oracle
import numpy as np
import pytest

from scratchlm.tokenizer import Tokenizer, buffers, encoding, fast_encoder
from scratchlm.tokenizer.buffers import HUGE, Buffers


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_memory_comes_back_when_its_last_view_is_gone():
    pool = Buffers()
    first = pool.take(10, np.uint16)
    assert first.dtype == np.uint16 and len(first) >= 10 and first.flags.writeable
    place, view = address(first), first[2:5]
    view[:] = 7
    del first
    gc.collect()
    assert pool.kept == 0
    other = pool.take(10, np.uint32)
    assert address(other) != place
    other[:] = 0
    assert view.tolist() == [7, 7, 7]
    del view
    gc.collect()
    assert pool.kept == HUGE
    assert address(pool.take(HUGE // 4, np.uint32)) == place


def test_what_is_kept_is_limited_and_fits(monkeypatch):
    monkeypatch.setattr(buffers, "MOST_KEPT", 3 * HUGE)
    pool = Buffers()
    arrays = [pool.take(size * HUGE, np.uint8) for size in (1, 1, 2, 40)]
    large = address(arrays[2])
    while arrays:
        arrays.pop(0)
    gc.collect()
    assert pool.kept <= 3 * HUGE
    assert len(pool.take(1, np.uint8)) == HUGE, "not eight million bytes for one"
    del pool
    pool = Buffers()
    large = address(pool.take(2 * HUGE, np.uint8))
    assert address(pool.take(HUGE + 1, np.uint8)) == large


def test_threads_never_get_the_same_memory():
    pool, wrong = Buffers(), []

    def work(number: int) -> None:
        for _ in range(300):
            arrays = [pool.take(1000, np.uint16) for _ in range(3)]
            for array in arrays:
                array[:1000] = number
            wrong.extend(1 for array in arrays if not (array[:1000] == number).all())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("threads", [1, 2])
def test_results_stay_what_they_are(monkeypatch, threads):
    """Arrays kept from earlier calls, beside calls whose memory comes from those given back."""
    monkeypatch.setattr(encoding, "_SMALL", -1)
    monkeypatch.setattr(encoding, "_FIRST", -1)
    monkeypatch.setattr(encoding, "_FIRST_EVER", -1)
    monkeypatch.setattr(encoding, "_WORTH_THREAD", 1)
    monkeypatch.setattr(fast_encoder, "HUGE", 1)
    monkeypatch.setattr(fast_encoder, "PIECE", 1 << 10)
    tokenizer = Tokenizer(oracle.trained().vocab, oracle.trained().merges, [oracle.EOT])
    words = oracle.TEXT.split(" ")
    rng = random.Random(threads)
    kept: list[tuple[str, np.ndarray]] = []
    for _ in range(60):
        texts = [" ".join(rng.choices(words, k=rng.randint(0, 300))) for _ in range(rng.randint(1, 8))]
        kept += zip(texts, tokenizer.encode_batch(texts, threads), strict=True)
        kept.append((texts[0], tokenizer.encode_array(texts[0], threads=threads)))
        rng.shuffle(kept)
        del kept[20:]
        for text, ids in kept:
            assert tokenizer.decode(ids) == text
        kept[0][1][:] = 0  # a result belongs to whoever got it
        del kept[0]
    assert tokenizer._encoder._fast.buffers.kept > 0
