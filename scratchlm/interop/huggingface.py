"""Folders of the hub: config.json, weights, tokenizer files, in and out, without transformers."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scratchlm.errors import UserError
from scratchlm.files import read_json
from scratchlm.interop.family import Family, family_of
from scratchlm.interop.hollow_model import hollow_model, install
from scratchlm.interop.mxfp4 import Mxfp4Files
from scratchlm.interop.tensor_files import DTYPES, TensorFiles, write_tensors
from scratchlm.interop.weights import Place, Uncovered, places, places_of, stored
from scratchlm.model.config import ModelConfig
from scratchlm.model.transformer import Transformer
from scratchlm.progress import progress

DTYPE_NAMES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
"""What a user may ask for."""

SHARD_BYTES = 5_000_000_000


def in_dtype(name: str, stored_as: torch.dtype, asked: str) -> torch.dtype:
    """The dtype one of our tensors gets: what is asked for, or its own (``keep``); a router's correction, whose steps are finer
    than bf16, keeps its own always."""
    own = asked == "keep" or name.endswith("router.correction")
    return stored_as if own else DTYPE_NAMES[asked]


BEYOND = 8
"""How many modules of multi-token prediction a file may have, which stand there as further layers."""


@dataclass(frozen=True)
class Opened:
    """A folder's model.

    Attributes:
        model: with the folder's weights, in eval mode, on the CPU.
        family: which family it is.
        values: its config.json.
        left_out: tensors of the folder that are no part of the model (known to hold nothing it computes with).
    """

    model: Transformer
    family: Family
    values: dict[str, Any]
    left_out: tuple[str, ...]


def is_folder(folder: Path) -> bool:
    """Whether `folder` is one of the hub's: its config.json names a ``model_type``."""
    path = folder / "config.json"
    values = read_json(path, "model config") if path.is_file() else None
    return isinstance(values, dict) and "model_type" in values


def read_config(folder: Path) -> tuple[Family, dict[str, Any], ModelConfig]:
    """The family of a folder, its config.json, and our configuration.

    Raises:
        UserError: an unknown family, or an option that no field expresses; it is named.
    """
    path = folder / "config.json"
    values = read_json(path, "model config")
    if not isinstance(values, dict):
        raise UserError(f"{path} is no JSON object; take the file anew")
    family = family_of(values.get("model_type"), str(path))
    return family, values, family.read(values, str(path))


def open_folder(
    folder: Path, *, dtype: str = "keep", allow_pickle: bool = False, show_progress: bool = False
) -> Opened:
    """Read a folder of the hub, tensor by tensor: beside the model at most one tensor is in memory.

    Args:
        folder: with config.json and weights.
        dtype: of the model's weights; ``keep``: as they are stored.
        allow_pickle: see :class:`~scratchlm.interop.tensor_files.TensorFiles`.
        show_progress: show a bar.

    Raises:
        UserError: see :func:`read_config`; tensors that are missing, too many (both are listed) or of another shape (both
            shapes are named), or files that are damaged.
    """
    family, values, config = read_config(folder)
    packed = family.quantisation(values, str(folder / "config.json"))
    files = Mxfp4Files(folder, allow_pickle) if packed == "mxfp4" else TensorFiles(folder, allow_pickle)
    names = _names(files, family)
    model = hollow_model(config)
    try:
        wanted = places(model, family.weights)
    except Uncovered as error:
        raise UserError(
            f"{folder / 'config.json'} asks for a model that family {family.model_type} does not have ({error})"
        ) from error
    if config.tied_embeddings:
        wanted = [place for place in wanted if place.theirs != family.head]
    left_out = _check(folder, family, files, names, wanted, config)
    kinds = {place.theirs: DTYPES[files.stored[names[place.theirs]].dtype] for place in wanted}
    asked = {place.theirs: in_dtype(place.ours, kinds[place.theirs], dtype) for place in wanted}
    _allocate(model, wanted, asked)
    own = stored(model)
    order = sorted(wanted, key=lambda place: str(files.stored[names[place.theirs]].file))
    with torch.no_grad():
        for place in progress(order, description="read", unit="tensor", show=show_progress):
            place.put(files.read(names[place.theirs]), own[place.ours])
    if config.tied_embeddings and family.head in names:
        _check_tied(folder, family, files, names, own["embedding.weight"])
    files.close()
    return Opened(model.eval(), family, values, left_out)


def _names(files: TensorFiles, family: Family) -> dict[str, str]:
    """The family's name of each tensor → its name in the files, where some leave a prefix out."""
    found: dict[str, str] = {}
    for name in files.stored:
        whole = name
        if family.prefix and not name.startswith(family.prefix) and not name.startswith(family.head.split(".")[0]):
            whole = family.prefix + name
        if whole in found:
            raise UserError(
                f"{files.folder} holds both {found[whole]} and {name}, which are one tensor; take the folder anew"
            )
        found[whole] = name
    return found


