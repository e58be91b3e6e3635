"""The compiled road gives the ids of the plain one: any vocabulary, pattern, special tokens, chunking, threads, table size."""

from __future__ import annotations

import random
import threading
from itertools import pairwise
from typing import Any

import bpe_oracle as oracle
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scratchlm.errors import UserError
from scratchlm.tokenizer import Tokenizer, decoder, encoding, fast_encoder, merge_table, regions
from scratchlm.tokenizer.encoder import merge_tokens
from scratchlm.tokenizer.pair_search import find_pairs

BYTES = {byte: bytes([byte]) for byte in range(256)}
PATTERNS = ["gpt2", r"\p{L}+|\d", r"(?s:.+)"]


@pytest.fixture(autouse=True)
def _always_compiled(monkeypatch):
    """However short a text is, it goes through the compiled functions."""
    monkeypatch.setattr(encoding, "_SMALL", -1)
    monkeypatch.setattr(regions, "_SHORT", 20)
    monkeypatch.setattr(encoding, "_FIRST", -1)
    monkeypatch.setattr(encoding, "_FIRST_EVER", -1)
    monkeypatch.setattr(encoding, "_WORTH_THREAD", 1)
    monkeypatch.setattr(decoder, "_FEW", -1)
    monkeypatch.setattr(decoder, "_FIRST", -1)


def plain(tokenizer: Tokenizer, text: str | bytes, **options: Any) -> list[int]:
    """The ids that the reference gives: pre-tokens by `regex`, merges by rank in plain Python."""
    encoder = tokenizer._encoder
    specials, _ = encoder.special_choice(options.get("allowed_special", "all"), ())
    return encoder._plain(encoding._as_str(text), specials).tolist()


@st.composite
def vocabularies(draw: Any) -> tuple[dict[int, bytes], list[tuple[bytes, bytes]]]:
    """Merges at random: several that make one token, and tokens that need a later merge; ids in any order."""
    rng = random.Random(draw(st.integers(0, 1 << 30)))
    letters = [bytes([byte]) for byte in rng.sample([*b"ab e1'\n\xc3\xa9\xe6\xbc"], k=rng.randint(2, 9))]
    tokens, merges = list(letters), []
    for _ in range(draw(st.integers(0, 60))):
        pair = (rng.choice(tokens), rng.choice(tokens))
        if pair not in merges:
            merges.append(pair)
            if pair[0] + pair[1] not in tokens:
                tokens.append(pair[0] + pair[1])
    rng.shuffle(merges)
    every = [*map(bytes, ([byte] for byte in range(256))), *(token for token in tokens if len(token) > 1)]
    rng.shuffle(every)
    return dict(enumerate(every)), merges


raw_texts = st.lists(
    st.one_of(
        st.sampled_from(
            [
                b"a",
                b"b",
                b"ab",
                b" ",
                b"e",
                b"1",
                b"'",
                b"\n",
                b"a" * 70,
                b"ab" * 40,
                b"b" * 15,
                b"e" * 16,
                b"<|end|>",
            ]
        ),
        st.sampled_from(["é", "漢", " the", "'s"]).map(str.encode),
        st.binary(max_size=5),
    ),
    max_size=40,
).map(b"".join)


@given(
    vocabulary=vocabularies(),
    data=raw_texts,
    pattern=st.sampled_from(PATTERNS),
    whole=st.booleans(),
    wide=st.booleans(),
)
@settings(deadline=None, max_examples=150)
def test_random_vocabularies(vocabulary, data, pattern, whole, wide):
    vocab, merges = vocabulary
    specials = {"<|end|>": 70_000 if wide else len(vocab)}
    tokenizer = Tokenizer(vocab, merges, specials, pattern, ignore_merges=whole, cache_bytes=1 << 12)
    expected = plain(tokenizer, data)
    ids = tokenizer.encode_array(data)
    assert ids.dtype == (np.uint32 if wide else np.uint16) and ids.flags.writeable
    assert ids.tolist() == expected
    assert tokenizer.encode_array(data).tolist() == expected  # now from the table
    assert tokenizer.count_tokens(data) == len(expected)
    assert tokenizer.decode_bytes(ids) == data == tokenizer.decode_bytes(expected)


