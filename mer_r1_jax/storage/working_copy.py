"""The local copy of a run's folder that lies in a bucket: brought up to date at the start, given back at each save.

    <address>/owner.json         which start of the run may write here: the latest
             /...                everything that `RunDirectory` describes
             /checkpoints/...    written there directly (step_backends.py), never copied

The bucket is the truth. A file that a killed process had not given back yet is lost with its host, and belongs to
steps that are made again; on the same host it is found and kept.

There is no lock that a killed host would let go of. Instead the latest start owns the run: an earlier one that is still
alive finds out before it gives anything back, and ends.
"""

from __future__ import annotations

import json
import logging
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mer_r1_jax.storage import atomic_files, bucket
from mer_r1_jax.storage.bucket import BucketError

OWNER = "owner.json"
IN_BUCKET = ("checkpoints", "reference", "base")  # folders of checkpoints
_UNFINISHED = (".partial", ".replaced")  # folders that an export is made in

log = logging.getLogger(__name__)


class TakenOverError(BucketError):
    """Another start of the run has taken it over."""


class WorkingCopy:
    """A run's folder in a bucket and its local copy.

    Args:
        address: `gs://` address of the folder.
        local_dir: folder of all local copies, `train.local_dir`.

    Attributes:
        local: the local copy.
    """

    def __init__(self, address: str, local_dir: str):
        self.address = address.rstrip("/")
        self.local = bucket.local_path(local_dir, "runs", self.address)
        self._record_file = self.local.with_name(f".{self.local.name}.json")  # beside the copy, which it is not part of
        self._token: str | None = None
        self._given: dict[str, list[int]] = {}  # file -> size and time of modification when it was given back

    def bring_up_to_date(self, check: Callable[[set[str]], None] = lambda names: None) -> None:
        """Makes the local copy what the bucket holds, unless this host was the last to write there.

        Args:
            check: called with the names that lie there before any is fetched; what it raises stops that.

        Raises:
            BucketError: the bucket cannot be read.
        """
        owner, record = owner_of(self.address), self._record()
        last_writer = owner is not None and owner.get("token") and owner.get("token") == record.get("token")
        if last_writer and self.local.is_dir():
            self._given = record.get("given", {})
            return
        found = {
            name: stored
            for name, stored in bucket.listing(self.address).items()
            if name != OWNER and name.partition("/")[0] not in IN_BUCKET
        }
        check({name.partition("/")[0] for name in found})
        if self.local.exists():
            log.warning("%s is older than %s, and is replaced by what that holds", self.local, self.address)
        fetching = self.local.with_name(f"{bucket.FETCHING}{self.local.name}")
        self._record_file.unlink(missing_ok=True)
        for folder in (fetching, self.local):
            shutil.rmtree(folder, ignore_errors=True)
        fetching.mkdir(parents=True)
        addresses = {f"{self.address}/{name}": stored for name, stored in found.items()}
        bucket.fetch_all(addresses, {f"{self.address}/{name}": fetching / name for name in found})
        fetching.rename(self.local)
        self._given = {name: self._state_of(self.local / name) for name in found}

    def take_over(self, attempt: int) -> None:
        """From now on this start owns the run."""
        self._token = secrets.token_hex(8)
        content = {"attempt": attempt, "since": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "token": self._token}
        bucket.write(f"{self.address}/{OWNER}", json.dumps(content).encode())
        self._write_record()

    def check_owner(self) -> None:
        """Nothing may be written by a start that was overtaken.

        Raises:
            TakenOverError: it was.
        """
        owner = owner_of(self.address) or {"attempt": "none"}
        if owner.get("token") != self._token:
            raise TakenOverError(
                f"{self.address} was taken over by a later start of the same run (attempt {owner.get('attempt')}): "
                "this one ends, and what it has made since its last checkpoint is left out"
            )

    def give_back(self) -> None:
        """Writes every file that is new or has changed to the bucket, the oldest first.

        So what the bucket holds after a kill half-way is what the folder was like at some moment: a file that says
        that others are complete comes after them.

        Raises:
            TakenOverError, BucketError
        """
        self.check_owner()
        changed = [name for name, path in self._files() if self._given.get(name) != self._state_of(path)]
        for name in sorted(changed, key=lambda name: (self._state_of(self.local / name)[1], name)):
            state = self._state_of(self.local / name)  # before it is read: what is added meanwhile is given next time
            bucket.upload(self.local / name, f"{self.address}/{name}")
            self._given[name] = state
        self._write_record()

    def give_back_one(self, file: Path) -> None:
        """Writes one file, such as the log of a process that owns nothing else."""
        bucket.upload(file, f"{self.address}/{file.relative_to(self.local).as_posix()}")

    def _files(self) -> list[tuple[str, Path]]:
        found = []
        for path in self.local.rglob("*"):
            parts = path.relative_to(self.local).parts
            unfinished = any(part.startswith(".") or part.endswith(_UNFINISHED) for part in parts)
            if not unfinished and parts[0] not in IN_BUCKET and path.is_file():
                found.append(("/".join(parts), path))
        return found

    def _record(self) -> dict[str, Any]:
        try:
            return _mapping(self._record_file.read_bytes())
        except OSError:
            return {}

    def _write_record(self) -> None:
        atomic_files.write_json(self._record_file, {"token": self._token, "given": self._given})

    def _state_of(self, path: Path) -> list[int]:
        status = path.stat()
        return [status.st_size, status.st_mtime_ns]


def owner_of(address: str) -> dict[str, Any] | None:
    """Which start of a run owns its folder in a bucket: "attempt", "since" and "token"; None where nobody does.

    Raises:
        BucketError: the bucket cannot be read.
    """
    content = bucket.read(f"{address}/{OWNER}")
    return None if content is None else _mapping(content)


def _mapping(content: bytes) -> dict[str, Any]:
    """A JSON object; anything else counts as an empty one."""
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}
