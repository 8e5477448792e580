"""Files: those of others are read within bounds, our own are complete or absent, whatever kills the process."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, cast

from .errors import FileError

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

MAX_JSON_BYTES = 256 << 20  # the list of images of a run on a hundred million files is far below
MAX_JSON_DEPTH = 32
PNG_METADATA = {"Software": "convnextv2_kernels"}  # of every picture written: a folder of images leaves them out
_KINDS = (
    (stat.S_ISDIR, "folder"),
    (stat.S_ISFIFO, "FIFO"),
    (stat.S_ISCHR, "device"),
    (stat.S_ISBLK, "device"),
    (stat.S_ISSOCK, "socket"),
)


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file to read bytes; links are followed.

    A FIFO without a writer would block for ever, and a device may be endless: neither is opened for reading.

    Raises:
        FileError: anything but a regular file.
        OSError: no such file, or one that cannot be opened.
    """
    _require_regular(path, path.stat().st_mode)
    # Between the two calls the file may have become a FIFO: do not wait for its writer, and look again.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    try:
        _require_regular(path, os.fstat(handle).st_mode)
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def _require_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((kind for is_kind, kind in _KINDS if is_kind(mode)), "special file")
        raise FileError(f"{path} is a {kind}, expected a regular file")


def read_bytes(path: Path, limit: int) -> bytes:
    """Return the content of a regular file of at most ``limit`` bytes.

    Raises:
        FileError: a larger file, or anything but a regular one.
        OSError: a file that cannot be read.
    """
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise FileError(f"{path} is larger than {limit} bytes, the most that is read of such a file")
    return content


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> Any:
    """Return the content of a JSON file.

    Raises:
        FileError: no JSON in UTF-8; nested more than :data:`MAX_JSON_DEPTH` deep; an integer beyond 64 bits; more than
            ``limit`` bytes; anything but a regular file.
        OSError: a file that cannot be read.
    """
    return parse_json(read_bytes(path, limit), str(path))


def parse_json(content: bytes, what: str) -> Any:
    """Return the value of a JSON text within the bounds of :func:`read_json`; errors call it ``what``."""
    try:
        value = json.loads(content, parse_int=_int64)
    except RecursionError:
        raise FileError(f"{what} is nested more than {MAX_JSON_DEPTH} deep") from None
    except ValueError as error:
        raise FileError(f"{what} is not valid JSON: {error}") from None
    if _deeper_than(value, MAX_JSON_DEPTH):
        raise FileError(f"{what} is nested more than {MAX_JSON_DEPTH} deep")
    return value


def _int64(text: str) -> int:
    value = int(text) if len(text) <= 20 else 1 << 64
    if not -(1 << 63) <= value < 1 << 63:
        raise ValueError(f"an integer of {len(text.lstrip('-'))} digits is beyond 64 bits")
    return value


def _deeper_than(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth + 1):
        level = [
            item
            for container in level
            if isinstance(container, (dict, list))
            for item in (container.values() if isinstance(container, dict) else container)
        ]
    return bool(level)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a rename in it survives a power cut."""
    if os.name != "posix":
        return  # Windows has no handle for a folder to flush.
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class _Recorded(io.RawIOBase):
    """A file to write that remembers its first error: what writes to it may report another one instead."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def fileno(self) -> int:
        return self._file.fileno()

    def flush(self) -> None:
        if not self.closed:
            self._file.flush()


def _new_temporary(path: Path) -> tuple[Path, int]:
    """A new file to write, locked as long as it is open."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    while True:
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
        handle = os.open(temporary, flags | getattr(os, "O_BINARY", 0), 0o666)
        # Before it was locked, another process may have taken it for abandoned.
        if not _lock(handle, wait=True) or os.fstat(handle).st_nlink:
            return temporary, handle
        os.close(handle)


def _lock(handle: int, wait: bool) -> bool:
    """Whether an open file could be locked, which the end of the process undoes. Not every file system has locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def remove_abandoned(folder: Path, name: str | None = None) -> None:
    """Delete the temporary files that killed processes left of :func:`atomic_file` in a folder, or for one ``name``.

    The lock of a file tells whether it is still written, from another container too. What cannot be deleted stays.
    """
    if not folder.is_dir():
        return
    target = ".+" if name is None else re.escape(name)
    for entry in folder.iterdir():
        if not re.fullmatch(rf"\.{target}\.\d+(\.[0-9a-f]{{8}})?\.tmp", entry.name, re.DOTALL):
            continue
        with contextlib.suppress(OSError):
            if not stat.S_ISREG(entry.lstat().st_mode):
                continue
            handle = os.open(entry, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0))
            try:
                if _lock(handle, wait=False):
                    entry.unlink()
            finally:
                os.close(handle)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file that takes the name ``path`` only once it is complete and on disk.

    The bytes go to a hidden temporary file of a new name in the same folder (a rename is atomic only within one file
    system), which never follows a link that somebody planted. If the body raises, the temporary file is removed and
    ``path`` is left as it was; where the cause was a failed write, that OSError is raised, whatever the body made of
    it. A killed process cannot remove its own: see :func:`remove_abandoned`.
    """
    try:
        temporary, handle = _new_temporary(path)
    except OSError as error:
        error.filename = str(path)
        raise
    recorded = None
    try:
        with os.fdopen(handle, "wb") as file:
            recorded = _Recorded(file)
            yield cast(BinaryIO, recorded)
            recorded.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        cause = recorded.error if recorded is not None else None
        for failed in (error, cause):
            if isinstance(failed, OSError) and failed.filename is None:
                failed.filename = str(path)  # a failed write knows only a number
        if cause is not None and error is not cause and isinstance(error, Exception):
            raise cause from error
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())
