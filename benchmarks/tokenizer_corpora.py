"""The texts of the tokenizer benchmark: found on the machine, the same bytes for the same files.

    prose         man pages, READMEs and documents in English    /usr/share/man, /usr/share/doc, Python packages' *.md, *.rst, *.txt
    python        Python source                                   /usr/lib/python3*, the running Python's library and packages
    multilingual  translations: message catalogues (.mo), help pages (.html, .page, .docbook), man pages, and Unicode's own
                  names of emoji in many languages (CLDR annotations): CJK, Cyrillic, Arabic, emoji, other scripts

A corpus is a list of documents (one per file, or per message catalogue), read in the order of their paths' hashes, so that any
prefix is a mixture, and cut off at the size asked for. Nothing is downloaded: a machine with few translations gets a smaller
corpus, and the result says how large it was, how many files it came from and the hash of its bytes. To have more text:
install documentation and language packages (``libreoffice-l10n-ja``, ``libreoffice-help-ja``, ``gnome-user-docs``,
``manpages-ja``, ``gimp-help-ja``, ``unicode-cldr-core`` and their like for other languages).
"""

from __future__ import annotations

import gettext
import gzip
import hashlib
import html
import json
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from scratchlm.files import write_bytes, write_json

SPECIAL = "<|endoftext|>"
SEPARATOR = b"\x00\x00"  # between documents in the cached file; no document holds a zero byte

# Shares of the multilingual corpus; what a script lacks on this machine goes to nobody.
SCRIPTS = {"cjk": 0.35, "cyrillic": 0.25, "arabic": 0.15, "emoji": 0.1, "other": 0.15}

_LANGUAGES = {
    "cjk": {"ja", "zh_CN", "zh_TW", "zh_HK", "zh-CN", "zh-TW", "ja-JP", "zh", "ko", "yue"},
    "cyrillic": {"ru", "uk", "bg", "sr", "be", "mk", "kk", "mn", "ky", "tg", "tt"},
    "arabic": {"ar", "fa", "ur", "ug", "ckb", "ps", "sd"},
    "other": {
        "el",
        "he",
        "hi",
        "th",
        "ka",
        "ta",
        "mr",
        "kn",
        "ml",
        "te",
        "bn",
        "vi",
        "fr",
        "de",
        "es",
        "pl",
        "tr",
        "cs",
        "sv",
    },
}


@dataclass(slots=True)
class Corpus:
    """Documents as UTF-8 bytes, without special tokens and zero bytes, and where they came from."""

    name: str
    documents: list[bytes]
    about: dict[str, object]

    @property
    def text(self) -> bytes:
        return b"".join(self.documents)

    @property
    def size(self) -> int:
        return sum(map(len, self.documents))

    def sample(self, megabytes: float) -> Corpus:
        """About `megabytes` of it: every n-th document, so that the mixture stays the same."""
        step = max(1, round(self.size / (megabytes * 1e6)))
        return Corpus(self.name, self.documents[::step], self.about)


# ------------------------------------------------------------------ finding files


def _files(folders: list[str | Path], wanted: Callable[[Path], bool]) -> list[Path]:
    found = {}
    for folder in folders:
        root = Path(folder)
        if root.is_dir():
            for path in root.rglob("*"):
                if wanted(path) and path.is_file() and not path.is_symlink():
                    found[path.as_posix()] = path
    # By hash of the path: neighbours in a folder are alike, a prefix of the corpus shall be like the whole.
    return [
        found[name]
        for name in sorted(found, key=lambda name: hashlib.blake2b(name.encode("utf-8", "replace")).digest())
    ]


def _python_folders() -> list[str | Path]:
    paths = sysconfig.get_paths()
    return sorted(
        {paths["stdlib"], paths["purelib"], paths["platlib"], *map(str, Path("/usr/lib").glob("python3*"))}
    )


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, gzip.BadGzipFile):
        return b""


def _beyond_ascii(data: bytes) -> int:
    """Bytes that belong to characters beyond ASCII."""
    return len(data) - len(data.translate(None, bytes(range(128, 256))))


