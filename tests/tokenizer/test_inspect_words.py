"""The merges of a word step by step, tokens in colours, and the page: what is shown is what the tokenizer does."""

from __future__ import annotations

import functools
import io
import re
import unicodedata
from html.parser import HTMLParser
from itertools import pairwise

import bpe_oracle as oracle
import pytest
from hypothesis import given, settings
from rich.console import Console

from scratchlm.errors import UserError
from scratchlm.tokenizer import Tokenizer
from scratchlm.tokenizer.inspect import Coloured, inspect, laid_out, merge_steps, render, render_steps
from scratchlm.tokenizer.inspect_page import page, save_page

HAND = Tokenizer(
    {byte: bytes([byte]) for byte in range(256)} | {256: b"ll", 257: b"he", 258: b"llo", 259: b"hello!"},
    [(b"l", b"l"), (b"h", b"e"), (b"ll", b"o")],
    ["<|end|>"],
    ignore_merges=True,
)


def printed(renderable, **options) -> str:
    console = Console(file=io.StringIO(), width=100, **options)
    console.print(renderable)
    return console.file.getvalue()


# ------------------------------------------------------------------ steps


def test_steps_by_hand():
    [word] = merge_steps(HAND, "hello")
    assert [piece.printable for piece in word.pieces] == list("hello")
    shown = [
        (s.rank, s.left.printable, s.right.printable, [piece.printable for piece in s.pieces]) for s in word.steps
    ]
    assert shown == [
        (0, "l", "l", ["h", "e", "ll", "o"]),
        (1, "h", "e", ["he", "ll", "o"]),
        (2, "ll", "o", ["he", "llo"]),
    ]
    assert word.ids == [257, 258] and not word.whole


def test_a_word_that_is_a_token_as_a_whole():
    whole = Tokenizer(HAND.vocab, HAND.merges, HAND.special_tokens, r"\S+|\s+", ignore_merges=True)
    first, space, second = merge_steps(whole, "hello! hello")
    assert first.whole and first.steps == [] and first.ids == [259] == whole.encode("hello!")
    assert not second.whole and space.printable == "␣"


@functools.cache
def kinds() -> dict[str, Tokenizer]:
    gpt2 = oracle.trained("gpt2", ("<|endoftext|>",))
    return {
        "gpt2": gpt2,
        "odd": oracle.trained(r"\p{L}+|\p{N}{1,2}+", ("<|endoftext|>",)),
        "nfc": Tokenizer(gpt2.vocab, gpt2.merges, gpt2.special_tokens, normalizer="NFC"),
        "whole": HAND,
    }


@pytest.mark.parametrize("kind", ["gpt2", "odd", "nfc", "whole"])
def test_steps_lead_to_the_ids(kind):
    tokenizer = kinds()[kind]
    specials = set(tokenizer.special_tokens.values())
    ranks = {pair: rank for rank, pair in enumerate(tokenizer.merges)}

    @given(text=oracle.texts)
    @settings(deadline=None, max_examples=60)
    def lead(text):
        words = merge_steps(tokenizer, text)
        assert {i for word in words for i in word.ids} == set(tokenizer.encode(text)) - specials
        assert len({word.hex for word in words}) == len(words)
        for word in words:
            raw = bytes.fromhex(word.hex)
            now = [bytes.fromhex(piece.hex) for piece in word.pieces]
            assert now == [raw[i : i + 1] for i in range(len(raw))]
            for step in word.steps:
                pairs = [ranks[pair] for pair in pairwise(now) if pair in ranks]
                assert step.rank == min(pairs)
                assert tokenizer.merges[step.rank] == (bytes.fromhex(step.left.hex), bytes.fromhex(step.right.hex))
                then = [bytes.fromhex(piece.hex) for piece in step.pieces]
                assert b"".join(then) == raw and len(then) == len(now) - 1
                now = then
            if not word.whole:
                assert [tokenizer.vocab[i] for i in word.ids] == now

    lead()


def test_steps_as_tables():
    table = printed(render_steps(merge_steps(HAND, "hello x")), color_system=None)
    lines = [[cell.strip() for cell in line.split("│")][1:4] for line in table.splitlines() if line.startswith("│")]
    assert ["2", "1", "h + e"] in lines and "he│ll│o" in table and "ids: 257 258" in table and "␣│x" in table
    with pytest.raises(UserError, match="lone surrogate"):
        merge_steps(HAND, "\ud800")


# ------------------------------------------------------------------ colours

SGR = re.compile(r"\x1b\[([\d;]*)m")


