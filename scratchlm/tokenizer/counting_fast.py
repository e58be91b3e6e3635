"""Counting words with compiled scanners, in threads that hold no lock: counts equal to `counting.WordCounter`'s.

    files ──► ranges ─┐          thread 1: buffer ──► regions ──scanner──► spans ──► count table ─┐
                      ├─ queue ─►                                                                  ├──► one table
    documents ────────┘          thread 2: buffer ──► regions ──scanner──► spans ──► count table ─┘

Buffers and spans are used again for every job and stay in the processor's cache; only the count tables grow, with the
number of distinct words. A range that is longer than the buffer (a text without a safe place to cut it) goes through in windows. What
may change when more text follows, the last few pre-tokens, is moved to the front of the next window:

    window    │ … ␣the ␣cat ␣sat ␣on ␣the ␣m│at …
    counted     ──────────────┘ └─────────┘ held back: the last ``_UNDECIDED`` pre-tokens, and a special token's length
"""

from __future__ import annotations

import queue
import re
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from scratchlm.errors import UserError
from scratchlm.tokenizer import count_table
from scratchlm.tokenizer.compiling import announce
from scratchlm.tokenizer.count_table import PAD, CountTable
from scratchlm.tokenizer.counting import Documents, FileRange, WordCounts, lone_surrogate
from scratchlm.tokenizer.merging import Tick
from scratchlm.tokenizer.scanner import Scan
from scratchlm.tokenizer.utf8_check import valid_until

# Spans, and the text they cover, stay in the second-level cache. With far fewer, threads would wait for Python's lock.
_SPANS = 16384
_WINDOW = 4 << 20
# A named pattern looks three characters past a match, or to the end of the white space or of the letters that follow: the
# last pre-token may change, in a run of capitals two, and before a blank end three.
_UNDECIDED = 8


class _Specials:
    """Finds special tokens in bytes: the leftmost first, and of those that start at one place the longest."""

    def __init__(self, specials: Iterable[str]) -> None:
        self._encoded = sorted((special.encode() for special in specials), key=len, reverse=True)
        self._compiled = re.compile(b"|".join(map(re.escape, self._encoded)))
        self.longest = max(map(len, self._encoded), default=0)

    def cut(self, buffer: bytearray, begin: int, end: int) -> list[tuple[int, int]]:
        """The texts between special tokens, (begin, end) of each; empty ones too."""
        present = [special for special in self._encoded if buffer.find(special, begin, end) >= 0]
        texts = []
        if len(present) == 1:  # one search for bytes is several times as fast as a pattern's
            special = present[0]
            while (found := buffer.find(special, begin, end)) >= 0:
                texts.append((begin, found))
                begin = found + len(special)
        elif present:
            for match in self._compiled.finditer(buffer, begin, end):
                texts.append((begin, match.start()))
                begin = match.end()
        texts.append((begin, end))
        return texts


