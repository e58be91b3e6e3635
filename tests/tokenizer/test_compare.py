"""Comparison: the figures are those of the ids, engines that differ are shown so."""

from __future__ import annotations

import io
import json
from dataclasses import asdict

import bpe_oracle as oracle
import numpy as np
import pytest
from rich.console import Console

from scratchlm.errors import UserError
from scratchlm.tokenizer import Tokenizer
from scratchlm.tokenizer import compare as module
from scratchlm.tokenizer.compare import OURS, compare, passes, render

BYTES = {byte: bytes([byte]) for byte in range(256)}
BARE = Tokenizer(BYTES | {256: b"the", 257: b" the"}, [], ["<|end|>"], ignore_merges=True)


def page(found) -> str:
    console = Console(file=io.StringIO(), width=160, color_system=None)
    console.print(render(found))
    return console.file.getvalue()


def test_figures_by_hand():
    text = "the the é漢 x<|end|>"
    [one] = compare([("bare", BARE)], text)
    # the ␣the ␣ é(2) 漢(3) ␣ x <|end|>; "é" and "漢" are five single bytes; words: the, the, é漢, x<|end|>
    assert (one.tokens, one.vocab_size, one.single_bytes) == (11, 259, 5)
    assert one.bytes_per_token == len(text.encode()) / 11 and one.tokens_per_word == 11 / 4
    assert [token.printable for token in one.longest[:2]] == ["␣the", "the"]
    assert not any(token.special for token in one.longest)
    shown = page([one])
    assert "5 (45.5 %)" in shown and "2.00" in shown and "2.75" in shown and "␣the" in shown
    assert json.loads(json.dumps(asdict(one)))["engines"][0]["name"] == OURS


def test_engines_of_others_give_equal_ids():
    pytest.importorskip("tiktoken")
    pytest.importorskip("tokenizers")
    calls = []
    both = [("a", oracle.trained("gpt2")), ("b", oracle.trained("o200k"))]
    found = compare(both, oracle.TEXT + oracle.EOT, tick=lambda: calls.append(1))
    assert len(calls) == passes(2)
    for (name, tokenizer), one in zip(both, found, strict=True):
        assert one.name == name and one.tokens == len(tokenizer.encode(oracle.TEXT + oracle.EOT))
        assert [(engine.name, engine.ids) for engine in one.engines] == [
            (OURS, ""), ("tiktoken", "equal"), ("tokenizers", "equal"),
        ]  # fmt: skip
        assert all(engine.first > 0 and engine.warm > 0 for engine in one.engines)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ([256, 257, 120], "equal"),
        ([256, 258, 120], "differ from token 1 (byte 3) on: 257 (␣the), here 258 (<|end|>)"),
        ([256, 999, 120], "differ from token 1 (byte 3) on: 257 (␣the), here 999"),
        ([256, 257], "differ from token 2 (byte 7) on: 120 (x), here the end"),
        ([256, 257, 120, 5], "differ from token 3 (byte 8) on: the end, here 5 (\\x05)"),
    ],
)
def test_ids_that_differ_are_shown(theirs, message, monkeypatch):
    tokenizer = Tokenizer(BARE.vocab, [], BARE.special_tokens, r" ?the|\S", ignore_merges=True)
    assert tokenizer.encode("the thex") == [256, 257, 120]
    monkeypatch.setitem(module._ENGINES, "tiktoken", lambda _: lambda text: np.array(theirs, dtype=np.uint32))
    [one] = compare([("x", tokenizer)], "the thex")
    assert one.engines[1].ids == message
    assert message in page([one])


def test_an_engine_that_cannot_run_says_why(monkeypatch):
    def absent(_):
        raise UserError("tokenizers is not installed")

    monkeypatch.setitem(module._ENGINES, "tokenizers", absent)
    nfc = Tokenizer(BARE.vocab, [], BARE.special_tokens, ignore_merges=True, normalizer="NFC")
    [one] = compare([("nfc", nfc)], "the")
    assert one.engines[1].warm is None and "tiktoken does not normalise text" in one.engines[1].ids
    assert one.engines[2].ids == "tokenizers is not installed" and "–" in page([one])


def test_first_passes_meet_fresh_engines(monkeypatch):
    """Ours is a new tokenizer, so that no words are known."""
    seen = []
    original = Tokenizer.encode_array

    def spying(self, text, **options):
        seen.append((id(self), text))
        return original(self, text, **options)

    monkeypatch.setattr(Tokenizer, "encode_array", spying)
    compare([("bare", BARE)], "the text")
    on_text = [tokenizer for tokenizer, text in seen if text == "the text"]
    # Once by the given one, so that all is compiled; what is timed is another.
    assert on_text[0] == id(BARE) and id(BARE) not in on_text[1:] and len(set(on_text[1:])) == 1


def test_no_words_and_no_text():
    [one] = compare([("bare", BARE)], "")
    assert (one.tokens, one.bytes_per_token, one.tokens_per_word, one.longest) == (0, 0.0, 0.0, [])
    assert "0.00" in page([one])
    [one] = compare([("bare", BARE)], " \n")
    assert one.tokens == 2 and one.tokens_per_word == 0.0
    with pytest.raises(UserError, match="lone surrogate"):
        compare([("bare", BARE)], "\ud800")