def _clean(data: bytes) -> bytes:
    """`data` if it is UTF-8 text, without what stands for a boundary here; b"" if it is not."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return b""
    return (
        data if "\0" not in text and SPECIAL not in text else text.replace("\0", "").replace(SPECIAL, "").encode()
    )


def _prose() -> Iterator[bytes]:
    def wanted(path: Path) -> bool:
        if "man" in path.parts:
            return path.parent.name.startswith("man") and path.parent.parent.name == "man"
        name = path.name.removesuffix(".gz")
        return name.endswith((".txt", ".md", ".rst")) or name.startswith(
            ("README", "copyright", "changelog", "NEWS")
        )

    seen = set()
    for path in _files(["/usr/share/man", "/usr/share/doc", *_python_folders()], wanted):
        data = _clean(_read(path))
        key = hashlib.blake2b(data, digest_size=16).digest()
        if data and key not in seen and _beyond_ascii(data[:4096]) < 100:  # licences come in hundreds of copies
            seen.add(key)
            yield data


def _python() -> Iterator[bytes]:
    seen = set()
    for path in _files(_python_folders(), lambda path: path.suffix == ".py"):
        data = _clean(_read(path))
        key = hashlib.blake2b(data, digest_size=16).digest()
        if data and key not in seen:
            seen.add(key)
            yield data


# ------------------------------------------------------------------ many scripts


def _language(path: Path) -> str:
    """The script group of a translated file, from the folder named after its language; "" for one we do not use."""
    for part in reversed(path.parts[:-1]):
        for script, languages in _LANGUAGES.items():
            if part in languages:
                return script
    return ""


def _catalogue(path: Path) -> bytes:
    """The translations in a compiled message catalogue, a line each; those left in English are not."""
    try:
        with path.open("rb") as file:
            messages = gettext.GNUTranslations(file)._catalog.values()  # type: ignore[attr-defined]
    except (OSError, UnicodeDecodeError, ValueError, LookupError, IndexError):
        return b""
    lines = [text for text in messages if isinstance(text, str) and not text.isascii()]
    return "\n".join(lines).encode("utf-8", "ignore")


_MARKUP = re.compile(r"<(script|style)\b.*?</\1>|<[^>]*>", re.DOTALL | re.IGNORECASE)


def _page(path: Path) -> bytes:
    """The text of a help page: markup removed, and lines in which nothing is left."""
    text = html.unescape(_MARKUP.sub("", _read(path).decode("utf-8", "ignore")))
    return "\n".join(line.strip() for line in text.splitlines() if line.strip()).encode("utf-8", "ignore")


_ANNOTATION = re.compile(r'<annotation cp="([^"]+)"[^>]*>([^<]*)</annotation>')


def _annotations(path: Path) -> bytes:
    """Emoji with what they are called in one language: ``😀 smile | face``."""
    pairs = _ANNOTATION.findall(_read(path).decode("utf-8", "ignore"))
    return "\n".join(html.unescape(f"{emoji} {names} {emoji * 3}") for emoji, names in pairs).encode(
        "utf-8", "ignore"
    )


def _translations() -> Iterator[tuple[str, bytes]]:
    """Pairs of script and document."""
    places = ["/usr/share/locale", "/usr/share/help", "/usr/share/man", "/usr/share/doc", "/usr/share/gimp"]
    places += ["/usr/share/libreoffice/help", "/usr/lib/libreoffice/program/resource", "/usr/share/unicode"]
    seen = set()
    for path in _files(places, lambda path: path.suffix in (".mo", ".html", ".page", ".docbook", ".xml", ".gz")):
        if path.suffix == ".xml" and path.parent.name.startswith("annotations"):
            script, data = "emoji", _annotations(path)
        elif not (script := _language(path)):
            continue
        elif path.suffix == ".mo":
            data = _catalogue(path)
        elif path.suffix == ".gz":
            data = _read(path) if "man" in path.parts else b""
        else:
            data = _page(path)
        data = _clean(data)
        key = hashlib.blake2b(data, digest_size=16).digest()
        # At least a quarter of the bytes belong to characters beyond ASCII (French and German have about a tenth).
        dense = _beyond_ascii(data[:8192]) * (4 if script != "other" else 30) >= min(len(data), 8192)
        if data and dense and key not in seen:
            seen.add(key)
            yield script, data


# ------------------------------------------------------------------ building and caching


def _take(documents: Iterator[bytes], size: int) -> list[bytes]:
    taken, total = [], 0
    for document in documents:
        taken.append(document[: size - total].decode("utf-8", "ignore").encode())  # never half a character
        total += len(document)
        if total >= size:
            break
    return taken


def _find(name: str, size: int) -> dict[str, list[bytes]]:
    """The documents that belong under `name`; for a script, those of all scripts, found in one search."""
    if name not in SCRIPTS:
        return {name: _take({"prose": _prose, "python": _python}[name](), size)}
    found: dict[str, list[bytes]] = {script: [] for script in SCRIPTS}
    have = Counter[str]()
    for script, document in _translations():
        if have[script] < SCRIPTS[script] * size:
            found[script].append(document)
            have[script] += len(document)
    return found


def _mixed(scripts: dict[str, list[bytes]]) -> list[bytes]:
    """All documents, each script's spread evenly over the whole."""
    placed = [
        (number / len(documents), script, document)
        for script, documents in scripts.items()
        for number, document in enumerate(documents)
    ]
    return [document for _, _, document in sorted(placed, key=lambda entry: entry[:2])]


