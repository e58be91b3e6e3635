"""Lazy encoding: the ids of the joined text for any chunks, in memory that does not grow with the text."""

from __future__ import annotations

import itertools
import subprocess
import sys

import bpe_oracle as oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scratchlm.errors import UserError
from scratchlm.tokenizer import PATTERNS, stream, train_bpe
from scratchlm.tokenizer import encoding as encoding_module

FREE = [
    r"\p{L}+",
    r"\S+\s?",
    r"(?<=a)b+|\S",
    r"^\S+|\s+|\S+$",
    r"\bthe\b|.",
    r"\w+(?:'\w+)?|[^\w\s]+|\s+(?!\S)|\s+",
    r"a|ab|abc",
]


@st.composite
def chunked(draw):
    text = draw(oracle.special_texts)
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return text, [text[start:stop] for start, stop in itertools.pairwise([0, *places, len(text)])]


@pytest.mark.parametrize("block", [1, 5, 40])
@pytest.mark.parametrize("pattern", [*PATTERNS, *FREE])
@given(case=chunked())
@settings(deadline=None, max_examples=25)
def test_ids_equal_encode_of_the_joined_text(pattern, block, case):
    text, chunks = case
    tokenizer = oracle.trained(pattern, tuple(oracle.OVERLAPPING))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "BLOCK", block)
        assert list(tokenizer.encode_iterable(chunks)) == tokenizer.encode(text)


@pytest.mark.parametrize("pattern", oracle.PATTERN_NAMES)
@pytest.mark.parametrize("block", [1, 3, 1 << 16])
def test_every_split_in_two_and_single_characters(pattern, block, monkeypatch):
    """Inside special tokens, contractions, line ends, runs of white space, combined characters, numbers."""
    monkeypatch.setattr(stream, "BLOCK", block)
    tokenizer = oracle.trained(pattern, tuple(oracle.OVERLAPPING))
    text = "they'll<|end|><|end|>!<|endof <|endoftext|>don't  \r\n\n x\r\ne\u0301 1234567 漢字<|en"
    expected = tokenizer.encode(text)
    for cut in range(len(text) + 1):
        assert list(tokenizer.encode_iterable([text[:cut], text[cut:]])) == expected
    assert list(tokenizer.encode_iterable(text)) == expected
    assert list(tokenizer.encode_iterable(["", *text, "", ""])) == expected


def test_nothing_gives_nothing():
    tokenizer = oracle.trained()
    assert list(tokenizer.encode_iterable([])) == list(tokenizer.encode_iterable(["", ""])) == []


def test_a_file_is_an_iterable(tmp_path):
    tokenizer = oracle.trained("o200k")
    path = tmp_path / "text.txt"
    path.write_bytes((oracle.TEXT * 30).encode())
    with path.open(encoding="utf-8", newline="") as file:
        assert list(tokenizer.encode_iterable(file)) == tokenizer.encode(oracle.TEXT * 30)


@pytest.mark.parametrize("pattern", [*oracle.PATTERN_NAMES, r"\p{L}+"])
def test_ids_come_before_the_text_has_ended(pattern):
    """An endless text."""
    tokenizer = oracle.trained(pattern)
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield "the theory, it's "

    ids = list(itertools.islice(tokenizer.encode_iterable(endless()), 30_000))
    assert ids == tokenizer.encode("the theory, it's " * read)[:30_000]
    assert read * 17 < 30_000 * 10 + 2 * stream.BLOCK


def test_not_started_before_asked():
    def failing():
        raise AssertionError("read too early")
        yield ""

    oracle.trained().encode_iterable(failing())


def test_errors_name_the_chunk_type():
    with pytest.raises(UserError, match="chunk of type bytes; open files as text"):
        list(oracle.trained().encode_iterable([b"ab"]))  # type: ignore[list-item]


