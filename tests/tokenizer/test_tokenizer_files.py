"""Files: read and written as Hugging Face and GPT-2 do; damaged ones are refused in one line."""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path

import bpe_oracle as oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scratchlm.errors import UserError
from scratchlm.tokenizer import PATTERNS, Tokenizer, train_bpe
from scratchlm.tokenizer.dialects import from_oniguruma, to_oniguruma
from scratchlm.tokenizer.files import byte_to_char, to_bytes, to_chars
from scratchlm.tokenizer.patterns import Pattern

GPT2 = Path(__file__).parents[2].parent / "shared" / "data" / "gpt2"
ODD_PATTERNS = [
    r"\p{L}+|\p{N}{1,2}+|.", r"^\S+|\s+|\S+\Z|\S", r"\S+$|\s|\S", r"[\s^$]+|[^\s^$]+", r"[]a]+|[^]a]+", r"\{|\}|[^{}]+", r"(?m:^)\S+|\s+|\S+(?m:$)|\S",
]  # fmt: skip


def test_byte_table():
    """Hugging Face's own table, and the printable bytes as they are."""
    tokenizers = pytest.importorskip("tokenizers")
    table = byte_to_char()
    assert sorted(table.values()) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert to_chars(b" the\n") == "ĠtheĊ" and table[0x21] == "!" and table[0] == "Ā"
    assert to_bytes(to_chars(bytes(range(256)))) == bytes(range(256))
    known = set(table.values())
    for code in range(0x400):
        if chr(code) not in known:
            with pytest.raises(KeyError) as caught:
                to_bytes(f"a{chr(code)}b")
            assert caught.value.args == (chr(code),)


# ------------------------------------------------------------------ tokenizer.json


@pytest.mark.parametrize("pattern", [*PATTERNS, *ODD_PATTERNS])
def test_saved_and_loaded_is_the_same(pattern, tmp_path):
    tokenizer = oracle.trained(pattern, tuple(oracle.OVERLAPPING), 500)
    assert tokenizer.save(tmp_path) == tmp_path / "tokenizer.json"
    for path in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path)):
        again = Tokenizer.load(path)
        assert again == tokenizer and again.content_hash == tokenizer.content_hash
        assert again.pattern == tokenizer.pattern
        assert (again.vocab, again.merges, again.special_tokens) == (
            tokenizer.vocab, tokenizer.merges, tokenizer.special_tokens,
        )  # fmt: skip
    assert tokenizer.save(tmp_path / "other.json") == tmp_path / "other.json"
    assert Tokenizer.load(tmp_path / "other.json") == tokenizer
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.json", "tokenizer.json"]


@pytest.mark.parametrize("pattern", [*PATTERNS, *ODD_PATTERNS])
def test_hugging_face_opens_what_we_write(pattern, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = oracle.trained(pattern, tuple(oracle.OVERLAPPING), 500)
    other = tokenizers.Tokenizer.from_file(str(tokenizer.save(tmp_path)))
    assert other.get_vocab_size() == tokenizer.vocab_size
    for text in [oracle.TEXT, "a\nb\n", "\n\n", oracle.EOT + "x", "12345 ^$ {a} ]a]"]:
        ids = other.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == ids
        assert other.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids) == text


@pytest.mark.parametrize("special_first", [False, True])
def test_specials_at_either_end(tmp_path, special_first):
    tokenizer = train_bpe([oracle.TEXT], 400, ["<é>", "[x]"], special_first=special_first)
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path) == tokenizer
    tokenizers = pytest.importorskip("tokenizers")
    other = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert other.encode("a[x]<é>b").ids == tokenizer.encode("a[x]<é>b")


def hugging_face_trained(pre_tokenizer, vocab_size=450):
    import tokenizers

    other = tokenizers.Tokenizer(tokenizers.models.BPE())
    other.pre_tokenizer = pre_tokenizer
    other.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<pad>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    other.train_from_iterator([oracle.TEXT], trainer)
    other.add_special_tokens(["<later>"])
    return other


