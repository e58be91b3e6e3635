"""Training end to end: against the textbook, against Hugging Face's trainer, with any number of processes."""

from __future__ import annotations

import hashlib
import random
import re
import subprocess
import sys
import tempfile
import threading
import warnings
from collections import Counter
from pathlib import Path

import bpe_oracle as oracle
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scratchlm.config import Recipe
from scratchlm.errors import UserError
from scratchlm.section import validate
from scratchlm.tokenizer import PATTERNS, Tokenizer, counting, counting_fast, merging_fast, train_bpe, training
from scratchlm.tokenizer.count_table import PAD, CountTable
from scratchlm.tokenizer.counting import count_words
from scratchlm.tokenizer.patterns import Pattern
from scratchlm.tokenizer.scanner import scanner_for


@pytest.fixture(autouse=True)
def _small_texts_run_dry():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the text holds only")
        yield


def quiet_train(*arguments, **options) -> Tokenizer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train_bpe(*arguments, **options)


# ------------------------------------------------------------------ against the textbook


@given(
    documents=st.lists(oracle.special_texts, min_size=1, max_size=4),
    pattern=st.sampled_from([*PATTERNS, r"\p{L}+", r"\S+\s?", r"(?s:.){1,5}"]),
    specials=st.sampled_from([[], [oracle.EOT], oracle.OVERLAPPING]),
    merges=st.integers(0, 30),
    min_frequency=st.integers(1, 4),
)
@settings(deadline=None, max_examples=120)
def test_equals_a_trainer_that_rescans(documents, pattern, specials, merges, min_frequency):
    tokenizer = quiet_train(iter(documents), 256 + merges + len(specials), specials, pattern, min_frequency)
    counts = oracle.count_words(documents, PATTERNS.get(pattern, pattern), specials)
    expected = oracle.train(counts, merges, min_frequency)
    assert tokenizer.merges == expected
    tokens = [bytes([byte]) for byte in range(256)] + [left + right for left, right in expected]
    assert tokenizer.vocab == dict(enumerate([*tokens, *(special.encode() for special in specials)]))
    assert tokenizer.special_tokens == {name: len(tokens) + index for index, name in enumerate(specials)}
    assert tokenizer.pattern == pattern


@pytest.mark.parametrize("pattern", oracle.PATTERN_NAMES)
def test_large_text_equals_the_textbook(pattern):
    tokenizer = oracle.trained(pattern, (oracle.EOT,), 700)
    counts = oracle.count_words([oracle.TEXT], PATTERNS[pattern], [oracle.EOT])
    assert tokenizer.merges == oracle.train(counts, 700 - 257)
    assert tokenizer.vocab_size == 700


def test_the_compiled_loop_is_used_for_large_tables_and_gives_the_same(monkeypatch):
    called = []

    def spy(*arguments):
        called.append(arguments)
        return original(*arguments)

    original = merging_fast.merge_words_fast
    monkeypatch.setattr(merging_fast, "merge_words_fast", spy)
    reference = train_bpe([oracle.TEXT], 600)
    assert not called
    monkeypatch.setattr(training, "_WORTH_COMPILING", 0)
    assert train_bpe([oracle.TEXT], 600) == reference
    assert called


# ------------------------------------------------------------------ against Hugging Face's trainer


def hf_merges(text: str, vocab_size: int) -> list[tuple[bytes, bytes]]:
    import json

    tokenizers = pytest.importorskip("tokenizers")
    from scratchlm.tokenizer.files import to_bytes

    hf = tokenizers.Tokenizer(tokenizers.models.BPE())
    hf.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    hf.train_from_iterator([text], trainer)
    merges = [
        pair if isinstance(pair, list) else pair.split(" ") for pair in json.loads(hf.to_str())["model"]["merges"]
    ]
    return [(to_bytes(left), to_bytes(right)) for left, right in merges]


