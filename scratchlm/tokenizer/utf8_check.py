"""Are these bytes UTF-8? A compiled loop that makes no text of them to find out.

    lead       second     after it     code points
    C2 … DF    80 … BF    –            U+80 … U+7FF
    E0         A0 … BF    1 more       U+800 … U+FFF          (below A0: could be shorter)
    E1 … EF    80 … BF    1 more       U+1000 … U+FFFF
    ED         80 … 9F    1 more       … without the surrogates U+D800 … U+DFFF
    F0         90 … BF    2 more       U+10000 … U+3FFFF
    F1 … F3    80 … BF    2 more       U+40000 … U+FFFFF
    F4         80 … 8F    2 more       U+100000 … U+10FFFF

(Table 3-7 of the Unicode Standard.)
"""

from __future__ import annotations

import numpy as np

from scratchlm.tokenizer.machine_words import U, load64, outer

_HIGH = U(0x8080808080808080)


@outer
def _valid(data):
    """Whether all of `data` (uint8) is UTF-8."""
    end, at = len(data), 0
    while at < end:
        if at + 8 <= end and load64(data, at) & _HIGH == U(0):
            at += 8
            continue
        lead = data[at]
        at += 1
        if lead < 0x80:
            continue
        more = 1 if lead < 0xE0 else 2 if lead < 0xF0 else 3
        if lead < 0xC2 or lead > 0xF4 or at + more > end:
            return False
        lowest = 0xA0 if lead == 0xE0 else 0x90 if lead == 0xF0 else 0x80
        highest = 0x9F if lead == 0xED else 0x8F if lead == 0xF4 else 0xBF
        if data[at] < lowest or data[at] > highest:
            return False
        for place in range(at + 1, at + more):
            if data[place] & 0xC0 != 0x80:
                return False
        at += more
    return True


def is_utf8(data: bytes) -> bool:
    """Whether `data` is UTF-8, as ``data.decode()`` would find."""
    return bool(_valid(np.frombuffer(data, np.uint8)))