@given(
    texts=st.lists(oracle.special_texts, max_size=6),
    chunk=st.integers(1, 40),
    piece=st.integers(1, 200),
    threads=st.integers(1, 3),
)
@settings(deadline=None, max_examples=80)
def test_any_chunks_pieces_and_threads(texts, chunk, piece, threads):
    tokenizer = oracle.trained("gpt2", tuple(oracle.OVERLAPPING))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast_encoder, "CHUNK", chunk)
        patch.setattr(fast_encoder, "PIECE", piece)
        patch.setattr(fast_encoder, "_WINDOW", 7)
        tokenizer._encoder._fast._free.clear()
        assert [array.tolist() for array in tokenizer.encode_batch(texts, threads)] == [
            plain(tokenizer, text) for text in texts
        ]
        joined = " so ".join(texts)
        for text in (joined, joined.encode()):
            assert tokenizer.encode_array(text, threads=threads).tolist() == plain(tokenizer, text)
        assert tokenizer.encode_array(joined, allowed_special=(), threads=threads).tolist() == plain(
            tokenizer, joined, allowed_special=()
        )
    tokenizer._encoder._fast._free.clear()


@given(text=oracle.special_texts, cuts=st.lists(st.integers(0, 200), max_size=5))
@settings(deadline=None, max_examples=60)
def test_any_chunks_of_a_stream(text, cuts):
    tokenizer = oracle.trained("gpt2", tuple(oracle.OVERLAPPING))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("BLOCK", 20), ("_CLOSELY", 10)):
            patch.setattr(f"scratchlm.tokenizer.stream.{name}", value)
        places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
        chunks = [text[start:stop] for start, stop in pairwise(places)]
        assert list(tokenizer.encode_iterable(chunks)) == plain(tokenizer, text)


@pytest.mark.parametrize("cache_bytes", [0, 1 << 12, 1 << 16])
def test_a_table_too_small_for_the_words_of_the_text(cache_bytes):
    tokenizer = Tokenizer(oracle.trained().vocab, oracle.trained().merges, [oracle.EOT], cache_bytes=cache_bytes)
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdehrt", k=rng.choice([3, 9, 15, 16, 17, 40, 90, 300]))) for _ in range(3000)]
    text = " ".join(rng.choices(words, k=20_000))
    assert tokenizer.encode_array(text).tolist() == plain(tokenizer, text)
    [worker] = tokenizer._encoder._fast._free
    assert 0 < worker.table.bytes <= max(cache_bytes, 1 << 15)


def test_a_table_that_grows_keeps_what_it_knows():
    """A thousand rows at first, twice as many each time: the second pass over the text learns nothing."""
    rng = random.Random(4)
    words = ["".join(rng.choices("abcdehrt", k=rng.choice([5, 9, 15, 16, 17, 40]))) for _ in range(12_000)]
    tokenizer = Tokenizer(oracle.trained().vocab, oracle.trained().merges, [oracle.EOT])
    text = " ".join(rng.choices(words, k=60_000))
    expected = plain(tokenizer, text)
    assert tokenizer.encode_array(text).tolist() == expected
    [worker] = tokenizer._encoder._fast._free
    rows, ring, state = len(worker.table._rows), len(worker.table._ring), worker.table._state.copy()
    assert worker.table.bytes > 1 << 20
    filled = np.count_nonzero(worker.table._rows[1::4])
    assert filled == state[6] > 0.98 * len(set(text.split(" "))), "next to none was left behind"
    assert tokenizer.encode_array(text).tolist() == expected
    assert (len(worker.table._rows), len(worker.table._ring)) == (rows, ring)
    assert worker.table._state[6] <= filled * 1.02