def load(name: str, megabytes: float, cache: Path) -> Corpus:
    """A corpus from the cache folder, where it is kept as one file; found on the machine first if it is not there.

    Args:
        name: ``prose``, ``python``, ``multilingual``, or a script of the last: ``cjk``, ``cyrillic``, ``arabic``, ``emoji``.
        megabytes: how much at most, in 10^6 bytes (of the whole multilingual corpus for one of its scripts).
        cache: folder for what is found, so that later runs and other processes read the same bytes.
    """
    path = cache / f"{name}-{megabytes:g}.bin"
    if not path.exists():
        if name == "multilingual":
            scripts = {script: load(script, megabytes, cache).documents for script in SCRIPTS}
            _keep(name, _mixed(scripts), megabytes, cache)
        else:
            for each, documents in _find(name, int(megabytes * 1e6)).items():
                _keep(each, documents, megabytes, cache)
    data = path.read_bytes()
    documents = data.split(SEPARATOR) if data else []
    return Corpus(name, documents, json.loads(path.with_suffix(".json").read_text()))


def _keep(name: str, documents: list[bytes], megabytes: float, cache: Path) -> None:
    content = SEPARATOR.join(documents)
    about = {
        "bytes": sum(map(len, documents)),
        "documents": len(documents),
        "ascii": round(
            sum(len(document) - _beyond_ascii(document) for document in documents)
            / max(1, sum(map(len, documents))),
            3,
        ),
        "blake2b": hashlib.blake2b(content, digest_size=16).hexdigest(),
    }
    write_json(cache / f"{name}-{megabytes:g}.json", about)
    write_bytes(cache / f"{name}-{megabytes:g}.bin", content)


# ------------------------------------------------------------------ inputs meant to hurt


def adversarial(size: int) -> dict[str, bytes]:
    """Texts of `size` bytes, each against one weakness: quadratic merging, caches, class tables, block scanners."""
    from numpy.random import default_rng

    random = default_rng(7)

    def characters(low: int, high: int) -> bytes:
        codes = random.integers(low, high, size // 3 + 1)
        codes = codes[(codes < 0xD800) | (codes > 0xDFFF)]
        return "".join(map(chr, codes)).encode()[:size].decode("utf-8", "ignore").encode()

    letters = bytes(random.integers(97, 123, size, dtype="uint8"))
    return {
        "one letter": b"a" * size,
        "random letters, no spaces": letters,
        "two letters, no spaces": bytes(random.integers(97, 99, size, dtype="uint8")),
        "base64, no spaces": bytes(
            random.choice(list(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"), size).astype(
                "uint8"
            )
        ),
        "random code points": characters(1, 0x110000),
        "Han without spaces": characters(0x4E00, 0x9FA6),
        "alternating classes": (b"a1.b2,c3 " * (size // 9 + 1))[:size],
        "one space": b" " * size,
        "line ends": b"\r\n" * (size // 2),
        "words never seen twice": re.sub(rb"(.{7})", rb"\1 ", letters)[:size],
        "apostrophes": (b"'s't're've'm'll'd'S'x" * (size // 21 + 1))[:size],
        "random bytes": bytes(random.integers(0, 256, size, dtype="uint8")),
    }
