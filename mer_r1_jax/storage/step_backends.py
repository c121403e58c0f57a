"""Saved steps on a disk and in a bucket: the two back ends of `step_store`, which tells in which order they write."""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from etils import epath

from mer_r1_jax import faults
from mer_r1_jax.storage import atomic_files, bucket
from mer_r1_jax.storage.bucket import Stored
from mer_r1_jax.storage.step_store import (
    ARRAYS,
    HOST_STATE,
    MANIFEST,
    DamagedStepError,
    StepStore,
    checked_manifest,
    described,
    is_number,
    reading,
    signed,
)
from mer_r1_jax.storage.stored_arrays import CheckpointError

_SAVING, _REPLACED, _DELETING = ".saving-", ".replaced-", ".deleting-"  # folders of a save or a removal under way
_SAVE = re.compile(r"save-\d{8}T\d{6}-[0-9a-f]{8}")

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
        atomic_files.write_json(place / HOST_STATE, state)
        self._write_manifest(place, step)
        faults.here("checkpoint_commit", place.name)
        final, replaced = self.directory / str(step), self.directory / f"{_REPLACED}{step}"
        if final.exists():
            final.rename(replaced)  # a kill before the next rename is mended by `clear`
        place.rename(final)
        atomic_files.sync_folder(self.directory)
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
            digest = atomic_files.sha256_of(path) if read_files else None
            return {"bytes": path.stat().st_size, "sha256": digest}

        return describe

    def _write_manifest(self, place: Path, step: int) -> None:
        """Syncs every file below `place` to disk, then writes their sizes and hashes, then syncs that."""
        faults.here("checkpoint_manifest", place)
        files = {}
        for path in sorted(path for path in place.rglob("*") if path.is_file()):
            atomic_files.sync_file(path)
            name = path.relative_to(place).as_posix()
            files[name] = {"bytes": path.stat().st_size, "sha256": atomic_files.sha256_of(path)}
        for path in place.rglob("*"):
            if path.is_dir():
                atomic_files.sync_folder(path)
        atomic_files.write_json(place / MANIFEST, signed({"step": step, "files": files}))


class BucketSteps(StepStore):
    """Steps in a bucket, `<address>/<step>/<save>/`; every process writes its own arrays there."""

    FILES, FIELDS, CHECKSUM = "objects", ("step", "save", "objects"), "crc32c"
    directory: epath.Path

    def committed(self) -> list[int]:
        return self.numbers()

    def is_ours(self, step: int) -> bool:
        return True  # whatever has a manifest; what has none is left over from an interrupted save

    def begin(self, step: int) -> str:
        return f"{step}/save-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"

    def commit(self, place: epath.Path, step: int, state: dict[str, Any]) -> None:
        bucket.write(str(place / HOST_STATE), atomic_files.json_bytes(state))
        faults.here("checkpoint_commit", place.name)
        objects = {name: _as_stated(stored) for name, stored in bucket.listing(str(place)).items()}
        manifest = signed({"step": step, "save": place.name, "objects": objects})
        bucket.write(str(self.directory / str(step) / MANIFEST), atomic_files.json_bytes(manifest))

    def abandon(self, place: epath.Path) -> None:
        """Leaves the objects to the next start: another process may be writing still."""

    def remove(self, steps: Iterable[int]) -> None:
        # Without its manifest a step does not count any more, so the manifests go first.
        bucket.remove(str(self.directory / str(step) / MANIFEST) for step in steps)
        self.clear()

    def clear(self) -> None:
        leftovers = self._leftovers()
        if leftovers:
            log.info("removing %d objects below %s that no checkpoint names", len(leftovers), self.directory)
            bucket.remove(str(self.directory / name) for name in leftovers)

    def _entries(self) -> dict[str, bool]:
        objects = bucket.listing(str(self.directory))
        return {name: f"{name}/{MANIFEST}" in objects for name in sorted({name.partition("/")[0] for name in objects})}

    def _read(self, folder: epath.Path, name: str) -> bytes | None:
        with reading(name):
            return bucket.read(str(folder / name))

    def _folder(self, manifest: dict[str, Any]) -> epath.Path:
        save = manifest["save"]
        if not (isinstance(save, str) and _SAVE.fullmatch(save)):
            raise DamagedStepError(f"{MANIFEST} cannot be read as a manifest: it names no save")
        return epath.Path(super()._folder(manifest) / save)

    def _describer(self, folder: epath.Path, read_files: bool) -> Callable[[str], dict[str, Any] | None]:
        objects = bucket.listing(str(folder))
        return lambda name: _as_stated(objects[name]) if name in objects else None

    def _leftovers(self) -> list[str]:
        """Objects of saves that no manifest names: interrupted, replaced or given up.

        Where the manifest is harmed, nobody knows which those are.
        """
        objects = bucket.listing(str(self.directory))  # before the manifests: a save that counts since is not in it
        found, counting = [], {}
        for name in objects:
            step, _, rest = name.partition("/")
            save = rest.partition("/")[0]
            if not (is_number(step) and _SAVE.fullmatch(save)):
                continue
            if step not in counting:
                counting[step] = self._counting_save(int(step)) if f"{step}/{MANIFEST}" in objects else ""
            if counting[step] not in (None, save):
                found.append(name)
        return found

    def _counting_save(self, step: int) -> str | None:
        """Name of the save that a manifest names; None when the manifest is harmed."""
        try:
            manifest = checked_manifest(self._read_manifest(step), MANIFEST, step, self.FIELDS)
            return self._folder(manifest).name
        except DamagedStepError:
            return None


def _as_stated(stored: Stored) -> dict[str, Any]:
    """What a manifest keeps of what the bucket says of an object."""
    return {"bytes": stored.bytes, "crc32c": stored.crc32c, "md5": stored.md5}
