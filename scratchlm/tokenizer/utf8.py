"""A str as UTF-8, with as little copying as can be.

    bytes, and ASCII str    are their own UTF-8: no copy
    any other str           "… l e ␣ c a f é …"  ──16,384 characters at a time──►  buffer that is used again

A str with one emoji takes four bytes for each of its characters. Parts of it that are ASCII are narrowed by a loop that the compiler
made wide, much faster than `str.encode` goes through the whole; and no fresh memory is touched.
"""

from __future__ import annotations

import ctypes

import numpy as np

from scratchlm.errors import UserError
from scratchlm.tokenizer.buffers import Buffers

_PART = 1 << 14


def utf8(text: str | bytes | bytearray | memoryview, buffers: Buffers | None = None) -> bytes | memoryview:
    """UTF-8 of `text`. It may be used as long as `text` lives.

    Args:
        text: bytes are taken as they are.
        buffers: where a long str is encoded to; None: into new bytes.

    Raises:
        UserError: a str holds a lone surrogate; its place is named.
    """
    if not isinstance(text, str):
        return text if isinstance(text, bytes) else memoryview(text).cast("B")
    if text.isascii():
        size = ctypes.c_ssize_t()
        address = _as_utf8(text, ctypes.byref(size))
        return memoryview((ctypes.c_char * size.value).from_address(address)).cast("B")
    if buffers is None or len(text) < 2 * _PART:
        return _encoded(text, 0)
    room = buffers.take(len(text) + len(text) // 4, np.uint8)
    at = 0
    for start in range(0, len(text), _PART):
        part = _encoded(text[start : start + _PART], start)
        if at + len(part) > len(room):
            larger = buffers.take(2 * len(room) + len(part), np.uint8)
            larger[:at] = room[:at]
            room = larger
        room.data[at : at + len(part)] = part
        at += len(part)
    return room[:at].data


def _encoded(text: str, offset: int) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text holds a lone surrogate at character {offset + error.start}, which UTF-8 cannot hold; "
            f"remove it, or give bytes"
        ) from error


_as_utf8 = ctypes.pythonapi.PyUnicode_AsUTF8AndSize
_as_utf8.restype = ctypes.c_void_p
_as_utf8.argtypes = [ctypes.py_object, ctypes.POINTER(ctypes.c_ssize_t)]
