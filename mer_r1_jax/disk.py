"""Files that cannot be written: what, where, how much room there is, and how to go on, in one message."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

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
