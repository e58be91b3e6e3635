"""``scratchlm tokenizer train | encode | decode``; looking and converting are in `tokenizer_tools.py`."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from pydantic import Field

from scratchlm.arguments import parse
from scratchlm.commands.shared import corpus_of_files, refuse_existing, say, write
from scratchlm.errors import UserError
from scratchlm.files import atomic_path, write_bytes
from scratchlm.section import Section

TOKENIZER = Field(
    description="A tokenizer.json, a run's folder, a folder with vocab.json and merges.txt, or a rank file whose name is known "
    "(cl100k_base.tiktoken)."
)
OVERWRITE = Field(default=False, description="Replace an existing file.")


class TrainArguments(Section):
    """Train a byte-level BPE tokenizer on text, JSON-lines or parquet files."""

    files: tyro.conf.Positional[list[str]] = Field(
        default=[], description="Files or globs to train on; none: the Python standard library's source."
    )
    out: Path = Field(
        default=Path("tokenizer.json"),
        description="The tokenizer.json to write; a name without .json: a folder for GPT-2's vocab.json and merges.txt.",
    )
    vocab_size: int = Field(default=4096, ge=1, description="256 bytes + merges + special tokens.")
    pattern: str = Field(default="gpt2", description="gpt2, cl100k, o200k, or any pattern of the regex library.")
    special_tokens: list[str] = Field(
        default=["<|endoftext|>"], description="Kept whole, never merged with anything."
    )
    min_frequency: int = Field(default=1, ge=1, description="Pairs seen less often are not merged.")
    max_word_length: int | None = Field(
        default=None, ge=1, description="Longer pre-tokens (in bytes: base64, minified code) are not learnt from."
    )
    workers: int | None = Field(default=None, ge=1, description="Threads that count words; none: one per core.")
    separator: str = Field(default="<|endoftext|>", description="Splits a text file into documents.")
    text_field: str = Field(default="text", description="Field or column of the text (JSON lines, parquet).")
    overwrite: bool = OVERWRITE


def train(arguments: list[str]) -> None:
    """``scratchlm tokenizer train [FILE …]``"""
    options = parse(TrainArguments, arguments, prog="scratchlm tokenizer train")
    out = options.out
    if out.suffix not in ("", ".json"):
        raise UserError(f"--out {out} is neither a .json file nor a folder for vocab.json and merges.txt")
    from scratchlm.data import open_corpus
    from scratchlm.tokenizer import train_bpe

    written = [out] if out.suffix == ".json" else [out / "vocab.json", out / "merges.txt"]
    for path in written:
        refuse_existing(path, options.overwrite)
    corpus = open_corpus(
        corpus_of_files(options.files).model_copy(
            update={"separator": options.separator, "text_field": options.text_field}
        )
    )
    tokenizer = train_bpe(
        (document.text for document in corpus.documents("train")),
        vocab_size=options.vocab_size,
        special_tokens=options.special_tokens,
        pattern=options.pattern,
        min_frequency=options.min_frequency,
        max_word_length=options.max_word_length,
        workers=options.workers,
        progress=True,
    )
    if out.suffix == ".json":
        tokenizer.save(out)
    else:
        tokenizer.save_gpt2(out)
    say(f"{', '.join(map(str, written))}: {tokenizer.vocab_size:,} tokens, {len(tokenizer.merges):,} merges")


class EncodeArguments(Section):
    """Text to token ids, in bounded memory where they are printed."""

    tokenizer: tyro.conf.Positional[Path] = TOKENIZER
    file: tyro.conf.Positional[str] = Field(default="-", description='UTF-8 text; "-": standard input.')
    out: Path | None = Field(
        default=None, description="Write the ids as a NumPy array (.npy); None: print them, separated by spaces."
    )
    overwrite: bool = OVERWRITE


def encode(arguments: list[str]) -> None:
    """``scratchlm tokenizer encode TOKENIZER [FILE]``"""
    options = parse(EncodeArguments, arguments, prog="scratchlm tokenizer encode")
    file, out = options.file, options.out
    from scratchlm.progress import progress
    from scratchlm.tokenizer import Tokenizer

    loaded = Tokenizer.load(options.tokenizer)
    refuse_existing(out, options.overwrite)
    size = Path(file).stat().st_size if file != "-" and Path(file).is_file() else None
    with progress(description="encode", total=size, bytes_=True, show=out is not None) as bar:
        ids = loaded.encode_iterable(utf8_chunks(file, bar))
        if out is None:
            _print_ids(ids)
            return
        array = np.fromiter(ids, dtype=loaded.dtype)
    with atomic_path(out) as temporary, temporary.open("wb") as stream:
        np.save(stream, array)
    say(f"{out}: {len(array):,} ids ({array.dtype})")


def _print_ids(ids: Iterable[int]) -> None:
    first = True
    for token in ids:
        sys.stdout.write(str(token) if first else f" {token}")
        first = False
    sys.stdout.write("\n")


def utf8_chunks(file: str, bar: Any = None, size: int = 1 << 16) -> Iterator[str]:
    """Read UTF-8 text piece by piece; ``-`` is standard input.

    Raises:
        UserError: the file is missing, or a byte is not UTF-8 (its offset is named).
    """
    try:
        stream = sys.stdin.buffer if file == "-" else Path(file).open("rb")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; check the name") from error
    decoder = codecs.getincrementaldecoder("utf-8")()
    seen = 0
    with stream:
        while True:
            data = stream.read(size)
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                offset = seen - pending + error.start
                raise UserError(f"{file}: byte {offset} is not UTF-8; convert the file first") from error
            seen += len(data)
            if text:
                yield text
            if not data:
                return
            if bar is not None:
                bar.update(len(data))


class DecodeArguments(Section):
    """Token ids to text; bytes that are no UTF-8 become U+FFFD on the screen and stay as they are in a file."""

    tokenizer: tyro.conf.Positional[Path] = TOKENIZER
    file: tyro.conf.Positional[str] = Field(
        default="-",
        description='Ids as a NumPy array (.npy) or as numbers between white space; "-": standard input.',
    )
    out: Path | None = Field(default=None, description="The file to write; None: print.")
    overwrite: bool = OVERWRITE


def decode(arguments: list[str]) -> None:
    """``scratchlm tokenizer decode TOKENIZER [FILE]``"""
    options = parse(DecodeArguments, arguments, prog="scratchlm tokenizer decode")
    file, out = options.file, options.out
    from scratchlm.tokenizer import Tokenizer

    loaded = Tokenizer.load(options.tokenizer)
    refuse_existing(out, options.overwrite)
    data = loaded.decode_bytes(_read_ids(file))
    if out is None:
        write(data.decode("utf-8", "replace"))
        return
    write_bytes(out, data)
    say(f"{out}: {len(data):,} bytes")


def _read_ids(file: str) -> list[int]:
    try:
        if file.endswith(".npy"):
            array = np.load(file, allow_pickle=False)
            if array.ndim != 1 or array.dtype.kind not in "iu":
                raise UserError(
                    f"{file} holds {array.dtype} of shape {array.shape}; ids are a flat array of integers"
                )
            ids: list[int] = array.tolist()
            return ids
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; check the name") from error
    except (ValueError, EOFError) as error:
        raise UserError(f"{file} holds no token ids: {error}") from error
    words = text.split()
    wrong = next((word for word in words if not (word.isdecimal() and len(word) < 20)), None)
    if wrong is not None:
        raise UserError(f"{file}: {wrong[:40]!r} is no token id; ids are whole numbers separated by white space")
    return [int(word) for word in words]
