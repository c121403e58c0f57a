"""Files that are there whole or not at all, and survive a power cut."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from mer_r1_jax import faults
from mer_r1_jax.disk import writing


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
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
    """Writes valid, readable JSON. ValueError on NaN and infinities, TypeError on what JSON has no form for."""
    text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    write_text(path, text)


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
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
