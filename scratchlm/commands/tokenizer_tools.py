"""``scratchlm tokenizer inspect | compare | convert``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro
from pydantic import Field

from scratchlm.arguments import parse
from scratchlm.commands.shared import refuse_existing, say, write
from scratchlm.commands.tokenizers import OVERWRITE, TOKENIZER, utf8_chunks
from scratchlm.errors import UserError
from scratchlm.section import Section

if TYPE_CHECKING:
    from scratchlm.tokenizer import Tokenizer

# A page of more tokens would be slow to open, a table too long to read.
_INSPECTED = 1 << 18


def _beginning(file: str, limit: int) -> tuple[str, bool]:
    """At most about `limit` bytes of a UTF-8 file (``-``: standard input), and whether there is more."""
    chunks: Iterator[str] = utf8_chunks(file)
    taken, size = [], 0
    for chunk in chunks:
        taken.append(chunk)
        size += len(chunk.encode("utf-8"))
        if size >= limit:
            return "".join(taken), next(chunks, None) is not None
    return "".join(taken), False


# --- inspect -----------------------------------------------------------------------------------------------------


class InspectArguments(Section):
    """Show what a tokenizer has learnt, how it cuts a text, and how the merges of a word go on. --json: print it all as JSON."""

    tokenizer: tyro.conf.Positional[Path] = TOKENIZER
    text: str | None = Field(default=None, description="Show how this text is cut into tokens, in colours.")
    file: str | None = Field(
        default=None, description='Show how this UTF-8 file\'s beginning is cut (256 KiB); "-": standard input.'
    )
    word: str | None = Field(default=None, description="Show the merges of this word, step by step.")
    html: Path | None = Field(
        default=None,
        description="Write a page instead: the text in colours, with ids and bytes, and its words' merges.",
    )
    overwrite: bool = OVERWRITE


def inspect(arguments: list[str]) -> None:
    """``scratchlm tokenizer inspect TOKENIZER``"""
    as_json = "--json" in arguments
    rest = [argument for argument in arguments if argument != "--json"]
    options = parse(InspectArguments, rest, prog="scratchlm tokenizer inspect")
    if options.text is not None and options.file is not None:
        raise UserError("--text and --file: give one of the two")
    from rich.console import Console

    from scratchlm.tokenizer import Tokenizer
    from scratchlm.tokenizer import inspect as inspection

    tokenizer = Tokenizer.load(options.tokenizer)
    refuse_existing(options.html, options.overwrite)
    text, more = (options.text, False) if options.file is None else _beginning(options.file, _INSPECTED)
    found = inspection.inspect(tokenizer, text)
    shown = options.word if options.word is not None else text if options.html is not None else None
    words = [] if shown is None else inspection.merge_steps(tokenizer, shown)
    if options.html is not None:
        from scratchlm.tokenizer.inspect_page import save_page

        save_page(options.html, str(options.tokenizer), found, words)
    if as_json:
        write(json.dumps(asdict(found) | {"words": [asdict(word) for word in words]}, ensure_ascii=False) + "\n")
    elif options.html is not None:
        say(f"{options.html}: {len(found.text.tokens) if found.text else 0:,} tokens, {len(words):,} words")
    elif options.word is not None and text is None:
        Console(file=sys.stdout).print(inspection.render_steps(words))
    else:
        Console(file=sys.stdout).print(inspection.render(found))
        if words:
            Console(file=sys.stdout).print(inspection.render_steps(words))
    if more:
        print(f"{options.file} goes on; only its beginning is shown", file=sys.stderr)


# --- compare -----------------------------------------------------------------------------------------------------


class CompareArguments(Section):
    """Compare tokenizers on your own text, and with tiktoken's and Hugging Face's engines on the same vocabularies where those are
    installed. --json: print it as JSON."""

    file: tyro.conf.Positional[str] = Field(description='UTF-8 text; "-": standard input.')
    tokenizers: tyro.conf.Positional[list[str]] = Field(
        default=[],
        description="Each a tokenizer.json, a run's folder, a folder with vocab.json and merges.txt, or a rank file; with NAME= "
        "before it, it is shown by that name, which also says what a rank file is (o200k_harmony=o200k_base.tiktoken). None: "
        "./tokenizer.json and runs/*.",
    )
    megabytes: float = Field(
        default=2.0, gt=0, le=1000, description="How much of the file is used, from its beginning (10⁶ bytes)."
    )


def compare(arguments: list[str]) -> None:
    """``scratchlm tokenizer compare FILE [TOKENIZER …]``"""
    as_json = "--json" in arguments
    rest = [argument for argument in arguments if argument != "--json"]
    options = parse(CompareArguments, rest, prog="scratchlm tokenizer compare")
    from rich.console import Console

    from scratchlm.progress import progress
    from scratchlm.tokenizer import compare as comparing

    named = options.tokenizers or _found_here()
    if not named:
        raise UserError(
            "no tokenizer here (./tokenizer.json, runs/*/tokenizer.json); name one or more after the file"
        )
    tokenizers = [_named(name) for name in named]
    names = [name for name, _ in tokenizers]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two tokenizers are named {twice}; write NAME=PATH to tell them apart")
    text, more = _beginning(options.file, int(options.megabytes * 1e6))
    if not text:
        raise UserError(f"{options.file} is empty; there is nothing to compare on")
    with progress(description="compare", total=comparing.passes(len(tokenizers)), unit="pass", leave=False) as bar:
        found = comparing.compare(tokenizers, text, tick=bar.update)
    size = len(text.encode("utf-8"))
    if as_json:
        content = {
            "file": options.file,
            "bytes": size,
            "whole": not more,
            "tokenizers": [asdict(one) for one in found],
        }
        write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        return
    say(f"{options.file}: {size / 1e6:.2f} MB{', its beginning' if more else ''}, {len(text.split()):,} words")
    Console(file=sys.stdout).print(comparing.render(found))


def _found_here() -> list[str]:
    return [
        str(path)
        for path in (Path("tokenizer.json"), *sorted(Path("runs").glob("*/tokenizer.json")))
        if path.exists()
    ]


def _named(argument: str) -> tuple[str, Tokenizer]:
    """A tokenizer and its name from PATH or NAME=PATH."""
    from scratchlm.tokenizer import Tokenizer
    from scratchlm.tokenizer.tiktoken_files import KNOWN, load_tiktoken

    name, equals, rest = argument.partition("=")
    if not equals or Path(argument).exists():
        path = Path(argument)
        if not path.exists() and argument in KNOWN:
            raise UserError(f"where is {argument}? Write {argument}=PATH, with its rank file or folder")
        name = path.parent.name if path.name == "tokenizer.json" and path.parent.name else path.stem
        return name or str(path), Tokenizer.load(path)
    if not name or not rest:
        raise UserError(f"{argument!r} is neither PATH nor NAME=PATH")
    if name in KNOWN and Path(rest).suffix in (".tiktoken", ".model"):
        return name, load_tiktoken(rest, name=name)
    return name, Tokenizer.load(rest)


# --- convert -----------------------------------------------------------------------------------------------------


class ConvertArguments(Section):
    """Write a tokenizer in another program's format: ids stay the same, or it is said what the format cannot hold."""

    source: tyro.conf.Positional[Path] = Field(
        description="A tokenizer.json, a run's folder, a folder with vocab.json and merges.txt, or a rank file (.tiktoken)."
    )
    out: tyro.conf.Positional[Path] = Field(
        description="A .json file (hf), a .tiktoken file (tiktoken), or a folder (gpt2: vocab.json and merges.txt)."
    )
    to: Literal["tiktoken", "hf", "gpt2"] | None = Field(
        default=None, description="The format; None: what the name of OUT says."
    )
    pattern: str | None = Field(
        default=None,
        description="For sources that do not hold their pattern (rank files, vocab.json with merges.txt): gpt2, cl100k, "
        "o200k, or a pattern of the regex library.",
    )
    special_tokens: list[str] | None = Field(
        default=None,
        description="For these sources: special tokens, each NAME or NAME=ID; a NAME alone gets the next id.",
    )
    name: str | None = Field(
        default=None, description="Which well-known encoding a rank file is, where its own name does not say it."
    )
    overwrite: bool = OVERWRITE


