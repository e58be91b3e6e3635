"""Tokenise and save: what lies on disk, byte for byte, after one call or after many that were cut off."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import xxhash
from byte_tokenizer import ByteTokenizer, DyingTokenizer, FailingTokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scratchlm.config import CorpusConfig, DataConfig
from scratchlm.data import TokenData, open_corpus, prepare, shards
from scratchlm.errors import UserError
from scratchlm.tokenizer import Tokenizer

SEPARATOR = "<|endoftext|>"
HERE = Path(__file__).parent


def corpus_of(folder: Path, train: list[str], validation: list[str], **fields):
    """A corpus of JSON lines, in which a document may hold anything."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, documents in (("train", train), ("validation", validation)):
        lines = [json.dumps({"text": document}) + "\n" for document in documents]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    paths = {"paths": [str(folder / "train.jsonl")], "validation_paths": [str(folder / "validation.jsonl")]}
    return open_corpus(CorpusConfig(kind="jsonl", **paths, **fields))


def stream_of(documents: list[str]) -> list[int]:
    """By definition: each document's bytes, then 256."""
    return [token for document in documents if document for token in (*document.encode(), 256)]


def run(corpus, folder: Path, tokenizer=None, workers: int | None = 1, **fields):
    config = DataConfig(workers=workers, **fields)
    return prepare(corpus, tokenizer or ByteTokenizer(), folder, config, separator_id=256, show_progress=False)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != shards.LOCK}


# What is written


def test_the_format_is_written_down(tmp_path):
    """Golden: shards and manifests made today must be read, and found in the cache, by every later version."""
    (tmp_path / "a.txt").write_bytes(f"One\n{SEPARATOR}zw\u00f6lf{SEPARATOR}".encode())
    (tmp_path / "v.txt").write_bytes(b"held out")
    paths = {"paths": [str(tmp_path / "a.txt")], "validation_paths": [str(tmp_path / "v.txt")]}
    corpus = open_corpus(CorpusConfig(kind="text", **paths))
    run(corpus, tmp_path / "out", shard_tokens=8)
    found = content(tmp_path / "out")
    assert sorted(found) == [
        "manifest.json",
        "train-00000.bin",
        "train-00001.bin",
        "validation-00000.bin",
        "validation-00001.bin",
    ]
    assert found["train-00000.bin"] == b"O\0n\0e\0\n\0\0\1z\0w\0\xc3\0"  # little-endian uint16, 256 = 00 01
    assert found["train-00001.bin"] == b"\xb6\0l\0f\0\0\1"
    assert found["validation-00000.bin"] + found["validation-00001.bin"] == b"h\0e\0l\0d\0 \0o\0u\0t\0\0\1"

    def digest(name: str) -> str:
        return "xxh3_128:" + xxhash.xxh3_128_hexdigest(found[name])

    assert json.loads(found["manifest.json"]) == {
        "format_version": 2,
        "key": "5a903527ef792fd09b1d0f54d33344d3",
        "corpus": "c8b9b061adf5e143fdb49f01ad3e9928",
        "tokenizer": "bytes",
        "vocab_size": 257,
        "separator_id": 256,
        "dtype": "uint16",
        "splits": {
            "train": {
                "tokens": 12,
                "documents": 2,
                "bytes": 10,
                "shards": [
                    {"name": "train-00000.bin", "tokens": 8, "digest": digest("train-00000.bin")},
                    {"name": "train-00001.bin", "tokens": 4, "digest": digest("train-00001.bin")},
                ],
            },
            "validation": {
                "tokens": 9,
                "documents": 1,
                "bytes": 8,
                "shards": [
                    {"name": "validation-00000.bin", "tokens": 8, "digest": digest("validation-00000.bin")},
                    {"name": "validation-00001.bin", "tokens": 1, "digest": digest("validation-00001.bin")},
                ],
            },
        },
    }


