"""The Python standard library as a corpus: some 10 MB of good text on every machine that can run this package."""

from __future__ import annotations

import io
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from scratchlm.data.corpus import FileCorpus, Split, valid_utf8
from scratchlm.errors import UserError

# Tests are repetitive and partly broken on purpose; the others are not the library, or not text someone wrote.
EXCLUDED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
# Written or changed by whoever built or installed this Python: they differ between machines of one version.
MACHINE_FILES = ("_sysconfigdata", "sitecustomize", "usercustomize")


def stdlib_files(root: Path) -> list[tuple[str, Path]]:
    """The library's own ``.py`` files below `root` as (relative posix path, path), sorted by the former."""
    files = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        folders = relative.parts[:-1]
        if EXCLUDED_FOLDERS.intersection(folders) or any(folder.startswith("config-") for folder in folders):
            continue
        if not relative.name.startswith(MACHINE_FILES):
            files.append((relative.as_posix(), path))
    return sorted(files)


class StdlibCorpus(FileCorpus):
    """One document per file, named by its path within the library; held out by a hash of that name.

    Files are kept byte for byte. The few that declare another encoding (PEP 263) are decoded by it, and so enter as
    UTF-8; for what cannot be decoded `encoding_errors` holds.
    """

    def find_files(self) -> dict[Split, list[tuple[str, Path]]]:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = stdlib_files(root) if root.is_dir() else []
        if not files:
            raise UserError(
                f"no Python standard library in {root}; set corpus.kind to text and name files of your own"
            )
        return {"train": files, "validation": []}

    def one_per_file(self) -> bool:
        return True

    def describe(self) -> str:
        return "corpus python-stdlib"

    def read(self, path: Path) -> Iterator[bytes]:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        try:
            encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
            if not encoding.startswith("utf-8"):  # utf-8-sig: a byte order mark stays, as the bytes have it
                yield data.decode(encoding).encode("utf-8")
                return
        except (SyntaxError, UnicodeDecodeError, LookupError):
            pass  # no usable declaration: UTF-8, or the policy for what is not
        yield valid_utf8(data, self.config, str(path))
