"""Bytes → ids at full speed: special tokens, scanner and word table, chunk by chunk, on one thread or several.

    data ──regions──► [begin, end, special] ──scanner──► spans (a chunk of 65,536) ──word table──► ids ──► result
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
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count, islice, pairwise
from typing import Any

import numpy as np
import regex

from scratchlm.tokenizer.buffers import HUGE, Buffers
from scratchlm.tokenizer.merge_table import MergeTable, merge_table
from scratchlm.tokenizer.patterns import Pattern
from scratchlm.tokenizer.regions import Region, SpecialSearch
from scratchlm.tokenizer.scanner import Scanner, scanner_for
from scratchlm.tokenizer.word_rows import ROOM, whole_words
from scratchlm.tokenizer.word_table import WordTable

# Spans per chunk: 1 MB of them, and about 256 kB of text. (A quarter would stay in the second cache, and take 5 % longer.)
CHUNK = 1 << 16
# In shorter texts, which are a chunk or two, nothing is gained by the compiled loop over chunks.
_MANY_CHUNKS = 1 << 18
# Bytes of text that a thread takes at a time.
PIECE = 1 << 19
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
        self._numbers = count()
        self.buffers = Buffers()

    def warm_up(self) -> None:
        """Compile, or load, what texts of any length need."""
        self.encode(b"warm up", [(0, 7, -1)])
        worker = self._worker()
        worker.in_one_loop(*_with_tail(b"warm up"), np.array([(0, 7, -1)], np.int64), _Ids(self._dtype, 7), None)
        self._free.append(worker)

    # ---------------------------------------------------------------- one text

    def encode(self, data: bytes | memoryview, regions: list[Region], threads: int = 1) -> np.ndarray:
        """Ids of the texts in `regions` (begin, end, id that follows or −1) of `data`, one behind the other."""
        size = sum(end - begin for begin, end, _ in regions)
        jobs = self._pieces(data, regions, PIECE) if threads > 1 and size > PIECE else [regions]
        array, tail = _with_tail(data)
        result = _Ids(self._dtype, size, self.buffers)
        if len(jobs) < 2:
            worker = self._worker()
            worker.encode(array, tail, np.array(regions, np.int64), result)
            self._free.append(worker)
            return result.finished()
        joined = _InOrder(result)

        def work(worker: _Worker, number: int, rows: list[Region]) -> None:
            ids = _Ids(self._dtype, PIECE) if worker.ids is None else worker.ids
            worker.encode(array, tail, np.array(rows, np.int64), ids)
            worker.ids = joined.add(number, ids)

        self._in_threads(work, jobs, threads, in_order=True)
        return result.finished()

    def count(self, data: bytes | memoryview, regions: list[Region]) -> int:
        """How many ids :meth:`encode` would give; they are not kept."""
        array, tail = _with_tail(data)
        worker = self._worker()
        total = worker.encode(array, tail, np.array(regions, np.int64), _Ids(self._dtype, 0), keep=False)
        self._free.append(worker)
        return total

    # ---------------------------------------------------------------- many texts

    def encode_many(
        self, texts: Sequence[bytes | memoryview], search: SpecialSearch, threads: int = 1
    ) -> list[np.ndarray]:
        """Ids of each text. Short texts are encoded many at a time, as if they were one with boundaries in it."""
        lengths = np.fromiter(map(len, texts), np.int64, len(texts))
        jobs = _batches(lengths)
        parts: list[list[np.ndarray]] = [[] for _ in jobs]
        much = lengths.sum() >= HUGE

        def work(worker: _Worker, number: int, job: tuple[int, int]) -> None:
            data, rows, last = worker.joined(texts[slice(*job)], lengths[slice(*job)], search)
            marks = np.empty(len(rows), np.int64)
            ids = (
                worker.ids if much and worker.ids else _Ids(self._dtype, HUGE if much else len(data), self.buffers)
            )
            ids.make_room(len(data))
            before = ids.n
            worker.encode(*_with_tail(data), rows, ids, marks)
            parts[number] = [ids.array[start:stop] for start, stop in pairwise([before, *marks[last].tolist()])]
            worker.ids = ids

        self._in_threads(work, jobs, threads)
        return [array for part in parts for array in part]

    def encode_rows(self, data: bytes | memoryview, regions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the texts in `regions`, int64 (n, 3), of `data`, and how many there are up to the end of each, int64 (n,).

        Safe to call from several threads at a time.
        """
        array, tail = _with_tail(data)
        marks = np.empty(len(regions), np.int64)
        result = _Ids(self._dtype, max(len(array), HUGE) if len(array) > PIECE else len(array), self.buffers)
        worker = self._worker()
        worker.encode(array, tail, regions, result, marks)
        self._free.append(worker)
        return result.finished(), marks

    # ---------------------------------------------------------------- threads

    def _in_threads(
        self, work: Callable[[_Worker, int, Any], None], jobs: list[Any], threads: int, in_order: bool = False
    ) -> None:
        """Call ``work(worker, number, job)`` for all jobs; the first exception ends it.

        Unless they are to be taken in order, each thread has neighbours to do, and helps others when it has done them: neighbours
        have words in common, and whoever encodes a corpus again meets words that its table knows.
        """
        threads = max(1, min(threads, len(jobs)))
        parts = 1 if in_order else threads
        bounds = [len(jobs) * part // parts for part in range(parts + 1)]
        waiting = [deque(range(begin, end)) for begin, end in pairwise(bounds)]
        workers = sorted((self._worker() for _ in range(threads)), key=lambda worker: worker.number)
        taking = threading.Lock()
        failed = threading.Event()

        def take(mine: deque[int]) -> int:
            with taking:
                if mine:
                    return mine.popleft()
                most = max(waiting, key=len)
                return most.pop() if most else -1

        def loop(thread: int) -> None:
            worker = workers[thread]
            try:
                while not failed.is_set() and (number := take(waiting[thread % parts])) >= 0:
                    work(worker, number, jobs[number])
            except BaseException:
                failed.set()
                raise
            worker.ids = None
            self._free.append(worker)

        if threads < 2:
            loop(0)
            return
        with ThreadPoolExecutor(threads, "encode") as pool:
            for done in [pool.submit(loop, thread) for thread in range(threads)]:
                done.result()

    def _worker(self) -> _Worker:
        """One that is free, or a new one."""
        try:
            return self._free.pop()
        except IndexError:
            number = next(self._numbers)
            return _Worker(number, self._pattern, self._scanner, self._merges, self._whole, self._cache_bytes)

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
        self,
        number: int,
        pattern: Pattern,
        scanner: Scanner | None,
        merges: MergeTable,
        whole: Any,
        cache_bytes: int,
    ) -> None:
        self.number = number
        self._pattern = pattern
        self._scanner = scanner
        self._spans = np.empty((CHUNK, 2), np.int64)
        self._joined = np.empty(2 * PIECE, np.uint8)
        self.table = WordTable(merges, whole, cache_bytes)
        self.ids: _Ids | None = None

    def joined(
        self, texts: Sequence[bytes | memoryview], lengths: np.ndarray, search: SpecialSearch
    ) -> tuple[bytes | memoryview, np.ndarray, np.ndarray]:
        """(all texts one behind the other, their regions, the last region of each). They count until the next call."""
        ends = np.cumsum(lengths)
        data = texts[0]
        if len(texts) > 1:
            room = self._joined if ends[-1] <= len(self._joined) else np.empty(ends[-1], np.uint8)
            data = room[: ends[-1]].data
            for text, end in zip(texts, ends.tolist(), strict=True):
                data[end - len(text) : end] = text
        if not search.occurs(data):  # nor across the boundary of two texts
            rows = np.stack([ends - lengths, ends, np.full(len(ends), -1)], axis=1)
            return data, rows, np.arange(len(ends))
        found = [
            search.regions(data, end - length, end)
            for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)
        ]
        return (
            data,
            np.array([row for rows in found for row in rows], np.int64),
            np.cumsum([len(rows) for rows in found]) - 1,
        )

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
        if keep and len(data) > _MANY_CHUNKS and self._scanner:
            return self.in_one_loop(data, tail, regions, ids, marks)
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

    def in_one_loop(
        self, data: np.ndarray, tail: np.ndarray, regions: np.ndarray, ids: _Ids, marks: np.ndarray | None
    ) -> int:
        """The same through the compiled loop over chunks; nothing where no scanner is compiled."""
        before = ids.n
        if self._scanner:
            self.table.start(marks)
            self.table.encode_text(self._scanner, data, tail, regions, self._spans, ids)
        return ids.n - before

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
    """Ids that are being written: an array with room behind them.

    Args:
        dtype: of ids.
        text: bytes of text to come.
        buffers: where large arrays come from; None: they are allocated.
    """

    def __init__(self, dtype: type, text: int, buffers: Buffers | None = None) -> None:
        self._dtype = dtype
        self.buffers = buffers
        self.array = self._new(_expected(text))
        self.n = 0

    def _new(self, size: int) -> np.ndarray:
        if self.buffers is not None and size * np.dtype(self._dtype).itemsize >= HUGE:
            return self.buffers.take(size, self._dtype)
        return np.empty(size, self._dtype)

    def make_room(self, text: int) -> None:
        """Begin a new array if this one has not the room that so much text usually takes."""
        if self.n + _expected(text) > len(self.array):
            self.array, self.n = self._new(max(_expected(text), len(self.array))), 0

    def reserve(self, more: int) -> None:
        if self.n + more > len(self.array):
            longer = self._new(max(self.n + more, len(self.array) * 2))
            longer[: self.n] = self.array[: self.n]
            self.array = longer

    def extend(self, other: _Ids) -> None:
        self.reserve(other.n)
        self.array[self.n : self.n + other.n] = other.array[: other.n]
        self.n += other.n

    def finished(self) -> np.ndarray:
        array = self.array
        self.array = np.empty(0, array.dtype)
        if array.base is not None:  # what was not touched takes no memory
            return array[: self.n]
        array.resize(self.n, refcheck=False)
        return array


def _expected(text: int) -> int:
    """Ids for which there should be room: a token per two bytes is rarely too little."""
    return text // 2 + ROOM


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


def _batches(lengths: np.ndarray) -> list[tuple[int, int]]:
    """(first, end) of texts that together are not much longer than a piece."""
    number = (np.cumsum(lengths) - lengths) // PIECE  # the piece that a text begins in
    bounds = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(lengths)]
    return list(pairwise(bounds)) if len(lengths) else []
