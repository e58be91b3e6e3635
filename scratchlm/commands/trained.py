"""``scratchlm evaluate`` and ``generate``: what can be done with a trained model."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from scratchlm.allocator import keep_freed_memory
from scratchlm.arguments import parse
from scratchlm.commands.recipes import print_table
from scratchlm.commands.shared import corpus_of_files, say, write
from scratchlm.config import DEVICE, EvaluateConfig, GenerateConfig, Recipe, load_recipe, plain
from scratchlm.errors import UserError
from scratchlm.files import expanded
from scratchlm.section import AnySection, Section, validate

if TYPE_CHECKING:
    from scratchlm.evaluate.metrics import Evaluation


class EvaluateArguments(EvaluateConfig):
    """Evaluate a trained model."""

    device: str = DEVICE


def _saved_recipe(run_folder: Path) -> Recipe | None:
    """The recipe of a run; an imported model's is one to come."""
    path = run_folder / "recipe.toml"
    return load_recipe(path) if path.exists() and not (run_folder / "model.safetensors").exists() else None


def _recipe_around(folder: Path) -> Recipe | None:
    """The recipe of the run that a checkpoint or an average of weights is of."""
    from scratchlm.interop.folders import run_of

    run = run_of(folder)
    return None if run is None else load_recipe(run / "recipe.toml")


def _run_and_files(arguments: list[str], usage: str) -> tuple[Path, list[str], list[str]]:
    """Split ``RUN [FILE …] [--option …]``."""
    if not arguments:
        raise UserError(f"which run? usage: {usage}")
    first_option = next((i for i, argument in enumerate(arguments) if argument.startswith("-")), len(arguments))
    if first_option == 0:
        raise UserError(f"name the run's folder first: {usage}")
    positional, rest = arguments[:first_option], arguments[first_option:]
    return expanded(positional[0]), positional[1:], rest


def _defaults(kind: type[AnySection], recipe: Recipe | None, section: str) -> AnySection:
    """The run's own settings as defaults of a command's options."""
    if recipe is None:
        return kind()
    return kind(**{**dict(getattr(recipe, section)), "device": recipe.device})


def evaluate(arguments: list[str]) -> None:
    """``scratchlm evaluate RUN [FILE …]``: the figures of the best checkpoint on held-out text, or on files."""
    usage = "scratchlm evaluate RUN [FILE …] [--option value …]"
    if arguments[:1] in (["-h"], ["--help"]):
        parse(EvaluateArguments, ["--help"], prog=usage)
    folder, files, rest = _run_and_files(arguments, usage)
    recipe = _saved_recipe(folder)
    if recipe is None and files:
        recipe = _recipe_around(folder)
    default = _defaults(EvaluateArguments, recipe, "evaluate")
    options = parse(EvaluateArguments, rest, prog=usage, default=default)
    keep_freed_memory()
    result = _evaluate_files(folder, files, options, recipe) if files else _evaluate_run(folder, options, recipe)
    print_table(result)


def _config(kind: type[AnySection], options: Section) -> AnySection:
    return kind(**{name: getattr(options, name) for name in kind.model_fields})


def _evaluate_run(folder: Path, options: EvaluateArguments, recipe: Recipe | None) -> Evaluation:
    """On the run's own held-out text; kept in the run only if these are the run's own settings."""
    from scratchlm.interop.native import best_checkpoint
    from scratchlm.pipeline import Pipeline

    best_checkpoint(folder)  # says what is wrong with a folder that holds no trained model
    if recipe is None:
        raise UserError(f"{folder} is no run with a recipe.toml; name the files to evaluate on after it")
    config = _config(EvaluateConfig, options)
    given = validate(
        Recipe, {**plain(recipe), "out": folder, "evaluate": plain(config), "device": options.device}, "evaluate"
    )
    pipeline = Pipeline(given, say=say, finished=True)
    own = config == recipe.evaluate
    with pipeline.folder.locked() if own else contextlib.nullcontext():
        return pipeline.evaluate(record=own)


def _evaluate_files(
    folder: Path, files: list[str], options: EvaluateArguments, recipe: Recipe | None
) -> Evaluation:
    """On all documents of `files`, computed as the run's own evaluation is."""
    from scratchlm.data import open_corpus
    from scratchlm.evaluate.compressors import compressed_sizes
    from scratchlm.evaluate.evaluation import evaluate_tokens, tokenise
    from scratchlm.interop.folders import separator_of
    from scratchlm.interop.native import load, precision_of
    from scratchlm.train.precision import choose_device

    model, tokenizer = load(folder)
    if tokenizer is None:
        raise UserError(f"{folder} holds no tokenizer that can be read here, which is needed to read text")
    corpus = open_corpus(corpus_of_files(files, None if recipe is None else recipe.corpus))
    separator = separator_of(folder, tokenizer)
    with tokenise(corpus, tokenizer, separator_id=separator) as tokens:
        sizes = compressed_sizes(corpus.bytes_of("train"), total=tokens.bytes) if options.compressors else None
        return evaluate_tokens(
            model.to(choose_device(options.device)),
            tokens,
            options,
            compressors=sizes,
            precision=precision_of(folder),
            document_boundaries=recipe is not None and recipe.train.document_boundaries,
        )


class GenerateArguments(GenerateConfig):
    """Continue texts with a trained model: one prompt streams as it is written, several are written as a batch."""

    device: str = DEVICE


def generate(arguments: list[str]) -> None:
    """``scratchlm generate RUN --prompts TEXT …``"""
    usage = "scratchlm generate RUN [--option value …]"
    if arguments[:1] in (["-h"], ["--help"]):
        parse(GenerateArguments, ["--help"], prog=usage)
    folder, files, rest = _run_and_files(arguments, usage)
    if files:
        raise UserError(f"unexpected argument {files[0]!r}; a prompt is given as --prompts {files[0]!r}")
    recipe = _saved_recipe(folder)
    default = _defaults(GenerateArguments, recipe, "generate")
    options = parse(GenerateArguments, rest, prog=usage, default=default)
    stop_is_given = any(argument.split("=")[0] == "--stop" for argument in rest)
    if not options.prompts:
        raise UserError("generate.prompts is empty; give at least one text: --prompts 'def '")
    keep_freed_memory()
    from scratchlm.generate import Generator
    from scratchlm.interop.folders import end_tokens, separator_of
    from scratchlm.interop.native import load
    from scratchlm.train.precision import choose_device

    model, tokenizer = load(folder)
    if tokenizer is None:
        raise UserError(f"{folder} holds no tokenizer that can be read here, which is needed to read a prompt")
    generator = Generator(
        model.to(choose_device(options.device)), tokenizer, separator_id=separator_of(folder, tokenizer)
    )
    config = _config(GenerateConfig, options)
    if recipe is None and not stop_is_given:  # an imported model says itself what ends its texts
        known = [token for token in config.stop if token in tokenizer.special_tokens]
        config = config.model_copy(update={"stop": end_tokens(folder, tokenizer) or known})
    if len(config.prompts) == 1:
        pieces = generator.stream(config.prompts[0], config)
        write(config.prompts[0])
        for piece in pieces:
            write(piece)
        write("\n")
        return
    texts = generator.generate(config.prompts, config, show_progress=True)
    for prompt, text in zip(config.prompts, texts, strict=True):
        write(f"{prompt}{text}\n\n")
