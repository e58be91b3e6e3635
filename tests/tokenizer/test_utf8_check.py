"""The compiled check says of all bytes what Python's decoder says."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from scratchlm.tokenizer.utf8_check import is_utf8


def expected(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


@given(
    parts=st.lists(
        st.one_of(st.binary(max_size=5), st.text(max_size=9).map(str.encode), st.just(b"plain ascii, more than 8"))
    ),
)
@settings(deadline=None, max_examples=500)
def test_any_bytes(parts):
    data = b"".join(parts)
    assert is_utf8(data) == expected(data)


def test_all_beginnings():
    """Every lead and second byte, at every distance from the end and from a block of 8."""
    for lead in range(256):
        for second in range(256):
            for rest in (b"", b"\x80", b"\x80\xbf", b"\xc0\x80", b"\x80a"):
                data = bytes([lead, second]) + rest
                assert is_utf8(data) == expected(data), data


def test_long_texts_with_one_wrong_byte():
    rng = random.Random(0)
    text = "".join(rng.choices("abc é漢😀\n", k=400)).encode()
    assert is_utf8(text) and is_utf8(b"")
    for place in rng.sample(range(len(text)), 200):
        data = bytearray(text)
        data[place] ^= 1 << rng.randrange(8)
        assert is_utf8(bytes(data)) == expected(bytes(data))
