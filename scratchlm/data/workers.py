"""Tokenising: text goes out to processes in chunks, ids come back in the same order."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from scratchlm.processes import Workers

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
        dtype = np.dtype(self.dtype).newbyteorder("<")
        separator = np.array([self.separator_id], dtype=dtype)
        parts = []
        counts = np.empty(len(documents), dtype=np.int64)
        for index, document in enumerate(documents):
            ids = self.tokenizer.encode_array(document, allowed_special=())
            parts += [ids.astype(dtype, copy=False), separator]
            counts[index] = len(ids) + 1
        sizes = np.array([len(document) for document in documents], dtype=np.int64)
        return Encoded(np.concatenate(parts), counts, sizes)


def encode_all(encoder: Encoder, chunks: Iterable[list[bytes]], workers: int) -> Generator[Encoded, None, None]:
    """Encode `chunks`, in their order, in `workers` processes (1: in this one).

    Only a few chunks per worker are held in memory (`processes.IN_FLIGHT`).

    Raises:
        UserError: the one a worker raised; or a worker died.
        Exception: any other exception of a worker, with its traceback as a note.
    """
    if workers == 1:
        yield from map(encoder, chunks)
        return
    with Workers(
        Encoder,
        (encoder.tokenizer, encoder.separator_id, encoder.dtype),
        workers,
        advice="run again to go on from the last finished shard, with a smaller data.workers if it happens again",
    ) as pool:
        yield from pool.map(chunks)
