"""Text → ids: which special tokens count, which road a text takes, and many texts at a time.

    a few lines      str ──`re`──► pre-tokens ──dict──► ids          `encoder`: plain Python, ready at once
    anything longer  bytes ──scanner──► spans ──word table──► ids    `fast_encoder`: compiled, a hundred times as fast

Both give the same ids. The compiled road costs half a second of imports once per process (and some seconds of compiling once
per machine), so it is taken when a text, or all texts so far, are worth it: while nothing is compiled on this machine yet, when plain Python
would take about as long for them as compiling does.
"""

from __future__ import annotations

import functools
import time
import unicodedata
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from scratchlm.errors import UserError
from scratchlm.processes import cores
from scratchlm.tokenizer.encoder import WordCache
from scratchlm.tokenizer.normalization import Form, normalised, raw_parts
from scratchlm.tokenizer.patterns import Pattern
from scratchlm.tokenizer.regions import SpecialSearch
from scratchlm.tokenizer.scanner import scanner_for
from scratchlm.tokenizer.stream import SpecialSplitter, settle
from scratchlm.tokenizer.utf8 import utf8

if TYPE_CHECKING:
    from scratchlm.tokenizer.fast_encoder import FastEncoder

Allowed = Literal["all"] | Iterable[str]
Text = str | bytes | bytearray | memoryview

# The plain road: texts up to this long, always.
_SMALL = 1 << 10
# … and, as long as the compiled road has not been needed, these: one text, and all texts together.
_FIRST = 1 << 16
_FIRST_TOTAL = 1 << 19
# … and, where the compiled road would first have to be compiled, all texts together, as long as they have not taken this many seconds.
_FIRST_EVER = 1 << 24
_PATIENCE = 4.0
# encode_batch: text for each thread below which it is not worth starting.
_WORTH_THREAD = 1 << 18
# Long texts go the plain road in parts about this long (characters): pre-tokens never all exist at once, and
# parts that are ASCII take the faster pattern.
_PART = 1 << 16


