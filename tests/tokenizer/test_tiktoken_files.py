"""tiktoken's rank files: ids are tiktoken's for any ranks, ways back are exact, damage is one line."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import bpe_oracle as oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scratchlm.errors import UserError
from scratchlm.tokenizer import PATTERNS, Tokenizer
from scratchlm.tokenizer import reading as reading_module
from scratchlm.tokenizer.dialects import to_fancy_regex
from scratchlm.tokenizer.tiktoken_files import (
    KNOWN,
    Known,
    known_name,
    load_tiktoken,
    merges_of,
    ranks_of,
    read_ranks,
)

GPT2 = Path(__file__).parents[2].parent / "shared" / "data" / "gpt2"
BYTES = {bytes([byte]): byte for byte in range(256)}
# Patterns that leave something out, look at the ends, or hold what Rust's classes read otherwise.
ODD_PATTERNS = [
    r"\p{L}+", r"\p{L}+|\p{N}{1,2}+|.", r"^\S+|\s+|\S+\Z|\S", r"\S+$|\s|\S", r"[\s^$]+|[^\s^$]+", r"[]a]+|[^]a]+",
    r"[a[&&]+|[~~b-]+|\[[^[]", r"[]~~x]+|(?m:^)b|a(?m:$)", r"\{|\}|[^{}]+",
]  # fmt: skip


def written(ranks: dict[bytes, int]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())


def encoding(ranks: dict[bytes, int], pattern: str = r"[\s\S]+", specials: dict[str, int] | None = None):
    tiktoken = pytest.importorskip("tiktoken")
    return tiktoken.Encoding("theirs", pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials or {})


# ------------------------------------------------------------------ ids equal tiktoken's


@st.composite
def any_ranks(draw) -> dict[bytes, int]:
    """Ranks that no training made: tokens without parts, parts ranked after wholes, tokens in any order."""
    tokens = draw(st.lists(st.text("ab c", min_size=2, max_size=6).map(str.encode), unique=True, max_size=14))
    order = [*BYTES, *tokens]
    if draw(st.booleans()):
        order = draw(st.permutations(tokens)) + list(BYTES)
    return {token: rank for rank, token in enumerate(order)}


@given(ranks=any_ranks(), texts=st.lists(st.text("aaab c", max_size=60), min_size=1, max_size=5))
@settings(deadline=None, max_examples=300)
def test_ids_for_any_ranks_at_all(ranks, texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks") / "any.tiktoken"
    path.write_bytes(written(ranks))
    tokenizer = load_tiktoken(path, r"[\s\S]+")
    other = encoding(ranks)
    for text in texts:
        assert tokenizer.encode(text) == other.encode(text)
    for token in ranks:  # tiktoken finds a whole pre-token first
        assert tokenizer.encode(token) == [ranks[token]]


@pytest.mark.parametrize("name", list(PATTERNS))
def test_a_trained_tokenizer_there_and_back(name, tmp_path):
    tokenizer = oracle.trained(name, ("<|endoftext|>", "<|pad|>"))
    path = tokenizer.save_tiktoken(tmp_path / "ours.tiktoken")
    from tiktoken.load import load_tiktoken_bpe

    ranks = load_tiktoken_bpe(str(path))
    assert ranks == read_ranks(path) == ranks_of(tokenizer)
    again = Tokenizer.from_tiktoken(path, name, tokenizer.special_tokens)
    assert again == tokenizer and again.merges == tokenizer.merges
    theirs = encoding(ranks, oracle.tiktoken_patterns()[name], tokenizer.special_tokens)
    live = tokenizer.as_tiktoken()
    assert live.n_vocab == tokenizer.vocab_size

    @given(text=oracle.texts)
    @settings(deadline=None, max_examples=100)
    def equal(text):
        ids = tokenizer.encode(text)
        assert ids == again.encode(text)
        assert ids == theirs.encode(text, allowed_special="all") == live.encode(text, allowed_special="all")

    equal()
    assert live.decode(tokenizer.encode(oracle.TEXT)) == oracle.TEXT


@pytest.mark.parametrize("pattern", ODD_PATTERNS)
def test_live_objects_with_any_pattern(pattern):
    tokenizer = oracle.trained(pattern, ("<|endoftext|>",), 400)
    live = tokenizer.as_tiktoken()

    @given(text=st.one_of(oracle.texts, st.text("ab1 \n[]^$&-~{}x漢", max_size=20)))
    @settings(deadline=None, max_examples=100)
    def equal(text):
        assert live.encode(text, allowed_special="all") == tokenizer.encode(text)

    equal()


def test_dialect_of_rust():
    assert to_fancy_regex(r"a$|b\Z|^c|[a[&&b--c~~d\]]|\$|(?m:$)|\p{L}{1,2}+") == (
        r"a(?=\n?\z)|b\z|^c|[a\[\&&b\--c\~~d\]]|\$|(?m:$)|\p{L}{1,2}+"
    )
    assert to_fancy_regex("gpt2") == PATTERNS["gpt2"]


def test_merges_of_ranks_by_hand():
    ranks = BYTES | {b"th": 256, b"the": 257, b"he": 258, b"xyz": 259, b"hen": 260}
    # (t, he) and (he, n): "hen" alone is made of he + n; "xyz" has no parts.
    assert merges_of(ranks) == ([(b"t", b"h"), (b"th", b"e"), (b"h", b"e"), (b"he", b"n")], [b"xyz"])


@pytest.mark.skipif(not GPT2.is_dir(), reason="GPT-2's files are not here (../shared/data/gpt2)")
def test_gpt2_as_a_rank_file(tmp_path):
    tokenizer = Tokenizer.load(GPT2)
    assert tokenizer.special_tokens == {"<|endoftext|>": 50256}
    path = tokenizer.save_tiktoken(tmp_path / "r50k_base.tiktoken")
    again = Tokenizer.load(path)  # 50,256 ranks: the name says the rest
    assert again == tokenizer and again.merges == tokenizer.merges and not again.ignore_merges


# ------------------------------------------------------------------ well-known files


def test_known_files_are_what_tiktoken_publishes():
    pytest.importorskip("tiktoken")
    from tiktoken_ext import openai_public

    loaders = ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks")
    kept = {name: getattr(openai_public, name) for name in loaders}
    try:
        for name in loaders:  # they would download the ranks
            setattr(openai_public, name, lambda *_, **__: {})
        published = {name: make() for name, make in openai_public.ENCODING_CONSTRUCTORS.items()}
    finally:
        for name, function in kept.items():
            setattr(openai_public, name, function)
    for name in ("r50k_base", "p50k_base", "p50k_edit", "cl100k_base", "o200k_base", "o200k_harmony"):
        theirs = dict(published[name]["special_tokens"])
        if name == "o200k_harmony":  # one id under two names
            assert theirs.pop("<|reserved_200018|>") == theirs["<|endofprompt|>"]
        assert KNOWN[name].special_tokens == theirs
        assert oracle.tiktoken_patterns()[KNOWN[name].pattern] == published[name]["pat_str"]
        size = published[name].get("explicit_n_vocab")
        assert size is None or size == KNOWN[name].ranks + len(theirs)


def test_llama3_and_qwen():
    llama = KNOWN["llama3"].special_tokens
    assert list(llama.values()) == list(range(128_000, 128_256))
    assert [llama[f"<|{name}|>"] for name in ("begin_of_text", "start_header_id", "eot_id")] == [
        128000,
        128006,
        128009,
    ]
    assert llama["<|reserved_special_token_4|>"] == 128008 and llama["<|reserved_special_token_250|>"] == 128255
    qwen = KNOWN["qwen"].special_tokens
    assert (qwen["<|im_end|>"], qwen["<|extra_0|>"], qwen["<|extra_204|>"]) == (151645, 151646, 151850)


@pytest.mark.parametrize(
    ("file", "name"),
    [("cl100k_base.tiktoken", "cl100k_base"), ("qwen.tiktoken", "qwen"), ("tokenizer.model", "llama3"), ("mine.tiktoken", None),
     ("cl100k_base.txt", None)],
)  # fmt: skip
def test_names(file, name):
    assert known_name(Path("somewhere") / file) == name


def shape_alike(name: str, monkeypatch) -> dict[bytes, int]:
    """Ranks trained here, and `name` said to have as many, its special tokens where they are in the original."""
    known = KNOWN[name]
    pattern = known.pattern
    ranks = ranks_of(oracle.trained(pattern, (), 600))
    small = Known(len(ranks), pattern, known.special_tokens, known.normalizer)
    monkeypatch.setitem(KNOWN, name, small)
    return ranks


@pytest.mark.parametrize("name", [name for name in KNOWN if not name.startswith("p50k")])
def test_ids_of_well_known_files(name, monkeypatch, tmp_path):
    """With holes between ranks and special tokens, wider than cl100k's and o200k's."""
    ranks = shape_alike(name, monkeypatch)
    file = {"llama3": "tokenizer.model", "o200k_harmony": "o200k_base.tiktoken"}.get(name, f"{name}.tiktoken")
    (tmp_path / file).write_bytes(written(ranks))
    tokenizer = load_tiktoken(tmp_path / file, name=name)
    if name != "o200k_harmony":
        assert Tokenizer.load(tmp_path / file) == tokenizer
    known = KNOWN[name]
    assert tokenizer.vocab_size == max(known.special_tokens.values()) + 1
    assert tokenizer.vocab_size > len(tokenizer.vocab) == len(ranks) + len(known.special_tokens)
    other = encoding(ranks, oracle.tiktoken_patterns().get(known.pattern, known.pattern), known.special_tokens)
    special = next(iter(known.special_tokens))
    for text in ("", special, f"it'S 12345{special}  {special}\r\n x", oracle.TEXT):
        ids = tokenizer.encode(text)
        if known.normalizer is None:
            assert ids == other.encode(text, allowed_special="all")
        assert tokenizer.decode(ids) == (unicodedata.normalize("NFC", text) if known.normalizer else text)
    assert tokenizer.encode_array(special).tolist() == [known.special_tokens[special]]
    hole = len(ranks)
    with pytest.raises(
        UserError, match=rf"id {hole} at position 1 is not in the vocabulary: no token has it, it is one of"
    ):
        tokenizer.decode([5, hole, 6])
    with pytest.raises(
        UserError, match=rf"id {tokenizer.vocab_size} at position 0 .*\(0 to {tokenizer.vocab_size - 1}\)"
    ):
        tokenizer.decode([tokenizer.vocab_size])
    if known.normalizer is not None:
        assert tokenizer.encode("e\u0301") == tokenizer.encode("é")
    # The other format keeps the ids, holes and all.
    assert Tokenizer.load(tokenizer.save(tmp_path / "t")) == tokenizer
    live = tokenizer.as_hf()
    text = f"it'S 12345{special}\r\n {special}é"
    assert live.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)


def test_special_tokens_in_a_hole_of_the_ranks(tmp_path):
    """p50k_base has <|endoftext|> at 50256, between its ranks."""
    tokens = list(ranks_of(oracle.trained("gpt2", (), 600)))
    ranks = {token: rank + (rank >= 500) for rank, token in enumerate(tokens)}
    (tmp_path / "p.tiktoken").write_bytes(written(ranks))
    tokenizer = Tokenizer.from_tiktoken(tmp_path / "p.tiktoken", "gpt2", {"<|endoftext|>": 500})
    other = encoding(ranks, PATTERNS["gpt2"], {"<|endoftext|>": 500})
    assert tokenizer.encode(oracle.TEXT) == other.encode(oracle.TEXT, allowed_special="all")
    assert tokenizer.vocab_size == len(tokenizer.vocab) == 601
    assert ranks_of(tokenizer) == ranks
    with pytest.raises(UserError, match="id 500 is missing, though"):
        Tokenizer.from_tiktoken(tmp_path / "p.tiktoken", "gpt2")


def test_specials_as_a_list_get_the_next_ids(tmp_path):
    (tmp_path / "b.tiktoken").write_bytes(written(BYTES))
    assert Tokenizer.from_tiktoken(tmp_path / "b.tiktoken", "gpt2", ["<a>", "<b>"]).special_tokens == {
        "<a>": 256,
        "<b>": 257,
    }


# ------------------------------------------------------------------ what tiktoken cannot do


def test_what_tiktoken_cannot_do_is_named(tmp_path):
    vocab = {rank: token for token, rank in BYTES.items()}
    ab = vocab | {256: b"ab", 257: b"bc"}
    cases = [
        (Tokenizer(vocab, [], normalizer="NFC"), "does not normalise text, and this tokenizer does .NFC."),
        (Tokenizer(ab, [(b"b", b"c"), (b"a", b"b")]), r"would do \(b'a', b'b'\) where .* merge 0, \(b'b', b'c'\)"),
        (Tokenizer(ab, [(b"a", b"b")]), r"token b'bc' \(id 257\) is made by no merge"),
        (Tokenizer(vocab | {256: b"xyz"}, []), r"token b'xyz' \(id 256\) is made by no merge"),
    ]
    for tokenizer, message in cases:
        for convert in (Tokenizer.as_tiktoken, lambda t: t.save_tiktoken(tmp_path / "x.tiktoken")):
            with pytest.raises(UserError, match=message):
                convert(tokenizer)
    assert not (tmp_path / "x.tiktoken").exists()
    assert Tokenizer(vocab | {256: b"xyz"}, [], ignore_merges=True).as_tiktoken().encode("xyz") == [256]
    with pytest.raises(UserError, match="special token '<a' begins '<a>'"):
        Tokenizer(vocab, [], ["<a>", "<a"]).as_tiktoken()
    with pytest.raises(UserError, match="can match nothing at all"):
        Tokenizer(vocab, [], pattern=r"\p{L}*").as_tiktoken()
    for pattern, message in [
        (r"(?:foo){e<=1}|.", r"uses \{e<=1\}, which tiktoken reads otherwise"),
        (r"\h+|.", r"uses \\h, which tiktoken reads otherwise"),
        (r"[[:alpha:]]+|.", r"uses \[\[:alpha:\]\], which tiktoken reads as ASCII only"),
        (r"(?m)^a|.", r"uses the flag m \(\(\?m\)\)"),
        (r"(?|(a)|(b))", "tiktoken cannot read the pattern"),
    ]:
        with pytest.raises(UserError, match=message):
            Tokenizer(vocab, [], pattern=pattern).as_tiktoken()


def test_without_the_other_libraries():
    code = """