@given(
    data=st.lists(st.sampled_from([b"<", b"|", b"<|", b"||", b"a", b"<|" * 40, b"a" * 63, b"<" * 64])).map(
        b"".join
    ),
    ends=st.tuples(st.integers(0, 400), st.integers(0, 400)),
    pairs=st.sampled_from([[b"<|"], [b"<|", b"|a"], [b"aa", b"<<", b"|<", b"<|"]]),
)
@settings(deadline=None)
def test_pairs_of_bytes_are_found(data, ends, pairs):
    begin, end = (min(place, len(data)) for place in sorted(ends))
    array = np.frombuffer(data, np.uint8)
    array.flags.writeable = False
    found, at = np.empty(130, np.int64), begin
    places: list[int] = []
    while at < end:
        count, at = find_pairs(array, at, end, np.array([list(pair) for pair in pairs], np.uint8), found)
        places += found[:count].tolist()
    assert places == [at for at in range(begin, end - 1) if data[at : at + 2] in pairs]


def test_threads_share_a_tokenizer():
    tokenizer = Tokenizer(oracle.trained().vocab, oracle.trained().merges, [oracle.EOT], cache_bytes=1 << 12)
    text = oracle.TEXT * 20
    expected = plain(tokenizer, text)
    wrong: list[int] = []

    def work() -> None:
        wrong.extend(1 for _ in range(10) if tokenizer.encode(text) != expected)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and 1 <= len(tokenizer._encoder._fast._free) <= 4


