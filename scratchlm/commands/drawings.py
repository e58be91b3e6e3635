"""``scratchlm model draw``: an architecture in pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from scratchlm.arguments import parse
from scratchlm.commands.shared import say
from scratchlm.config import Recipe, load_recipe
from scratchlm.errors import UserError
from scratchlm.model import presets
from scratchlm.model.config import ModelConfig
from scratchlm.section import Section

USAGE = "scratchlm model draw PRESET|RECIPE.toml|RUN [--out FOLDER] [--model.field value …]"


class DrawArguments(Section):
    """Draw an architecture from its own modules: layers, block, masks, positions, costs, cache; of a run also its routers."""

    out: Path | None = Field(default=None, description="The drawings' folder; None: drawings/<name>.")
    length: int | None = Field(
        default=None,
        ge=1,
        le=8192,
        description="Positions in the pictures of masks and in FLOPs; None: what shows most.",
    )
    model: ModelConfig = ModelConfig()


def _known(what: str) -> tuple[str, Recipe, str, list[dict[str, Any]]]:
    """Name, recipe, source and metrics of what is to be drawn."""
    from scratchlm.tokenizer import Tokenizer
    from scratchlm.train.metrics import read_metrics

    path = Path(what)
    if path.is_dir():
        if not (path / "recipe.toml").exists():
            raise UserError(f"{path} is no run: it has no recipe.toml; name a run's folder, a recipe or a preset")
        recipe = load_recipe(path / "recipe.toml")
        if not recipe.model.vocab_size and (path / "tokenizer.json").exists():
            size = Tokenizer.load(path / "tokenizer.json").vocab_size
            recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"vocab_size": size})})
        metrics = path / "metrics.jsonl"
        records = read_metrics(metrics) if metrics.exists() else []
        return recipe.name, recipe, f"The run in {path}.", records
    if path.suffix == ".toml" or path.exists():
        recipe = load_recipe(path)
        return recipe.name, recipe, f"The recipe {path}.", []
    family = presets.family_of(what)
    return what, Recipe(model=presets.load(what)), f"{family.title} – {family.source.rstrip('.')}.", []


def draw(arguments: list[str]) -> None:
    """``scratchlm model draw WHAT``"""
    if not arguments:
        raise UserError(f"draw what? usage: {USAGE}")
    if arguments[0] in ("-h", "--help"):
        parse(DrawArguments, ["--help"], prog=USAGE)
    if arguments[0].startswith("-"):
        raise UserError(f"name what to draw first: {USAGE}")
    name, recipe, source, records = _known(arguments[0])
    options = parse(DrawArguments, arguments[1:], prog=USAGE, default=DrawArguments(model=recipe.model))
    vocabulary = recipe.tokenizer.vocab_size
    if options.model != recipe.model:
        source += " Drawn with changes."
    if not options.model.vocab_size:
        source += f" Its vocabulary is the tokenizer's; of {vocabulary:,} tokens here."
        options = options.model_copy(update={"model": options.model.model_copy(update={"vocab_size": vocabulary})})
    from scratchlm.model.draw.page import draw_model

    page = draw_model(
        options.model,
        name,
        Path("drawings") / name if options.out is None else options.out.expanduser(),
        source=source,
        length=options.length,
        records=records,
        show_progress=True,
    )
    say(f"{page}: open it in a browser; the pictures lie beside it")
