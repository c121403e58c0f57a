"""A place for checkpoints on a disk and one in a bucket, looked at and harmed by tests in the same words."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np

from mer_r1_jax.storage.checkpoints import Checkpoints

MANIFEST = "manifest.json"


class DiskPlace:
    """Steps in a folder.

    Attributes:
        directory: what `Checkpoints` is given.
        files: the manifest's field that describes the files.
    """

    files = "files"

    def __init__(self, folder: Path):
        self.folder = folder
        self.directory = str(folder)

    def names(self) -> list[str]:
        """Every file, relative to the directory."""
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())

    def get(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def put(self, name: str, data: bytes) -> None:
        """Writes a file as somebody else would."""
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_bytes(data)

    def remove(self, name: str) -> None:
        (self.folder / name).unlink()

    def state(self) -> dict[str, bytes]:
        return {name: self.get(name) for name in self.names()}

    def reset(self, state: dict[str, bytes]) -> None:
        """Makes the place what it was."""
        shutil.rmtree(self.folder)
        for name, data in state.items():
            self.put(name, data)

    def description(self, name: str) -> dict[str, object]:
        """What a manifest of ours says of a file."""
        data = self.get(name)
        return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


class BucketPlace:
    """Steps below an address of the bucket server; attributes and methods as of `DiskPlace`."""

    files = "objects"

    def __init__(self, bucket, path: str = "runs/one/checkpoints"):
        self.bucket, self.path = bucket, path
        self.directory = f"gs://{bucket.name}/{path}"

    def names(self) -> list[str]:
        root = f"{self.path}/"
        return sorted(name.removeprefix(root) for name in self.bucket.objects if name.startswith(root))

    def get(self, name: str) -> bytes:
        return self.bucket.objects[f"{self.path}/{name}"].data

    def put(self, name: str, data: bytes) -> None:
        self.bucket.put(f"{self.path}/{name}", data)

    def remove(self, name: str) -> None:
        del self.bucket.objects[f"{self.path}/{name}"]

    def state(self) -> dict:
        return dict(self.bucket.objects)

    def reset(self, state: dict) -> None:
        self.bucket.objects.clear()
        self.bucket.objects.update(state)

    def description(self, name: str) -> dict[str, object]:
        stated = self.bucket._described(f"{self.path}/{name}")
        return {"bytes": int(stated["size"]), "crc32c": stated["crc32c"], "md5": None}


def files_of(place, step: int) -> list[str]:
    """Names of the files of a step, its manifest among them."""
    return [name for name in place.names() if name.startswith(f"{step}/")]


def file_of(place, step: int, part: str) -> str:
    """Name of the first file of a step that has `part` in its name."""
    return next(name for name in files_of(place, step) if part in name)


def sign(place, step: int, /, **changes) -> None:
    """Writes a manifest anew as one of ours would be: every checksum in it is right, whatever it says.

    Args:
        changes: fields of the manifest; `files` is called as the manifest calls it.
    """
    content = json.loads(place.get(f"{step}/{MANIFEST}"))
    del content["sha256"]
    folder = f"{step}/{content['save']}" if "save" in content else str(step)
    described = {name: place.description(f"{folder}/{name}") for name in content[place.files]}
    if "files" in changes:
        changes[place.files] = changes.pop("files")
    content |= {place.files: described} | changes
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    place.put(f"{step}/{MANIFEST}", json.dumps(content | {"sha256": digest}).encode())


def small_arrays(step: int) -> dict[str, object]:
    """Quick to make where many steps are saved: nothing to compile."""
    return {"w": np.full((64,), step, np.float32), "b": {"c": np.arange(step, step + 9)}}


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)), tree)


def as_bytes(tree):
    """The leaves in a form that == compares bit for bit."""

    def raw(leaf):
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return str(leaf.dtype), np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes(), leaf.shape

    return jax.tree.map(raw, tree)


HOST = {"iterator": {"next": 7}, "quarantine": ["clip-3"], "counters": {"tokens": 2**40}, "text": "é"}


def save_steps(directory, *steps: int, keep: int = 5, make=small_arrays) -> Checkpoints:
    checkpoints = Checkpoints(directory, max_to_keep=keep)
    for step in steps:
        checkpoints.save(step, make(step), HOST | {"step": step})
    return checkpoints


def restored_step(directory, make=small_arrays) -> int | None:
    """The step a new process would resume, after checking that it holds exactly what was saved at that step."""
    restored = Checkpoints(directory).restore(abstract(make(0)))
    if restored is None:
        return None
    assert as_bytes(restored.arrays) == as_bytes(make(restored.step))
    assert restored.host == HOST | {"step": restored.step}
    return restored.step