@pytest.mark.parametrize("unit", [b"a", b"ab", b"abcdehrt0123", bytes(range(256)), "天地玄黃".encode()])
def test_one_long_pre_token(unit):
    """Working memory grows to what the longest needs; the order of merges is that of the reference."""
    tokenizer = Tokenizer(oracle.trained().vocab, oracle.trained().merges, [], r"(?s:.+)")
    rng = random.Random(2)
    data = b"".join(rng.choices([unit, unit[:1], unit[::-1]], k=60_000 // len(unit)))
    assert tokenizer.encode(data) == merge_tokens([tokenizer._byte_ids[byte] for byte in data], tokenizer._ranks)


def test_disallowed_and_unknown_are_named():
    tokenizer = oracle.trained()
    with pytest.raises(UserError, match=r"disallowed special token '<\|endoftext\|>' at character 2"):
        tokenizer.encode_array(("é " + oracle.EOT).encode(), allowed_special=(), disallowed_special="all")
    bad: list[Any] = [[5, 700], [5, -1], np.array([5, 1 << 63], np.uint64), [5, 1 << 70], [5, "a"]]
    for ids in bad:
        with pytest.raises(UserError, match="at position 1 is not in the vocabulary"):
            tokenizer.decode(ids)
    with pytest.raises(UserError, match="in list 1 of the batch: id 700 at position 0"):
        tokenizer.decode_batch([[5], [700]])
    assert tokenizer.decode_batch([[72, 105], np.array([], np.uint16)]) == ["Hi", ""]


@pytest.mark.parametrize("seed", range(3))
def test_long_words_that_begin_alike(seed: int) -> None:
    """Line ends with indentation, rules, underscores: words of 16 bytes and more of which one is the beginning of another, met again
    and again in any order. A row of the table must never answer for a shorter or longer one."""
    rng = random.Random(seed)
    merges = [(b" " * size, b" " * size) for size in (1, 2, 4, 8, 16)] + [
        (b"\n", b" "),
        (b"-", b"-"),
        (b"a", b"a"),
        (b"aa", b"aa"),
    ]
    tokens = [left + right for left, right in merges]
    tokenizer = Tokenizer(BYTES | {256 + place: token for place, token in enumerate(tokens)}, merges)
    words = [
        head + fill * size
        for head in (b"", b"\n", b" ")
        for fill in (b" ", b"-", b"a", b"\n")
        for size in range(1, 70)
    ]
    data = b"x".join(rng.choices(words, k=20_000)) + b"x"
    found = tokenizer.encode_array(data)
    assert tokenizer.decode_bytes(found) == data
    assert found.tolist() == plain(tokenizer, data)
    assert np.array_equal(tokenizer.encode_array(data), found), "from the rows that the first pass left"


@pytest.mark.parametrize("patience", [1 << 40, 0], ids=["plain Python", "compiled"])
def test_long_words_by_plain_python_until_there_are_many(patience, monkeypatch):
    monkeypatch.setattr(merge_table.merge_long, "_compiled", None)
    monkeypatch.setattr(merge_table.merge_long, "_patience", patience)
    rng = random.Random(3)
    words = [
        "".join(rng.choices("abcdehrt", k=size)) for size in (15, 16, 63, 64, 65, 66, 128, 129, 130, 1000, 5000)
    ]
    trained = oracle.trained()
    for cache_bytes in (1 << 12, 1 << 20):
        tokenizer = Tokenizer(trained.vocab, trained.merges, [oracle.EOT], cache_bytes=cache_bytes)
        text = " ".join(rng.choices(words, k=60))
        for _ in range(2):
            assert tokenizer.encode_array(text).tolist() == plain(tokenizer, text)
        assert tokenizer.count_tokens(text) == len(plain(tokenizer, text))
    assert (merge_table.merge_long._compiled is None) == (patience > 0)


def test_whole_words_are_found_among_long_ones(monkeypatch):
    """A tokenizer whose tokens may be whole words asks its table for every word: plain Python would not."""
    monkeypatch.setattr(merge_table.merge_long, "_compiled", None)
    trained = oracle.trained()
    known = ("ab" * 40).encode()
    vocab = {**trained.vocab, len(trained.vocab): known}
    tokenizer = Tokenizer(vocab, trained.merges, {}, "gpt2", ignore_merges=True)
    assert tokenizer.encode(known.decode()) == [len(trained.vocab)]


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1 << 16])
def test_decoding_step_by_step(step, monkeypatch):
    """Characters that the end of a step cuts, ids of every type, and the place of one that is wrong."""
    monkeypatch.setattr(decoder, "_STEP", step)
    trained = oracle.trained()
    ids = trained.encode_array(oracle.TEXT)
    single = [*"né 漢 😀\ufffd".encode(), 0xFF, 0xE2, 0x82, 0x41, 0xF0, 0x9F]  # bytes, which are ids 0 to 255
    for kind in (np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64):
        assert trained.decode(ids.astype(kind)) == oracle.TEXT
        assert trained.decode_bytes(np.array(single, kind)) == bytes(single)
    assert (
        trained.decode(ids.tolist()) == oracle.TEXT and trained.decode_bytes(ids.tolist()) == oracle.TEXT.encode()
    )
    assert trained.decode(ids[::-1][::-1]) == oracle.TEXT
    assert trained.decode(single) == bytes(single).decode(errors="replace")
    wrong: list[Any] = [-1, -(1 << 31), trained.vocab_size, 1 << 31, 1 << 32, (1 << 32) + 5, -(1 << 63)]
    for index in wrong:
        for numbers in ([*single, index, 5], np.array([*single, index, 5])):
            with pytest.raises(UserError, match=f"id {index} at position {len(single)} is not in the vocabulary"):
                trained.decode(numbers)


