"""The tokenizer: text ↔ ids, exactly.

text ──specials──► parts ──pattern──► pre-tokens ──cache / merges──► ids
"Hi<|endoftext|>ok ok"    Hi │ <|endoftext|> │ ok ␣ok         [17250, 50256, 482, 12876]

ids ──vocab──► bytes ──UTF-8, U+FFFD for what is none──► text
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scratchlm.errors import UserError
from scratchlm.tokenizer.decoder import Decoder
from scratchlm.tokenizer.encoding import Allowed, TextEncoder, named_specials
from scratchlm.tokenizer.normalization import check_form
from scratchlm.tokenizer.patterns import Pattern
from scratchlm.tokenizer.stream import check_specials

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

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
        cache_bytes: most memory of the table of known words, for each thread that encodes. It grows with the text up to this;
            when it is full, new words take the places of old ones. No effect on ids.

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
        cache_bytes: int = 64 << 20,
    ) -> None:
        self._pattern = Pattern(pattern)
        self.normalizer = check_form(normalizer)
        self.vocab: dict[int, bytes] = dict(vocab)
        self.merges: list[tuple[bytes, bytes]] = [_pair_of_bytes(rank, merge) for rank, merge in enumerate(merges)]
        self.ignore_merges = bool(ignore_merges)
        ids = self._ids_by_bytes()
        self.special_tokens: dict[str, int] = self._place_specials(special_tokens, ids)
        self.added_tokens = frozenset(named_specials(added_tokens, "added_tokens", self.special_tokens))
        self._check_vocab(ids)
        self._vocab_size = max(self.vocab) + 1
        self._ids = ids
        self._byte_ids = [ids[bytes([byte])] for byte in range(256)]
        self._ranks = self._rank_table(ids)
        self.cache_bytes = cache_bytes
        self._encoder = self._new_encoder()
        self._decoder = Decoder(self.vocab, self._vocab_size)

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

    def _new_encoder(self) -> TextEncoder:
        regular: dict[bytes, int] = {}
        if self.ignore_merges:
            special = set(self.special_tokens.values())
            regular = {token: index for token, index in self._ids.items() if index not in special}
        return TextEncoder(
            self._pattern, self._byte_ids, self._ranks, regular, self.special_tokens, self.added_tokens,
            self.normalizer, self._vocab_size, self.dtype, self.cache_bytes,
        )  # fmt: skip

    def __reduce__(self) -> tuple[Any, ...]:
        return (
            Tokenizer,
            (
                *(self.vocab, self.merges, self.special_tokens, self.pattern),
                *(self.ignore_merges, self.normalizer, self.added_tokens, self.cache_bytes),
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

    @property
    def releases_lock(self) -> bool:
        """Whether long texts are encoded without Python's lock, so that threads encode side by side."""
        return self._encoder.releases_lock

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
        self,
        text: str | bytes,
        *,
        allowed_special: Allowed = "all",
        disallowed_special: Allowed = (),
        threads: int = 1,
    ) -> np.ndarray:
        """Ids of `text` as an array.

        Args:
            text: a str, or UTF-8 bytes. Bytes that are not UTF-8 are kept: each stands for itself, as a character that
                is neither letter, number nor white space, so that ``decode_bytes(encode_array(b)) == b`` for any b.
            allowed_special: which special tokens are recognised in the text: ``"all"`` (the default), or those named;
                the others are encoded like ordinary text.
            disallowed_special: special tokens that must not occur: ``"all"`` means all that are not allowed. Nothing
                is disallowed by default.
            threads: how many cores may work on a long text; the ids are the same.

        Returns:
            shape (number of tokens,), uint16 up to 65,536 tokens in the vocabulary, else uint32.

        Raises:
            UserError: a disallowed special token occurs, or the str holds a lone surrogate (position named).
        """
        return self._encoder.encode_array(text, allowed_special, disallowed_special, threads)

    def count_tokens(
        self, text: str | bytes, *, allowed_special: Allowed = "all", disallowed_special: Allowed = ()
    ) -> int:
        """``len(encode_array(text))``, in memory that does not grow with `text`."""
        return self._encoder.count_tokens(text, allowed_special, disallowed_special)

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
        return self._encoder.encode_iterable(chunks, allowed_special, disallowed_special)

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
        return self._encoder.encode_batch(texts, threads, allowed_special, disallowed_special)

    # ---------------------------------------------------------------- decoding

    def encode_documents(self, data: bytes, sizes: np.ndarray, separator_id: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids of documents that lie one behind the other in `data`, each followed by the separator: what token shards hold.

        Text that spells a special token is ordinary text here: a document cannot forge a separator.

        Args:
            data: the UTF-8 of all documents, joined.
            sizes: bytes of each document, int64, shape (documents,).
            separator_id: the id behind each of them.

        Returns:
            all ids in one array, and the number of each document's ids with its separator, int64, shape (documents,).
        """
        return self._encoder.encode_documents(data, sizes, separator_id)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD.

        Raises:
            UserError: an id is not in the vocabulary; the message names it and its position.
        """
        return self._decoder.decode(ids)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of `ids` (a list, array or tensor of one dimension).

        Raises:
            UserError: an id is not in the vocabulary; the message names it and its position.
        """
        return self._decoder.decode_bytes(ids)

    def decode_batch(self, batch: Iterable[Iterable[int]]) -> list[str]:
        """:meth:`decode` of many lists of ids.

        Raises:
            UserError: as in :meth:`decode`; the message also says in which of them.
        """
        return self._decoder.decode_batch(batch)

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
