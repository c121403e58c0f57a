"""Objects in Cloud Storage, through gcsfs: the few operations that this program stands on, each of them checked; and
local copies of them.

An object appears whole or not at all, and a write replaces it in one step; there are no folders, no renames and no
locks. Credentials are Google's application default credentials, found by the library. Environment variables that lead
the library to another server (STORAGE_EMULATOR_HOST) are its own.

What is read is compared with the CRC32C that the bucket states, what is written with the MD5 that it answers. gcsfs can
do the former itself (consistency="crc32c"), but not for an object that is read into memory, and with crcmod, last
released in 2010: 134 MiB/s within its one event loop, far less where no compiler was at hand, against 2,180 MiB/s of
google_crc32c, which comes with gcsfs. Arrays of checkpoints do not come this way: TensorStore carries them.

A local copy's time of modification is the object's generation, in microseconds: it is a copy of the object as it is now
exactly when size and generation agree, and no index has to be kept beside it.
"""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import functools
import io
import logging
import os
import secrets
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from mer_r1_jax.config.bounds import SCHEME

DEFAULT_DIR = "~/.cache/mer-r1-jax"  # of local copies
FETCHING = ".fetching-"  # begins the names of copies that are not whole yet
EXTRA = "pip install 'mer-r1-jax[gcs]'"
AT_ONCE = 16  # transfers
_READ_BYTES = 1 << 24
_READ_TRIES = 3  # somebody may replace an object between the questions what it is and what it holds

log = logging.getLogger(__name__)


class BucketError(RuntimeError):
    """A bucket could not be used; the message says which address, what was tried, and what to look at."""


class Stored(NamedTuple):
    """What a bucket says of an object.

    Attributes:
        bytes: size.
        crc32c: of the content, in base 64, as Cloud Storage computed it.
        md5: likewise; None for an object that was composed of parts.
        generation: changes with every write of the name.
    """

    bytes: int
    crc32c: str
    md5: str | None
    generation: int


def require() -> None:
    """Loads the library.

    Raises:
        BucketError: it is not installed.
    """
    _files()


def listing(folder: str) -> dict[str, Stored]:
    """Every object below an address, by its name relative to it."""
    root = folder.removeprefix(SCHEME).rstrip("/") + "/"
    with _explained(folder, "listed"):
        found = _files().find(root, detail=True, withdirs=False)
    return {
        name[len(root) :]: _stored(about)
        for name, about in sorted(found.items())
        if name.startswith(root) and not name.endswith("/")
    }


def stat(address: str) -> Stored | None:
    """What a bucket says of an object; None when there is none."""
    with _explained(address, "looked up"):
        try:
            about = _files().info(address)
        except FileNotFoundError:
            return None
        return _stored(about) if about["type"] == "file" else None


def read(address: str) -> bytes | None:
    """The content of an object; None when there is none.

    Raises:
        BucketError: also when it is, again and again, not what the bucket states.
    """
    for _ in range(_READ_TRIES):
        stored = stat(address)
        if stored is None:
            return None
        with _explained(address, "read"):
            try:
                data = _files().cat_file(address)
            except FileNotFoundError:
                return None
        if _crc32c(io.BytesIO(data)) == stored.crc32c:
            return data
    raise _broken(address, len(data), stored)


def write(address: str, data: bytes) -> None:
    """Writes an object, or replaces it, in one step."""
    # As one chunk of an upload in chunks: what is shorter than a chunk is sent between the lines of a multipart body,
    # where a last "\r" counts as part of the line that follows, and such a line within the data as the end of it.
    with _explained(address, "written"):
        _files().pipe_file(address, data, consistency="md5", chunksize=max(len(data), 1))


def upload(file: Path, address: str) -> None:
    """Writes an object from a file, which may grow meanwhile if it is small enough to be read at once."""
    if file.stat().st_size <= _READ_BYTES:
        write(address, file.read_bytes())
        return
    with _explained(address, "written"):
        _files().put_file(str(file), address, consistency="md5")