def test_a_long_pre_token_in_small_chunks_takes_linear_time(monkeypatch):
    """No natural break: looked through again only when it has doubled."""
    looked_at = 0

    def counting(self, text):
        nonlocal looked_at
        looked_at += len(text)
        return original(self, text)

    original = stream.TextStream._take
    monkeypatch.setattr(stream.TextStream, "_take", counting)
    tokenizer = oracle.trained()
    length = 150_000
    assert list(tokenizer.encode_iterable("a" for _ in range(length))) == tokenizer.encode("a" * length)
    assert looked_at < 4 * length


# ------------------------------------------------------------------ memory

# VmHWM is the peak of this program alone; ru_maxrss may still hold that of the process that started it.
SCRIPT = """
import collections, sys
from scratchlm.tokenizer import Tokenizer, encoding
encoding._FIRST_EVER = -1  # compiled, as always but for the first time on a machine

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

kind, megabytes, path = sys.argv[1], float(sys.argv[2]), sys.argv[3]
loaded = Tokenizer.load(path)
tokenizer = Tokenizer(loaded.vocab, loaded.merges, loaded.special_tokens, cache_bytes=1 << 20)
sentence = "The theory of the sea, it's said, was told in 1234 words; we'll see it too.\\n"

def chunks():
    made, number = 0, 0
    while made < megabytes * 1e6:
        number += 1
        text = sentence.replace("1234", str(number)) * 20
        made += len(text)
        if kind == "letters":
            yield from text
        else:
            yield text

source = chunks()
if kind == "one run":
    source = ("e" * 1000 for _ in range(int(megabytes * 1000)))
if kind == "one chunk":
    source = ["".join(source)]
collections.deque(tokenizer.encode_iterable(["warm up " * 200_000]), maxlen=0)
before = peak()
[(count, _)] = collections.deque(enumerate(tokenizer.encode_iterable(source), 1), maxlen=1)
print(count, before, peak())
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    # One that knows the words of the text: fewer ids, less time.
    words = "The theory of the sea, it's said, was told in words; we'll see it too.\n" * 2
    tokenizer = train_bpe([words + oracle.TEXT], 400, [oracle.EOT])
    return tokenizer.save(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


def measure(kind: str, megabytes: float, path) -> tuple[int, int, int]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, kind, str(megabytes), str(path)], capture_output=True, text=True, check=True
    )
    count, before, after = map(int, done.stdout.split())
    return count, before, after


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/status to measure peak memory")
def test_peak_memory_does_not_grow_with_the_text(saved):
    small_count, _, small = measure("lines", 5, saved)
    large_count, _, large = measure("lines", 60, saved)
    assert large_count > 11 * small_count
    assert large < small + 25e6, f"peak {small / 1e6:.0f} MB for 5 MB of text, {large / 1e6:.0f} MB for 60 MB"
    assert large < 260e6  # Numba and what it compiled are most of it


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/status to measure peak memory")
@pytest.mark.parametrize(("kind", "megabytes"), [("letters", 2), ("one chunk", 10)])
def test_peak_memory_for_other_chunks(saved, kind, megabytes):
    count, before, after = measure(kind, megabytes, saved)
    assert count > megabytes * 1e5
    # Held as pre-tokens or ids, the text would take many times its length.
    assert after < before + 25e6, f"{(after - before) / 1e6:.0f} MB more for {megabytes} MB of text"


def test_blocks_are_taken_from_a_large_chunk(monkeypatch):
    largest = 0

    def watching(self, text):
        nonlocal largest
        largest = max(largest, len(text))
        return original(self, text)

    original = stream.TextStream._take
    monkeypatch.setattr(stream.TextStream, "_take", watching)
    tokenizer = oracle.trained()
    text = oracle.TEXT * 200
    assert list(tokenizer.encode_iterable([text])) == tokenizer.encode(text)
    assert len(text) > 6 * stream.BLOCK and largest < 3 * stream.BLOCK
    assert encoding_module._PART <= stream.BLOCK


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/status to measure peak memory")
def test_peak_memory_of_a_run_without_break_is_proportional_to_it(saved):
    """What cannot be bounded is at least small: a run is not held as a list of Python tuples."""
    count, before, after = measure("one run", 1, saved)
    assert count > 1e5
    assert after - before < 150 * 1e6, f"{(after - before) / 1e6:.0f} bytes for each byte of the run"
