"""Files other programs read and write.

    tokenizer.json          Hugging Face `tokenizers`: everything in one file
    vocab.json, merges.txt  GPT-2's pair: ids and merges; pattern and special tokens must be known
    <name>.tiktoken         tiktoken's ranks: see tiktoken_files.py

The first two write bytes as printable characters by GPT-2's table: a byte that prints as itself in Latin-1 stays, the other 68
are moved up to U+0100 and on. So " the" is written "Ġthe", a line end "Ċ".

    byte  0x21 … 0x7E  0xA1 … 0xAC  0xAE … 0xFF │ 0x00 … 0x20  0x7F … 0xA0  0xAD
    char  the same                              │ U+0100 … U+0143
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scratchlm.errors import UserError
from scratchlm.files import write_text
from scratchlm.tokenizer.dialects import from_oniguruma, to_oniguruma
from scratchlm.tokenizer.normalization import FORMS
from scratchlm.tokenizer.reading import read_file, read_json
from scratchlm.tokenizer.stream import check_specials
from scratchlm.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    import tokenizers

# GPT-2's pair under the names of Hugging Face, and under OpenAI's.
_END = "<|endoftext|>"
_PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))


@functools.cache
def byte_to_char() -> dict[int, str]:
    """GPT-2's table (its `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {byte: chr(byte) for byte in printable}
    table |= {byte: chr(0x100 + index) for index, byte in enumerate(b for b in range(256) if b not in table)}
    return table


@functools.cache
def char_to_byte() -> dict[str, int]:
    return {char: byte for byte, char in byte_to_char().items()}


@functools.cache
def _to_latin1() -> dict[int, int]:
    """For `str.translate`: printable characters to those with their bytes' numbers, all other Latin-1 ones out of Latin-1."""
    table = dict.fromkeys(range(256), 0xFFFF)
    return table | {ord(char): byte for char, byte in char_to_byte().items()}


def to_chars(token: bytes) -> str:
    """Printable form of a token."""
    table = byte_to_char()
    return "".join(table[byte] for byte in token)


def to_bytes(chars: str) -> bytes:
    """The token a printable form stands for.

    Raises:
        KeyError: a character is not in the table.
    """
    try:
        return chars.translate(_to_latin1()).encode("latin-1")
    except UnicodeEncodeError:
        table = char_to_byte()
        return bytes(table[char] for char in chars)  # raises KeyError at the character


def _read_vocab(entries: Any, specials: Iterable[str], where: str) -> dict[int, bytes]:
    """{"printable form": id} → {id: bytes}; special tokens stand there as they are."""
    if not isinstance(entries, dict):
        raise UserError(f"{where}: the vocabulary is not a JSON object of tokens and ids")
    try:
        plain = set(check_specials(specials))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    vocab: dict[int, bytes] = {}
    for chars, index in entries.items():
        if not isinstance(index, int) or isinstance(index, bool) or index < 0:
            raise UserError(f"{where}: token {chars!r} has the id {index!r}, which is not a whole number from 0 on")
        if index in vocab:
            raise UserError(f"{where}: id {index} is given to two tokens, {vocab[index]!r} and {chars!r}")
        if chars in plain:
            vocab[index] = chars.encode("utf-8")
            continue
        try:
            vocab[index] = to_bytes(chars)
        except KeyError as error:
            raise UserError(
                f"{where}: token {chars!r} (id {index}) holds {error.args[0]!r}, which stands for no byte; if it is a "
                f"special token, name it in special_tokens"
            ) from error
    return vocab


def _read_merges(lines: Iterable[Any], where: str) -> list[tuple[bytes, bytes]]:
    merges = []
    for number, line in enumerate(lines):
        parts = line.split(" ") if isinstance(line, str) else line
        match parts:
            case [str() as left, str() as right] if left and right:
                pass
            case _:
                raise UserError(f"{where}: merge {number} is {line!r}, not two tokens")
        try:
            merges.append((to_bytes(left), to_bytes(right)))
        except KeyError as error:
            raise UserError(f"{where}: merge {number} holds {error.args[0]!r}, which stands for no byte") from error
    return merges