class FastCounter:
    """Counts the pre-tokens of one job after another, as `counting.WordCounter` does."""

    def __init__(self, scanner: Scan, specials: Iterable[str], longest: int) -> None:
        self._scanner = scanner
        self._specials = _Specials(specials)
        self.table = CountTable(longest)
        self._spans = np.empty((_UNDECIDED + 1 + _SPANS, 2), np.int64)
        self._buffer = bytearray()
        self._make_room(0)

    def __call__(self, job: FileRange | Documents) -> int:
        """Count a job's pre-tokens; its size."""
        if isinstance(job, FileRange):
            self._count_file(job)
        else:
            self._count_documents(job)
        return job.size

    def _make_room(self, size: int) -> None:
        """A buffer of at least `size` bytes that begins with the old one's."""
        buffer = bytearray(max(size + PAD, len(self._buffer)))
        buffer[: len(self._buffer)] = self._buffer
        self._buffer = buffer
        self._data = np.frombuffer(buffer, np.uint8)
        self._data.flags.writeable = False

    def _count_documents(self, job: Documents) -> None:
        try:
            encoded = [text.encode("utf-8") for text in job.texts]
        except UnicodeEncodeError as error:
            raise lone_surrogate(error) from error
        ends = np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)))
        size = int(ends[-1]) if encoded else 0
        if size + PAD > len(self._buffer):
            self._make_room(size)
        memoryview(self._buffer)[:size] = b"".join(encoded)
        texts: list[tuple[int, int]] = []
        begin = 0
        for end in ends.tolist():
            texts += self._specials.cut(self._buffer, begin, end)
            begin = end
        if texts:
            self._count(texts)

    def _count_file(self, job: FileRange) -> None:
        held = 0  # bytes at the front of the buffer that are not counted yet
        position = job.start
        window = min(_WINDOW, job.size)
        with Path(job.path).open("rb", buffering=0) as file:
            file.seek(position)
            while True:
                wanted = min(window, job.stop - position)
                if held + wanted + PAD > len(self._buffer):
                    self._make_room(held + wanted)
                read = file.readinto(memoryview(self._buffer)[held : held + wanted]) if wanted else 0
                position += read
                filled = held + read
                final = position >= job.stop or not read
                end = int(valid_until(self._data, 0, filled))
                if end < filled and (final or filled - end > 3):
                    self._refuse(job, position - filled, filled, end)
                if final:
                    self._count(self._specials.cut(self._buffer, 0, filled))
                    return
                begin = self._count_decided(end)
                held = filled - begin
                # One pre-token that is longer than the window: look at twice as much next time.
                window = max(_WINDOW, held)
                memoryview(self._buffer)[:held] = bytes(memoryview(self._buffer)[begin:filled])

    def _refuse(self, job: FileRange, offset: int, filled: int, end: int) -> None:
        try:
            bytes(memoryview(self._buffer)[end:filled]).decode("utf-8")
        except UnicodeDecodeError as error:
            if error.start == 0 and (error.reason != "unexpected end of data" or offset + filled >= job.stop):
                raise UserError(
                    f"{job.path}: byte {offset + end} is not UTF-8 ({error.reason}); convert the file to UTF-8 first"
                ) from error
        raise AssertionError(f"byte {offset + end} of {job.path} is UTF-8 for Python")

    def _count_decided(self, end: int) -> int:
        """Count what does not depend on how the text goes on behind `end`; where the rest begins."""
        # A special token that begins in the last bytes may be part of a longer one; further left nothing is in doubt.
        cut = max(0, end - self._specials.longest)
        while cut > 0 and self._buffer[cut] & 0xC0 == 0x80:
            cut -= 1
        texts = self._specials.cut(self._buffer, 0, end)
        while len(texts) > 1 and texts[-2][1] >= cut:
            texts.pop()
        begin, last_end = texts.pop()
        if texts:
            self._count(texts)
        return self._count([(begin, max(begin, min(cut, last_end)))], _UNDECIDED)

    def _count(self, texts: list[tuple[int, int]], undecided: int = 0) -> int:
        """Count the pre-tokens of texts, but for the last `undecided`; where these begin."""
        regions = np.full((len(texts), 3), -1, np.int64)
        regions[:, :2] = texts
        cursor = np.array([0, regions[0, 0]], np.int64)
        kept = 0
        while True:
            new = self._scanner(self._data, regions, cursor, self._spans[kept : kept + _SPANS])
            if new == 0:
                break
            rows = kept + new
            ripe = max(0, rows - undecided - 1) if undecided else rows  # one more row tells that the region ends
            self.table.add(self._data, self._spans, ripe)
            kept = rows - ripe
            if kept:
                self._spans[:kept] = self._spans[ripe:rows].copy()
        return int(self._spans[0, 0]) if kept > 1 else int(regions[-1, 0])


def count_fast(
    jobs: Iterator[FileRange | Documents],
    scanner: Scan,
    specials: Iterable[str],
    threads: int,
    longest: int,
    tick: Tick = lambda size: None,
    show: bool = False,
) -> tuple[WordCounts, tuple[int, int]]:
    """Count the words of all jobs.

    Args:
        jobs: ranges or documents; the iterator is advanced in the calling thread.
        scanner: of the pattern.
        specials: hard boundaries, not counted.
        threads: that count, at least 1. The counts are the same for any number.
        longest: words of more bytes are left out.
        tick: called with the size of each finished job.
        show: a line if something has to be compiled.

    Returns:
        the words, in no particular order; and how many were left out and their bytes.

    Raises:
        UserError: a file is not UTF-8; of several faults the first.
    """
    announce(count_table._add, "the scanner and the word counter", show)
    specials = list(specials)
    if threads == 1:
        counter = FastCounter(scanner, specials, longest)
        for job in jobs:
            tick(counter(job))
        return counter.table.words(), counter.table.left_out

    counters = [FastCounter(scanner, specials, longest) for _ in range(threads)]
    waiting: queue.SimpleQueue[tuple[int, FileRange | Documents] | None] = queue.SimpleQueue()
    finished: queue.SimpleQueue[tuple[int, int, BaseException | None]] = queue.SimpleQueue()
    stopped = threading.Event()

    def work(counter: FastCounter) -> None:
        while (item := waiting.get()) is not None and not stopped.is_set():
            number, job = item
            try:
                finished.put((number, counter(job), None))
            except BaseException as error:
                finished.put((number, 0, error))

    helpers = [threading.Thread(target=work, args=(counter,), daemon=True) for counter in counters]
    for helper in helpers:
        helper.start()
    failures: list[tuple[int, BaseException]] = []
    under_way = 0

    def take() -> None:
        number, size, failure = finished.get()
        if failure is not None:
            failures.append((number, failure))
        tick(size)

    try:
        for number, job in enumerate(jobs):
            waiting.put((number, job))
            under_way += 1
            while under_way >= 2 * threads or not finished.empty():
                take()
                under_way -= 1
            if failures:
                break
        while under_way:
            take()
            under_way -= 1
    except BaseException:
        stopped.set()
        raise
    finally:
        for _ in helpers:
            waiting.put(None)
        for helper in helpers:
            helper.join()
    if failures:
        raise min(failures, key=lambda failure: failure[0])[1]
    table = counters[0].table
    for counter in counters[1:]:
        table.absorb(counter.table)
    return table.words(), table.left_out
