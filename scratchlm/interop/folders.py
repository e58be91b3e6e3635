"""Whole folders: a model of the hub becomes one of ours, and the other way round."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import tomli_w

from scratchlm.errors import UserError
from scratchlm.files import atomic_directory, expanded, new_folder, read_json, write_text
from scratchlm.interop.canonical import differences
from scratchlm.interop.huggingface import Opened, is_folder
from scratchlm.interop.native import best_checkpoint, check_dtype, load, open_any, save
from scratchlm.interop.tokenizer_files import KEPT_IN, carry, read_tokenizer
from scratchlm.interop.weights import stored
from scratchlm.model import presets
from scratchlm.model.transformer import Transformer
from scratchlm.tokenizer import Tokenizer
from scratchlm.train.checkpoint import Checkpoint, save_weights


def import_folder(
    source: Path, out: Path, *, dtype: str = "keep", allow_pickle: bool = False, show_progress: bool = False
) -> Opened:
    """Read a folder of the hub and write it as one of ours, with its own files kept beside, and a recipe to train it further.

    Args:
        source: with config.json and weights.
        out: new or empty.
        dtype: of the weights: ``keep``, ``fp32``, ``bf16``, ``fp16``.
        allow_pickle: read ``pytorch_model.bin`` where there is nothing else.
        show_progress: show a bar.

    Raises:
        UserError: see :func:`~scratchlm.interop.huggingface.open_folder`; `source` is one of ours; `out` holds something.
    """
    source, out = expanded(source), new_folder(out)
    check_dtype(dtype)
    if not (source / "config.json").is_file():
        raise UserError(f"{source} has no config.json, which says what model it is; take the whole folder")
    values = read_json(source / "config.json", "model config")
    if not isinstance(values, dict) or values.get("model_type") is None:
        ours = isinstance(values, dict) and "d_model" in values
        raise UserError(
            f"{source / 'config.json'} names no model_type: it is no model of the Hub"
            + ("; it is one of ours, which needs no import" if ours else "; take the whole folder")
        )
    opened = open_any(source, dtype=dtype, allow_pickle=allow_pickle, show_progress=show_progress)
    tokenizer = read_tokenizer(source)
    if tokenizer is not None and tokenizer.vocab_size > opened.model.config.vocab_size:
        warnings.warn(
            f"{source}: its tokenizer has {tokenizer.vocab_size:,} tokens, its model {opened.model.config.vocab_size:,}; the "
            f"model is imported without a tokenizer, whose files are kept in {out / KEPT_IN}",
            stacklevel=2,
        )
        tokenizer = None
    with atomic_directory(out) as temporary:
        save_weights(opened.model, temporary, tokenizer)
        carry(source, temporary / KEPT_IN)
        write_text(temporary / "recipe.toml", _recipe(opened.model, source, out, tokenizer))
    return opened


def _recipe(model: Transformer, folder: Path, out: Path, tokenizer: Tokenizer | None) -> str:
    """A recipe that goes on training: the model as it is, its tokenizer, its weights to start from.

    Args:
        model: the imported model.
        folder: the one it was read from.
        out: where they will be.
        tokenizer: the one that came with it.
    """
    values: dict[str, Any] = {"train": {"start_from": str(out)}, "optim": {"lr": 1e-5}}
    if tokenizer is not None:
        ends = end_tokens(folder, tokenizer)
        given: dict[str, Any] = {"path": str(out / "tokenizer.json")}
        values = {
            "tokenizer": given | ({"special_tokens": ends} if ends else {}),
            **values,
            "generate": {"stop": ends},
        }
    head = (
        "# Trains this model further: `scratchlm run recipe.toml --corpus.kind text --corpus.paths 'notes/*.txt'`. Name several\n"
        "# files: some are held out for validation. The embedded corpus is used where none is named. A shorter\n"
        "# model.context_length costs less memory and time.\n\n"
    )
    return head + tomli_w.dumps(values) + "\n" + presets.to_toml(model.config)


def export_folder(
    source: Path,
    out: Path,
    *,
    family: str = "auto",
    dtype: str = "keep",
    shard_bytes: int | None = None,
    show_progress: bool = False,
) -> str:
    """Write a trained or imported model as a folder of the hub; returns the family.

    Args:
        source: a run, a checkpoint, an imported model.
        out: new or empty.
        family, dtype, shard_bytes: as for :func:`~scratchlm.interop.native.save`.
        show_progress: show a bar.

    Raises:
        UserError: see :func:`~scratchlm.interop.native.load` and :func:`~scratchlm.interop.native.save`.
    """
    source = expanded(source)
    model, tokenizer = load(source)
    origin = source if is_folder(source) else best_checkpoint(source).path / KEPT_IN
    return save(
        model,
        out,
        family=family,
        tokenizer=tokenizer,
        dtype=dtype,
        shard_bytes=shard_bytes,
        separator_id=separator_of(source, tokenizer),
        origin=origin if origin.is_dir() else None,
        show_progress=show_progress,
    )


def end_tokens(folder: Path, tokenizer: Tokenizer) -> list[str]:
    """The special tokens that end a text, as the folder of an imported or exported model says; empty where it says none.

    A file that cannot be read says nothing, with a warning.
    """
    names = {index: name for name, index in tokenizer.special_tokens.items()}
    for place in (folder / KEPT_IN, folder):
        for path in (place / "generation_config.json", place / "config.json"):
            try:
                values = read_json(path) if path.is_file() else {}
            except UserError as error:
                warnings.warn(f"{error}: it is ignored", stacklevel=2)
                continue
            said = values.get("eos_token_id") if isinstance(values, dict) else None
            ids = said if isinstance(said, list) else [said]
            if found := [names[index] for index in ids if type(index) is int and index in names]:
                return found
    separator = _separator_saved(folder)
    return [separator] if separator in tokenizer.special_tokens else []


def _separator_saved(folder: Path) -> str | None:
    """The separator that one of our own exports names."""
    own = (folder / "model.safetensors").is_file() and not is_folder(folder)
    return Checkpoint(folder, 0).separator() if own else None


def run_of(folder: Path) -> Path | None:
    """The run that a folder is or lies in: its `checkpoints`, one of these, or an average of weights in it or in one of them; None: in none."""
    folder = folder.resolve()
    for place in (folder, *folder.parents[:3]):
        inside = folder.relative_to(place).parts[:1]
        if inside not in ((), ("checkpoints",), ("ema",)):  # a model that was put there, say
            continue
        if (place / "recipe.toml").exists() and (place / "checkpoints").is_dir():
            return place
    return None


def separator_of(folder: Path, tokenizer: Tokenizer | None) -> int | None:
    """The id between documents of a run (its recipe says it) or of an imported or exported model; None: unknown."""
    if tokenizer is None or not tokenizer.special_tokens:
        return None
    folder = expanded(folder)
    if (run := run_of(folder)) is not None:
        from scratchlm.config import load_recipe
        from scratchlm.pipeline import separator_id

        return separator_id(tokenizer, load_recipe(run / "recipe.toml"))
    if (separator := _separator_saved(folder)) in tokenizer.special_tokens:
        return tokenizer.special_tokens[str(separator)]
    ends = end_tokens(folder, tokenizer)
    return tokenizer.special_tokens[ends[0]] if ends else None


def start_from(model: Transformer, folder: str | os.PathLike[str], tokenizer: Tokenizer | None = None) -> None:
    """Copy the weights of a saved model into one that is to be trained.

    Args:
        model: of the same function; only its context may be shorter or longer, unless it learns positions.
        folder: whatever :func:`~scratchlm.interop.native.load` takes.
        tokenizer: the run's; it must be the saved model's.

    Raises:
        UserError: the models differ (the field is named), or their tokenizers do.
    """
    other, its_tokenizer = load(folder)
    both = (tokenizer, its_tokenizer)
    if both[0] is not None and both[1] is not None and both[0].content_hash != both[1].content_hash:
        raise UserError(
            f"train.start_from = {folder} was trained with another tokenizer; set tokenizer.path to its tokenizer.json"
        )
    unlike = differences(other.config, model.config)
    if "learned" not in model.config.position:
        unlike = [name for name in unlike if name != "context_length"]
    if unlike:
        raise UserError(
            f"train.start_from = {folder} holds a model that differs in {', '.join(unlike)}; give the recipe the [model] of "
            "its config.json"
        )
    given = stored(other)
    for name, tensor in stored(model).items():
        tensor.detach().copy_(given[name])
