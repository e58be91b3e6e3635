"""A million seeded strings: ids equal tiktoken's and Hugging Face's, by every road, in any chunks, on any number of threads.

Strings with bytes that are not UTF-8, which neither library reads as we do, are cut by `regex` after our documented policy (such a
byte is a character of no class) and their pre-tokens are merged by tiktoken.
"""

from __future__ import annotations

import functools
import random
import unicodedata
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import bpe_oracle as oracle
import numpy as np
import pytest
import regex
import scanner_oracle

from scratchlm.tokenizer import Tokenizer, encoding, fast_encoder, stream, unicode_classes

GPT2 = Path(__file__).parents[3] / "shared/data/gpt2"
STRINGS, BATCH = 1_000_000, 5_000
SPECIALS = (oracle.EOT, "<|fim|>")
# Words that have merges, words that have none, words longer than a row of the word table, a vector and a bit mask hold.
WORDS = [
    *oracle.TEXT.split(),
    *(f" {word}" for word in oracle.TEXT.split()),
    "=" * 79,
    "YWJjZGVmZ2hpamtsbW5vcA" * 8,
]
GLUED = [*SPECIALS, "<|endoftext", "|>", "<|", "the<|fim|>re", f" {oracle.EOT}'s", "<|fim|><|fim|>", "<|FIM|>"]
PIECES = [*scanner_oracle.PIECES, *WORDS, *GLUED]


@functools.cache
def agreed() -> list[str]:
    """Characters of all planes, unassigned ones too, that are of one class in old and new versions of Unicode."""
    letter, upper, lower = unicode_classes.LETTER, unicode_classes.UPPER, unicode_classes.LOWER
    bits = {"Lu": letter | upper, "Lt": letter | upper, "Ll": letter | lower, "Lm": letter, "Lo": letter}
    bits |= dict.fromkeys(("Mn", "Mc", "Me"), unicode_classes.MARK)
    bits |= dict.fromkeys(("Nd", "Nl", "No"), unicode_classes.NUMBER)
    classes = (unicode_classes.code_point_classes() & ~np.uint8(unicode_classes.SPACE)).tolist()
    points = [*range(0xD800), *range(0xE000, 0x110000)]
    return [chr(point) for point in points if bits.get(unicodedata.category(chr(point)), 0) == classes[point]]


def strings(random_: random.Random) -> tuple[list[str], list[bytes]]:
    """A batch: texts, and byte strings of which some part is not UTF-8."""
    texts, damaged = [], []
    for _ in range(BATCH):
        kind = random_.random()
        pieces = random_.choices(PIECES, k=4) if kind < 0.3 else PIECES
        text = random_.choices(pieces, k=random_.randrange(25 if kind < 0.9 else 100))
        if text and kind < 0.1:  # runs, up to some thousand bytes
            text[random_.randrange(len(text))] *= random_.randrange(1, 200)
        if text and 0.1 < kind < 0.6:  # any character, next to anything
            text[random_.randrange(len(text))] = random_.choice(agreed())
        if kind > 0.97:  # one pre-token of few letters, far longer than the table keeps
            text.append("".join(random_.choices("aber", k=random_.randrange(400))))
        if 0.85 < kind < 0.9:
            raw = "".join(text).encode()
            cut = random_.randrange(len(raw) + 1)
            raw = raw[:cut] + random_.choice(scanner_oracle.NOT_UTF8) + raw[cut + random_.randrange(2) :]
            damaged.append(raw)
        else:
            texts.append("".join(text))
    return texts, damaged


@dataclass
class Subject:
    """A tokenizer, what it is compared with, and how the strings with damaged bytes are cut."""

    name: str
    ours: Tokenizer
    tiktoken: Any
    hugging_face: Any
    pattern: regex.Pattern
    every: int  # how many batches there are to one that Hugging Face, much slower, sees too

    def pieces(self, raw: bytes) -> list[int]:
        """Ids of bytes: special tokens, then `regex`, then tiktoken's merges of each pre-token."""
        ids: list[int] = []
        text = raw.decode("utf-8", "surrogateescape")
        for part, special in oracle.cut_specials(text, list(self.ours.special_tokens)):
            if special:
                ids.append(self.ours.special_tokens[part])
                continue
            for piece in oracle.pre_tokens(part, self.pattern.pattern):
                ids += self.tiktoken._encode_single_piece(piece.encode("utf-8", "surrogateescape"))
        return ids


