"""How saved steps lie on a disk and in a bucket: one contract, `StepStore`, with a back end for each.

A save's files come first. What makes it count comes last, in one move that is made whole or not at all:

    disk      <directory>/.saving-<step>/   arrays/, host.json, then manifest.json, each synced; then the folder is
                                            renamed to <step>/, and <directory> is synced
    bucket    <address>/<step>/<save>/      arrays/, host.json: no renames here, so each save has a name of its own and
                                            nothing that counts is written over; then <step>/manifest.json, which names
                                            the save, replaces the one before in one step

So a kill at any moment leaves the earlier steps as they were, and something that no manifest covers, which the run's
next start removes. A manifest holds the size and checksums of every other file, and a hash of itself. On a disk these
are SHA-256, and every byte is read to compare them; a bucket computes its own, and comparing those reads no array.
"""

from __future__ import annotations

import abc
import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from etils import epath

from mer_r1_jax.foreign_text import printable
from mer_r1_jax.storage.bucket import BucketError
from mer_r1_jax.storage.stored_arrays import CheckpointError, hash_of_json

ARRAYS, HOST_STATE, MANIFEST = "arrays", "host.json", "manifest.json"
MAX_REASON = 300  # characters of a system's message that are shown

Place = Path | epath.Path  # a folder on a disk, or an address in a bucket

log = logging.getLogger(__name__)


class DamagedStepError(CheckpointError):
    """A saved step cannot be used; the message says what is wrong with it. An older one may be whole."""


class Found(NamedTuple):
    """A step that is whole.

    Attributes:
        step: its number.
        where: its folder or address.
        arrays: where its arrays lie.
        state: its host state, as `host_content` made it.
        manifest_sha256: hexadecimal hash of its manifest's bytes; another save of the same step has another one.
    """

    step: int
    where: str
    arrays: os.PathLike
    state: dict[str, Any]
    manifest_sha256: str


class StepStore(abc.ABC):
    """The steps below a folder or an address. What only one process may call says so.

    Args:
        directory: of the steps.
    """

    FILES: str  # the manifest's field that describes the files
    FIELDS: tuple[str, ...]  # all of the manifest's fields that its hash covers
    CHECKSUM: str  # what the manifest states of every file besides its bytes; it may state others too

    def __init__(self, directory: Place):
        self.directory = directory

    def numbers(self, warn: bool = False) -> list[int]:
        """Numbers of what looks like a step, newest first. With `warn`, everything else that lies there is named.

        Raises:
            CheckpointError, BucketError: nobody can look there.
        """
        steps = []
        for name, may_be in self._entries().items():
            if may_be and is_number(name):
                steps.append(int(name))
            elif warn and not name.startswith("."):
                log.warning("%s is not a checkpoint and is ignored", printable(self.directory / name))
        return sorted(steps, reverse=True)

    def check(self, step: int, read_files: bool = True) -> tuple[Place, str]:
        """Compares a step's files with its manifest; gives their folder, and the hash of the manifest's bytes.

        Args:
            read_files: False compares only what can be told without reading them.

        Raises:
            DamagedStepError: saying what is wrong.
        """
        content = self._read_manifest(step)
        manifest = checked_manifest(content, MANIFEST, step, self.FIELDS)
        files = manifest[self.FILES]
        if not isinstance(files, dict) or not all(map(self._is_description, files.items())):
            raise DamagedStepError(
                f"{MANIFEST} cannot be read as a manifest: its {self.FILES} are not names, sizes and checksums"
            )
        if HOST_STATE not in files:
            raise DamagedStepError(f"{MANIFEST} names no {HOST_STATE}")
        folder = self._folder(manifest)
        with reading("it"):
            describe = self._describer(folder, read_files)
        for name, expected in files.items():
            shown = printable(name)
            with reading(shown):
                found = describe(name)
            if found is None:
                raise DamagedStepError(f"{shown} is missing")
            if found["bytes"] != expected["bytes"]:
                raise DamagedStepError(f"{shown} has {found['bytes']} bytes instead of {expected['bytes']}")
            # None: not asked for, or unknown to the bucket, as the MD5 of an object that was composed of parts.
            if any(expected.get(key) not in (None, value) for key, value in found.items() if value is not None):
                raise DamagedStepError(f"{shown} does not match its checksum")
        return folder, hashlib.sha256(content).hexdigest()

    def open_step(self, step: int) -> Found:
        """A step, after comparing all that can be compared of it.

        Raises:
            DamagedStepError: saying what is wrong with it.
        """
        folder, digest = self.check(step)
        content = self._read(folder, HOST_STATE)
        if content is None:
            raise DamagedStepError(f"{HOST_STATE} is missing")
        return Found(step, str(folder), folder / ARRAYS, host_state(content, HOST_STATE), digest)

    def manifest_hash(self, step: int) -> str | None:
        """`Found.manifest_sha256` of what lies there now; None when that cannot be read."""
        try:
            return hashlib.sha256(self._read_manifest(step)).hexdigest()
        except (CheckpointError, BucketError):
            return None

    @abc.abstractmethod
    def committed(self) -> list[int]:
        """Numbers of the steps that have a manifest, whatever it says, newest first."""

    @abc.abstractmethod
    def is_ours(self, step: int) -> bool:
        """Whether a save of ours once lay there, whatever is left of it."""

    @abc.abstractmethod
    def begin(self, step: int) -> str:
        """A place for a save, as a path below the directory; for the first process."""

    @abc.abstractmethod
    def commit(self, place: Place, step: int, state: dict[str, Any]) -> None:
        """Writes the host state beside the arrays, then the manifest, and makes them count; for the first process."""

    @abc.abstractmethod
    def abandon(self, place: Place) -> None:
        """Removes a save that failed, where that can do no harm to processes that are writing still."""

    @abc.abstractmethod
    def remove(self, steps: Iterable[int]) -> None:
        """Removes steps, and what no manifest names; for the process that owns the run.

        A kill half-way leaves no damaged step.
        """

    @abc.abstractmethod
    def clear(self) -> None:
        """Removes what interrupted saves and removals have left; for the start that owns the run."""

    @abc.abstractmethod
    def _entries(self) -> dict[str, bool]:
        """Names of what lies in the directory, and whether each may be a step."""

    @abc.abstractmethod
    def _read(self, folder: Place, name: str) -> bytes | None:
        """A file's content; None when it is not there. DamagedStepError when it cannot be read."""

    @abc.abstractmethod
    def _describer(self, folder: Place, read_files: bool) -> Callable[[str], dict[str, Any] | None]:
        """A function from a file's name to its "bytes" and checksums as they are now; None for a missing file."""

    def _is_description(self, entry: tuple[str, Any]) -> bool:
        """Whether an entry of a manifest names a file inside the step's folder, with what is compared of it."""
        name, described = entry
        parts = PurePosixPath(name).parts
        inside = bool(parts) and not name.startswith("/") and ".." not in parts
        known = isinstance(described, dict) and isinstance(described.get(self.CHECKSUM), str)
        return inside and known and is_count(described.get("bytes"))

    def _folder(self, manifest: dict[str, Any]) -> Place:
        """Where the files that a manifest describes lie. DamagedStepError when it does not say so."""
        return self.directory / str(manifest["step"])

    def _read_manifest(self, step: int) -> bytes:
        content = self._read(self.directory / str(step), MANIFEST)
        if content is None:
            if str(step) not in self._entries():
                raise DamagedStepError("it does not exist")
            raise DamagedStepError(f"it has no {MANIFEST}, so it is empty, foreign or was never finished")
        return content


