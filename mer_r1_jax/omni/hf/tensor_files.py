"""safetensors files, read and written one tensor at a time.

A file is eight bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data. Reading with
plain file reads instead of a memory map keeps the host's peak at the tensors that are really held.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from mer_r1_jax import faults

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
COPY_BYTES = 1 << 24  # bytes moved at once when a tensor is copied from file to file
MAX_HEADER_BYTES = 100_000_000  # the format's own limit

NUMPY_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
DTYPE_NAMES = {dtype: name for name, dtype in NUMPY_DTYPES.items()}


class WeightError(ValueError):
    """Weights that cannot be read or written; the message names each tensor or file, what it got and expected."""


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One tensor of a safetensors file.

    Attributes:
        name: as the file spells it.
        dtype: as the format spells it, e.g. "BF16".
        shape: as stored.
        nbytes: of the data.
        path: file it lies in; None for a tensor still to be written.
        start: offset of its first byte in that file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    path: Path | None = None
    start: int = 0

    def read(self) -> np.ndarray:
        """Reads the tensor into a fresh array of its shape and dtype. Raises WeightError when the file is cut short."""
        dtype = NUMPY_DTYPES[self.dtype]
        data = np.fromfile(self.path, dtype=np.uint8, count=self.nbytes, offset=self.start)
        if data.nbytes != self.nbytes:
            raise WeightError(
                f"{self.path}: {self.name} ends after {data.nbytes} of {self.nbytes} bytes; copy it again"
            )
        return data.view(dtype).reshape(self.shape)

    def chunks(self) -> Iterable[bytes]:
        """Yields the tensor's bytes as they are stored, a bounded number at a time."""
        with open(self.path, "rb") as file:
            file.seek(self.start)
            left = self.nbytes
            while left:
                chunk = file.read(min(left, COPY_BYTES))
                if not chunk:
                    raise WeightError(f"{self.path}: {self.name} lacks its last {left} bytes; copy the file again")
                left -= len(chunk)
                yield chunk


def spec(name: str, shape: Sequence[int], dtype: np.dtype) -> TensorSpec:
    """A TensorSpec for an array still to be written. `dtype` is one of NUMPY_DTYPES."""
    dtype = np.dtype(dtype)
    return TensorSpec(name, DTYPE_NAMES[dtype], tuple(shape), math.prod(shape) * dtype.itemsize)


def read_header(path: Path) -> dict[str, TensorSpec]:
    """The tensors of one file by name, in the order of their data.

    Raises:
        WeightError: not a safetensors file, or one whose length does not fit its header (an interrupted copy).
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise WeightError(
                f"{path}: {size} bytes, too few for its header; the file is cut short or no safetensors file"
            )
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            tensors = [
                TensorSpec(
                    name,
                    entry["dtype"],
                    tuple(entry["shape"]),
                    entry["data_offsets"][1] - entry["data_offsets"][0],
                    path,
                    8 + length + entry["data_offsets"][0],
                )
                for name, entry in header.items()
            ]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise WeightError(f"{path}: its header is not that of a safetensors file ({error})") from error
    end = max((tensor.start + tensor.nbytes for tensor in tensors), default=8 + length)
    if end != size:
        raise WeightError(f"{path}: {size} bytes, but its header describes {end}; the file is damaged, copy it again")
    return {tensor.name: tensor for tensor in sorted(tensors, key=lambda tensor: tensor.start)}


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that make up the checkpoint in `directory`: one file, or the shards its index names.

    Raises:
        WeightError: no directory, no safetensors weights, a broken index, or shards that are not there.
    """
    if not directory.is_dir():
        raise WeightError(f"{directory}: not a directory; expected one with config.json and safetensors weights")
    if (directory / SINGLE_FILE).is_file():
        return [directory / SINGLE_FILE]
    if (directory / INDEX_FILE).is_file():
        names = sorted(set(_read_index(directory / INDEX_FILE).values()))
        absent = [name for name in names if not (directory / name).is_file()]
        if absent:
            raise WeightError(f"{directory}: {INDEX_FILE} names files that are not there: {', '.join(absent)}")
        return [directory / name for name in names]
    found = sorted(directory.glob("*.safetensors"))
    if len(found) == 1:
        return found
    listing = ", ".join(path.name for path in found) or "none"
    hint = ""
    if any(directory.glob("*.bin")):
        hint = "; convert the .bin files with transformers' save_pretrained, which writes safetensors"
    raise WeightError(
        f"{directory}: expected {SINGLE_FILE}, or shards with {INDEX_FILE}; found safetensors files: {listing}{hint}"
    )


def list_tensors(directory: Path) -> dict[str, TensorSpec]:
    """Every tensor of the checkpoint in `directory`, by its stored name. No data is read.

    Raises:
        WeightError: as weight_files and read_header; a tensor stored twice, or one the index promises in vain.
    """
    tensors: dict[str, TensorSpec] = {}
    problems = []
    for path in weight_files(directory):
        for name, tensor in read_header(path).items():
            if name in tensors:
                problems.append(f"stored twice: {name} in {tensors[name].path.name} and in {path.name}")
            tensors[name] = tensor
    if (directory / INDEX_FILE).is_file() and not (directory / SINGLE_FILE).is_file():
        for name, file in _read_index(directory / INDEX_FILE).items():
            if name not in tensors or tensors[name].path.name != file:
                problems.append(f"{INDEX_FILE} says {name} lies in {file}, where it is not")
    if problems:
        raise WeightError(f"{directory}: shards and index disagree:\n  " + "\n  ".join(problems))
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(value, str) and Path(value).name == value for value in weight_map.values()):
            raise ValueError("a shard's name is not a plain file name")
        return weight_map
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightError(f'{path}: expected {{"weight_map": {{tensor: file}}}} ({error})') from error


def write_tensor_file(
    path: Path, specs: Sequence[TensorSpec], chunks: Callable[[TensorSpec], Iterable[bytes | memoryview]]
) -> None:
    """Writes one safetensors file, asking `chunks` for each tensor's bytes when its turn has come.

    Wider dtypes come first, as torch can only view data that is aligned to its width. The file is flushed to disk.

    Raises:
        WeightError: `chunks` gave another number of bytes than the spec says.
    """
    ordered = sorted(specs, key=lambda tensor: -(tensor.nbytes // max(1, math.prod(tensor.shape))))
    header: dict = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in ordered:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in ordered:
            written = sum(file.write(chunk) for chunk in chunks(tensor))
            if written != tensor.nbytes:
                raise WeightError(f"{path}: {tensor.name} has {written} bytes, expected {tensor.nbytes}")
        file.flush()
        os.fsync(file.fileno())
    faults.here("tensors_written", path)


def write_index(directory: Path, shards: dict[str, Sequence[TensorSpec]]) -> None:
    """Writes the index of a sharded checkpoint: `shards` maps each file's name to the tensors in it."""
    total = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors)
    weight_map = {tensor.name: file for file, tensors in shards.items() for tensor in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
