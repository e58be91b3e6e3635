"""The tokenizers the benchmark compares: for each, how it is given a vocabulary and what its fastest public calls are.

Every engine gets the same vocabulary (trained by scratchlm; written as ``tokenizer.json`` and as ranks), the same pattern
and the same text, in the form it takes most readily: UTF-8 bytes, str, or a file. Whichever of its calls was found to be the
fastest is used, with the most compact result it offers (an array rather than a list of Python ints).

An engine without `load` cannot be given a vocabulary; `reason` says why it is named here all the same.
"""

from __future__ import annotations

import base64
import contextlib
import importlib
import importlib.metadata
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from scratchlm.files import write_bytes, write_json
from scratchlm.tokenizer import PATTERNS, Tokenizer

SPECIAL = "<|endoftext|>"
SEPARATOR = b"\x00\x00"  # between documents in a file

# The same language as our text without possessive quantifiers, as in the tokenizer.json of Llama 3.
PLAIN = {
    "cl100k": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
}


@dataclass
class Vocabulary:
    """A trained tokenizer and its files: a folder with ``tokenizer.json`` and ``ranks.tiktoken``."""

    folder: Path
    pattern: str

    @cached_property
    def ours(self) -> Tokenizer:
        return Tokenizer.load(self.folder / "tokenizer.json")

    @property
    def json(self) -> str:
        """The ``tokenizer.json`` for peers. They know patterns by their text, so the text is the one they know it by."""
        plain = self.folder / "peers.json"
        return str(plain if plain.exists() else self.folder / "tokenizer.json")

    @cached_property
    def ranks(self) -> dict[bytes, int]:
        """Token → id, special tokens left out: tiktoken's form."""
        special = set(self.ours.special_tokens.values())
        return {token: index for index, token in self.ours.vocab.items() if index not in special}

    @staticmethod
    def save(tokenizer: Tokenizer, folder: Path) -> Vocabulary:
        vocabulary = Vocabulary(folder, tokenizer.pattern)
        vocabulary.ours = tokenizer
        lines = [base64.b64encode(token) + f" {index}\n".encode() for token, index in vocabulary.ranks.items()]
        write_bytes(folder / "ranks.tiktoken", b"".join(lines))
        tokenizer.save(folder)
        if tokenizer.pattern in PLAIN:
            content = json.loads((folder / "tokenizer.json").read_text())
            for step in content["pre_tokenizer"]["pretokenizers"]:
                if step["type"] == "Split":
                    step["pattern"] = {"Regex": PLAIN[tokenizer.pattern]}
            write_json(folder / "peers.json", content)
        return vocabulary


@dataclass
class Text:
    """One corpus in all the forms that engines take. Made before anything is timed."""

    documents: list[bytes]
    folder: Path
    _kept: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def data(self) -> bytes:
        return b"".join(self.documents)

    @cached_property
    def string(self) -> str:
        return self.data.decode()

    @cached_property
    def strings(self) -> list[str]:
        return [document.decode() for document in self.documents]

    @cached_property
    def separated(self) -> bytes:
        return SEPARATOR.join(self.documents)

    @property
    def size(self) -> int:
        return sum(map(len, self.documents))

    def path(self, separator: bytes = b"") -> Path:
        """A file of all documents with `separator` between them."""
        path = self.folder / f"text-{os.getpid()}-{len(self.documents)}-{separator.hex()}.txt"
        if not path.exists():
            path.write_bytes(separator.join(self.documents))
        return path


def _ignore(*_: Any) -> None:
    return None


@dataclass(frozen=True)
class Engine:
    """How to drive one tokenizer.

    Attributes:
        name: as printed; ours comes first.
        package: distribution on PyPI, "" for ours.
        load: a fresh tokenizer with empty caches, made of a vocabulary.
        encode: ids of a whole text on one thread (or as many as it takes by itself: CPU time is measured too).
        batch: encode the documents of a text, (tokenizer, text, threads).
        prepare: touch the forms of the text that `encode` takes.
        ids: what `encode` returned as a flat array.
        decode: the text (str or bytes) of `decodable(ids)`.
        decodable: ids in the form `decode` takes: an array where it takes arrays.
        sample: encode this many megabytes of the text only, every n-th document, because it is slow; None: all of it.
        reason: why it cannot be measured here.
    """

    name: str
    package: str = ""
    load: Callable[[Vocabulary], Any] | None = None
    encode: Callable[[Any, Text], Any] = _ignore
    batch: Callable[[Any, Text, int], Any] | None = None
    prepare: Callable[[Text], Any] = lambda text: text.string
    ids: Callable[[Any], np.ndarray] = np.asarray
    decode: Callable[[Any, Any], Any] | None = None
    decodable: Callable[[np.ndarray], Any] = np.ndarray.tolist
    sample: float | None = None
    reason: str = ""


