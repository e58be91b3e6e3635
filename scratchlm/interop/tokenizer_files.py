"""The tokenizer's files beside a model of the hub, and the others that are taken along unread."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

from scratchlm.errors import UserError
from scratchlm.files import write_json
from scratchlm.tokenizer import Tokenizer

CARRIED = (
    *(
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    ),
    *("added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja"),
    *("chat_template.json", "LICENSE", "LICENSE.txt", "NOTICE"),
)
"""What an imported model keeps of its folder as it was, so that an export gives it back."""

READ_AS_TEXT = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model")
"""Of these, the ones that are a tokenizer by themselves."""

KEPT_IN = "huggingface"
"""The folder in ours where these files lie."""


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a folder of the hub; None where it has none, or (with a warning) one of a kind we do not read."""
    if not (folder / "tokenizer.json").exists() and not (folder / "merges.txt").exists():
        if (folder / "tokenizer.model").exists():
            warnings.warn(
                f"{folder / 'tokenizer.model'} is a SentencePiece tokenizer, which is not read here: the model is opened "
                "without a tokenizer",
                stacklevel=2,
            )
        return None
    try:
        return Tokenizer.load(folder)
    except UserError as error:
        warnings.warn(f"{error}: the model is opened without a tokenizer", stacklevel=2)
        return None


def write_tokenizer(
    tokenizer: Tokenizer, folder: Path, context_length: int, separator_id: int | None = None
) -> None:
    """Write tokenizer.json and what transformers wants to know beside it.

    Args:
        tokenizer: ours.
        folder: exists.
        context_length: of the model.
        separator_id: the special token between documents; None: the tokenizer's first.
    """
    tokenizer.save(folder / "tokenizer.json")
    names = {index: name for name, index in tokenizer.special_tokens.items()}
    end = names.get(-1 if separator_id is None else separator_id) or next(iter(tokenizer.special_tokens), None)
    said: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
    if end is not None:
        said |= {"bos_token": end, "eos_token": end}
    write_json(folder / "tokenizer_config.json", said)


def said_ids(original: dict[str, Any] | None) -> dict[str, Any]:
    """The special ids an imported model's config.json names."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: original[name] for name in names if name in original} if original else {}


def token_ids(tokenizer: Tokenizer | None, separator_id: int | None = None) -> dict[str, int | None]:
    """The special ids for config.json: the token between documents begins and ends a text, and none is padding (a family's default
    would be an id of another vocabulary, whose embedding then stays frozen)."""
    end: int | None = None
    if tokenizer is not None and tokenizer.special_tokens:
        end = next(iter(tokenizer.special_tokens.values())) if separator_id is None else separator_id
    return {"bos_token_id": end, "eos_token_id": end, "pad_token_id": None}


def carry(source: Path, target: Path) -> list[str]:
    """Copy the files of :data:`CARRIED` that are there; returns their names."""
    found = [name for name in CARRIED if (source / name).is_file()]
    if found:
        target.mkdir(parents=True, exist_ok=True)
    for name in found:
        shutil.copyfile(source / name, target / name)
    return found
