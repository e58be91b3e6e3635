"""Special tokens: kept whole, longest first, allowed or refused as asked."""

from __future__ import annotations

import bpe_oracle as oracle
import pytest
from hypothesis import given, settings

from scratchlm.errors import UserError
from scratchlm.tokenizer.stream import SpecialSplitter

END, TWICE, BANG = "<|end|>", "<|end|><|end|>", "<|end|>!"


@pytest.fixture
def tokenizer():
    return oracle.trained("gpt2", tuple(oracle.OVERLAPPING))


def names(tokenizer, text, **options):
    return [tokenizer.vocab[index].decode() for index in tokenizer.encode(text, **options)]


@given(text=oracle.special_texts)
@settings(deadline=None, max_examples=200)
def test_splits_as_a_naive_scan_does(text):
    parts = SpecialSplitter(oracle.OVERLAPPING).split(text)
    expected = oracle.cut_specials(text, oracle.OVERLAPPING)
    assert [(part, index % 2 == 1) for index, part in enumerate(parts)] == expected


def test_longest_first(tokenizer):
    assert names(tokenizer, TWICE) == [TWICE]
    assert names(tokenizer, END * 3) == [TWICE, END]
    assert names(tokenizer, END + "!") == [BANG]
    assert names(tokenizer, TWICE + "!") == [TWICE, "!"]
    assert names(tokenizer, "a" + END + " b") == ["a", END, " b"]


def test_order_of_the_list_does_not_matter(tokenizer):
    reverse = oracle.trained("gpt2", tuple(reversed(oracle.OVERLAPPING)))
    assert names(reverse, END * 3 + "!") == names(tokenizer, END * 3 + "!")


def test_by_default_all_are_kept_whole(tokenizer):
    for special, index in tokenizer.special_tokens.items():
        assert tokenizer.encode(special) == tokenizer.encode_array(special).tolist() == [index]
        assert list(tokenizer.encode_iterable([special])) == [index]
        assert tokenizer.encode_batch([special])[0].tolist() == [index]


def test_text_beside_a_special_is_cut_as_if_alone(tokenizer):
    # Without the boundary the pattern would see "don't" and "  x" otherwise.
    for left, right in [("don", "'t"), ("  ", "x"), (" ", " x"), ("a\n", "\nb")]:
        expected = [*tokenizer.encode(left), tokenizer.special_tokens[END], *tokenizer.encode(right)]
        assert tokenizer.encode(left + END + right) == expected


def test_not_allowed_is_ordinary_text(tokenizer):
    special_ids = set(tokenizer.special_tokens.values())
    ids = tokenizer.encode("x" + oracle.EOT + TWICE, allowed_special=())
    assert not special_ids & set(ids)
    assert tokenizer.decode(ids) == "x" + oracle.EOT + TWICE
    assert names(tokenizer, TWICE, allowed_special={END}) == [END, END]
    assert list(tokenizer.encode_iterable(["x" + oracle.EOT, TWICE], allowed_special=())) == ids
    tiktoken = pytest.importorskip("tiktoken")
    assert tiktoken
    plain = oracle.trained()
    assert plain.encode("a" + oracle.EOT, allowed_special=()) == oracle.as_tiktoken(plain).encode_ordinary(
        "a" + oracle.EOT
    )


def test_disallowed_is_refused_with_its_place(tokenizer):
    for disallowed in ("all", {oracle.EOT}):
        with pytest.raises(UserError, match=r"disallowed special token '<\|endoftext\|>' at character 3"):
            tokenizer.encode("abc" + oracle.EOT, allowed_special=(), disallowed_special=disallowed)
        with pytest.raises(UserError, match=r"disallowed special token '<\|endoftext\|>' at character 6"):
            list(
                tokenizer.encode_iterable(
                    ["abc", "abc<|endo", "ftex", "t|>"], allowed_special=(), disallowed_special=disallowed
                )
            )
    # "all" disallows those that are not allowed.
    assert names(tokenizer, "a" + END, allowed_special={END}, disallowed_special="all") == ["a", END]
    with pytest.raises(UserError, match="disallowed"):
        tokenizer.encode(END, disallowed_special={END})


@pytest.mark.parametrize("argument", ["allowed_special", "disallowed_special"])
def test_unknown_names_are_refused(tokenizer, argument):
    with pytest.raises(UserError, match=f"{argument}: '<other>' is not a special token; there are"):
        tokenizer.encode("a", **{argument: {"<other>"}})
    with pytest.raises(UserError, match=f"{argument} = '<other>': give \"all\" or a set"):
        tokenizer.encode("a", **{argument: "<other>"})


def test_text_without_specials_and_tokenizer_without_specials():
    plain = oracle.trained("gpt2", ())
    assert plain.special_tokens == {}
    text = "a" + oracle.EOT
    assert plain.decode(plain.encode(text, allowed_special="all", disallowed_special="all")) == text


def test_characters_special_to_regular_expressions():
    specials = ("[PAD]", "a.c", "(x|y)*", "\\n", "^", "é+", "\n\n")
    tokenizer = oracle.trained("gpt2", specials, 400)
    for special in specials:
        assert tokenizer.decode(tokenizer.encode(f"x{special}y")) == f"x{special}y"
        assert tokenizer.special_tokens[special] in tokenizer.encode(f"x{special}y")
    assert tokenizer.special_tokens["a.c"] not in tokenizer.encode("abc")