def convert(arguments: list[str]) -> None:
    """``scratchlm tokenizer convert IN OUT``"""
    options = parse(ConvertArguments, arguments, prog="scratchlm tokenizer convert")
    out = options.out
    to = options.to or {".json": "hf", ".tiktoken": "tiktoken", "": "gpt2"}.get(out.suffix)
    if to is None:
        raise UserError(f"{out}: its name does not say which format; add --to tiktoken, hf or gpt2")
    if to == "hf" and out.suffix != ".json":
        out /= "tokenizer.json"
    written = [out / "vocab.json", out / "merges.txt"] if to == "gpt2" else [out]
    for path in written:
        refuse_existing(path, options.overwrite)
    tokenizer = _source(options)
    if to == "tiktoken":
        tokenizer.save_tiktoken(out)
    elif to == "hf":
        tokenizer.save(out)
    else:
        tokenizer.save_gpt2(out)
    say(f"{', '.join(map(str, written))}: {len(tokenizer.vocab):,} tokens, {len(tokenizer.merges):,} merges")
    if lost := _left_out(tokenizer, to):
        say(f"The format does not hold these; give them to whoever opens it: {lost}")


def _source(options: ConvertArguments) -> Tokenizer:
    from scratchlm.tokenizer import Tokenizer
    from scratchlm.tokenizer.files import gpt2_pair, load_gpt2
    from scratchlm.tokenizer.tiktoken_files import load_tiktoken

    source = options.source
    specials = None if options.special_tokens is None else _special_ids(options.special_tokens)
    if source.suffix in (".tiktoken", ".model") and not source.is_dir():
        return load_tiktoken(source, options.pattern, specials, options.name)
    if options.name is not None:
        raise UserError(f"--name {options.name} is for rank files; {source} is none")
    if (pair := gpt2_pair(source)) is not None:
        return load_gpt2(*pair, specials, options.pattern or "gpt2")
    if options.pattern is not None or specials is not None:
        raise UserError(
            f"{source} holds its own pattern and special tokens; leave --pattern and --special-tokens out"
        )
    return Tokenizer.load(source)


