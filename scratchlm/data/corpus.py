"""Corpora: a named stream of documents, split into training and validation the same way on every machine.

A corpus is read as a stream: one document at a time is held in memory, whatever the size of the whole. Which documents are
held out is decided by files of their own (`validation_paths`, `validation_split`) or by a hash of the document's name, so
that neither the order nor the rest of the corpus has a say in it; or the end of each document is held out (`hold_out = "ends"`).
"""

from __future__ import annotations

import glob
import hashlib
import importlib
import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from scratchlm.data import digests
from scratchlm.errors import UserError
from scratchlm.files import stable_hash
from scratchlm.progress import progress

if TYPE_CHECKING:
    from scratchlm.config import CorpusConfig

Split = Literal["train", "validation"]
SPLITS: tuple[Split, Split] = ("train", "validation")

# One line per kind of corpus; loaded on first use, so that a text corpus does not import pyarrow.
KINDS = {
    "python-stdlib": "scratchlm.data.stdlib:StdlibCorpus",
    "text": "scratchlm.data.text:TextCorpus",
    "jsonl": "scratchlm.data.jsonl:JsonlCorpus",
    "parquet": "scratchlm.data.parquet:ParquetCorpus",
    "huggingface": "scratchlm.data.huggingface:HuggingFaceCorpus",
}

LARGE = 64 << 20  # bytes from which hashing is worth a progress bar
MUCH = 16 << 20  # bytes into a file from where on compiled loops are worth loading
LONG = 1 << 12  # bytes of a document from which on they are worth a call


@dataclass(frozen=True, slots=True)
class Document:
    """One document: its name (stable across machines, the key of the split) and its text as valid UTF-8 (never empty).

    Bytes, because that is what files hold and what the tokenizer reads: a str in between would only be made and unmade.
    """

    name: str
    utf8: bytes

    @property
    def text(self) -> str:
        return self.utf8.decode("utf-8")


def open_corpus(config: CorpusConfig) -> Corpus:
    """Open the corpus a recipe names. Finds its files, reads none of them yet.

    Raises:
        UserError: a file is missing, a glob matches nothing, a package is missing, or a field lacks.
    """
    module, name = KINDS[config.kind].split(":")
    corpus: Corpus = getattr(importlib.import_module(module), name)(config)
    return corpus


def is_held_out(name: str, fraction: float) -> bool:
    """Whether the document called `name` belongs to the `fraction` held out: its hash, read as a number in [0, 1)."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def cut_end(utf8: bytes, fraction: float) -> tuple[bytes, bytes]:
    """A document's begin and the `fraction` of its bytes at its end; no character is cut (the one at the place goes to the begin)."""
    place = int(len(utf8) * (1 - fraction))
    while place < len(utf8) and utf8[place] & 0xC0 == 0x80:
        place += 1
    return utf8[:place], utf8[place:]


def _is_utf8(data: bytes) -> bool:
    from scratchlm.tokenizer.utf8_check import is_utf8

    return is_utf8(data)


def valid_utf8(data: bytes, config: CorpusConfig, where: str, offset: int = 0) -> bytes:
    """`data` if it is UTF-8, else what `config.encoding_errors` makes of it; b"" for a document to skip.

    Args:
        data: the document's bytes.
        where: what to call the place in an error.
        offset: the position of ``data[0]`` in the file.

    Raises:
        UserError: the policy is ``strict`` and a byte is not UTF-8 (its position in the file is named).
    """
    if data.isascii():  # at memory's pace
        return data
    if len(data) >= LONG and offset + len(data) > MUCH and _is_utf8(data):
        return data
    try:
        data.decode("utf-8")
        return data
    except UnicodeDecodeError as error:
        if config.encoding_errors == "replace":
            return data.decode("utf-8", errors="replace").encode("utf-8")
        if config.encoding_errors == "skip":
            return b""
        raise UserError(
            f"{where}: byte {offset + error.start} (0x{data[error.start]:02x}) is not UTF-8; convert the file, or set "
            "corpus.encoding_errors to replace or skip"
        ) from error


