"""Tokenizers and engines on one text: how short each vocabulary makes it, and how fast each engine does.

    text ──► tokenizer A ──► tokens       bytes per token, tokens per word, characters that fall apart, longest tokens
         │        ├── ScratchLM   MB/s first, MB/s warm
         │        ├── tiktoken    … the same vocabulary: its ids must be equal, and it is said where they are not
         │        └── tokenizers
         └──► tokenizer B ──► …

The first pass meets a fresh engine, whose caches are empty (what is compiled once per machine is compiled before). Warm
passes are taken in turns, so that a moment's load falls on all engines.
"""

from __future__ import annotations

import pickle
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from scratchlm.errors import UserError
from scratchlm.tokenizer.inspect import TokenView, printable
from scratchlm.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rich.console import Group

LONGEST = 5
"""How many of the longest tokens of a text are listed."""

_ROUNDS = 3
OURS = "scratchlm"


@dataclass(frozen=True)
class Engine:
    """One implementation with one vocabulary.

    Attributes:
        name: scratchlm, tiktoken or tokenizers.
        first, warm: MB/s (10⁶ bytes of UTF-8 per second) on one thread, with empty caches and in the median of later passes;
            None where the engine did not run.
        ids: ``equal`` to ours, or where they first differ, or why the engine did not run.
    """

    name: str
    first: float | None
    warm: float | None
    ids: str


@dataclass(frozen=True)
class Comparison:
    """One tokenizer on the text.

    Attributes:
        name: the caller's.
        vocab_size: its ids.
        tokens: of the text.
        bytes_per_token: the compression ratio; 0 for an empty text.
        tokens_per_word: words are what white space separates; 0 where there are none.
        single_bytes: tokens that are one byte of a longer character, for which the vocabulary had no better.
        longest: the longest different tokens of the text, longest first.
        engines: ours, and others with the same vocabulary.
    """

    name: str
    vocab_size: int
    tokens: int
    bytes_per_token: float
    tokens_per_word: float
    single_bytes: int
    longest: list[TokenView]
    engines: list[Engine]


Encode = Callable[[str], Any]


def _ours(tokenizer: Tokenizer) -> Encode:
    fresh: Tokenizer = pickle.loads(pickle.dumps(tokenizer))
    fresh.encode_array("a\n" * (1 << 12))  # builds its tables and leaves its caches as good as empty
    return fresh.encode_array


def _tiktoken(tokenizer: Tokenizer) -> Encode:
    encoding = tokenizer.as_tiktoken()
    return lambda text: encoding.encode_to_numpy(text, allowed_special="all")


def _hugging_face(tokenizer: Tokenizer) -> Encode:
    live = tokenizer.as_hf()
    return lambda text: live.encode(text, add_special_tokens=False)


_ENGINES: dict[str, Callable[[Tokenizer], Encode]] = {
    OURS: _ours, "tiktoken": _tiktoken, "tokenizers": _hugging_face
}  # fmt: skip


def _difference(tokenizer: Tokenizer, ours: np.ndarray, theirs: np.ndarray) -> str:
    """``equal``, or the first place where the ids part."""
    if np.array_equal(ours, theirs):
        return "equal"
    common = min(len(ours), len(theirs))
    places = np.flatnonzero(ours[:common] != theirs[:common])
    place = int(places[0]) if len(places) else common

    def shown(ids: np.ndarray) -> str:
        if place >= len(ids):
            return "the end"
        index = int(ids[place])
        return f"{index} ({printable(tokenizer.vocab[index])})" if index in tokenizer.vocab else str(index)

    before = sum(len(tokenizer.vocab[int(index)]) for index in ours[:place])
    return f"differ from token {place} (byte {before}) on: {shown(ours)}, here {shown(theirs)}"


def _timed(encode: Encode, text: str) -> tuple[float, Any]:
    start = time.perf_counter()
    result = encode(text)
    return time.perf_counter() - start, result