@pytest.mark.parametrize("kind", ["gpt2", "split", "removed"])
def test_we_open_what_hugging_face_writes(kind, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    pre = tokenizers.pre_tokenizers
    llama3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    plain = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    other = hugging_face_trained(
        {
            "gpt2": pre.ByteLevel(add_prefix_space=False),
            "split": pre.Sequence([pre.Split(tokenizers.Regex(llama3), "isolated"), plain]),
            "removed": pre.Sequence([pre.Split(tokenizers.Regex(llama3), "removed", invert=True), plain]),
        }[kind]
    )
    other.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.special_tokens == {"<|endoftext|>": 0, "<pad>": 1, "<later>": 450}
    assert tokenizer.pattern == ("gpt2" if kind == "gpt2" else llama3)
    for text in [oracle.TEXT, "", "a<later>  b<pad>\n\n", "it'S 12345"]:
        assert tokenizer.encode(text) == other.encode(text, add_special_tokens=False).ids
    tokenizer.save(tmp_path / "again.json")
    assert Tokenizer.load(tmp_path / "again.json") == tokenizer


def test_merges_as_lines_as_older_files_have_them(tmp_path):
    tokenizer = oracle.trained()
    path = tokenizer.save(tmp_path)
    content = json.loads(path.read_text())
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    path.write_text(json.dumps(content))
    assert Tokenizer.load(path) == tokenizer


def test_ignore_merges_is_kept(tmp_path):
    vocab = {byte: bytes([byte]) for byte in range(256)} | {256: b"abc"}
    tokenizer = Tokenizer(vocab, [], ["<e>"], ignore_merges=True)
    assert Tokenizer.load(tokenizer.save(tmp_path)) == tokenizer
    tokenizers = pytest.importorskip("tokenizers")
    other = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert other.encode("abc abc").ids == tokenizer.encode("abc abc") == [256, 32, 97, 98, 99]


def test_a_special_that_would_read_as_another_token_is_refused(tmp_path):
    # "Ġ" written in the file stands for the space.
    tokenizer = Tokenizer({byte: bytes([byte]) for byte in range(256)}, [], ["Ġ"])
    for write in (tokenizer.save, tokenizer.save_gpt2):
        with pytest.raises(UserError, match="special token 'Ġ' cannot be written"):
            write(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("pattern", [*PATTERNS, *ODD_PATTERNS])
def test_pattern_there_and_back(pattern):
    back = from_oniguruma(to_oniguruma(pattern))
    assert back == pattern or pattern not in PATTERNS
    for text in (oracle.TEXT, "a\nb\n", "\na", "12345 ^$ {a} ]a]"):
        assert Pattern(back).split(text) == Pattern(pattern).split(text)


def test_oniguruma_anchors_are_read_as_ruby_means_them():
    assert from_oniguruma(r"^a|b$|c\Z|d\z|\^|[$^]") == r"(?m:^)a|b(?m:$)|c$|d\Z|\^|[$^]"


# ------------------------------------------------------------------ GPT-2's pair


def test_gpt2_pair_there_and_back(tmp_path):
    tokenizer = oracle.trained("gpt2", tuple(oracle.OVERLAPPING))
    tokenizer.save_gpt2(tmp_path)
    files = tmp_path / "vocab.json", tmp_path / "merges.txt"
    assert Tokenizer.from_files(*files, oracle.OVERLAPPING) == tokenizer
    assert Tokenizer.from_files(*map(str, files), tokenizer.special_tokens) == tokenizer
    assert files[1].read_text(encoding="utf-8").startswith("#version: 0.2\n")
    tokenizers = pytest.importorskip("tokenizers")
    other = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(*map(str, files)))
    other.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    other.add_special_tokens(oracle.OVERLAPPING)
    assert other.encode(oracle.TEXT + oracle.EOT).ids == tokenizer.encode(oracle.TEXT + oracle.EOT)


def test_gpt2_pair_with_windows_line_ends_and_new_specials(tmp_path):
    tokenizer = oracle.trained("gpt2", ())
    tokenizer.save_gpt2(tmp_path)
    merges = tmp_path / "merges.txt"
    merges.write_bytes(merges.read_bytes().replace(b"\n", b"\r\n"))
    again = Tokenizer.from_files(tmp_path / "vocab.json", merges, ["<new>"])
    assert again.merges == tokenizer.merges and again.special_tokens == {"<new>": tokenizer.vocab_size}


def test_a_folder_with_the_pair_can_be_loaded(tmp_path):
    tokenizer = oracle.trained("gpt2", ())
    tokenizer.save_gpt2(tmp_path)
    assert Tokenizer.load(tmp_path) == tokenizer


@pytest.mark.skipif(not GPT2.is_dir(), reason="GPT-2's files are not here (../shared/data/gpt2)")
def test_gpt2_itself_equals_tiktoken():
    tokenizer = Tokenizer.from_files(GPT2 / "vocab.json", GPT2 / "merges.txt", [oracle.EOT])
    assert tokenizer.vocab_size == 50257 and len(tokenizer.merges) == 50000
    assert tokenizer.encode("Hello, world!") == [15496, 11, 995, 0]
    assert tokenizer.encode("<|endoftext|>") == [50256]
    pytest.importorskip("tiktoken")
    other = oracle.as_tiktoken(tokenizer)
    for text in [
        oracle.TEXT,
        Path(__file__).read_text(encoding="utf-8"),
        " " * 5000,
        "a" * 5000,
        oracle.EOT * 2 + "x",
    ]:
        assert tokenizer.encode(text) == other.encode(text, allowed_special="all")

    @given(text=oracle.texts)
    @settings(deadline=None, max_examples=200)
    def any_text(text):
        assert tokenizer.encode(text) == other.encode(text, allowed_special="all")

    any_text()


# ------------------------------------------------------------------ damaged files


def damaged(**changes):
    """A small tokenizer.json with fields changed; None removes the field. Dots lead inwards."""
    content = json.loads(_small())
    for name, value in changes.items():
        *way, last = name.split("__")
        place = content
        for step in way:
            place = place[step]
        if value is None:
            del place[last]
        else:
            place[last] = value
    return json.dumps(content)


@functools.cache
def _small() -> str:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return oracle.trained("gpt2", (oracle.EOT,), 270).save(folder).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: _small()[:300], "not valid JSON"),
        (lambda: "", "not valid JSON"),
        (lambda: "\xff\xfe", "no tokenizer.json|not valid JSON"),
        (lambda: "[]", "it has no model"),
        (lambda: "5", "it has no model"),
        (lambda: "{}", "it has no model"),
        (lambda: damaged(model="BPE"), "it has no model"),
        (lambda: damaged(model__type="WordPiece"), "the model is WordPiece"),
        (lambda: damaged(model__merges=None), "model.merges is missing"),
        (lambda: damaged(model__merges={"a": 1}), "model.merges is missing or not a list"),
        (lambda: damaged(model__merges=["x y"]), r"merge 0 \(b'x', b'y'\): b'xy' is not in vocab"),
        (lambda: damaged(model__merges=["x"]), "merge 0 is 'x', not two tokens"),
        (lambda: damaged(model__merges=[["a", "b", "c"]]), "not two tokens"),
        (lambda: damaged(model__merges=[["a", 5]]), "not two tokens"),
        (lambda: damaged(model__merges=[5]), "merge 0 is 5"),
        (lambda: damaged(model__merges=["a 漢"]), "merge 0 holds '漢', which stands for no byte"),
        (lambda: damaged(model__vocab=None), "vocabulary is not a JSON object"),
        (lambda: damaged(model__vocab=["a"]), "vocabulary is not a JSON object"),
        (lambda: damaged(model__vocab__a="7"), "token 'a' has the id '7'"),
        (lambda: damaged(model__vocab__a=-7), "token 'a' has the id -7"),
        (lambda: damaged(model__vocab__a=7.5), "token 'a' has the id 7.5"),
        (lambda: damaged(model__vocab__a=5), "id 5 is given to two tokens"),
        (lambda: damaged(model__vocab__a=9999), "id 97 is missing"),
        (lambda: damaged(model__vocab={}), "is missing"),
        (lambda: damaged(model__vocab__漢=270), "token '漢' .* stands for no byte"),
        (lambda: damaged(model__byte_fallback=True), "byte_fallback"),
        (lambda: damaged(model__dropout=0.1), "dropout"),
        (lambda: damaged(normalizer={"type": "Lowercase"}), "normalizer 'Lowercase' is not supported"),
        (lambda: damaged(normalizer="NFC"), "normalizer 'NFC' is not supported"),
        (
            lambda: damaged(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}] * 2}),
            "'Sequence' is not",
        ),
        (lambda: damaged(normalizer={"type": ["NFC"]}), "is not supported"),
        (
            lambda: damaged(
                normalizer={"type": "NFC"}, added_tokens=[{"id": 269, "content": oracle.EOT, "normalized": True}]
            ),
            "is normalized and looked for after NFC",
        ),
        (lambda: damaged(added_tokens=[{"id": 10**9, "content": "<new>"}]), "'<new>' has the id 1000000000"),
        (lambda: damaged(pre_tokenizer=None), "does not end in ByteLevel"),
        (lambda: damaged(pre_tokenizer=5), "does not end in ByteLevel"),
        (lambda: damaged(pre_tokenizer={"type": "Whitespace"}), "does not end in ByteLevel"),
        (lambda: damaged(pre_tokenizer={"type": "Sequence", "pretokenizers": 5}), "does not end in ByteLevel"),
        (lambda: damaged(pre_tokenizer={"type": "Sequence", "pretokenizers": []}), "does not end in ByteLevel"),
        (lambda: damaged(pre_tokenizer__add_prefix_space=True), "prefix space"),
        (lambda: damaged(pre_tokenizer__use_regex=False), "is not supported"),
        (lambda: damaged(added_tokens=5), "added_tokens is 5, not a list"),
        (lambda: damaged(added_tokens=["a"]), "added token 'a' has no content or no id"),
        (lambda: damaged(added_tokens=[{"id": "0", "content": "a"}]), "has no content or no id"),
        (lambda: damaged(added_tokens=[{"id": 269, "content": oracle.EOT}] * 2), "is listed twice"),
        (lambda: damaged(added_tokens=[{"id": 269, "content": oracle.EOT, "lstrip": True}]), "uses lstrip"),
        (lambda: damaged(added_tokens=[{"id": 3, "content": oracle.EOT}]), "shall have id 3"),
        (lambda: damaged(added_tokens=[{"id": 269, "content": ""}]), "empty"),
        (lambda: damaged(added_tokens=[{"id": 269, "content": "\ud800"}]), "lone surrogate"),
    ],
)
def test_damaged_tokenizer_json(content, message, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(content(), encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer.load(path)
    assert "tokenizer.json" in str(caught.value) and "\n" not in str(caught.value)


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-1, 300), st.floats(0, 1), st.text(max_size=3)),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
    max_leaves=4,
)
PLACES = [
    "model", "model__type", "model__vocab", "model__merges", "model__vocab__a", "added_tokens", "pre_tokenizer", "normalizer",
    "pre_tokenizer__type", "pre_tokenizer__use_regex", "model__ignore_merges", "decoder", "version",
]  # fmt: skip


