"""Saved steps on a disk: written beside their place, synced and renamed; `step_store` tells the order."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mer_r1_jax import faults
from mer_r1_jax.storage import durable
from mer_r1_jax.storage.damage import described, reading
from mer_r1_jax.storage.step_store import ARRAYS, HOST_STATE, MANIFEST, StepStore, signed
from mer_r1_jax.storage.stored_arrays import CheckpointError

_SAVING, _REPLACED, _DELETING = ".saving-", ".replaced-", ".deleting-"  # folders of a save or a removal under way

log = logging.getLogger(__name__)


class DiskSteps(StepStore):
    """Steps in a folder, `<directory>/<step>/`."""

    FILES, FIELDS, CHECKSUM = "files", ("step", "files"), "sha256"
    directory: Path

    def __init__(self, directory: Path):
        super().__init__(directory)
        self._cleared = False

    def committed(self) -> list[int]:
        return [step for step in self.numbers() if (self.directory / str(step) / MANIFEST).is_file()]

    def is_ours(self, step: int) -> bool:
        try:
            return bool({MANIFEST, HOST_STATE, ARRAYS} & set(os.listdir(self.directory / str(step))))
        except FileNotFoundError:
            return False
        except OSError:  # nobody can look into it
            return True

    def begin(self, step: int) -> str:
        if not self._cleared:
            self.clear()
        place = self.directory / f"{_SAVING}{step}"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        return place.name

    def commit(self, place: Path, step: int, state: dict[str, Any]) -> None:
        durable.write_json(place / HOST_STATE, state)
        self._write_manifest(place, step)
        faults.here("checkpoint_commit", place.name)
        final, replaced = self.directory / str(step), self.directory / f"{_REPLACED}{step}"
        if final.exists():
            final.rename(replaced)  # a kill before the next rename is mended by `clear`
        place.rename(final)
        durable.sync_folder(self.directory)
        shutil.rmtree(replaced, ignore_errors=True)

    def abandon(self, place: Path) -> None:
        shutil.rmtree(place, ignore_errors=True)

    def remove(self, steps: Iterable[int]) -> None:
        for step in steps:
            folder, gone = self.directory / str(step), self.directory / f"{_DELETING}{step}"
            try:
                shutil.rmtree(gone, ignore_errors=True)
                folder.rename(gone)
                shutil.rmtree(gone)
            except OSError as error:
                log.warning("the old checkpoint %s could not be removed: %s", folder, error)

    def clear(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for entry in self.directory.iterdir():
            if entry.name.startswith(_REPLACED):
                original = self.directory / entry.name.removeprefix(_REPLACED)
                if not original.exists():  # killed between the two renames of `commit`
                    entry.rename(original)
                    continue
            if entry.name.startswith((_SAVING, _REPLACED, _DELETING)):
                log.info("removing %s, left by an interrupted save", entry)
                shutil.rmtree(entry, ignore_errors=True)
        self._cleared = True

    def _entries(self) -> dict[str, bool]:
        try:
            return {entry.name: entry.is_dir() for entry in sorted(self.directory.iterdir())}
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise CheckpointError(
                f"{self.directory} cannot be read: {described(error)}. Mend the folder or its permissions: what is "
                "saved there is not taken for lost."
            ) from error

    def _read(self, folder: Path, name: str) -> bytes | None:
        path = folder / name
        with reading(name):
            return path.read_bytes() if path.is_file() else None  # opening a pipe would wait for ever

    def _describer(self, folder: Path, read_files: bool) -> Callable[[str], dict[str, Any] | None]:
        def describe(name: str) -> dict[str, Any] | None:
            path = folder / name
            if not path.is_file():
                return None
            digest = durable.sha256_of(path) if read_files else None
            return {"bytes": path.stat().st_size, "sha256": digest}

        return describe

    def _write_manifest(self, place: Path, step: int) -> None:
        """Syncs every file below `place` to disk, then writes their sizes and hashes, then syncs that."""
        faults.here("checkpoint_manifest", place)
        files = {}
        for path in sorted(path for path in place.rglob("*") if path.is_file()):
            durable.sync_file(path)
            name = path.relative_to(place).as_posix()
            files[name] = {"bytes": path.stat().st_size, "sha256": durable.sha256_of(path)}
        for path in place.rglob("*"):
            if path.is_dir():
                durable.sync_folder(path)
        durable.write_json(place / MANIFEST, signed({"step": step, "files": files}))
