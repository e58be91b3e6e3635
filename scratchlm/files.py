"""Writing files so that nothing is ever half there: temporary name, fsync, rename.

The reader of a file sees either the old content or the new one, also when the process is killed or the disk fills up in
between. A folder that appears is there with all its files or not at all; one that replaces another takes two renames,
between which a reader finds neither (and a process killed just there leaves the old one as ``.<name>.….old`` beside).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scratchlm.errors import UserError


def _sync_directory(directory: Path) -> None:
    """Make a rename in `directory` durable (a no-op where directories cannot be opened, as on Windows)."""
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _sync_file(path: Path) -> None:
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _host() -> str:
    """This machine in a few letters: where folders are shared, its process ids say nothing of the others' processes."""
    return hashlib.blake2b(platform.node().encode(), digest_size=4).hexdigest()


def _beside(target: Path, suffix: str) -> Path:
    """A hidden name in the same folder (so in the same file system), of this thread alone."""
    target = target.absolute()  # "." has no name
    return target.with_name(f".{target.name}.{_host()}-{os.getpid()}-{threading.get_ident()}.{suffix}")


def _is_running(process: int) -> bool:
    if os.name != "posix":  # elsewhere there is no harmless signal to ask with
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _remove_leftovers(target: Path) -> None:
    """Delete the half-written folders that killed processes of this machine left beside `target`."""
    name = re.compile(re.escape(f".{target.name}.{_host()}-") + r"(\d+)-\d+\.tmp")
    for path in list(target.parent.iterdir()):
        if (found := name.fullmatch(path.name)) and not _is_running(int(found[1])):
            shutil.rmtree(path, ignore_errors=True)


def expanded(path: str | os.PathLike[str]) -> Path:
    """`path` with a leading ``~`` or ``~user`` as that user's folder; as it is where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def new_folder(target: str | os.PathLike[str]) -> Path:
    """The folder a user names to write to, which must be new or empty; ``~`` is expanded.

    Raises:
        UserError: it holds something, is a file, or is the one the process is in (which a rename would pull from under it).
    """
    target = expanded(target)
    with disk_errors(target):
        if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
            raise UserError(f"{target} exists and is not an empty folder; choose another one")
        _refuse_current(target)
    return target


def _refuse_current(target: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        if target.samefile("."):
            raise UserError(f"cannot write into the folder you are in ({target}); name another")


@contextlib.contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write `target` into a :class:`UserError` that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"no space left while writing {target}: nothing was changed there; free some space and run again"
            ) from error
        if error.errno in (
            errno.EACCES,
            errno.EPERM,
            errno.EROFS,
            errno.ENOTDIR,
            errno.EISDIR,
            errno.EEXIST,
            errno.ENOTEMPTY,
            errno.EBUSY,  # a rename to "."
        ):
            raise UserError(f"cannot write {target}: {error.strerror}; choose another place") from error
        raise


_ATTEMPTS = 100  # at a rename that another process keeps getting ahead of
_BUSY = (errno.EWOULDBLOCK, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # as on some network file systems


@contextlib.contextmanager
def lock(path: str | os.PathLike[str], *, wait: bool = True, busy: str = "") -> Iterator[None]:
    """Hold the lock file `path` for the length of a ``with`` block: one process (and one thread of it) at a time.

    The system frees the lock when its holder ends, however it ends, so none is ever left behind; the empty file is.
    Where there are no such locks (Windows, some network file systems) the block runs without one.

    Args:
        path: the lock file. It and its folder are created.
        wait: wait until the lock is free; otherwise refuse at once.
        busy: one line said when another process holds the lock: on stderr when waiting, else the error's message.

    Raises:
        UserError: another process holds the lock (without `wait`), or the lock file cannot be written.
    """
    path = Path(path)
    try:
        import fcntl
    except ImportError:
        yield
        return
    with contextlib.ExitStack() as stack:
        with disk_errors(path):
            held = False
            while not held:
                path.parent.mkdir(parents=True, exist_ok=True)
                handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
                closing = stack.enter_context(contextlib.ExitStack())
                closing.callback(os.close, handle)
                try:
                    try:
                        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except OSError as error:
                        if error.errno not in _BUSY:
                            raise
                        if not wait:
                            raise UserError(
                                busy or f"another process is working in {path.parent}; wait until it ends"
                            ) from error
                        if busy:
                            print(busy, file=sys.stderr)
                        fcntl.flock(handle, fcntl.LOCK_EX)
                except OSError as error:
                    if error.errno not in _NO_LOCKS:
                        raise
                    break
                # Whoever waited may hold a file that was deleted or moved meanwhile, with its folder: take the new one.
                held = path.exists() and os.path.samestat(os.fstat(handle), path.stat())
                if not held:
                    closing.close()
        yield


@contextlib.contextmanager
def atomic_path(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `target`; on success it replaces `target`, on any error it is removed.

    Args:
        target: the file that shall appear, complete or not at all. Its folder is created.

    Raises:
        UserError: the disk is full or the place cannot be written; `target` is then as it was.
    """
    target = Path(target)
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _beside(target, "tmp")
        try:
            yield temporary
            _sync_file(temporary)
            temporary.replace(target)
            _sync_directory(target.parent)
        finally:
            temporary.unlink(missing_ok=True)


