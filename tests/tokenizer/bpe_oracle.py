"""Independent implementations and texts for the tokenizer room's tests: slow, obvious, sharing no code with the room."""

from __future__ import annotations

import functools
import unicodedata
import warnings
from collections import Counter
from itertools import pairwise

import regex
from hypothesis import strategies as st

from scratchlm.tokenizer import Tokenizer, train_bpe

EOT = "<|endoftext|>"
# Overlapping on purpose: the longest must win.
OVERLAPPING = [EOT, "<|end|>", "<|end|><|end|>", "<|end|>!"]

TEXT = (
    """\
The tokenizer reads bytes; it doesn't know what a word is. It's told where words may end, and we'll see that "the"
theory, their theme and there are cut alike: they're all made of th and e. I'm sure you've seen this, haven't you?

def merge(pair, counts):\r\n    if pair in counts:\r\n        return counts[pair] + 1\r\n    return 0\r\n
    x = [1, 22, 333, 4444, 55555, 123456789];   y = {"a": 3.14159, 'b': -2e10}\t\t# tabs\t\n\n\n
Ça va très bien, merci — l'été à Noël où naïve cœur; Übergrößenträger für die Straße; ¿Qué mañana? Ærø ångström.
Съешь ещё этих мягких французских булок, да выпей чаю. Ελληνικά γράμματα και τόνοι. שלום עולם. مرحبا بالعالم.
天地玄黃,宇宙洪荒。日月盈昃,辰宿列張。いろはにほへと ちりぬるを。カタカナ、한국어 문장입니다. 天地天地天地。
👍👍🏽 👩‍👩‍👧‍👦 😀😀😀 🇩🇪🇫🇷 e\u0301e\u0301 a\u030a o\u0308\u0323 \u00a0\u2003\u3000 wait....... !!!!!! ------ ======
HELLO World CamelCaseWords snake_case_words WORDS'LL DON'T it'S ²³ ½ Ⅷ ٣٤٥ aaaa aaaaaaaa bbbb abababab
"""
    * 3
)

PATTERN_NAMES = ["gpt2", "cl100k", "o200k"]


def old_enough(character: str) -> bool:
    """Assigned in the Unicode version of Python 3.11 or older: the libraries compared know different newest versions."""
    return unicodedata.category(character) not in ("Cn", "Cs")


FRAGMENTS = [
    " ", "  ", "\n", "\r\n", "\r", "\t", "\u3000", "\u00a0", "\x85", "\x1c", "\u2028", "the", " the", "ing", "'s", "'LL",
    "'re", "'", "don't", "I'M", "a", "aa", "A", "Ab", "e\u0301", "\u0301", "é", "ß", "ſ", "'ſ", "漢字", "天地", "日本", "한국",
    "😀", "👩‍👩‍👧", "🇩🇪", "123", "1234567", "٣", "½", "!", "...", "/", "//", "_", "\\", "\x00", "\u200b", "ʰ", "ǅ", "Я", "\ufffd",
]  # fmt: skip
_characters = st.characters(exclude_categories=("Cs", "Cn")).filter(old_enough)
texts = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(_characters, max_size=4)), max_size=25).map("".join)
_with_specials = ["<|end", "|>", "<", "<|", "|><|end|>", *OVERLAPPING]
special_texts = st.lists(
    st.one_of(st.sampled_from(_with_specials), st.sampled_from(FRAGMENTS), st.text(_characters, max_size=3)),
    max_size=25,
).map("".join)


def cut_specials(text: str, specials: list[str]) -> list[tuple[str, bool]]:
    """(part, is special): the leftmost special first, the longest of those that start at one place."""
    parts: list[tuple[str, bool]] = []
    start = position = 0
    while position < len(text):
        found = max((s for s in specials if text.startswith(s, position)), key=len, default=None)
        if found is None:
            position += 1
            continue
        parts += [(text[start:position], False), (found, True)]
        start = position = position + len(found)
    return [*parts, (text[start:], False)]


