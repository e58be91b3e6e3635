"""Folders of tokens as programs of before wrote them, and what no program wrote."""

from __future__ import annotations

import hashlib
import json

import pytest
from test_shards import SEPARATOR, content, corpus_of, run

from scratchlm.config import CorpusConfig
from scratchlm.data import TokenData, open_corpus
from scratchlm.errors import UserError


def test_a_folder_of_format_version_1(tmp_path):
    """As a program of before wrote it (key and fingerprint are its own): read, verified, and found to be what is asked for."""
    (tmp_path / "a.txt").write_bytes(f"One\n{SEPARATOR}zw\u00f6lf{SEPARATOR}".encode())
    (tmp_path / "v.txt").write_bytes(b"held out")
    paths = {"paths": [str(tmp_path / "a.txt")], "validation_paths": [str(tmp_path / "v.txt")]}
    corpus = open_corpus(CorpusConfig(kind="text", **paths))
    folder = tmp_path / "out"
    run(corpus, folder, shard_tokens=8)
    value = json.loads((folder / "manifest.json").read_text())
    value |= {
        "format_version": 1,
        "key": "875943b7709058c746c0304365143d12",
        "corpus": "a17508b5f39df4d83af7380839d976c9",
    }
    for split in value["splits"].values():
        for shard in split["shards"]:
            del shard["digest"]
            shard["blake2b"] = hashlib.blake2b((folder / shard["name"]).read_bytes(), digest_size=16).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(value))
    before = content(folder)
    data = TokenData.open(folder)
    data.verify(show_progress=False)
    assert data.manifest.format_version == 1
    assert run(corpus, folder, shard_tokens=8) == data.manifest and content(folder) == before
    with pytest.raises(UserError, match="holds tokens of another corpus"):
        run(corpus, folder, shard_tokens=9)
    (folder / "train-00001.bin").write_bytes(bytes(len(before["train-00001.bin"])))
    with pytest.raises(UserError, match=r"train-00001\.bin is damaged"):
        data.verify(show_progress=False)


def test_unfinished_work_of_format_version_1(tmp_path):
    corpus = corpus_of(tmp_path / "text", ["one"], ["two"])
    (tmp_path / "out").mkdir()
    old = {"key": "0" * 32, "shards": {"train": [], "validation": []}, "finished": []}
    (tmp_path / "out" / "unfinished.json").write_text(json.dumps(old))
    with pytest.raises(
        UserError, match=r"that an earlier version began \(format 1, now 2\); delete it and run again"
    ):
        run(corpus, tmp_path / "out", shard_tokens=8)
    assert json.loads((tmp_path / "out" / "unfinished.json").read_text()) == old


def test_a_digest_of_an_unknown_kind(tmp_path):
    run(corpus_of(tmp_path / "text", ["one"], ["two"]), tmp_path / "out", shard_tokens=8)
    path = tmp_path / "out" / "manifest.json"
    path.write_text(path.read_text().replace("xxh3_128:", "md5:"))
    with pytest.raises(
        UserError, match=r"manifest\.json: train-00000\.bin has a digest of an unknown kind \('md5'\)"
    ):
        TokenData.open(tmp_path / "out").verify(show_progress=False)