def is_number(name: str) -> bool:
    """Whether a name is a step's: a whole number as Python writes it."""
    return name.isascii() and name.isdigit() and str(int(name)) == name


def signed(content: dict[str, Any]) -> dict[str, Any]:
    """A manifest with its own hash."""
    return content | {"sha256": hash_of_json(content)}


# What makes a saved step damaged: files that cannot be read, and JSON that is not what was written there.


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Turns an error of the system or the bucket while `what` is read into a damage of its step."""
    try:
        yield
    except (OSError, BucketError) as error:
        raise DamagedStepError(f"{what} cannot be read: {described(error)}") from error


def described(error: BaseException) -> str:
    """An exception in one line."""
    text = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__} {printable(text, MAX_REASON, one_line=True)}".rstrip()


def parsed(content: bytes, what: str, kind: str) -> dict[str, Any]:
    """A JSON object.

    Args:
        content: of the file.
        what: the file's name.
        kind: what it ought to be, with its article.

    Raises:
        DamagedStepError: it is something else.
    """
    try:
        found = json.loads(content)
    except RecursionError as error:
        raise DamagedStepError(f"{what} cannot be read as {kind}: its JSON is nested too deeply") from error
    except ValueError as error:  # of JSON, of UTF-8, and of numbers with thousands of digits
        raise DamagedStepError(f"{what} cannot be read as {kind}: {described(error)}") from error
    if not isinstance(found, dict):
        raise DamagedStepError(f"{what} cannot be read as {kind}: it holds a {type(found).__name__}, not an object")
    return found


def checked_manifest(content: bytes, what: str, step: int, fields: tuple[str, ...]) -> dict[str, Any]:
    """A manifest that matches its own hash and belongs to `step`.

    Args:
        fields: that its hash covers; "step" among them.

    Raises:
        DamagedStepError: it is harmed, or another step's.
    """
    manifest = parsed(content, what, "a manifest")
    if missing := [name for name in (*fields, "sha256") if name not in manifest]:
        raise DamagedStepError(f"{what} cannot be read as a manifest: it lacks {', '.join(missing)}")
    found = {name: manifest[name] for name in fields}
    try:
        harmed = manifest["sha256"] != hash_of_json(found)
    except (RecursionError, ValueError) as error:
        raise DamagedStepError(f"{what} cannot be read as a manifest: {described(error)}") from error
    if harmed:
        raise DamagedStepError(f"{what} does not match its own hash")
    if not is_count(found["step"]) or found["step"] != step:
        raise DamagedStepError(f"{what} belongs to step {printable(str(found['step']), 40, one_line=True)}")
    return found


def host_state(content: bytes, what: str) -> dict[str, Any]:
    """What `stored_arrays.host_content` made, read back.

    Raises:
        DamagedStepError: it has not that form.
    """
    state = parsed(content, what, "a host state")
    arrays = state.get("arrays")
    wrong = [
        name
        for name, right in (
            ("layout_version", is_count(state.get("layout_version"))),
            ("arrays", isinstance(arrays, dict) and all(map(_is_array, arrays.values()))),
            ("saved_on", isinstance(state.get("saved_on", {}), dict)),
            ("host", isinstance(state.get("host"), dict)),
        )
        if not right
    ]
    if wrong:
        raise DamagedStepError(f"{what} cannot be read as a host state: {', '.join(wrong)} missing or of another type")
    return state


def is_count(value: Any) -> bool:
    """Whether a value from JSON is a whole number of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_array(described: Any) -> bool:
    shape = described.get("shape") if isinstance(described, dict) else None
    return isinstance(shape, list) and all(map(is_count, shape)) and isinstance(described.get("dtype"), str)
