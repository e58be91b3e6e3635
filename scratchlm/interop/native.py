"""Opening and writing models: our own folders, and those of the hub."""

from __future__ import annotations

import functools
import os
import shutil
from pathlib import Path
from typing import Any

from scratchlm.errors import UserError
from scratchlm.files import atomic_directory, expanded, new_folder, read_json, write_json, write_text
from scratchlm.interop.choose import Fit, choose, repair
from scratchlm.interop.family import Family, families
from scratchlm.interop.hollow_model import hollow_model, install
from scratchlm.interop.huggingface import (
    DTYPE_NAMES,
    SHARD_BYTES,
    Opened,
    in_dtype,
    is_folder,
    open_folder,
    write_own_weights,
    write_weights,
)
from scratchlm.interop.tensor_files import DTYPES, TensorFiles
from scratchlm.interop.tokenizer_files import (
    KEPT_IN,
    READ_AS_TEXT,
    carry,
    read_tokenizer,
    said_ids,
    token_ids,
    write_tokenizer,
)
from scratchlm.interop.weights import stored
from scratchlm.model.card import card
from scratchlm.model.config import ModelConfig
from scratchlm.model.transformer import Transformer
from scratchlm.section import validate
from scratchlm.tokenizer import Tokenizer
from scratchlm.train.checkpoint import Checkpoint, check_weights, checkpoint_at, save_weights

OWN, STANDALONE = "scratchlm", "standalone"

STANDALONE_FAMILY = Family(OWN, "ScratchLMForCausalLM", "a standalone export of ScratchLM", config=(), weights=())
"""What :func:`open_any` says of a folder that ``--family standalone`` wrote."""