import sys
sys.modules["tiktoken"] = sys.modules["tokenizers"] = None
from scratchlm.errors import UserError
from scratchlm.tokenizer import Tokenizer
tokenizer = Tokenizer({byte: bytes([byte]) for byte in range(256)}, [])
for live in (tokenizer.as_tiktoken, tokenizer.as_hf):
    try:
        live()
    except UserError as error:
        print(error)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == [
        "tiktoken is not installed: pip install 'scratchlm[oracles]'",
        "tokenizers is not installed: pip install 'scratchlm[oracles]'",
    ]


# ------------------------------------------------------------------ damaged files

GOOD = written(BYTES | {b"ab": 256})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (GOOD[:-6], "line 257 .* is not a token in base64 and its rank; the file is of another kind, or cut off"),
        (GOOD[:-2], "rank 25 stands in line 26 and in line 257; the file may be cut off"),
        (GOOD + b"not base64! 257\n", "line 258 .'not base64! 257'. is not a token in base64"),
        (GOOD + b"YWJj x\n", "line 258"),
        (GOOD + b"YWJj -1\n", "b'abc' has the id -1"),
        (GOOD + b"YWJj 1 2\n", "line 258"),
        (GOOD + b"YWJj 256\n", "rank 256 stands in line 257 and in line 258"),
        (GOOD + b"YWI= 257\n", "token b'ab' stands in line 257 and in line 258"),
        (GOOD + b"YWJj 300\n", "id 257 is missing, though b'abc' has id 300"),
        (GOOD + b"YWJj 99999999999999999999\n", "id 257 is missing|has the id 99999999999999999999"),
        (b"\n".join(GOOD.split(b"\n")[1:]), r"the single byte b'\\x00' has no rank"),
        (b"\xff\xfe\x00", r"line 1 \('\\\\xff\\\\xfe\\x00'\) is not a token in base64"),
        ("漢 1\n".encode(), "line 1 .'漢 1'. is not"),
        (b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02", "is not a token in base64"),
        (base64.b64encode(b"a" * 20_000) + b" 0\n", "a token of 20,000 bytes; at most 16,384"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "line 1 .'version https"),
    ],
)  # fmt: skip
def test_damaged_rank_file(content, message, tmp_path):
    path = tmp_path / "x.tiktoken"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_tiktoken(path, "gpt2")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@given(cut=st.integers(0, len(GOOD)), noise=st.binary(max_size=4))
