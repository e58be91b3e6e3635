r"""o200k's pattern on masks of 64 bytes (``scanner_blocks.py``):

    [^\r\n\p{L}\p{N}]?[upper]*[lower]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?
    |[^\r\n\p{L}\p{N}]?[upper]+[lower]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?
    |\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+

where letters without case and marks count as both upper and lower. It goes like ``scanner_cl100k.py``, and then:

    bytes    g e t H T T P s N o w ␣ D O N ' t
    upper    0 0 0 1 1 1 1 0 1 0 0 0 1 1 1 0 0
    starts   1 0 0 1 0 0 0 0 1 0 0 1 0 0 0 0 0     upper after lower (with what is both between); contractions stay with the word

Three things are harder.

*Marks* are letters where they follow a letter or the one character before a word, and others where they follow others: of a
run of others, all from the first on that has another behind it (or a blank before it) belongs to one pre-token, marks
included. ``x +́ → +́`` but ``x ++́ → ++́``.

*Both, then upper, then no letter* (``日本NHK␣``): the first alternative gives back all upper case and ends behind the last
letter that is both. Whether that happens is seen at the end of the upper case.

*Rare cases* are not computed but avoided: the block is cut short at a boundary that is certain, and the next block begins
there. So it goes where letters follow a contraction, and where slashes follow line ends (``;⏎//``).
"""

from __future__ import annotations

import numpy as np

from scratchlm.tokenizer.scanner_blocks import (
    BLOCK,
    ascii_masks,
    build,
    digit_starts,
    first_bits,
    inner,
    inner_reference,
    run_start_at_end,
    trailing_zeros,
    white_starts,
    wide_masks,
)

_ONE, _NONE = np.uint64(1), np.uint64(0)
_contraction = inner_reference("contraction")


@inner
def _starts(data, at, end, pages, leaves, option):
    length = end - at
    whole = length > BLOCK  # the text goes on behind the block
    if whole:
        length = BLOCK
    upper, lower, numbers, white, blanks, lines, apostrophes, slashes, high, continuation = ascii_masks(data, at)
    letters = upper | lower
    inside = first_bits(length)
    tails = marks = _NONE
    high &= inside
    if high != _NONE:
        more = wide_masks(data, at, high, continuation & inside, whole, pages, leaves)
        letters |= more[0]
        numbers |= more[1]
        white |= more[2]
        upper |= more[3]
        lower |= more[4]
        tails = more[6]
        if more[7] < length:
            length = more[7]
            inside = first_bits(length)
        marks = more[5] & inside
    letters &= inside
    numbers &= inside
    white &= inside
    lines &= inside
    upper &= inside
    lower &= inside
    limit = np.int64(BLOCK)  # boundaries from here on are not certain

    others = inside & ~(letters | numbers | white)
    plain = others & ~marks
    heads = plain & ~tails
    # The last byte of a plain character with another behind it, or a plain one behind a blank: all others from there on.
    seeds = plain & (heads >> _ONE) | heads & (blanks << _ONE)
    joined = (((seeds + others) ^ others) | seeds) & others
    single = plain & ~joined
    letters |= marks & ~joined
    starts = (heads & single | joined & ~(joined << _ONE) & ~tails) & ~(blanks << _ONE)
    starts |= letters & ~(letters << _ONE | (white & ~lines) << _ONE | single << _ONE)
    starts |= digit_starts(numbers, tails, 3)

    both = letters & ~(upper | lower)
    low = lower  # lower case and what is both behind it
    if both != _NONE:
        behind = (lower << _ONE) & both
        low |= (((behind + both) ^ both) | behind) & both
        turn = upper & (both << _ONE)
        while turn != _NONE:
            place = trailing_zeros(turn)
            turn &= turn - _ONE
            stop = place + trailing_zeros(~(upper >> np.uint64(place)))
            if stop >= length:
                if whole:
                    limit = place
                    break
                starts |= _ONE << np.uint64(place)
            elif (letters >> np.uint64(stop)) & _ONE == _NONE:
                starts |= _ONE << np.uint64(place)
    starts |= upper & (low << _ONE)

    behind = ((single | joined) << _ONE) & lines
    closing = lines | slashes & inside
    taken = (((behind + closing) ^ closing) | behind) & closing
    white &= ~taken
    starts |= white_starts(white, lines & ~taken, tails, inside)
    if whole:
        # Where white space ends that reaches the block's end is out of sight: only its beginning is certain.
        if (white >> np.uint64(length - 1)) & _ONE != _NONE:
            starts &= first_bits(run_start_at_end(white, inside, length))
    elif length < BLOCK:
        starts |= _ONE << np.uint64(length)

    apostrophes &= single & (letters << _ONE)
    while apostrophes != _NONE:
        place = trailing_zeros(apostrophes)
        apostrophes &= apostrophes - _ONE
        size = _contraction(data, at + place, end, True)
        if size > 0:
            starts &= ~(first_bits(size) << np.uint64(place))
            stop = place + size
            if stop < BLOCK:
                starts |= _ONE << np.uint64(stop)
                if ((letters | apostrophes) >> np.uint64(stop)) & _ONE != _NONE:
                    limit = min(limit, stop + 1)
                    break
    taken &= slashes
    if taken != _NONE:
        place = trailing_zeros(taken)
        stop = place + trailing_zeros(~(closing >> np.uint64(place)))
        if place < limit:
            limit = place
            if stop < length or not whole:
                starts = starts & first_bits(place)
                limit = stop + 1
                if stop < BLOCK:
                    starts |= _ONE << np.uint64(stop)
    return starts & first_bits(limit) & ~_ONE


scan = build("o200k", _starts, inner_reference("match_o200k"))
