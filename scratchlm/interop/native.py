"""Our own format: a folder of config.json, model.safetensors and tokenizer.json."""

from __future__ import annotations

import os
from pathlib import Path

from scratchlm.errors import UserError
from scratchlm.files import atomic_directory, read_json
from scratchlm.model.transformer import Transformer
from scratchlm.tokenizer import Tokenizer
from scratchlm.train.checkpoint import Checkpoint, checkpoint_at, load_weights, save_weights


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


def precision_of(checkpoint: str | os.PathLike[str]) -> str:
    """The precision a checkpoint was trained in; ``fp32`` where it does not say."""
    path = Path(checkpoint)
    return Checkpoint(path, 0).progress().precision if (path / "state.json").exists() else "fp32"


def load(folder: str | os.PathLike[str]) -> tuple[Transformer, Tokenizer | None]:
    """A trained model, in fp32 on the CPU, and its tokenizer if the folder has one.

    Args:
        folder: a run, a checkpoint, or what :func:`save` wrote.

    Raises:
        UserError: there is no checkpoint, it is damaged, or its tokenizer is not the one it was trained with.
    """
    checkpoint = best_checkpoint(folder)
    raw = read_json(checkpoint.path / "config.json", "model config")
    if "model_type" in raw:
        raise UserError(
            f"{checkpoint.path} is a Hugging Face folder; this version reads scratchlm's own checkpoints only"
        )
    model = Transformer(checkpoint.config())
    load_weights(model, checkpoint)
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
) -> None:
    """Write a model as a folder that :func:`load` reads.

    Args:
        model: any Transformer.
        folder: new or empty.
        family: ``auto`` or ``scratchlm``: our own format, the only one this version writes.
        tokenizer: saved beside the model.

    Raises:
        UserError: another family is asked for, or the folder holds something.
    """
    if family not in ("auto", "scratchlm"):
        raise UserError(f"family = {family!r} is unknown; this version writes: scratchlm")
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not an empty folder; choose another one")
    with atomic_directory(target) as temporary:
        save_weights(model, temporary, tokenizer)
