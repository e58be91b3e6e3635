"""The compiled loops of `decoder`. Both look at each id: an array may be written to by others between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from scratchlm.tokenizer.machine_words import load64, outer, stamp, store64


def _count(sources: int) -> Callable[..., Any]:
    def count(ids, packed, characters):
        """(bytes, characters, widths of characters, one bit each) of all `ids`; −1 − position instead of bytes if there is one that has none."""
        size, number, widths = 0, 0, 0
        for position in range(len(ids) if sources > 0 else 0):
            index = ids[position]
            if index >= len(packed) or packed[index] < 0:
                return -1 - position, 0, 0
            size += packed[index] & 0xFFFFFF
            number += characters[index] >> 4
            widths |= characters[index] & 15
        return size, number, widths

    return count


def _copy(sources: int) -> Callable[..., Any]:
    def copy_tokens(ids, pool, packed, buffer, at):
        """Write the bytes of `ids` to `buffer` from `at` on; returns the place behind them, or −1: they are not those that were counted."""
        room = len(buffer) if sources > 0 else 0
        for position in range(len(ids)):
            index = ids[position]
            if index >= len(packed) or packed[index] < 0:
                return -1
            start, length = packed[index] >> 24, packed[index] & 0xFFFFFF
            if length <= 16 and at <= room - 16:
                store64(buffer, at, load64(pool, start))
                store64(buffer, at + 8, load64(pool, start + 8))
            elif at + length > room:
                return -1
            else:
                for offset in range(length):
                    buffer[at + offset] = pool[start + offset]
            at += length
        return at

    return copy_tokens


count = outer(_count(stamp()))
copy_tokens = outer(_copy(stamp()))
