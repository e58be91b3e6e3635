"""Normalised text: as `unicodedata` does it, wherever chunks end; ids are Hugging Face's."""

from __future__ import annotations

import itertools
import pickle
import sys
import unicodedata

import bpe_oracle as oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scratchlm.tokenizer import Tokenizer
from scratchlm.tokenizer.normalization import FORMS, begins_anew, normalised, raw_parts
from scratchlm.tokenizer.stream import SpecialSplitter

# What combines: letters with marks before and after, Hangul in parts, marks out of order, singletons, ligatures.
SPECIALS = ("<|a|>", "<|a|><|b|>", "<é>")
pieces = st.sampled_from(
    ["e", "\u0301", "\u0323", "\u0301\u0323", "é", "ᄒ", "ᅡ", "ᆫ", "한", "Å", "Ω", "ﬁ", ">\u0338", "<|a|>", "<|b|>", "<|a", "|>", "<é>", "<", "漢",
     " ", "\n", "\u3099", "か", "x", "2", "\u09c7\u09be", "😀", "\u037e"]
)  # fmt: skip
texts = st.lists(pieces, max_size=20).map("".join)


def with_form(form: str | None, specials: tuple[str, ...] = SPECIALS) -> Tokenizer:
    plain = oracle.trained("gpt2", specials)
    return Tokenizer(plain.vocab, plain.merges, plain.special_tokens, "gpt2", normalizer=form)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_combines_with_what_precedes_a_character_that_begins_anew(form):
    """Every code point: after a character that takes every kind of mark, and alone."""
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        if 0xD800 <= code < 0xE000 or not begins_anew(character):
            continue
        alone = unicodedata.normalize(form, character)
        assert unicodedata.combining(alone[0]) == 0
        for before in ("e", "가", "\u09c7"):
            assert unicodedata.normalize(form, before + character) == unicodedata.normalize(form, before) + alone
    # The second halves of all compositions.
    seconds = set()
    for code in range(sys.maxunicode + 1):
        parts = unicodedata.decomposition(chr(code)).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            seconds.add(chr(int(parts[1], 16)))
    assert len(seconds) > 50 and not any(map(begins_anew, seconds))


@given(text=texts, form=st.sampled_from(FORMS), sizes=st.lists(st.integers(1, 7), min_size=1))
@settings(deadline=None)
def test_chunks(text, form, sizes):
    chunks, start = [], 0
    for size in itertools.cycle(sizes):
        if start >= len(text):
            break
        chunks.append(text[start : start + size])
        start += size
    import scratchlm.tokenizer.normalization as module

    block, module.BLOCK = module.BLOCK, 4
    try:
        assert "".join(normalised(chunks, form)) == unicodedata.normalize(form, text)
    finally:
        module.BLOCK = block
    splitter = SpecialSplitter(SPECIALS)
    parts = splitter.split(text)
    joined, specials, region = [], [], ""
    for piece, special in raw_parts(chunks, splitter):
        region += piece
        if special is not None:
            joined.append(region)
            specials.append(special)
            region = ""
    assert [*joined, region] == parts[::2] and specials == parts[1::2]


@given(text=texts, form=st.sampled_from(FORMS), size=st.integers(1, 9))
@settings(deadline=None)
def test_every_way_to_encode_gives_the_same(text, form, size):
    tokenizer, plain = with_form(form), with_form(None)
    expected = []
    for index, part in enumerate(SpecialSplitter(SPECIALS).split(text)):
        if index % 2:
            expected.append(plain.special_tokens[part])
        else:
            expected += plain.encode(unicodedata.normalize(form, part), allowed_special=())
    assert tokenizer.encode(text) == expected
    assert tokenizer.encode(text.encode()) == expected
    assert (
        tokenizer.encode_array(text).dtype == tokenizer.dtype and tokenizer.encode_array(text).tolist() == expected
    )
    assert [array.tolist() for array in tokenizer.encode_batch([text, text])] == [expected, expected]
    assert list(tokenizer.encode_iterable(text[i : i + size] for i in range(0, len(text), size))) == expected
    if hasattr(tokenizer, "count_tokens"):
        assert tokenizer.count_tokens(text) == len(expected)
    assert tokenizer.encode(text, allowed_special=()) == plain.encode(
        unicodedata.normalize(form, text), allowed_special=()
    )


def test_bytes_that_are_no_utf8_stay():
    tokenizer = with_form("NFC", ())
    assert tokenizer.decode_bytes(tokenizer.encode(b"\xffe\xcc\x81\xfe")) == b"\xff" + "é".encode() + b"\xfe"


def test_it_is_part_of_what_a_tokenizer_is(tmp_path):
    tokenizer, plain = with_form("NFC"), with_form(None)
    assert tokenizer != plain and len({with_form(form).content_hash for form in (*FORMS, None)}) == 5
    for again in (pickle.loads(pickle.dumps(tokenizer)), Tokenizer.load(tokenizer.save(tmp_path))):
        assert again == tokenizer and again.normalizer == "NFC"
        assert again.encode("e\u0301") == tokenizer.encode("e\u0301") != plain.encode("e\u0301")


@pytest.mark.parametrize("form", FORMS)
def test_ids_are_hugging_faces(form, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = with_form(form, ("<|a|>", "<|b|>"))
    other = tokenizers.Tokenizer.from_file(str(tokenizer.save(tmp_path)))

    @given(text=texts)
    @settings(deadline=None)
    def equal(text):
        assert tokenizer.encode(text) == other.encode(text, add_special_tokens=False).ids

    equal()