def _words(result: Any) -> np.ndarray:
    return np.frombuffer(result, dtype=np.uint32)


# ------------------------------------------------------------------ ours


def _scratchlm(vocabulary: Vocabulary) -> Tokenizer:
    other = vocabulary.ours
    return Tokenizer(other.vocab, other.merges, other.special_tokens, other.pattern)  # its table of words is empty


OURS = Engine(
    "scratchlm",
    load=_scratchlm,
    encode=lambda tokenizer, text: tokenizer.encode_array(text.data),
    batch=lambda tokenizer, text, threads: tokenizer.encode_batch(text.documents, threads=threads),
    prepare=lambda text: text.data,
    decode=lambda tokenizer, ids: tokenizer.decode(ids),
    decodable=lambda ids: ids,
)

OURS_STR = Engine(
    "scratchlm, from str",
    load=_scratchlm,
    encode=lambda tokenizer, text: tokenizer.encode_array(text.string),
    batch=lambda tokenizer, text, threads: tokenizer.encode_batch(text.strings, threads=threads),
)

OURS_LIST = Engine(
    "scratchlm, from a list",
    load=_scratchlm,
    decode=lambda tokenizer, ids: tokenizer.decode(ids),
)

# Decoded by all: a size that lists of Python integers still fit in memory with.
DECODED_MEGABYTES = 20


# ------------------------------------------------------------------ peers


def _tiktoken(vocabulary: Vocabulary) -> Any:
    import tiktoken

    return tiktoken.Encoding(
        vocabulary.folder.name,
        pat_str=PATTERNS[vocabulary.pattern].replace(r"\Z", "$"),
        mergeable_ranks=vocabulary.ranks,
        special_tokens=vocabulary.ours.special_tokens,
    )


def _gigatoken(vocabulary: Vocabulary) -> Any:
    import gigatoken

    return gigatoken.Tokenizer(vocabulary.json)


def _gigatoken_batch(tokenizer: Any, text: Text, threads: int) -> Any:
    import gigatoken

    return tokenizer.encode_batch(gigatoken.BytesSource(text.separated, SEPARATOR), parallel=threads > 1)


def _splintr(vocabulary: Vocabulary) -> Any:
    import splintr

    return splintr.from_json(vocabulary.json)


def _from(module: str, build: Callable[[Any, Vocabulary], Any]) -> Callable[[Vocabulary], Any]:
    return lambda vocabulary: build(importlib.import_module(module), vocabulary)


def _flat(encodings: list[Any]) -> np.ndarray:
    return np.concatenate([np.asarray(encoding.ids, dtype=np.uint32) for encoding in encodings])


