"""Hugging Face datasets, from the Hub or from a local folder, through the package ``datasets``."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scratchlm.data import digests
from scratchlm.data.corpus import Corpus, Document, Split
from scratchlm.errors import UserError
from scratchlm.progress import progress

ROWS = 1000  # at a time


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            "corpus.kind = 'huggingface' needs the package datasets: pip install 'scratchlm[datasets]'"
        ) from error
    return datasets


class HuggingFaceCorpus(Corpus):
    """A document per row of column `text_field`; rows that are null or "" are passed over.

    `dataset` is a name on the Hub, a folder of data files, or a folder written by ``Dataset.save_to_disk``. It is
    downloaded once and then read from disk through a memory map, so memory does not grow with it. With `max_documents`
    it is streamed instead: a trial on the first thousand documents of a huge dataset downloads little more than those.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if not config.dataset:
            raise UserError(
                "corpus.dataset is empty; kind = 'huggingface' reads the dataset (or local folder) named there"
            )
        self._package = _datasets()
        self._opened: dict[str, Any] = {}
        self._content: dict[str, str] = {}  # digests by algorithm

    def describe(self) -> str:
        return f"corpus {self.config.dataset}"

    def has_own_validation(self) -> bool:
        return self.config.validation_split is not None

    def _name(self, split: Split) -> str:
        return self.config.train_split if split == "train" else self.config.validation_split or ""

    def _open(self, split: Split) -> Any:
        """The Dataset or IterableDataset behind `split`, its text column checked."""
        name = self._name(split)
        if name not in self._opened:
            rows = self._load(name)
            columns = rows.column_names
            if columns is not None and self.config.text_field not in columns:
                raise UserError(
                    f"dataset {self.config.dataset}, split {name}: no column {self.config.text_field!r}; it has "
                    f"{', '.join(columns)}: set corpus.text_field"
                )
            self._opened[name] = rows.select_columns([self.config.text_field]) if columns is not None else rows
        return self._opened[name]

    def _load(self, name: str) -> Any:
        config = self.config
        folder = Path(config.dataset or "")
        try:
            if (folder / "dataset_dict.json").is_file():
                saved = self._package.load_from_disk(str(folder))
                if name not in saved:
                    raise UserError(f"dataset {folder}: no split {name!r}; it has {', '.join(saved)}")
                return saved[name]
            if (folder / "state.json").is_file():  # one Dataset, without a name for its split
                if self.has_own_validation():
                    raise UserError(f"dataset {folder} holds a single split; leave corpus.validation_split out")
                return self._package.load_from_disk(str(folder))
            streaming = config.max_documents is not None
            return self._package.load_dataset(config.dataset, config.subset, split=name, streaming=streaming)
        except UserError:
            raise
        except Exception as error:  # anything from a lost connection to a misspelt name, in the library's own words
            reason = str(error).strip().split("\n")[0]
            if "scripts are no longer supported" in reason:
                reason += "; datasets 4 and later run none: name a copy in Parquet, or local files with corpus.kind = 'text'"
            raise UserError(
                f"cannot load dataset {config.dataset!r}"
                + (f", configuration {config.subset!r}" if config.subset else "")
                + f", split {name!r}: {reason or type(error).__name__}"
            ) from error

    def stream(self, split: Split) -> Iterator[Document]:
        rows = self._open(split)
        name = self._name(split)
        number = 0
        for batch in rows.iter(batch_size=ROWS):
            for text in batch[self.config.text_field]:
                if text is not None and not isinstance(text, str):
                    raise UserError(
                        f"dataset {self.config.dataset}, row {number}: column {self.config.text_field!r} holds a "
                        f"{type(text).__name__}, not text; set corpus.text_field"
                    )
                yield Document(f"{name}#{number}", (text or "").encode("utf-8"))
                number += 1

    def fingerprint(self, show_progress: bool = True, algorithm: str = digests.ALGORITHM) -> str:
        if algorithm not in self._content:
            digest = digests.new(algorithm)
            splits: tuple[Split, ...] = ("train", "validation") if self.has_own_validation() else ("train",)
            with progress(
                description="hash corpus", total=self.total_bytes(), bytes_=True, show=show_progress
            ) as bar:
                for split in splits:
                    documents = (document for document in self.stream(split) if document.utf8)
                    for document in itertools.islice(documents, self.config.max_documents):
                        data = document.utf8
                        digest.update(f"{document.name} {len(data)} ".encode())
                        digest.update(data)
                        bar.update(len(data))
            self._content[algorithm] = digest.hexdigest()
        return self._key(("train_split", "validation_split"), self._content[algorithm])

    def total_bytes(self) -> int | None:
        if self.config.max_documents is not None:
            return None
        splits: tuple[Split, ...] = ("train", "validation") if self.has_own_validation() else ("train",)
        return sum(self._open(split).data.nbytes for split in splits)
