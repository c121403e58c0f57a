"""Saved steps in a bucket: objects under the save's own name, then the manifest; `step_store` tells the order."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Callable, Iterable
from typing import Any

from etils import epath

from mer_r1_jax import faults
from mer_r1_jax.storage import bucket, durable
from mer_r1_jax.storage.bucket import Stored
from mer_r1_jax.storage.damage import DamagedStepError, checked_manifest, reading
from mer_r1_jax.storage.step_store import HOST_STATE, MANIFEST, StepStore, is_number, signed

_SAVE = re.compile(r"save-\d{8}T\d{6}-[0-9a-f]{8}")

log = logging.getLogger(__name__)


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
        bucket.write(str(place / HOST_STATE), durable.json_bytes(state))
        faults.here("checkpoint_commit", place.name)
        objects = {name: _as_stated(stored) for name, stored in bucket.listing(str(place)).items()}
        manifest = signed({"step": step, "save": place.name, "objects": objects})
        bucket.write(str(self.directory / str(step) / MANIFEST), durable.json_bytes(manifest))

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
        return super()._folder(manifest) / save

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
