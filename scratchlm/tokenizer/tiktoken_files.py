r"""tiktoken's rank files: one token a line, its bytes in base64 and its rank, which is its id.

    IQ== 0              !
    dGg= 256            th
    dGhl 257            the

There are no merges in it. tiktoken joins, of all adjacent pieces whose *concatenation* is a token, those of the lowest rank; it asks
for no pair. Yet every token can be made in one way only. What happens inside the bytes of a token depends on nothing outside as
long as no merge crosses their edges, so it is what happens to these bytes alone:

    t h e       th: 256  he: 300
    th e        the: 257                ──►  merge (th, e), rank 257

Where two pieces are left, they are the pair. So a list with one pair per token, by rank, gives tiktoken's ids for *any* ranks.
Where more are left, merging never makes the token; tiktoken then finds it only as a whole pre-token (`ignore_merges`).

The file holds neither pattern nor special tokens. Those of well-known files are told by the file's name.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import regex

from scratchlm.errors import UserError
from scratchlm.files import write_bytes
from scratchlm.tokenizer.dialects import to_fancy_regex
from scratchlm.tokenizer.patterns import PATTERNS
from scratchlm.tokenizer.reading import read_file
from scratchlm.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    import tiktoken

# Nothing that is learnt from text comes near; finding how a token is made takes the square of its length.
_LONGEST_TOKEN = 1 << 14
# Texts in which a pattern that can match nothing does so.
_SHORT = ("", "a", "1", " ", "\n", ".")


@dataclass(frozen=True)
class Known:
    """What a well-known rank file does not hold.

    Attributes:
        ranks: how many it has.
        pattern: name or text of the pattern.
        special_tokens: special token → id.
        normalizer: what its users apply before.
    """

    ranks: int
    pattern: str
    special_tokens: dict[str, int]
    normalizer: str | None = None


_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_PATTERN = _LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")


def _numbered(names: Iterable[str], first: int) -> dict[str, int]:
    return {f"<|{name}|>": first + index for index, name in enumerate(names)}


def _llama3_names() -> list[str]:
    # Llama 3; later releases gave some of the reserved ones a name.
    reserved = [f"reserved_special_token_{index}" for index in range(251)]
    return [
        *("begin_of_text", "end_of_text", *reserved[:4], "start_header_id", "end_header_id"),
        *(reserved[4], "eot_id", *reserved[5:]),
    ]


def _harmony() -> dict[str, int]:
    named = {
        199_998: "startoftext",
        199_999: "endoftext",
        200_002: "return",
        200_003: "constrain",
        200_005: "channel",
    }
    named |= {200_006: "start", 200_007: "end", 200_008: "message", 200_012: "call", 200_018: "endofprompt"}
    # The published list has <|reserved_200018|> as a second name of 200018; here an id has one.
    return {f"<|{named.get(index, f'reserved_{index}')}|>": index for index in range(199_998, 201_088)}


_FIM = ("fim_prefix", "fim_middle", "fim_suffix")
_END = {"<|endoftext|>": 50256}

KNOWN: dict[str, Known] = {
    "r50k_base": Known(50_256, "gpt2", _END),
    "p50k_base": Known(50_280, "gpt2", _END),
    "p50k_edit": Known(50_280, "gpt2", _END | _numbered(_FIM, 50_281)),
    "cl100k_base": Known(
        100_256, "cl100k", _numbered(("endoftext", *_FIM), 100_257) | {"<|endofprompt|>": 100_276}
    ),
    "o200k_base": Known(199_998, "o200k", {"<|endoftext|>": 199_999, "<|endofprompt|>": 200_018}),
    "o200k_harmony": Known(199_998, "o200k", _harmony()),
    "llama3": Known(128_000, _LLAMA3_PATTERN, _numbered(_llama3_names(), 128_000)),
    "qwen": Known(
        151_643,
        _QWEN_PATTERN,
        _numbered(("endoftext", "im_start", "im_end", *(f"extra_{index}" for index in range(205))), 151_643),
        "NFC",
    ),
}
"""Name of an encoding → what its rank file does not say."""


def known_name(path: Path) -> str | None:
    """Which of :data:`KNOWN` a file's name says it is."""
    if path.name == "tokenizer.model":  # as Meta names Llama 3's
        return "llama3"
    return path.stem if path.suffix == ".tiktoken" and path.stem in KNOWN else None


# -------------------------------------------------------------------- reading


