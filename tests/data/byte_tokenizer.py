"""A tokenizer of bytes for the data room's tests: id = byte, the separator is 256. Picklable, importable by workers."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from scratchlm.errors import UserError


class ByteTokenizer:
    vocab_size = 257
    content_hash = "bytes"
    special_tokens: ClassVar[dict[str, int]] = {}

    def encode_array(self, data, allowed_special=()):
        return np.frombuffer(data, dtype=np.uint8).astype(np.uint16)

    def encode_documents(self, data, sizes, separator_id):
        ends = np.cumsum(sizes)
        pieces = [self.encode_array(data[end - size : end]) for size, end in zip(sizes, ends, strict=True)]
        separator = np.array([separator_id], pieces[0].dtype)
        return np.concatenate([part for piece in pieces for part in (piece, separator)]), sizes + 1


class FailingTokenizer(ByteTokenizer):
    """Raises `error` for a document that contains ``poison``."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error if error is not None else UserError("the document is poisonous")

    def encode_array(self, data, allowed_special=()):
        if b"poison" in data:
            raise self.error
        return super().encode_array(data, allowed_special)


class DyingTokenizer(ByteTokenizer):
    """Ends its process at a document that contains ``poison``, as the kernel does when memory runs out."""

    def encode_array(self, data, allowed_special=()):
        if b"poison" in data:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_array(data, allowed_special)


class SlowTokenizer(ByteTokenizer):
    """Takes its time, so that a test can kill the process in the middle."""

    def encode_array(self, data, allowed_special=()):
        import time

        time.sleep(0.01)
        return super().encode_array(data, allowed_special)
