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

from collections.abc import Callable
from typing import Any

import numpy as np

from scratchlm.tokenizer.machine_words import U, load64, outer, stamp

_HIGH = U(0x8080808080808080)


def _loop(sources: int) -> Callable[..., Any]:
    def valid_until(data, begin, end):
        """The first byte from `begin` on that is not UTF-8 or belongs to a character cut off by `end`; `end` if there is none."""
        at = begin if sources > 0 else end
        while at < end:
            while at + 8 <= end and load64(data, at) & _HIGH == U(0):
                at += 8
            if at == end:
                break
            lead = data[at]
            if lead < 0x80:
                at += 1
                continue
            size = 2 if lead < 0xE0 else (3 if lead < 0xF0 else 4)
            if lead < 0xC2 or lead > 0xF4 or at + size > end:
                return at
            lowest = 0xA0 if lead == 0xE0 else 0x90 if lead == 0xF0 else 0x80
            highest = 0x9F if lead == 0xED else 0x8F if lead == 0xF4 else 0xBF
            if data[at + 1] < lowest or data[at + 1] > highest:
                return at
            for more in range(2, size):
                if data[at + more] & 0xC0 != 0x80:
                    return at
            at += size
        return end

    return valid_until


valid_until = outer(_loop(stamp()))


def is_utf8(data: bytes) -> bool:
    """Whether `data` is UTF-8, as ``data.decode()`` would find."""
    return int(valid_until(np.frombuffer(data, np.uint8), 0, len(data))) == len(data)