def pre_tokens(text: str, pattern: str) -> list[str]:
    """Matches and, where the pattern leaves text out, the gaps between."""
    pieces, end = [], 0
    for match in regex.finditer(pattern, text):
        if not match.group():
            continue
        pieces += [text[end : match.start()], match.group()]
        end = match.end()
    return [piece for piece in [*pieces, text[end:]] if piece]


def count_words(texts: list[str], pattern: str, specials: list[str]) -> Counter[bytes]:
    counts: Counter[bytes] = Counter()
    for text in texts:
        for part, special in cut_specials(text, specials):
            if not special:
                counts.update(piece.encode() for piece in pre_tokens(part, pattern))
    return counts


def join(word: tuple[bytes, ...], pair: tuple[bytes, bytes]) -> tuple[bytes, ...]:
    """`word` with every occurrence of `pair` joined, read from the left."""
    if len(word) < 2:
        return word
    if word[:2] == pair:
        return (word[0] + word[1], *join(word[2:], pair))
    return (word[0], *join(word[1:], pair))


def pair_counts(words: dict[tuple[bytes, ...], int]) -> Counter[tuple[bytes, bytes]]:
    pairs: Counter[tuple[bytes, bytes]] = Counter()
    for word, count in words.items():
        for pair in pairwise(word):
            pairs[pair] += count
    return pairs


def train(counts: dict[bytes, int], merges: int, min_frequency: int = 1) -> list[tuple[bytes, bytes]]:
    """The textbook: count everything anew for every merge; of the most frequent pairs the greatest."""
    words = {tuple(bytes([byte]) for byte in word): count for word, count in counts.items()}
    made: list[tuple[bytes, bytes]] = []
    while len(made) < merges:
        pairs = pair_counts(words)
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        if pairs[best] < min_frequency:
            break
        made.append(best)
        words = {join(word, best): count for word, count in words.items()}
    return made


def encode(text: str, tokenizer: Tokenizer, pattern: str) -> list[int]:
    """Every merge in turn over every pre-token."""
    ids = {token: index for index, token in tokenizer.vocab.items()}
    result = []
    for part, special in cut_specials(text, list(tokenizer.special_tokens)):
        if special:
            result.append(tokenizer.special_tokens[part])
            continue
        for piece in pre_tokens(part, pattern):
            word = tuple(bytes([byte]) for byte in piece.encode())
            for pair in tokenizer.merges:
                word = join(word, pair)
            result += [ids[token] for token in word]
    return result


@functools.cache
def trained(pattern: str = "gpt2", specials: tuple[str, ...] = (EOT,), vocab_size: int = 700) -> Tokenizer:
    """A small tokenizer that knows merges in every script of TEXT."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the text holds only")
        return train_bpe([TEXT], vocab_size, specials, pattern)


@functools.cache
def tiktoken_patterns() -> dict[str, str]:
    """The patterns as tiktoken publishes them, not as this package writes them."""
    from tiktoken_ext import openai_public

    loaders = ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks")
    kept = {name: getattr(openai_public, name) for name in loaders}
    try:
        for name in loaders:  # they would download the ranks
            setattr(openai_public, name, lambda *_, **__: {})
        return {
            "gpt2": openai_public.gpt2()["pat_str"],
            "cl100k": openai_public.cl100k_base()["pat_str"],
            "o200k": openai_public.o200k_base()["pat_str"],
        }
    finally:
        for name, function in kept.items():
            setattr(openai_public, name, function)


def as_tiktoken(tokenizer: Tokenizer):
    import tiktoken

    special_ids = set(tokenizer.special_tokens.values())
    return tiktoken.Encoding(
        "ours",
        pat_str=tiktoken_patterns().get(tokenizer.pattern, tokenizer.pattern),
        mergeable_ranks={token: index for index, token in tokenizer.vocab.items() if index not in special_ids},
        special_tokens=tokenizer.special_tokens,
    )
