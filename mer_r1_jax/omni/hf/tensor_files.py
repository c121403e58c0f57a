"""safetensors files: read through the safetensors library, written one tensor at a time.

The library refuses a header whose entries overlap, leave holes or do not fit their shapes. It maps a file into memory,
so each tensor is read through an opening of its own: pages that the next tensor does not need are given back, and the
host's peak is one tensor and its copy. The library writes a whole file from memory at once, so writing is done here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from mer_r1_jax import faults
from mer_r1_jax.foreign_text import printable
from mer_r1_jax.omni.hf.foreign import content_problem, other_weights, path_problem, read_json_object

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
COPY_BYTES = 1 << 24  # bytes moved at once when a tensor is copied from file to file
_LONGEST_NAME = 200  # characters of a foreign name in a message
_LONGEST_LIST = 20  # lines of a message that lists problems

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
    """One tensor of a safetensors file, there or still to be written.

    Attributes:
        name: as the file spells it.
        dtype: as the format spells it, e.g. "BF16".
        shape: as stored.
        nbytes: of the data.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclasses.dataclass(frozen=True)
class StoredTensor(TensorSpec):
    """A tensor that lies in a file.

    Attributes:
        path: the file.
        start: offset of its first byte there.
    """

    path: Path
    start: int

    def read(self, kept: np.dtype | None = None) -> np.ndarray:
        """Reads the tensor into a fresh array of its shape and dtype, one of NUMPY_DTYPES.

        Args:
            kept: dtype it is going to be cast to; None if it stays.

        Raises:
            WeightError: the file is no longer the one whose header was read, or holds numbers that are not finite, or
                will not be as `kept`.
        """
        with _opened(self.path) as file:
            try:
                values = file.get_tensor(self.name)
            except SafetensorError as error:
                raise WeightError(f"{self.path}: {self.name} is gone ({error}); is the file being replaced?") from error
        if values.shape != self.shape or values.dtype != NUMPY_DTYPES[self.dtype]:
            raise WeightError(
                f"{self.path}: {self.name} has become {values.dtype} {values.shape} since it was looked "
                f"at, expected {self.dtype} {self.shape}; is the file being replaced?"
            )
        self._check_finite(values, kept)
        return values

    def chunks(self) -> Iterable[bytes]:
        """Yields the tensor's bytes as they are stored, of whatever dtype, a bounded number at a time."""
        with open(self.path, "rb") as file:
            file.seek(self.start)
            left = self.nbytes
            while left:
                chunk = file.read(min(left, COPY_BYTES))
                if not chunk:
                    raise WeightError(f"{self.path}: {self.name} lacks its last {left} bytes; copy the file again")
                left -= len(chunk)
                yield chunk

    def _check_finite(self, values: np.ndarray, kept: np.dtype | None) -> None:
        if kept is None or ml_dtypes.finfo(kept).max >= ml_dtypes.finfo(values.dtype).max:
            kept = values.dtype
        bad = sum(_not_finite(part, kept) for part in _parts(values.reshape(-1)))
        if bad:
            raise WeightError(
                f"{self.path}: {self.name} holds {bad} NaN or infinite values of {values.size} as {kept}, expected "
                "finite numbers: the training that saved it had broken, or the file is damaged. Use an earlier "
                "checkpoint, or copy the file again"
            )


def _parts(values: np.ndarray, count: int = 1 << 18) -> Iterable[np.ndarray]:
    """Pieces that fit a processor's cache."""
    return (values[start : start + count] for start in range(0, values.size, count))


def _not_finite(values: np.ndarray, kept: np.dtype) -> int:
    """Number of values that are NaN or infinite in dtype `kept`."""
    with np.errstate(over="ignore"):  # counted below
        values = values.astype(kept, copy=False)
    if kept == ml_dtypes.bfloat16:  # ml_dtypes' own isfinite takes eight times as long
        magnitude = values.view(np.uint16) & np.uint16(0x7FFF)
        return int(np.count_nonzero(magnitude >= 0x7F80))
    return values.size - int(np.count_nonzero(np.isfinite(values)))