def best_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint a user means by `folder`: of a run the one with the lowest validation loss, if it is kept.

    Raises:
        UserError: there is none.
    """
    folder = expanded(folder)
    newest = checkpoint_at(folder)
    if newest.path == folder or not (newest.path / "state.json").exists():
        return newest
    best = newest.progress().best_step
    path = newest.path.with_name(f"step-{best:08d}") if best is not None else newest.path
    return Checkpoint(path, best) if best is not None and path.is_dir() else newest


def precision_of(folder: str | os.PathLike[str]) -> str:
    """The precision of a run's or checkpoint's training; ``fp32`` where it does not say (imported models)."""
    if is_folder(expanded(folder)):
        return "fp32"
    path = best_checkpoint(folder).path
    return Checkpoint(path, 0).progress().precision if (path / "state.json").exists() else "fp32"


def load(folder: str | os.PathLike[str]) -> tuple[Transformer, Tokenizer | None]:
    """A trained model on the CPU, its weights in the dtype they are stored in, and its tokenizer if the folder has one.

    Args:
        folder: a run, a checkpoint, what :func:`save` wrote, or a folder of the hub.

    Raises:
        UserError: there is no model, it is damaged, of an unknown family, or its tokenizer is not the one it was trained with.
    """
    folder = expanded(folder)
    if is_folder(folder):
        model, tokenizer = open_any(folder).model, read_tokenizer(folder)
        if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
            raise UserError(
                f"{folder}: its tokenizer has {tokenizer.vocab_size:,} tokens, its model {model.config.vocab_size:,}; the "
                "tokenizer is that of another model"
            )
        return model, tokenizer
    checkpoint = best_checkpoint(folder)
    config = checkpoint.config()
    model = hollow_model(config)
    weights = checkpoint.weights()
    check_weights(model, weights, checkpoint.path)
    install(model, weights)
    path = checkpoint.path / "tokenizer.json"
    tokenizer = Tokenizer.load(path) if path.exists() else None
    if tokenizer is not None:
        trained_with = checkpoint.tokenizer_hash()
        if trained_with not in (None, tokenizer.content_hash) or tokenizer.vocab_size > model.config.vocab_size:
            raise UserError(
                f"{path} does not belong to this checkpoint: the model was trained with another tokenizer; "
                "put the right file back"
            )
    return model.eval(), tokenizer


def open_any(
    folder: Path, *, dtype: str = "keep", allow_pickle: bool = False, show_progress: bool = False
) -> Opened:
    """A folder of the hub, or one that ``--family standalone`` wrote; arguments as for
    :func:`~scratchlm.interop.huggingface.open_folder`.

    Raises:
        UserError: as :func:`~scratchlm.interop.huggingface.open_folder`; the tensors are those of another architecture.
    """
    check_dtype(dtype)
    path = folder / "config.json"
    values = read_json(path, "model config")
    if not isinstance(values, dict) or values.get("model_type") != OWN or "architecture" not in values:
        return open_folder(folder, dtype=dtype, allow_pickle=allow_pickle, show_progress=show_progress)
    if not isinstance(values["architecture"], dict):
        raise UserError(f"{path}: architecture is no JSON object; take the file anew")
    model = hollow_model(validate(ModelConfig, values["architecture"], f"{path}: architecture"))
    files = TensorFiles(folder)
    for name, found in files.stored.items():
        if found.dtype not in DTYPES:
            raise UserError(
                f"{found.file}: {name} is stored as {found.dtype}, which no export writes; take it anew"
            )
    weights = {name: (tensor := files.read(name)).to(in_dtype(name, tensor.dtype, dtype)) for name in files.stored}
    files.close()
    check_weights(model, weights, folder)
    install(model, weights)
    return Opened(model.eval(), STANDALONE_FAMILY, values, ())


def check_dtype(dtype: str) -> None:
    """Raises:
    UserError: it is no name of a kind of numbers.
    """
    if dtype not in ("keep", *DTYPE_NAMES):
        raise UserError(f"dtype = {dtype!r} is unknown; known are keep, {', '.join(DTYPE_NAMES)}")


def save(
    model: Transformer,
    folder: str | os.PathLike[str],
    family: str = "auto",
    tokenizer: Tokenizer | None = None,
    *,
    dtype: str = "keep",
    shard_bytes: int | None = None,
    separator_id: int | None = None,
    origin: str | os.PathLike[str] | None = None,
    show_progress: bool = False,
) -> str:
    """Write a model as a folder that :func:`load` reads, and that transformers reads unless `family` is ``scratchlm``.

    Args:
        model: any Transformer.
        folder: new or empty.
        family: a ``model_type`` of the hub; ``auto``: the first that computes exactly what the model does; ``standalone``: for
            transformers, with code of its own beside it (trust_remote_code); ``scratchlm``: our own format.
        tokenizer: saved beside the model.
        dtype: of the weights: ``keep``, ``fp32``, ``bf16``, ``fp16``, ``fp64``.
        shard_bytes: the largest size of a file of weights; None: 5 GB.
        separator_id: the token between documents, which transformers calls bos and eos; None: the tokenizer's first special.
        origin: a folder with the files an imported model came with: ``auto`` asks its family first, its tokenizer's files and
            special ids are given back, and in the same family everything else that its config.json says.
        show_progress: show a bar.

    Returns:
        the family that was written.

    Raises:
        UserError: no family (or not the named one) computes the same function: the field is named; the folder holds
            something; the tokenizer has more tokens than the model; no such dtype, or no room in a shard.
    """
    target = new_folder(folder)
    check_dtype(dtype)
    if shard_bytes is not None and shard_bytes < 1:
        raise UserError(f"shard_bytes = {shard_bytes} leaves no room for a tensor; give at least 1")
    if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens, the model {model.config.vocab_size:,}; the tokenizer is that "
            "of another model"
        )
    size = SHARD_BYTES if shard_bytes is None else shard_bytes
    options = {"dtype": dtype, "shard_bytes": size, "show_progress": show_progress}
    if family == OWN:
        names = {} if tokenizer is None else {index: name for name, index in tokenizer.special_tokens.items()}
        separator = None if separator_id is None else names.get(separator_id)
        with atomic_directory(target) as temporary:
            save_weights(model if dtype == "keep" else _cast(model, dtype), temporary, tokenizer, separator)
            if origin is not None:
                carry(Path(origin), temporary / KEPT_IN)
        return OWN
    if family == STANDALONE:
        with atomic_directory(target) as temporary:
            _write_standalone(model, temporary, tokenizer, separator_id, origin, options)
        return STANDALONE
    found = choose(model.config, family, _family_named(_original(origin)))
    with atomic_directory(target) as temporary:
        _write_family(model, found, temporary, tokenizer, separator_id, origin, options)
    return found.family.model_type


def _cast(model: Transformer, dtype: str) -> Transformer:
    """A copy of the model in another dtype; what the model keeps in fp32 (a router's correction) is kept."""
    cast = hollow_model(model.config)
    install(
        cast,
        {name: tensor.detach().to(in_dtype(name, tensor.dtype, dtype)) for name, tensor in stored(model).items()},
    )
    return cast


def _write_family(
    model: Transformer,
    found: Fit,
    folder: Path,
    tokenizer: Tokenizer | None,
    separator_id: int | None,
    origin: str | os.PathLike[str] | None,
    options: dict[str, Any],
) -> None:
    adapt = functools.partial(repair, config=model.config) if found.repaired else None
    write_weights(model, found.family, folder, adapt=adapt, **options)
    original = _original(origin)
    same = original is not None and _family_named(original) == found.family
    ids = {} if same else token_ids(tokenizer, separator_id)  # what it does not say is then its family's default
    values = {**ids, **_dtype_named(model, options["dtype"]), **found.values, **said_ids(original)}
    if original is not None and same:
        values |= found.family.harmless(original)
    _give_tokenizer(model, folder, tokenizer, separator_id, origin)
    write_json(folder / "config.json", dict(sorted(values.items())))
    write_text(folder / "README.md", card(model, tokenizer, family=found.family.model_type))


def _original(origin: str | os.PathLike[str] | None) -> dict[str, Any] | None:
    """The config.json an imported model came with."""
    if origin is None or not (path := Path(origin) / "config.json").exists():
        return None
    values = read_json(path, "model config")
    return values if isinstance(values, dict) else None


def _family_named(original: dict[str, Any] | None) -> Family | None:
    """The family of a config.json, if it is a known one."""
    said = None if original is None else original.get("model_type")
    known = (family for family in families().values() if said == family.model_type or said in family.alias)
    return next(known, None)


def _give_tokenizer(
    model: Transformer,
    folder: Path,
    tokenizer: Tokenizer | None,
    separator_id: int | None,
    origin: str | os.PathLike[str] | None,
) -> None:
    """The tokenizer's files: those an imported model came with, else ours. Its config.json, too, is to be overwritten."""
    given = [] if origin is None else carry(Path(origin), folder)
    if tokenizer is not None and not set(given) & set(READ_AS_TEXT):
        write_tokenizer(tokenizer, folder, model.config.context_length, separator_id)


def _dtype_named(model: Transformer, dtype: str) -> dict[str, str]:
    """``torch_dtype`` for config.json: that of most weights."""
    kind = model.embedding.weight.dtype if dtype == "keep" else DTYPE_NAMES[dtype]
    return {"torch_dtype": str(kind).removeprefix("torch.")}


def _write_standalone(
    model: Transformer,
    folder: Path,
    tokenizer: Tokenizer | None,
    separator_id: int | None,
    origin: str | os.PathLike[str] | None,
    options: dict[str, Any],
) -> None:
    config = model.config
    write_own_weights(model, folder, **options)
    for source in sorted((Path(__file__).parent / STANDALONE).glob("*_scratchlm.py")):
        shutil.copyfile(source, folder / source.name)
    values = {
        "model_type": "scratchlm",
        "architectures": ["ScratchLMForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_scratchlm.ScratchLMConfig",
            "AutoModelForCausalLM": "modeling_scratchlm.ScratchLMForCausalLM",
        },
        "architecture": config.model_dump(mode="json"),
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "max_position_embeddings": config.context_length,
        "tie_word_embeddings": config.tied_embeddings,
        **token_ids(tokenizer, separator_id),
        **said_ids(_original(origin)),
        **_dtype_named(model, options["dtype"]),
    }
    _give_tokenizer(model, folder, tokenizer, separator_id, origin)
    write_json(folder / "config.json", values)
    write_text(folder / "README.md", card(model, tokenizer, family=STANDALONE))