def _put_in_place(temporary: Path, target: Path, old: Path) -> None:
    """Rename the folder `temporary` to `target`; what is there, or appears there meanwhile, is moved to `old` first."""
    for attempt in itertools.count(1):
        with contextlib.suppress(FileNotFoundError):  # none there, or just moved away by another process
            target.rename(old)
        try:
            temporary.rename(target)
            return
        except OSError as error:
            if not target.exists():
                with contextlib.suppress(OSError):
                    old.rename(target)
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or attempt == _ATTEMPTS:
                raise
        # Another process was quicker: its folder goes the same way.
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def atomic_directory(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder beside `target`; on success (all its files synced) it becomes `target`.

    An existing `target` is replaced only when the new one is complete. When several processes make the same folder at
    once, each succeeds and the last one's stays. What a killed process left of the same folder is removed.

    Raises:
        UserError: the disk is full, the place cannot be written or is the current folder; `target` is then as it was.
    """
    target = Path(target).resolve()  # where a link leads to, so that the link stays
    with disk_errors(target):
        _refuse_current(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        temporary, old = _beside(target, "tmp"), _beside(target, "old")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            for path in (*temporary.rglob("*"), temporary):
                if path.is_dir():
                    _sync_directory(path)
                elif path.is_file():
                    _sync_file(path)
            _put_in_place(temporary, target, old)
            _sync_directory(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def write_bytes(target: str | os.PathLike[str], content: bytes) -> None:
    """Write `content` to `target` atomically."""
    with atomic_path(target) as temporary:
        temporary.write_bytes(content)


def write_text(target: str | os.PathLike[str], content: str) -> None:
    """Write `content` to `target` atomically as UTF-8, line ends untouched."""
    write_bytes(target, content.encode("utf-8"))


def write_json(target: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as readable JSON, atomically."""
    write_text(target, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | os.PathLike[str], what: str = "file") -> Any:
    """Read a JSON file.

    Raises:
        UserError: it is missing or is not JSON; `what` names it in the message.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{what} {path} does not exist") from error
    except IsADirectoryError as error:
        raise UserError(f"{what} {path} is a folder, not a file") from error
    except OSError as error:
        raise UserError(f"cannot read {what} {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and thousands of brackets
        raise UserError(
            f"{what} {path} is not valid JSON ({error}); it may be cut off or of another kind"
        ) from error


def stable_hash(value: Any, length: int = 16) -> str:
    """Hex digest of any JSON-able `value`, independent of key order: the name of a step's inputs."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.blake2b(canonical.encode(), digest_size=length // 2).hexdigest()


def file_hash(path: str | os.PathLike[str], length: int = 32) -> str:
    """Hex BLAKE2b digest of a file's content, read in blocks (memory independent of its size)."""
    digest = hashlib.blake2b(digest_size=length // 2)
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
