"""The compiled loops of `decoder`."""

from __future__ import annotations

from scratchlm.tokenizer.machine_words import load64, outer, store64


@outer
def count(ids, packed, characters):
    """(bytes, characters, widths of characters, one bit each) of all `ids`; −1 − position instead of bytes if there is one that has none."""
    size, number, widths = 0, 0, 0
    for position in range(len(ids)):
        index = ids[position]
        if index >= len(packed) or packed[index] < 0:
            return -1 - position, 0, 0
        size += packed[index] & 0xFFFFFF
        number += characters[index] >> 4
        widths |= characters[index] & 15
    return size, number, widths


@outer
def copy_tokens(ids, pool, packed, buffer, at):
    """Write the bytes of `ids` to `buffer` from `at` on; returns the place behind them."""
    safe = len(buffer) - 16
    for position in range(len(ids)):
        start, length = packed[ids[position]] >> 24, packed[ids[position]] & 0xFFFFFF
        if length <= 16 and at <= safe:
            store64(buffer, at, load64(pool, start))
            store64(buffer, at + 8, load64(pool, start + 8))
        else:
            for offset in range(length):
                buffer[at + offset] = pool[start + offset]
        at += length
    return at
