"""Checkpoints in a bucket: every process writes its arrays there, and one object, written last, makes them count.

    <address>/<step>/manifest.json               name of the save that counts, and what the bucket said of its objects
                     <save>/arrays/...           Orbax, through TensorStore
                     <save>/host.json            as of checkpoints on a file system

A bucket has no renames, and needs none: each save has a name of its own, so nothing that counts is ever written over,
and the manifest replaces the one before in one step. A kill at any moment leaves the earlier steps as they were, and
objects that no manifest names, which the run's next start removes. Sizes and checksums of the objects are those that
the bucket computes itself; comparing them reads no array.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from mer_r1_jax import faults
from mer_r1_jax.foreign_text import printable
from mer_r1_jax.parallel import processes
from mer_r1_jax.storage import bucket
from mer_r1_jax.storage.bucket import Stored
from mer_r1_jax.storage.checkpoints import ARRAYS, HOST_STATE, MANIFEST
from mer_r1_jax.storage.damage import MAX_REASON, DamagedStepError, checked_manifest, host_state, is_count
from mer_r1_jax.storage.restoring import Found, StoredSteps
from mer_r1_jax.storage.stored_arrays import (
    CheckpointError,
    check_step,
    hash_of_json,
    host_content,
    named_leaves,
    save_arrays,
)

_SAVE = re.compile(r"save-\d{8}T\d{6}-[0-9a-f]{8}")

log = logging.getLogger(__name__)


class BucketCheckpoints(StoredSteps):
    """The checkpoints of one run at a `gs://` address, with the methods of `Checkpoints`.

    Args:
        address: of the steps.
        max_to_keep: newest steps kept after a save, at least 1.
        layout_version: version of the tree's layout.
        before_commit: called by the first process before a step counts; what it raises stops the save.
    """

    directory: str

    def __init__(
        self,
        address: str,
        max_to_keep: int = 2,
        layout_version: int = 1,
        before_commit: Callable[[], None] = lambda: None,
    ):
        super().__init__(address.rstrip("/"), max_to_keep, layout_version)
        self._before_commit = before_commit

    def clear(self) -> None:
        """Removes what interrupted saves have left; only for the start that owns the run."""
        self._remove_leftovers(_Steps(self.directory))

    def save(self, step: int, arrays: Any, host: dict[str, Any]) -> None:
        """Saves one step and removes those beyond `max_to_keep`, and those above `step`, as `Checkpoints.save`.

        Raises:
            CheckpointError: nothing was saved; the earlier steps are as they were.
        """
        check_step(step)
        named = named_leaves(arrays)
        state = host_content(self.layout_version, named, host)
        name = processes.from_first("the name of a checkpoint", _new_name)
        folder = f"{self.directory}/{step}/{name}"
        try:
            save_arrays(epath.Path(folder) / ARRAYS, named)
            if processes.is_first():
                bucket.write(f"{folder}/{HOST_STATE}", _as_json(state))
                self._before_commit()
                self._commit(step, name)
        except Exception as error:
            raise CheckpointError(self._failure(step, error)) from error
        processes.barrier("ending a checkpoint")
        if processes.is_first():
            self._collect_garbage(step)

    def candidates(self) -> list[int]:
        """Steps with a manifest, newest first."""
        return _Steps(self.directory).committed()[::-1]

    def open_step(self, step: int) -> Found:
        """A step whose objects are what the bucket said of them when it was saved. As `StoredSteps.open_step`."""
        steps = _Steps(self.directory)
        steps.check(step)
        folder = f"{self.directory}/{step}/{steps.manifest(step)['save']}"
        with _reading(HOST_STATE):
            content = bucket.read(f"{folder}/{HOST_STATE}")
        if content is None:
            raise DamagedStepError(f"{HOST_STATE} is missing")
        state = host_state(content, HOST_STATE)
        return Found(step, folder, epath.Path(folder) / ARRAYS, state, steps.manifest_hash(step))

    def manifest_hash(self, step: int) -> str | None:
        """As `StoredSteps.manifest_hash`."""
        try:
            content = bucket.read(f"{self.directory}/{step}/{MANIFEST}")
        except bucket.BucketError:
            return None
        return None if content is None else hashlib.sha256(content).hexdigest()

    def is_ours(self, step: int) -> bool:
        """Whatever has a manifest; what has none is left over from an interrupted save."""
        return True

    def note_damage(self, step: int) -> None:
        """Nothing to be kept: every look at the bucket compares what it says of the objects."""

    def valid_steps(self) -> list[int]:
        """Steps with an unharmed manifest and all their objects, ascending."""
        return _Steps(self.directory).valid()

    def _commit(self, step: int, name: str) -> None:
        """Writes the manifest: from then on the step counts, whatever it held before."""
        faults.here("checkpoint_commit", name)
        objects = {
            relative: _described(stored)
            for relative, stored in bucket.listing(f"{self.directory}/{step}/{name}").items()
        }
        content = {"step": step, "save": name, "objects": objects}
        manifest = content | {"sha256": hash_of_json(content)}
        bucket.write(f"{self.directory}/{step}/{MANIFEST}", _as_json(manifest))

    def _collect_garbage(self, newest: int) -> None:
        """Removes steps that are too old or above `newest`, which was just saved. A failure costs room, not the run."""
        faults.here("checkpoint_saved", newest)
        try:
            steps = _Steps(self.directory)
            committed = steps.committed()
            abandoned = [step for step in committed if step > newest]
            if abandoned:
                log.warning("checkpoints %s lie after step %d, which was saved just now: removed", abandoned, newest)
            kept = [step for step in steps.valid() if step <= newest][-self.max_to_keep :]
            gone = [step for step in committed if step not in kept]
            # Without its manifest a step does not count: a kill half-way leaves no damaged one.
            bucket.remove(f"{self.directory}/{step}/{MANIFEST}" for step in gone)
            self._remove_leftovers(_Steps(self.directory))
        except bucket.BucketError as error:
            log.warning("old checkpoints could not be removed: %s", error)

    def _remove_leftovers(self, steps: _Steps) -> None:
        leftovers = steps.leftovers()
        if leftovers:
            log.info("removing %d objects below %s that no checkpoint names", len(leftovers), self.directory)
            bucket.remove(f"{self.directory}/{name}" for name in leftovers)

    def _failure(self, step: int, error: Exception) -> str:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return (
            f"the checkpoint of step {step} could not be saved in {self.directory}: {reason[:600]}. Earlier "
            "checkpoints are unharmed. Mend that, then run the same command again: it goes on from the newest one."
        )


class _Steps:
    """What lies below the address of the checkpoints, as one listing found it."""

    def __init__(self, directory: str):
        self._directory = directory
        self._objects = bucket.listing(directory)
        self._manifests: dict[int, dict[str, Any] | DamagedStepError] = {}
        self._hashes: dict[int, str] = {}

    def committed(self) -> list[int]:
        """Steps with a manifest, ascending."""
        folders = (name.rpartition("/")[0] for name in self._objects if name.endswith(f"/{MANIFEST}"))
        return sorted(int(f) for f in folders if f.isascii() and f.isdigit() and f"{int(f)}" == f)

    def valid(self) -> list[int]:
        return [step for step in self.committed() if self.seems_whole(step)]

    def seems_whole(self, step: int) -> bool:
        try:
            self.check(step)
        except DamagedStepError:
            return False
        return True

    def manifest(self, step: int) -> dict[str, Any]:
        """The content of a manifest.

        Raises:
            DamagedStepError: it is none of ours, harmed, or cannot be read.
        """
        if step not in self._manifests:
            try:
                self._manifests[step] = self._read_manifest(step)
            except DamagedStepError as error:
                self._manifests[step] = error
        found = self._manifests[step]
        if isinstance(found, DamagedStepError):
            raise found
        return found

    def manifest_hash(self, step: int) -> str:
        """Of the manifest that was read."""
        return self._hashes[step]

    def _read_manifest(self, step: int) -> dict[str, Any]:
        with _reading(MANIFEST):
            content = bucket.read(f"{self._directory}/{step}/{MANIFEST}") or b""
        self._hashes[step] = hashlib.sha256(content).hexdigest()
        manifest = checked_manifest(content, MANIFEST, step, ("step", "save", "objects"))
        save, objects = manifest["save"], manifest["objects"]
        if not (isinstance(save, str) and _SAVE.fullmatch(save)):
            raise DamagedStepError(f"{MANIFEST} cannot be read as a manifest: it names no save")
        if not isinstance(objects, dict) or not all(map(_is_description, objects.values())):
            raise DamagedStepError(f"{MANIFEST} cannot be read as a manifest: its objects are not sizes and checksums")
        return manifest

    def check(self, step: int) -> None:
        """Compares what the bucket says of a step's objects with its manifest.

        Raises:
            DamagedStepError: saying what is wrong.
        """
        if f"{step}/{MANIFEST}" not in self._objects:
            raise DamagedStepError(f"it has no {MANIFEST}, so it does not exist or was never finished")
        content = self.manifest(step)
        for relative, expected in content["objects"].items():
            stored, shown = self._objects.get(f"{step}/{content['save']}/{relative}"), printable(relative)
            if stored is None:
                raise DamagedStepError(f"{shown} is missing")
            if stored.bytes != expected["bytes"]:
                raise DamagedStepError(f"{shown} has {stored.bytes} bytes instead of {expected['bytes']}")
            # Copies made in parts have no MD5.
            known = {key: value for key, value in _described(stored).items() if value and expected[key]}
            if any(expected[key] != value for key, value in known.items()):
                raise DamagedStepError(f"{shown} does not match its checksum")

    def leftovers(self) -> list[str]:
        """Objects of saves that no manifest names: interrupted, replaced or given up.

        Where the manifest is harmed, nobody knows which those are.
        """
        saves: dict[int, str | None] = {}
        for step in self.committed():
            try:
                saves[step] = self.manifest(step)["save"]
            except DamagedStepError:
                saves[step] = None
        found = []
        for name in self._objects:
            step, _, rest = name.partition("/")
            save = rest.partition("/")[0]
            if not (step.isascii() and step.isdigit() and _SAVE.fullmatch(save)):
                continue
            if saves.get(int(step), "") not in (None, save):
                found.append(name)
        return found


def _new_name() -> str:
    return f"save-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"


@contextlib.contextmanager
def _reading(what: str) -> Iterator[None]:
    try:
        yield
    except bucket.BucketError as error:
        raise DamagedStepError(f"{what} cannot be read: {printable(str(error), MAX_REASON)}") from error


def _is_description(expected: Any) -> bool:
    return isinstance(expected, dict) and {"bytes", "crc32c", "md5"} <= expected.keys() and is_count(expected["bytes"])


def _described(stored: Stored) -> dict[str, Any]:
    return {"bytes": stored.bytes, "crc32c": stored.crc32c, "md5": stored.md5}


def _as_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()
