"""Encoding and decoding: the ids of tiktoken and of Hugging Face, exactly, for any text."""

from __future__ import annotations

import pickle
import random
import threading
import time
import warnings

import bpe_oracle as oracle
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scratchlm.errors import UserError
from scratchlm.tokenizer import PATTERNS, Tokenizer, train_bpe, utf8
from scratchlm.tokenizer import encoder as encoder_module
from scratchlm.tokenizer import encoding as encoding_module
from scratchlm.tokenizer.buffers import Buffers
from scratchlm.tokenizer.encoder import WordCache, merge_tokens

BOUNDARY_TEXTS = [
    "", "a", " ", "\n", "é", "漢", "😀", "\x00", "e\u0301", "\u0301", "👩‍👩‍👧‍👦", "\ufeffBOM", "\ufffd", "\r\n", "a\r\nb\r\r\n\n",
    " " * 999, "\n" * 999, "a" * 999, "é" * 999, "漢" * 999, "1" * 999, " a" * 999, "\u3000" * 50 + "x", "don't DON'T we'LL",
    oracle.EOT, oracle.EOT * 3, "x" + oracle.EOT, oracle.EOT + " x", "<|endoftext|", oracle.TEXT,
]  # fmt: skip


# ------------------------------------------------------------------ oracles


@pytest.mark.parametrize("pattern", oracle.PATTERN_NAMES)
@given(text=oracle.texts)
@settings(deadline=None, max_examples=200)
def test_ids_equal_tiktokens(pattern, text):
    pytest.importorskip("tiktoken")
    tokenizer = oracle.trained(pattern)
    assert tokenizer.encode(text) == _tiktoken(pattern).encode(text, allowed_special="all")


@pytest.mark.parametrize("pattern", oracle.PATTERN_NAMES)
def test_ids_equal_tiktokens_at_the_boundaries(pattern):
    pytest.importorskip("tiktoken")
    tokenizer, other = oracle.trained(pattern), _tiktoken(pattern)
    for text in BOUNDARY_TEXTS:
        ids = tokenizer.encode(text)
        assert ids == other.encode(text, allowed_special="all")
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("pattern", [*oracle.PATTERN_NAMES, r"\S+|\s+", r"\p{L}+|\p{N}{1,2}|[^\p{L}\p{N}]"])
@given(text=oracle.special_texts)
@settings(deadline=None, max_examples=120)
def test_ids_equal_hugging_faces(pattern, text):
    pytest.importorskip("tokenizers")
    tokenizer = oracle.trained(pattern, tuple(oracle.OVERLAPPING))
    assert tokenizer.encode(text) == _hugging_face(pattern).encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("pattern", oracle.PATTERN_NAMES)
def test_ids_equal_hugging_faces_at_the_boundaries(pattern):
    pytest.importorskip("tokenizers")
    tokenizer, other = oracle.trained(pattern, tuple(oracle.OVERLAPPING)), _hugging_face(pattern)
    for text in BOUNDARY_TEXTS:
        assert tokenizer.encode(text) == other.encode(text, add_special_tokens=False).ids


_made: dict[tuple[str, str], object] = {}


def _tiktoken(pattern):
    if ("tiktoken", pattern) not in _made:
        _made["tiktoken", pattern] = oracle.as_tiktoken(oracle.trained(pattern))
    return _made["tiktoken", pattern]


def _hugging_face(pattern):
    if ("hf", pattern) not in _made:
        import tempfile

        import tokenizers

        with tempfile.TemporaryDirectory() as folder:
            path = oracle.trained(pattern, tuple(oracle.OVERLAPPING)).save(folder)
            _made["hf", pattern] = tokenizers.Tokenizer.from_file(str(path))
    return _made["hf", pattern]


@given(text=oracle.special_texts, pattern=st.sampled_from([*PATTERNS, r"\p{L}+"]))
@settings(deadline=None, max_examples=40)
def test_ids_equal_the_textbook(text, pattern):
    tokenizer = oracle.trained(pattern, tuple(oracle.OVERLAPPING))
    assert tokenizer.encode(text) == oracle.encode(text, tokenizer, PATTERNS.get(pattern, pattern))