def _build(where: str, *arguments: Any, **options: Any) -> Tokenizer:
    try:
        return Tokenizer(*arguments, **options)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def load(path: str | os.PathLike[str]) -> Tokenizer:
    """Read a tokenizer from whatever holds one.

    Args:
        path: a `tokenizer.json`; a rank file whose name tells what it is (``cl100k_base.tiktoken``; ``tokenizer.model`` for
            Llama 3); or a folder that holds ``tokenizer.json`` (as a run's does) or GPT-2's pair, whose
            ``<|endoftext|>`` is a special token if it is there.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = Path(path)
    if path.suffix in (".tiktoken", ".model") and not path.is_dir():
        from scratchlm.tokenizer.tiktoken_files import load_tiktoken

        return load_tiktoken(path)
    if (pair := gpt2_pair(path)) is not None:
        return load_gpt2(*pair)
    if path.is_dir() and not (path / "tokenizer.json").exists():
        raise UserError(
            f"tokenizer {path / 'tokenizer.json'} does not exist, nor do vocab.json and merges.txt beside it"
        )
    return load_tokenizer_json(path)


# -------------------------------------------------------------------- GPT-2


def gpt2_pair(folder: Path) -> tuple[Path, Path] | None:
    """GPT-2's pair of files in a folder that has them and no tokenizer.json."""
    for vocab_json, merges_txt in _PAIRS:
        pair = folder / vocab_json, folder / merges_txt
        if pair[0].exists() and pair[1].exists() and not (folder / "tokenizer.json").exists():
            return pair
    return None


def load_gpt2(
    vocab_json: str | os.PathLike[str],
    merges_txt: str | os.PathLike[str],
    special_tokens: Iterable[str] | dict[str, int] | None = None,
    pattern: str = "gpt2",
) -> Tokenizer:
    """Read `vocab.json` and `merges.txt`.

    Args:
        vocab_json: {"printable form": id}; special tokens stand there as they are.
        merges_txt: one merge per line, two printable forms with a space between; a first line ``#version…`` is skipped.
        special_tokens: which tokens are special; those that are not in `vocab_json` get the next ids. None: ``<|endoftext|>``,
            if it is there.
        pattern: the files do not say it; GPT-2's is the default.

    Raises:
        UserError: a file is missing or corrupt; the entry or line is named.
    """
    specials = (
        special_tokens if special_tokens is None or isinstance(special_tokens, dict) else list(special_tokens)
    )
    entries = read_json(vocab_json, "vocabulary")
    if specials is None:
        specials = [_END] if isinstance(entries, dict) and _END in entries else []
    vocab = _read_vocab(entries, specials, str(vocab_json))
    try:
        lines = read_file(merges_txt, "merges").decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read merges {merges_txt}: {error}") from error
    lines = [line.removesuffix("\r") for line in lines]
    if lines and lines[0].startswith("#version"):
        lines = lines[1:]
    merges = _read_merges([line for line in lines if line], str(merges_txt))
    return _build(f"{vocab_json} with {merges_txt}", vocab, merges, specials, pattern)


def _written_vocab(tokenizer: Tokenizer) -> dict[str, int]:
    """{"printable form": id}, in the order of ids."""
    special = {index: name for name, index in tokenizer.special_tokens.items()}
    written: dict[str, int] = {}
    for index in sorted(tokenizer.vocab):
        chars = special.get(index) or to_chars(tokenizer.vocab[index])
        shared = (
            index in special
            and chars != to_chars(tokenizer.vocab[index])
            and tokenizer.vocab[index] in _regular(tokenizer)
        )
        if chars in written or shared:
            raise UserError(
                f"special token {special.get(index, chars)!r} cannot be written: in this format it would read as "
                f"another token; give it another name"
            )
        written[chars] = index
    return written


def _regular(tokenizer: Tokenizer) -> set[bytes]:
    """Tokens that merges use or make, and single bytes."""
    parts = {token for left, right in tokenizer.merges for token in (left, right, left + right)}
    return parts | {bytes([byte]) for byte in range(256)}


def _only_whole(tokenizer: Tokenizer) -> bytes | None:
    """A token that `ignore_merges` gives and merges would not."""
    merging = Tokenizer(tokenizer.vocab, tokenizer.merges, pattern=r"[\s\S]+")
    special = set(tokenizer.special_tokens.values())
    ordinary = (item for item in tokenizer.vocab.items() if item[0] not in special)
    return next((token for index, token in ordinary if merging.encode(token) != [index]), None)


