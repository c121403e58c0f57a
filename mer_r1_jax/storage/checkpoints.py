"""Checkpoints that are either whole or ignored: Orbax for the arrays, a SHA-256 manifest written last.

Orbax alone restores flipped bits without a word, stops at a truncated file instead of falling back, and takes an empty
numeric folder for the latest step. So a step only counts here when its manifest is there, is unharmed, and names every
file with the right size and hash:

    <directory>/<step>/arrays/        Orbax: one flat {name: array} mapping
                       host.json      names, shapes and dtypes of the arrays, and the caller's host state
                       manifest.json  bytes and SHA-256 of every other file, and a hash of itself

A save is built in `.saving-<step>`, synced to disk and renamed, so a kill at any moment leaves the earlier steps as
they were. Saving is synchronous: a failure surfaces in the call that caused it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

from mer_r1_jax import faults
from mer_r1_jax.foreign_text import printable
from mer_r1_jax.parallel import processes
from mer_r1_jax.storage import durable
from mer_r1_jax.storage.damage import (
    DamagedStepError,
    checked_manifest,
    described,
    host_state,
    is_count,
    reading,
)
from mer_r1_jax.storage.restoring import Found, StoredSteps
from mer_r1_jax.storage.stored_arrays import (
    CheckpointError,
    Restored,
    check_step,
    hash_of_json,
    host_content,
    named_leaves,
    save_arrays,
)

__all__ = ["ARRAYS", "HOST_STATE", "MANIFEST", "CheckpointError", "Checkpoints", "Restored"]

MANIFEST, HOST_STATE, ARRAYS = "manifest.json", "host.json", "arrays"
_SAVING, _REPLACED, _DELETING = ".saving-", ".replaced-", ".deleting-"

log = logging.getLogger(__name__)


class Checkpoints(StoredSteps):
    """The checkpoints of one run, in `<directory>/<step>/`.

    Making this object and `restore` change nothing there: anybody may read while the run goes on. Only one process (or
    one set of jax processes) may save; `RunDirectory` holds the lock.

    Args:
        directory: folder of the steps, made by the first save.
        max_to_keep: newest steps kept after a save, at least 1.
        layout_version: version of the tree's layout. A step of another version is refused, never guessed at.
    """

    directory: Path

    def __init__(self, directory: str | os.PathLike, max_to_keep: int = 2, layout_version: int = 1):
        super().__init__(Path(directory).absolute(), max_to_keep, layout_version)
        self._found_damaged: set[int] = set()  # steps whose hashes were read and are wrong
        self._cleared = False

    def clear(self) -> None:
        """Removes what an interrupted save or removal has left behind; only for the start that owns the run."""
        if processes.is_first():
            self._clear()
        processes.barrier("opening the checkpoints")

    def _clear(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(self.directory)
        self._cleared = True

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
        check_step(step)
        named = named_leaves(arrays)
        state = host_content(self.layout_version, named, host)
        building = self.directory / f"{_SAVING}{step}"
        try:
            if processes.is_first():
                if not self._cleared:
                    self._clear()
                shutil.rmtree(building, ignore_errors=True)
                building.mkdir()
            processes.barrier("beginning a checkpoint")
            save_arrays(building / ARRAYS, named)
            if processes.is_first():
                durable.write_json(building / HOST_STATE, state)
                _write_manifest(building, step)
                self._commit(building, step)
        except Exception as error:
            shutil.rmtree(building, ignore_errors=True)
            raise CheckpointError(self._failure(step, error)) from error
        processes.barrier("ending a checkpoint")
        self._found_damaged.discard(step)
        if processes.is_first():
            self._collect_garbage(step)

    def valid_steps(self) -> list[int]:
        """Steps with an unharmed manifest and files of the right sizes, ascending. Hashes are checked in `restore`."""
        return [
            step
            for step in sorted(self._step_folders())
            if step not in self._found_damaged and _seems_whole(self.directory / str(step), step)
        ]

    def candidates(self) -> list[int]:
        """Numbers of the folders that look like steps, newest first; what else lies there is named."""
        return self._step_folders(warn=True)

    def open_step(self, step: int) -> Found:
        """A step, every file of it read and compared. As `StoredSteps.open_step`."""
        folder = self.directory / str(step)
        with reading("it"):
            if not folder.is_dir():
                raise DamagedStepError("it does not exist")
        content = _check_files(folder, step, read_files=True)
        with reading(HOST_STATE):
            state = host_state((folder / HOST_STATE).read_bytes(), HOST_STATE)
        return Found(step, str(folder), folder / ARRAYS, state, hashlib.sha256(content).hexdigest())

    def manifest_hash(self, step: int) -> str | None:
        """As `StoredSteps.manifest_hash`."""
        path = self.directory / str(step) / MANIFEST
        try:
            return durable.sha256_of(path) if path.is_file() else None
        except OSError:
            return None

    def is_ours(self, step: int) -> bool:
        """Whether a save of ours lay in a folder: anything of it is there, or the folder cannot be looked into."""
        try:
            return bool({MANIFEST, HOST_STATE, ARRAYS} & set(os.listdir(self.directory / str(step))))
        except FileNotFoundError:
            return False
        except OSError:
            return True

    def note_damage(self, step: int) -> None:
        """Such a step takes no other's place when old ones are removed."""
        self._found_damaged.add(step)

    def _commit(self, building: Path, step: int) -> None:
        """Puts a finished folder in its place. A kill between the two renames is mended by `_clear_leftovers`."""
        faults.here("checkpoint_commit", building.name)
        final, replaced = self.directory / str(step), self.directory / f"{_REPLACED}{step}"
        if final.exists():
            final.rename(replaced)
        building.rename(final)
        durable.sync_folder(self.directory)
        shutil.rmtree(replaced, ignore_errors=True)

    def _collect_garbage(self, newest: int) -> None:
        """Removes our own steps that are too old or above `newest`, which was just saved and therefore stays."""
        faults.here("checkpoint_saved", newest)
        ours = [step for step in self._step_folders() if (self.directory / str(step) / MANIFEST).is_file()]
        abandoned = [step for step in ours if step > newest]
        if abandoned:
            log.warning("checkpoints %s lie after step %d, which was saved just now: removed", abandoned, newest)
        valid = [step for step in self.valid_steps() if step <= newest]
        kept = set(valid[-self.max_to_keep :])
        for step in ours:
            if step not in kept:
                _remove(self.directory / str(step), step)

    def _step_folders(self, warn: bool = False) -> list[int]:
        """Numeric folders, newest first. With `warn`, everything else that lies there is named."""
        steps = []
        try:
            entries = [(entry, entry.is_dir()) for entry in sorted(self.directory.iterdir())]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(
                f"{self.directory} cannot be read: {described(error)}. Mend the folder or its permissions: what is "
                "saved there is not taken for lost."
            ) from error
        for entry, is_folder in entries:
            if is_folder and entry.name.isascii() and entry.name.isdigit() and str(int(entry.name)) == entry.name:
                steps.append(int(entry.name))
            elif warn and not entry.name.startswith("."):
                log.warning("%s is not a checkpoint and is ignored", printable(entry))
        return sorted(steps, reverse=True)

    def _failure(self, step: int, error: Exception) -> str:
        free = shutil.disk_usage(self.directory).free / 2**30 if self.directory.is_dir() else float("nan")
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return (
            f"the checkpoint of step {step} could not be saved in {self.directory} ({free:.2f} GiB free): "
            f"{reason[:400]}. Earlier checkpoints are unharmed: {self._known_steps()}. Make room or mend the "
            "folder's permissions, then run the same command again: it goes on from the newest one."
        )

    def _known_steps(self) -> str:
        try:
            return str(self.valid_steps() or "none")
        except CheckpointError:
            return "the folder cannot be looked into"