@given(text=st.text("ab", min_size=0, max_size=120))
@settings(deadline=None, max_examples=150)
def test_long_and_short_pre_tokens_merge_alike(text):
    tokenizer = _runs()
    short = encoder_module._merge_short([*text.encode()], tokenizer._ranks)
    assert encoder_module._merge_long([*text.encode()], tokenizer._ranks) == short
    assert merge_tokens([*text.encode()], tokenizer._ranks) == short
    word = tuple(bytes([byte]) for byte in text.encode())
    for pair in tokenizer.merges:
        word = oracle.join(word, pair)
    assert [tokenizer.vocab[index] for index in short] == list(word)


def _runs() -> Tokenizer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train_bpe(["aaaaaaa abab bbbb aabb abba baabaa bab aaab " * 3], 290)


def test_long_and_short_pre_tokens_merge_alike_with_many_merges():
    """Merges learnt from noise: most pairs are known, so pairs change under entries that wait in the heap."""
    rng = random.Random(4)
    noise = " ".join("".join(rng.choices("abc", k=rng.randint(2, 12))) for _ in range(800))
    ranks = train_bpe([noise], 900, [])._ranks
    for _ in range(300):
        raw = "".join(rng.choices("abc", k=rng.randint(2, 150))).encode()
        assert encoder_module._merge_long([*raw], ranks) == encoder_module._merge_short([*raw], ranks)


# ------------------------------------------------------------------ speed and size


@pytest.mark.parametrize(
    ("pattern", "unit"),
    [
        ("gpt2", "a"),
        ("gpt2", " "),
        ("cl100k", "é"),
        ("cl100k", "\n"),
        ("o200k", "漢"),
        ("o200k", "ab"),
        ("o200k", "'s"),
    ],
)
def test_a_hundred_thousand_times_the_same_is_quick(pattern, unit):
    text = unit * 100_000
    tokenizer = oracle.trained(pattern)
    tokenizer.encode_array(unit * 80_000)  # whatever has to be compiled is
    started = time.perf_counter()
    ids = tokenizer.encode_array(text)
    # Linear time is under a second here; quadratic time would be many minutes.
    assert time.perf_counter() - started < 20
    assert tokenizer.decode(ids) == text


def test_long_text_is_encoded_in_parts_with_the_same_ids(monkeypatch):
    for pattern in oracle.PATTERN_NAMES:
        tokenizer = oracle.trained(pattern)
        text = oracle.TEXT + oracle.EOT + oracle.TEXT
        whole = tokenizer.encode(text)
        for part in (1, 10, 100, 1000):
            monkeypatch.setattr(encoding_module, "_PART", part)
            assert tokenizer.encode(text) == whole
        monkeypatch.undo()


def test_the_word_cache_is_bounded():
    cache = WordCache(list(range(256)), {}, {}, "H", limit=10)
    for number in range(100):
        assert np.frombuffer(cache[str(number)], np.uint16).tolist() == list(str(number).encode())
        assert len(cache) <= 10
    long = "x" * (WordCache.MAX_WORD + 1)
    assert cache[long] == np.full(len(long), ord("x"), np.uint16).tobytes()
    assert long not in cache


# ------------------------------------------------------------------ types


def test_array_type_and_writability():
    tokenizer = oracle.trained()
    ids = tokenizer.encode_array("Hello there" + oracle.EOT)
    assert ids.dtype == np.uint16 and ids.ndim == 1 and ids.flags.writeable
    assert ids.tolist() == tokenizer.encode("Hello there" + oracle.EOT)
    empty = tokenizer.encode_array("")
    assert empty.dtype == np.uint16 and empty.shape == (0,)
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""


