"""A million seeded strings through every compiled scanner, many regions to a call, against `regex`."""

from __future__ import annotations

import random

import numpy as np
import pytest
import regex
import scanner_oracle as oracle

from scratchlm.tokenizer import unicode_classes
from scratchlm.tokenizer.patterns import WITH_SCANNER
from scratchlm.tokenizer.scanner import scanner_for

STRINGS, BATCH = 1_000_000, 5_000


def strings(random_: random.Random, agreed: list[str]) -> list[bytes]:
    """A batch: mixtures of few or of many pieces, long runs, any code points, bytes that are not UTF-8."""
    made = []
    for _ in range(BATCH):
        kind = random_.random()
        pieces = random_.choices(oracle.PIECES, k=4) if kind < 0.3 else oracle.PIECES
        text = random_.choices(pieces, k=random_.randrange(30 if kind < 0.9 else 150))
        if text and kind < 0.2:
            text[random_.randrange(len(text))] *= random_.randrange(1, 90)
        if text and 0.2 < kind < 0.6:
            text[random_.randrange(len(text))] = random_.choice(agreed)
        raw = "".join(text).encode()
        if kind > 0.85:
            cut = random_.randrange(len(raw) + 1)
            raw = raw[:cut] + random_.choice(oracle.NOT_UTF8) + raw[cut + random_.randrange(2) :]
        made.append(raw)
    return made


def expected(pattern: regex.Pattern, texts: list[bytes]) -> np.ndarray:
    """Rows for the texts behind each other; the patterns with a scanner leave nothing out between matches."""
    rows, at = [], 0
    for text in texts:
        start = at
        for piece in pattern.findall(text.decode("utf-8", "surrogateescape")):
            end = at + (len(piece) if piece.isascii() else len(piece.encode("utf-8", "surrogateescape")))
            rows += (at, end)
            at = end
        assert at == start + len(text)
        rows += (-1, -1)
    return np.array(rows, np.int64).reshape(-1, 2)


@pytest.mark.slow
def test_a_million_strings():
    random_ = random.Random(20261127)
    same = unicode_classes.code_point_classes() == unicode_classes.classes_of_regex()
    agreed = [chr(point) for point in np.flatnonzero(same).tolist() if not 0xD800 <= point < 0xE000]
    patterns = {name: (regex.compile(text), scanner_for(text)) for text, name in WITH_SCANNER.items()}
    for batch in range(STRINGS // BATCH):
        texts = strings(random_, agreed)
        data = b"".join(texts)
        ends = np.cumsum([len(text) for text in texts])
        regions = np.stack([ends - [len(text) for text in texts], ends, np.full(len(texts), -1)], axis=1)
        capacity = random_.choice([3, 64, 65, 4096, 4096])
        for name, (pattern, scan) in patterns.items():
            rows = oracle.scan_rows(scan, data, regions, capacity)
            want = expected(pattern, texts)
            if not np.array_equal(rows, want):
                short = min(len(rows), len(want))
                first = int(np.argmax((rows[:short] != want[:short]).any(axis=1)))
                before = np.flatnonzero(want[:first, 0] < 0)
                text = texts[len(before)]
                raise AssertionError(f"{name}, batch {batch}: {text!r}: {rows[first]} instead of {want[first]}")