def _some(names: Iterable[str], limit: int = 5) -> str:
    names = sorted(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _check(
    folder: Path,
    family: Family,
    files: TensorFiles,
    names: Mapping[str, str],
    wanted: list[Place],
    config: ModelConfig,
) -> tuple[str, ...]:
    """Compare what the files hold with what the model needs; returns what is left out."""
    needed = {place.theirs: place for place in wanted}
    if missing := needed.keys() - names.keys():
        raise UserError(
            f"{folder} lacks {len(missing)} of the model's tensors: {_some(missing)}; take the whole folder"
        )
    beyond = "|".join(str(layer) for layer in range(config.layers, config.layers + BEYOND))
    ignored = [pattern.replace("{beyond}", f"(?:{beyond})") for pattern in family.ignored]
    known = [re.compile(pattern) for pattern in (*ignored, r".*rotary_emb\.inv_freq")]
    spare = names.keys() - needed.keys()
    if config.tied_embeddings:
        spare -= {family.head}
    left_out = {name for name in spare if any(pattern.fullmatch(name) for pattern in known)}
    if extra := spare - left_out:
        raise UserError(
            f"{folder} holds {len(extra)} tensors that a model of its config.json does not have: {_some(extra)}; "
            "the config.json is that of another model"
        )
    for name, place in needed.items():
        found = files.stored[names[name]]
        if found.shape != place.shape:
            raise UserError(
                f"{found.file}: {name} has the shape {list(found.shape)}, config.json asks for {list(place.shape)}"
            )
        if found.dtype not in DTYPES:
            raise UserError(
                f"{found.file}: {name} is stored as {found.dtype}; quantised weights are not supported, take a copy in bf16, "
                "fp16 or fp32"
            )
    return tuple(sorted(left_out))


def _check_tied(
    folder: Path, family: Family, files: TensorFiles, names: Mapping[str, str], embedding: Tensor
) -> None:
    head = files.read(names[family.head])
    if not head.to(embedding.dtype).equal(embedding):
        raise UserError(
            f"{folder}: config.json ties the head to the embedding, but {family.head} is there and differs; set "
            "tie_word_embeddings to false in config.json if the head is meant"
        )


def _allocate(model: Transformer, wanted: list[Place], kinds: Mapping[str, torch.dtype]) -> None:
    """Give every tensor of a model on the meta device memory, in the widest dtype of what goes into it."""
    dtypes: dict[str, torch.dtype] = {}
    for place in wanted:
        given = kinds[place.theirs]
        dtypes[place.ours] = torch.promote_types(dtypes.get(place.ours, given), given)
    install(
        model,
        {
            name: torch.empty(tensor.shape, dtype=dtypes[name], device="cpu")
            for name, tensor in stored(model).items()
        },
    )


def write_weights(
    model: Transformer,
    family: Family,
    folder: Path,
    *,
    dtype: str = "keep",
    shard_bytes: int = SHARD_BYTES,
    show_progress: bool = False,
    adapt: Callable[[str, Tensor], Tensor] | None = None,
) -> None:
    """Write a model's weights under a family's names into `folder`, shard by shard.

    Args:
        model: of a configuration that the family expresses.
        family: whose names and layouts.
        folder: exists.
        dtype: to write; ``keep``: each tensor as it is.
        shard_bytes: a file's largest size.
        show_progress: show a bar.
        adapt: changes one of our tensors, given by name, before it is written.
    """
    own = {name: tensor.detach() for name, tensor in stored(model).items()}
    change = (lambda name, tensor: tensor) if adapt is None else adapt
    wanted = places_of(model, family.weights)
    if model.config.tied_embeddings:
        wanted = [place for place in wanted if place.theirs != family.head]
    kinds = {place.theirs: in_dtype(place.ours, own[place.ours].dtype, dtype) for place in wanted}

    def make(place: Place) -> Tensor:
        return place.take(change(place.ours, own[place.ours])).to("cpu", kinds[place.theirs]).contiguous()

    sizes = [
        (place.theirs, int(torch.Size(place.shape).numel()) * kinds[place.theirs].itemsize) for place in wanted
    ]
    with progress(description="write", total=len(wanted), unit="tensor", show=show_progress) as bar:
        tensors = {place.theirs: functools.partial(make, place) for place in wanted}
        write_tensors(folder, tensors, sizes, shard_bytes, bar.update)


def write_own_weights(
    model: Transformer,
    folder: Path,
    *,
    dtype: str = "keep",
    shard_bytes: int = SHARD_BYTES,
    show_progress: bool = False,
) -> None:
    """Write a model's weights under our own names into `folder`; arguments as :func:`write_weights`."""
    own = {name: tensor.detach() for name, tensor in stored(model).items()}
    kinds = {name: in_dtype(name, tensor.dtype, dtype) for name, tensor in own.items()}

    def maker(name: str) -> Callable[[], Tensor]:
        return lambda: own[name].to("cpu", kinds[name]).contiguous()

    sizes = [(name, tensor.numel() * kinds[name].itemsize) for name, tensor in own.items()]
    with progress(description="write", total=len(own), unit="tensor", show=show_progress) as bar:
        write_tensors(folder, {name: maker(name) for name in own}, sizes, shard_bytes, bar.update)
