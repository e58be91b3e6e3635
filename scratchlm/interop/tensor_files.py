"""Files of named tensors as the hub has them: one safetensors file, or shards with an index; read and written one by one."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from scratchlm.errors import UserError
from scratchlm.files import read_json, write_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Kinds of numbers that weights may be stored as."""

OTHER_DTYPES = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")


@dataclass(frozen=True)
class Stored:
    """What a file says of one tensor, without reading it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class TensorFiles:
    """The tensors of a folder, read one at a time.

    Args:
        folder: with ``model.safetensors``, or shards and ``model.safetensors.index.json``.
        allow_pickle: read ``pytorch_model.bin`` (or its shards) if there is nothing else, with ``weights_only=True``.

    Raises:
        UserError: there are none, one is cut off or damaged, or only pickles are there and not allowed.
    """

    def __init__(self, folder: Path, allow_pickle: bool = False) -> None:
        self.folder = folder
        self._pickled: dict[str, Tensor] = {}
        self._open: tuple[Path, Any] | None = None
        files = self._safetensors_files()
        if files is None:
            self.stored = self._unpickle(allow_pickle)
        else:
            self.stored = {}
            for file in files:
                for name, stored in _header(file).items():
                    if name in self.stored:
                        raise UserError(
                            f"{file} and {self.stored[name].file.name} both hold {name}; one is left over"
                        )
                    self.stored[name] = stored

    def _safetensors_files(self) -> list[Path] | None:
        if (self.folder / INDEX).exists():
            listed = read_json(self.folder / INDEX, "index of the weights")
            names = listed.get("weight_map") if isinstance(listed, dict) else None
            if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
                raise UserError(f"{self.folder / INDEX} has no weight_map; take the file anew")
            outside = [name for name in names.values() if Path(name).name != name or name in ("", ".", "..")]
            if outside:
                raise UserError(
                    f"{self.folder / INDEX} names {outside[0][:80]!r}, which is not a file of its folder"
                )
            return [self.folder / name for name in sorted(set(names.values()))]
        return [self.folder / SINGLE] if (self.folder / SINGLE).exists() else None

    def _unpickle(self, allowed: bool) -> dict[str, Stored]:
        there = [self.folder / name for name in PICKLES if (self.folder / name).exists()]
        if not there:
            raise UserError(
                f"{self.folder} holds no weights ({SINGLE}, or {INDEX} with its shards); take the whole folder"
            )
        if not allowed:
            raise UserError(
                f"{there[0]} is a pickle, which can run code when it is opened; take a safetensors copy, or add "
                "--allow-pickle True (it is then read with torch's weights_only)"
            )
        files = [there[0]]
        if there[0].suffix == ".json":
            listed = read_json(there[0], "index of the weights")
            names = set(listed.get("weight_map", {}).values()) if isinstance(listed, dict) else set()
            files = [self.folder / Path(str(name)).name for name in sorted(names)]
        for file in files:
            try:
                loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except FileNotFoundError as error:
                raise UserError(f"{file} does not exist; take the whole folder") from error
            except Exception as error:
                first = (str(error).splitlines() or [""])[0][:120]
                raise UserError(f"{file} cannot be read as weights alone ({first}); use another copy") from error
            if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
                raise UserError(f"{file} holds something else than named tensors; use another copy")
            self._pickled |= loaded
        kinds = {dtype: name for name, dtype in DTYPES.items()}
        return {
            name: Stored(there[0], tuple(tensor.shape), kinds.get(tensor.dtype, str(tensor.dtype)))
            for name, tensor in self._pickled.items()
        }

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, as it is stored."""
        if name in self._pickled:
            return self._pickled[name]
        return self.tensor(self.stored[name].file, name)

    def tensor(self, path: Path, name: str) -> Tensor:
        """The tensor called `name` of one safetensors file."""
        with reading(path):
            if self._open is None or self._open[0] != path:
                self.close()
                self._open = (path, safe_open(path, "pt"))
            tensor: Tensor = self._open[1].get_tensor(name)
            return tensor

    def close(self) -> None:
        """Let go of the file that is open."""
        self._open = None


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what goes wrong with a safetensors file into one line."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{str(path)[-120:]} does not exist; take the whole folder") from error
    except SafetensorError as error:
        raise UserError(f"{path} cannot be read ({error}); the file is cut off or damaged, take it anew") from error
    except OSError as error:
        raise UserError(f"{str(path)[-120:]} cannot be read ({error.strerror}); take the whole folder") from error


def _once(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a header, in which no name stands twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path} names {twice[:80]} twice; the file is damaged, take it anew")
    return found


def _header(path: Path) -> dict[str, Stored]:
    """What a safetensors file holds."""
    with reading(path):
        with safe_open(path, "pt"):
            pass  # checks that the file is whole
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            content = json.loads(file.read(size), object_pairs_hook=lambda pairs: _once(path, pairs))
    content.pop("__metadata__", None)
    return {name: Stored(path, tuple(entry["shape"]), entry["dtype"]) for name, entry in content.items()}


def shards(sizes: Sequence[tuple[str, int]], limit: int) -> list[list[str]]:
    """Names in order, as many per shard as fit into `limit` bytes (one at least).

    Args:
        sizes: (name, bytes) of every tensor.
        limit: bytes per shard.
    """
    found: list[list[str]] = [[]]
    room = limit
    for name, size in sizes:
        if found[-1] and size > room:
            found.append([])
            room = limit
        found[-1].append(name)
        room -= size
    return found


def write_tensors(
    folder: Path,
    tensors: Mapping[str, Callable[[], Tensor]],
    sizes: Sequence[tuple[str, int]],
    limit: int,
    done: Callable[[int], object] = lambda count: None,
) -> None:
    """Write tensors as the hub stores them; no more than one shard is in memory beside what the functions read from.

    Args:
        folder: exists; the files in it are written in place (the caller renames the folder).
        tensors: name → a function that makes it.
        sizes: (name, bytes), in the order they are written.
        limit: bytes per shard.
        done: told how many tensors a shard held when it is written.
    """
    groups = shards(sizes, limit)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(groups, 1):
        file = SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        try:
            save_file({name: tensors[name]() for name in names}, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise UserError(
                f"cannot write {folder / file} ({error}); free some space, or choose another place"
            ) from error
        weight_map |= dict.fromkeys(names, file)
        done(len(names))
    if len(groups) > 1:
        total = sum(size for _, size in sizes)
        write_json(
            folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        )
