"""Text files, split into documents at a separator while they stream by."""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, cast

import zstandard

from scratchlm.data.corpus import MUCH, FileCorpus, valid_utf8
from scratchlm.errors import UserError

BLOCK = 1 << 20


@contextlib.contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """`path` for reading, decompressed as its suffix says (``.gz``, ``.zst``).

    Raises:
        UserError: the file cannot be read, or what is in it is not what its suffix says or is cut off.
    """
    try:
        with contextlib.ExitStack() as stack:
            raw = stack.enter_context(path.open("rb"))
            if path.suffix == ".gz":
                yield cast(IO[bytes], stack.enter_context(gzip.open(raw)))
            elif path.suffix == ".zst":
                yield stack.enter_context(io.BufferedReader(_Zstandard(raw), BLOCK))
            else:
                yield raw
    except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError, EOFError) as error:
        raise UserError(f"{path}: cannot decompress ({error}); it may be cut off or of another kind") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


class _Zstandard(io.RawIOBase):
    """Decompressed bytes of a ``.zst`` file: frame after frame, and an error where one is cut off.

    The package's own reader ends without a word in the middle of a frame, which would shorten a corpus silently.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._package = zstandard.ZstdDecompressor(max_window_size=2**31)  # as zstd --long=31 writes
        self._frame: Any = None
        self._rest = b""  # compressed bytes behind the end of a frame
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while not self._ready:
            data = self._rest or self._file.read(BLOCK // 8)
            self._rest = b""
            if not data:
                if self._frame is not None:
                    raise EOFError("the file ends in the middle of a frame")
                return 0
            if self._frame is None:
                self._frame = self._package.decompressobj()
            self._ready = memoryview(self._frame.decompress(data))
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        size = min(len(target), len(self._ready))
        target[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size


def split_blocks(blocks: Iterable[bytes], separator: bytes) -> Iterator[tuple[int, bytes]]:
    """``b"".join(blocks).split(separator)`` without ever joining: yields (byte offset, piece).

    Only a block and the piece being read are in memory. Each byte is searched once, however long a piece grows. With an
    empty separator the whole is one piece.
    """
    much = False  # is known of the file already, and the separator is rare enough for a compiled search
    begun: list[bytes] = []  # what is known of the piece being read, without …
    edge = b""  # … its last bytes, with which a separator may begin that the next block ends
    offset = 0  # of the piece being read, in the whole
    for block in blocks:
        if not separator:
            begun.append(block)
            continue
        if offset > MUCH and not much and len(separator) > 1:
            much = block.count(separator[:2]) << 12 <= len(block)
        *ended, rest = (_split if much else bytes.split)(edge + block, separator)
        for piece in ended:
            if begun:
                piece = b"".join((*begun, piece))
                begun.clear()
            yield offset, piece
            offset += len(piece) + len(separator)
        keep = min(len(separator) - 1, len(rest))
        begun.append(rest[: len(rest) - keep])
        edge = rest[len(rest) - keep :]
    yield offset, b"".join((*begun, edge))


def _split(block: bytes, separator: bytes) -> list[bytes]:
    """``block.split(separator)`` by a compiled loop: many times as fast where its first two bytes are rare, and without Python's lock."""
    from scratchlm.tokenizer.regions import SpecialSearch

    return [block[begin:end] for begin, end, _ in SpecialSearch({separator: 0}).regions(block, 0, len(block))]


class TextCorpus(FileCorpus):
    """Plain text (``.txt``, or ``.txt.gz`` and ``.txt.zst``), documents between `separator`.

    The text is kept exactly, line ends and the newlines around a separator included; only the separator itself is
    taken out. Pieces with nothing in them are dropped. UTF-8 can be searched as bytes: no character contains another.
    """

    fields = ("separator",)

    def one_per_file(self) -> bool:
        return not self.config.separator

    def read(self, path: Path) -> Iterator[bytes]:
        with open_bytes(path) as file:
            blocks = iter(lambda: file.read(BLOCK), b"")
            for offset, piece in split_blocks(blocks, self.config.separator.encode("utf-8")):
                yield valid_utf8(piece, self.config, str(path), offset)
