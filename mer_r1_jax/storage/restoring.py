"""Restoring the newest valid step, wherever steps are stored; nothing here writes.

Reading changes nothing in the folder of a run, so that one that is going on can be looked at. What that run removes or
replaces meanwhile is noticed, and its newest step is read instead.
"""

from __future__ import annotations

import abc
import functools
import logging
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from mer_r1_jax.parallel import processes
from mer_r1_jax.storage.damage import DamagedStepError, described
from mer_r1_jax.storage.stored_arrays import CheckpointError, Restored, check_settings, restore_arrays

TRIES = 20  # steps that may vanish under a reader before it gives up

log = logging.getLogger(__name__)


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


class VanishedError(CheckpointError):
    """The run that is being read removes its steps faster than they can be read."""


class AllDamagedError(CheckpointError):
    """Steps were saved, and none of them can be restored; each is named."""


class StoredSteps(abc.ABC):
    """Steps below a folder or an address; subclasses say how they lie there.

    Args:
        directory: of the steps.
        max_to_keep: newest steps kept after a save, at least 1.
        layout_version: version of the tree's layout. A step of another version is refused, never guessed at.
    """

    def __init__(self, directory: Any, max_to_keep: int, layout_version: int):
        check_settings(max_to_keep)
        self.directory = directory
        self.max_to_keep = max_to_keep
        self.layout_version = layout_version

    @abc.abstractmethod
    def candidates(self) -> list[int]:
        """Numbers of everything that looks like a step, newest first."""

    @abc.abstractmethod
    def open_step(self, step: int) -> Found:
        """A step, after reading what can be compared of it.

        Raises:
            DamagedStepError: saying what is wrong with it.
        """

    @abc.abstractmethod
    def manifest_hash(self, step: int) -> str | None:
        """`Found.manifest_sha256` of what lies there now; None when that cannot be read."""

    @abc.abstractmethod
    def is_ours(self, step: int) -> bool:
        """Whether a save of ours once lay there, whatever is left of it."""

    @abc.abstractmethod
    def valid_steps(self) -> list[int]:
        """Steps that seem whole, ascending."""

    @abc.abstractmethod
    def note_damage(self, step: int) -> None:
        """Takes notice of a step that was read and found wrong."""

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
        unreadable: dict[int, str] = {}
        for _ in range(TRIES):
            found = self._agreed("the checkpoint to go on from", lambda: self._newest_valid(step, unreadable))
            if found is None:
                return None
            read = functools.partial(restore_arrays, found, self.layout_version, abstract_arrays, part)
            restored = self._read(found, read, unreadable)
            if restored is not None:
                return restored
        raise self._vanished()

    def _read(self, found: Found, read: Callable[[], Restored], unreadable: dict[int, str]) -> Restored | None:
        """The arrays of a step; None, with the reason noted, when it cannot be read and another is to be tried."""
        failure = ""
        try:
            restored = read()
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
        if not self._is_still(found):
            log.warning("checkpoint %s was replaced or removed while it was read: the newest is read", found.where)
            return None
        if failure:
            unreadable[found.step] = failure
            return None
        return restored

    def _is_still(self, found: Found) -> bool:
        now = processes.from_first("whether a checkpoint is still there", lambda: self.manifest_hash(found.step))
        return now == found.manifest_sha256

    def _agreed(self, what: str, find: Callable[[], Found | None]) -> Found | None:
        """What `find` gives, or raises, on the first process, on every process."""

        def told() -> Found | CheckpointError | None:
            try:
                return find()
            except CheckpointError as error:
                return type(error)(str(error))

        found = processes.from_first(what, told)
        if isinstance(found, CheckpointError):
            raise found
        return found

    def _newest_valid(self, step: int | None, unreadable: dict[int, str]) -> Found | None:
        if step is not None:
            return self._this_one(step, unreadable)
        for _ in range(TRIES):
            damaged: dict[int, str] = {}
            for candidate in self.candidates():
                before = self.manifest_hash(candidate)
                try:
                    return self._open(candidate, unreadable)
                except DamagedStepError as error:
                    if self.manifest_hash(candidate) != before or candidate not in self.candidates():
                        break  # the run goes on meanwhile
                    self.note_damage(candidate)
                    log.warning("checkpoint %s/%d is damaged and ignored: %s", self.directory, candidate, error)
                    damaged[candidate] = str(error)
            else:
                self._refuse_loss(damaged)
                return None
        raise self._vanished()

    def _refuse_loss(self, damaged: dict[int, str]) -> None:
        """Nothing is begun again in silence where something was saved."""
        lost = {candidate: reason for candidate, reason in damaged.items() if self.is_ours(candidate)}
        if lost:
            raise AllDamagedError(
                f"{self.directory} holds no checkpoint that can be restored; all {len(lost)} are damaged:\n"
                + "\n".join(f"  {candidate}: {reason}" for candidate, reason in lost.items())
                + "\nNothing was touched. Mend what stands there or put a copy of one of them back; to begin again, "
                "remove that folder, or choose another train.run_name."
            )

    def _open(self, candidate: int, unreadable: dict[int, str]) -> Found:
        if candidate in unreadable:
            raise DamagedStepError(unreadable[candidate])
        return self.open_step(candidate)

    def _this_one(self, step: int, unreadable: dict[int, str]) -> Found:
        try:
            return self._open(step, unreadable)
        except DamagedStepError as error:
            self.note_damage(step)
            raise CheckpointError(
                f"checkpoint {self.directory}/{step} cannot be restored: {error}. Valid steps: "
                f"{self.valid_steps() or 'none'}. Choose one of those, or let the newest valid one be found."
            ) from error

    def _vanished(self) -> VanishedError:
        return VanishedError(
            f"{self.directory}: its steps were removed or replaced {TRIES} times while they were read: the run that "
            "writes there saves too often to be looked at; wait for its end, or copy a step elsewhere and read that"
        )
