"""Word counts: all that training needs to know of a corpus.

Merges happen inside pre-tokens only, and equal pre-tokens merge alike, so a corpus of any size shrinks to a table:

    "low lower low<|endoftext|>low"   ──►   low: 2   ␣lower: 1   ␣low: 1

Special tokens cut the text and are not counted. Files are read in ranges of about a megabyte, by several threads; a
range ends where no pre-token can reach across, so the table does not depend on how many there are. Memory grows with
the number of distinct words only.

Here is the plain way, which any pattern can go (with processes instead of threads), and which is quick enough for small
texts. ``counting_fast.py`` counts the same with a compiled scanner.
"""

from __future__ import annotations

import codecs
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scratchlm.errors import UserError
from scratchlm.processes import MAX_WORKERS, Workers, cores
from scratchlm.progress import progress
from scratchlm.tokenizer.patterns import Pattern
from scratchlm.tokenizer.scanner import scanner_for
from scratchlm.tokenizer.stream import SpecialSplitter, settle

Source = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]

# Bytes of a file, or characters of documents, that make one job.
_JOB = 1 << 20
# Below this much text helper processes cost more time than they save; below that, so does importing Numba.
_WORTH_HELPERS = 3 << 20
_WORTH_SCANNING = 4 << 20
_ANY_LENGTH = 2**62
_WINDOW = 1 << 16

# No white space, and a separator or the suffix of a file with text.
_LIKE_A_PATH = re.compile(
    r"\S*[/\\]\S*[^/\\\s]|\S+\.(?:txt|text|md|rst|log|jsonl?|csv|tsv|xml|html?|py|parquet|gz|zst)", re.IGNORECASE
)


