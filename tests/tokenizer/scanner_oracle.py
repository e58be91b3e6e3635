"""Texts that bite a scanner, and what `regex` makes of them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import regex
from hypothesis import strategies as st

from scratchlm.tokenizer import unicode_classes

WHITE = [chr(c) for c in (9, 10, 11, 12, 13, 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B))]
WHITE += ["\u2028", "\u2029", "\u202f", "\u205f", "\u3000", "\r\n", "\n\n", "  ", "    ", " \n", "\n ", "\t\t"]
ALMOST_WHITE = [
    "\x1c",
    "\x1f",
    "\u200b",
    "\u200c",
    "\u200d",
    "\u200e",
    "\u200f",
    "\u2060",
    "\ufeff",
    "\u180e",
    "\x00",
]
CONTRACTIONS = [
    f"'{s}"
    for s in [
        "s",
        "S",
        "t",
        "T",
        "m",
        "M",
        "d",
        "D",
        "ſ",
        "ll",
        "LL",
        "lL",
        "Ll",
        "ve",
        "VE",
        "vE",
        "Ve",
        "re",
        "RE",
        "rE",
        "Re",
        "l",
        "v",
        "r",
        "x",
        "K",
        "漢",
    ]
]
LETTERS = ["a", "b", "Z", "A", "the", "é", "É", "ß", "ſ", "я", "Я", "ا", "ي", "ٱ", "ې", "ە", "ש", "漢", "字", "한", "ǅ", "ᾈ", "ʰ", "ー", "𝐀", "𐐀", "𐐨", "ab", "AB", "aB", "Ab", "s", "t", "l"]  # fmt: skip
MARKS = ["\u0301", "\u0323", "\u093f", "\u05b0", "\ufe0f", "\u20e3", "\U000e0100", "\u0903"]
NUMBERS = ["1", "2", "12", "123", "1234", "٣", "½", "Ⅷ", "二", "𝟏", "१", "①"]
OTHERS = [
    "!",
    ".",
    "/",
    "//",
    "'",
    "''",
    '"',
    "_",
    "<",
    "—",
    "«",
    "，",
    "😀",
    "👩",
    "🇩",
    "\u0378",
    "\ufffd",
    "\U0010ffff",
]
NOT_UTF8 = [b"\xff", b"\x80", b"\xbf", b"\xc3", b"\xc0\x80", b"\xe2\x82", b"\xed\xa0\x80", b"\xe0\x80\x80", b"\xf0\x9f\x98", b"\xf0\x80\x80\x80", b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80"]  # fmt: skip
PIECES = [*WHITE, *ALMOST_WHITE, *CONTRACTIONS, *LETTERS, *MARKS, *NUMBERS, *OTHERS]


def _known() -> list[bool]:
    same = unicode_classes.code_point_classes() == unicode_classes.classes_of_regex()
    return same.tolist()


_agreed = _known()
# All planes, but for code points that another version of `regex` sees otherwise (a test of its own names those).
characters = st.characters(exclude_categories=("Cs",)).filter(lambda character: _agreed[ord(character)])
pieces = st.one_of(
    st.sampled_from(PIECES).map(str.encode),
    st.sampled_from(PIECES).map(str.encode),
    st.builds(lambda piece, times: piece.encode() * times, st.sampled_from(PIECES), st.integers(1, 70)),
    characters.map(str.encode),
    st.sampled_from(NOT_UTF8),
)
texts = st.lists(pieces, max_size=60).map(b"".join)


def expected(pattern: str, text: bytes) -> list[tuple[int, int]]:
    """Spans of the pre-tokens in bytes: of all non-empty matches, and of what lies between."""
    characters = text.decode("utf-8", "surrogateescape")
    cuts = {0, len(characters)}
    for match in regex.finditer(pattern, characters):
        if match.group():
            cuts |= {match.start(), match.end()}
    places = [0]
    for start, end in pairwise(sorted(cuts)):
        places.append(places[-1] + len(characters[start:end].encode("utf-8", "surrogateescape")))
    return list(pairwise(places))


def scan_rows(scan, data: bytes, regions: np.ndarray, capacity: int = 4096) -> np.ndarray:
    """All rows, fetched `capacity` at a time; what stands behind the rows returned must not have been touched."""
    cursor = np.array([0, regions[0, 0] if len(regions) else 0], np.int64)
    spans = np.full((capacity + 1, 2), -7, np.int64)
    rows = [np.empty((0, 2), np.int64)]
    while (count := scan(np.frombuffer(data, np.uint8), regions, cursor, spans[:capacity])) > 0:
        assert count <= capacity
        assert (spans[count:] == -7).all()
        rows.append(spans[:count].copy())
        spans[:] = -7
    assert cursor[0] == len(regions)
    return np.concatenate(rows)


def scan_all(scan, data: bytes, regions: list[tuple[int, int, int]], capacity: int = 4096) -> list[tuple[int, int]]:
    """The same as a list."""
    return list(map(tuple, scan_rows(scan, data, np.array(regions, np.int64).reshape(-1, 3), capacity).tolist()))
