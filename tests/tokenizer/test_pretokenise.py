"""Pre-tokenisation: the patterns, where a text may be cut, and what is settled before its end is known."""

from __future__ import annotations

import pickle
import string

import bpe_oracle as oracle
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from scratchlm.errors import UserError
from scratchlm.tokenizer.patterns import PATTERNS, WITH_SCANNER, Pattern

# Patterns of all kinds: gaps, empty matches, lazy, look-ahead; look-behind, anchors, word boundaries, flags.
FREE = [
    r"\p{L}+", r"\s+|\S+", r"\S+\s?", r".", r"(?s:.)", r"a*", r"\d{1,3}(?=(?:\d{3})*\b)", r"[^\s]+?(?=\s|[a-z])|\s",
    r"(?<=a)b+|\S", r"^\S+|\s+|\S+$", r"\bthe\b|.", r"(?i)THE|\S|\s", r"(\p{Lu})\1*|.", r"\p{N}{1,3}+|\P{N}+", r"a|ab|abc",
    r"(?:ab)+c|.", r"[[:alpha:]]+|[^[:alpha:]]", r"\X", r"x{e<=1}|.", r"\w+(?:'\w+)?|[^\w\s]+|\s+(?!\S)|\s+",
]  # fmt: skip

# Patterns without a name that count as local too.
KNOWN = [*PATTERNS, *(text for text in WITH_SCANNER if text not in PATTERNS.values())]


@given(text=oracle.texts)
@settings(deadline=None, max_examples=200)
@pytest.mark.parametrize("name", oracle.PATTERN_NAMES)
def test_named_patterns_cut_as_tiktokens_patterns_do(name, text):
    # tiktoken's `$` is the very end; in `regex` that is \Z.
    expected = oracle.pre_tokens(text, oracle.tiktoken_patterns()[name].replace("++$", r"++\Z"))
    assert Pattern(name).split(text) == expected


@given(text=st.text(st.sampled_from([*map(chr, range(128)), *" \n'stlve"]), max_size=60))
@settings(deadline=None, max_examples=300)
@pytest.mark.parametrize("name", KNOWN)
def test_ascii_twin_finds_the_same(name, text):
    pattern = Pattern(name)
    assert pattern._ascii.findall(text) == regex.findall(pattern.text, text)


@pytest.mark.parametrize("name", oracle.PATTERN_NAMES)
def test_ascii_twin_knows_every_ascii_character(name):
    pattern = Pattern(name)
    for first in map(chr, range(128)):
        for second in map(chr, range(128)):
            text = first + second + "x"
            assert pattern._ascii.findall(text) == regex.findall(PATTERNS[name], text), repr(text)


@given(text=oracle.texts)
@settings(deadline=None, max_examples=30)
@pytest.mark.parametrize("pattern", [*PATTERNS, *FREE])
def test_nothing_is_lost_and_gaps_are_pre_tokens(pattern, text):
    pieces = Pattern(pattern).split(text)
    assert "".join(pieces) == text
    assert all(pieces)
    assert pieces == oracle.pre_tokens(text, PATTERNS.get(pattern, pattern))


@given(left=oracle.texts, right=oracle.texts)
@settings(deadline=None, max_examples=100)
@pytest.mark.parametrize("name", KNOWN)
def test_safe_cuts_are_safe(name, left, right):
    text = f"{left} word\n{right} more"
    pattern = Pattern(name)
    whole = pattern.split(text)
    start = 0
    while (cut := pattern.safe_cut(text, start)) is not None:
        assert pattern.split(text[:cut]) + pattern.split(text[cut:]) == whole
        start = cut + 1
    assert Pattern(r"\p{L}+").safe_cut(text, 0) is None


@given(seen=oracle.texts, coming=oracle.texts)
@settings(deadline=None, max_examples=50)
@pytest.mark.parametrize("pattern", [*KNOWN, *FREE])
def test_what_is_settled_stays(pattern, seen, coming):
    compiled = Pattern(pattern)
    pieces, rest = compiled.settled(seen)
    assert "".join(pieces) == seen[:rest]
    for whole in (seen, seen + coming):
        assert compiled.split(whole)[: len(pieces)] == pieces
        assert pieces + compiled.split(whole[rest:]) == compiled.split(whole)


@pytest.mark.parametrize("pattern", [*PATTERNS, r"\p{L}+", r"\S+\s?", r"\w+(?:'\w+)?|[^\w\s]+|\s+(?!\S)|\s+"])
def test_most_of_a_text_is_settled(pattern):
    text = "the theory of words " * 50
    _, rest = Pattern(pattern).settled(text)
    assert rest > len(text) - 40


@pytest.mark.parametrize("pattern", [r"(?<=a)b+|\S", r"^\S+|\s+", r"\bthe\b|."])
def test_patterns_that_look_around_hold_back(pattern):
    assert Pattern(pattern).settled("the theory of words") == ([], 0)


@pytest.mark.parametrize("pattern", ["(", "[a", "*a", "(?P<x>a)(?P<x", "a{2,1}", "", r"(?r)\S+"])
def test_invalid_patterns_are_refused_in_one_line(pattern):
    with pytest.raises(UserError, match="pattern") as caught:
        Pattern(pattern)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pattern", ["gpt5", "cl100k_base", "llama-3", "GPT2"])
def test_misspelt_names_are_refused(pattern):
    with pytest.raises(UserError, match=f"unknown pre-tokenisation pattern '{pattern}'.*gpt2, cl100k, o200k"):
        Pattern(pattern)


def test_pattern_of_another_type_is_refused():
    with pytest.raises(UserError, match="pattern = None"):
        Pattern(None)  # type: ignore[arg-type]


def test_a_named_pattern_keeps_its_name():
    assert Pattern(PATTERNS["cl100k"]).name == "cl100k"
    for text in WITH_SCANNER:
        assert Pattern(text).local
        assert Pattern(text).name == next((name for name in PATTERNS if PATTERNS[name] == text), text)
    assert pickle.loads(pickle.dumps(Pattern(r"\S+"))).split("a b") == ["a", " ", "b"]


@pytest.mark.parametrize("name", oracle.PATTERN_NAMES)
@pytest.mark.parametrize("unit", ["a", "A", " ", "\n", "1", "é", "漢", "!", "\r\n", " \n", "'s", "\u0301"])
def test_long_runs_take_linear_time(name, unit):
    # Quadratic time would be minutes.
    for text in (unit * 100_000, unit * 100_000 + "x"):
        assert "".join(Pattern(name).split(text)) == text


def test_printable_ascii_under_gpt2():
    assert Pattern("gpt2").split("Hello, it's  2026") == ["Hello", ",", " it", "'s", " ", " 2026"]
    assert Pattern("gpt2").split(string.ascii_letters + string.digits) == [string.ascii_letters, string.digits]