@given(text=oracle.texts)
@settings(deadline=None, max_examples=80)
def test_neighbours_have_different_grounds_and_specials_their_own(text):
    view = inspect(kinds()["gpt2"], text).text
    assert view is not None
    lines = list(Coloured(view).__rich_console__(Console(color_system="truecolor", no_color=False), None))
    [shown] = lines
    assert shown.plain == "".join(map(laid_out, view.tokens))
    assert [span.end - span.start for span in shown.spans] == [len(laid_out(token)) for token in view.tokens]
    for token, span, before in zip(view.tokens, shown.spans, [None, *shown.spans], strict=False):
        assert before is None or token.special or span.style != before.style
        assert ("bold" in str(span.style)) == token.special


def test_colours_in_a_terminal_and_without(monkeypatch):
    view = inspect(kinds()["gpt2"], "the end<|endoftext|>\nand on").text
    coloured = printed(Coloured(view), force_terminal=True, color_system="truecolor")
    assert SGR.sub("", coloured) == "the end<|endoftext|>⏎\nand on\n"
    assert len(set(SGR.findall(coloured))) >= 4 and "│" not in coloured
    plain = "│".join(token.printable.replace("␣", " ") for token in view.tokens[:2])
    monkeypatch.setenv("NO_COLOR", "1")
    for options in ({"color_system": None}, {"force_terminal": True, "color_system": "truecolor"}):
        bare = SGR.sub("", printed(Coloured(view), **options))
        assert bare.startswith(plain) and "│«<|endoftext|>»│⏎\n" in bare and "\n│" not in bare


def test_long_texts_list_their_beginning():
    shown = printed(render(inspect(HAND, "ab" * 200)), color_system=None)
    assert "… the first 200 tokens" in shown and "400 tokens, 400 bytes" in shown
    assert sum(line.startswith("│ 97 ") for line in shown.splitlines()) == 100


# ------------------------------------------------------------------ the page


class Spans(HTMLParser):
    """Tokens of the text, and everything a page loads from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: list[tuple[str, str, str]] = []
        self.outside: list[str] = []
        self._inside = self._text = False

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.outside += [value for key, value in attributes if key in ("src", "href") and value != "data:,"]
        if tag == "p":
            self._text = given.get("class") == "text"
        if tag == "span" and self._text:
            self._inside = True
            self.tokens.append(("", given["title"], given["class"]))

    def handle_endtag(self, tag):
        if tag == "span":
            self._inside = False
        if tag == "p":
            self._text = False

    def handle_data(self, data):
        if self._inside:
            shown, title, kind = self.tokens[-1]
            self.tokens[-1] = (shown + data, title, kind)


@given(text=oracle.texts)
@settings(deadline=None, max_examples=40)
def test_the_page_shows_every_token(text):
    tokenizer = kinds()["gpt2"]
    found = inspect(tokenizer, text)
    parser = Spans()
    parser.feed(page("ours", found, merge_steps(tokenizer, text)))
    assert parser.outside == [] and found.text is not None
    assert [shown for shown, _, _ in parser.tokens] == list(map(laid_out, found.text.tokens))
    for (_, title, kind), token in zip(parser.tokens, found.text.tokens, strict=True):
        assert f"id {token.id} · {bytes.fromhex(token.hex).hex(' ')}" in title
        assert (kind == "t s") == token.special


def test_the_page_holds_words_and_escapes_what_is_html(tmp_path):
    tokenizer = Tokenizer(HAND.vocab, HAND.merges, {"<script>": 261}, r"<\S+>|\S+|\s+", ignore_merges=True)
    text = "hello! <b> <script>&"
    save_page(tmp_path / "t.html", "<name>", inspect(tokenizer, text), merge_steps(tokenizer, text))
    content = (tmp_path / "t.html").read_text(encoding="utf-8")
    assert content.count("<script>") == 1  # the page's own
    assert "&lt;name&gt;" in content and "&lt;script&gt;" in content and "is a token as a whole" in content
    assert "prefers-color-scheme: dark" in content
    many = " ".join(f"w{chr(97 + index // 26)}{chr(97 + index % 26)}" for index in range(250))
    gpt2 = kinds()["gpt2"]
    words = merge_steps(gpt2, many)
    assert f"{len(words) - 200:,} more words are not shown" in page("x", inspect(gpt2, many), words)
    assert "Text" not in re.findall("<h2>(.*?)</h2>", page("x", inspect(gpt2), []))


def test_normalised_text_has_its_own_length():
    view = inspect(kinds()["nfc"], "e\u0301").text
    assert view is not None and view.bytes == 3
    assert bytes.fromhex("".join(token.hex for token in view.tokens)).decode() == unicodedata.normalize(
        "NFC", "e\u0301"
    )