class Corpus(ABC):
    """A split stream of documents. A kind of corpus implements the four methods below `bytes_of`."""

    def __init__(self, config: CorpusConfig) -> None:
        self.config = config

    def documents(self, split: Split) -> Iterator[Document]:
        """The documents of `split`, always in the same order. Documents without any text are left out.

        Raises:
            UserError: the text cannot be read, or the split turns out to hold no document.
        """
        if split not in SPLITS:
            raise UserError(f"split {split!r} is unknown; a corpus has: {', '.join(SPLITS)}")
        separate = self.has_own_validation()
        stream = (document for document in self.stream(split if separate else "train") if document.utf8)
        found = False
        fraction, by_ends = self.config.validation_fraction, self.config.hold_out == "ends" and not separate
        for document in itertools.islice(stream, self.config.max_documents):
            if by_ends:
                begin, end = cut_end(document.utf8, fraction)
                document = Document(document.name, end if split == "validation" else begin)
            elif not separate and is_held_out(document.name, fraction) != (split == "validation"):
                continue
            if document.utf8:
                found = True
                yield document
        if not found:
            raise UserError(self._why_empty(split))

    def _why_empty(self, split: Split) -> str:
        origin = self.describe()
        if split == "validation" and not self.has_own_validation():
            return (
                f"{origin}: no validation documents; raise corpus.validation_fraction "
                f"(now {self.config.validation_fraction}) or give corpus.validation_paths"
            )
        if split == "train" and not self.has_own_validation() and self.config.validation_fraction:
            return (
                f"{origin}: no training documents; the corpus is empty or all of it is held out: give it more text"
            )
        return f"{origin}: no {split} documents; the corpus is empty: give it files with text"

    def bytes_of(self, split: Split) -> Iterator[bytes]:
        """The documents of `split` as UTF-8 bytes, e.g. for a compressor to measure itself on."""
        for document in self.documents(split):
            yield document.utf8

    @abstractmethod
    def describe(self) -> str:
        """What to call this corpus in an error message."""

    @abstractmethod
    def has_own_validation(self) -> bool:
        """Whether validation text comes from a place of its own rather than from a share of the documents."""

    @abstractmethod
    def stream(self, split: Split) -> Iterator[Document]:
        """Every document of the training or of the validation text, before any are held out (text may be empty)."""

    @abstractmethod
    def fingerprint(self, show_progress: bool = True, algorithm: str = digests.ALGORITHM) -> str:
        """Hex digest of all content and of every field that changes which documents come out.

        Args:
            show_progress: show a progress bar where there is much to read.
            algorithm: that the content is hashed with.
        """

    def total_bytes(self) -> int | None:
        """About how many bytes of text both splits hold together, for progress bars; None: not known cheaply."""
        return None

    def _key(self, fields: Iterable[str], content: Any) -> str:
        """Fingerprint of `content` under the named configuration fields."""
        shared = ("kind", "encoding_errors", "max_documents")
        values = {name: getattr(self.config, name) for name in (*shared, *fields)}
        if not self.has_own_validation():
            values["validation_fraction"] = self.config.validation_fraction
            if self.config.hold_out != "documents":  # which it was before there was a choice
                values["hold_out"] = self.config.hold_out
        return stable_hash({"fields": values, "content": content}, length=32)


