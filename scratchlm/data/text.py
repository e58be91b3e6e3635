"""Text files, split into documents at a separator while they stream by."""

from __future__ import annotations

import contextlib
import gzip
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, cast

from scratchlm.data.corpus import FileCorpus, decode
from scratchlm.errors import UserError

BLOCK = 1 << 20


@contextlib.contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """`path` for reading, decompressed as its suffix says (``.gz``, ``.zst``).

    Raises:
        UserError: the file cannot be read, or what is in it is not what its suffix says or is cut off.
    """
    import zstandard

    try:
        with contextlib.ExitStack() as stack:
            raw = stack.enter_context(path.open("rb"))
            if path.suffix == ".gz":
                yield cast(IO[bytes], stack.enter_context(gzip.open(raw)))
            elif path.suffix == ".zst":
                yield stack.enter_context(zstandard.open(raw, "rb"))
            else:
                yield raw
    except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError, EOFError) as error:
        raise UserError(f"{path}: cannot decompress ({error}); it may be cut off or of another kind") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def split_blocks(blocks: Iterable[bytes], separator: bytes) -> Iterator[tuple[int, bytearray]]:
    """``b"".join(blocks).split(separator)`` without ever joining: yields (byte offset, piece).

    Only the piece being read is in memory. Each byte is searched once, however long a piece grows. With an empty
    separator the whole is one piece.
    """
    buffer = bytearray()
    offset = 0  # of buffer[0] in the whole
    searched = 0  # no separator begins before this place in the buffer
    for block in blocks:
        buffer += block
        if not separator:
            continue
        begin = 0
        while (end := buffer.find(separator, max(begin, searched))) >= 0:
            yield offset + begin, buffer[begin:end]
            begin = end + len(separator)
        del buffer[:begin]
        offset += begin
        searched = max(0, len(buffer) - len(separator) + 1)  # one may straddle the border to the next block
    yield offset, buffer


class TextCorpus(FileCorpus):
    """Plain text (``.txt``, or ``.txt.gz`` and ``.txt.zst``), documents between `separator`.

    The text is kept exactly, line ends and the newlines around a separator included; only the separator itself is
    taken out. Pieces with nothing in them are dropped. UTF-8 can be searched as bytes: no character contains another.
    """

    fields = ("separator",)

    def one_per_file(self) -> bool:
        return not self.config.separator

    def read(self, path: Path) -> Iterator[str]:
        with open_bytes(path) as file:
            blocks = iter(lambda: file.read(BLOCK), b"")
            for offset, piece in split_blocks(blocks, self.config.separator.encode("utf-8")):
                yield decode(piece, self.config, str(path), offset)