class TextEncoder:
    """Encodes for a `Tokenizer`, whose methods document the arguments.

    Args:
        pattern: how text is cut into pre-tokens.
        byte_ids: id of each single byte.
        ranks: the rank table (see `encoder`).
        whole: byte strings that are taken as one token without merging.
        special_tokens: special token → id.
        added_tokens: those that are not disallowed by "all".
        normalizer: the normal form, or None.
        vocab_size: the highest id + 1.
        dtype: uint16 or uint32.
        cache_bytes: most memory of each thread's word table.
    """

    def __init__(
        self,
        pattern: Pattern,
        byte_ids: list[int],
        ranks: dict[int, int],
        whole: dict[bytes, int],
        special_tokens: dict[str, int],
        added_tokens: frozenset[str],
        normalizer: Form | None,
        vocab_size: int,
        dtype: type[np.uint16] | type[np.uint32],
        cache_bytes: int,
    ) -> None:
        self._pattern = pattern
        self._byte_ids = byte_ids
        self._ranks = ranks
        self._whole = whole
        self._special_tokens = special_tokens
        self._added_tokens = added_tokens
        self._normalizer = normalizer
        self._dtype = dtype
        self._cache_bytes = cache_bytes
        self._words = WordCache(byte_ids, ranks, whole, "H" if dtype == np.uint16 else "I")
        self._specials = _Specials(special_tokens, special_tokens)
        self._fast_encoder: FastEncoder | None = None
        self._scanned = scanner_for(pattern.text) is not None
        # Ids and ranks must fit a row of `merge_table`.
        self._can_compile = len(ranks) < 1 << 22 and vocab_size < 1 << 21
        self._at_work = _FirstTime()

    @property
    def releases_lock(self) -> bool:
        return self._scanned and self._normalizer is None and self._can_compile

    # ---------------------------------------------------------------- one text

    def encode_array(self, text: Text, allowed: Allowed, disallowed: Allowed, threads: int = 1) -> np.ndarray:
        specials, forbidden = self.special_choice(allowed, disallowed)
        text = self._ready(text, forbidden)
        return self._encode(text, specials, threads)

    def count_tokens(self, text: Text, allowed: Allowed, disallowed: Allowed) -> int:
        specials, forbidden = self.special_choice(allowed, disallowed)
        text = self._ready(text, forbidden)
        if not self._compiled_for(len(text)) or not self._normal(text):
            return len(self._encode(text, specials))
        data = utf8(text)
        return self._fast.count(data, specials.search.regions(data, 0, len(data)))

    def _ready(self, text: Text, forbidden: SpecialSplitter | None) -> Text:
        """`text` without lone surrogates and forbidden special tokens; a long str may have become its UTF-8."""
        if isinstance(text, str) and len(text) > _FIRST and not forbidden and self._normalizer is None:
            return utf8(text, self._fast.buffers) if self._compiled_for(len(text)) else _checked(text)
        text = _checked(text)
        _refuse(forbidden, text)
        return text

    def _encode(self, text: Text, specials: _Specials, threads: int = 1, counted: bool = False) -> np.ndarray:
        if not self._normal(text):
            return self._encode_normalised(_as_str(text), specials)
        compiled = self._compiled_for(len(text))
        if not counted:
            self._count(len(text))
        if not compiled:
            much = len(text) > _FIRST or self._at_work.seen > _FIRST_TOTAL
            first = much and self._can_compile and self._fast_encoder is None
            return (self._at_first if first else self._plain)(_as_str(text), specials)
        data = utf8(text)
        return self._fast.encode(data, specials.search.regions(data, 0, len(data)), threads)

    def _plain(self, text: str, specials: _Specials) -> np.ndarray:
        # A bytearray, so that the array may be written to (torch warns of tensors over read-only memory).
        return np.frombuffer(bytearray().join(self._packed(text, specials)), dtype=self._dtype)

    def _packed(self, text: str, specials: _Specials) -> Iterator[bytes]:
        """Raw ids of a text, part by part."""
        look_up = self._words.__getitem__
        for index, part in enumerate(specials.splitter.split(text)):
            if index % 2:
                yield self._dtype(self._special_tokens[part]).tobytes()
                continue
            for start, stop in self._pieces(part):
                yield b"".join(map(look_up, self._pattern.split(part[start:stop])))

    def _pieces(self, part: str) -> Iterator[tuple[int, int]]:
        """Where `part` may be cut into pieces of about `_PART`."""
        start = 0
        while len(part) - start > 2 * _PART and (cut := self._pattern.safe_cut(part, start + _PART)) is not None:
            yield start, cut
            start = cut
        yield start, len(part)

    def _at_first(self, text: str, specials: _Specials) -> np.ndarray:
        """The plain road while that takes less than compiling would; then the rest of `text`, and all texts to come, on the compiled one."""
        look_up, at_work = self._words.__getitem__, self._at_work
        found, at = [np.empty(0, self._dtype)], 0
        for index, part in enumerate(specials.splitter.split(text)):
            if index % 2:
                found.append(np.array([self._special_tokens[part]], self._dtype))
                at += len(part)
                continue
            if not part:
                continue
            for start, stop in self._pieces(part):
                if at_work.patience <= 0 or stop - start > 4 * _PART:  # what cannot be cut may be one long word
                    rest = text[at + start :].encode("utf-8", "surrogateescape")
                    found.append(self._fast.encode(rest, specials.search.regions(rest, 0, len(rest))))
                    return np.concatenate(found)
                began = time.perf_counter()
                ids = b"".join(map(look_up, self._pattern.split(part[start:stop])))
                found.append(np.frombuffer(ids, self._dtype))
                at_work.patience -= time.perf_counter() - began
            at += len(part)
        return np.concatenate(found)

    def _compiled_for(self, size: int) -> bool:
        """Whether a text of `size` takes the compiled road."""
        if size <= _SMALL or not self._can_compile:
            return False
        if self._fast_encoder is not None:
            return True
        total = self._at_work.seen + size
        if size <= _FIRST and total <= _FIRST_TOTAL:
            return False
        return total > _FIRST_EVER or _compiled_before()

    def _count(self, size: int) -> None:
        if self._fast_encoder is None and size > _SMALL:
            self._at_work.seen += size

    @property
    def _fast(self) -> FastEncoder:
        if self._fast_encoder is None:
            from scratchlm.tokenizer.compiling import compiling

            with compiling("the encoder"):
                from scratchlm.tokenizer.fast_encoder import FastEncoder

                fast = FastEncoder(
                    self._pattern, self._byte_ids, self._ranks, self._whole, self._dtype, self._cache_bytes
                )
                fast.warm_up()
            self._fast_encoder = fast
        return self._fast_encoder

    # ---------------------------------------------------------------- normal forms

    def _normal(self, text: Text) -> bool:
        return self._normalizer is None or unicodedata.is_normalized(self._normalizer, _as_str(text))

    def _encode_normalised(self, text: str, specials: _Specials) -> np.ndarray:
        assert self._normalizer is not None
        pieces = []
        for index, part in enumerate(specials.splitter.split(text)):
            if index % 2:
                pieces.append(np.array([self._special_tokens[part]], dtype=self._dtype))
            elif part:
                # As bytes: those that were no UTF-8 stand in the str as surrogates, which would be refused.
                raw = unicodedata.normalize(self._normalizer, part).encode("utf-8", "surrogateescape")
                pieces.append(self._without_normalizer._encode(raw, _Specials({}, self._special_tokens)))
        return np.concatenate(pieces)

    @functools.cached_property
    def _without_normalizer(self) -> TextEncoder:
        """The same, tables and caches shared, for text that is normalised already."""
        plain = object.__new__(TextEncoder)
        plain.__dict__.update(self.__dict__, _normalizer=None)
        return plain

    # ---------------------------------------------------------------- text in chunks

    def encode_iterable(self, chunks: Iterable[str], allowed: Allowed, disallowed: Allowed) -> Iterator[int]:
        specials, forbidden = self.special_choice(allowed, disallowed)
        checked = _watched(map(_checked_chunk, chunks), forbidden)
        if self._normalizer is None:
            yield from self._iterate(checked, specials)
        else:
            yield from self._iterate_normalised(checked, specials)

    def _iterate(self, chunks: Iterable[str], specials: _Specials) -> Iterator[int]:
        look_up = self._words.__getitem__
        nothing = _Specials({}, self._special_tokens)
        for pieces, special, text in settle(chunks, self._pattern, specials.splitter, uncut=True):
            if text:
                yield from self._encode(text, nothing).tolist()
            if pieces:
                yield from np.frombuffer(b"".join(map(look_up, pieces)), dtype=self._dtype).tolist()
            if special is not None:
                yield self._special_tokens[special]

    def _iterate_normalised(self, chunks: Iterable[str], specials: _Specials) -> Iterator[int]:
        assert self._normalizer is not None
        parts = raw_parts(chunks, specials.splitter)
        nothing = _Specials({}, self._special_tokens)
        special: str | None = None

        def region() -> Iterator[str]:
            nonlocal special
            for text, special in parts:
                yield text
                if special is not None:
                    return

        while True:
            special = None
            text = normalised(region(), self._normalizer)
            yield from self._without_normalizer._iterate(text, nothing)
            if special is None:
                return
            yield self._special_tokens[special]

    # ---------------------------------------------------------------- many texts

    def encode_batch(
        self, texts: Iterable[Text], threads: int | None, allowed: Allowed, disallowed: Allowed
    ) -> list[np.ndarray]:
        if threads is not None and threads < 1:
            raise UserError(f"threads = {threads}: at least one must do the work")
        specials, forbidden = self.special_choice(allowed, disallowed)
        given = list(texts)
        if not set(map(type, given)) <= {bytes, str}:
            given = [_known(text) for text in given]
        if forbidden:
            for text in given:
                _refuse(forbidden, _checked(text))
        total = sum(map(len, given))
        if self._normalizer is not None:
            return [self._encode(text, specials) for text in map(_checked, given)]
        compiled, before = self._compiled_for(total), self._fast_encoder
        self._count(total)
        if compiled:
            return self._many(given, specials, threads)
        found: list[np.ndarray] = []
        for number, text in enumerate(given):
            if self._fast_encoder is not before:  # plain Python took too long
                return found + self._many(given[number:], specials, threads)
            found.append(self._encode(_checked(text), specials, counted=True))
        return found

    def _many(self, given: list[Text], specials: _Specials, threads: int | None) -> list[np.ndarray]:
        threads = max(1, min(threads or cores(), sum(map(len, given)) // _WORTH_THREAD))
        raw = [text if type(text) is bytes else utf8(text) for text in given]
        return self._fast.encode_many(raw, specials.search, threads)

    def encode_documents(self, data: bytes, sizes: np.ndarray, separator_id: int) -> tuple[np.ndarray, np.ndarray]:
        ends = np.cumsum(sizes)
        if self.releases_lock and len(sizes):
            regions = np.stack([ends - sizes, ends, np.full(len(ends), separator_id)], axis=1).astype(np.int64)
            ids, marks = self._fast.encode_rows(data, regions)
            return ids, np.diff(marks, prepend=0)
        texts = [data[end - size : end] for size, end in zip(sizes.tolist(), ends.tolist(), strict=True)]
        separator = np.array([separator_id], self._dtype)
        pieces = [piece for ids in self.encode_batch(texts, 1, (), ()) for piece in (ids, separator)]
        counts = np.fromiter(map(len, pieces[::2]), np.int64, len(texts)) + 1
        return np.concatenate(pieces) if pieces else separator[:0], counts

    # ---------------------------------------------------------------- special tokens

    def special_choice(self, allowed: Allowed, disallowed: Allowed) -> tuple[_Specials, SpecialSplitter | None]:
        """Those to look for, and those to refuse."""
        if allowed == "all" and not disallowed:
            return self._specials, None
        allowed_set = self.named_specials(allowed, "allowed_special")
        disallowed_set = self.named_specials(disallowed, "disallowed_special")
        if disallowed == "all":
            disallowed_set -= allowed_set | self._added_tokens
        specials = self._specials if allowed == "all" else _Specials(allowed_set, self._special_tokens)
        return specials, SpecialSplitter(disallowed_set) if disallowed_set else None

    def named_specials(self, names: Allowed, argument: str) -> set[str]:
        return named_specials(names, argument, self._special_tokens)


def named_specials(names: Allowed, argument: str, special_tokens: dict[str, int]) -> set[str]:
    """The special tokens that `names` chooses.

    Raises:
        UserError: one of them is none; `argument` is named.
    """
    if names == "all":
        return set(special_tokens)
    if isinstance(names, str):
        raise UserError(f'{argument} = {names!r}: give "all" or a set of special tokens')
    chosen = set(names)
    for name in chosen - set(special_tokens):
        raise UserError(f"{argument}: {name!r} is not a special token; there are {sorted(special_tokens)}")
    return chosen


class _FirstTime:
    """What plain Python has done, and for how many seconds more it may, while nothing is compiled; one for an encoder and its copies."""

    def __init__(self) -> None:
        self.seen = 0
        self.patience = _PATIENCE


class _Specials:
    """Some special tokens, to be found in a str and in bytes."""

    def __init__(self, names: Iterable[str], special_tokens: dict[str, int]) -> None:
        self.splitter = SpecialSplitter(names)
        self._ids = {name.encode(): special_tokens[name] for name in names}

    @functools.cached_property
    def search(self) -> SpecialSearch:
        return SpecialSearch(self._ids)


# ---------------------------------------------------------------- str and bytes


def _as_str(text: Text) -> str:
    """Undecodable bytes become surrogates: lossless both ways."""
    return text if isinstance(text, str) else bytes(text).decode("utf-8", "surrogateescape")


def _checked(text: Text) -> Text:
    """`text`, which is a str without lone surrogates, or bytes."""
    if isinstance(text, str):
        utf8(text)
    return _known(text)


def _known(text: Text) -> Text:
    """`text`, which is a str or bytes in one piece."""
    if isinstance(text, (str, bytes, bytearray)):
        return text
    if isinstance(text, memoryview):
        return text if text.contiguous else bytes(text)
    raise UserError(f"cannot encode a {type(text).__name__}; give a str or UTF-8 bytes")


def _checked_chunk(chunk: str) -> str:
    # Bytes are refused: a character cut in two by the end of a chunk would come out as two.
    if not isinstance(chunk, str):
        raise UserError(f"encode_iterable got a chunk of type {type(chunk).__name__}; open files as text (UTF-8)")
    _checked(chunk)
    return chunk


def _refuse(forbidden: SpecialSplitter | None, text: Text, offset: int = 0) -> None:
    match = forbidden.search(_as_str(text), 0) if forbidden else None
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


def _compiled_before() -> bool:
    """Whether the encoder was compiled on this machine, as far as one can tell without loading it."""
    from scratchlm.tokenizer.compiling import kept
    from scratchlm.tokenizer.word_rows import encode_spans

    compiled: Any = encode_spans
    return kept(compiled.py_func)