class FileCorpus(Corpus):
    """A corpus made of files. A kind of file implements `read`."""

    fields: tuple[str, ...] = ()  # configuration fields that decide what `read` yields

    def __init__(self, config: CorpusConfig) -> None:
        super().__init__(config)
        self.files = self.find_files()

    def find_files(self) -> dict[Split, list[tuple[str, Path]]]:
        """Per split its files in reading order, each with the name it has on every machine."""
        if not self.config.paths:
            raise UserError(
                f"corpus.paths is empty; kind = {self.config.kind!r} reads the files or globs named there"
            )
        held_out = expand(self.config.validation_paths, "corpus.validation_paths")
        # A file named in both is held out: a glob over a folder may include its validation file.
        taken = {path.resolve() for path in held_out}
        training = [path for path in expand(self.config.paths, "corpus.paths") if path.resolve() not in taken]
        if not training:
            raise UserError(
                "every file of corpus.paths is in corpus.validation_paths too; nothing is left to train on"
            )
        # Not resolve(): where a symbolic link leads is one machine's affair.
        parent = os.path.commonpath([os.path.abspath(path.parent) for path in training + held_out])  # noqa: PTH100

        def named(paths: list[Path]) -> list[tuple[str, Path]]:
            return [(Path(os.path.relpath(path, parent)).as_posix(), path) for path in paths]

        return {"train": named(training), "validation": named(held_out)}

    @abstractmethod
    def read(self, path: Path) -> Iterator[bytes]:
        """The texts in one file as UTF-8, in order; b"" for one to leave out (it keeps its number)."""

    def one_per_file(self) -> bool:
        """Whether a file is a document, and its name the document's name."""
        return False

    def describe(self) -> str:
        first = str(self.files["train"][0][1]) if self.files["train"] else self.config.kind
        more = len(self.files["train"]) - 1
        return f"corpus {first}" + (f" and {more} more" if more > 0 else "")

    def has_own_validation(self) -> bool:
        return bool(self.files["validation"])

    def stream(self, split: Split) -> Iterator[Document]:
        for name, path in self.files[split]:
            for number, text in enumerate(self.read(path)):
                yield Document(name if self.one_per_file() else f"{name}#{number}", text)

    def fingerprint(self, show_progress: bool = True, algorithm: str = digests.ALGORITHM) -> str:
        everything = [(split, name, path) for split in SPLITS for name, path in self.files[split]]
        size = sum(path.stat().st_size for _, _, path in everything)
        show = show_progress and size >= LARGE
        with progress(description="hash corpus", total=size, bytes_=True, show=show) as bar:
            content = [(split, name, _content_hash(path, bar, algorithm)) for split, name, path in everything]
        return self._key(self.fields, content)

    def total_bytes(self) -> int | None:
        paths = [path for split in SPLITS for _, path in self.files[split]]
        if self.config.max_documents is not None or any(path.suffix in (".gz", ".zst") for path in paths):
            return None
        return sum(path.stat().st_size for path in paths)


def expand(patterns: list[str], field: str) -> list[Path]:
    """The files that `patterns` (paths or globs) name: patterns in the order given, each glob's matches sorted.

    Raises:
        UserError: a path does not exist or is a folder, or a glob matches no file.
    """
    found: dict[Path, Path] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            raise UserError(f"{field}: {path} is a folder; name its files, for example {path.as_posix()}/**/*.txt")
        if path.exists():  # before globbing: a file's own name may contain brackets
            matches = [path]
        elif glob.has_magic(pattern):
            matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207
            matches = [match for match in matches if match.is_file()]
            if not matches:
                raise UserError(f"{field}: no file matches {pattern!r} (searched from {Path.cwd()})")
        else:
            raise UserError(f"{field}: file {path} does not exist (searched from {Path.cwd()})")
        for match in matches:
            found.setdefault(match.resolve(), match)
    return list(found.values())


# Digests of files hashed in this process. Never kept on disk: a size and a date are no proof of content there.
_hashes: dict[tuple[str, int, int, str], str] = {}


def _content_hash(path: Path, bar: Any, algorithm: str) -> str:
    try:
        status = path.stat()
        key = (str(path.resolve()), status.st_size, status.st_mtime_ns, algorithm)
        if key in _hashes:
            bar.update(status.st_size)
        else:
            digest = digests.new(algorithm)
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
                    bar.update(len(block))
            _hashes[key] = digest.hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return _hashes[key]