def save_gpt2(tokenizer: Tokenizer, folder: str | os.PathLike[str]) -> None:
    """Write `vocab.json` and `merges.txt` into `folder`, each atomically.

    Raises:
        UserError: a special token cannot be told from another token in this format; the tokenizer normalises text, or takes words whole
            that merges would not make, which the files cannot say; or the disk refuses.
    """
    folder = Path(folder)
    if tokenizer.normalizer is not None:
        raise UserError(
            f"vocab.json and merges.txt cannot say that text is normalised first, and this tokenizer does so "
            f"({tokenizer.normalizer}); tokenizer.json can"
        )
    if tokenizer.ignore_merges and (token := _only_whole(tokenizer)) is not None:
        raise UserError(
            f"vocab.json and merges.txt cannot say that {token!r} is taken as a whole, to which no merges lead; "
            f"tokenizer.json can"
        )
    vocab = _written_vocab(tokenizer)
    merges = "".join(f"{to_chars(left)} {to_chars(right)}\n" for left, right in tokenizer.merges)
    write_text(folder / "vocab.json", json.dumps(vocab, ensure_ascii=False) + "\n")
    write_text(folder / "merges.txt", "#version: 0.2\n" + merges)


# -------------------------------------------------------------------- tokenizer.json


def _json_path(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    return path if path.suffix == ".json" and not path.is_dir() else path / "tokenizer.json"


def save_tokenizer_json(tokenizer: Tokenizer, path: str | os.PathLike[str]) -> Path:
    """Write Hugging Face's `tokenizer.json`, atomically.

    Args:
        tokenizer: any.
        path: a file that ends in ``.json``, or a folder, in which ``tokenizer.json`` is written.

    Returns:
        the file.

    Raises:
        UserError: a special token cannot be told from another token in this format, or the disk refuses.
    """
    path = _json_path(path)
    write_text(path, json.dumps(tokenizer_json(tokenizer), indent=1, ensure_ascii=False) + "\n")
    return path


def as_hf(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """A live `tokenizers.Tokenizer`.

    Raises:
        UserError: `tokenizers` is not installed, or a special token cannot be told from another token in this format.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise UserError("tokenizers is not installed: pip install 'scratchlm[oracles]'") from error
    return tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(tokenizer)))


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a `tokenizer.json` says.

    Raises:
        UserError: a special token cannot be told from another token in this format.
    """
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    pre_tokenizer: dict[str, Any]
    if tokenizer.pattern == "gpt2":
        pre_tokenizer = byte_level | {"use_regex": True}
    else:
        split = {
            "type": "Split",
            "pattern": {"Regex": to_oniguruma(tokenizer.pattern)},
            "behavior": "Isolated",
            "invert": False,
            # Ignored by `tokenizers`: our own wording, for the way back.
            "scratchlm_pattern": tokenizer.pattern,
        }
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": special, **flags, "special": special not in tokenizer.added_tokens}
            for special, index in sorted(tokenizer.special_tokens.items(), key=lambda item: item[1])
        ],
        "normalizer": None if tokenizer.normalizer is None else {"type": tokenizer.normalizer},
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": tokenizer.ignore_merges,
            "vocab": _written_vocab(tokenizer),
            "merges": [[to_chars(left), to_chars(right)] for left, right in tokenizer.merges],
        },
    }


