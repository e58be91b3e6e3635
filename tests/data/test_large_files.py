"""Far inside a large file compiled loops split and check the text: the same documents and the same errors as near its beginning."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scratchlm.config import CorpusConfig
from scratchlm.data import corpus, open_corpus, text
from scratchlm.data.text import split_blocks
from scratchlm.errors import UserError
from scratchlm.tokenizer import regions


@settings(max_examples=200, deadline=None)
@given(
    parts=st.lists(st.sampled_from(["a", "b", "<", "<|", "<|end|>", "|>", "é", "aba", "x" * 70]), max_size=30),
    separator=st.sampled_from(["ab", "aa", "aba", "<|>", "<|end|>", "é", "aé"]),
)
def test_splitting_by_the_compiled_loop(parts, separator):
    data = "".join(parts).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regions, "_SHORT", 0)
        assert text._split(data, separator.encode()) == data.split(separator.encode())


def written(path: Path, separator: str, damage: bool) -> list[str]:
    """A file of 400 kB; its documents."""
    rng = random.Random(5)
    words = ["plain", "text", "naïve", "漢字", "<", "|", "😀", "\n", "  "]
    documents = [" ".join(rng.choices(words, k=rng.choice([1, 30, 2000]))) for _ in range(60)]
    data = separator.join(documents).encode()
    path.write_bytes(data[:-3000] + b"\xff" + data[-3000:] if damage else data)
    return documents


@pytest.mark.parametrize("separator", ["<|endoftext|>", " tt", "|"])
def test_a_large_file_is_read_as_a_small_one(tmp_path, monkeypatch, separator):
    """The second separator begins with what is frequent, the third is one byte: they are split by Python."""
    split = text._split
    calls: list[bytes] = []
    monkeypatch.setattr(text, "_split", lambda block, wanted: calls.append(wanted) or split(block, wanted))
    checked: list[int] = []
    monkeypatch.setattr(corpus, "_is_utf8", lambda data: checked.append(len(data)) or data.decode() is not None)
    documents = written(tmp_path / "a.txt", separator, damage=False)
    config = CorpusConfig(kind="text", paths=[str(tmp_path / "a.txt")], separator=separator, validation_fraction=0)
    expected = [document.text for document in open_corpus(config).documents("train")]
    assert expected == [piece for piece in separator.join(documents).split(separator) if piece]
    assert not calls and not checked
    for name in ("MUCH", "BLOCK"):
        monkeypatch.setattr(text, name, 1 << 14)
    monkeypatch.setattr(corpus, "MUCH", 1 << 14)
    monkeypatch.setattr(regions, "_SHORT", 0)
    assert [document.text for document in open_corpus(config).documents("train")] == expected
    assert set(calls) == ({separator.encode()} if separator[0] == "<" else set())
    assert checked or separator == "|"


def test_bytes_that_are_not_utf8_are_named_there_too(tmp_path, monkeypatch):
    written(tmp_path / "a.txt", "<|endoftext|>", damage=True)
    place = (tmp_path / "a.txt").stat().st_size - 3001
    config = CorpusConfig(kind="text", paths=[str(tmp_path / "a.txt")], validation_fraction=0)
    found = []
    for much in (1 << 30, 1 << 14):
        monkeypatch.setattr(text, "MUCH", much)
        monkeypatch.setattr(corpus, "MUCH", much)
        monkeypatch.setattr(corpus, "LONG", 0)
        with pytest.raises(UserError, match=rf"byte {place} \(0xff\) is not UTF-8"):
            list(open_corpus(config).documents("train"))
        replacing = config.model_copy(update={"encoding_errors": "replace"})
        found.append([document.utf8 for document in open_corpus(replacing).documents("train")])
    assert found[0] == found[1] and any("\ufffd".encode() in utf8 for utf8 in found[0])


def test_blocks_of_any_size():
    """A separator may lie across blocks wherever it is searched."""
    data = b"one<|end|>two<|en<|end|><|end|>three" * 50
    for size in (1, 2, 5, 64, 1000):
        blocks = [data[at : at + size] for at in range(0, len(data), size)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(text, "MUCH", -1)
            patch.setattr(regions, "_SHORT", 0)
            pieces = [piece for _, piece in split_blocks(blocks, b"<|end|>")]
        assert pieces == data.split(b"<|end|>")
    assert list(itertools.chain(split_blocks([], b"ab"))) == [(0, b"")]