def download(address: str, file: Path, expected: Stored) -> None:
    """Puts an object's content into a new file.

    Raises:
        BucketError: also when it does not have the size and the checksum that the bucket states.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with _explained(address, "read"):
        _files().get_file(address, str(file))
    with open(file, "rb") as stream:
        crc32c = _crc32c(stream)
    if (size := file.stat().st_size) != expected.bytes or crc32c != expected.crc32c:
        raise _broken(address, size, expected)


def remove(addresses: Iterable[str]) -> None:
    """Removes objects; those that are not there any more do no harm."""

    def one(address: str) -> None:
        with _explained(address, "removed"), contextlib.suppress(FileNotFoundError):
            _files().rm_file(address)

    at_once(one, addresses)


def at_once(action: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """Does something with every item, some at a time; gives the results in order, or raises the first error."""
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE, thread_name_prefix="bucket") as pool:
        futures = [pool.submit(action, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def let_go(error: BaseException) -> None:
    """Clears the frames that a failure has gone through, and those that led to it, of what they hold.

    gcsfs leaves a view of a BytesIO there when a write that Orbax began fails, within a cycle. On Python 3.12.0 and
    3.12.1 the garbage collector ends the process with a segmentation fault when it finds one (CPython issue 111049).
    """
    chain: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        if (found := waiting.pop()) is not None and all(found is not one for one in chain):
            chain.append(found)
            traceback.clear_frames(found.__traceback__)
            grouped = found.exceptions if isinstance(found, BaseExceptionGroup) else ()
            waiting += [found.__cause__, found.__context__, *grouped]


@functools.cache
def _files() -> Any:
    """gcsfs's file system. Listings are never kept, as others write too; Orbax's own instance must not either."""
    try:
        import fsspec.config
        import gcsfs  # noqa: F401
    except ImportError as error:
        raise BucketError(f"a gs:// path needs the library gcsfs, which is not installed: {EXTRA}") from error
    fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False
    with _explained(SCHEME, "opened"):
        return fsspec.filesystem("gs")


@contextlib.contextmanager
def _explained(address: str, tried: str) -> Iterator[None]:
    try:
        yield
    except BucketError:
        raise
    except Exception as error:  # of gcsfs, aiohttp and google-auth, which have no class in common
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        raise BucketError(
            f"{address} cannot be {tried}: {type(error).__name__} {reason[:300]}; check that the bucket exists, that "
            "this host reaches it, and that its service account (or GOOGLE_APPLICATION_CREDENTIALS) may use it"
        ) from error


def _stored(about: dict[str, Any]) -> Stored:
    return Stored(int(about["size"]), about["crc32c"], about.get("md5Hash"), int(about["generation"]))


def _broken(address: str, size: int, expected: Stored) -> BucketError:
    return BucketError(
        f"{address}: got {size} bytes that are not the {expected.bytes} bytes with CRC32C {expected.crc32c} that "
        "the bucket states; it was changed while it was read, or broke on its way: start again"
    )


def _crc32c(stream: BinaryIO) -> str:
    import google_crc32c  # comes with gcsfs

    checksum = google_crc32c.Checksum()
    while data := stream.read(_READ_BYTES):
        checksum.update(data)
    return base64.b64encode(checksum.digest()).decode()


# Local copies: where they are, and how they become what the bucket holds.


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
    stored = stat(address)
    if stored is None:
        raise BucketError(f"{address}: there is no such object; expected a file in the bucket, check the path")
    fetch_all({address: stored}, {address: file})


def fetch_folder(address: str, folder: Path) -> None:
    """Makes a folder the copy of everything below an address; files of objects that are gone are removed.

    Raises:
        BucketError: there is nothing, or it cannot be read.
    """
    found = listing(address)
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
    at_once(lambda address: _fetch(address, objects[address], files[address]), missing)
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
        download(address, beside, stored)
        moment = 1000 * stored.generation  # nanoseconds of a time that counts microseconds
        os.utime(beside, ns=(moment, moment))
        os.replace(beside, file)
    except OSError as error:
        raise BucketError(
            f"{address} cannot be copied to {file}: {error}; make room, or choose another train.local_dir"
        ) from error
    finally:
        beside.unlink(missing_ok=True)