def _write_manifest(folder: Path, step: int) -> None:
    """Syncs every file below `folder` to disk, then writes their sizes and hashes, then syncs that."""
    faults.here("checkpoint_manifest", folder)
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        durable.sync_file(path)
        relative = path.relative_to(folder).as_posix()
        files[relative] = {"bytes": path.stat().st_size, "sha256": durable.sha256_of(path)}
    for path in folder.rglob("*"):
        if path.is_dir():
            durable.sync_folder(path)
    content = {"step": step, "files": files}
    durable.write_json(folder / MANIFEST, content | {"sha256": hash_of_json(content)})


def _seems_whole(folder: Path, step: int) -> bool:
    try:
        _check_files(folder, step, read_files=False)
    except DamagedStepError:
        return False
    return True


def _check_files(folder: Path, step: int, read_files: bool) -> bytes:
    """Compares a step's files with its manifest, whose bytes it gives. `read_files` checks the hashes.

    Raises:
        DamagedStepError: saying what is wrong.
    """
    path = folder / MANIFEST
    with reading(MANIFEST):
        if not path.is_file():
            raise DamagedStepError(f"it has no {MANIFEST}, so it is empty, foreign or was never finished")
        content = path.read_bytes()
    files = checked_manifest(content, MANIFEST, step, ("step", "files"))["files"]
    if not isinstance(files, dict) or not all(map(_is_file, files, files.values())):
        raise DamagedStepError(f"{MANIFEST} cannot be read as a manifest: its files are not names, sizes and hashes")
    if HOST_STATE not in files:
        raise DamagedStepError(f"{MANIFEST} names no {HOST_STATE}")
    for relative, expected in files.items():
        file, shown = folder / relative, printable(relative)
        with reading(shown):
            if not file.is_file():
                raise DamagedStepError(f"{shown} is missing")
            if file.stat().st_size != expected["bytes"]:
                raise DamagedStepError(f"{shown} has {file.stat().st_size} bytes instead of {expected['bytes']}")
            if read_files and durable.sha256_of(file) != expected["sha256"]:
                raise DamagedStepError(f"{shown} does not match its checksum")
    return content


def _is_file(relative: str, expected: Any) -> bool:
    """Whether an entry of a manifest names a file of the step, with what is compared of it."""
    parts = PurePosixPath(relative).parts
    inside = bool(parts) and not relative.startswith("/") and ".." not in parts
    return inside and isinstance(expected, dict) and is_count(expected.get("bytes")) and "sha256" in expected


def _clear_leftovers(directory: Path) -> None:
    """Removes half-made and half-removed steps; puts back a step that was about to be replaced."""
    for entry in directory.iterdir():
        if entry.name.startswith(_REPLACED):
            original = directory / entry.name.removeprefix(_REPLACED)
            if not original.exists():
                entry.rename(original)
                continue
        if entry.name.startswith((_SAVING, _REPLACED, _DELETING)):
            log.info("removing %s, left by an interrupted save", entry)
            shutil.rmtree(entry, ignore_errors=True)


def _remove(folder: Path, step: int) -> None:
    """Renamed first, so that a kill half-way leaves no damaged step. A failure costs room, not the run."""
    try:
        gone = folder.with_name(f"{_DELETING}{step}")
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
        shutil.rmtree(gone)
    except OSError as error:
        log.warning("the old checkpoint %s could not be removed: %s", folder, error)
