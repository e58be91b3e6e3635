"""Finished tokens: opened without reading them, and refused when they are not what the manifest says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from byte_tokenizer import ByteTokenizer

from scratchlm.config import CorpusConfig, DataConfig
from scratchlm.data import TokenData, open_corpus, prepare
from scratchlm.errors import UserError

TEXT = "one<|endoftext|>two<|endoftext|>three"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "v.txt").write_text("held out")
    paths = {"paths": [str(tmp_path / "a.txt")], "validation_paths": [str(tmp_path / "v.txt")]}
    corpus = open_corpus(CorpusConfig(kind="text", **paths))
    out = tmp_path / "tokens"
    prepare(corpus, ByteTokenizer(), out, DataConfig(shard_tokens=6), separator_id=256, show_progress=False)
    return out


def test_what_the_manifest_says_of_a_split(folder):
    data = TokenData.open(folder, ByteTokenizer())
    tokens = data.split("train")
    assert (len(tokens), tokens.documents, tokens.bytes, tokens.separator_id) == (14, 3, 11, 256)
    assert [shard.name for shard in data.shards()] == [path.name for path in sorted(folder.glob("*.bin"))]
    assert tokens.read(2, 9).tolist() == [*b"e", 256, *b"two", 256, *b"t"]
    data.verify(show_progress=False)
    with pytest.raises(UserError, match="no split 'test'; it has train, validation"):
        data.split("test")


def test_shards_are_memory_mapped(folder):
    tokens = TokenData.open(folder).split("train")
    for array in tokens._arrays:
        assert isinstance(array.base, np.memmap) and not array.flags.writeable
    with (folder / "train-00000.bin").open("r+b") as file:  # not read yet: a change is seen
        file.write(b"O")
    assert tokens.read(0, 3).tolist() == [*b"One"]


@pytest.mark.parametrize(
    ("size", "found"), [(0, "0 bytes long"), (11, "11 bytes long"), (14, "14 bytes long"), (None, "missing")]
)
def test_a_shard_of_another_length_is_refused(folder, size, found):
    path = folder / "train-00001.bin"
    if size is None:
        path.unlink()
    else:
        path.write_bytes((path.read_bytes() + b"\0\0")[:size])
    with pytest.raises(
        UserError, match=rf"shard .*train-00001\.bin is {found}, expected 12 bytes; delete .* prepare the data anew"
    ):
        TokenData.open(folder)


def test_a_shard_with_another_content_is_found_by_verify(folder):
    path = folder / "validation-00000.bin"
    content = bytearray(path.read_bytes())
    content[4] ^= 1
    path.write_bytes(content)
    data = TokenData.open(folder)  # the length is right
    with pytest.raises(UserError, match=r"validation-00000\.bin is damaged .*digest.*; delete"):
        data.verify(show_progress=False)


def test_tokens_of_another_tokenizer_are_refused(folder):
    class Other(ByteTokenizer):
        content_hash = "other"

    with pytest.raises(UserError, match=r"made with another tokenizer \(content hash bytes, this one has other\)"):
        TokenData.open(folder, Other())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value.update(format_version=3), "format version 3, this program reads 1 to 2"),
        (lambda value: value.update(format_version=1), "is not a manifest of token data"),
        (lambda value: value.update(dtype="float64"), "dtype 'float64' is unknown"),
        (lambda value: value.pop("separator_id"), "is not a manifest of token data"),
        (lambda value: value["splits"]["train"].pop("shards"), "is not a manifest of token data"),
        (lambda value: value.update(more=1), "is not a manifest of token data"),
    ],
)
def test_damaged_manifests_are_named(folder, change, message):
    value = json.loads((folder / "manifest.json").read_text())
    change(value)
    (folder / "manifest.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match=rf"manifest\.json.*{message}"):
        TokenData.open(folder)


def test_no_manifest_and_no_json(folder, tmp_path):
    (folder / "manifest.json").write_text('{"format_version"')
    with pytest.raises(UserError, match=r"manifest .*is not valid JSON"):
        TokenData.open(folder)
    (folder / "manifest.json").write_text("[]")
    with pytest.raises(UserError, match="format version None"):
        TokenData.open(folder)
    with pytest.raises(UserError, match=r"holds no finished token data \(manifest.json is missing\)"):
        TokenData.open(tmp_path / "nowhere")
