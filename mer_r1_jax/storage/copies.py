"""Local copies of what lies in a bucket: where they are, and how they become what the bucket holds.

A copy's time of modification is the object's generation, in microseconds: a copy is that of the object as it is now
exactly when size and generation agree, and no index has to be kept beside it.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from mer_r1_jax.config.bounds import SCHEME
from mer_r1_jax.storage import bucket
from mer_r1_jax.storage.bucket import BucketError, Stored

DEFAULT_DIR = "~/.cache/mer-r1-jax"
FETCHING = ".fetching-"

log = logging.getLogger(__name__)


def local_path(local_dir: str | os.PathLike, kind: str, address: str) -> Path:
    """Where the copy of an address lies: every address has a place of its own.

    Args:
        local_dir: folder of all copies; "" = DEFAULT_DIR.
        kind: what the copies are for, a folder of its own in `local_dir`.
    """
    return Path(local_dir or DEFAULT_DIR).expanduser().absolute() / kind / address.removeprefix(SCHEME).strip("/")


def fetch_file(address: str, file: Path) -> None:
    """Makes a file the copy of an object, unless it is already.

    Raises:
        BucketError: there is no such object, or it cannot be read.
    """
    stored = bucket.stat(address)
    if stored is None:
        raise BucketError(f"{address}: there is no such object; expected a file in the bucket, check the path")
    fetch_all({address: stored}, {address: file})


def fetch_folder(address: str, folder: Path) -> None:
    """Makes a folder the copy of everything below an address; files of objects that are gone are removed.

    Raises:
        BucketError: there is nothing, or it cannot be read.
    """
    found = bucket.listing(address)
    if not found:
        raise BucketError(f"{address}: there is nothing below it; expected a folder in the bucket, check the path")
    root = address.rstrip("/")
    gone = [path for path in folder.rglob("*") if path.is_file() and path.relative_to(folder).as_posix() not in found]
    for path in gone:
        path.unlink(missing_ok=True)
    objects = {f"{root}/{name}": stored for name, stored in found.items()}
    fetch_all(objects, {f"{root}/{name}": folder / name for name in found})


def fetch_all(objects: Mapping[str, Stored], files: Mapping[str, Path]) -> int:
    """Fetches the objects whose files are not their copies yet, each at once or not at all; returns how many.

    Args:
        objects: address -> what the bucket says of it.
        files: address -> file.
    """
    missing = [address for address, stored in objects.items() if not is_copy(files[address], stored)]
    if missing:
        size = sum(objects[address].bytes for address in missing)
        log.info("fetching %d objects, %.2f GiB, from the bucket", len(missing), size / 2**30)
    bucket.at_once(lambda address: _fetch(address, objects[address], files[address]), missing)
    return len(missing)


def is_copy(file: Path, stored: Stored) -> bool:
    """Whether a file is the copy of an object as the bucket has it now."""
    try:
        status = file.stat()
    except OSError:
        return False
    return status.st_size == stored.bytes and status.st_mtime_ns == 1000 * stored.generation


def _fetch(address: str, stored: Stored, file: Path) -> None:
    # Two processes of a host may fetch the same object: each has a name of its own until the file is whole.
    beside = file.with_name(f"{FETCHING}{secrets.token_hex(4)}-{file.name}")
    try:
        bucket.download(address, beside, stored)
        os.utime(beside, ns=(1000 * stored.generation,) * 2)
        os.replace(beside, file)
    except OSError as error:
        raise BucketError(
            f"{address} cannot be copied to {file}: {error}; make room, or choose another train.local_dir"
        ) from error
    finally:
        beside.unlink(missing_ok=True)
