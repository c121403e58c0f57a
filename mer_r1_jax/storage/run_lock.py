"""The lock of a run's folder: taken by the start that writes there, looked at by everybody else.

What readers ask changes nothing in the run's folder and takes no lock: one taken for a moment only could refuse the
start of the run itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import sys
import time
from pathlib import Path
from typing import TextIO

from mer_r1_jax.config.bounds import is_bucket
from mer_r1_jax.foreign_text import printable
from mer_r1_jax.storage.atomic_files import WriteError, writing
from mer_r1_jax.storage.bucket import BucketError
from mer_r1_jax.storage.working_copy import owner_of

NAME = ".lock"  # in a run's folder; it holds who has it open
HELD: set[Path] = set()  # folders locked by this process: record locks do not refuse their own process
# struct flock: type, whence, start, length, process; elsewhere its fields have another order.
_FLOCK = "hhqqi" if sys.platform == "linux" else ""
_SHOWN = 100


class RunDirectoryError(RuntimeError):
    """The output folder cannot be used for this run; the message says why and what to do."""


def take(path: Path) -> TextIO:
    """An open file with a record lock: gone with its process, however that ends, and not inherited by workers.

    Raises:
        RunDirectoryError: another process, or this one, has the folder open, or it cannot be written.
    """
    if path in HELD:
        raise RunDirectoryError(f"{path} is already open in this process: close that RunDirectory first")
    try:
        file = open(path / NAME, "a+")
    except OSError as error:
        raise RunDirectoryError(f"{path} cannot be written: {error}. Choose another train.output_dir.") from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise RunDirectoryError(
            f"{path} is being written by {holder}: wait for it to end, or choose another train.run_name"
        ) from error
    try:
        with writing("the run's lock", path / NAME):
            file.seek(0)
            file.truncate()
            file.write(f"process {os.getpid()} (since {time.strftime('%Y-%m-%d %H:%M:%S')})")
            file.flush()
    except WriteError:
        with contextlib.suppress(OSError):  # what could not be written cannot be flushed either
            file.close()
        raise
    HELD.add(path)
    return file


def release(path: Path, file: TextIO) -> None:
    """Lets go of what `take` gave."""
    file.close()
    HELD.discard(path)


def holder_of(folder: str | os.PathLike) -> str | None:
    """Who writes a run's folder now, in words; None when nobody is known to.

    A lock is seen from this host, and from others where the file system passes locks on.
    """
    path = Path(os.path.abspath(folder))
    if path in HELD:  # looked at no closer: closing any of its descriptors would let the lock go
        return f"this process ({os.getpid()})"
    try:
        descriptor = os.open(path / NAME, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        pid = _locking_process(descriptor)
        if pid is None:
            return None
        told = os.read(descriptor, _SHOWN).decode(errors="replace").strip()
        return printable(told, _SHOWN) or f"process {pid}"
    except OSError:
        return None
    finally:
        os.close(descriptor)


def is_in_use(folder: str | os.PathLike) -> bool:
    """Whether a process of this host, this one included, has the folder open; for whoever is about to write there."""
    path = Path(os.path.abspath(folder))
    if path in HELD:
        return True
    try:
        with open(path / NAME, "r+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def attempt_of(folder: str | os.PathLike) -> int:
    """The latest attempt that was begun in a run's folder; 0 where none is known."""
    try:
        names = os.listdir(Path(folder) / "logs")
    except OSError:
        return 0
    numbers = (name.removeprefix("attempt_") for name in names if name.startswith("attempt_"))
    return max((int(number) for number in numbers if number.isascii() and number.isdigit()), default=0)


def liveness(run_dir: str | os.PathLike) -> str | None:
    """What a reader is told about who writes a run, in words; None when nobody is known to.

    Args:
        run_dir: a run's folder, or its address in a bucket. There is no lock in a bucket: what can be said is which
            start of the run owns it.
    """
    if is_bucket(run_dir):
        try:
            owner = owner_of(str(run_dir).rstrip("/"))
        except BucketError:
            return None
        if not owner:
            return None
        attempt, since = (printable(str(owner.get(name)), _SHOWN) for name in ("attempt", "since"))
        return f"may be live: attempt {attempt} has written it since {since}"
    holder = holder_of(run_dir)
    return holder and f"is live: {holder} is writing it, attempt {attempt_of(run_dir)}"


def _locking_process(descriptor: int) -> int | None:
    """The process that holds a lock on an open file; None when there is none, or this system does not say."""
    if not _FLOCK:
        return None
    asked = struct.pack(_FLOCK, fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
    kind, _, _, _, pid = struct.unpack(_FLOCK, fcntl.fcntl(descriptor, fcntl.F_GETLK, asked))
    return None if kind == fcntl.F_UNLCK else pid
