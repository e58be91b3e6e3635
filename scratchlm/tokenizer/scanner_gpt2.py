r"""GPT-2's pattern on masks of 64 bytes (``scanner_blocks.py``):

    '(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+

    bytes    I t ' s ␣ ␣ 4 2 , ␣ o k
    letters  1 1 0 1 0 0 0 0 0 0 1 1
    starts   1 0 1 1 1 0 1 0 1 1 1 0     each run of a class begins a pre-token …
             1 0 1 1 1 1 0 0 1 1 0 0     … a blank before it joins it; the last of several white characters stands alone …
             1 0 1 0 1 1 0 0 1 1 0 0     … and a contraction takes its letters along

A block begins where a pre-token begins, so nothing has to be carried over from the one before. What the block leaves open
(its last pre-token) is looked at again as the beginning of the next.
"""

from __future__ import annotations

from scratchlm.tokenizer.scanner_blocks import (
    BLOCK,
    ascii_masks,
    build,
    build_match,
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
    upper, lower, numbers, white, blanks, _, apostrophes, _, high, continuation = ascii_masks(data, at)
    letters = upper | lower
    inside = first_bits(length)
    tails = 0
    high &= inside
    if high != 0:
        more = wide_masks(data, at, high, continuation & inside, whole, pages, leaves)
        letters |= more[0]
        numbers |= more[1]
        white |= more[2]
        tails, length = more[6], min(length, more[7])
        inside = first_bits(length)
    letters &= inside
    numbers &= inside
    white &= inside
    others = inside & ~(letters | numbers | white)

    starts = letters & ~(letters << 1) | numbers & ~(numbers << 1) | others & ~(others << 1)
    starts &= ~(blanks << 1)
    starts |= white_starts(white, 0, tails, inside)
    apostrophes &= starts
    while apostrophes != 0:
        place = trailing_zeros(apostrophes)
        apostrophes &= apostrophes - 1
        size = _contraction(data, at + place, end, False)
        if size > 0:
            starts &= ~(2 << place)
            if place + size < BLOCK:
                starts |= 1 << (place + size)
    if not whole:
        if length < BLOCK:
            starts |= 1 << length
    elif (white >> length - 1) & 1:
        # Where the white space ends is out of sight: only its beginning is certain.
        starts &= first_bits(run_start_at_end(white, inside, length))
    return starts & ~1


scan = build("gpt2", _starts)
longer = build_match("match_gpt2")
