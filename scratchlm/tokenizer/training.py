"""Training: count words, then merge pairs.

text ──pattern──► words × counts ──merge loop──► merges ──► vocabulary

ids   0 … 255   256 … 255+m   256+m …          (special_first: specials, bytes, merges)
      bytes     merges        special tokens
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from scratchlm.errors import UserError
from scratchlm.progress import progress as progress_bar
from scratchlm.tokenizer.counting import Source, WordCounts, count
from scratchlm.tokenizer.merging import Pair, merge_words
from scratchlm.tokenizer.patterns import Pattern
from scratchlm.tokenizer.stream import check_specials
from scratchlm.tokenizer.tokenizer import Tokenizer

# From this many bytes of distinct words on, the compiled merge loop is used. It is about ten times as fast, but the first
# call on a machine compiles for seconds; below, the plain loop is done within a second or two.
_WORTH_COMPILING = 250_000

MAX_VOCAB = 2**24
"""Ids, at most: two orders of magnitude above any published vocabulary, and its tables still fit into memory."""

MAX_COUNT = 2**62  # the compiled loop counts in int64


def train_bpe(
    source: Source,
    vocab_size: int,
    special_tokens: Iterable[str] = ("<|endoftext|>",),
    pattern: str = "gpt2",
    min_frequency: int = 1,
    workers: int | None = None,
    progress: bool = False,
    special_first: bool = False,
    max_word_length: int | None = None,
) -> Tokenizer:
    """Train a byte-level BPE tokenizer (Sennrich et al. 2016; bytes: Radford et al. 2019).

    Args:
        source: a path, a list of paths (each file one text), or an iterable of str (each one document; may be larger
            than memory). No merge reaches across documents. A str alone is a path; a list of str means files if one
            of them is an existing file.
        vocab_size: tokens wanted: 256 bytes, merges and special tokens together.
        special_tokens: cut the text, are never counted and never split.
        pattern: ``gpt2``, ``cl100k``, ``o200k`` or a pattern of the `regex` library.
        min_frequency: pairs that occur less often are not merged.
        workers: threads that count (processes, for a pattern without a compiled scanner); None: one per core. The result
            is the same for any number.
        progress: show bars on standard error.
        special_first: ids of special tokens before the bytes instead of after the merges.
        max_word_length: bytes of a pre-token, at most; longer ones (base64, minified code, text without blanks) are left out
            of the counts, and a warning says how many. None: all count. Encoding has no such limit.

    Returns:
        a tokenizer with at most `vocab_size` tokens; fewer, with a warning, where the text holds no more pairs.

    Raises:
        UserError: `vocab_size` is too small for bytes and specials or beyond ``MAX_VOCAB``, a special token is empty or named twice, or the
            source cannot be read.
    """
    compiled = Pattern(pattern)
    specials = check_specials(special_tokens)
    # A special token of one ASCII character is the same byte string as a byte: they share one id.
    added = [special for special in specials if len(special.encode("utf-8")) > 1]
    merges = vocab_size - 256 - len(added)
    if merges < 0:
        raise UserError(
            f"vocab_size = {vocab_size} is smaller than 256 bytes + {len(added)} special tokens = {256 + len(added)}"
        )
    if vocab_size > MAX_VOCAB:
        raise UserError(f"vocab_size = {vocab_size} is too large; at most {MAX_VOCAB} tokens can be learnt")
    if min_frequency > MAX_COUNT:
        raise UserError(f"min_frequency = {min_frequency} is too large; no pair occurs more than {MAX_COUNT} times")
    if min_frequency < 1:
        raise UserError(f"min_frequency = {min_frequency}: a pair that occurs must occur at least once")
    counted = count(source, compiled, specials, workers, progress, max_word_length)
    if counted.left_out:
        warnings.warn(
            f"{counted.left_out:,} pre-tokens of more than max_word_length = {max_word_length} bytes were left out "
            f"({counted.left_out_bytes:,} bytes)",
            stacklevel=2,
        )
    pairs = learn_merges(counted.words, merges, min_frequency, progress)
    if len(pairs) < merges:
        warnings.warn(
            f"the text holds only {len(pairs)} mergeable pairs that occur at least {min_frequency} times: the "
            f"vocabulary has {256 + len(pairs) + len(added)} tokens, not {vocab_size}",
            stacklevel=2,
        )
    tokens = [bytes([byte]) for byte in range(256)]
    for left, right in pairs:
        tokens.append(tokens[left] + tokens[right])
    encoded = [special.encode("utf-8") for special in added]
    vocab = dict(enumerate(encoded + tokens if special_first else tokens + encoded))
    return Tokenizer(vocab, [(tokens[left], tokens[right]) for left, right in pairs], list(specials), compiled.name)


def learn_merges(
    words: dict[bytes, int] | WordCounts, merges: int, min_frequency: int = 1, show: bool = False
) -> list[Pair]:
    """The merge loop: the plain one for small inputs, its compiled twin (equal output) for large ones."""
    with progress_bar(description="merge pairs", total=merges, unit="merge", show=show) as bar:
        if isinstance(words, dict) and sum(map(len, words)) < _WORTH_COMPILING:
            return merge_words(words, merges, min_frequency, bar.update)
        # Imported here: Numba costs more to import than all the rest of this room.
        from scratchlm.tokenizer.merging_fast import merge_words_fast

        return merge_words_fast(words, merges, min_frequency, bar.update, show)
