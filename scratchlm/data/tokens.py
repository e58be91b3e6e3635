"""Tokens on disk: the manifest, and memory-mapped reading across shard files.

A folder of tokens holds, per split, files of little-endian uint16 or uint32 ids (``train-00000.bin``, …), read one after the
other as a single stream in which every document is followed by the separator, and ``manifest.json``, which says all
that is needed to read them and to notice when something is not as it was.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from scratchlm.data import digests
from scratchlm.errors import UserError
from scratchlm.files import read_json, write_json
from scratchlm.progress import progress

if TYPE_CHECKING:
    from scratchlm.tokenizer import Tokenizer

# 1 had BLAKE2b digests, of shards and in the fingerprint of the corpus; it can be read and verified, but is not written.
FORMAT_VERSION = 2
MANIFEST = "manifest.json"

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a split: its name, its length in tokens, and the digest of its bytes, ``"algorithm:hex"`` (see `digests`)."""

    name: str
    tokens: int
    digest: str


@dataclass(frozen=True, slots=True)
class SplitManifest:
    """One split: `tokens` (separators included), `documents`, and `bytes` of UTF-8 text (without separators)."""

    tokens: int
    documents: int
    bytes: int
    shards: list[Shard]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a folder of tokens holds. `tokenizer` is the tokenizer's content hash, `corpus` the corpus's fingerprint."""

    format_version: int
    key: str
    corpus: str
    tokenizer: str
    vocab_size: int
    separator_id: int
    dtype: str
    splits: dict[str, SplitManifest]

    @staticmethod
    def load(folder: Path) -> Manifest:
        """Read ``manifest.json``.

        Raises:
            UserError: it is missing, damaged, or of another version.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise UserError(
                f"{folder} holds no finished token data ({MANIFEST} is missing); run the data step for it"
            )
        value = read_json(path, "manifest")
        version = value.get("format_version") if isinstance(value, dict) else None
        if version not in (1, FORMAT_VERSION):
            raise UserError(
                f"{path}: format version {version}, this program reads 1 to {FORMAT_VERSION}; prepare the data anew"
            )
        try:
            splits = {
                name: SplitManifest(**{**split, "shards": [_shard(shard, version) for shard in split["shards"]]})
                for name, split in value["splits"].items()
            }
            manifest = Manifest(**{**value, "splits": splits})
        except (TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path} is not a manifest of token data ({error}); prepare the data anew") from error
        if manifest.dtype not in ("uint16", "uint32"):
            raise UserError(f"{path}: dtype {manifest.dtype!r} is unknown; prepare the data anew")
        return manifest

    def save(self, folder: Path) -> None:
        """Write ``manifest.json``, atomically."""
        write_json(folder / MANIFEST, dataclasses.asdict(self))