def test_equals_hugging_face_where_nothing_ties():
    rng = random.Random(3)
    words = {"".join(rng.choices("abcdefghéñ", k=rng.randint(3, 9))): rng.randint(1, 4000) for _ in range(40)}
    text = "".join(f" {word}" * count for word, count in words.items())
    counts = oracle.count_words([text], PATTERNS["gpt2"], [])
    table = {tuple(bytes([byte]) for byte in word): count for word, count in counts.items()}
    clear = 0  # merges until the first tie
    for pair in oracle.train(counts, 200):
        (_, first), (_, second) = oracle.pair_counts(table).most_common(2)
        if first == second:
            break
        table = {oracle.join(word, pair): count for word, count in table.items()}
        clear += 1
    assert clear >= 10
    merges = train_bpe([text], 256 + clear, []).merges
    assert merges == hf_merges(text, 256 + clear)


def test_hugging_face_differs_in_ties_only():
    """Replayed by the textbook's counts, each merge of either trainer is one of the most frequent pairs."""
    text = oracle.TEXT
    counts = oracle.count_words([text], PATTERNS["gpt2"], [])
    for merges in (hf_merges(text, 256 + 200), train_bpe([text], 256 + 200, []).merges):
        assert len(merges) == 200
        table = {tuple(bytes([byte]) for byte in word): count for word, count in counts.items()}
        for pair in merges:
            pairs = oracle.pair_counts(table)
            assert pairs[pair] == max(pairs.values())
            table = {oracle.join(word, pair): count for word, count in table.items()}


# ------------------------------------------------------------------ files, ranges, processes


@given(
    text=oracle.special_texts,
    # The last ones lie across places where the file would be cut without them.
    specials=st.sampled_from([(), tuple(oracle.OVERLAPPING), ("e word", "x\nlines", "me wo")]),
)
@settings(deadline=None, max_examples=30)
@pytest.mark.parametrize("pattern", [*PATTERNS, r"\p{L}+", r"(?<=a)b+|\S"])
def test_a_file_read_in_ranges_counts_the_same(pattern, text, specials):
    text = f"{text}some words x\nlines{text} " * 5
    expected = dict(oracle.count_words([text], PATTERNS.get(pattern, pattern), list(specials)))
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(counting, "_JOB", 16)
        patch.setattr(counting, "_WINDOW", 256)
        path = Path(folder) / "text.txt"
        path.write_bytes(text.encode())
        assert count_words(path, Pattern(pattern), specials, workers=1) == expected
        assert count_words([text], Pattern(pattern), specials, workers=1) == expected


def test_same_result_for_any_number_of_processes(tmp_path, monkeypatch):
    started = []

    class Spy(counting.Workers):
        def __init__(self, factory, arguments, number):
            started.append(number)
            super().__init__(factory, arguments, number)

    monkeypatch.setattr(counting, "Workers", Spy)
    monkeypatch.setattr(counting, "_JOB", 500)
    monkeypatch.setattr(counting, "_WINDOW", 400)
    monkeypatch.setattr(counting, "_WORTH_HELPERS", 0)
    text = oracle.TEXT + oracle.EOT + oracle.TEXT.swapcase()
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    monkeypatch.setattr(counting, "scanner_for", lambda pattern: None)  # a pattern without one
    for source in (path, [path, path], [text], [text, "more text"]):
        alone = train_bpe(source, 500, oracle.OVERLAPPING, workers=1)
        assert not started
        for number in (2, 3) if source == path else (2,):
            assert train_bpe(source, 500, oracle.OVERLAPPING, workers=number) == alone
            assert started.pop() == number
    before = threading.active_count()
    train_bpe(path, 300, workers=2)
    assert threading.active_count() == before


def test_an_error_in_a_helper_process_reaches_the_caller(tmp_path, monkeypatch):
    monkeypatch.setattr(counting, "_JOB", 500)
    monkeypatch.setattr(counting, "_WORTH_HELPERS", 0)
    monkeypatch.setattr(counting, "scanner_for", lambda pattern: None)
    path = tmp_path / "a.txt"
    broken = oracle.TEXT.encode()
    path.write_bytes(broken + b"\xff" + broken)
    with pytest.raises(UserError, match=rf"a\.txt: byte {len(broken)} is not UTF-8"):
        train_bpe(path, 300, workers=2)