@pytest.mark.parametrize("pattern", ["gpt2", "cl100k", "o200k"])
@pytest.mark.parametrize("patience", [1 << 40, 0], ids=["plain Python", "compiled"])
@pytest.mark.parametrize("wide", [False, True], ids=["uint16", "uint32, whole words"])
def test_scanner_and_table_in_one_loop(pattern, patience, wide, monkeypatch):
    """A text of many chunks, with all that the loop stops for: more rows, more ring, room, long words, and what only Python ends."""
    monkeypatch.setattr(fast_encoder, "_MANY_CHUNKS", 0)
    monkeypatch.setattr(fast_encoder, "CHUNK", 7)
    monkeypatch.setattr(fast_encoder, "_expected", lambda text: fast_encoder.ROOM)
    trained = oracle.trained()
    specials = {oracle.EOT: 70_000 if wide else trained.special_tokens[oracle.EOT]}
    plain_vocab = {
        index: token for index, token in trained.vocab.items() if index not in trained.special_tokens.values()
    }
    tokenizer = Tokenizer(plain_vocab, trained.merges, specials, pattern, ignore_merges=wide, cache_bytes=1 << 21)
    scanner = tokenizer._encoder._fast._scanner
    assert scanner is not None
    for lazy in (merge_table.merge_long, scanner._module.longer):
        monkeypatch.setattr(lazy, "_compiled", None)
        monkeypatch.setattr(lazy, "_patience", patience)
    rng = random.Random(4)
    words = [
        "".join(rng.choices("abcdehrté漢\n 1'", k=rng.choice([1, 3, 8, 15, 16, 40, 70, 700]))) for _ in range(1500)
    ]
    text = " ".join(rng.choices(words, k=4000)) + oracle.EOT + " ".join(words)
    worker = tokenizer._encoder._fast._worker()
    rows, ring = len(worker.table._rows), len(worker.table._ring)
    tokenizer._encoder._fast._free.append(worker)
    expected = plain(tokenizer, text)
    for _ in range(2):
        assert tokenizer.encode_array(text).tolist() == expected
    assert len(worker.table._rows) > rows and len(worker.table._ring) > ring
    assert [kind for _, kind in worker.table._entries] == [np.dtype(np.uint32 if wide else np.uint16)]
    assert [ids.tolist() for ids in tokenizer.encode_batch([text, text[5:]])] == [
        expected,
        plain(tokenizer, text[5:]),
    ]
    assert tokenizer.count_tokens(text) == len(expected)


def test_tables_of_merges_beside_the_dict():
    """Every pair of tokens, with as few slots as there can be, so that groups are full and run over; and the highest ids and ranks."""
    from scratchlm.tokenizer.machine_words import outer

    @outer
    def ask(lefts, rights, pairs, found):
        for place in range(len(lefts)):
            found[place] = merge_table.rank_of(lefts[place], rights[place], pairs)

    rng = random.Random(8)
    for ids, many in ((300, 700), (merge_table.MOST_IDS, 3000), (256, 0), (256, 1), (256, 3)):
        pairs = {(rng.randrange(ids), rng.randrange(ids)) for _ in range(many)}
        if many > 1:
            pairs |= {(ids - 1, ids - 1), (0, ids - 1), (ids - 1, 0)}
        ranks = {
            left << 32 | right: rank << 32 | min(256 + rank, ids - 1)
            for rank, (left, right) in enumerate(sorted(pairs))
        }
        table = merge_table.merge_table(list(range(256)), ranks)
        asked = [*pairs, *((rng.randrange(ids), rng.randrange(ids)) for _ in range(3000)), (ids - 1, 256), (0, 0)]
        asked += [(merge_table.MOST_IDS, 5), (5, merge_table.MOST_IDS)]  # the wall
        found = np.empty(len(asked), np.uint64)
        ask(
            np.array([left for left, _ in asked], np.uint64),
            np.array([right for _, right in asked], np.uint64),
            table.pairs,
            found,
        )
        unknown = merge_table.MOST_MERGES
        assert found.tolist() == [ranks.get(left << 32 | right, unknown << 32) >> 32 for left, right in asked]
    full = np.flatnonzero(table.pairs != np.uint64(0xFFFFFFFFFFFFFFFF))
    assert len(full) == len(ranks)


@pytest.mark.parametrize(("vocab_size", "compiled"), [((1 << 21) - 1, True), (1 << 21, False)])
def test_the_highest_id_that_is_compiled_for(vocab_size, compiled):
    trained = oracle.trained()
    tokens = {
        index: token for index, token in trained.vocab.items() if index not in trained.special_tokens.values()
    }
    tokenizer = Tokenizer(tokens, trained.merges, {"<|end|>": vocab_size - 1}, "gpt2")
    assert tokenizer.vocab_size == vocab_size and tokenizer._encoder._can_compile == compiled
    text = oracle.TEXT + "<|end|>" + oracle.TEXT
    assert tokenizer.encode_array(text).tolist() == plain(tokenizer, text)
