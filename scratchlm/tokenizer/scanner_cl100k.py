r"""cl100k's pattern, and those of Llama 3 and Qwen, on masks of 64 bytes (``scanner_blocks.py``):

    '(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+

    bytes    x = ( y ) ; ⏎ ␣ ␣ z ! a 1 2 3 4
    others   0 1 1 0 1 1 0 0 0 0 1 0 0 0 0 0
    single   0 0 0 0 0 0 0 0 0 0 1 0 0 0 0 0     a run of one character, and no blank has joined it
    letters  1 0 0 1 0 0 0 0 0 1 0 1 0 0 0 0     their runs begin pre-tokens, unless white space or `single` stands before
    taken    0 0 0 0 0 0 1 0 0 0 0 0 0 0 0 0     line ends behind others
    starts   1 1 0 1 1 0 0 1 1 0 1 0 1 0 0 1

The variants differ in how many digits make a group (Qwen: one), and in whether white space at the very end of a text is
one pre-token (cl100k as tiktoken has it today). Both stand in `option`.
"""

from __future__ import annotations

from scratchlm.tokenizer.scanner_blocks import (
    BLOCK,
    ascii_masks,
    build,
    build_match,
    digit_starts,
    first_bits,
    inner,
    inner_reference,
    run_start_at_end,
    trailing_zeros,
    white_starts,
    wide_masks,
)
from scratchlm.tokenizer.scanner_reference import TO_THE_END

_contraction = inner_reference("contraction")


@inner
def _starts(data, at, end, pages, leaves, option):
    length = end - at
    whole = length > BLOCK  # the text goes on behind the block
    if whole:
        length = BLOCK
    upper, lower, numbers, white, blanks, lines, apostrophes, _, high, continuation = ascii_masks(data, at)
    letters = upper | lower
    inside = first_bits(length)
    tails = 0
    high &= inside
    if high != 0:
        more = wide_masks(data, at, high, continuation & inside, whole, pages, leaves)
        letters |= more[0]
        numbers |= more[1]
        white |= more[2]
        tails = more[6]
        if more[7] < length:
            length = more[7]
            inside = first_bits(length)
    letters &= inside
    numbers &= inside
    white &= inside
    lines &= inside
    others = inside & ~(letters | numbers | white)

    opening = others & ~(others << 1) & ~(blanks << 1)  # others that no blank has joined
    second = ((opening << 1) + tails) & ~tails  # the character behind their first: adding 1 runs through its tails
    starts = opening | letters & ~(letters << 1 | (white & ~lines) << 1 | second)
    starts |= digit_starts(numbers, tails, option & 7)
    behind = (others << 1) & lines
    taken = ((behind + lines) ^ lines) & lines  # adding 1 to a run of line ends flips it
    white &= ~taken
    starts |= white_starts(white, lines & ~taken, tails, inside)
    apostrophes &= opening
    while apostrophes != 0:
        place = trailing_zeros(apostrophes)
        apostrophes &= apostrophes - 1
        size = _contraction(data, at + place, end, True)
        if size > 0 and place + size < BLOCK:
            starts |= 1 << (place + size)
    # Where white space ends that reaches the block's end is out of sight: only its beginning is certain.
    if (whole or option >= TO_THE_END) and (white >> length - 1) & 1:
        starts &= first_bits(run_start_at_end(white, inside, length))
    if not whole and length < BLOCK:
        starts |= 1 << length
    return starts & ~1


scan = build("cl100k", _starts)
longer = build_match("match_cl100k")
