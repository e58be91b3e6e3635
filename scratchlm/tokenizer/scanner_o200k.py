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

from scratchlm.tokenizer.scanner_blocks import (
    BLOCK,
    ascii_masks,
    build,
    build_match,
    digit_starts,
    down,
    first_bits,
    inner,
    inner_reference,
    run_start_at_end,
    trailing_zeros,
    white_starts,
    wide_masks,
)

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
    tails = marks = 0
    high &= inside
    if high != 0:
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
    limit = BLOCK  # boundaries from here on are not certain

    others = inside & ~(letters | numbers | white)
    plain = others & ~marks
    heads = plain & ~tails
    # The last byte of a plain character with another behind it, or a plain one behind a blank: all others from there on.
    seeds = plain & down(heads, 1) | heads & (blanks << 1)
    joined = (((seeds + others) ^ others) | seeds) & others
    single = plain & ~joined
    letters |= marks & ~joined
    starts = (heads & single | joined & ~(joined << 1) & ~tails) & ~(blanks << 1)
    starts |= letters & ~(letters << 1 | (white & ~lines) << 1 | single << 1)
    starts |= digit_starts(numbers, tails, 3)

    both = letters & ~(upper | lower)
    low = lower  # lower case and what is both behind it
    if both != 0:
        behind = (lower << 1) & both
        low |= (((behind + both) ^ both) | behind) & both
        turn = upper & (both << 1)
        while turn != 0:
            place = trailing_zeros(turn)
            turn &= turn - 1
            stop = place + trailing_zeros(~down(upper, place))
            if stop >= length:
                if whole:
                    limit = place
                    break
                starts |= 1 << place
            elif (letters >> stop) & 1 == 0:
                starts |= 1 << place
    starts |= upper & (low << 1)

    behind = ((single | joined) << 1) & lines
    closing = lines | slashes & inside
    taken = (((behind + closing) ^ closing) | behind) & closing
    white &= ~taken
    starts |= white_starts(white, lines & ~taken, tails, inside)
    if whole:
        # Where white space ends that reaches the block's end is out of sight: only its beginning is certain.
        if (white >> length - 1) & 1:
            starts &= first_bits(run_start_at_end(white, inside, length))
    elif length < BLOCK:
        starts |= 1 << length

    apostrophes &= single & (letters << 1)
    while apostrophes != 0:
        place = trailing_zeros(apostrophes)
        apostrophes &= apostrophes - 1
        size = _contraction(data, at + place, end, True)
        if size > 0:
            starts &= ~(first_bits(size) << place)
            stop = place + size
            if stop < BLOCK:
                starts |= 1 << stop
                if ((letters | apostrophes) >> stop) & 1:
                    if stop < limit:
                        limit = stop + 1
                    break
    taken &= slashes
    if taken != 0:
        place = trailing_zeros(taken)
        stop = place + trailing_zeros(~down(closing, place))
        if place < limit:
            limit = place
            if stop < length or not whole:
                starts = starts & first_bits(place)
                limit = stop + 1
                if stop < BLOCK:
                    starts |= 1 << stop
    return starts & first_bits(limit) & ~1


scan = build("o200k", _starts)
longer = build_match("match_o200k")