def test_each_file_and_each_document_is_a_text_of_its_own(tmp_path):
    parts = ["no merge ab", "bc across ab", "bc texts"]
    for index, part in enumerate(parts):
        (tmp_path / f"{index}.txt").write_text(part)
    files = [tmp_path / f"{index}.txt" for index in range(3)]
    expected = oracle.count_words(parts, PATTERNS["gpt2"], [])
    assert count_words(files, Pattern("gpt2")) == expected
    assert count_words([str(file) for file in files], Pattern("gpt2")) == expected
    assert count_words((part for part in parts), Pattern("gpt2")) == expected
    assert count_words(str(files[0]), Pattern("gpt2")) == oracle.count_words(parts[:1], PATTERNS["gpt2"], [])


def test_line_ends_of_files_are_kept(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\rthree\n")
    assert count_words(tmp_path / "a.txt", Pattern("o200k"))[b"\r\n"] == 1


def test_documents_may_be_larger_than_memory():
    """The iterable is consumed as it is counted, never kept."""
    alive = 0

    class Counted(str):
        def __new__(cls, text):
            nonlocal alive
            alive += 1
            return super().__new__(cls, text)

        def __del__(self):
            nonlocal alive
            alive -= 1

    most = 0

    def documents():
        nonlocal most
        for number in range(200):
            yield Counted(f"document {number} " * 4000)
            most = max(most, alive)

    count_words(documents(), Pattern("gpt2"), workers=1)
    assert most < 100  # 3 MB look-ahead of 60 kB each, never all 200


# ------------------------------------------------------------------ compiled counting


@pytest.fixture
def scanning(monkeypatch):
    """The compiled way also for small texts, in small ranges and windows."""
    for name, value in {"_WORTH_SCANNING": 0, "_JOB": 64, "_WINDOW": 256}.items():
        monkeypatch.setattr(counting, name, value)
    for name, value in {"_SPANS": 16, "_WINDOW": 48}.items():
        monkeypatch.setattr(counting_fast, name, value)


@given(
    text=oracle.special_texts,
    specials=st.sampled_from([(), tuple(oracle.OVERLAPPING), ("e word", "x\nlines", "me wo")]),
)
@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("pattern", [name for name in PATTERNS if scanner_for(name)])
def test_compiled_counts_equal_the_oracle(scanning, pattern, text, specials):
    text = f"{text}some words x\nlines{text} " * 3
    expected = dict(oracle.count_words([text], PATTERNS[pattern], list(specials)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.txt"
        path.write_bytes(text.encode())
        for workers in (1, 3):
            assert count_words(path, Pattern(pattern), specials, workers) == expected
            assert count_words([text], Pattern(pattern), specials, workers) == expected


@given(text=oracle.special_texts, window=st.integers(1, 40))
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("pattern", [name for name in PATTERNS if scanner_for(name)])
def test_windows_of_any_size_give_the_same_counts(scanning, monkeypatch, pattern, text, window):
    """No safe place to cut is used here: only what the windows hold back makes the counts right."""
    monkeypatch.setattr(counting, "_JOB", 1 << 20)
    monkeypatch.setattr(counting_fast, "_WINDOW", window)
    text = text + text[::-1] + text
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.txt"
        path.write_bytes(text.encode())
        expected = dict(oracle.count_words([text], PATTERNS[pattern], oracle.OVERLAPPING))
        assert count_words(path, Pattern(pattern), tuple(oracle.OVERLAPPING), 1) == expected


@given(text=oracle.special_texts, place=st.integers(0, 400))
@settings(deadline=None, max_examples=300)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_text_may_be_cut_wherever_safe_cut_says(pattern, text, place):
    compiled = Pattern(pattern)
    cut = compiled.safe_cut(text, min(place, len(text)))
    if cut is not None:
        pieces = oracle.pre_tokens(text, PATTERNS[pattern])
        assert (
            oracle.pre_tokens(text[:cut], PATTERNS[pattern]) + oracle.pre_tokens(text[cut:], PATTERNS[pattern])
            == pieces
        )


@given(
    words=st.lists(
        st.one_of(
            st.text("ab", min_size=1, max_size=40).map(str.encode),
            st.binary(min_size=1, max_size=20),
            st.integers(13, 17).map(lambda size: b"x" * size),
            st.integers(14, 400).map(lambda size: bytes(size)),
        ),
        max_size=60,
    ),
    longest=st.sampled_from([2**62, 1, 8, 15, 16, 20]),
    parts=st.integers(1, 3),
)
@settings(deadline=None, max_examples=200)
def test_count_table_equals_a_counter(words, longest, parts):
    tables = [CountTable(longest) for _ in range(parts)]
    for number, table in enumerate(tables):
        mine = words[number::parts]
        data = np.frombuffer(b"".join(mine) + bytes(PAD), np.uint8)
        ends = np.cumsum([0, *map(len, mine)])
        spans = np.full((2 * len(mine), 2), -1, np.int64)  # every other row the end of a region
        spans[::2, 0], spans[::2, 1] = ends[:-1], ends[1:]
        table.add(data, spans, len(spans))
    for table in tables[1:]:
        tables[0].absorb(table)
    assert tables[0].words().as_dict() == Counter(word for word in words if len(word) <= longest)
    too_long = [word for word in words if len(word) > longest]
    assert tables[0].left_out == (len(too_long), sum(map(len, too_long)))


def test_count_table_grows():
    words = [b"%d" % number for number in range(40_000)] + [b"%020d" % number for number in range(9_000)]
    table = CountTable()
    for start in range(0, 2 * len(words), 1000):
        part = [words[index % len(words)] for index in range(start, start + 1000)]
        ends = np.cumsum([0, *map(len, part)])
        data = np.frombuffer(b"".join(part) + bytes(PAD), np.uint8)
        table.add(data, np.stack([ends[:-1], ends[1:]], axis=1), len(part))
    assert table.words().as_dict() == dict.fromkeys(words, 2)


def test_compiled_counting_finds_the_first_fault(scanning, tmp_path):
    path = tmp_path / "a.txt"
    part = oracle.TEXT.encode()
    for broken in (
        b"\xff",
        b"\xc3",
        b"\xed\xa0\x80",
        b"\xf0\x9f\x98",
        b"\xc0\x80",
        b"\xf4\x90\x80\x80",
        b"\xe0\x80\x80",
    ):
        path.write_bytes(part + broken + part + b"\xff")
        for workers in (1, 2):
            with pytest.raises(UserError, match=rf"a\.txt: byte {len(part)} is not UTF-8"):
                train_bpe(path, 300, workers=workers)
    path.write_bytes(part + "漢".encode()[:2])
    with pytest.raises(UserError, match=rf"byte {len(part)} is not UTF-8 \(unexpected end of data\)"):
        train_bpe(path, 300)
    with pytest.raises(UserError, match="lone surrogate"):
        train_bpe([oracle.TEXT, "a\ud800b"], 300)
    with pytest.raises(UserError, match="document 1 is of type bytes"):
        train_bpe([oracle.TEXT, b"b"], 300)  # type: ignore[list-item]


def test_compiled_training_equals_the_plain_one(scanning, tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text(oracle.TEXT + oracle.EOT + oracle.TEXT.swapcase(), encoding="utf-8", newline="")
    fast = [train_bpe(path, 700, workers=workers) for workers in (1, 2, 4)]
    before = threading.active_count()
    train_bpe(path, 300, workers=2)
    assert threading.active_count() == before
    monkeypatch.setattr(counting, "_WORTH_SCANNING", 1 << 40)
    plain = train_bpe(path, 700, workers=1)
    assert all(tokenizer == plain for tokenizer in fast)


@pytest.mark.parametrize("worth", [0, 1 << 40])
def test_long_words_are_left_out_where_asked(monkeypatch, worth):
    monkeypatch.setattr(counting, "_WORTH_SCANNING", worth)
    text = "short abcabcabcabcabcabc words abcabcabcabcabcabc here"
    with pytest.warns(
        UserWarning, match=r"^2 pre-tokens of more than max_word_length = 10 bytes were left out \(38 bytes\)"
    ):
        limited = train_bpe([text], 260, min_frequency=2, max_word_length=10)
    assert (b"b", b"c") not in limited.merges
    assert (b"b", b"c") in quiet_train([text], 260, min_frequency=2).merges
    assert count_words(["aéé b"], Pattern("gpt2"), max_word_length=4) == {b" b": 1}
    with pytest.raises(UserError, match="max_word_length = 0"):
        train_bpe([text], 260, max_word_length=0)


def test_a_run_of_ten_million_letters(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a" * 10_000_000 + b" b")
    tokenizer = quiet_train(path, 257 + 30)
    lengths = [len(left + right) for left, right in tokenizer.merges]
    assert lengths[:23] == [
        2**power for power in range(1, 24)
    ]  # 2 ** 23 = 8,388,608 is the longest power that fits


# ------------------------------------------------------------------ arguments


def test_vocabulary_order():
    last = train_bpe([oracle.TEXT], 300, ["<a>", "<b>"])
    assert [last.vocab[index] for index in (0, 255)] == [b"\x00", b"\xff"]
    assert last.special_tokens == {"<a>": 298, "<b>": 299}
    first = train_bpe([oracle.TEXT], 300, ["<a>", "<b>"], special_first=True)
    assert first.special_tokens == {"<a>": 0, "<b>": 1}
    assert first.vocab[2] == b"\x00" and first.merges == last.merges
    assert first.decode(first.encode(oracle.TEXT + "<b>")) == oracle.TEXT + "<b>"


def test_specials_are_boundaries_and_not_counted():
    tokenizer = train_bpe(["ab<|endoftext|>ab<|endoftext|>endof"], 257 + 1, min_frequency=2)
    assert tokenizer.merges == [(b"a", b"b")]


def test_a_special_of_one_byte_is_that_byte():
    tokenizer = train_bpe(["a|b|ab|ab"], 258, ["|"])
    assert tokenizer.special_tokens == {"|": ord("|")}
    assert tokenizer.merges[0] == (b"a", b"b") and tokenizer.vocab_size == 257 + (len(tokenizer.merges) > 1)
    assert tokenizer.encode("ab|ab") == [256, ord("|"), 256]


def test_fewer_merges_than_asked_for_is_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with pytest.warns(UserWarning, match="holds only 1 mergeable pairs.* 258 tokens, not 1000"):
            assert train_bpe(["ab ab"], 1000, min_frequency=2, pattern=r"\p{L}+").vocab_size == 258


def test_empty_text_gives_the_bytes():
    for source in ([], [""], iter(())):
        assert quiet_train(source, 300).vocab_size == 257


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 256}, r"vocab_size = 256 is smaller than 256 bytes \+ 1 special tokens = 257"),
        ({"vocab_size": -1}, "vocab_size = -1 is smaller"),
        ({"vocab_size": 257, "special_tokens": ["<a>", "<b>"]}, "= 258"),
        ({"special_tokens": ["<a>", "<a>"]}, "'<a>' is named twice"),
        ({"special_tokens": "<a>"}, "is one string; give a list"),
        ({"special_tokens": [""]}, "a special token is empty"),
        ({"special_tokens": [7]}, "is of type int, not a str"),
        ({"special_tokens": ["\ud800"]}, "lone surrogate"),
        ({"pattern": "("}, "not a valid pattern"),
        ({"pattern": "gpt3"}, "unknown pre-tokenisation pattern 'gpt3'"),
        ({"min_frequency": 0}, "min_frequency = 0"),
        ({"workers": 0}, "workers = 0"),
        ({"vocab_size": 10**12}, "vocab_size = 1000000000000 is too large; at most 16777216"),
        ({"min_frequency": 10**30}, "min_frequency = 10+ is too large"),
        ({"workers": 10**9}, "workers = 1000000000: at most 1024"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(options, message):
    with pytest.raises(UserError, match=message) as caught:
        train_bpe(["text"], **{"vocab_size": 300, **options})
    assert "\n" not in str(caught.value)


def test_the_recipe_has_the_same_upper_bounds():
    limits = {"tokenizer.vocab_size": training.MAX_VOCAB, "tokenizer.min_frequency": training.MAX_COUNT}
    for name, most in limits.items():
        section, field = name.split(".")
        validate(Recipe, {section: {field: most}}, "my.toml")
        with pytest.raises(UserError, match=f"^my.toml: {name} = {most + 1}: input should be less than or equal"):
            validate(Recipe, {section: {field: most + 1}}, "my.toml")


@pytest.mark.parametrize(
    "missing",
    [
        ["data/missing-a.txt", "data/missing-b.txt"],
        ["missing.txt"],
        ("corpus.jsonl.GZ", "more.parquet"),
        ["C:\\texts\\a", "./b"],
    ],
)
def test_missing_files_are_not_taken_for_documents(missing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"^training text {re.escape(missing[0])} does not exist, nor .* iter\("):
        train_bpe(missing, 300)
    train_bpe(iter(missing), 257)  # what an iterator gives are documents
    (tmp_path / "there.txt").write_text("text")
    with pytest.raises(UserError, match="cannot read training text"):
        train_bpe([*missing, "there.txt"], 300)


@pytest.mark.parametrize(
    "documents", [["a.txt is a file"], ["end.", "a.txt"], ["data/a.txt", "text"], ["/"], ["a\n/b"]]
)
def test_documents_that_mention_files_are_documents(documents):
    assert train_bpe(documents, 257).vocab_size == 257


def test_smallest_vocabulary():
    tokenizer = train_bpe(["ab ab"], 257)
    assert tokenizer.vocab_size == 257 and tokenizer.merges == []


def test_unreadable_sources(tmp_path):
    with pytest.raises(UserError, match=r"cannot read training text .*absent\.txt: No such file"):
        train_bpe(str(tmp_path / "absent.txt"), 300)
    with pytest.raises(UserError, match="is a folder"):
        train_bpe(tmp_path, 300)
    with pytest.raises(UserError, match="document 1 is of type bytes"):
        train_bpe(["a", b"b"], 300)  # type: ignore[list-item]
    with pytest.raises(UserError, match="lone surrogate"):
        train_bpe(["a\ud800b"], 300)


@pytest.mark.parametrize("compiled_from", [0, 1 << 40])
def test_progress_bars(capsys, monkeypatch, compiled_from):
    monkeypatch.setattr(training, "_WORTH_COMPILING", compiled_from)
    train_bpe([oracle.TEXT], 300, progress=True)
    shown = capsys.readouterr().err
    assert "count words" in shown and "merge pairs" in shown and "43/43" in shown
    train_bpe([oracle.TEXT], 300)
    assert capsys.readouterr().err == ""


def test_import_is_light():
    code = "import sys, scratchlm.tokenizer; print([name for name in ('torch', 'numba') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------ golden


def test_golden_merges():
    """The merges of a fixed text. If this hash has to change, every tokenizer that users have cached would come out
    differently: raise TOKENIZER_VERSION in scratchlm/pipeline.py along with it."""
    hashes = {}
    for pattern in PATTERNS:
        merges = train_bpe([oracle.TEXT], 600, oracle.OVERLAPPING, pattern).merges
        hashes[pattern] = hashlib.blake2b(repr(merges).encode(), digest_size=8).hexdigest()
    assert hashlib.blake2b(oracle.TEXT.encode(), digest_size=8).hexdigest() == "22375917c3168f1f", (
        "TEXT itself was changed"
    )
    assert hashes == {
        "gpt2": "248dba36d2d3c74c",
        "cl100k": "2e3d740a8cb5abf5",
        "o200k": "866b523efdba70e6",
    }
