r"""What every code point is to a pre-tokenisation pattern: letter (of which kind), mark, number, white space, or none.

The classes are those of the `regex` library (``\p{Lu}`` … ``\s``) under Unicode 17.0.0, kept in ``unicode_classes.txt`` as
runs over all 1,114,112 code points, and unfolded into a table of two levels when first needed (2 ms):

    9-5S18-1S16-9N …    ──►   code point  U+4E2D = 0b100111000 101101
    nine of no class,                             │           │
    five white space, …                 pages[0x138] ──► leaf 3 ──► leaves[3, 0x2D] = LETTER

Most pages of 64 code points are of one class (Chinese, Hangul, what is unassigned) and share a leaf, so that the part of
the table that a text touches stays in the first-level cache.

``python -m scratchlm.tokenizer.unicode_classes`` writes the file anew from the installed `regex`.
"""

from __future__ import annotations

import functools
import itertools
import re
from pathlib import Path

import numpy as np

UNICODE_VERSION = "17.0.0"
CODE_POINTS = 0x110000

# Bits of a class: scanners ask "is it a letter" with one AND.
LETTER, NUMBER, SPACE, UPPER, LOWER, MARK = 1, 2, 4, 8, 16, 32

# Names of the classes in the file → their bits, and what `regex` calls them.
_BITS = {"-": 0, "U": LETTER | UPPER, "L": LETTER | LOWER, "O": LETTER, "M": MARK, "N": NUMBER, "S": SPACE}
_REGEX = {"U": r"[\p{Lu}\p{Lt}]", "L": r"\p{Ll}", "O": r"[\p{Lm}\p{Lo}]", "M": r"\p{M}", "N": r"\p{N}", "S": r"\s"}

_FILE = Path(__file__).with_name("unicode_classes.txt")
_PAGE = 64


@functools.cache
def code_point_classes() -> np.ndarray:
    """Class bits of every code point: uint8, shape (0x110000,)."""
    text = _FILE.read_text(encoding="ascii").replace("\n", "")
    runs = re.findall(r"(\d*)([-A-Z])", text)
    lengths = [int(length or 1) for length, _ in runs]
    classes = np.array([_BITS[name] for _, name in runs], np.uint8)
    table = np.repeat(classes, lengths)
    table.flags.writeable = False
    return table


@functools.cache
def class_pages() -> tuple[np.ndarray, np.ndarray]:
    """The two-level table.

    Returns:
        pages: uint16, shape (0x110000 / 64,): the leaf of each 64 code points;
        leaves: uint8, shape (number of leaves, 64): class bits.
    """
    rows = code_point_classes().reshape(-1, _PAGE)
    mixed = (rows != rows[:, :1]).any(axis=1)
    bits = np.array(list(_BITS.values()), np.uint8)
    leaf_of_bits = np.zeros(256, np.uint16)
    leaf_of_bits[bits] = np.arange(len(bits))
    pages = leaf_of_bits[rows[:, 0]]
    pages[mixed] = len(bits) + np.arange(mixed.sum())
    leaves = np.concatenate([np.repeat(bits[:, None], _PAGE, axis=1), rows[mixed]])
    return pages, leaves


def classes_of_regex() -> np.ndarray:
    """The same as :func:`code_point_classes`, asked of the installed `regex`."""
    import regex

    characters = "".join(map(chr, range(CODE_POINTS)))
    table = np.zeros(CODE_POINTS, np.uint8)
    for name, pattern in _REGEX.items():
        found = "".join(regex.findall(pattern, characters))
        table[np.frombuffer(found.encode("utf-32-le", "surrogatepass"), np.uint32)] = _BITS[name]
    return table


def _write() -> None:
    names = {bits: name for name, bits in _BITS.items()}
    runs = [(names[bits], sum(1 for _ in run)) for bits, run in itertools.groupby(classes_of_regex().tolist())]
    text = "".join(f"{length if length > 1 else ''}{name}" for name, length in runs)
    _FILE.write_text("\n".join(re.findall(r".{1,110}", text)) + "\n", encoding="ascii")


if __name__ == "__main__":
    _write()