@pytest.mark.parametrize(("size", "dtype"), [(65_536, np.uint16), (65_537, np.uint32)])
def test_type_of_ids_at_the_boundary(size, dtype):
    vocab = {byte: bytes([byte]) for byte in range(256)}
    vocab |= {index: f"token {index}".encode() for index in range(256, size - 1)}
    tokenizer = Tokenizer(vocab, [], {"<end>": size - 1})
    ids = tokenizer.encode_array("é<end>")
    assert ids.dtype == dtype and ids.tolist() == [0xC3, 0xA9, size - 1]
    assert list(tokenizer.encode_iterable(["é<e", "nd>"])) == ids.tolist()
    assert tokenizer.encode_batch(["é<end>"])[0].dtype == dtype


@given(raw=st.binary(max_size=40))
@settings(deadline=None, max_examples=200)
def test_bytes_are_kept_whatever_they_are(raw):
    tokenizer = oracle.trained()
    assert tokenizer.decode_bytes(tokenizer.encode(raw)) == raw
    assert tokenizer.decode_bytes(tokenizer.encode_array(memoryview(raw))) == raw


@given(text=oracle.special_texts)
@settings(deadline=None, max_examples=100)
def test_utf8_bytes_give_the_ids_of_the_text(text):
    tokenizer = oracle.trained("o200k", tuple(oracle.OVERLAPPING))
    assert tokenizer.encode(text.encode()) == tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", ["\ud800", "ab\udfffcd", "ok \ud83d\ude00"])
def test_lone_surrogates_are_refused(text):
    tokenizer = oracle.trained()
    place = min(text.index(character) for character in text if "\ud800" <= character <= "\udfff")
    for encode in (tokenizer.encode, tokenizer.encode_array, lambda text: list(tokenizer.encode_iterable([text]))):
        with pytest.raises(UserError, match=f"lone surrogate at character {place}") as caught:
            encode(text)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="lone surrogate"):
        tokenizer.encode_batch(["fine", text])


@pytest.mark.parametrize("end", ["", "é", "漢", "😀"])
def test_long_str(end):
    """Encoded to UTF-8 part by part, parts that need more room than most included."""
    tokenizer = oracle.trained()
    for text in ("ab c" * 30_000 + end, "漢字 é" * 20_000 + end, "a" * 90_000 + "😀" * 60_000 + end):
        raw = text.encode()
        assert bytes(utf8.utf8(text, Buffers())) == bytes(utf8.utf8(text)) == raw
        expected = tokenizer.encode_array(raw)
        assert np.array_equal(tokenizer.encode_array(text), expected)
        assert tokenizer.count_tokens(text) == len(expected)
        with pytest.raises(UserError, match=f"lone surrogate at character {len(text)}"):
            tokenizer.encode_array(text + "\ud800" + text)


@pytest.mark.parametrize("text", [None, 5, ["a"]])
def test_other_types_are_refused(text):
    with pytest.raises(UserError, match="cannot encode a"):
        oracle.trained().encode(text)


# ------------------------------------------------------------------ batches


def test_batches_equal_single_texts():
    tokenizer = oracle.trained("gpt2", tuple(oracle.OVERLAPPING))
    texts = [*BOUNDARY_TEXTS, *oracle.TEXT.splitlines(keepends=True), oracle.TEXT.encode()]
    expected = [tokenizer.encode(text) for text in texts]
    for threads in (None, 1, 4):
        assert [array.tolist() for array in tokenizer.encode_batch(iter(texts), threads=threads)] == expected

    with pytest.raises(UserError, match="disallowed special token '<"):
        tokenizer.encode_batch(texts, threads=2, allowed_special=(), disallowed_special="all")
    with pytest.raises(UserError, match="threads = 0"):
        tokenizer.encode_batch(texts, threads=0)
    assert tokenizer.encode_batch([]) == []


def test_threads_may_share_a_tokenizer():
    tokenizer = Tokenizer(oracle.trained().vocab, oracle.trained().merges, [oracle.EOT])
    tokenizer._encoder._words._limit = 50  # cleared all the time
    expected, wrong = oracle.trained().encode(oracle.TEXT), []

    def work() -> None:
        wrong.extend(1 for _ in range(10) if tokenizer.encode(oracle.TEXT) != expected)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# ------------------------------------------------------------------ decoding


