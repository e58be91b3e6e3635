"""Kinds of corpora: what comes out, exactly; what is held out; what is refused, and how."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import os
import re
import sys
import sysconfig
import tokenize
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from scratchlm.config import CorpusConfig
from scratchlm.data import Document, open_corpus
from scratchlm.data.corpus import cut_end, is_held_out
from scratchlm.data.stdlib import stdlib_files
from scratchlm.data.text import open_bytes, split_blocks
from scratchlm.errors import UserError

SEPARATOR = "<|endoftext|>"


def texts(config: CorpusConfig, split="train") -> list[str]:
    return [document.text for document in open_corpus(config).documents(split)]


def both(config: CorpusConfig) -> list[str]:
    """The texts of both splits; a split may be empty."""
    found = []
    for split in ("train", "validation"):
        with contextlib.suppress(UserError):
            found += texts(config, split)
    return found


def text_config(path: Path, **fields) -> CorpusConfig:
    return CorpusConfig(kind="text", paths=[str(path)], **{"validation_fraction": 0.0, **fields})


# Splitting


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(alphabet="ab<|>é\n", max_size=60),
    separator=st.sampled_from(["a", "ab", "aa", "aba", "<|>", "é", "<|endoftext|>"]),
    cuts=st.lists(st.integers(0, 80), max_size=20),
)
def test_splitting_in_blocks_is_str_split(text, separator, cuts):
    data = text.replace("|>", "|endoftext|>").encode() if len(separator) > 4 else text.encode()
    places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    blocks = [data[a:b] for a, b in itertools.pairwise(places)]
    pieces = list(split_blocks(blocks, separator.encode()))
    assert [piece.decode() for _, piece in pieces] == data.decode().split(separator)
    for offset, piece in pieces:
        assert data[offset : offset + len(piece)] == piece


def test_splitting_searches_each_byte_once():
    blocks = [b"x" * 1000] * 20_000  # 20 MB without a separator: quadratic work would take minutes
    assert [len(piece) for _, piece in split_blocks(blocks, b"<|endoftext|>")] == [20_000_000]


def test_text_keeps_everything_but_the_separator(tmp_path):
    content = f"One\r\nday\n{SEPARATOR}\n two \n{SEPARATOR}{SEPARATOR}dr\u00e9i \U0001f600\n{SEPARATOR}"
    (tmp_path / "a.txt").write_bytes(content.encode())
    config = text_config(tmp_path / "a.txt")
    assert texts(config) == [piece for piece in content.split(SEPARATOR) if piece]
    names = [document.name for document in open_corpus(config).documents("train")]
    assert names == ["a.txt#0", "a.txt#1", "a.txt#3"]  # numbers count empty pieces too
    assert list(open_corpus(config).bytes_of("train")) == [text.encode() for text in texts(config)]


def test_empty_separator_makes_files_documents(tmp_path):
    for name, content in {"b.txt": "B\n", "a/c.txt": f"C{SEPARATOR}C", "a/empty.txt": ""}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    config = text_config(tmp_path / "**" / "*.txt", separator="")
    found = list(open_corpus(config).documents("train"))
    assert found == [Document("a/c.txt", f"C{SEPARATOR}C".encode()), Document("b.txt", b"B\n")]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_text_compressed_or_not(tmp_path, suffix):
    data = f"one{SEPARATOR}two".encode()
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(pack(data))
    assert texts(text_config(path)) == ["one", "two"]
    assert (open_corpus(text_config(path)).total_bytes() == len(data)) == (suffix == "")


def test_cut_off_compressed_files_are_refused(tmp_path):
    noise = os.urandom(100_000).hex()
    for suffix, pack in ((".gz", gzip.compress), (".zst", zstandard.ZstdCompressor().compress)):
        path = tmp_path / f"a.txt{suffix}"
        data = pack(noise.encode())
        for damaged in (data[: len(data) // 2], data[:-1], b"of another kind"):
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=f"{path.name}: cannot decompress"):
                texts(text_config(path))


@settings(max_examples=30, deadline=None)
@given(parts=st.lists(st.binary(max_size=3000), max_size=4), factor=st.sampled_from([1, 200]))
def test_zstandard_files_of_several_frames(tmp_path_factory, parts, factor):
    path = tmp_path_factory.mktemp("zst") / "a.zst"
    parts = [part * factor for part in parts]
    path.write_bytes(b"".join(zstandard.ZstdCompressor().compress(part) for part in parts))
    with open_bytes(path) as file:
        assert file.read() == b"".join(parts)


def test_encoding_policies(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(f"fine{SEPARATOR}caf".encode() + b"\xe9 au lait" + f"{SEPARATOR}tail".encode())
    offset = len("fine" + SEPARATOR + "caf")
    with pytest.raises(UserError, match=rf"a\.txt: byte {offset} \(0xe9\) is not UTF-8"):
        texts(text_config(path))
    assert texts(text_config(path, encoding_errors="replace")) == ["fine", "caf\ufffd au lait", "tail"]
    assert texts(text_config(path, encoding_errors="skip")) == ["fine", "tail"]


# JSON lines


def jsonl_config(path: Path, **fields) -> CorpusConfig:
    return CorpusConfig(kind="jsonl", paths=[str(path)], **{"validation_fraction": 0.0, **fields})


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_jsonl(tmp_path, suffix):
    rows = [
        {"text": "one\nline"},
        {"id": 3, "text": "zw\u00f6lf \U0001f600"},
        {"text": ""},
        {"text": None},
        {"text": "end"},
    ]
    lines = "\ufeff" + "\n".join(json.dumps(row) for row in rows) + "\n\n"  # also a BOM and a blank line
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(pack(lines.encode()))
    assert texts(jsonl_config(path)) == ["one\nline", "zw\u00f6lf \U0001f600", "end"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', r"a\.jsonl, line 2: not valid JSON"),
        (b'["text"]', r"line 2: a list, not an object"),
        (b'{"body": "x", "id": 1}', r"line 2: no field 'text'; it has body, id: set corpus.text_field"),
        (b'{"text": 3}', r"line 2: field 'text' is a int, not a string"),
        (b'{"text": "\xff"}', r"line 2: byte 25 \(0xff\) is not UTF-8"),
        (rb'{"text": "\ud800"}', r"line 2: character 0 is a lone surrogate"),
    ],
)
def test_bad_jsonl_lines_are_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "ok"}\n' + line + b"\n")
    assert len(b'{"text": "ok"}\n{"text": "') == 25
    with pytest.raises(UserError, match=message):
        texts(jsonl_config(path))


def test_surrogates_follow_the_encoding_policy(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(r'{"text": "a\ud800b"}' + "\n" + r'{"text": "\ud83d\ude00"}' + "\n")  # the second is a pair
    assert texts(jsonl_config(path, encoding_errors="replace")) == ["a\ufffdb", "\U0001f600"]
    assert texts(jsonl_config(path, encoding_errors="skip")) == ["\U0001f600"]


# Parquet


def test_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet as parquet

    rows = [f"row {number} \u00e9" for number in range(5000)]
    rows[7] = ""
    rows[8] = None
    expected = [row for row in rows if row]
    for kind in (
        arrow.string(),
        arrow.large_string(),
        arrow.dictionary(arrow.int32(), arrow.string()),
        arrow.binary(),
    ):
        column = arrow.array([row.encode() if row and kind == arrow.binary() else row for row in rows])
        table = arrow.table({"id": list(range(5000)), "body": column.cast(kind)})
        path = tmp_path / "a.parquet"
        parquet.write_table(table, path, row_group_size=700)
        config = CorpusConfig(kind="parquet", paths=[str(path)], text_field="body", validation_fraction=0.0)
        assert texts(config) == expected, kind
    total = open_corpus(config).total_bytes()
    assert total is not None and total > 0
    with pytest.raises(UserError, match=r"no column 'text'; it has id, body"):
        texts(config.model_copy(update={"text_field": "text"}))
    with pytest.raises(UserError, match=r"column 'id' holds int64, not text"):
        texts(config.model_copy(update={"text_field": "id"}))


def test_parquet_bytes_that_are_not_utf8(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet as parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"text": arrow.array([b"fine", b"\xff"])}), path)
    config = CorpusConfig(kind="parquet", paths=[str(path)], validation_fraction=0.0)
    with pytest.raises(UserError, match=r"a\.parquet, row 1: byte 0 \(0xff\)"):
        texts(config)
    assert texts(config.model_copy(update={"encoding_errors": "skip"})) == ["fine"]


def test_a_file_that_is_not_parquet(tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    (tmp_path / "a.parquet").write_text("no")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        texts(CorpusConfig(kind="parquet", paths=[str(tmp_path / "a.parquet")]))


def test_missing_packages_say_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_text("x")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=re.escape("pip install 'scratchlm[parquet]'")):
        open_corpus(CorpusConfig(kind="parquet", paths=[str(tmp_path / "a.parquet")]))
    with pytest.raises(UserError, match=re.escape("pip install 'scratchlm[datasets]'")):
        open_corpus(CorpusConfig(kind="huggingface", dataset="roneneldan/TinyStories"))


# The standard library


def test_stdlib_is_the_library_byte_for_byte():
    corpus = open_corpus(CorpusConfig())
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = {split: list(corpus.documents(split)) for split in ("train", "validation")}
    names = [document.name for split in documents.values() for document in split]
    assert len(names) == len(set(names))
    assert {"json/decoder.py", "typing.py", "asyncio/base_events.py"} <= set(names)
    for split in documents.values():
        assert [document.name for document in split] == sorted(document.name for document in split)
    forbidden = ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__")
    assert not [name for name in names if set(forbidden) & set(Path(name).parts[:-1]) or "_sysconfigdata" in name]
    cookies = 0
    for document in documents["train"] + documents["validation"]:
        data = (root / document.name).read_bytes()
        if document.text.encode() != data:  # only where the file declares another encoding
            with tokenize.open(root / document.name) as file:
                assert file.encoding not in ("utf-8", "utf-8-sig")
                assert file.read() == document.text.replace("\r\n", "\n")
            cookies += 1
    assert cookies <= 5
    total = corpus.total_bytes()
    assert total is not None and total > 4_000_000
    held_out = len(documents["validation"]) / len(names)
    assert 0.02 < held_out < 0.09


def test_stdlib_split_follows_from_names_alone(tmp_path, monkeypatch):
    library = {name: f"# {name}\n" for name in ("a.py", "b/c.py", "json/decoder.py", "typing.py", "x.py", "y.py")}
    skipped = ("test/t.py", "b/tests/t.py", "site-packages/p.py", "_sysconfigdata__linux.py", "config-3.11/p.py")
    splits = []
    for machine in ("one", "two"):
        root = tmp_path / machine
        for name, content in {**library, **dict.fromkeys(skipped, "no")}.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(content + machine)
        monkeypatch.setattr(sysconfig, "get_paths", lambda root=root: {"stdlib": str(root)})
        corpus = open_corpus(CorpusConfig(validation_fraction=0.5))
        splits.append({split: [d.name for d in corpus.documents(split)] for split in ("train", "validation")})
    assert splits[0] == splits[1]
    assert sorted(splits[0]["train"] + splits[0]["validation"]) == sorted(library)
    expected = [name for name in sorted(library) if is_held_out(name, 0.5)]
    assert splits[0]["validation"] == expected


def test_stdlib_follows_a_file_s_declared_encoding(tmp_path, monkeypatch):
    (tmp_path / "latin.py").write_bytes("# -*- coding: latin-1 -*-\nname = 'caf\u00e9'\r\n".encode("latin-1"))
    (tmp_path / "bom.py").write_bytes(b"\xef\xbb\xbfx = 1\n")
    (tmp_path / "broken.py").write_bytes(b"x = '\xff'\n")
    (tmp_path / "unknown.py").write_bytes("# coding: klingon\n\u00e9\n".encode())
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    config = CorpusConfig(validation_fraction=0.0, encoding_errors="skip")
    found = {document.name: document.text for document in open_corpus(config).documents("train")}
    assert found == {
        "latin.py": "# -*- coding: latin-1 -*-\nname = 'caf\u00e9'\r\n",
        "bom.py": "\ufeffx = 1\n",
        "unknown.py": "# coding: klingon\n\u00e9\n",
    }
    with pytest.raises(UserError, match=r"broken\.py: byte 5 \(0xff\) is not UTF-8"):
        texts(config.model_copy(update={"encoding_errors": "strict"}))
    assert [name for name, _ in stdlib_files(tmp_path)] == sorted(["latin.py", "bom.py", "broken.py", "unknown.py"])


# Splits, fingerprints, files


def test_held_out_share_is_a_partition_of_the_wanted_size(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(SEPARATOR.join(f"document {number}" for number in range(4000)))
    config = text_config(path, validation_fraction=0.1)
    train, validation = texts(config), texts(config, "validation")
    assert sorted(train + validation) == sorted(f"document {number}" for number in range(4000))
    assert abs(len(validation) - 400) < 4 * (4000 * 0.1 * 0.9) ** 0.5  # four standard deviations
    wider = texts(text_config(path, validation_fraction=0.2), "validation")
    assert set(validation) < set(wider)  # a document once held out stays so when more are


def test_is_held_out_does_not_change_between_versions():
    # Written down once: another hash would silently train on what was held out before.
    held_out = [
        name for name in ("a", "b", "json/decoder.py", "x.txt#0", "x.txt#1", "\u00e9") if is_held_out(name, 0.5)
    ]
    assert held_out == ["a", "json/decoder.py", "x.txt#0"]
    assert not is_held_out("a", 0.0)
    assert is_held_out("a", 1.0)


def test_validation_paths_are_held_out_even_if_a_glob_finds_them_too(tmp_path):
    for name in ("train1", "train2", "valid"):
        (tmp_path / f"{name}.txt").write_text(f"{name} a{SEPARATOR}{name} b")
    config = text_config(
        tmp_path / "*.txt", validation_paths=[str(tmp_path / "valid.txt")], validation_fraction=0.5
    )
    assert texts(config) == ["train1 a", "train1 b", "train2 a", "train2 b"]
    assert texts(config, "validation") == ["valid a", "valid b"]


@given(
    documents=st.lists(st.text(alphabet="abé€😀\n", max_size=40), min_size=1, max_size=5),
    fraction=st.sampled_from([0.0, 0.1, 0.5, 0.999]),
)
def test_ends_of_documents_are_held_out_without_cutting_a_character(documents, fraction):
    """Begin and end make the document again; the end has the share of its bytes, but for the character at the place."""
    for document in documents:
        begin, end = cut_end(document.encode(), fraction)
        assert begin.decode() + end.decode() == document
        exact = int(len(document.encode()) * (1 - fraction))
        assert exact <= len(begin) < exact + 4 and (fraction or not end)


def test_the_end_of_one_text_is_held_out_as_nanogpt_does(tmp_path):
    path = tmp_path / "a.txt"
    data = "".join(f"line {number}\n" for number in range(9973))
    path.write_text(data)
    config = text_config(path, separator="", validation_fraction=0.1, hold_out="ends")
    n = len(data)
    assert texts(config) == [data[: int(n * 0.9)]] and texts(config, "validation") == [data[int(n * 0.9) :]]
    two = text_config(path, separator="line 5000\n", validation_fraction=0.1, hold_out="ends")
    assert len(texts(two)) == len(texts(two, "validation")) == 2
    with pytest.raises(UserError, match="no validation documents"):
        texts(text_config(path, separator="", validation_fraction=0.0, hold_out="ends"), "validation")
    with pytest.raises(UserError, match="validation_paths says what is held out"):
        text_config(path, validation_paths=[str(path)], hold_out="ends")
    one = open_corpus(config).fingerprint(show_progress=False)
    other = config.model_copy(update={"hold_out": "documents"})
    assert one != open_corpus(other).fingerprint(show_progress=False)


def test_max_documents(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(SEPARATOR.join(f"document {number}" for number in range(100)))
    config = text_config(path, validation_fraction=0.3, max_documents=20)
    assert sorted(both(config)) == sorted(f"document {number}" for number in range(20))
    assert open_corpus(config).total_bytes() is None


def test_fingerprint_follows_content_names_and_settings_that_matter(tmp_path):
    def fingerprint(folder, **fields):
        return open_corpus(text_config(folder / "*.txt", **fields)).fingerprint(show_progress=False)

    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        (folder / "a.txt").write_text("same text")
        (folder / "b.txt").write_text("more text")
    first = fingerprint(one)
    assert first == fingerprint(two)  # the folder's own place does not matter
    other = text_config(one / "*.txt").model_copy(update={"text_field": "irrelevant"})
    assert first == open_corpus(other).fingerprint(show_progress=False)
    different = [
        fingerprint(one, separator="x"),
        fingerprint(one, encoding_errors="skip"),
        fingerprint(one, validation_fraction=0.5),
        fingerprint(one, max_documents=1),
        fingerprint(one, validation_paths=[str(one / "b.txt")]),
    ]
    (one / "a.txt").write_text("Same text")  # same length
    different.append(fingerprint(one))
    (two / "a.txt").rename(two / "c.txt")
    different.append(fingerprint(two))
    assert len({first, *different}) == 1 + len(different)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"paths": []}, "corpus.paths is empty"),
        ({"paths": ["{}/none.txt"]}, r"corpus.paths: file .*none.txt does not exist"),
        ({"paths": ["{}/*.csv"]}, r"corpus.paths: no file matches .*\*.csv"),
        ({"paths": ["{}"]}, "is a folder; name its files"),
        (
            {"paths": ["{}/a.txt"], "validation_paths": ["{}/v.txt"]},
            "corpus.validation_paths: file .* does not exist",
        ),
        ({"paths": ["{}/a.txt"], "validation_paths": ["{}/a.txt"]}, "nothing is left to train on"),
    ],
)
def test_wrong_paths(tmp_path, fields, message):
    (tmp_path / "a.txt").write_text("text")
    filled = {
        name: [pattern.replace("{}", str(tmp_path)) for pattern in patterns] for name, patterns in fields.items()
    }
    with pytest.raises(UserError, match=message):
        open_corpus(CorpusConfig(kind="text", **filled))


def test_a_file_whose_name_looks_like_a_glob(tmp_path):
    path = tmp_path / "part[1].txt"
    path.write_text("text")
    assert texts(text_config(path)) == ["text"]


def test_empty_splits_say_what_to_do(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one document")
    with pytest.raises(
        UserError, match=r"no validation documents; raise corpus.validation_fraction .* corpus.validation_paths"
    ):
        texts(text_config(path), "validation")
    path.write_text(SEPARATOR * 3)
    with pytest.raises(UserError, match="the corpus is empty"):
        texts(text_config(path))
    with pytest.raises(UserError, match="split 'test' is unknown"):
        next(open_corpus(text_config(path)).documents("test"))


def test_a_corpus_of_text_imports_neither_torch_nor_pyarrow():
    import subprocess

    code = (
        "import sys, scratchlm.data\nscratchlm.data.open_corpus\n"
        "print([name for name in ('torch', 'pyarrow', 'datasets') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"