def read_ranks(path: str | os.PathLike[str]) -> dict[bytes, int]:
    """Token → rank, in the order of ranks.

    Raises:
        UserError: the file is missing, empty, a folder, too large to be one, or a line is not a token in base64 and a rank of
            its own (the line is named).
    """
    path = Path(path)
    ranks: dict[bytes, int] = {}
    lines: dict[int, int] = {}
    for number, line in enumerate(read_file(path, "rank file").split(b"\n"), 1):
        fields = line.split()
        if not fields:
            continue
        try:
            token, rank = base64.b64decode(fields[0], validate=True), int(fields[1] if len(fields) == 2 else "")
        except (binascii.Error, ValueError) as error:
            hint = "a SentencePiece model, perhaps" if path.suffix == ".model" else "of another kind, or cut off"
            shown = line[:40].decode("utf-8", "backslashreplace")
            raise UserError(
                f"rank file {path}: line {number} ({shown!r}) is not a token in base64 and its rank; the file is {hint}"
            ) from error
        if not token:
            raise UserError(f"rank file {path}: line {number} is an empty token")
        if len(token) > _LONGEST_TOKEN:
            raise UserError(
                f"rank file {path}: line {number} is a token of {len(token):,} bytes; at most {_LONGEST_TOKEN:,} are expected"
            )
        if rank in lines:
            raise UserError(
                f"rank file {path}: rank {rank} stands in line {lines[rank]} and in line {number}; the file may be cut off"
            )
        if token in ranks:
            raise UserError(
                f"rank file {path}: token {token!r} stands in line {lines[ranks[token]]} and in line {number}"
            )
        ranks[token], lines[rank] = rank, number
    if not ranks:
        raise UserError(f"rank file {path} is empty")
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


def _last_pieces(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """What tiktoken joins the bytes of `token` to, up to the step that would make `token` itself."""
    never = 1 << 62
    find = ranks.get
    pieces = [token[index : index + 1] for index in range(len(token))]
    found = [find(token[index : index + 2], never) for index in range(len(token) - 1)]
    while len(pieces) > 2:
        best = min(found)
        if best == never:
            break
        place = found.index(best)
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
        del found[place]
        if place:
            found[place - 1] = find(pieces[place - 1] + pieces[place], never)
        if place < len(found):
            found[place] = find(pieces[place] + pieces[place + 1], never)
    return pieces


def merges_of(ranks: dict[bytes, int]) -> tuple[list[tuple[bytes, bytes]], list[bytes]]:
    """The merges behind ranks, and the tokens that no merge makes.

    Args:
        ranks: token → rank; all 256 single bytes among them.

    Returns:
        pairs of tokens in the order of their results' ranks; tokens of several bytes that are only ever found whole.
    """
    merges, whole = [], []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) > 1:
            pieces = _last_pieces(token, ranks)
            if len(pieces) == 2:
                merges.append((pieces[0], pieces[1]))
            else:
                whole.append(token)
    return merges, whole


