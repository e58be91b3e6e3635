"""samples.txt: what the model wrote, verbatim, for people to read and for the report to show.

Every sample follows a header that counts its characters, so that nothing a model may write can be taken for the next
header::

    # sample 1 of 2: prompt of 4 characters, continuation of 21 characters
    def main():
        return 0
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from scratchlm.errors import UserError
from scratchlm.files import write_text

_HEADER = re.compile(r"# sample \d+ of \d+: prompt of (\d+) characters, continuation of (\d+) characters\n")


class Sample(NamedTuple):
    """One prompt and what the model made of it."""

    prompt: str
    continuation: str


def write_samples(path: str | os.PathLike[str], samples: Iterable[tuple[str, str]]) -> None:
    """Write samples atomically as UTF-8.

    Args:
        path: the file, samples.txt by custom.
        samples: (prompt, continuation) pairs; lone surrogates, which UTF-8 cannot hold, become ``?``.
    """
    texts = [[part.encode("utf-8", "replace").decode("utf-8") for part in sample] for sample in samples]
    parts = [
        f"# sample {number} of {len(texts)}: prompt of {len(prompt)} characters, "
        f"continuation of {len(continuation)} characters\n{prompt}{continuation}\n\n"
        for number, (prompt, continuation) in enumerate(texts, start=1)
    ]
    write_text(path, "".join(parts))


def read_samples(path: str | os.PathLike[str]) -> list[Sample]:
    """Read what :func:`write_samples` wrote; a file in any other form is one sample without a prompt.

    Raises:
        UserError: the file is missing.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8", "replace")  # bytes: line ends stay as the model wrote them
    except OSError as error:
        raise UserError(f"cannot read samples {path}: {error.strerror}") from error
    samples, position = [], 0
    while position < len(text):
        header = _HEADER.match(text, position)
        if header is None:
            return [Sample("", text)]
        middle = header.end() + int(header[1])
        end = middle + int(header[2])
        samples.append(Sample(text[header.end() : middle], text[middle:end]))
        position = end + 2
    return samples