def test_invalid_utf8_decodes_to_replacement_characters():
    tokenizer = oracle.trained()
    assert tokenizer.decode([0xFF]) == "\ufffd"
    assert tokenizer.decode([0xE6, 0xBC, ord("a")]) == "\ufffda"  # 漢 cut short
    assert tokenizer.decode([0xC3]) == "\ufffd"
    assert tokenizer.decode_bytes([0xE6, 0xBC]) == b"\xe6\xbc"


@given(ids=st.lists(st.integers(0, 699), max_size=30))
@settings(deadline=None, max_examples=100)
def test_any_ids_decode(ids):
    tokenizer = oracle.trained()
    raw = b"".join(tokenizer.vocab[index] for index in ids)
    assert tokenizer.decode_bytes(ids) == raw == b"".join(map(tokenizer.token_bytes, ids))
    assert tokenizer.decode(np.array(ids, np.int64)) == raw.decode("utf-8", "replace")
    tiktoken = pytest.importorskip("tiktoken") and _tiktoken("gpt2")
    assert tokenizer.decode(ids) == tiktoken.decode(ids)


@pytest.mark.parametrize("ids", [[5, 700], [5, -1], [5, "a"], [5, None], [5, 1 << 70], [5, [6]]])
def test_unknown_ids_are_named(ids):
    with pytest.raises(UserError, match="at position 1 is not in the vocabulary of 700 tokens"):
        oracle.trained().decode(ids)


@pytest.mark.parametrize("ids", [5, np.array(5)])
def test_ids_must_be_a_sequence(ids):
    with pytest.raises(UserError, match="give a list of ids"):
        oracle.trained().decode(ids)


# ------------------------------------------------------------------ construction


def test_equality_hash_and_pickle():
    first = oracle.trained()
    again = Tokenizer(first.vocab, first.merges, first.special_tokens, first.pattern)
    copied = pickle.loads(pickle.dumps(first))
    assert first == again == copied and len({first, again, copied}) == 1
    assert copied.encode(oracle.TEXT) == first.encode(oracle.TEXT)
    others = [
        Tokenizer(first.vocab, first.merges[:-1], first.special_tokens),
        Tokenizer(first.vocab, first.merges, []),
        Tokenizer(first.vocab, first.merges, first.special_tokens, "o200k"),
        Tokenizer(first.vocab, first.merges, first.special_tokens, ignore_merges=True),
        Tokenizer(first.vocab, first.merges, [*first.special_tokens, "<more>"]),
        Tokenizer(first.vocab, [first.merges[1], first.merges[0], *first.merges[2:]], first.special_tokens),
    ]
    assert len({tokenizer.content_hash for tokenizer in [first, *others]}) == 1 + len(others)
    assert first != 5


def test_the_constructor_copies():
    first = oracle.trained()
    vocab, merges = dict(first.vocab), list(first.merges)
    tokenizer = Tokenizer(vocab, merges, [oracle.EOT, "<new>"])
    vocab.clear()
    merges.clear()
    assert tokenizer.vocab_size == 701 and tokenizer.special_tokens["<new>"] == 700
    assert tokenizer.decode(tokenizer.encode("the theory<new>")) == "the theory<new>"