class Tokens:
    """One split as a single stream of ids, memory-mapped: opening it reads nothing.

    Attributes:
        separator_id: the id after every document.
        documents: number of documents.
        bytes: UTF-8 bytes of text they came from, the numerator of "bytes per token".
    """

    def __init__(self, arrays: list[np.ndarray], *, separator_id: int, documents: int, bytes: int) -> None:
        self.separator_id = separator_id
        self.documents = documents
        self.bytes = bytes
        # A plain view: indexing numpy's memmap class itself is several times slower.
        self._arrays = [np.asarray(array) for array in arrays]
        self._starts = np.cumsum([0] + [len(array) for array in self._arrays])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, stop: int) -> Ids:
        """The ids at ``start:stop`` as int64, shape (stop - start,).

        Raises:
            IndexError: the range is not within the stream.
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start}:{stop} of a stream of {len(self)}")
        out = np.empty(stop - start, dtype=np.int64)
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        position = start
        while position < stop:
            first = int(self._starts[shard])
            piece = self._arrays[shard][position - first : stop - first]
            out[position - start : position - start + len(piece)] = piece
            position += len(piece)
            shard += 1
        return out

    def windows(self, starts: Ids, length: int) -> Ids:
        """The windows of `length` ids beginning at each of `starts`, int64, shape (len(starts), length).

        Raises:
            IndexError: a window is not within the stream.
        """
        starts = np.asarray(starts, dtype=np.int64)
        if len(starts) and not (starts.min() >= 0 and starts.max() + length <= len(self)):
            raise IndexError(f"windows of {length} at {starts.min()}..{starts.max()} of a stream of {len(self)}")
        out = np.empty((len(starts), length), dtype=np.int64)
        shards = np.searchsorted(self._starts, starts, side="right") - 1
        inside = starts + length <= self._starts[np.minimum(shards + 1, len(self._arrays))]
        for shard in np.unique(shards[inside]):  # one gather per shard
            rows = np.flatnonzero(inside & (shards == shard))
            begin = starts[rows] - self._starts[shard]
            out[rows] = self._arrays[shard][begin[:, None] + np.arange(length)]
        for row in np.flatnonzero(~inside):  # the few that cross into the next shard
            out[row] = self.read(int(starts[row]), int(starts[row]) + length)
        return out


class TokenData:
    """A finished folder of tokens."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest

    @classmethod
    def open(cls, folder: str | Path, tokenizer: Tokenizer | None = None) -> TokenData:
        """Read the manifest and check that every shard is there in full length (not its content: see `verify`).

        Args:
            folder: what :func:`scratchlm.data.prepare` wrote.
            tokenizer: if given, must be the one the tokens were made with.

        Raises:
            UserError: no finished data there, a shard is missing or cut off, or another tokenizer.
        """
        data = cls(Path(folder), Manifest.load(Path(folder)))
        width = np.dtype(data.manifest.dtype).itemsize
        for shard in data.shards():
            path = data.folder / shard.name
            found = path.stat().st_size if path.is_file() else None
            if found != shard.tokens * width:
                state = "missing" if found is None else f"{found} bytes long"
                raise UserError(
                    f"shard {path} is {state}, expected {shard.tokens * width} bytes; delete {data.folder} and prepare the "
                    "data anew"
                )
        if tokenizer is not None and tokenizer.content_hash != data.manifest.tokenizer:
            raise UserError(
                f"{data.folder} was made with another tokenizer (content hash {data.manifest.tokenizer}, this one has "
                f"{tokenizer.content_hash}); use that one or prepare the data anew"
            )
        return data

    def shards(self) -> list[Shard]:
        """The shards of all splits."""
        return [shard for split in self.manifest.splits.values() for shard in split.shards]

    def split(self, name: str) -> Tokens:
        """The tokens of one split, memory-mapped.

        Raises:
            UserError: there is no such split.
        """
        if name not in self.manifest.splits:
            raise UserError(f"{self.folder}: no split {name!r}; it has {', '.join(self.manifest.splits)}")
        split = self.manifest.splits[name]
        dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        arrays = [np.memmap(self.folder / shard.name, dtype=dtype, mode="r") for shard in split.shards]
        return Tokens(
            list(arrays), separator_id=self.manifest.separator_id, documents=split.documents, bytes=split.bytes
        )

    def verify(self, show_progress: bool = True) -> None:
        """Read every shard and compare its digest with the manifest's.

        Raises:
            UserError: the first shard whose content is not what was written.
        """
        width = np.dtype(self.manifest.dtype).itemsize
        total = width * sum(shard.tokens for shard in self.shards())
        with progress(description="verify shards", total=total, bytes_=True, show=show_progress) as bar:
            for shard in self.shards():
                algorithm, _, expected = shard.digest.partition(":")
                try:
                    digest = digests.new(algorithm)
                except ValueError as error:
                    raise UserError(
                        f"{self.folder / MANIFEST}: {shard.name} has a digest of an unknown kind ({algorithm!r}); delete "
                        f"{self.folder} and prepare the data anew"
                    ) from error
                with (self.folder / shard.name).open("rb") as file:
                    while block := file.read(1 << 20):
                        digest.update(block)
                        bar.update(len(block))
                if digest.hexdigest() != expected:
                    raise UserError(
                        f"shard {self.folder / shard.name} is damaged (its digest differs from the manifest's); "
                        f"delete {self.folder} and prepare the data anew"
                    )


def _shard(value: dict[str, Any], version: int) -> Shard:
    if version == 1:
        value = {**value}
        value["digest"] = f"blake2b:{value.pop('blake2b')}"
    shard = Shard(**value)
    if not isinstance(shard.digest, str):
        raise TypeError(f"digest {shard.digest!r}")
    return shard