PEERS = [
    Engine(
        "gigatoken",
        "gigatoken",
        load=_gigatoken,
        encode=lambda tokenizer, text: tokenizer.encode(text.data),
        batch=_gigatoken_batch,
        prepare=lambda text: text.data,
        decode=lambda tokenizer, ids: tokenizer.decode(ids),
        decodable=lambda ids: ids.astype(np.uint32),
    ),
    Engine(
        "snaptokens",
        "snaptokens",
        load=_from("snaptokens", lambda module, vocabulary: module.Tokenizer.from_file(vocabulary.json)),
        encode=lambda tokenizer, text: tokenizer.encode_batch_flat([text.string])[0],
        batch=lambda tokenizer, text, threads: tokenizer.encode_batch_flat(text.strings),
        ids=_words,
        decode=lambda tokenizer, ids: tokenizer.decode(ids),
    ),
    Engine(
        "tokie",
        "tokie",
        load=_from("tokie", lambda module, vocabulary: module.Tokenizer.from_json(vocabulary.json)),
        encode=lambda tokenizer, text: tokenizer.encode_files([str(text.path())], separator=SEPARATOR)[0],
        batch=lambda tokenizer, text, threads: tokenizer.encode_files(
            [str(text.path(SEPARATOR))], separator=SEPARATOR
        ),
        prepare=lambda text: (text.path(), text.path(SEPARATOR)),
        sample=40,
        decode=lambda tokenizer, ids: tokenizer.decode_bytes(ids),
    ),
    Engine(
        "splintr",
        "splintr-rs",
        load=_splintr,
        encode=lambda tokenizer, text: tokenizer.encode_flat(text.string),
        batch=lambda tokenizer, text, threads: tokenizer.encode_batch_flat(text.strings),
        ids=_words,
        sample=40,
        decode=lambda tokenizer, ids: tokenizer.decode(ids),
    ),
    Engine(
        "kitoken",
        "kitoken",
        load=_from("kitoken", lambda module, vocabulary: module.Kitoken.from_tokenizers_file(vocabulary.json)),
        encode=lambda tokenizer, text: tokenizer.encode(text.string),
        batch=lambda tokenizer, text, threads: tokenizer.encode_all(text.strings),
        decode=lambda tokenizer, ids: tokenizer.decode(ids),
        sample=8,
    ),
    Engine(
        "tuetoken",
        "tuetoken",
        load=_from("tuetoken", lambda module, vocabulary: module.Tokenizer(vocabulary.json)),
        encode=lambda tokenizer, text: tokenizer.encode_to_bytes(text.string),
        batch=lambda tokenizer, text, threads: tokenizer.encode_ordinary_to_buffer(text.strings, threads),
        ids=_words,
        decode=lambda tokenizer, ids: tokenizer.decode_array(ids),
        decodable=lambda ids: ids.astype(np.uint32),
        sample=8,
    ),
    Engine(
        "tiktoken",
        "tiktoken",
        load=_tiktoken,
        encode=lambda tokenizer, text: tokenizer.encode_to_numpy(text.string, disallowed_special=()),
        batch=lambda tokenizer, text, threads: tokenizer.encode_ordinary_batch(text.strings, num_threads=threads),
        decode=lambda tokenizer, ids: tokenizer.decode(ids),
        sample=8,
    ),
    Engine(
        "iree-tokenizer",
        "iree-tokenizer",
        load=_from("iree.tokenizer", lambda module, vocabulary: module.Tokenizer.from_file(vocabulary.json)),
        encode=lambda tokenizer, text: tokenizer.encode_to_array(text.string),
        sample=8,
    ),
    Engine(
        "tokenizers",
        "tokenizers",
        load=_from("tokenizers", lambda module, vocabulary: module.Tokenizer.from_file(vocabulary.json)),
        # Fed documents, not one text: that is how it is fastest.
        encode=lambda tokenizer, text: tokenizer.encode_batch_fast(text.strings, add_special_tokens=False),
        batch=lambda tokenizer, text, threads: tokenizer.encode_batch_fast(text.strings, add_special_tokens=False),
        prepare=lambda text: text.strings,
        ids=_flat,
        decode=lambda tokenizer, ids: tokenizer.decode(ids, skip_special_tokens=False),
        sample=2,
    ),
    Engine(
        "rustbpe",
        "rustbpe",
        reason="takes no vocabulary: it encodes with what it trained itself, so it is measured in training alone",
    ),
    Engine("toktok", "toktok-rs", reason="takes no vocabulary: those of OpenAI are compiled in"),
    Engine("quicktok", "quicktok-v1", reason="takes vocabularies by name and download only"),
    Engine("wordchipper", "wordchipper", reason="takes no vocabulary: it downloads those of OpenAI"),
]

ENGINES = [OURS, *PEERS]


def versions() -> dict[str, str]:
    """Installed version of every package that can be compared with; those not installed are left out."""
    found = {}
    for name in ["numpy", "numba", "regex", "gigabpe", *(engine.package for engine in PEERS)]:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def installed(engines: list[Engine]) -> list[Engine]:
    known = versions()
    return [
        engine for engine in engines if engine.load is not None and (not engine.package or engine.package in known)
    ]


# ------------------------------------------------------------------ training


def train_ours(path: Path, vocab_size: int) -> list[tuple[bytes, bytes]]:
    from scratchlm.tokenizer import train_bpe

    return train_bpe(path, vocab_size, [SPECIAL]).merges


def train_gigatoken(path: Path, vocab_size: int) -> list[tuple[bytes, bytes]]:
    import gigatoken

    return gigatoken.train_bpe(path, vocab_size, [SPECIAL], separator=SPECIAL.encode())[1]


def train_gigabpe(path: Path, vocab_size: int) -> Any:
    import gigabpe

    return gigabpe.train_bpe(
        [str(path)],
        vocab_size=vocab_size,
        special_tokens=[SPECIAL],
        pretokenizer="bytelevel",
        threads=os.cpu_count(),
    )[1]


def _documents(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").split(SPECIAL)


def train_rustbpe(path: Path, vocab_size: int) -> Any:
    import rustbpe

    tokenizer = rustbpe.Tokenizer()
    pattern = PATTERNS["gpt2"].replace(r"\Z", "$")
    tokenizer.train_from_iterator(iter(_documents(path)), vocab_size - 1, pattern=pattern)
    return tokenizer


def train_tokenizers(path: Path, vocab_size: int) -> Any:
    import tokenizers

    other = tokenizers.Tokenizer(tokenizers.models.BPE())
    other.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SPECIAL],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    other.train_from_iterator(iter(_documents(path)), trainer)
    return other


TRAINERS: dict[str, Callable[[Path, int], Any]] = {
    "scratchlm": train_ours,
    "gigatoken": train_gigatoken,
    "gigabpe": train_gigabpe,
    "rustbpe": train_rustbpe,
    "tokenizers": train_tokenizers,
}
