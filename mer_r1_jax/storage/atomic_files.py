"""Files that are there whole or not at all and survive a power cut, and the error of one that cannot be written.

The order is the same wherever a file is written: beside its place, synced, then renamed. The error says what could not
be written, where, how much room there is, and how to go on.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mer_r1_jax import faults
from mer_r1_jax.foreign_text import printable

# What a user mends by making room, mending permissions or changing the disk.
DISK_ERRORS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG, errno.ESTALE}
)


class WriteError(OSError):
    """Something that could not be written; still an OSError, with its `errno`, for those who go on without it."""

    def __init__(self, number: int | None, message: str):
        super().__init__(number, message)
        self.message = message

    def __str__(self) -> str:
        return self.message


@contextlib.contextmanager
def writing(what: str, path: str | os.PathLike) -> Iterator[None]:
    """Turns an OSError inside into a WriteError. Whatever writes there leaves whole files or none.

    Args:
        what: the thing in words, such as "the export".
        path: the file or folder.
    """
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(error.errno, explanation(what, path, error)) from error


def explanation(what: str, path: str | os.PathLike, error: OSError, failed: str = "written") -> str:
    """The message for something that could not be written to a path.

    Args:
        failed: what could not be done, where it may have been reading.
    """
    reason = error.strerror or str(error)
    shown = printable(os.fspath(path), 1000, one_line=True)
    return (
        f"{what} could not be {failed}: {shown}: {reason} ({room(path)}). What was there before is unharmed and "
        "nothing half-written counts. Make room, or mend the folder's permissions, then run the same command again: it "
        "goes on from there"
    )


def room(path: str | os.PathLike) -> str:
    """How much is free where a path lies, in words."""
    folder = Path(os.path.abspath(path))
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    try:
        free, files = shutil.disk_usage(folder).free, os.statvfs(folder)
    except OSError:
        return "how much is free there is not known"
    told = f"{free / 2**30:.2f} GiB free there"
    return f"{told}, but no room for another file" if files.f_files and not files.f_favail else told


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Calls `write` on a new file beside `path`, syncs it and renames it to `path`. Pipes are just written to.

    Raises:
        WriteError: it cannot be written; `path` is as it was.
    """
    beside = path.with_name(f".{path.name}.new")
    with writing(path.name, path):
        if path.exists() and not path.is_file():
            with open(path, "wb") as file:
                return write(file)
        try:
            faults.here("file_begins", path)
            with open(beside, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except BaseException:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    faults.here("file_written", path)


def append(file: BinaryIO, data: bytes) -> None:
    """Adds bytes to the end of a file that was opened without a buffer: all of them, or, where there is no room, none.

    Raises:
        OSError: the file is as it was.
    """
    size, left = os.fstat(file.fileno()).st_size, memoryview(data)
    try:
        faults.here("append", file.name)
        while left:  # a disk that is nearly full takes a part
            left = left[file.write(left) :]
    except OSError:
        with contextlib.suppress(OSError):
            os.truncate(file.fileno(), size)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, content: Any) -> None:
    """Writes `json_bytes`."""
    data = json_bytes(content)
    write_atomically(path, lambda file: file.write(data))


def json_bytes(content: Any) -> bytes:
    """Valid, readable JSON. ValueError on NaN and infinities, TypeError on what JSON has no form for."""
    return (json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes.

    Raises:
        OSError: it cannot be read, or is no regular file: a named pipe or a device might be read for ever.
    """
    if not path.is_file() and path.exists():
        raise OSError(errno.EINVAL, "not a regular file, expected one whose bytes can be compared", str(path))
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_file(path: Path) -> None:
    """Waits until a file's bytes are on disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Waits until a folder's entries, such as a rename in it, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