@given(place=st.sampled_from(PLACES), value=values)
@settings(deadline=None, max_examples=150)
def test_any_damage_is_a_user_error_or_harmless(place, value):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_text(damaged(**{place: value}), encoding="utf-8")
        try:
            Tokenizer.load(path)
        except UserError as error:
            assert "\n" not in str(error)


def test_missing_files(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        Tokenizer.load(tmp_path / "absent.json")
    with pytest.raises(UserError, match="does not exist"):
        Tokenizer.load(tmp_path)
    tokenizer = oracle.trained("gpt2", ())
    tokenizer.save_gpt2(tmp_path)
    with pytest.raises(UserError, match=r"absent\.json does not exist"):
        Tokenizer.from_files(tmp_path / "absent.json", tmp_path / "merges.txt")
    with pytest.raises(UserError, match=r"absent\.txt does not exist"):
        Tokenizer.from_files(tmp_path / "vocab.json", tmp_path / "absent.txt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", b"[1]", "vocabulary is not a JSON object"),
        ("vocab.json", b'{"a": 0', "not valid JSON"),
        ("vocab.json", b'{"a": true}', "has the id True"),
        ("vocab.json", b"{}", "is missing"),
        ("merges.txt", b"a b c\n", "merge 0 is 'a b c', not two tokens"),
        ("merges.txt", b"#version: 0.2\nab\n", "merge 0 is 'ab', not two tokens"),
        ("merges.txt", b"\xc3\x83 \xe6\xbc\xa2\n", "stands for no byte"),
        ("merges.txt", b"\xff\xfe", "cannot read merges"),
        ("merges.txt", b"~ ~~\n", "merges.txt.*is not in vocab"),
    ],
)
def test_damaged_gpt2_pair(name, content, message, tmp_path):
    oracle.trained("gpt2", ()).save_gpt2(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer.from_files(tmp_path / "vocab.json", tmp_path / "merges.txt")
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_writing_fails_without_a_trace(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write"):
        oracle.trained().save(tmp_path / "file" / "folder" / "tokenizer.json")
    assert (tmp_path / "file").read_text() == "in the way"


def test_names_are_all_there():
    """The public names that other rooms build on."""
    tokenizer = oracle.trained()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Tokenizer(tokenizer.vocab, tokenizer.merges, None).special_tokens == {}
    for name in ("encode", "encode_array", "encode_iterable", "encode_batch", "decode", "decode_bytes"):
        assert callable(getattr(tokenizer, name))
    assert isinstance(tokenizer.content_hash, str) and tokenizer.vocab_size == max(tokenizer.vocab) + 1