def spec(name: str, shape: Sequence[int], dtype: np.dtype) -> TensorSpec:
    """A TensorSpec for an array still to be written. `dtype` is one of NUMPY_DTYPES."""
    dtype = np.dtype(dtype)
    return TensorSpec(name, DTYPE_NAMES[dtype], tuple(shape), math.prod(shape) * dtype.itemsize)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file by name, in the order of their data.

    Raises:
        WeightError: not a safetensors file, or one whose header does not describe it.
    """
    with _opened(path):
        pass  # the library has checked the header against itself and the file's size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        content = file.read(length)
    try:
        header = json.loads(content, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise WeightError(
            f"{path}: its header is not that of a safetensors file ({printable(error, _LONGEST_NAME)}); copy it again"
        ) from error
    header.pop("__metadata__", None)
    tensors = [_spec_of(name, entry, path, 8 + length) for name, entry in header.items()]
    return {tensor.name: tensor for tensor in sorted(tensors, key=lambda tensor: tensor.start)}


def _opened(path: Path) -> Any:
    """The file as the safetensors library opens it, to be closed by the caller."""
    if problem := content_problem(path):
        raise WeightError(f"{path}: {problem}; expected a safetensors file")
    try:
        return safe_open(path, "numpy")
    except (SafetensorError, OSError) as error:
        raise WeightError(
            f"{path}: {path.stat().st_size} bytes that are no whole safetensors file "
            f"({printable(error, _LONGEST_NAME)}); the file is damaged or cut short, copy it again"
        ) from error


def _without_repeats(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a header; the library itself takes the last of two entries of one name."""
    entries = dict(pairs)
    if len(entries) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it names {next(name for name in names if names.count(name) > 1)!r} twice")
    return entries


def _spec_of(name: str, entry: dict[str, Any], path: Path, data: int) -> StoredTensor:
    start, end = entry["data_offsets"]
    return StoredTensor(name, entry["dtype"], tuple(entry["shape"]), end - start, path, data + start)


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that make up the checkpoint in `directory`: one file, or the shards its index names.

    Raises:
        WeightError: no directory, no safetensors weights, a broken index, or shards that are not there.
    """
    if not directory.is_dir():
        raise WeightError(path_problem(directory))
    if (directory / SINGLE_FILE).is_file():
        return [directory / SINGLE_FILE]
    if (directory / INDEX_FILE).is_file():
        names = sorted(set(_read_index(directory / INDEX_FILE).values()))
        absent = [name for name in names if not (directory / name).is_file()]
        if absent:
            listing = printable(", ".join(absent[:_LONGEST_LIST]), 2 * _LONGEST_NAME)
            raise WeightError(
                f"{directory}: {INDEX_FILE} names {len(absent)} files that are not there: {listing}; copy them too"
            )
        return [directory / name for name in names]
    found = sorted(directory.glob("*.safetensors"))
    if len(found) == 1:
        return found
    names = [printable(path.name, _LONGEST_NAME) for path in found]
    listing = ", ".join(names[:_LONGEST_LIST]) or "none"
    raise WeightError(
        f"{directory}: expected {SINGLE_FILE}, or shards with {INDEX_FILE}; found safetensors files: {listing}"
        f"{other_weights(directory)}"
    )


def _is_file_name(name: str) -> bool:
    return Path(name).name == name and "\0" not in name and len(name.encode("utf-8", "surrogatepass")) <= 255


def list_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint in `directory`, by its stored name. No data is read.

    Raises:
        WeightError: as weight_files and read_header; a tensor stored twice, or one the index promises in vain.
    """
    tensors: dict[str, StoredTensor] = {}
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
        shown = [printable(problem, 2 * _LONGEST_NAME) for problem in problems[:_LONGEST_LIST]]
        if len(problems) > len(shown):
            shown.append(f"and {len(problems) - len(shown)} more")
        raise WeightError(f"{directory}: shards and index disagree; copy both again:\n  " + "\n  ".join(shown))
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    expected = '{"weight_map": {tensor: file}}'
    weight_map = read_json_object(path, WeightError, expected).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightError(f"{path}: expected {expected}, got no such weight_map; copy it again")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not _is_file_name(file):
            raise WeightError(
                f"{path}: says that {printable(tensor, _LONGEST_NAME)} lies in {printable(repr(file), _LONGEST_NAME)}: "
                f"not a plain file name; expected {expected} with files of this folder; copy it again"
            )
    return weight_map


def write_tensor_file(
    path: Path, specs: Sequence[TensorSpec], chunks: Callable[[TensorSpec], Iterable[bytes | memoryview]]
) -> str:
    """Writes one safetensors file, asking `chunks` for each tensor's bytes when its turn has come.

    Wider dtypes come first, as torch can only view data that is aligned to its width. The file is flushed to disk.

    Returns:
        Hexadecimal SHA-256 of what was written.

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
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for part in (len(encoded).to_bytes(8, "little"), encoded):
            file.write(part)
            digest.update(part)
        for tensor in ordered:
            written = 0
            for chunk in chunks(tensor):
                written += file.write(chunk)
                digest.update(chunk)
            if written != tensor.nbytes:
                raise WeightError(f"{path}: {tensor.name} has {written} bytes, expected {tensor.nbytes}")
        file.flush()
        os.fsync(file.fileno())
    faults.here("tensors_written", path)
    return digest.hexdigest()


def write_index(directory: Path, shards: Mapping[str, Sequence[TensorSpec]]) -> None:
    """Writes the index of a sharded checkpoint: `shards` maps each file's name to the tensors in it."""
    total = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors)
    weight_map = {tensor.name: file for file, tensors in shards.items() for tensor in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
