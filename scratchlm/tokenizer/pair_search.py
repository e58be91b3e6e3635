"""Where any of a few pairs of bytes stands in a text: the compiled loop of `regions`.

bytes    a < b < | e n d | >        first  "<"     0 1 0 1 0 0 0 0 0 0
                                    second "|"     0 0 0 0 1 0 0 0 1 0, read one byte further on: 0 0 0 1 0 0 0 1 0 0
                                    both           0 0 0 1 0 0 0 0 0 0        64 bytes at once
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from scratchlm.tokenizer.machine_words import U, lowest_bit, outer, places_of, stamp


def _loop(sources: int) -> Callable[..., Any]:
    def find_pairs(data, at, end, pairs, found):
        """Places from `at` on where a pair of bytes lies inside ``data[at:end]``, in order, to `found`.

        Args:
            pairs: uint8, shape (pairs, 2).
            found: int64, receives places; no more than fit.

        Returns:
            (how many places, where to go on: `end` when all are found).
        """
        count = 0
        while at + 65 <= end and count + 64 <= len(found) and sources > 0:
            mask = U(0)
            for pair in range(len(pairs)):
                mask |= places_of(data, at, pairs[pair, 0]) & places_of(data, at + 1, pairs[pair, 1])
            while mask != U(0):
                found[count] = at + lowest_bit(mask)
                count += 1
                mask &= mask - U(1)
            at += 64
        while at + 65 > end and at < end and count < len(found):
            for pair in range(len(pairs)):
                if at + 1 < end and data[at] == pairs[pair, 0] and data[at + 1] == pairs[pair, 1]:
                    found[count] = at
                    count += 1
            at += 1
        return count, at

    return find_pairs


find_pairs = outer(_loop(stamp()))
