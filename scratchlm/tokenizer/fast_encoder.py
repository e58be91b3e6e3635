"""Bytes → ids at full speed: special tokens, scanner and word table, chunk by chunk, on one thread or several.

    data ──regions──► [begin, end, special] ──scanner──► spans (a chunk of 8,192) ──word table──► ids ──► result
                                              ▲                                     │
                                              └──────────── next chunk ─────────────┘

The spans of a chunk and the text they cover stay in the cache of the core. For several threads a text is cut into pieces where its
pre-tokens are cut whatever stands around them. Each thread has a word table of its own, takes the next piece when it has
done one, and appends its ids when those of the piece before are there: the same ids in the same order for any number
of threads.

What happens in here is compiled on first use; small texts never come here (`Tokenizer`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, pairwise
from typing import Any

import numpy as np
import regex

from scratchlm.tokenizer.merge_table import MergeTable, merge_table
from scratchlm.tokenizer.patterns import Pattern
from scratchlm.tokenizer.regions import Region
from scratchlm.tokenizer.scanner import Scan, scanner_for
from scratchlm.tokenizer.word_table import ROOM, WordTable, whole_words

# Spans per chunk: 128 kB of them, and about 32 kB of text.
CHUNK = 1 << 13
# Bytes of text that a thread takes at a time.
PIECE = 1 << 20
# A piece ends at the first possible cut behind `PIECE`, looked for in windows of this many bytes.
_WINDOW = 1 << 14

Spans = Callable[[np.ndarray], int]


class FastEncoder:
    """Encodes bytes with compiled functions; equal to the plain road of `scratchlm.tokenizer.encoder`.

    Args:
        pattern: how texts are cut into pre-tokens.
        byte_ids: id of each single byte.
        ranks: the rank table (see `encoder`).
        whole: byte strings that are taken as one token without merging.
        dtype: uint16 or uint32, the type of ids.
        cache_bytes: most memory of one thread's word table.
    """

    def __init__(
        self,
        pattern: Pattern,
        byte_ids: list[int],
        ranks: dict[int, int],
        whole: dict[bytes, int],
        dtype: type,
        cache_bytes: int,
    ) -> None:
        self._pattern = pattern
        self._scanner = scanner_for(pattern.text)
        self._merges: MergeTable = merge_table(byte_ids, ranks)
        self._whole = whole_words(whole) if whole else None
        self._dtype = dtype
        self._cache_bytes = cache_bytes
        self._free: list[_Worker] = []  # workers that wait for something to do

    # ---------------------------------------------------------------- one text

    def encode(self, data: bytes | memoryview, regions: list[Region], threads: int = 1) -> np.ndarray:
        """Ids of the texts in `regions` (begin, end, id that follows or −1) of `data`, one behind the other."""
        size = sum(end - begin for begin, end, _ in regions)
        jobs = self._pieces(data, regions, PIECE) if threads > 1 and size > PIECE else [regions]
        array, tail = _with_tail(data)
        result = _Ids(self._dtype, size)
        if len(jobs) < 2:
            worker = self._worker(size)
            worker.encode(array, tail, np.array(regions, np.int64), result)
            self._free.append(worker)
            return result.finished()
        joined = _InOrder(result)

        def work(worker: _Worker, number: int, rows: list[Region]) -> None:
            ids = _Ids(self._dtype, PIECE) if worker.ids is None else worker.ids
            worker.encode(array, tail, np.array(rows, np.int64), ids)
            worker.ids = joined.add(number, ids)

        self._in_threads(work, jobs, threads, size)
        return result.finished()

    def count(self, data: bytes | memoryview, regions: list[Region]) -> int:
        """How many ids :meth:`encode` would give; they are not kept."""
        array, tail = _with_tail(data)
        worker = self._worker(len(array))
        total = worker.encode(array, tail, np.array(regions, np.int64), _Ids(self._dtype, 0), keep=False)
        self._free.append(worker)
        return total

    # ---------------------------------------------------------------- many texts

    def encode_many(
        self,
        texts: Sequence[bytes | memoryview],
        regions_of: Callable[[bytes | memoryview], list[Region]],
        threads: int = 1,
    ) -> list[np.ndarray]:
        """Ids of each text. Short texts are encoded many at a time, long ones in pieces."""
        jobs = list(_batches(texts))
        parts: list[list[np.ndarray]] = [[] for _ in jobs]

        def work(worker: _Worker, number: int, job: tuple[int, int]) -> None:
            first, end = job
            rows: list[Region] = []
            ends, offset = [], 0
            for text in texts[first:end]:
                rows += [(offset + begin, offset + stop, special) for begin, stop, special in regions_of(text)]
                ends.append(len(rows) - 1)
                offset += len(text)
            array, tail = _with_tail(texts[first] if end == first + 1 else b"".join(texts[first:end]))
            marks = np.empty(len(rows), np.int64)
            result = _Ids(self._dtype, len(array))
            worker.encode(array, tail, np.array(rows, np.int64), result, marks)
            ids = result.finished()
            starts = [0, *marks[ends].tolist()]
            parts[number] = [ids[start:stop] for start, stop in pairwise(starts)]

        self._in_threads(work, jobs, threads, sum(map(len, texts)))
        return [array for part in parts for array in part]

    def encode_rows(
        self, data: bytes | memoryview, regions: np.ndarray, coming: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the texts in `regions`, int64 (n, 3), of `data`, and how many there are up to the end of each, int64 (n,).

        Safe to call from several threads at a time. `coming`: bytes of text that this thread will be given in all.
        """
        array, tail = _with_tail(data)
        marks = np.empty(len(regions), np.int64)
        result = _Ids(self._dtype, len(array))
        worker = self._worker(max(len(array), coming))
        worker.encode(array, tail, regions, result, marks)
        self._free.append(worker)
        return result.finished(), marks

    # ---------------------------------------------------------------- threads

    def _in_threads(
        self, work: Callable[[_Worker, int, Any], None], jobs: list[Any], threads: int, size: int
    ) -> None:
        """Call ``work(worker, number, job)`` for all jobs; the first exception ends it."""
        threads = min(threads, len(jobs))
        numbered = iter(enumerate(jobs))
        taking = threading.Lock()
        failed = threading.Event()

        def loop() -> None:
            worker = self._worker(size // max(threads, 1))
            try:
                while not failed.is_set():
                    with taking:
                        number, job = next(numbered, (-1, []))
                    if number < 0:
                        break
                    work(worker, number, job)
            except BaseException:
                failed.set()
                raise
            self._free.append(worker)

        if threads < 2:
            loop()
            return
        with ThreadPoolExecutor(threads, "encode") as pool:
            for done in [pool.submit(loop) for _ in range(threads)]:
                done.result()

    def _worker(self, size: int) -> _Worker:
        """One that is free, with a table that suits `size` more bytes of text; a new one otherwise."""
        try:
            return self._free.pop()
        except IndexError:
            return _Worker(self._pattern, self._scanner, self._merges, self._whole, self._cache_bytes)

    def _pieces(self, data: bytes | memoryview, regions: list[Region], size: int) -> list[list[Region]]:
        """`regions` in groups of about `size` bytes; long ones are cut where that changes no pre-token."""
        groups: list[list[Region]] = [[]]
        room = size
        for begin, end, special in regions:
            while end - begin > room and (cut := self._cut(data, begin + room, end)) is not None:
                groups[-1].append((begin, cut, -1))
                groups.append([])
                begin, room = cut, size
            groups[-1].append((begin, end, special))
            room -= end - begin
            if room <= 0:
                groups.append([])
                room = size
        return groups if groups[-1] else groups[:-1]

    def _cut(self, data: bytes | memoryview, start: int, end: int) -> int | None:
        if not self._pattern.local or self._scanner is None:
            return None
        while start < end:
            while start < end and 0x80 <= data[start] < 0xC0:  # not in the middle of a character
                start += 1
            stop = min(start + _WINDOW, end)
            text = bytes(data[start:stop]).decode("utf-8", "surrogateescape")
            cut = self._pattern.safe_cut(text, 1)
            if cut is not None:
                return start + len(text[:cut].encode("utf-8", "surrogateescape"))
            start = stop
        return None


class _Worker:
    """What one thread needs to encode: a word table, a chunk of spans, and room for ids."""

    def __init__(
        self, pattern: Pattern, scanner: Scan | None, merges: MergeTable, whole: Any, cache_bytes: int
    ) -> None:
        self._pattern = pattern
        self._scanner = scanner
        self._spans = np.empty((CHUNK, 2), np.int64)
        self.table = WordTable(merges, whole, cache_bytes)
        self.ids: _Ids | None = None

    def encode(
        self,
        data: np.ndarray,
        tail: np.ndarray,
        regions: np.ndarray,
        ids: _Ids,
        marks: np.ndarray | None = None,
        keep: bool = True,
    ) -> int:
        """Append the ids of `regions` to `ids`; ``marks[i]`` becomes their number behind region i. Without `keep` they
        are written over one another. Returns how many there were."""
        spans = self._spans
        fill = self._scan(data, regions) if self._scanner else _matches(self._pattern, data, regions)
        self.table.start(marks)
        total = 0
        while count := fill(spans):
            before = ids.n
            done = 0
            while done < count:
                done, ids.n, wanted = self.table.encode(data, tail, spans, done, count, ids.array, ids.n)
                if done < count:
                    ids.reserve(wanted)
            total += ids.n - before
            if not keep:
                ids.n = before
        return total

    def _scan(self, data: np.ndarray, regions: np.ndarray) -> Spans:
        cursor = np.array([0, regions[0, 0]], np.int64)
        scanner = self._scanner
        assert scanner is not None
        return lambda spans: scanner(data, regions, cursor, spans)


def _matches(pattern: Pattern, data: np.ndarray, regions: np.ndarray) -> Spans:
    """Spans of a pattern that has no scanner, from `regex`."""

    find = regex.compile(pattern.text).finditer

    def rows() -> Iterator[tuple[int, int]]:
        for begin, end, special in regions.tolist():
            text = data[begin:end].tobytes().decode("utf-8", "surrogateescape")
            at = 0  # characters; `begin` counts bytes
            for match in find(text):
                for stop in match.span():  # what lies between two matches is a pre-token too
                    if stop > at:
                        size = len(text[at:stop].encode("utf-8", "surrogateescape"))
                        yield begin, begin + size
                        at, begin = stop, begin + size
            if begin < end:
                yield begin, end
            yield -1, special

    source = rows()

    def fill(spans: np.ndarray) -> int:
        found = list(islice(source, len(spans)))
        if found:
            spans[: len(found)] = found
        return len(found)

    return fill


class _Ids:
    """Ids that are being written: an array with room behind them."""

    def __init__(self, dtype: type, text: int) -> None:
        # Room for a token per two bytes; what is not touched takes no memory. `finished` gives it back.
        self.array: np.ndarray = np.empty(text // 2 + ROOM, dtype)
        self.n = 0

    def reserve(self, more: int) -> None:
        if self.n + more > len(self.array):
            longer = np.empty(max(self.n + more, len(self.array) * 2), self.array.dtype)
            longer[: self.n] = self.array[: self.n]
            self.array = longer

    def extend(self, other: _Ids) -> None:
        self.reserve(other.n)
        self.array[self.n : self.n + other.n] = other.array[: other.n]
        self.n += other.n

    def finished(self) -> np.ndarray:
        array = self.array
        self.array = np.empty(0, array.dtype)
        array.resize(self.n, refcheck=False)
        return array


class _InOrder:
    """Appends numbered results to one, in the order of their numbers, whenever they come."""

    def __init__(self, result: _Ids) -> None:
        self._result = result
        self._early: dict[int, _Ids] = {}
        self._next = 0
        self._lock = threading.Lock()

    def add(self, number: int, ids: _Ids) -> _Ids | None:
        """Append `ids`, or keep them until their turn. Returns room that may be used again."""
        free = None
        with self._lock:
            self._early[number] = ids
            while (free_next := self._early.pop(self._next, None)) is not None:
                free = free_next
                self._result.extend(free)
                free.n = 0
                self._next += 1
        return free


def _with_tail(data: bytes | memoryview) -> tuple[np.ndarray, np.ndarray]:
    """`data` as an array that Numba knows as read-only, and its last 16 bytes with room on both sides."""
    array = np.frombuffer(data, np.uint8)
    array.flags.writeable = False
    tail = np.zeros(64, np.uint8)
    last = array[-16:]
    tail[16 - len(last) : 16] = last
    return array, tail


def _batches(texts: Sequence[bytes | memoryview]) -> Iterator[tuple[int, int]]:
    """(first, end) of texts that together make a piece."""
    first = size = 0
    for index, text in enumerate(texts):
        size += len(text)
        if size >= PIECE:
            yield first, index + 1
            first, size = index + 1, 0
    if first < len(texts):
        yield first, len(texts)
