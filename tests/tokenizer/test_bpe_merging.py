"""The merge loops: textbook == reference == compiled, on anything."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import bpe_oracle as oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scratchlm.tokenizer import merging, merging_fast
from scratchlm.tokenizer.merging import merge_words
from scratchlm.tokenizer.merging_fast import merge_words_fast

LOOPS = [merge_words, merge_words_fast]

# Few different bytes: many ties, many runs; and any bytes at all.
words = st.one_of(
    st.dictionaries(st.text("ab", min_size=1, max_size=14).map(str.encode), st.integers(1, 4), max_size=12),
    st.dictionaries(st.text("abc é", min_size=1, max_size=9).map(str.encode), st.integers(1, 50), max_size=20),
    st.dictionaries(st.binary(min_size=1, max_size=8), st.integers(1, 1 << 40), max_size=10),
)


def as_bytes(pairs: list[tuple[int, int]]) -> list[tuple[bytes, bytes]]:
    tokens = [bytes([byte]) for byte in range(256)]
    result = []
    for left, right in pairs:
        result.append((tokens[left], tokens[right]))
        tokens.append(tokens[left] + tokens[right])
    return result


@pytest.mark.parametrize("loop", LOOPS)
@given(table=words, merges=st.integers(0, 40), min_frequency=st.integers(1, 6))
@settings(deadline=None, max_examples=150)
def test_equals_the_textbook(loop, table, merges, min_frequency):
    assert as_bytes(loop(table, merges, min_frequency)) == oracle.train(table, merges, min_frequency)


@given(
    table=words,
    merges=st.integers(0, 40),
    min_frequency=st.integers(1, 6),
    step=st.integers(1, 9),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=150)
def test_any_guess_of_the_rounds_gives_the_same(table, merges, min_frequency, step, seed):
    """Too high, too low, one lower each time: the guess decides how many rounds there are, not what comes out."""
    rng = random.Random(seed)
    rounds = 0

    def guess(least, peak, achieved, wanted, min_frequency):
        nonlocal rounds
        rounds += 1
        highest = least - 1 if least else peak
        return max(1, min_frequency, highest // rng.randint(1, step) if rounds < 50 else 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging_fast, "_next_least", guess)
        patch.setattr(merging_fast, "_SKETCH", 4)  # nearly all pairs share a counter
        patch.setattr(merging_fast, "_BLOCK", 16)
        assert merge_words_fast(table, merges, min_frequency) == merge_words(table, merges, min_frequency)


@pytest.mark.slow
def test_wide_ids_and_wide_places(monkeypatch):
    """More than 65,534 tokens, and lists of places for more than 2 GB of words."""
    rng = random.Random(4)
    table = {
        "".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 14))).encode(): rng.randint(1, 300)
        for _ in range(3000)
    }
    expected = merge_words(table, 70_000)
    assert merge_words_fast(table, 70_000) == expected
    monkeypatch.setattr(merging_fast, "_INT32_PLACES", 0)
    assert merge_words_fast(table, 3000) == expected[:3000]


def test_fast_equals_reference_on_a_large_table():
    rng = random.Random(0)
    table = {}
    for _ in range(4000):
        word = "".join(rng.choices("etaoinshrdlu'é漢", k=rng.randint(1, 14))).encode()
        table[word] = rng.randint(1, 300)
    table |= {b"a" * length: length for length in (2, 3, 7, 500, 501)}
    expected = merge_words(table, 3000)
    assert len(expected) == 3000
    assert merge_words_fast(table, 3000) == expected


@pytest.mark.parametrize("loop", LOOPS)
def test_ties_go_to_the_greater_pair_of_byte_strings(loop):
    # All four pairs occur once. By ids, or by the joined bytes, the order would be another.
    assert as_bytes(loop({b"ab": 1, b"ac": 1, b"b\xff": 1, b"aa": 1}, 4)) == [
        (b"b", b"\xff"), (b"a", b"c"), (b"a", b"b"), (b"a", b"a"),
    ]  # fmt: skip
    # ("ab", "c") is greater than ("a", "z"), because "ab" > "a", though 0x63 < 0x7a.
    assert as_bytes(loop({b"ab": 9, b"abc": 1, b"az": 1}, 3)) == [(b"a", b"b"), (b"ab", b"c"), (b"a", b"z")]


@pytest.mark.parametrize("loop", LOOPS)
def test_runs_are_joined_from_the_left(loop):
    assert as_bytes(loop({b"aaaaa": 1}, 9)) == [(b"a", b"a"), (b"aa", b"aa"), (b"aaaa", b"a")]


@pytest.mark.parametrize("loop", LOOPS)
def test_nothing_to_merge(loop):
    assert loop({}, 5) == []
    assert loop({b"a": 7, b"b": 1}, 5) == []
    assert loop({b"ab": 7}, 0) == []


@pytest.mark.parametrize("loop", LOOPS)
def test_every_merge_is_ticked(loop):
    ticks: list[int] = []
    made = loop({b"abcdefgh": 3, b"xyz": 2}, 7, 1, ticks.append)
    assert sum(ticks) == len(made) == 7


def test_no_rescan_per_merge(monkeypatch):
    """The reference looks at the words that hold the pair, not at all words: counted, not timed."""
    looked_at = 0

    def counting(sequence):
        nonlocal looked_at
        looked_at += len(sequence)
        return pairwise(sequence)

    rng = random.Random(1)
    table = {"".join(rng.choices("abcdefghijklmnopqrst", k=8)).encode(): rng.randint(1, 9) for _ in range(3000)}
    monkeypatch.setattr(merging, "pairwise", counting)
    merges = 400
    assert len(merge_words(table, merges)) == merges
    everything = sum(map(len, table))
    assert everything < looked_at < everything + 0.05 * merges * everything


def test_compiled_loop_does_not_rescan_either():
    """Eighty times the merges on one table cost a few times as much; counting anew would cost near eighty times."""
    rng = random.Random(2)
    table = {"".join(rng.choices("abcdefghijklmnopqrst", k=9)).encode(): 1 for _ in range(40_000)}

    def seconds(merges: int) -> float:
        started = time.process_time()
        assert len(merge_words_fast(table, merges)) == merges
        return time.process_time() - started

    merge_words_fast({b"ab": 1}, 1)
    few, many = (min(seconds(merges), seconds(merges)) for merges in (50, 4000))
    assert many < 25 * few


def test_a_failure_in_the_bar_stops_the_compiled_loop():
    def fail(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_words_fast({b"ab": 1}, 1, 1, fail)


def test_compiled_code_is_kept_on_disk():
    merge_words_fast({b"ab": 1}, 1)
    folder = Path(merging_fast._merge.stats.cache_path)
    assert list(folder.glob("merging_fast._merge*.nbi")) and list(folder.glob("merging_fast._merge*.nbc"))


@pytest.mark.slow
def test_compiling_takes_seconds_once(tmp_path):
    script = (
        "import time; started = time.process_time()\n"  # of the processor: other programs do not count
        "from scratchlm.tokenizer.merging_fast import merge_words_fast\n"
        "merge_words_fast({b'ab': 1}, 1); print(time.process_time() - started)"
    )

    def seconds() -> float:
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        return float(done.stdout)

    cold, warm = seconds(), seconds()
    assert cold < 30, f"compiling took {cold:.1f} s"
    assert warm < cold / 2 and warm < 5, f"cold {cold:.1f} s, warm {warm:.1f} s: was nothing kept?"
