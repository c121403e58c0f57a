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

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mer_r1_jax import faults
from mer_r1_jax.parallel import processes
from mer_r1_jax.training import durable
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

MANIFEST, HOST_STATE, ARRAYS = "manifest.json", "host.json", "arrays"
_SAVING, _REPLACED, _DELETING = ".saving-", ".replaced-", ".deleting-"

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run, in `<directory>/<step>/`.

    Args:
        directory: folder of the steps, made when absent.
        max_to_keep: newest steps kept after a save, at least 1.
        layout_version: version of the tree's layout. A step of another version is refused, never guessed at.

    Only one process (or one set of jax processes) may hold a directory; `RunDirectory` holds the lock. Making this
    object clears what an interrupted save or removal has left behind.
    """

    def __init__(self, directory: str | os.PathLike, max_to_keep: int = 2, layout_version: int = 1):
        check_settings(max_to_keep)
        self.directory = Path(directory).absolute()
        self.max_to_keep = max_to_keep
        self.layout_version = layout_version
        self._found_damaged: set[int] = set()  # steps whose hashes were read and are wrong
        if processes.is_first():
            self.directory.mkdir(parents=True, exist_ok=True)
            _clear_leftovers(self.directory)
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
        check_step(step)
        named = named_leaves(arrays)
        state = host_content(self.layout_version, named, host)
        building = self.directory / f"{_SAVING}{step}"
        try:
            if processes.is_first():
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

    def restore(
        self, abstract_arrays: Any | Callable[[int, dict[str, Any]], Any], step: int | None = None
    ) -> Restored | None:
        """Restores the newest valid step, or `step`; None when there is none.

        A damaged step is named in a warning and the next older one is taken. A sound step that does not fit (another
        layout version, other names, shapes or dtypes) is an error and no reason to fall back.

        Args:
            abstract_arrays: pytree like the one saved, of arrays or `jax.ShapeDtypeStruct`; or a function
                (step, host state) -> such a tree, for when the tree depends on where the run stood. A leaf comes back
                with the sharding its abstract leaf carries, and as a numpy array when it carries none. Typed PRNG
                keys without a sharding come back on the default device.
            step: this step and no other; an error when it is not there or damaged.

        Raises:
            CheckpointError: listing every mismatch, or why `step` is not valid.
        """
        valid = processes.from_first("the checkpoint to go on from", lambda: self._newest_valid(step))
        if valid is None:
            return None
        folder = self.directory / str(valid)
        state = json.loads((folder / HOST_STATE).read_text())
        return restore_arrays(folder, valid, state, self.layout_version, folder / ARRAYS, abstract_arrays)

    def _newest_valid(self, step: int | None) -> int | None:
        for candidate in [step] if step is not None else self._step_folders(warn=True):
            folder = self.directory / str(candidate)
            problem = _problem_of(folder, candidate, read_files=True)
            if problem is None:
                return candidate
            self._found_damaged.add(candidate)
            if step is not None:
                raise CheckpointError(
                    f"checkpoint {folder} cannot be restored: {problem}. Valid steps: "
                    f"{self.valid_steps() or 'none'}. Choose one of those, or let the newest valid one be found."
                )
            log.warning("checkpoint %s is damaged and ignored: %s", folder, problem)
        return None

    def valid_steps(self) -> list[int]:
        """Steps with an unharmed manifest and files of the right sizes, ascending. Hashes are checked in `restore`."""
        return [
            step
            for step in sorted(self._step_folders())
            if step not in self._found_damaged
            and _problem_of(self.directory / str(step), step, read_files=False) is None
        ]

    def latest_step(self) -> int | None:
        """The newest of `valid_steps`, or None."""
        return max(self.valid_steps(), default=None)

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
        for entry in sorted(self.directory.iterdir()) if self.directory.is_dir() else []:
            if entry.is_dir() and entry.name.isascii() and entry.name.isdigit() and str(int(entry.name)) == entry.name:
                steps.append(int(entry.name))
            elif warn and not entry.name.startswith("."):
                log.warning("%s is not a checkpoint and is ignored", entry)
        return sorted(steps, reverse=True)

    def _failure(self, step: int, error: Exception) -> str:
        free = shutil.disk_usage(self.directory).free / 2**30 if self.directory.is_dir() else float("nan")
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return (
            f"the checkpoint of step {step} could not be saved in {self.directory} ({free:.2f} GiB free): "
            f"{reason[:400]}. Earlier checkpoints are unharmed: {self.valid_steps() or 'none'}. Make room or mend the "
            "folder's permissions, then run the same command again: it goes on from the newest one."
        )


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


def _problem_of(folder: Path, step: int, read_files: bool) -> str | None:
    """Why `folder` is not a valid checkpoint of `step`, in words; None when it is. `read_files` checks the hashes."""
    if not folder.is_dir():
        return "it does not exist"
    path = folder / MANIFEST
    if not path.is_file():
        return f"it has no {MANIFEST}, so it is empty, foreign or was never finished"
    try:
        manifest = json.loads(path.read_text())
        content = {"step": manifest["step"], "files": manifest["files"]}
        if manifest["sha256"] != hash_of_json(content):
            return f"{MANIFEST} does not match its own hash"
    except (ValueError, TypeError, KeyError):  # UnicodeDecodeError is a ValueError
        return f"{MANIFEST} cannot be read as a manifest"
    if content["step"] != step:
        return f"{MANIFEST} belongs to step {content['step']}"
    for relative, expected in content["files"].items():
        file = folder / relative
        if not file.is_file():
            return f"{relative} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{relative} has {file.stat().st_size} bytes instead of {expected['bytes']}"
        if read_files and durable.sha256_of(file) != expected["sha256"]:
            return f"{relative} does not match its checksum"
    return None


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
