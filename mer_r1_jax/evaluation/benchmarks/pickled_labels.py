"""Official label files, npz with Python pickles inside, opened without running what a pickle may carry, and made CSV.

An official file holds one object array for each corpus, around a dictionary from clip name to the clip's labels. A
pickle is a program: it may call any function it can name. Here it can name the few that such dictionaries are made of
(numpy arrays, dtypes and scalars, and plain containers) and nothing else; the first other name ends the reading.
"""

from __future__ import annotations

import builtins
import csv
import io
import pathlib
import pickle
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

from mer_r1_jax.evaluation.benchmarks.errors import BenchmarkError

SPLIT, NAME = "split", "name"  # the first columns of the CSV
MAX_BYTES = 1 << 30  # of one unpacked array; the largest official file has a few megabytes
COMMAND = "python experiments/convert_labels.py"
_CONTAINERS = frozenset(("dict", "list", "tuple", "set", "frozenset", "str", "int", "float", "bool", "complex"))
_NUMPY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")  # until numpy 1, since numpy 2


class UnsafePickle(BenchmarkError):
    """A pickle that names something label files have no use for. Nothing of it was run."""


def read_corpora(path: str | pathlib.Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Reads an official label file.

    Args:
        path: the npz.

    Returns:
        corpus -> clip name -> label name -> text or number.

    Raises:
        UnsafePickle: a pickle in it names a forbidden function or class.
        BenchmarkError: the file is no npz, or does not hold such dictionaries.
    """
    path = pathlib.Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
            for info in members:
                if info.file_size > MAX_BYTES:
                    raise BenchmarkError(f"{path}: {info.filename} unpacks to {info.file_size} bytes; refused")
            arrays = {info.filename.removesuffix(".npy"): _array(archive.read(info), path) for info in members}
    except (OSError, zipfile.BadZipFile) as error:
        raise BenchmarkError(f"{path}: cannot be read as npz ({error}); expected an official label file") from error
    if not arrays:
        raise BenchmarkError(f"{path}: holds no array; expected dictionaries of labels, such as test_corpus")
    return {name: _corpus(array, f"{path}, {name}") for name, array in arrays.items()}


def convert(path: str | pathlib.Path, out: str | pathlib.Path | None = None) -> tuple[pathlib.Path, dict[str, int]]:
    """Writes a label file as CSV: split, name, and a column for each label.

    Args:
        path: the npz.
        out: where to; None = beside it, with the ending .csv.

    Returns:
        The CSV's path, and the clips of each corpus.

    Raises:
        BenchmarkError: the file cannot be read, or the CSV not written.
    """
    path = pathlib.Path(path)
    out = path.with_suffix(".csv") if out is None else pathlib.Path(out)
    corpora = read_corpora(path)
    columns = list(dict.fromkeys(column for corpus in corpora.values() for row in corpus.values() for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, [SPLIT, NAME, *columns], lineterminator="\n")
    writer.writeheader()
    for split, corpus in corpora.items():
        for name, row in corpus.items():
            writer.writerow({SPLIT: split, NAME: name, **row})
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text.getvalue(), encoding="utf-8")
    except OSError as error:
        raise BenchmarkError(f"{out} cannot be written: {error}") from error
    return out, {split: len(corpus) for split, corpus in corpora.items()}


def refusal(path: pathlib.Path) -> str:
    """What to say where an official npz stands without its CSV."""
    return (
        f"{path}: labels in pickled form are not read: a pickle can run code when it is opened. Convert the file once, "
        f"through a reader that runs nothing: {COMMAND} --labels={path}"
    )


class _LabelUnpickler(pickle.Unpickler):
    """Resolves what numpy arrays of plain values need; see the module's text."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "builtins" and name in _CONTAINERS:
            return getattr(builtins, name)
        if module == "numpy" and name == "dtype":
            return np.dtype
        if module == "numpy" and name == "ndarray":
            return _Array
        if module in _NUMPY_MODULES:
            if name == "_reconstruct":
                return _empty_array
            if name == "scalar":
                return _scalar
        raise UnsafePickle(
            f"its pickle names {module}.{name}; a label file needs numpy arrays, dtypes and plain containers only. "
            "Nothing was run. Do not open this file by other means; get it from its publisher again"
        )


class _Array:
    """Stands for the class a pickle names beside `_reconstruct`; numpy's own would make arrays of any size."""


def _empty_array(_subtype: type, _shape: tuple[int, ...], _dtype: Any) -> np.ndarray:
    """An array that the pickle's next step fills: whatever is asked for, nothing large is made here."""
    return np.ndarray((0,), np.int8)


def _scalar(dtype: np.dtype, content: Any = b"") -> Any:
    """A numpy number or text from its bytes."""
    if not isinstance(dtype, np.dtype) or dtype.hasobject or not isinstance(content, bytes):
        raise UnsafePickle("its pickle holds a numpy scalar that is neither number nor text; nothing was run")
    return np.frombuffer(content, dtype, count=1)[0].item()


def _array(content: bytes, path: pathlib.Path) -> Any:
    """The array of one .npy member."""
    stream = io.BytesIO(content)
    try:
        if not _holds_pickle(stream):
            stream.seek(0)
            return np.lib.format.read_array(stream, allow_pickle=False)
        return _LabelUnpickler(stream).load()
    except UnsafePickle as error:
        raise UnsafePickle(f"{path}: {error}") from None
    except BenchmarkError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise BenchmarkError(f"{path}: an array in it cannot be read ({type(error).__name__}: {error})") from error


def _holds_pickle(stream: BinaryIO) -> bool:
    """Reads an .npy header; whether what follows is a pickle."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    _, _, dtype = read(stream)
    return dtype.hasobject


def _corpus(array: Any, where: str) -> dict[str, dict[str, Any]]:
    held = array.item() if isinstance(array, np.ndarray) and array.shape == () else array
    if not isinstance(held, Mapping):
        raise BenchmarkError(f"{where}: got {type(held).__name__}, expected a dictionary from clip name to labels")
    corpus = {}
    for name, row in held.items():
        if not isinstance(name, str) or not isinstance(row, Mapping):
            raise BenchmarkError(f"{where}: got the entry {name!r}: {row!r}, expected a clip name and its labels")
        corpus[name] = {str(label): _plain(value, f"{where}, {name}, {label}") for label, value in row.items()}
    return corpus


def _plain(value: Any, where: str) -> str | int | float:
    if isinstance(value, np.ndarray) and value.size == 1 and not value.dtype.hasobject:
        value = value.reshape(())[()].item()
    if not isinstance(value, str | int | float):
        raise BenchmarkError(f"{where}: got {type(value).__name__}, expected text or a number")
    return value
