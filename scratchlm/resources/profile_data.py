"""What a profile trains on: the recipe's own shards if its run has made them, else random token ids."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scratchlm.config import Recipe, load_recipe
from scratchlm.data.loader import EpochLoader, RandomLoader
from scratchlm.data.tokens import TokenData, Tokens
from scratchlm.errors import UserError
from scratchlm.files import read_json
from scratchlm.tokenizer import Tokenizer

_SMALLEST = 1 << 20
"""Random ids, at least: windows are then gathered from more memory than the caches hold."""


@dataclass(frozen=True)
class Material:
    """Tokens to train on, how many ids the vocabulary has, and a sentence that says where they are from."""

    tokens: Tokens
    vocab_size: int
    own: bool
    source: str


def material(recipe: Recipe) -> Material:
    """Nothing is built: no corpus is read, no tokenizer trained.

    Raises:
        UserError: `model.vocab_size` is smaller than the vocabulary of the tokens.
    """
    found = _own(recipe)
    if isinstance(found, TokenData):
        size = found.manifest.vocab_size
        wanted = recipe.model.vocab_size or size
        if wanted < size:
            raise UserError(
                f"model.vocab_size = {wanted} is smaller than the tokenizer's {size}; leave it out to take the tokenizer's"
            )
        tokens = found.split("train")
        return Material(tokens, wanted, True, f"the recipe's own tokens ({len(tokens):,} in {found.folder})")
    size = recipe.model.vocab_size
    if not size and recipe.tokenizer.path is not None:
        size = Tokenizer.load(recipe.tokenizer.path).vocab_size
    size = size or recipe.tokenizer.vocab_size
    count = max(_SMALLEST, 4 * recipe.train.batch_size * (recipe.model.context_length + 1))
    ids = np.random.default_rng(recipe.seed).integers(size, size=count, dtype=np.uint32)
    tokens = Tokens([ids], separator_id=0, documents=0, bytes=0)
    return Material(tokens, size, False, f"random ids of a vocabulary of {size:,} ({found})")


def _own(recipe: Recipe) -> TokenData | str:
    """The shards that the recipe's run made; else why there are none."""
    folder = recipe.folder
    if not (folder / "recipe.toml").exists() or not (folder / "steps.json").exists():
        return f"{folder} has no data yet"
    saved = load_recipe(folder / "recipe.toml")
    elsewhere = {"workers": None, "cache": recipe.data.cache}
    same = (
        saved.corpus == recipe.corpus
        and saved.tokenizer == recipe.tokenizer
        and saved.data.model_copy(update=elsewhere) == recipe.data.model_copy(update=elsewhere)
    )
    if not same:
        return f"the data of {folder} are of another corpus or tokenizer"
    key = read_json(folder / "steps.json", "run file").get("data")
    if key is None:
        return f"{folder} has no data yet"
    try:
        return TokenData.open(recipe.cache / "data" / str(key))
    except UserError as error:
        return str(error)


def open_loader(recipe: Recipe, found: Material) -> EpochLoader | RandomLoader:
    """The recipe's loader over those tokens.

    Raises:
        UserError: they are fewer than one window.
    """
    kind = EpochLoader if recipe.train.loader == "epoch" else RandomLoader
    return kind(
        found.tokens,
        recipe.train.batch_size,
        recipe.model.context_length,
        recipe.seed,
        document_boundaries=recipe.train.document_boundaries,
    )