def load_tiktoken(
    path: str | os.PathLike[str],
    pattern: str | None = None,
    special_tokens: Iterable[str] | dict[str, int] | None = None,
    name: str | None = None,
) -> Tokenizer:
    """Read a rank file.

    Args:
        path: the file.
        pattern: name or text of the pre-tokenisation pattern; None: what `name` says.
        special_tokens: name → id, or a list of which each gets the next id; None: what `name` says.
        name: one of :data:`KNOWN`; None: what the file's name says (``cl100k_base.tiktoken``, ``tokenizer.model`` for Llama 3 …).

    Raises:
        UserError: the file is damaged (see :func:`read_ranks`), a byte has no token, ids leave holes, a well-known file has not
            as many ranks as it should, or the pattern is neither given nor known.
    """
    path = Path(path)
    if name is not None and name not in KNOWN:
        raise UserError(f"{name!r} is no well-known encoding; there are {', '.join(KNOWN)}")
    name = name or known_name(path)
    known = None if name is None or (pattern is not None and special_tokens is not None) else KNOWN[name]
    if pattern is None and known is None:
        raise UserError(
            f"rank file {path} does not hold its pattern, and its name is none of {', '.join(KNOWN)}: give the pattern "
            f"(and the special tokens), as `scratchlm tokenizer convert --pattern` does"
        )
    ranks = read_ranks(path)
    if known is not None and len(ranks) != known.ranks:
        raise UserError(
            f"rank file {path} has {len(ranks):,} tokens, {name} has {known.ranks:,}: it is cut off or of another kind; if it is "
            f"meant to be so, give pattern and special tokens"
        )
    if pattern is None and known is not None:
        pattern = known.pattern
    if special_tokens is None:
        special_tokens = known.special_tokens if known is not None else {}
    missing = next((byte for byte in range(256) if bytes([byte]) not in ranks), None)
    if missing is not None:
        raise UserError(f"rank file {path}: the single byte {bytes([missing])!r} has no rank; all 256 are needed")
    merges, whole = merges_of(ranks)
    vocab = {rank: token for token, rank in ranks.items()}
    try:
        return Tokenizer(
            *(vocab, merges, special_tokens, pattern or "gpt2"),
            ignore_merges=bool(whole),
            normalizer=known.normalizer if known is not None else None,
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


# -------------------------------------------------------------------- writing


def ranks_of(tokenizer: Tokenizer) -> dict[bytes, int]:
    """The ranks that make tiktoken give a tokenizer's ids.

    Raises:
        UserError: there are none; what tiktoken cannot do is named.
    """
    if tokenizer.normalizer is not None:
        raise UserError(f"tiktoken does not normalise text, and this tokenizer does ({tokenizer.normalizer})")
    merged = {token for left, right in tokenizer.merges for token in (left, right, left + right)}
    special = set(tokenizer.special_tokens.values())
    ranks = {
        token: index
        for index, token in sorted(tokenizer.vocab.items())
        if index not in special or len(token) == 1 or token in merged
    }
    merges, whole = merges_of(ranks)
    makes = [left + right for left, right in tokenizer.merges]
    for rank, (ours, theirs) in enumerate(zip(tokenizer.merges, merges, strict=False)):
        if ours != theirs:
            raise UserError(
                f"tiktoken merges by the id of the result, and would do ({theirs[0]!r}, {theirs[1]!r}) where this tokenizer has "
                f"merge {rank}, ({ours[0]!r}, {ours[1]!r}): its ids are not in the order of its merges"
            )
    if len(makes) > len(merges):
        rank = len(merges)
        raise UserError(f"merge {rank} makes {makes[rank]!r}, which tiktoken's order of merging never makes")
    extra = [b"".join(pair) for pair in merges[len(makes) :]] + ([] if tokenizer.ignore_merges else whole)
    if extra:
        raise UserError(
            f"token {extra[0]!r} (id {ranks[extra[0]]}) is made by no merge of this tokenizer; tiktoken would use it all the same"
        )
    return ranks


def save_tiktoken(tokenizer: Tokenizer, path: str | os.PathLike[str]) -> Path:
    """Write a rank file, atomically. Pattern and special tokens are not in it: :func:`load_tiktoken` must be given them.

    Args:
        tokenizer: any whose ids are in the order of its merges, as trained ones' are.
        path: the file, usually ``<name>.tiktoken``.

    Returns:
        the file.

    Raises:
        UserError: tiktoken could not give the same ids (what it cannot do is named), or the disk refuses.
    """
    path = Path(path)
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks_of(tokenizer).items()]
    write_bytes(path, b"".join(lines))
    return path


def as_tiktoken(tokenizer: Tokenizer, name: str = "scratchlm") -> tiktoken.Encoding:
    """A live `tiktoken.Encoding`; ``encode(text, allowed_special="all")`` gives the ids of ours.

    Raises:
        UserError: tiktoken is not installed or cannot do what this tokenizer does (it is named).
    """
    try:
        import tiktoken
    except ImportError as error:
        raise UserError("tiktoken is not installed: pip install 'scratchlm[oracles]'") from error
    for special in tokenizer.special_tokens:
        longer = next((s for s in tokenizer.special_tokens if s != special and s.startswith(special)), None)
        if longer is not None:
            raise UserError(
                f"special token {special!r} begins {longer!r}; tiktoken may then find either, this tokenizer the longer"
            )
    # tiktoken drops what its pattern leaves out, where ours makes it a pre-token: the last alternative takes it.
    written = to_fancy_regex(tokenizer.pattern)
    if tokenizer.pattern not in PATTERNS:
        compiled = regex.compile(tokenizer.pattern)
        if any(match.start() == match.end() for text in _SHORT for match in compiled.finditer(text)):
            raise UserError(f"the pattern {tokenizer.pattern!r} can match nothing at all, which tiktoken cannot do")
        written = f"{written}|(?:(?!{written})[\\s\\S])+"
    try:
        return tiktoken.Encoding(
            name, pat_str=written, mergeable_ranks=ranks_of(tokenizer), special_tokens=tokenizer.special_tokens
        )
    except ValueError as error:
        raise UserError(f"tiktoken cannot read the pattern {tokenizer.pattern!r}: {error}") from error
