"""Tokenise and save: a corpus becomes shard files of token ids, in parallel, resumable at every shard.

While the work goes on the folder holds finished shards and ``unfinished.json``, which says after each of them how far the
corpus had been read: to which document, and to which of its tokens. A call that finds this file goes on from
there. The last act is ``manifest.json``; a folder with it is finished. What is written depends on corpus, tokenizer
and shard size alone, neither on the number of workers nor on interruptions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scratchlm.data import digests
from scratchlm.data.corpus import LARGE, SPLITS, Corpus, Document, FileCorpus, Split
from scratchlm.data.tokens import (
    FORMAT_VERSION,
    MANIFEST,
    Manifest,
    Shard,
    SplitManifest,
    TokenData,
    Tokens,
)
from scratchlm.data.workers import Encoded, Encoder, encode_all
from scratchlm.errors import UserError
from scratchlm.files import atomic_path, disk_errors, lock, read_json, stable_hash, write_json
from scratchlm.processes import cores
from scratchlm.progress import progress

if TYPE_CHECKING:
    from scratchlm.config import DataConfig
    from scratchlm.tokenizer import Tokenizer

__all__ = ["Manifest", "TokenData", "Tokens", "prepare"]

UNFINISHED = "unfinished.json"
LOCK = ".lock"
CHUNK_BYTES = 1 << 20  # text a worker gets at a time: large against the cost of a message, small against memory
SMALL = 32 << 20  # below so much text, starting processes takes longer than they save


def prepare(
    corpus: Corpus,
    tokenizer: Tokenizer,
    folder: str | os.PathLike[str],
    config: DataConfig,
    *,
    separator_id: int,
    show_progress: bool = True,
) -> Manifest:
    """Tokenise both splits of `corpus` into `folder`; continue where an interrupted call left off.

    Every document is followed by `separator_id`; text that spells a special token is encoded as ordinary text. If the
    folder already holds just this, nothing is done. Memory is bounded by the chunks on their way and the
    longest document. A second process preparing the same folder waits for the first.

    Args:
        corpus: from :func:`scratchlm.data.open_corpus`.
        tokenizer: picklable; its `content_hash` is recorded.
        folder: new or empty, unfinished or finished by this function.
        config: `shard_tokens`, `dtype`, `workers` (None: one per core, or none beside this process for a small corpus).
        separator_id: the id that ends each document.
        show_progress: show a progress bar.

    Raises:
        UserError: the folder holds something else, the vocabulary does not fit `dtype`, the corpus cannot be read or
            a split of it is empty, the disk is full, or a worker died.
    """
    folder = Path(folder)
    dtype = _dtype(config, tokenizer, separator_id)
    width = np.dtype(dtype).itemsize

    def name(show: bool, version: int = FORMAT_VERSION) -> tuple[str, str]:
        """The fingerprint of the corpus, and the key of what shall be written: a hash of all that decides its bytes."""
        if version == FORMAT_VERSION:
            fingerprint = corpus.fingerprint(show_progress=show)
        else:
            fingerprint = corpus.fingerprint(show_progress=show, algorithm=digests.BEFORE)
        key = {
            "format_version": version,
            "corpus": fingerprint,
            "tokenizer": tokenizer.content_hash,
            "separator_id": separator_id,
            "dtype": dtype,
            "shard_tokens": config.shard_tokens,
        }
        return fingerprint, stable_hash(key, length=32)

    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / LOCK, busy=f"waiting for another process that prepares {folder}"):
        if (folder / MANIFEST).exists():
            manifest = TokenData.open(folder).manifest
            if manifest.key != name(show_progress, manifest.format_version)[1]:
                raise UserError(
                    f"{folder} holds tokens of another corpus, tokenizer or setting; choose another folder or delete it"
                )
            return manifest
        journal = _Journal.open(folder)
        # Hashing a large corpus takes as long as encoding it: for a new folder it is done beside.
        aside = journal.new and isinstance(corpus, FileCorpus) and (corpus.total_bytes() or 0) >= LARGE
        journal.key = _started(lambda: journal.begin(name(show_progress and not aside), width), aside)
        workers = _workers(config, corpus)
        encoder = Encoder(tokenizer, separator_id, dtype)
        done = sum(shards[-1].bytes for shards in journal.shards.values() if shards)
        with progress(
            description="tokenise", total=corpus.total_bytes(), bytes_=True, initial=done, show=show_progress
        ) as bar:
            try:
                for split in SPLITS:
                    if split not in journal.finished:
                        _write_split(
                            split,
                            corpus,
                            encoder,
                            folder,
                            config.shard_tokens,
                            workers,
                            journal,
                            bar,
                        )
            except Exception:
                wait([journal.key])  # the journal is there before the error is told
                raise
        fingerprint, key = journal.key.result()
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            key=key,
            corpus=fingerprint,
            tokenizer=tokenizer.content_hash,
            vocab_size=tokenizer.vocab_size,
            separator_id=separator_id,
            dtype=dtype,
            splits={split: _summary(journal.shards[split]) for split in SPLITS},
        )
        manifest.save(folder)
        (folder / UNFINISHED).unlink(missing_ok=True)
    return manifest


def _dtype(config: DataConfig, tokenizer: Tokenizer, separator_id: int) -> str:
    """The id type on disk.

    Raises:
        UserError: it does not hold the vocabulary, or the separator is not in the vocabulary.
    """
    size = tokenizer.vocab_size
    if not 0 <= separator_id < size:
        raise UserError(f"separator id {separator_id} is not in the tokenizer's vocabulary of {size}")
    dtype = config.dtype if config.dtype != "auto" else ("uint16" if size <= 2**16 else "uint32")
    if size > np.iinfo(dtype).max + 1:
        raise UserError(
            f"data.dtype = {dtype} cannot hold a vocabulary of {size}; set it to auto or to a wider type"
        )
    return dtype


def _workers(config: DataConfig, corpus: Corpus) -> int:
    if config.workers is not None:
        return config.workers
    total = corpus.total_bytes()
    if total is not None and total < SMALL:
        return 1
    return cores()


@dataclass(frozen=True, slots=True)
class _Finished:
    """A finished shard, and how far the split had been read where it ends.

    Attributes:
        documents: whole documents (separator included) up to here.
        bytes: their UTF-8 bytes.
        partial: tokens already written of the document that comes next.
    """

    name: str
    tokens: int
    digest: str
    documents: int
    bytes: int
    partial: int


def _started(task: Callable[[], Any], aside: bool) -> Future[Any]:
    """`task` done now, or begun in a thread that does not outlive this process.

    Raises:
        Exception: the task's own, when it is done now; otherwise the future holds it.
    """
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(task())
        except BaseException as error:
            future.set_exception(error)

    if aside:
        threading.Thread(target=run, name="hash corpus", daemon=True).start()
    else:
        run()
        future.result()
    return future


@dataclass(slots=True)
class _Journal:
    """The content of ``unfinished.json``.

    Attributes:
        path: where it is kept.
        key: the corpus's fingerprint and the key of what is written, as soon as they are known.
        shards: per split the finished ones.
        finished: splits that are done.
        new: there was none when it was opened.
    """

    path: Path
    key: Future[tuple[str, str]] = field(default_factory=Future)
    shards: dict[str, list[_Finished]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    finished: list[str] = field(default_factory=list)
    new: bool = True

    @staticmethod
    def open(folder: Path) -> _Journal:
        """The journal of an unfinished folder, or one for a new folder; what a killed process was writing is removed."""
        journal = _Journal(folder / UNFINISHED)
        journal.new = not journal.path.exists()
        for path in folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)
        if journal.new and (
            others := sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        ):
            raise UserError(f"{folder} is not empty (it holds {others[0]}); choose another folder for the tokens")
        return journal

    def begin(self, names: tuple[str, str], width: int) -> tuple[str, str]:
        """Note the key in a new folder. In one that was cut off compare it, and keep the shards that are really there.

        Args:
            names: the corpus's fingerprint and the key; returned.
            width: bytes of an id.
        """
        if self.new:
            self._write(names[1])
        else:
            self._continue(names[1], width)
        return names

    def _continue(self, key: str, width: int) -> None:
        folder = self.path.parent
        value = read_json(self.path, "journal")
        try:
            if value.get("format_version", 1) != FORMAT_VERSION:
                raise UserError(
                    f"{folder} holds unfinished tokens that an earlier version began (format {value.get('format_version', 1)}, "
                    f"now {FORMAT_VERSION}); delete it and run again, or finish it with that version"
                )
            if value["key"] != key:
                raise UserError(
                    f"{folder} holds unfinished tokens of another corpus, tokenizer or setting; choose another folder or "
                    "delete it"
                )
            self.finished = list(value["finished"])
            for split in SPLITS:
                for entry in value["shards"][split]:
                    shard = _Finished(**entry)
                    path = folder / shard.name
                    if not path.is_file() or path.stat().st_size != shard.tokens * width:
                        self.finished = [name for name in self.finished if name != split]
                        break
                    self.shards[split].append(shard)
        except (TypeError, KeyError) as error:
            raise UserError(f"{self.path} is damaged ({error}); delete {folder} and run again") from error

    def save(self) -> None:
        """Write it, once the key is known.

        Raises:
            UserError: the corpus could not be hashed.
        """
        self._write(self.key.result()[1])

    def _write(self, key: str) -> None:
        shards = {split: [dataclasses.asdict(shard) for shard in done] for split, done in self.shards.items()}
        write_json(
            self.path, {"format_version": FORMAT_VERSION, "key": key, "shards": shards, "finished": self.finished}
        )


def _chunks(documents: Iterable[Document]) -> Iterator[list[bytes]]:
    """Documents as UTF-8, gathered until a chunk holds `CHUNK_BYTES`."""
    chunk: list[bytes] = []
    size = 0
    for document in documents:
        chunk.append(document.utf8)
        size += len(chunk[-1])
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _write_split(
    split: Split,
    corpus: Corpus,
    encoder: Encoder,
    folder: Path,
    shard_tokens: int,
    workers: int,
    journal: _Journal,
    bar: Any,
) -> None:
    """Write the shards of `split` that are not there yet; note each in the journal."""
    shards = journal.shards[split]
    start = shards[-1] if shards else _Finished("", 0, "", documents=0, bytes=0, partial=0)
    # Read again, but not tokenised again.
    documents = itertools.islice(corpus.documents(split), start.documents, None)
    with contextlib.closing(encode_all(encoder, _chunks(documents), workers)) as stream:
        cursor = _Cursor(stream, start, bar)
        while cursor.more():
            name = f"{split}-{len(shards):05d}.bin"
            digest = digests.new()
            written = 0
            with atomic_path(folder / name) as temporary, temporary.open("wb") as file:
                while written < shard_tokens and cursor.more():
                    piece = cursor.take(shard_tokens - written)
                    file.write(piece.data)
                    digest.update(piece.data)
                    written += len(piece)
                journal.key.result()  # the journal is there before the first shard, whoever is killed when
            shards.append(_Finished(name, written, digests.named(digest), *cursor.position()))
            journal.save()
    journal.finished.append(split)
    journal.save()


class _Cursor:
    """A place in a stream of encoded chunks, known as a count of tokens and as a document and a token in it."""

    def __init__(self, stream: Iterator[Encoded], start: _Finished, bar: Any) -> None:
        self._stream = stream
        self._bar = bar
        self._documents = start.documents
        self._bytes = start.bytes
        self._chunk: Encoded | None = None
        self._at = start.partial  # tokens of the chunk already taken

    def more(self) -> bool:
        """Whether a token is left; fetches the next chunk when the present one is used up."""
        while self._chunk is None or self._at >= len(self._chunk.ids):
            if self._chunk is not None:
                self._at -= len(self._chunk.ids)
                self._documents += len(self._chunk.counts)
                self._bytes += int(self._chunk.sizes.sum())
                self._chunk = None
            fresh = next(self._stream, None)
            if fresh is None:
                return False
            self._chunk = fresh
            self._bar.update(int(fresh.sizes.sum()))
        return True

    def take(self, most: int) -> np.ndarray:
        """At least one and at most `most` of the tokens that come next. Call after `more` said yes."""
        assert self._chunk is not None
        piece = self._chunk.ids[self._at : self._at + most]
        self._at += len(piece)
        return piece

    def position(self) -> tuple[int, int, int]:
        """Whole documents taken, their bytes, and tokens taken of the next one."""
        if self._chunk is None:
            return self._documents, self._bytes, self._at
        ends = np.cumsum(self._chunk.counts)
        whole = int(np.searchsorted(ends, self._at, side="right"))
        partial = self._at - (int(ends[whole - 1]) if whole else 0)
        return self._documents + whole, self._bytes + int(self._chunk.sizes[:whole].sum()), partial


def _summary(shards: list[_Finished]) -> SplitManifest:
    return SplitManifest(
        tokens=sum(shard.tokens for shard in shards),
        documents=shards[-1].documents,
        bytes=shards[-1].bytes,
        shards=[Shard(shard.name, shard.tokens, shard.digest) for shard in shards],
    )