def _special_ids(arguments: list[str]) -> list[str] | dict[str, int]:
    """["<a>=7", …] → name → id; without ids, the names alone."""
    split = [argument.rpartition("=") for argument in arguments]
    given = [name != "" and index.isdecimal() for name, _, index in split]
    if not any(given):
        return list(arguments)
    if not all(given):
        raise UserError("--special-tokens: give every one an id (NAME=ID) or none")
    names = [name for name, _, _ in split]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"special token {twice!r} is named twice; remove one")
    return {name: int(index) for name, _, index in split}


def _left_out(tokenizer: Tokenizer, to: str) -> str:
    """What the files of a format do not say of a tokenizer."""
    if to == "hf":
        return ""
    lost = []
    if to == "tiktoken" or tokenizer.pattern != "gpt2":
        lost.append(f"pattern {tokenizer.pattern}")
    if tokenizer.special_tokens:
        listed = [f"{name}={index}" for name, index in list(tokenizer.special_tokens.items())[:10]]
        rest = len(tokenizer.special_tokens) - len(listed)
        lost.append(f"special tokens {' '.join(listed)}{f' and {rest} more' if rest else ''}")
    if tokenizer.added_tokens:
        lost.append(f"that {len(tokenizer.added_tokens)} of them are added but not special")
    return "; ".join(lost)
