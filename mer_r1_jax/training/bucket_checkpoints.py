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

import json
import logging
import re
import secrets
import time
from collections.abc import Callable
from typing import Any

from etils import epath

from mer_r1_jax import faults
from mer_r1_jax.bucket import storage
from mer_r1_jax.bucket.storage import Stored
from mer_r1_jax.parallel import processes
from mer_r1_jax.training.checkpoints import ARRAYS, HOST_STATE, MANIFEST
from mer_r1_jax.training.stored_arrays import (
    CheckpointError,
    Restored,
    check_settings,
    check_step,
    hash_of_json,
    host_content,
    named_leaves,
    restore_arrays,
    save_arrays,
)

_SAVE = re.compile(r"save-\d{8}T\d{6}-[0-9a-f]{8}")

log = logging.getLogger(__name__)


class BucketCheckpoints:
    """The checkpoints of one run at a `gs://` address, with the methods of `Checkpoints`.

    Args:
        address: of the steps.
        max_to_keep: newest steps kept after a save, at least 1.
        layout_version: version of the tree's layout.
        before_commit: called by the first process before a step counts; what it raises stops the save.
    """

    def __init__(
        self,
        address: str,
        max_to_keep: int = 2,
        layout_version: int = 1,
        before_commit: Callable[[], None] = lambda: None,
    ):
        check_settings(max_to_keep)
        self.directory = address.rstrip("/")
        self.max_to_keep = max_to_keep
        self.layout_version = layout_version
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
                storage.write(f"{folder}/{HOST_STATE}", _as_json(state))
                self._before_commit()
                self._commit(step, name)
        except Exception as error:
            raise CheckpointError(self._failure(step, error)) from error
        processes.barrier("ending a checkpoint")
        if processes.is_first():
            self._collect_garbage(step)

    def restore(
        self, abstract_arrays: Any | Callable[[int, dict[str, Any]], Any], step: int | None = None
    ) -> Restored | None:
        """Restores the newest valid step, or `step`; None when there is none. As `Checkpoints.restore`.

        Raises:
            CheckpointError: listing every mismatch, or why `step` is not valid.
        """
        found = processes.from_first("the checkpoint to go on from", lambda: self._newest_valid(step))
        if found is None:
            return None
        valid, name = found
        folder = f"{self.directory}/{valid}/{name}"
        state = json.loads(storage.read(f"{folder}/{HOST_STATE}"))
        arrays = epath.Path(folder) / ARRAYS
        return restore_arrays(folder, valid, state, self.layout_version, arrays, abstract_arrays)

    def valid_steps(self) -> list[int]:
        """Steps with an unharmed manifest and all their objects, ascending."""
        return _Steps(self.directory).valid()

    def latest_step(self) -> int | None:
        """The newest of `valid_steps`, or None."""
        return max(self.valid_steps(), default=None)

    def _newest_valid(self, step: int | None) -> tuple[int, str] | None:
        steps = _Steps(self.directory)
        for candidate in [step] if step is not None else sorted(steps.committed(), reverse=True):
            problem = steps.problem_of(candidate)
            if problem is None:
                return candidate, steps.manifest(candidate)["save"]
            if step is not None:
                raise CheckpointError(
                    f"checkpoint {self.directory}/{candidate} cannot be restored: {problem}. Valid steps: "
                    f"{steps.valid() or 'none'}. Choose one of those, or let the newest valid one be found."
                )
            log.warning("checkpoint %s/%d is damaged and ignored: %s", self.directory, candidate, problem)
        return None

    def _commit(self, step: int, name: str) -> None:
        """Writes the manifest: from then on the step counts, whatever it held before."""
        faults.here("checkpoint_commit", name)
        objects = {
            relative: _described(stored)
            for relative, stored in storage.listing(f"{self.directory}/{step}/{name}").items()
        }
        content = {"step": step, "save": name, "objects": objects}
        manifest = content | {"sha256": hash_of_json(content)}
        storage.write(f"{self.directory}/{step}/{MANIFEST}", _as_json(manifest))

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
            storage.remove(f"{self.directory}/{step}/{MANIFEST}" for step in gone)
            self._remove_leftovers(_Steps(self.directory))
        except storage.BucketError as error:
            log.warning("old checkpoints could not be removed: %s", error)

    def _remove_leftovers(self, steps: _Steps) -> None:
        leftovers = steps.leftovers()
        if leftovers:
            log.info("removing %d objects below %s that no checkpoint names", len(leftovers), self.directory)
            storage.remove(f"{self.directory}/{name}" for name in leftovers)

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
        self._objects = storage.listing(directory)
        self._manifests: dict[int, dict[str, Any] | str] = {}

    def committed(self) -> list[int]:
        """Steps with a manifest, ascending."""
        folders = (name.rpartition("/")[0] for name in self._objects if name.endswith(f"/{MANIFEST}"))
        return sorted(int(folder) for folder in folders if folder.isascii() and folder.isdigit())

    def valid(self) -> list[int]:
        return [step for step in self.committed() if self.problem_of(step) is None]

    def manifest(self, step: int) -> dict[str, Any] | str:
        """The content of a manifest; when it is none of ours, or harmed, why, in words."""
        if step not in self._manifests:
            self._manifests[step] = _checked(storage.read(f"{self._directory}/{step}/{MANIFEST}") or b"", step)
        return self._manifests[step]

    def problem_of(self, step: int) -> str | None:
        """Why a step is not valid, in words; None when it is."""
        if f"{step}/{MANIFEST}" not in self._objects:
            return f"it has no {MANIFEST}, so it does not exist or was never finished"
        content = self.manifest(step)
        if isinstance(content, str):
            return content
        for relative, expected in content["objects"].items():
            stored = self._objects.get(f"{step}/{content['save']}/{relative}")
            if stored is None:
                return f"{relative} is missing"
            if stored.bytes != expected["bytes"]:
                return f"{relative} has {stored.bytes} bytes instead of {expected['bytes']}"
            # Copies made in parts have no MD5.
            known = {key: value for key, value in _described(stored).items() if value and expected[key]}
            if any(expected[key] != value for key, value in known.items()):
                return f"{relative} does not match its checksum"
        return None

    def leftovers(self) -> list[str]:
        """Objects of saves that no manifest names: interrupted, replaced or given up.

        Where the manifest is harmed, nobody knows which those are.
        """
        manifests = {step: self.manifest(step) for step in self.committed()}
        found = []
        for name in self._objects:
            step, _, rest = name.partition("/")
            save = rest.partition("/")[0]
            if not (step.isascii() and step.isdigit() and _SAVE.fullmatch(save)):
                continue
            manifest = manifests.get(int(step), {})
            if not isinstance(manifest, str) and manifest.get("save") != save:
                found.append(name)
        return found


def _new_name() -> str:
    return f"save-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"


def _checked(text: bytes, step: int) -> dict[str, Any] | str:
    """The content of a manifest, or what is wrong with it."""
    try:
        manifest = json.loads(text)
        content = {key: manifest[key] for key in ("step", "save", "objects")}
        harmed = manifest["sha256"] != hash_of_json(content)
    except (ValueError, TypeError, KeyError):
        return f"{MANIFEST} cannot be read as a manifest"
    if harmed:
        return f"{MANIFEST} does not match its own hash"
    return content if content["step"] == step else f"{MANIFEST} belongs to step {content['step']}"


def _described(stored: Stored) -> dict[str, Any]:
    return {"bytes": stored.bytes, "crc32c": stored.crc32c, "md5": stored.md5}


def _as_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()
