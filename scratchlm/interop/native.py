"""Opening and writing models: our own folders, and those of the hub."""

from __future__ import annotations

import functools
import os
import shutil
from pathlib import Path
from typing import Any

from scratchlm.errors import UserError
from scratchlm.files import atomic_directory, read_json, write_json, write_text
from scratchlm.interop.choose import Fit, choose, repair
from scratchlm.interop.hollow_model import hollow_model, install
from scratchlm.interop.huggingface import (
    DTYPE_NAMES,
    SHARD_BYTES,
    is_folder,
    open_folder,
    write_own_weights,
    write_weights,
)
from scratchlm.interop.tokenizer_files import KEPT_IN, carry, read_tokenizer, token_ids, write_tokenizer
from scratchlm.interop.weights import stored
from scratchlm.model.card import card
from scratchlm.model.transformer import Transformer
from scratchlm.tokenizer import Tokenizer
from scratchlm.train.checkpoint import Checkpoint, check_weights, checkpoint_at, save_weights

OWN, STANDALONE = "scratchlm", "standalone"


def best_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint a user means by `folder`: of a run the one with the lowest validation loss, if it is kept.

    Raises:
        UserError: there is none.
    """
    newest = checkpoint_at(Path(folder))
    if newest.path == Path(folder) or not (newest.path / "state.json").exists():
        return newest
    best = newest.progress().best_step
    path = newest.path.with_name(f"step-{best:08d}") if best is not None else newest.path
    return Checkpoint(path, best) if best is not None and path.is_dir() else newest


def precision_of(folder: str | os.PathLike[str]) -> str:
    """The precision of a run's or checkpoint's training; ``fp32`` where it does not say (imported models)."""
    if is_folder(Path(folder)):
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
    if is_folder(Path(folder)):
        model, tokenizer = open_folder(Path(folder)).model, read_tokenizer(Path(folder))
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
        dtype: of the weights: ``keep``, ``fp32``, ``bf16``, ``fp16``.
        shard_bytes: the largest size of a file of weights; None: 5 GB.
        separator_id: the token between documents, which transformers calls bos and eos; None: the tokenizer's first special.
        origin: a folder with the files an imported model came with; those of the same family are given back.
        show_progress: show a bar.

    Returns:
        the family that was written.

    Raises:
        UserError: no family (or not the named one) computes the same function: the field is named; or the folder holds
            something.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not an empty folder; choose another one")
    options = {"dtype": dtype, "shard_bytes": shard_bytes or SHARD_BYTES, "show_progress": show_progress}
    if family == OWN:
        with atomic_directory(target) as temporary:
            save_weights(model if dtype == "keep" else _cast(model, dtype), temporary, tokenizer)
            if origin is not None:
                carry(Path(origin), temporary / KEPT_IN)
        return OWN
    if family == STANDALONE:
        with atomic_directory(target) as temporary:
            _write_standalone(model, temporary, tokenizer, separator_id, options)
        return STANDALONE
    found = choose(model.config, family)
    with atomic_directory(target) as temporary:
        _write_family(model, found, temporary, tokenizer, separator_id, origin, options)
    return found.family.model_type


def _cast(model: Transformer, dtype: str) -> Transformer:
    """A copy of the model in another dtype; what the model keeps in fp32 (a router's correction) is kept."""
    cast = hollow_model(model.config)
    install(cast, {name: tensor.detach().to(DTYPE_NAMES[dtype]) for name, tensor in stored(model).items()})
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
    original = _original(origin, found.family.model_type)
    values = {**token_ids(tokenizer, separator_id), **_dtype_named(model, options["dtype"]), **found.values}
    if original is not None and origin is not None:
        kept = found.family.harmless(original)
        values = {**values, **kept}
        carry(Path(origin), folder)
    elif tokenizer is not None:
        write_tokenizer(tokenizer, folder, model.config.context_length, separator_id)
    write_json(folder / "config.json", dict(sorted(values.items())))
    write_text(folder / "README.md", card(model, tokenizer, family=found.family.model_type))


def _original(origin: str | os.PathLike[str] | None, model_type: str) -> dict[str, Any] | None:
    """The config.json an imported model came with, if it was of this family."""
    if origin is None or not (path := Path(origin) / "config.json").exists():
        return None
    values = read_json(path, "model config")
    same = isinstance(values, dict) and values.get("model_type") == model_type
    return values if same else None


def _dtype_named(model: Transformer, dtype: str) -> dict[str, str]:
    """``torch_dtype`` for config.json: that of most weights."""
    kind = model.embedding.weight.dtype if dtype == "keep" else DTYPE_NAMES[dtype]
    return {"torch_dtype": str(kind).removeprefix("torch.")}


def _write_standalone(
    model: Transformer,
    folder: Path,
    tokenizer: Tokenizer | None,
    separator_id: int | None,
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
        **_dtype_named(model, options["dtype"]),
    }
    if tokenizer is not None:
        write_tokenizer(tokenizer, folder, config.context_length, separator_id)
    write_json(folder / "config.json", values)
    write_text(folder / "README.md", card(model, tokenizer, family=STANDALONE))