@settings(deadline=None, max_examples=150)
def test_any_damage_is_a_user_error_or_harmless(cut, noise, tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks") / "x.tiktoken"
    path.write_bytes(GOOD[:cut] + noise + GOOD[cut + len(noise) :])
    try:
        tokenizer = load_tiktoken(path, "gpt2")
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert tokenizer.decode(tokenizer.encode("ab x")) == "ab x"


def test_files_that_are_none(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_tiktoken(tmp_path / "none.tiktoken", "gpt2")
    (tmp_path / "folder.tiktoken").mkdir()
    with pytest.raises(UserError, match="is a folder, not a file"):
        load_tiktoken(tmp_path / "folder.tiktoken", "gpt2")
    huge = tmp_path / "huge.tiktoken"
    with huge.open("wb") as stream:
        stream.truncate(reading_module.LARGEST + 1)
    (tmp_path / "tokenizer.json").symlink_to(huge)
    for load in (lambda: load_tiktoken(huge, "gpt2"), lambda: Tokenizer.load(tmp_path / "tokenizer.json")):
        with pytest.raises(UserError, match=r"has 1\.0 GiB; no tokenizer's file is that large"):
            load()
    os.mkfifo(tmp_path / "pipe.tiktoken")
    with pytest.raises(UserError, match="is no regular file"):
        load_tiktoken(tmp_path / "pipe.tiktoken", "gpt2")


def test_pattern_and_specials_must_be_known(tmp_path):
    path = tmp_path / "mine.tiktoken"
    path.write_bytes(GOOD)
    with pytest.raises(
        UserError, match=r"does not hold its pattern, and its name is none of r50k_base, .*: give the pattern"
    ):
        Tokenizer.load(path)
    with pytest.raises(UserError, match="'cl100k' is no well-known encoding; there are r50k_base"):
        load_tiktoken(path, name="cl100k")
    (tmp_path / "cl100k_base.tiktoken").write_bytes(GOOD)
    with pytest.raises(UserError, match="has 257 tokens, cl100k_base has 100,256: it is cut off"):
        Tokenizer.load(tmp_path / "cl100k_base.tiktoken")
    meant = load_tiktoken(tmp_path / "cl100k_base.tiktoken", "gpt2", [])
    assert meant.special_tokens == {} and meant.pattern == "gpt2"
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    with pytest.raises(UserError, match="a SentencePiece model, perhaps"):
        Tokenizer.load(tmp_path / "tokenizer.model")
