"""The tokenizer: text ↔ ids, exactly.

text ──specials──► parts ──pattern──► pre-tokens ──cache / merges──► ids
"Hi<|endoftext|>ok ok"    Hi │ <|endoftext|> │ ok ␣ok         [17250, 50256, 482, 12876]

ids ──vocab──► bytes ──UTF-8, U+FFFD for what is none──► text
"""

from __future__ import annotations

import functools
import hashlib
import os
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from scratchlm.errors import UserError
from scratchlm.processes import Workers, cores
from scratchlm.tokenizer.encoder import WordCache
from scratchlm.tokenizer.normalization import check_form, normalised, raw_parts
from scratchlm.tokenizer.patterns import Pattern
from scratchlm.tokenizer.stream import SpecialSplitter, check_specials, settle

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

Allowed = Literal["all"] | Iterable[str]

# Long texts are encoded in parts about this long (characters): pre-tokens never all exist at once, and parts that are
# ASCII take the faster road.
_PART = 1 << 16
# encode_batch: below this many characters in all, helper processes cost more than they save.
_WORTH_HELPERS = 4 << 20
# encode_batch: characters that make one job of a helper.
_BATCH = 1 << 20
# Ids above this would make tables and embeddings of gigabytes from one misprinted number.
_MOST_IDS = 1 << 22


class Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016; Radford et al. 2019).

    Args:
        vocab: id → bytes, each byte string once, all 256 single bytes among them. Ids of ordinary tokens begin at 0 and leave
            no holes but those that special tokens fill.
        merges: pairs of tokens in the order they were learnt; both parts and the result must be in `vocab`.
        special_tokens: either a list (those whose bytes are not in `vocab` get the next free ids) or name → id. Ids given may lie
            beyond the last ordinary one and leave ids unused between, as cl100k_base's do.
        pattern: ``gpt2``, ``cl100k``, ``o200k`` or a pattern of the `regex` library.
        ignore_merges: a pre-token that is a token as a whole is taken so, even if merges would not lead there
            (`tokenizer.json` files of Llama 3 say so).
        normalizer: ``NFC`` (or NFD, NFKC, NFKD): text is normalised first, between special tokens; None: text as it is.
        added_tokens: those of `special_tokens` that are ordinary text to their users (``"special": false`` in a
            `tokenizer.json`, such as Qwen's ``<tool_call>``). They are kept whole like the others.

    Attributes:
        vocab: id → bytes, special tokens included.
        merges: the merges, in order.
        special_tokens: special token → id.
        pattern: name or text of the pre-tokenisation pattern.
        vocab_size: the highest id + 1: unused ids count, as they do in a model's embedding.
        content_hash: hex digest of all of the above; equal for equal tokenizers only.
        dtype: type of id arrays: uint16 up to 65,536 tokens, else uint32.

    Raises:
        UserError: `vocab`, `merges` or `special_tokens` contradict what is said above; the message names the entry.
    """

    def __init__(
        self,
        vocab: dict[int, bytes],
        merges: Iterable[tuple[bytes, bytes]],
        special_tokens: Iterable[str] | dict[str, int] | None = None,
        pattern: str = "gpt2",
        ignore_merges: bool = False,
        normalizer: str | None = None,
        added_tokens: Iterable[str] = (),
    ) -> None:
        self._pattern = Pattern(pattern)
        self.normalizer = check_form(normalizer)
        self.vocab: dict[int, bytes] = dict(vocab)
        self.merges: list[tuple[bytes, bytes]] = [_pair_of_bytes(rank, merge) for rank, merge in enumerate(merges)]
        self.ignore_merges = bool(ignore_merges)
        ids = self._ids_by_bytes()
        self.special_tokens: dict[str, int] = self._place_specials(special_tokens, ids)
        self.added_tokens = frozenset(self._named_specials(added_tokens, "added_tokens"))
        self._check_vocab(ids)
        self._vocab_size = max(self.vocab) + 1
        self._ids = ids
        self._byte_ids = [ids[bytes([byte])] for byte in range(256)]
        self._ranks = self._rank_table(ids)
        self._splitter = SpecialSplitter(self.special_tokens)
        self._cache = self._new_cache()

    # ---------------------------------------------------------------- construction

    def _ids_by_bytes(self) -> dict[bytes, int]:
        ids: dict[bytes, int] = {}
        for index, token in self.vocab.items():
            if type(index) is not int or not 0 <= index < _MOST_IDS:
                _check_id(index, f"vocab: {token!r}")
            if not isinstance(token, bytes) or not token:
                raise UserError(f"vocab: id {index} is {token!r}; every token must be non-empty bytes")
            if token in ids:
                raise UserError(
                    f"vocab: ids {ids[token]} and {index} are both {token!r}; every token must be unique"
                )
            ids[token] = index
        return ids

    def _place_specials(
        self, special_tokens: Iterable[str] | dict[str, int] | None, ids: dict[bytes, int]
    ) -> dict[str, int]:
        placed: dict[str, int] = {}
        for special in check_specials(special_tokens or ()):
            index = special_tokens[special] if isinstance(special_tokens, dict) else None
            if index is not None:
                _check_id(index, f"special token {special!r}")
            raw = special.encode("utf-8")
            known = ids.get(raw)
            if index is None:
                index = known if known is not None else max(self.vocab, default=-1) + 1
            if known not in (None, index):
                raise UserError(f"special token {special!r} shall have id {index}, but vocab has it at id {known}")
            if self.vocab.get(index, raw) != raw:
                raise UserError(
                    f"special token {special!r} shall have id {index}, which vocab gives to {self.vocab[index]!r}"
                )
            self.vocab[index] = raw
            ids[raw] = index
            placed[special] = index
        return placed

    def _check_vocab(self, ids: dict[bytes, int]) -> None:
        # Ids beyond the ordinary tokens may be unused: whoever placed special tokens there said so.
        last = max(self.vocab.keys() - self.special_tokens.values(), default=-1)
        for index in range(last):
            if index not in self.vocab:
                raise UserError(
                    f"vocab: id {index} is missing, though {self.vocab[last]!r} has id {last}; ids of ordinary tokens must "
                    f"run from 0 without holes"
                )
        for byte in range(256):
            if bytes([byte]) not in ids:
                raise UserError(f"vocab: the single byte {bytes([byte])!r} is missing; all 256 are needed")

    def _rank_table(self, ids: dict[bytes, int]) -> dict[int, int]:
        ranks: dict[int, int] = {}
        for rank, (left, right) in enumerate(self.merges):
            for token in (left, right, left + right):
                if token not in ids:
                    raise UserError(f"merge {rank} ({left!r}, {right!r}): {token!r} is not in vocab")
            pair = ids[left] << 32 | ids[right]
            if pair in ranks:
                raise UserError(
                    f"merge {rank} ({left!r}, {right!r}) is listed twice (first as {ranks[pair] >> 32})"
                )
            ranks[pair] = rank << 32 | ids[left + right]
        return ranks

    def _new_cache(self) -> WordCache:
        regular: dict[bytes, int] = {}
        if self.ignore_merges:
            special = set(self.special_tokens.values())
            regular = {token: index for token, index in self._ids.items() if index not in special}
        return WordCache(self._byte_ids, self._ranks, regular, "H" if self.dtype == np.uint16 else "I")

    def __reduce__(self) -> tuple[Any, ...]:
        return (
            Tokenizer,
            (
                *(self.vocab, self.merges, self.special_tokens, self.pattern),
                *(self.ignore_merges, self.normalizer, self.added_tokens),
            ),
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.content_hash == other.content_hash

    def __hash__(self) -> int:
        return hash(self.content_hash)

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, special_tokens={self.special_tokens}, pattern={self.pattern!r})"

    # ---------------------------------------------------------------- facts

    @property
    def pattern(self) -> str:
        return self._pattern.name

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def dtype(self) -> type[np.uint16] | type[np.uint32]:
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    @functools.cached_property
    def content_hash(self) -> str:
        digest = hashlib.blake2b(digest_size=16)

        def add(*fields: bytes) -> None:
            for field in fields:  # lengths first, so that no two contents are written alike
                digest.update(len(field).to_bytes(8, "little"))
                digest.update(field)

        add(b"byte-level bpe", self._pattern.text.encode("utf-8", "surrogatepass"), bytes([self.ignore_merges]))
        add(len(self.vocab).to_bytes(8, "little"))
        add(*(self.vocab[index] for index in sorted(self.vocab)))
        add(len(self.merges).to_bytes(8, "little"))
        for left, right in self.merges:
            add(left, right)
        for special, index in sorted(self.special_tokens.items()):
            add(special.encode("utf-8"), index.to_bytes(8, "little"))
        if self.normalizer is not None:
            add(b"normalizer", self.normalizer.encode())
        for special in sorted(self.added_tokens):
            add(b"added", special.encode("utf-8"))
        return digest.hexdigest()

    def token_bytes(self, id: int) -> bytes:
        """The bytes of one token.

        Raises:
            UserError: there is no such id.
        """
        return self.decode_bytes([id])

    # ---------------------------------------------------------------- encoding

    def encode(
        self, text: str | bytes, *, allowed_special: Allowed = "all", disallowed_special: Allowed = ()
    ) -> list[int]:
        """Ids of `text`. See :meth:`encode_array` for the arguments."""
        return self.encode_array(
            text, allowed_special=allowed_special, disallowed_special=disallowed_special
        ).tolist()

    def encode_array(
        self, text: str | bytes, *, allowed_special: Allowed = "all", disallowed_special: Allowed = ()
    ) -> np.ndarray:
        """Ids of `text` as an array.

        Args:
            text: a str, or UTF-8 bytes. Bytes that are not UTF-8 are kept: each stands for itself, as a character that
                is neither letter, number nor white space, so that ``decode_bytes(encode_array(b)) == b`` for any b.
            allowed_special: which special tokens are recognised in the text: ``"all"`` (the default), or those named;
                the others are encoded like ordinary text.
            disallowed_special: special tokens that must not occur: ``"all"`` means all that are not allowed. Nothing
                is disallowed by default.

        Returns:
            shape (number of tokens,), uint16 up to 65,536 tokens in the vocabulary, else uint32.

        Raises:
            UserError: a disallowed special token occurs, or the str holds a lone surrogate (position named).
        """
        splitter, forbidden = self._special_choice(allowed_special, disallowed_special)
        text = _checked(text)
        _refuse(forbidden, text)
        if self.normalizer is not None and not unicodedata.is_normalized(self.normalizer, text):
            return self._encode_normalised(text, splitter)
        # A bytearray, so that the array may be written to (torch warns of tensors over read-only memory).
        return np.frombuffer(bytearray().join(self._packed(text, splitter)), dtype=self.dtype)

    @functools.cached_property
    def _without_normalizer(self) -> Tokenizer:
        """The same, tables and caches shared, for text that is normalised already."""
        plain = object.__new__(Tokenizer)
        plain.__dict__.update(self.__dict__, normalizer=None)
        return plain

    def _encode_normalised(self, text: str, splitter: SpecialSplitter) -> np.ndarray:
        assert self.normalizer is not None
        pieces = []
        for index, part in enumerate(splitter.split(text)):
            if index % 2:
                pieces.append(np.array([self.special_tokens[part]], dtype=self.dtype))
            elif part:
                # As bytes: those that were no UTF-8 stand in the str as surrogates, which would be refused.
                raw = unicodedata.normalize(self.normalizer, part).encode("utf-8", "surrogateescape")
                pieces.append(self._without_normalizer.encode_array(raw, allowed_special=()))
        return np.concatenate(pieces)

    def _iterate_normalised(self, chunks: Iterable[str], splitter: SpecialSplitter) -> Iterator[int]:
        assert self.normalizer is not None
        parts = raw_parts(chunks, splitter)
        special: str | None = None

        def region() -> Iterator[str]:
            nonlocal special
            for text, special in parts:
                yield text
                if special is not None:
                    return

        while True:
            special = None
            text = normalised(region(), self.normalizer)
            yield from self._without_normalizer.encode_iterable(text, allowed_special=())
            if special is None:
                return
            yield self.special_tokens[special]

    def _packed(self, text: str, splitter: SpecialSplitter) -> Iterator[bytes]:
        """Raw ids of a text, part by part."""
        look_up = self._cache.__getitem__
        for index, part in enumerate(splitter.split(text)):
            if index % 2:
                yield self._special_packed(part)
                continue
            start = 0
            while (
                len(part) - start > 2 * _PART and (cut := self._pattern.safe_cut(part, start + _PART)) is not None
            ):
                yield b"".join(map(look_up, self._pattern.split(part[start:cut])))
                start = cut
            yield b"".join(map(look_up, self._pattern.split(part[start:] if start else part)))

    def _special_packed(self, special: str) -> bytes:
        return self.dtype(self.special_tokens[special]).tobytes()

    def _special_choice(
        self, allowed: Allowed, disallowed: Allowed
    ) -> tuple[SpecialSplitter, SpecialSplitter | None]:
        if allowed == "all" and not disallowed:
            return self._splitter, None
        allowed_set = self._named_specials(allowed, "allowed_special")
        disallowed_set = self._named_specials(disallowed, "disallowed_special")
        if disallowed == "all":
            disallowed_set -= allowed_set | self.added_tokens
        splitter = self._splitter if allowed == "all" else SpecialSplitter(allowed_set)
        return splitter, SpecialSplitter(disallowed_set) if disallowed_set else None

    def _named_specials(self, names: Allowed, argument: str) -> set[str]:
        if names == "all":
            return set(self.special_tokens)
        if isinstance(names, str):
            raise UserError(f'{argument} = {names!r}: give "all" or a set of special tokens')
        chosen = set(names)
        for name in chosen - set(self.special_tokens):
            raise UserError(f"{argument}: {name!r} is not a special token; there are {sorted(self.special_tokens)}")
        return chosen

    def encode_iterable(
        self, chunks: Iterable[str], *, allowed_special: Allowed = "all", disallowed_special: Allowed = ()
    ) -> Iterator[int]:
        """Ids of the joined `chunks`, lazily; the same as ``encode("".join(chunks))`` wherever chunks end.

        Memory holds a block of text and the longest pre-token, however long the text is. (A pre-token, such as a run of
        letters under gpt2, has no ids before its end is seen: its last byte can change its first merge.) Patterns without a name that
        look to their left or at the end of the text are held back until the next special token: see
        `scratchlm.tokenizer.stream`.

        Args:
            chunks: str of any lengths, e.g. an open text file.
            allowed_special, disallowed_special: as in :meth:`encode_array`; a disallowed one is found when reached.

        Raises:
            UserError: as in :meth:`encode_array`, or a chunk is not a str; when the iteration gets there.
        """
        splitter, forbidden = self._special_choice(allowed_special, disallowed_special)
        look_up = self._cache.__getitem__
        checked = _watched(map(_checked_chunk, chunks), forbidden)
        if self.normalizer is not None:
            yield from self._iterate_normalised(checked, splitter)
            return
        for pieces, special in settle(checked, self._pattern, splitter):
            yield from np.frombuffer(b"".join(map(look_up, pieces)), dtype=self.dtype).tolist()
            if special is not None:
                yield self.special_tokens[special]

    def encode_batch(
        self,
        texts: Iterable[str | bytes],
        threads: int | None = None,
        *,
        allowed_special: Allowed = "all",
        disallowed_special: Allowed = (),
    ) -> list[np.ndarray]:
        """:meth:`encode_array` of many texts.

        Args:
            texts: any iterable.
            threads: how many cores to use; None: all, where there is enough text for it.
            allowed_special, disallowed_special: as in :meth:`encode_array`.

        Returns:
            one array per text, in order; the same for any number of threads.
        """
        if threads is not None and threads < 1:
            raise UserError(f"threads = {threads}: at least one must do the work")
        texts = list(texts)
        options = {"allowed_special": allowed_special, "disallowed_special": disallowed_special}
        self._special_choice(allowed_special, disallowed_special)
        threads = min(threads or cores(), len(texts))
        if threads < 2 or sum(map(len, texts)) < _WORTH_HELPERS:
            return [self.encode_array(text, **options) for text in texts]
        with Workers(_BatchEncoder, (self, options), threads) as pool:
            return [array for batch in pool.map(_batches(texts)) for array in batch]

    # ---------------------------------------------------------------- decoding

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD.

        Raises:
            UserError: an id is not in the vocabulary; the message names it and its position.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of `ids` (a list, array or tensor of one dimension).

        Raises:
            UserError: an id is not in the vocabulary; the message names it and its position.
        """
        listed = ids.tolist() if hasattr(ids, "tolist") else ids
        if not isinstance(listed, Iterable):
            raise UserError(f"cannot decode {ids!r}: give a list of ids, or an array or tensor of one dimension")
        listed = list(listed)
        try:
            return b"".join(map(self.vocab.__getitem__, listed))
        except (KeyError, TypeError) as error:
            for position, index in enumerate(listed):
                if not isinstance(index, (int, np.integer)) or index not in self.vocab:
                    raise UserError(self._unknown_id(index, position)) from error
            raise

    def _unknown_id(self, index: Any, position: int) -> str:
        """What to say of an id that stands for nothing."""
        where = f"id {index!r} at position {position} is not in the vocabulary"
        if isinstance(index, (int, np.integer)) and 0 <= index < self.vocab_size:
            return f"{where}: no token has it, it is one of {self.vocab_size - len(self.vocab):,} ids left unused"
        return f"{where} of {len(self.vocab)} tokens (0 to {self.vocab_size - 1})"

    # ---------------------------------------------------------------- files and other libraries

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write `tokenizer.json` (Hugging Face format), atomically; see `scratchlm.tokenizer.files`."""
        from scratchlm.tokenizer.files import save_tokenizer_json

        return save_tokenizer_json(self, path)

    def save_gpt2(self, folder: str | os.PathLike[str]) -> None:
        """Write GPT-2's pair of files, `vocab.json` and `merges.txt`, into `folder`."""
        from scratchlm.tokenizer.files import save_gpt2

        save_gpt2(self, folder)

    def save_tiktoken(self, path: str | os.PathLike[str]) -> Path:
        """Write tiktoken's rank file, atomically; see `scratchlm.tokenizer.tiktoken_files`."""
        from scratchlm.tokenizer.tiktoken_files import save_tiktoken

        return save_tiktoken(self, path)

    def as_tiktoken(self) -> tiktoken.Encoding:
        """A live `tiktoken.Encoding` that gives the same ids.

        Raises:
            UserError: tiktoken is not installed, or cannot do what this tokenizer does (the message says which).
        """
        from scratchlm.tokenizer.tiktoken_files import as_tiktoken

        return as_tiktoken(self)

    def as_hf(self) -> tokenizers.Tokenizer:
        """A live `tokenizers.Tokenizer` of Hugging Face that gives the same ids.

        Raises:
            UserError: `tokenizers` is not installed, or a special token cannot be told from another token there.
        """
        from scratchlm.tokenizer.files import as_hf

        return as_hf(self)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Read a `tokenizer.json`, a folder that holds one, or a rank file whose name tells its pattern (cl100k_base.tiktoken)."""
        from scratchlm.tokenizer.files import load

        return load(path)

    @classmethod
    def from_tiktoken(
        cls,
        path: str | os.PathLike[str],
        pattern: str | None = None,
        special_tokens: Iterable[str] | dict[str, int] | None = None,
    ) -> Tokenizer:
        """Read tiktoken's rank file; ids are its ranks. See `scratchlm.tokenizer.tiktoken_files.load_tiktoken`."""
        from scratchlm.tokenizer.tiktoken_files import load_tiktoken

        return load_tiktoken(path, pattern, special_tokens)

    @classmethod
    def from_files(
        cls,
        vocab_json: str | os.PathLike[str],
        merges_txt: str | os.PathLike[str],
        special_tokens: Iterable[str] | dict[str, int] | None = None,
        pattern: str = "gpt2",
    ) -> Tokenizer:
        """Read GPT-2's pair of files; ids are what `vocab_json` says."""
        from scratchlm.tokenizer.files import load_gpt2

        return load_gpt2(vocab_json, merges_txt, special_tokens, pattern)


def _check_id(index: Any, what: str) -> None:
    if not isinstance(index, (int, np.integer)) or isinstance(index, bool) or not 0 <= index < _MOST_IDS:
        raise UserError(f"{what} has the id {index!r}; ids are whole numbers from 0 to {_MOST_IDS - 1:,}")


def _pair_of_bytes(rank: int, merge: Any) -> tuple[bytes, bytes]:
    match merge:
        case (bytes() as left, bytes() as right):
            return left, right
    raise UserError(f"merge {rank} is {merge!r}; every merge must be a pair of bytes")


class _BatchEncoder:
    """Handler of a helper process of :meth:`Tokenizer.encode_batch`."""

    def __init__(self, tokenizer: Tokenizer, options: dict[str, Any]) -> None:
        self._tokenizer, self._options = tokenizer, options

    def __call__(self, texts: list[str | bytes]) -> list[np.ndarray]:
        return [self._tokenizer.encode_array(text, **self._options) for text in texts]


def _batches(texts: list[str | bytes]) -> Iterator[list[str | bytes]]:
    batch: list[str | bytes] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _checked(text: str | bytes) -> str:
    """A str without lone surrogates, or bytes as one (undecodable bytes as surrogates: lossless both ways)."""
    if isinstance(text, str):
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise UserError(
                    f"the text holds a lone surrogate at character {error.start}, which UTF-8 cannot hold; "
                    f"remove it, or give bytes"
                ) from error
        return text
    if isinstance(text, (bytes, bytearray, memoryview)):
        return bytes(text).decode("utf-8", "surrogateescape")
    raise UserError(f"cannot encode a {type(text).__name__}; give a str or UTF-8 bytes")


def _checked_chunk(chunk: str) -> str:
    # Bytes are refused: a character cut in two by the end of a chunk would come out as two.
    if not isinstance(chunk, str):
        raise UserError(f"encode_iterable got a chunk of type {type(chunk).__name__}; open files as text (UTF-8)")
    return _checked(chunk)


def _refuse(forbidden: SpecialSplitter | None, text: str, offset: int = 0) -> None:
    match = forbidden.search(text, 0) if forbidden else None
    if match:
        raise UserError(
            f"the text holds the disallowed special token {match.group()!r} at character {offset + match.start()}; "
            f"allow it (allowed_special), or take it out of disallowed_special to encode it as ordinary text"
        )


def _watched(chunks: Iterable[str], forbidden: SpecialSplitter | None) -> Iterator[str]:
    """`chunks`, refusing disallowed special tokens, also those that straddle chunks."""
    tail = ""
    seen = 0
    for chunk in chunks:
        if forbidden:
            _refuse(forbidden, tail + chunk, seen - len(tail))
            tail = (tail + chunk)[-(forbidden.longest - 1) :] if forbidden.longest > 1 else ""
        seen += len(chunk)
        yield chunk