BYTES = {byte: bytes([byte]) for byte in range(256)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({}, []), "single byte b'.x00' is missing"),
        ((BYTES | {256: b"a"}, []), "ids 97 and 256 are both b'a'"),
        ((BYTES | {257: b"ab"}, []), "id 256 is missing"),
        ((BYTES | {256: "ab"}, []), "id 256 is 'ab'; every token must be non-empty bytes"),
        ((BYTES | {256: b""}, []), "every token must be non-empty bytes"),
        ((BYTES, [(b"a", b"b")]), r"merge 0 \(b'a', b'b'\): b'ab' is not in vocab"),
        ((BYTES | {256: b"xyb"}, [(b"xy", b"b")]), r"merge 0 \(b'xy', b'b'\): b'xy' is not in vocab"),
        ((BYTES | {256: b"ab"}, [(b"a", b"b")] * 2), "merge 1 .* is listed twice"),
        ((BYTES, [(b"a",)]), "merge 0 .* must be a pair of bytes"),
        ((BYTES, [("a", "b")]), "must be a pair of bytes"),
        ((BYTES, [5]), "must be a pair of bytes"),
        ((BYTES, [], ["<a>", "<a>"]), "'<a>' is named twice"),
        ((BYTES, [], "<a>"), "is one string"),
        ((BYTES, [], [""]), "is empty"),
        ((BYTES, [], [5]), "is of type int"),
        ((BYTES, [], ["\udcff"]), "lone surrogate"),
        ((BYTES, [], {"<a>": 97}), "which vocab gives to b'a'"),
        ((BYTES, [], {"a": 256}), "but vocab has it at id 97"),
        ((BYTES | {300: b"ab"}, [], {"<a>": 256}), "id 257 is missing, though b'ab' has id 300"),
        ((BYTES | {-1: b"ab"}, []), "has the id -1; ids are whole numbers from 0"),
        ((BYTES | {"x": b"ab"}, []), "has the id 'x'"),
        (
            (BYTES, [], {"<a>": 10**9}),
            "special token '<a>' has the id 1000000000; ids are whole numbers from 0 to 4,194,303",
        ),
        ((BYTES, [], {"<a>": "256"}), "special token '<a>' has the id '256'"),
        ((BYTES, [], {"<a>": True}), "has the id True"),
        ((BYTES, [], {"<a>": 256, "<b>": 256}), "'<b>' shall have id 256, which vocab gives to b'<a>'"),
        ((BYTES, [], {"": 256}), "is empty"),
        ((BYTES, [], ["<a>"], "gpt2", False, "nfc"), "normalizer = 'nfc': name NFC, NFD, NFKC, NFKD"),
        ((BYTES, [], ["<a>"], "gpt2", False, None, ["<b>"]), "added_tokens: '<b>' is not a special token"),
        ((BYTES, [], None, "gpt9"), "unknown pre-tokenisation pattern"),
    ],
)
def test_contradictions_are_refused_in_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer(*arguments)
    assert "\n" not in str(caught.value)


def test_bytes_alone_are_a_tokenizer():
    assert Tokenizer(BYTES, []).encode("é!") == [0xC3, 0xA9, ord("!")]


def test_ignore_merges_takes_whole_pre_tokens():
    vocab = BYTES | {256: b"abc", 257: b"ab"}
    merges = [(b"a", b"b")]
    assert Tokenizer(vocab, merges).encode("abc") == [257, ord("c")]
    assert Tokenizer(vocab, merges, ignore_merges=True).encode("abc abc") == [256, ord(" "), 257, ord("c")]


@pytest.mark.parametrize("pattern", ["gpt2", r"\w+|\W"])  # compiled, and by `regex`
def test_documents_are_encoded_each_for_itself_and_followed_by_the_separator(pattern):
    end = "<|endoftext|>"
    tokenizer = train_bpe(["the theory of the thing", "ok ok"], 266, [end], pattern)
    separator = tokenizer.special_tokens[end]
    documents = [
        b"the theory",
        b"",
        f" spelt {end}".encode(),
        "h\u00e9 \U0001f600 ".encode(),
        b"x" * 70_000,
        b" of",
    ]
    sizes = np.array([len(document) for document in documents])
    ids, counts = tokenizer.encode_documents(b"".join(documents), sizes, separator)
    expected = [[*tokenizer.encode(document, allowed_special=()), separator] for document in documents]
    assert ids.tolist() == [id for document in expected for id in document]
    assert counts.tolist() == [len(document) for document in expected]
    assert ids.dtype == tokenizer.dtype
    none, no_counts = tokenizer.encode_documents(b"", np.zeros(0, np.int64), separator)
    assert len(none) == len(no_counts) == 0