def _run_engines(
    tokenizer: Tokenizer, text: str, size: int, tick: Callable[[], object]
) -> tuple[np.ndarray, list[Engine]]:
    tokenizer.encode_array(text)  # what is compiled or loaded once per process is no part of a pass
    ready: dict[str, Encode] = {}
    engines: dict[str, Engine] = {}
    for name, make in _ENGINES.items():
        try:
            ready[name] = make(tokenizer)
        except UserError as error:
            engines[name] = Engine(name, None, None, str(error))
    first: dict[str, float] = {}
    found: dict[str, np.ndarray] = {}
    for name, encode in ready.items():
        first[name], result = _timed(encode, text)
        found[name] = np.asarray(result.ids if hasattr(result, "ids") else result, dtype=np.int64)
        tick()
    rounds: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(_ROUNDS):
        for name, encode in ready.items():
            rounds[name].append(_timed(encode, text)[0])
            tick()

    def speed(seconds: float) -> float:
        return size / 1e6 / max(seconds, 1e-9)

    for name in ready:
        ids = "" if name == OURS else _difference(tokenizer, found[OURS], found[name])
        engines[name] = Engine(name, speed(first[name]), speed(statistics.median(rounds[name])), ids)
    return found[OURS], [engines[name] for name in _ENGINES]


def compare(
    tokenizers: Sequence[tuple[str, Tokenizer]], text: str, tick: Callable[[], object] = lambda: None
) -> list[Comparison]:
    """Every tokenizer, and every engine that is installed and can take its vocabulary, on `text`.

    Args:
        tokenizers: (name, tokenizer).
        text: special tokens in it are recognised.
        tick: called after each pass; :func:`passes` says how often at most.

    Raises:
        UserError: `text` cannot be encoded (a lone surrogate).
    """
    size = len(text.encode("utf-8", "surrogatepass"))
    words = len(text.split())
    found = []
    for name, tokenizer in tokenizers:
        ids, engines = _run_engines(tokenizer, text, size, tick)
        counts = np.bincount(ids, minlength=tokenizer.vocab_size)
        used = np.flatnonzero(counts).tolist()
        fallback = sum(
            int(counts[i]) for i in used if len(tokenizer.vocab[i]) == 1 and tokenizer.vocab[i] >= b"\x80"
        )
        special = set(tokenizer.special_tokens.values())
        longest = sorted((i for i in used if i not in special), key=lambda i: -len(tokenizer.vocab[i]))[:LONGEST]
        found.append(
            Comparison(
                name=name,
                vocab_size=tokenizer.vocab_size,
                tokens=len(ids),
                bytes_per_token=size / len(ids) if len(ids) else 0.0,
                tokens_per_word=len(ids) / words if words else 0.0,
                single_bytes=fallback,
                longest=[
                    TokenView(i, tokenizer.vocab[i].hex(), printable(tokenizer.vocab[i]), False) for i in longest
                ],
                engines=engines,
            )
        )
    return found


def passes(tokenizers: int) -> int:
    """How often :func:`compare` ticks at most."""
    return tokenizers * len(_ENGINES) * (1 + _ROUNDS)


def render(comparisons: list[Comparison]) -> Group:
    """Two tables for `rich.print`: vocabularies, and engines."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    sizes = Table(
        *("tokenizer", "ids", "tokens", "bytes\nper token", "tokens\nper word", "single bytes", "longest tokens"),
        title="the text in tokens",
        title_justify="left",
    )
    speeds = Table(
        "tokenizer", "engine", "MB/s first", "MB/s warm", "ids", title="one thread", title_justify="left"
    )
    for column in (*sizes.columns[1:6], *speeds.columns[2:4]):
        column.justify = "right"
    for one in comparisons:
        share = f"{one.single_bytes:,} ({100 * one.single_bytes / one.tokens:.1f} %)" if one.tokens else "0"
        sizes.add_row(
            Text(one.name),
            f"{one.vocab_size:,}",
            f"{one.tokens:,}",
            f"{one.bytes_per_token:.2f}",
            f"{one.tokens_per_word:.2f}",
            share,
            Text("\n".join(_shortened(token.printable) for token in one.longest)),
        )
        for engine in one.engines:
            speeds.add_row(
                Text(one.name),
                engine.name,
                *("–" if rate is None else f"{rate:.3g}" for rate in (engine.first, engine.warm)),
                Text(engine.ids, style="bold" if engine.ids not in ("", "equal") else ""),
            )
        speeds.add_section()
    return Group(sizes, speeds)


def _shortened(token: str, length: int = 24) -> str:
    return token if len(token) <= length else f"{token[: length - 1]}…"