def subjects(folder: Path) -> list[Subject]:
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("tiktoken")
    made = {pattern: oracle.trained(pattern, SPECIALS) for pattern in oracle.PATTERN_NAMES}
    if GPT2.is_dir():
        vocab, merges = sorted(GPT2.glob("*vocab.json"))[0], sorted(GPT2.glob("*merges.txt"))[0]
        gpt2 = Tokenizer.from_files(vocab, merges, [oracle.EOT])
        made = {"GPT-2": Tokenizer(gpt2.vocab, gpt2.merges, gpt2.special_tokens, "gpt2"), **made}
    found = []
    for name, tokenizer in made.items():
        (folder / name).mkdir()
        # A table far too small for all words there are: rows are replaced all the time.
        tokenizer = Tokenizer(
            tokenizer.vocab,
            tokenizer.merges,
            tokenizer.special_tokens,
            tokenizer.pattern,
            cache_bytes=1 << random.Random(name).choice([12, 16, 26]),
        )
        other = tokenizers.Tokenizer.from_file(str(tokenizer.save(folder / name)))
        pattern = regex.compile(oracle.tiktoken_patterns()[tokenizer.pattern])
        every = 1 if name == "GPT-2" or len(found) == 0 else 5
        found.append(Subject(name, tokenizer, oracle.as_tiktoken(tokenizer), other, pattern, every))
    return found


def first_difference(name: str, texts: list[Any], found: list[Any], wanted: list[list[int]]) -> str:
    for text, ids, want in zip(texts, found, wanted, strict=True):
        if list(ids) != want:
            return f"{name}: {text!r}: {list(ids)} instead of {want}"
    return ""


def check(subject: Subject, texts: list[str], damaged: list[bytes], random_: random.Random, with_hf: bool) -> None:
    ours, name = subject.ours, subject.name
    wanted = [subject.tiktoken.encode(text, allowed_special="all") for text in texts]
    if with_hf:
        found = [one.ids for one in subject.hugging_face.encode_batch(texts, add_special_tokens=False)]
        assert not (wrong := first_difference(f"tiktoken beside Hugging Face, {name}", texts, wanted, found)), wrong
    raw = [text.encode() for text in texts] + damaged
    wanted += [subject.pieces(one) for one in damaged]
    given = texts + damaged
    for threads in (1, random_.choice([2, 3])):
        found = [ids.tolist() for ids in ours.encode_batch(raw, threads=threads)]
        assert not (wrong := first_difference(f"{name}, {threads} threads", given, found, wanted)), wrong
    # One by one: short ones take the road without compiled code; all come back as they were.
    ids = [ours.encode_array(one) for one in given]
    assert not (wrong := first_difference(f"{name}, alone", given, [one.tolist() for one in ids], wanted)), wrong
    assert [ours.decode_bytes(one) for one in ids] == raw
    assert ours.decode_batch(wanted[: len(texts)]) == texts

    # All of them as one text: pre-tokens and special tokens now reach across, and threads and chunks end anywhere.
    text = "".join(texts)
    whole = subject.tiktoken.encode(text, allowed_special="all")
    threads = random_.choice([1, 2, 3, 5])
    found = ours.encode_array(text, threads=threads)
    assert found.tolist() == whole, f"{name}: the whole text of seed {random_}, {threads} threads"
    assert ours.decode(found) == text and ours.decode(whole) == text
    assert ours.count_tokens(text) == len(whole)
    most = random_.choice([1 << 8, 1 << 12, 1 << 16])
    cuts = [0]
    while cuts[-1] < len(text):
        cuts.append(min(cuts[-1] + random_.randrange(1, most), len(text)))
    assert list(ours.encode_iterable(text[begin:end] for begin, end in pairwise(cuts))) == whole, name
    ordinary = ours.encode_array(text, allowed_special=(), threads=threads).tolist()
    assert ordinary == subject.tiktoken.encode_ordinary(text), f"{name}: special tokens as ordinary text"


def compare(number: int, batches: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`batches` batches of seed `number`, through every subject."""
    random_ = random.Random(number)
    # Threads, pieces and blocks as if the texts were large.
    monkeypatch.setattr(encoding, "_WORTH_THREAD", 1 << 10)
    every = subjects(folder)
    for batch in range(batches):
        texts, damaged = strings(random_)
        monkeypatch.setattr(fast_encoder, "PIECE", random_.choice([1 << 10, 1 << 14, 1 << 20]))
        monkeypatch.setattr(fast_encoder, "CHUNK", random_.choice([64, 1 << 10, 1 << 13]))
        monkeypatch.setattr(stream, "BLOCK", random_.choice([1 << 8, 1 << 12, 1 << 16]))
        for subject in every:
            subject.ours._encoder._fast._free.clear()  # spans of the new size
            check(subject, texts, damaged, random_, batch % subject.every == 0)


def test_a_few_thousand_strings(tmp_path, monkeypatch):
    monkeypatch.setattr("test_ids_fuzz.BATCH", 1_000)
    compare(1, 2, tmp_path, monkeypatch)


@pytest.mark.slow
def test_a_million_strings(tmp_path, monkeypatch):
    compare(20261127, STRINGS // BATCH, tmp_path, monkeypatch)