def load_tokenizer_json(path: str | os.PathLike[str]) -> Tokenizer:
    """Read a byte-level BPE `tokenizer.json`.

    A post-processor (which may add a beginning-of-sequence token) is not applied: ids are those of `tokenizers` with
    ``add_special_tokens=False``. All added tokens are special tokens here; those it calls not special are in
    `added_tokens` as well.

    Args:
        path: the file, or a folder that holds ``tokenizer.json``.

    Raises:
        UserError: the file is missing, corrupt, or uses parts that byte-level BPE has not (they are named).
    """
    path = Path(path)
    if path.is_dir():
        path = path / "tokenizer.json"
    content = read_json(path, "tokenizer")
    where = str(path)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise UserError(f"{where}: no tokenizer.json of the tokenizers library (it has no model)")
    model = content["model"]
    if model.get("type", "BPE") != "BPE":
        raise UserError(f"{where}: the model is {model.get('type')}; only byte-level BPE is supported")
    for field in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "dropout"):
        if model.get(field):
            raise UserError(f"{where}: model.{field} = {model[field]!r} is not supported by byte-level BPE")
    normalizer = _read_normalizer(content.get("normalizer"), where)
    if not isinstance(model.get("merges"), list):
        raise UserError(f"{where}: model.merges is missing or not a list")
    specials: dict[str, int] = {}
    not_special = []
    added_tokens = content.get("added_tokens") or []
    if not isinstance(added_tokens, list):
        raise UserError(f"{where}: added_tokens is {added_tokens!r}, not a list")
    for added in added_tokens:
        if (
            not isinstance(added, dict)
            or not isinstance(added.get("content"), str)
            or type(added.get("id")) is not int
        ):
            raise UserError(f"{where}: added token {added!r} has no content or no id")
        for flag in ("single_word", "lstrip", "rstrip"):
            if added.get(flag):
                raise UserError(f"{where}: added token {added['content']!r} uses {flag}, which is not supported")
        if added["content"] in specials:
            raise UserError(f"{where}: added token {added['content']!r} is listed twice")
        # `tokenizers` looks for such a token in the normalised text, which may hold it where the raw text does not.
        if normalizer is not None and added.get("normalized"):
            raise UserError(
                f"{where}: added token {added['content']!r} is normalized and looked for after {normalizer}; not supported"
            )
        specials[added["content"]] = added["id"]
        if added.get("special") is False:
            not_special.append(added["content"])
    pattern = _read_pattern(content.get("pre_tokenizer"), where)
    vocab = _read_vocab(model.get("vocab"), specials, where)
    merges = _read_merges(model["merges"], where)
    return _build(
        where,
        *(vocab, merges, specials, pattern),
        ignore_merges=bool(model.get("ignore_merges")),
        normalizer=normalizer,
        added_tokens=not_special,
    )


def _read_normalizer(normalizer: Any, where: str) -> str | None:
    """The name of a Unicode form, alone or as the only step of a Sequence."""
    if isinstance(normalizer, dict) and normalizer.get("type") == "Sequence":
        steps = normalizer.get("normalizers")
        if isinstance(steps, list) and len(steps) < 2:
            normalizer = steps[0] if steps else None
    if normalizer is None:
        return None
    kind = normalizer.get("type") if isinstance(normalizer, dict) else normalizer
    if isinstance(normalizer, dict) and isinstance(kind, str) and kind in FORMS:
        return kind
    raise UserError(f"{where}: the normalizer {str(kind)[:40]!r} is not supported; {', '.join(FORMS)} are")


def _read_pattern(pre_tokenizer: Any, where: str) -> str:
    """The pattern of ByteLevel alone, or of Split followed by ByteLevel."""
    steps: Any = [pre_tokenizer]
    if isinstance(pre_tokenizer, dict) and pre_tokenizer.get("type") == "Sequence":
        steps = pre_tokenizer.get("pretokenizers")
    if (
        not isinstance(steps, list)
        or not all(isinstance(step, dict) for step in steps)
        or not steps
        or steps[-1].get("type") != "ByteLevel"
    ):
        raise UserError(f"{where}: the pre-tokenizer does not end in ByteLevel; only byte-level BPE is supported")
    last = steps[-1]
    if last.get("add_prefix_space"):
        raise UserError(f"{where}: ByteLevel adds a prefix space, which would change the text; not supported")
    if len(steps) == 1 and last.get("use_regex", True):
        return "gpt2"
    if len(steps) == 2 and steps[0].get("type") == "Split" and not last.get("use_regex", True):
        split = steps[0]
        known = isinstance(split.get("pattern"), dict) and isinstance(split["pattern"].get("Regex"), str)
        whole = split.get("behavior") == "Isolated" or (split.get("behavior") == "Removed" and split.get("invert"))
        if known and whole:
            own = split.get("scratchlm_pattern")
            text = split["pattern"]["Regex"]
            return own if isinstance(own, str) and to_oniguruma(own) == text else from_oniguruma(text)
    kinds = ", ".join(str(step.get("type")) for step in steps)
    raise UserError(f"{where}: the pre-tokenizer ({kinds}) is not supported; ByteLevel or Split + ByteLevel are")