documents = st.lists(st.text(max_size=12), min_size=1, max_size=12).filter(any)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    train=documents, validation=documents, shard_tokens=st.integers(1, 40), chunk=st.sampled_from([1, 10, 1 << 20])
)
def test_shards_are_the_documents_by_definition(
    tmp_path_factory, monkeypatch, train, validation, shard_tokens, chunk
):
    monkeypatch.setattr(shards, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # hundreds of files: waiting for the disk proves nothing
    tmp_path = tmp_path_factory.mktemp("shards")
    corpus = corpus_of(tmp_path / "text", train, validation)
    manifest = run(corpus, tmp_path / "out", shard_tokens=shard_tokens)
    data = TokenData.open(tmp_path / "out")
    data.verify(show_progress=False)
    for name, texts in (("train", train), ("validation", validation)):
        tokens, summary = data.split(name), manifest.splits[name]
        expected = stream_of(texts)
        assert tokens.read(0, len(tokens)).tolist() == expected
        assert summary.tokens == len(tokens) == len(expected)
        assert summary.documents == tokens.documents == len([text for text in texts if text])
        assert summary.bytes == tokens.bytes == sum(len(text.encode()) for text in texts)
        sizes = [shard.tokens for shard in summary.shards]
        assert all(size == shard_tokens for size in sizes[:-1]) and 1 <= sizes[-1] <= shard_tokens


def test_any_number_of_workers_writes_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "CHUNK_BYTES", 50)
    corpus = corpus_of(
        tmp_path / "text", [f"document {number} \u00e9" * (number % 7 + 1) for number in range(200)], ["v"]
    )
    for workers in (1, 2, 3):
        run(corpus, tmp_path / str(workers), workers=workers, shard_tokens=700)
    assert content(tmp_path / "1") == content(tmp_path / "2") == content(tmp_path / "3")


def test_a_corpus_hashed_beside_the_work_gives_the_same(tmp_path, monkeypatch):
    corpus = corpus_of(tmp_path / "text", [f"document {number}" for number in range(50)], ["v"])
    run(corpus, tmp_path / "before", shard_tokens=100)
    monkeypatch.setattr(shards, "LARGE", 0)
    fingerprint = corpus.fingerprint
    seen: list[list[str]] = []

    def slowly(show_progress: bool = True) -> str:
        assert threading.current_thread() is not threading.main_thread()
        time.sleep(0.2)  # far more than writing a shard takes
        seen.append(sorted(path.name for path in (tmp_path / "beside").glob("[!.]*")))
        return fingerprint(show_progress)

    monkeypatch.setattr(corpus, "fingerprint", slowly)
    run(corpus, tmp_path / "beside", shard_tokens=100)
    assert content(tmp_path / "beside") == content(tmp_path / "before")
    assert seen == [[]]  # nothing was put in place before it was known what it is


def test_a_corpus_that_cannot_be_hashed_beside_the_work_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "LARGE", 0)
    corpus = corpus_of(tmp_path / "text", ["a"], ["v"])
    monkeypatch.setattr(corpus, "fingerprint", lambda show_progress: (_ for _ in ()).throw(UserError("unreadable")))
    with pytest.raises(UserError, match="unreadable"):
        run(corpus, tmp_path / "out")
    assert content(tmp_path / "out") == {}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_corpus_cannot_forge_a_separator(tmp_path, workers):
    merges = [(b"<", b"|"), (b"|", b">"), (b"e", b"n")]
    vocab = {**{byte: bytes([byte]) for byte in range(256)}, **{256 + n: a + b for n, (a, b) in enumerate(merges)}}
    tokenizer = Tokenizer(vocab, merges, special_tokens=[SEPARATOR])
    separator = tokenizer.special_tokens[SEPARATOR]
    texts = [f"before{SEPARATOR}after", SEPARATOR, "end \u00e9\U0001f600"]
    config = DataConfig(workers=workers)
    corpus = corpus_of(tmp_path / "text", texts, ["v"])
    prepare(corpus, tokenizer, tmp_path / "out", config, separator_id=separator, show_progress=False)
    ids = TokenData.open(tmp_path / "out", tokenizer).split("train")
    pieces = np.split(ids.read(0, len(ids)), np.flatnonzero(ids.read(0, len(ids)) == separator) + 1)
    assert [tokenizer.decode(piece[:-1]) for piece in pieces[:-1]] == texts
    assert 256 in pieces[0]  # its merges do apply


