"""Inspection: plain data that is right, and tables that show it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict

import bpe_oracle as oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from scratchlm.errors import UserError
from scratchlm.tokenizer import Tokenizer
from scratchlm.tokenizer.inspect import inspect, printable, render


@pytest.fixture
def tokenizer():
    return oracle.trained("o200k", tuple(oracle.OVERLAPPING))


def shown(inspection, width=120) -> str:
    console = Console(width=width, record=True, color_system=None, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(render(inspection))
    return console.export_text()


def test_summary(tokenizer):
    found = inspect(tokenizer, longest=7)
    assert (found.vocab_size, found.merges, found.pattern) == (700, 700 - 256 - 4, "o200k")
    assert found.special_tokens == tokenizer.special_tokens
    ordinary = [token for index, token in tokenizer.vocab.items() if index not in tokenizer.special_tokens.values()]
    assert found.lengths == Counter(map(len, ordinary)) and list(found.lengths) == sorted(found.lengths)
    assert found.lengths[1] == 256 and sum(found.lengths.values()) == 696
    sizes = [len(bytes.fromhex(token.hex)) for token in found.longest]
    assert sizes == sorted(map(len, ordinary), reverse=True)[:7]
    assert not any(token.special for token in found.longest)
    assert found.text is None and len(inspect(tokenizer).longest) == 10


@given(text=oracle.special_texts)
@settings(deadline=None, max_examples=60)
def test_text(text):
    tokenizer = oracle.trained("o200k", tuple(oracle.OVERLAPPING))
    view = inspect(tokenizer, text).text
    assert view is not None
    assert [token.id for token in view.tokens] == tokenizer.encode(text)
    assert b"".join(bytes.fromhex(token.hex) for token in view.tokens) == text.encode()
    assert [token.special for token in view.tokens] == [
        token.id in tokenizer.special_tokens.values() for token in view.tokens
    ]
    assert (view.bytes, view.characters) == (len(text.encode()), len(text))
    assert view.bytes_per_token == (len(text.encode()) / len(view.tokens) if text else 0.0)


def test_data_is_plain(tokenizer):
    found = inspect(tokenizer, "the theory 漢<|end|>")
    again = json.loads(json.dumps(asdict(found)))
    assert again["text"]["tokens"][0] == {"id": 257 + 0, "hex": "746865", "printable": "the", "special": False} | {
        "id": tokenizer.encode("the")[0]
    }


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        (b" the", "␣the"), (b"\n\t", "\\n\\t"), (b"\x00", "\\x00"), (b"\\n", "\\\\n"), ("é漢😀".encode(), "é漢😀"),
        (b"\xe6\xbc", "\\xe6\\xbc"), (b"a\xff", "a\\xff"), ("\u200b".encode(), "\\u200b"), ("\x85".encode(), "\\u0085"),
        ("\U000e0001".encode(), "\\U000e0001"), (b"", ""),
    ],
)  # fmt: skip
def test_printable(token, expected):
    assert printable(token) == expected


@given(first=st.binary(max_size=8), second=st.binary(max_size=8))
@settings(max_examples=300)
def test_printable_is_one_line_and_tells_tokens_apart(first, second):
    assert printable(first).isprintable()
    assert (printable(first) == printable(second)) == (first == second)


def test_tables_show_it(tokenizer):
    text = "[bold]the theory[/bold]\n漢<|endoftext|>"
    page = shown(inspect(tokenizer, text))
    ids = tokenizer.encode(text)
    assert "700 ids, 440 merges" in page and "o200k" in page and "<|end|><|end|>" in page
    for index in ids:
        assert f"│ {index} " in page
    assert "\\n" in page and "␣the" in page and "[" in page
    assert f"{len(ids)} tokens, {len(text.encode())} bytes, {len(text)} characters" in page
    assert f"{len(text.encode()) / len(ids):.2f} bytes per token" in page
    assert "token lengths" in page and "█" in page
    assert "bytes per token" not in shown(inspect(tokenizer))
    assert "0 tokens, 0 bytes, 0 characters: 0.00 bytes per token" in shown(inspect(tokenizer, ""))


def test_long_tokens_are_shown_short():
    vocab = {byte: bytes([byte]) for byte in range(256)} | {256: b"ab" * 64}
    page = shown(inspect(Tokenizer(vocab, []), longest=1))
    assert "(128 bytes)" in page and "none" in page and page.count("61 62") <= 6


def test_bytes_and_bad_text(tokenizer):
    view = inspect(tokenizer, b"a\xff").text
    assert view is not None and view.bytes == 2 and view.tokens[-1].printable == "\\xff"
    with pytest.raises(UserError, match="lone surrogate"):
        inspect(tokenizer, "\ud800")
