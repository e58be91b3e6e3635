"""Parquet files: one column holds the text, read row group by row group."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scratchlm.data.corpus import SPLITS, FileCorpus, valid_utf8
from scratchlm.errors import UserError

ROWS = 1024  # at a time


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            "corpus.kind = 'parquet' needs the package pyarrow: pip install 'scratchlm[parquet]'"
        ) from error
    return pyarrow


class ParquetCorpus(FileCorpus):
    """``.parquet`` files; a document per row of column `text_field`. Rows that are null or "" are passed over."""

    fields = ("text_field",)

    def __init__(self, config: Any) -> None:
        self._arrow = _pyarrow()
        super().__init__(config)

    def _open(self, path: Path) -> Any:
        try:
            return self._arrow.parquet.ParquetFile(path)
        except (self._arrow.ArrowException, OSError) as error:
            raise UserError(
                f"{path}: cannot be read as Parquet ({error}); it may be cut off or of another kind"
            ) from error

    def read(self, path: Path) -> Iterator[bytes]:
        arrow, name = self._arrow, self.config.text_field
        with self._open(path) as file:
            schema = file.schema_arrow
            if name not in schema.names:
                raise UserError(
                    f"{path}: no column {name!r}; it has {', '.join(schema.names)}: set corpus.text_field"
                )
            kind = schema.field(name).type
            if arrow.types.is_dictionary(kind):
                kind = kind.value_type
            texts = (arrow.string(), arrow.large_string(), arrow.binary(), arrow.large_binary())
            if kind not in texts:
                raise UserError(f"{path}: column {name!r} holds {kind}, not text; set corpus.text_field to another")
            row = 0
            try:
                for batch in file.iter_batches(batch_size=ROWS, columns=[name], use_threads=False):
                    # As bytes: Parquet does not promise that its strings are UTF-8.
                    for data in batch.column(0).cast(kind).cast(arrow.large_binary()).to_pylist():
                        yield b"" if data is None else valid_utf8(data, self.config, f"{path}, row {row}")
                        row += 1
            except (arrow.ArrowException, OSError) as error:
                raise UserError(
                    f"{path}, after row {row}: cannot be read ({error}); the file is damaged"
                ) from error

    def total_bytes(self) -> int | None:
        if self.config.max_documents is not None:
            return None
        total = 0
        for split in SPLITS:
            for _, path in self.files[split]:
                with self._open(path) as file:
                    for group in range(file.metadata.num_row_groups):
                        columns = file.metadata.row_group(group)
                        for index in range(columns.num_columns):
                            column = columns.column(index)
                            if column.path_in_schema == self.config.text_field:
                                total += column.total_uncompressed_size
        return total or None