@pytest.mark.parametrize(
    ("size", "asked", "dtype"),
    [
        (257, "auto", "uint16"),
        (2**16, "auto", "uint16"),
        (2**16, "uint16", "uint16"),
        (2**16 + 1, "auto", "uint32"),
        (300, "uint32", "uint32"),
    ],
)
def test_the_smallest_type_that_holds_the_vocabulary(tmp_path, size, asked, dtype):
    class Wide(ByteTokenizer):
        vocab_size = size

        def encode_array(self, data, allowed_special=()):
            return np.full(len(data), size - 1, dtype=np.uint32)

    manifest = run(corpus_of(tmp_path / "text", ["ab"], ["v"]), tmp_path / "out", Wide(), dtype=asked)
    assert manifest.dtype == dtype
    tokens = TokenData.open(tmp_path / "out").split("train")
    assert tokens.read(0, 3).tolist() == [size - 1, size - 1, 256]
    assert (tmp_path / "out" / "train-00000.bin").stat().st_size == 3 * np.dtype(dtype).itemsize


# Cut off and continued


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(alphabet="ab\u00e9", min_size=1, max_size=9), min_size=2, max_size=12),
    shard_tokens=st.integers(1, 15),
    chunk=st.sampled_from([1, 7, 1 << 20]),
    data=st.data(),
)
def test_interrupted_anywhere_the_bytes_are_the_same(
    tmp_path_factory, monkeypatch, texts, shard_tokens, chunk, data
):
    monkeypatch.setattr(shards, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # hundreds of files: waiting for the disk proves nothing
    tmp_path = tmp_path_factory.mktemp("resume")
    place = data.draw(st.integers(0, len(texts) - 1))
    texts[place] += "poison"
    corpus = corpus_of(tmp_path / "text", texts, ["held", "out"])
    run(corpus, tmp_path / "whole", shard_tokens=shard_tokens)
    with pytest.raises(UserError, match="poisonous"):
        run(corpus, tmp_path / "cut", FailingTokenizer(), shard_tokens=shard_tokens)
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cut").glob("*.bin")}
    assert not (tmp_path / "cut" / "manifest.json").exists()
    run(corpus, tmp_path / "cut", shard_tokens=shard_tokens)
    assert content(tmp_path / "cut") == content(tmp_path / "whole")
    assert {name: (tmp_path / "cut" / name).stat().st_mtime_ns for name in done} == done  # nothing was done twice


SCRIPT = """
    import sys
    from pathlib import Path
    sys.path.insert(0, {here!r})
    from byte_tokenizer import {tokenizer}
    from scratchlm.config import CorpusConfig, DataConfig
    from scratchlm.data import open_corpus, prepare, shards
    shards.CHUNK_BYTES = {chunk}
    folder = Path({folder!r})
    corpus = open_corpus(CorpusConfig(
        kind="jsonl", paths=[str(folder / "train.jsonl")], validation_paths=[str(folder / "validation.jsonl")]
    ))
    {before}
    try:
        prepare(corpus, {tokenizer}(), {out!r}, DataConfig(workers={workers}, shard_tokens={shard_tokens}),
                separator_id=256, show_progress=False)
    finally:
        status = Path("/proc/self/status")  # getrusage would count the memory of the process that started this one
        print([line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")][0]
              if status.exists() else "")
"""


# As for a large corpus: hashed by a thread while the first shard is being written.
HASHED_ASIDE = "shards.LARGE = 0"


def script(
    folder: Path, out: Path, *, tokenizer="ByteTokenizer", chunk=1 << 20, workers=1, shard_tokens=1000, before=""
) -> list[str]:
    fields = {
        "tokenizer": tokenizer,
        "chunk": chunk,
        "workers": workers,
        "shard_tokens": shard_tokens,
        "before": before,
    }
    return [
        sys.executable,
        "-c",
        textwrap.dedent(SCRIPT).format(here=str(HERE), folder=str(folder), out=str(out), **fields),
    ]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(("workers", "before"), [(1, ""), (2, ""), (1, HASHED_ASIDE)])
def test_killed_and_called_again_the_bytes_are_the_same(tmp_path, workers, before):
    texts = [f"document {number} " * 3 for number in range(150)]
    corpus = corpus_of(tmp_path / "text", texts, ["held out"])
    run(corpus, tmp_path / "whole", shard_tokens=500)
    cut = tmp_path / "cut"
    command = script(
        tmp_path / "text",
        cut,
        tokenizer="SlowTokenizer",
        chunk=40,
        workers=workers,
        shard_tokens=500,
        before=before,
    )
    for wanted in (2, 5):  # killed twice, the second time while it continues
        process = subprocess.Popen(command)
        end = time.monotonic() + 60
        while len(list(cut.glob("*.bin"))) < wanted and process.poll() is None and time.monotonic() < end:
            time.sleep(0.002)
        assert process.poll() is None, "it was done before it could be killed"
        children = []
        if Path(f"/proc/{process.pid}/task").exists():
            listed = Path(f"/proc/{process.pid}/task").glob("*/children")
            children = [int(pid) for path in listed for pid in path.read_text().split()]
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (cut / shards.UNFINISHED).exists() and not (cut / "manifest.json").exists()
        while any(map(alive, children)) and time.monotonic() < end:
            time.sleep(0.01)
        assert not any(map(alive, children))  # workers leave when their parent does
    done = {path.name: path.stat().st_mtime_ns for path in cut.glob("*.bin")}
    run(corpus, cut, shard_tokens=500)
    assert content(cut) == content(tmp_path / "whole")
    kept = [name for name, date in done.items() if (cut / name).stat().st_mtime_ns == date]
    assert len(kept) >= len(done) - 1  # one may have been finished, but not yet noted


def test_two_processes_prepare_the_same_folder_one_after_the_other(tmp_path):
    corpus = corpus_of(tmp_path / "text", [f"document {number} " * 3 for number in range(60)], ["held out"])
    run(corpus, tmp_path / "whole", shard_tokens=500)
    command = script(tmp_path / "text", tmp_path / "both", tokenizer="SlowTokenizer", chunk=40, shard_tokens=500)
    two = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = "".join(process.communicate(timeout=60)[1] for process in two)
    assert [process.returncode for process in two] == [0, 0], said
    assert content(tmp_path / "both") == content(tmp_path / "whole")


def test_a_finished_folder_is_left_alone(tmp_path):
    corpus = corpus_of(tmp_path / "text", ["a", "b"], ["v"])
    first = run(corpus, tmp_path / "out")
    before = {
        path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir() if path.name != shards.LOCK
    }
    assert run(corpus, tmp_path / "out", FailingTokenizer()) == first  # no document is tokenised again
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in before} == before


