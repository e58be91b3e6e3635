"""JSON lines: one object per line, its text in one field."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from scratchlm.data.corpus import FileCorpus, valid_utf8
from scratchlm.data.text import open_bytes
from scratchlm.errors import UserError


class JsonlCorpus(FileCorpus):
    """``.jsonl`` files, also compressed (``.jsonl.gz``, ``.jsonl.zst``); a document per line.

    Blank lines and records whose text is null or "" are passed over. A lone surrogate (``"\\ud800"``) is no character
    and has no UTF-8: it counts as an encoding error.
    """

    fields = ("text_field",)

    def read(self, path: Path) -> Iterator[bytes]:
        offset = 0
        with open_bytes(path) as file:
            for number, line in enumerate(file, start=1):
                yield self._text(line, f"{path}, line {number}", offset).encode("utf-8")
                offset += len(line)

    def _text(self, line: bytes, where: str, offset: int) -> str:
        content = valid_utf8(line, self.config, where, offset).decode("utf-8").strip("\ufeff \t\r\n")
        if not content:
            return ""
        try:
            record = json.loads(content)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{where}: not valid JSON ({error}); every line must be one whole object") from error
        if not isinstance(record, dict):
            raise UserError(
                f"{where}: a {type(record).__name__}, not an object with a field {self.config.text_field!r}"
            )
        if self.config.text_field not in record:
            raise UserError(
                f"{where}: no field {self.config.text_field!r}; it has {', '.join(record) or 'none'}: set corpus.text_field"
            )
        text = record[self.config.text_field]
        if text is None:
            return ""
        if not isinstance(text, str):
            raise UserError(f"{where}: field {self.config.text_field!r} is a {type(text).__name__}, not a string")
        if "\\u" in content:
            return self._without_surrogates(text, where)
        return text

    def _without_surrogates(self, text: str, where: str) -> str:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            if self.config.encoding_errors == "skip":
                return ""
            if self.config.encoding_errors == "replace":
                return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            raise UserError(
                f"{where}: character {error.start} is a lone surrogate, which UTF-8 cannot hold; correct it, or set "
                "corpus.encoding_errors to replace or skip"
            ) from error
        return text
