"""The compiled loops of `decoder`."""

from __future__ import annotations

from scratchlm.tokenizer.machine_words import load64, outer, store64


@outer
def total_length(ids, packed):
    """Bytes of all `ids`; −1 − position of the first that has none."""
    total = 0
    for position in range(len(ids)):
        index = ids[position]
        if index >= len(packed) or packed[index] < 0:
            return -1 - position
        total += packed[index] & 0xFFFFFF
    return total


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
