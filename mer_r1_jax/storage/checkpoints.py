"""Checkpoints that are either whole or ignored, on a disk or in a bucket: Orbax for the arrays, a manifest last.

Orbax alone restores flipped bits without a word, stops at a truncated file instead of falling back, and takes an empty
numeric folder for the latest step. So a step only counts here when its manifest is there, is unharmed, and names every
file with the right size and checksum. `step_store` says what lies where, and in which order it is written.

Saving is synchronous: a failure surfaces in the call that caused it. Reading changes nothing, so that a run that is
going on can be looked at; what that run removes or replaces meanwhile is noticed, and its newest step is read instead.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from etils import epath

from mer_r1_jax import faults
from mer_r1_jax.config.bounds import is_bucket
from mer_r1_jax.parallel import processes
from mer_r1_jax.storage import atomic_files, bucket
from mer_r1_jax.storage.bucket import BucketError
from mer_r1_jax.storage.step_backends import BucketSteps, DiskSteps
from mer_r1_jax.storage.step_store import (
    ARRAYS,
    HOST_STATE,
    MANIFEST,
    DamagedStepError,
    Found,
    StepStore,
    described,
)
from mer_r1_jax.storage.stored_arrays import (
    CheckpointError,
    Restored,
    host_content,
    named_leaves,
    restore_arrays,
    save_arrays,
)

__all__ = ["ARRAYS", "HOST_STATE", "MANIFEST", "AllDamagedError", "CheckpointError", "Checkpoints", "Restored"]

TRIES = 20  # steps that may vanish under a reader before it gives up
_REASON = 600  # characters of a system's message that an error shows

log = logging.getLogger(__name__)


class VanishedError(CheckpointError):
    """A step went, or failed, while it was read: what is newest now may still be whole."""


class AllDamagedError(CheckpointError):
    """Steps were saved, and none of them can be restored; each is named."""


class Checkpoints:
    """The checkpoints of one run.

    Making this object and `restore` change nothing there: anybody may read while the run goes on. Only one process (or
    one set of jax processes) may save; `RunDirectory` sees to that.

    Args:
        directory: folder, or `gs://` address, of the steps.
        max_to_keep: newest steps kept after a save, at least 1.
        layout_version: version of the tree's layout. A step of another version is refused, never guessed at.
        before_commit: called by the first process before a step counts; what it raises stops the save.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        max_to_keep: int = 2,
        layout_version: int = 1,
        before_commit: Callable[[], None] = lambda: None,
    ):
        if max_to_keep < 1:
            raise ValueError(
                f"max_to_keep is {max_to_keep}, but at least one checkpoint must be kept: set it to 1 or more"
            )
        self.max_to_keep = max_to_keep
        self.layout_version = layout_version
        self._before_commit = before_commit
        self._store: StepStore = (
            BucketSteps(epath.Path(str(directory).rstrip("/")))
            if is_bucket(directory)
            else DiskSteps(Path(directory).absolute())
        )
        self.directory = self._store.directory
        self._found_damaged: set[int] = set()  # steps that were read and are wrong

    def clear(self) -> None:
        """Removes what an interrupted save or removal has left behind; only for the start that owns the run."""
        if processes.is_first():
            self._store.clear()
        processes.barrier("opening the checkpoints")

    def save(self, step: int, arrays: Any, host: dict[str, Any]) -> None:
        """Saves one step and removes those beyond `max_to_keep`.

        Steps above `step` are removed too: they belong to a future that was given up when an older step was resumed.

        Args:
            step: number of the step, 0 or more. An existing step of that number is replaced.
            arrays: pytree of jax or numpy arrays, typed PRNG keys included.
            host: JSON-able state of the host, such as the data iterator's, under string keys. It comes back equal.

        Raises:
            CheckpointError: nothing was saved; the earlier steps are as they were.
        """
        if step < 0:
            raise CheckpointError(f"step {step} cannot be saved: steps count from 0")
        named = named_leaves(arrays)
        state = host_content(self.layout_version, named, host)
        place = None
        try:
            place = self.directory / processes.from_first("beginning a checkpoint", lambda: self._store.begin(step))
            save_arrays(place / ARRAYS, named)  # comes back when every process has written its part
            if processes.is_first():
                self._before_commit()
                self._store.commit(place, step, state)
        except Exception as error:
            bucket.let_go(error)
            if place is not None:
                self._store.abandon(place)
            raise CheckpointError(self._failure(step, error)) from error
        processes.barrier("ending a checkpoint")
        self._found_damaged.discard(step)
        if processes.is_first():
            self._collect_garbage(step)

    def valid_steps(self) -> list[int]:
        """Steps whose files are those of their manifest as far as that is told without reading them, ascending."""
        return [step for step in sorted(self._store.committed()) if self._seems_whole(step)]

    def latest_step(self) -> int | None:
        """The newest of `valid_steps`, or None."""
        return max(self.valid_steps(), default=None)

    def restore(
        self,
        abstract_arrays: Any | Callable[[int, dict[str, Any]], Any],
        step: int | None = None,
        part: bool = False,
    ) -> Restored | None:
        """Restores the newest valid step, or `step`; None when nothing was ever saved.

        A damaged step is named in a warning and the next older one is taken. A sound step that does not fit (another
        layout version, other names, shapes or dtypes) is an error and no reason to fall back.

        Args:
            abstract_arrays: pytree like the one saved, of arrays or `jax.ShapeDtypeStruct`; or a function
                (step, host state) -> such a tree, for when the tree depends on where the run stood (it may raise
                DamagedStepError). A leaf comes back with the sharding its abstract leaf carries, each device reading
                its own part, and as a numpy array when it carries none. Typed PRNG keys without a sharding come back
                on the default device.
            step: this step and no other; an error when it is not there or damaged.
            part: the tree may leave out arrays of the checkpoint, which are not read then.

        Raises:
            CheckpointError: listing every mismatch, why `step` is not valid, or that all steps are damaged and how.
        """
        unreadable: dict[int, str] = {}  # steps whose arrays failed after their files were found right
        for _ in range(TRIES):
            try:
                found = self._agreed(lambda: self._newest_valid(step, unreadable))
                return None if found is None else self._read(found, abstract_arrays, part, unreadable)
            except VanishedError:
                continue
        raise VanishedError(
            f"{self.directory}: its steps were removed or replaced {TRIES} times while they were read: the run that "
            "writes there saves too often to be looked at; wait for its end, or copy a step elsewhere and read that"
        )

    def _agreed(self, find: Callable[[], Found | None]) -> Found | None:
        """What `find` gives, or raises, on the first process, on every process."""

        def told() -> Found | CheckpointError | BucketError | None:
            try:
                return find()
            except (CheckpointError, BucketError) as error:
                return type(error)(str(error))

        found = processes.from_first("the checkpoint to go on from", told)
        if isinstance(found, Exception):
            raise found
        return found

    def _newest_valid(self, step: int | None, unreadable: dict[int, str]) -> Found | None:
        if step is not None:
            return self._this_one(step, unreadable)
        damaged: dict[int, str] = {}
        for candidate in self._store.numbers(warn=True):
            before = self._store.manifest_hash(candidate)
            try:
                return self._open(candidate, unreadable)
            except DamagedStepError as error:
                if self._store.manifest_hash(candidate) != before or candidate not in self._store.numbers():
                    raise VanishedError(str(error)) from error  # the run goes on meanwhile
                self._found_damaged.add(candidate)
                log.warning("checkpoint %s/%d is damaged and ignored: %s", self.directory, candidate, error)
                damaged[candidate] = str(error)
        self._refuse_loss(damaged)
        return None

    def _this_one(self, step: int, unreadable: dict[int, str]) -> Found:
        try:
            return self._open(step, unreadable)
        except DamagedStepError as error:
            self._found_damaged.add(step)
            raise CheckpointError(
                f"checkpoint {self.directory}/{step} cannot be restored: {error}. Valid steps: "
                f"{self.valid_steps() or 'none'}. Choose one of those, or let the newest valid one be found."
            ) from error

    def _open(self, step: int, unreadable: dict[int, str]) -> Found:
        if step in unreadable:
            raise DamagedStepError(unreadable[step])
        return self._store.open_step(step)

    def _read(self, found: Found, abstract_arrays: Any, part: bool, unreadable: dict[int, str]) -> Restored:
        """The arrays of a step. VanishedError, with the reason noted, when another one is to be tried."""
        failure = ""
        try:
            restored = restore_arrays(found, self.layout_version, abstract_arrays, part)
        except DamagedStepError as error:  # of the caller's function, on every process alike
            failure = str(error)
        except (CheckpointError, MemoryError, jax.errors.JaxRuntimeError):
            raise  # of the run or the device, not of what is stored
        except Exception as error:  # of Orbax and TensorStore, which have no class in common
            if processes.count() > 1:  # the others may be reading still, and would be waited for in vain
                raise CheckpointError(
                    f"checkpoint {found.where} cannot be read by process {processes.index()}: {described(error)}. See "
                    "that every host can read it; if it is damaged, remove it, and the one before is taken"
                ) from error
            failure = f"its arrays cannot be read: {described(error)}"
        now = processes.from_first("whether a checkpoint is still there", lambda: self._store.manifest_hash(found.step))
        if now != found.manifest_sha256:
            log.warning("checkpoint %s was replaced or removed while it was read: the newest is read", found.where)
            raise VanishedError(found.where)
        if failure:
            unreadable[found.step] = failure
            raise VanishedError(failure)
        return restored

    def _refuse_loss(self, damaged: dict[int, str]) -> None:
        """Nothing is begun again in silence where something was saved."""
        lost = {step: reason for step, reason in damaged.items() if self._store.is_ours(step)}
        if lost:
            raise AllDamagedError(
                f"{self.directory} holds no checkpoint that can be restored; all {len(lost)} are damaged:\n"
                + "\n".join(f"  {step}: {reason}" for step, reason in lost.items())
                + "\nNothing was touched. Mend what stands there or put a copy of one of them back; to begin again, "
                "remove that folder, or choose another train.run_name."
            )

    def _seems_whole(self, step: int) -> bool:
        # What was once read and found wrong takes no other step's place when old ones are removed.
        if step in self._found_damaged:
            return False
        try:
            self._store.check(step, read_files=False)
        except DamagedStepError:
            return False
        return True

    def _collect_garbage(self, newest: int) -> None:
        """Removes our own steps that are too old or above `newest`, which was just saved and therefore stays.

        A failure costs room, not the run.
        """
        faults.here("checkpoint_saved", newest)
        try:
            saved = self._store.committed()
            abandoned = [step for step in saved if step > newest]
            if abandoned:
                log.warning("checkpoints %s lie after step %d, which was saved just now: removed", abandoned, newest)
            kept = [step for step in self.valid_steps() if step <= newest][-self.max_to_keep :]
            self._store.remove([step for step in saved if step not in kept])
        except (OSError, BucketError, CheckpointError) as error:
            log.warning("old checkpoints could not be removed: %s", error)

    def _failure(self, step: int, error: Exception) -> str:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        try:
            known = str(self.valid_steps() or "none")
        except (OSError, BucketError, CheckpointError):
            known = f"{self.directory} cannot be looked into"
        room = "" if is_bucket(self.directory) else f" ({atomic_files.room(self.directory)})"
        return (
            f"the checkpoint of step {step} could not be saved in {self.directory}{room}: "
            f"{reason[:_REASON]}. Earlier checkpoints are unharmed: {known}. Make room or mend the permissions there, "
            "then run the same command again: it goes on from the newest one."
        )