class WordCounts(NamedTuple):
    """Words and how often each occurs, in flat arrays: word i is ``text[ends[i - 1] : ends[i]]``.

    Shapes: text (bytes,) uint8, ends (words,) int64, counts (words,) int64.
    """

    text: np.ndarray
    ends: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, words: dict[bytes, int]) -> WordCounts:
        ends = np.cumsum(np.fromiter(map(len, words), np.int64, len(words)))
        counts = np.fromiter(words.values(), np.int64, len(words))
        return cls(np.frombuffer(b"".join(words), np.uint8), ends, counts)

    def as_dict(self) -> dict[bytes, int]:
        """The same with a bytes object for each word."""
        text = self.text.tobytes()
        ends = self.ends.tolist()
        words = [text[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
        return dict(zip(words, self.counts.tolist(), strict=True))


class FileRange(NamedTuple):
    """Bytes [start, stop) of a file."""

    path: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


class Documents(NamedTuple):
    """Texts already in memory."""

    texts: list[str]

    @property
    def size(self) -> int:
        return sum(map(len, self.texts))


class WordCounter:
    """Counts the pre-tokens of one job after another (the handler of a helper process)."""

    def __init__(self, pattern: str, specials: tuple[str, ...]) -> None:
        self._pattern = Pattern(pattern)
        self._splitter = SpecialSplitter(specials)
        self._counts: Counter[str] = Counter()

    def __call__(self, job: FileRange | Documents) -> int:
        """Count a job's pre-tokens; its size."""
        if isinstance(job, FileRange):
            for settled in settle(_read(job), self._pattern, self._splitter):
                self._counts.update(settled.pieces)
        else:
            for text in job.texts:
                for part in self._splitter.split(text)[::2]:
                    self._counts.update(self._pattern.split(part))
        return job.size

    def finish(self) -> Counter[str]:
        return self._counts


def _read(job: FileRange) -> Iterator[str]:
    """The text of a range, a block at a time."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = job.start
    with Path(job.path).open("rb") as file:
        file.seek(position)
        while position < job.stop:
            block = file.read(min(1 << 20, job.stop - position))
            pending = len(decoder.getstate()[0])
            position += len(block)
            try:
                yield decoder.decode(block, final=not block or position >= job.stop)
            except UnicodeDecodeError as error:
                offset = position - len(block) - pending + error.start
                raise UserError(
                    f"{job.path}: byte {offset} is not UTF-8 ({error.reason}); convert the file to UTF-8 first"
                ) from error
            if not block:
                return


def _ranges(path: str, pattern: Pattern, splitter: SpecialSplitter) -> Iterator[FileRange]:
    """Cut a file into ranges whose pre-tokens do not depend on each other."""
    try:
        size = Path(path).stat().st_size
        if Path(path).is_dir():
            raise UserError(f"training text {path} is a folder; name the files in it")
        with Path(path).open("rb") as file:
            start = 0
            while pattern.local and start + 2 * _JOB < size:
                cut = _cut_near(file, start + _JOB, size, pattern, splitter)
                if cut is None:
                    break
                yield FileRange(path, start, cut)
                start = cut
    except OSError as error:
        raise UserError(f"cannot read training text {path}: {error.strerror}") from error
    yield FileRange(path, start, size)


def _cut_near(file, position: int, size: int, pattern: Pattern, splitter: SpecialSplitter) -> int | None:  # type: ignore[no-untyped-def]
    """The first byte from `position` on where the file may be cut; None if there is none before its end."""
    margin = splitter.longest + 4
    while position < size:
        file.seek(position)
        block = file.read(_WINDOW)
        skip = next(
            (i for i, byte in enumerate(block) if byte & 0xC0 != 0x80), len(block)
        )  # to a character's start
        # surrogateescape keeps the character cut off by the window's end, so that lengths in bytes come out right.
        text = block[skip:].decode("utf-8", "surrogateescape")
        cut = pattern.safe_cut(text, margin, max(margin, len(text) - margin))
        while cut is not None and splitter.crosses(text, cut):
            cut = pattern.safe_cut(text, cut + 1, max(margin, len(text) - margin))
        if cut is not None:
            return position + skip + len(text[:cut].encode("utf-8", "surrogateescape"))
        position += max(1, len(block) - 8 * margin)
    return None


def _paths(source: Source) -> list[str] | None:
    """The files `source` names, or None if it is an iterable of documents.

    A list or tuple of strings means files if one of them is an existing file; use `pathlib.Path` to be explicit.

    Raises:
        UserError: no string is a file, but each looks like the path of one: a tokenizer of file names helps nobody.
    """
    if isinstance(source, (str, os.PathLike)):
        return [os.fspath(source)]
    if not isinstance(source, (list, tuple)) or not source:
        return None
    if all(isinstance(item, os.PathLike) for item in source):
        return [os.fspath(item) for item in source]
    short = all(
        isinstance(item, os.PathLike) or (isinstance(item, str) and len(item) < 4096 and "\n" not in item)
        for item in source
    )
    if short and any(_is_file(item) for item in source):
        return [os.fspath(item) for item in source]
    if all(isinstance(item, str) and _LIKE_A_PATH.fullmatch(item) for item in source):
        raise UserError(
            f"training text {source[0]} does not exist, nor does any other file of the list; if these strings are the "
            "documents themselves, pass iter(...) of them"
        )
    return None


def _is_file(name: str | os.PathLike[str]) -> bool:
    try:
        return os.path.isfile(name)  # noqa: PTH113 - Path.is_file raises on names with a null byte
    except ValueError:
        return False


def _document_jobs(
    texts: Iterable[str | os.PathLike[str]], pattern: Pattern, specials: SpecialSplitter
) -> Iterator[Documents]:
    batch: list[str] = []
    length = 0
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"training document {index} is of type {type(text).__name__}, not a str")
        for part in _parts(text, pattern, specials):
            batch.append(part)
            length += len(part)
            if length >= _JOB // 2:
                yield Documents(batch)
                batch, length = [], 0
    if batch:
        yield Documents(batch)


def _parts(text: str, pattern: Pattern, splitter: SpecialSplitter) -> Iterator[str]:
    """A long document in parts that can be pre-tokenised apart."""
    start = 0
    while len(text) - start > _JOB:
        cut = pattern.safe_cut(text, start + _JOB // 2)
        while cut is not None and splitter.crosses(text, cut):
            cut = pattern.safe_cut(text, cut + 1)
        if cut is None:
            break
        yield text[start:cut]
        start = cut
    yield text[start:]


def lone_surrogate(error: UnicodeEncodeError) -> UserError:
    return UserError(f"training text holds a lone surrogate ({error}), which UTF-8 cannot hold; remove it")


class Counted(NamedTuple):
    """What a source holds.

    Attributes:
        words: of a small source UTF-8 bytes → occurrences, in ascending order of the bytes; else arrays in no particular order.
        left_out: how many pre-tokens were longer than allowed.
        left_out_bytes: their bytes.
    """

    words: dict[bytes, int] | WordCounts
    left_out: int = 0
    left_out_bytes: int = 0


def count_words(
    source: Source,
    pattern: Pattern,
    specials: tuple[str, ...] = (),
    workers: int | None = None,
    show_progress: bool = False,
    max_word_length: int | None = None,
) -> dict[bytes, int]:
    """How often each pre-token occurs: `count` with a dict in ascending order of the bytes, whatever the size."""
    words = count(source, pattern, specials, workers, show_progress, max_word_length).words
    return dict(sorted(words.as_dict().items())) if isinstance(words, WordCounts) else words


def count(
    source: Source,
    pattern: Pattern,
    specials: tuple[str, ...] = (),
    workers: int | None = None,
    show_progress: bool = False,
    max_word_length: int | None = None,
) -> Counted:
    """How often each pre-token occurs.

    Args:
        source: a path, a list of paths (each file one text), or an iterable of documents (each str one text).
        pattern: how texts are cut.
        specials: hard boundaries, not counted.
        workers: threads, or processes for a pattern that has no compiled scanner; None: one per core where there is enough
            text. The counts are the same for any number.
        show_progress: a bar on standard error.
        max_word_length: pre-tokens of more bytes are left out; None: none are.

    Raises:
        UserError: a file cannot be read or is not UTF-8; a document is not a str; `workers` or `max_word_length` is
            less than one or too many.
    """
    if workers is not None and workers < 1:
        raise UserError(f"workers = {workers}: at least one must do the work")
    if workers is not None and workers > MAX_WORKERS:
        raise UserError(f"workers = {workers}: at most {MAX_WORKERS} can be started")
    if max_word_length is not None and max_word_length < 1:
        raise UserError(f"max_word_length = {max_word_length}: words have at least one byte")
    longest = min(max_word_length or _ANY_LENGTH, _ANY_LENGTH)
    splitter = SpecialSplitter(specials)
    jobs: Iterator[FileRange | Documents]
    paths = _paths(source)
    total = None
    if paths is not None:
        jobs = chain.from_iterable(_ranges(path, pattern, splitter) for path in paths)
        total = sum(Path(path).stat().st_size for path in paths if _is_file(path))
    else:
        jobs = _document_jobs(source, pattern, splitter)  # type: ignore[arg-type]

    # Look ahead: what a small corpus holds is counted before Numba has been imported.
    first: list[FileRange | Documents] = []
    size = 0
    for job in jobs:
        first.append(job)
        size += job.size
        if size >= max(_WORTH_HELPERS, _WORTH_SCANNING) and len(first) > 1:
            break
    number = workers if workers is not None else cores()
    scanner = scanner_for(pattern.name) if size >= _WORTH_SCANNING else None
    arguments = (pattern.name, tuple(specials))
    with progress(description="count words", total=total, bytes_=True, show=show_progress) as bar:
        if scanner is not None:
            from scratchlm.tokenizer.counting_fast import count_fast

            threads = min(number, len(first))
            words, left_out = count_fast(
                chain(first, jobs), scanner, specials, threads, longest, bar.update, show_progress
            )
            return Counted(words, *left_out)
        if number == 1 or size < _WORTH_HELPERS or len(first) < 2:
            counter = WordCounter(*arguments)
            for job in chain(first, jobs):
                bar.update(counter(job))
            counts = counter.finish()
        else:
            with Workers(WordCounter, arguments, number) as pool:
                for done in pool.map(chain(first, jobs)):
                    bar.update(done)
                counts = Counter()
                for part in pool.finish():
                    counts.update(part)
    counts.pop("", None)
    try:
        encoded = sorted((word.encode("utf-8"), count) for word, count in counts.items())
    except UnicodeEncodeError as error:
        raise lone_surrogate(error) from error
    kept = dict(item for item in encoded if len(item[0]) <= longest)
    too_long = [(count, len(word) * count) for word, count in encoded if len(word) > longest]
    return Counted(kept, sum(count for count, _ in too_long), sum(size for _, size in too_long))