@pytest.mark.parametrize("damage", ["cut", "missing", "leftover"])
def test_unfinished_work_that_was_damaged_is_done_again(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(shards, "CHUNK_BYTES", 1)
    corpus = corpus_of(tmp_path / "text", [*map(str, range(10, 40)), "poison"], ["v"])
    run(corpus, tmp_path / "whole", shard_tokens=10)
    cut = tmp_path / "cut"
    with pytest.raises(UserError):
        run(corpus, cut, FailingTokenizer(), shard_tokens=10)
    if damage == "cut":
        (cut / "train-00003.bin").write_bytes(b"\0\0")
    elif damage == "missing":
        (cut / "train-00001.bin").unlink()
    else:
        (cut / ".train-00009.bin.99999.tmp").write_bytes(b"half")
    run(corpus, cut, shard_tokens=10)
    assert content(cut) == content(tmp_path / "whole")


# Memory


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as Linux gives it")
@pytest.mark.parametrize("workers", [1, 2])
def test_memory_does_not_grow_with_the_corpus(tmp_path, workers):
    peaks = []
    line = json.dumps({"text": "x" * 4000}) + "\n"
    for megabytes in (5, 50):
        folder = tmp_path / str(megabytes)
        folder.mkdir()
        (folder / "train.jsonl").write_text(line * (250 * megabytes))
        (folder / "validation.jsonl").write_text(line)
        command = script(folder, folder / "out", workers=workers, shard_tokens=10_000_000)
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        peaks.append(int(said.split()[-1]) / 1024)
        assert TokenData.open(folder / "out").split("train").bytes == 1_000_000 * megabytes
    # What is on its way is bounded by chunks per worker; 45 MB of text more are 90 MB of ids.
    assert peaks[1] - peaks[0] < 20, peaks


# Errors


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    corpus = corpus_of(tmp_path / "text", ["a"], ["v"])
    other = corpus_of(tmp_path / "other", ["b"], ["v"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match=r"mine is not empty \(it holds thesis.txt\); choose another folder"):
        run(corpus, tmp_path / "mine")
    run(corpus, tmp_path / "out")
    for arguments in ((other, {}), (corpus, {"shard_tokens": 5}), (corpus, {"dtype": "uint32"})):
        with pytest.raises(UserError, match="holds tokens of another corpus, tokenizer or setting"):
            run(arguments[0], tmp_path / "out", **arguments[1])
    with pytest.raises(UserError):
        run(corpus_of(tmp_path / "p", ["poison"], ["v"]), tmp_path / "cut", FailingTokenizer())
    with pytest.raises(UserError, match="holds unfinished tokens of another corpus"):
        run(corpus, tmp_path / "cut")
    (tmp_path / "cut" / shards.UNFINISHED).write_text('{"key": ')
    with pytest.raises(UserError, match=r"journal .*unfinished.json is not valid JSON"):
        run(corpus, tmp_path / "cut")


def test_a_vocabulary_too_large_for_the_type(tmp_path):
    class Wide(ByteTokenizer):
        vocab_size = 2**16 + 1

    corpus = corpus_of(tmp_path / "text", ["a"], ["v"])
    with pytest.raises(UserError, match=r"data.dtype = uint16 cannot hold a vocabulary of 65537; set it to auto"):
        run(corpus, tmp_path / "out", Wide(), dtype="uint16")
    with pytest.raises(UserError, match="separator id 257 is not in the tokenizer's vocabulary of 257"):
        prepare(corpus, ByteTokenizer(), tmp_path / "out", DataConfig(), separator_id=257, show_progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("empty", ["train", "validation"])
def test_an_empty_split_is_refused(tmp_path, empty):
    texts = {"train": ["a"], "validation": ["v"], empty: [""]}
    with pytest.raises(UserError, match=f"no {empty} documents"):
        run(corpus_of(tmp_path / "text", texts["train"], texts["validation"]), tmp_path / "out")


def test_errors_of_workers_arrive_whole(tmp_path):
    corpus = corpus_of(tmp_path / "text", ["fine", "poison"], ["v"])
    with pytest.raises(UserError, match="the document is poisonous"):
        run(corpus, tmp_path / "a", FailingTokenizer(), workers=2)
    with pytest.raises(ValueError, match="a bug") as caught:
        run(corpus, tmp_path / "b", FailingTokenizer(ValueError("a bug")), workers=2)
    assert any("encode_array" in note for note in caught.value.__notes__)  # where it happened
    with pytest.raises(UserError, match=r"ended with status -9 \(killed; is memory short\?\); run again"):
        run(corpus, tmp_path / "c", DyingTokenizer(), workers=2)
    run(corpus, tmp_path / "c", workers=2)
    assert TokenData.open(tmp_path / "c").split("train").read(0, 12).tolist() == stream_of(["fine", "poison"])


@pytest.mark.skipif(sys.platform != "linux", reason="file sizes are limited as Linux does it")
@pytest.mark.parametrize("aside", ["", HASHED_ASIDE])
def test_a_full_disk_is_said_plainly_and_can_be_continued(tmp_path, aside):
    corpus = corpus_of(tmp_path / "text", ["x" * 100] * 50, ["v"])
    # A limit on the size of files refuses a write in the middle, as a full disk does.
    before = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)); {aside}"
    command = script(tmp_path / "text", tmp_path / "out", chunk=1, shard_tokens=2000, before=before)
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONFAULTHANDLER": ""})
    assert done.returncode == 1
    assert "UserError: no space left while writing" in done.stderr and "train-00000.bin" in done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        shards.LOCK,
        shards.UNFINISHED,
    ]  # no half shard
    run(corpus, tmp_path / "out", shard_tokens=2000)
    assert len(TokenData.open(tmp_path / "out").split("train")) == 50 * 101
