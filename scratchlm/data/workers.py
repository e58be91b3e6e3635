"""Tokenising: documents go out in chunks to threads or processes, ids come back in the same order.

    documents ─► chunk 0 ─► thread 1: ids 0, counts 0 ─┐
                 chunk 1 ─► thread 2: ids 1, counts 1 ─┼─► in order: a stream of ids, each document's followed by the separator
                 chunk 2 ─► whoever is free            ─┘

Where the tokenizer works in compiled code that lets go of Python's lock, workers are threads: nothing is copied between
processes, and they share one table of merges. Otherwise (a pattern that only `regex` can match) they are processes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from scratchlm.processes import IN_FLIGHT, Workers

if TYPE_CHECKING:
    from scratchlm.tokenizer import Tokenizer


@dataclass(slots=True)
class Encoded:
    """The tokens of some documents in a row.

    Attributes:
        ids: all ids, each document's followed by the separator, shape (sum of counts,), uint16 or uint32.
        counts: tokens of each document, separator included.
        sizes: UTF-8 bytes of each document.
    """

    ids: np.ndarray
    counts: np.ndarray
    sizes: np.ndarray


class Encoder:
    """Documents to ids. Text that looks like a special token is ordinary text: a corpus cannot forge a separator."""

    def __init__(self, tokenizer: Tokenizer, separator_id: int, dtype: str) -> None:
        self.tokenizer = tokenizer
        self.separator_id = separator_id
        self.dtype = dtype

    def __call__(self, documents: list[bytes]) -> Encoded:
        sizes = np.fromiter(map(len, documents), dtype=np.int64, count=len(documents))
        ids, counts = self.tokenizer.encode_documents(b"".join(documents), sizes, self.separator_id)
        return Encoded(ids.astype(np.dtype(self.dtype).newbyteorder("<"), copy=False), counts, sizes)


def encode_all(encoder: Encoder, chunks: Iterable[list[bytes]], workers: int) -> Generator[Encoded, None, None]:
    """Encode `chunks`, in their order, in `workers` threads or processes (1: in this thread).

    Only a few chunks per worker are held in memory (`processes.IN_FLIGHT`).

    Raises:
        UserError: the one a worker raised; or a worker died.
        Exception: any other exception of a worker, with its traceback as a note.
    """
    if workers == 1:
        yield from map(encoder, chunks)
        return
    if getattr(encoder.tokenizer, "releases_lock", False):
        yield from _in_threads(encoder, chunks, workers)
        return
    with Workers(
        Encoder,
        (encoder.tokenizer, encoder.separator_id, encoder.dtype),
        workers,
        advice="run again to go on from the last finished shard, with a smaller data.workers if it happens again",
    ) as pool:
        yield from pool.map(chunks)


def _in_threads(encoder: Encoder, chunks: Iterable[list[bytes]], workers: int) -> Generator[Encoded, None, None]:
    pending: deque[Future[Encoded]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="tokenise")
    try:
        for chunk in chunks:
            pending.append(pool.submit(encoder, chunk))
            if len(pending) >= IN_FLIGHT * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
