"""Ids → text by the compiled loops: texts of every width of characters, bytes that are no text, and lists read where they lie in memory."""

from __future__ import annotations

import subprocess
import sys
from array import array
from typing import Any

import bpe_oracle as oracle
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scratchlm.errors import UserError
from scratchlm.tokenizer import Tokenizer, decoder, integer_list


@pytest.fixture(autouse=True)
def _always_compiled(monkeypatch):
    monkeypatch.setattr(decoder, "_FEW", -1)
    monkeypatch.setattr(decoder, "_FIRST", -1)


LETTERS = {
    "ascii": "az \n\0\x7f",
    "latin": "\x80éÿ",
    "16 bits": "Āж漢\ud7ff\ue000\uffff",
    "more": "😀\U00010000\U0010ffff",
}


@given(
    parts=st.lists(
        st.sampled_from([*LETTERS["ascii"], *LETTERS["latin"], *LETTERS["16 bits"], *LETTERS["more"]]), max_size=40
    ),
    widest=st.sampled_from(list(LETTERS)),
    step=st.integers(1, 9),
)
@settings(deadline=None, max_examples=150)
def test_a_text_as_narrow_as_it_can_be(parts, widest, step):
    allowed = "".join(list(LETTERS.values())[: list(LETTERS).index(widest) + 1])
    text = "".join(part for part in parts if part in allowed)
    tokenizer = oracle.trained()
    ids = tokenizer.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "_STEP", step)
        for form in (ids, np.array(ids, np.int64)):
            found = tokenizer.decode(form)
            assert found == text and hash(found) == hash(text)
            # A str that is wider than need be would equal no other: Python compares the widths first.
            assert sys.getsizeof(found) == sys.getsizeof("".join([*text])), "the form that Python gives it"
            assert found.isascii() == text.isascii() and found.encode() == text.encode()


@given(raw=st.binary(max_size=40), step=st.integers(1, 7))
@settings(deadline=None, max_examples=200)
def test_bytes_that_are_no_text(raw, step):
    tokenizer = oracle.trained()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "_STEP", step)
        assert tokenizer.decode([*raw]) == raw.decode(errors="replace")
        assert tokenizer.decode_bytes([*raw]) == raw


def test_a_str_that_may_not_be_written_to(monkeypatch):
    def refuse(*_: Any) -> int:
        raise SystemError("Cannot modify a string currently used")

    monkeypatch.setattr(decoder, "_copy_characters", refuse)
    assert oracle.trained().decode(oracle.trained().encode(oracle.TEXT)) == oracle.TEXT


def test_long_tokens_and_unused_ids():
    long = "ж" * 300
    vocab = {**{byte: bytes([byte]) for byte in range(256)}, 256: long.encode(), 257: b"\xf0\x9f"}
    tokenizer = Tokenizer(vocab, [], {"<|end|>": 310}, "gpt2")
    ids = [65, 256, 310, 257, 0x98, 0x80, 66]
    assert tokenizer.decode(ids) == "A" + long + "<|end|>😀B"
    with pytest.raises(UserError, match="id 301 at position 2 is not in the vocabulary: no token has it"):
        tokenizer.decode([65, 256, 301])


# ---------------------------------------------------------------- lists


@given(ids=st.lists(st.one_of(st.integers(0, 300), st.integers(0, (1 << 30) - 1)), max_size=100))
@settings(deadline=None, max_examples=200)
def test_a_list_read_where_it_lies(ids):
    found = integer_list.read(ids)
    if integer_list.forms() is None:
        pytest.skip("integers do not lie here as drawn")
    assert found is not None and found.dtype == np.uint32
    assert found.tolist() == ids


class Number(int):
    pass


@pytest.mark.parametrize("other", [-1, 1 << 30, 1 << 70, True, object(), Number(5), np.int64(5), 5.0, None, "5"])
@pytest.mark.parametrize("place", [0, 3, 6])
def test_what_is_no_plain_small_integer(other, place):
    assert integer_list.read([*range(place), other, *range(6 - place)]) is None


def test_only_lists():
    class Listed(list[int]):
        pass

    assert integer_list.read(Listed([1])) is None
    assert integer_list.read((1, 2)) is None  # type: ignore[arg-type]


def test_more_than_a_page():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 1 << 30, 1_200_000).tolist()
    rng.shuffle(ids)
    found = integer_list.read(ids)
    if integer_list.forms() is None:
        pytest.skip("integers do not lie here as drawn")
    assert found is not None and np.array_equal(found, np.frombuffer(array("I", ids), np.uintc))


def test_a_list_that_has_changed_length():
    """Another thread may have changed it between making room and reading."""
    found = integer_list.forms()
    if found is None:
        pytest.skip("integers do not lie here as drawn")
    ids = [1, 2, 3]
    for room in (2, 4):
        assert not integer_list._read(id(ids), id(int), *found, np.empty(room, np.uint32))
    assert integer_list._read(id(ids), id(int), *found, np.empty(3, np.uint32))


def test_ids_that_change_while_they_are_decoded(monkeypatch):
    """Counted, then written to by somebody else: an error, nothing outside of the text is touched."""
    tokenizer = oracle.trained()
    long = max(tokenizer.vocab, key=lambda index: len(tokenizer.vocab[index]))
    counting = decoder.Decoder._count
    for other, form in ((long, np.uint32), (tokenizer.vocab_size + 5, np.uint32)):
        ids = np.full(1000, 65, form)

        def count(self: Any, step: Any, numbers: np.ndarray, ids: np.ndarray = ids, other: int = other) -> Any:
            found = counting(self, step, numbers)
            ids[:] = other
            return found

        monkeypatch.setattr(decoder.Decoder, "_count", count)
        with pytest.raises(UserError, match="were changed while they were decoded"):
            tokenizer.decode_bytes(ids)
        monkeypatch.setattr(decoder.Decoder, "_count", counting)


def test_without_a_folder_for_compiled_code(tmp_path):
    """An installation that may not be written to, and no cache folder: compiled anew, but it works."""
    script = (
        "import numba.core.caching as caching\n"
        "caching.CacheImpl._locator_classes = []\n"
        "from scratchlm.tokenizer import integer_list\n"
        "assert integer_list.forms() is None or integer_list.read([5, 70_000]).tolist() == [5, 70_000]\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_another_layout_is_left_alone(monkeypatch):
    """Where integers do not lie as drawn, nothing is read, and ids are decoded all the same."""
    tokenizer = oracle.trained()
    ids = tokenizer.encode(oracle.TEXT)
    for name, value in (
        ("_SIZES", (16, 40, 28, 4)),
        ("_ITEMS", 16),
        ("_LENGTH", 8),
        ("_TYPE", 0),
        ("_FORM", 24),
        ("_DIGIT", 16),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(integer_list, name, value)
            integer_list.forms.cache_clear()
            assert integer_list.forms() is None, name
            assert integer_list.read(ids) is None
            assert tokenizer.decode(ids) == oracle.TEXT
    integer_list.forms.cache_clear()
    assert integer_list.forms() is not None or sys.implementation.name != "cpython"
