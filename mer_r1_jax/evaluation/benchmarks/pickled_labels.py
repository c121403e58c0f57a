"""Official label files, npz with Python pickles inside, opened without running what a pickle may carry, and made CSV.

An official file holds one object array for each corpus, around a dictionary from clip name to the clip's labels. A
pickle is a program: it may call any function it can name. Here it is read as data (`inert_pickle`), from an archive
whose parts and sizes are checked first.
"""

from __future__ import annotations

import csv
import io
import pathlib
import re
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

from mer_r1_jax.evaluation.benchmarks import inert_pickle
from mer_r1_jax.evaluation.benchmarks.inert_pickle import UnsafePickle
from mer_r1_jax.evaluation.benchmarks.sets import BenchmarkError
from mer_r1_jax.foreign_text import printable, would_run_in_a_spreadsheet
from mer_r1_jax.storage import atomic_files

SPLIT, NAME = "split", "name"  # the first columns of the CSV
# The largest official file has a few megabytes and a handful of arrays.
MAX_FILE = 32 << 20  # bytes of a file
MAX_BYTES = 64 << 20  # of all its arrays, unpacked
MAX_ARRAYS = 64
MAX_HEADER = 10_000  # bytes before an array's content
COMMAND = "mer-r1 convert-labels"
_NPY = re.compile(rb"\x93NUMPY([\x01-\x03])\x00", re.DOTALL)
_ENCRYPTED = 1  # the flag of a zip member
_QUOTED = 200  # characters of the file's own words in a message


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
        if not path.is_file():
            raise BenchmarkError(f"{path}: no such file; expected an official label file (npz)")
        if path.stat().st_size > MAX_FILE:
            raise BenchmarkError(f"{path}: {path.stat().st_size} bytes, expected a label file of at most {MAX_FILE}")
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            _check_members(path, members)
            contents = {info.filename.removesuffix(".npy"): _unpacked(archive, info) for info in members}
    except BenchmarkError:
        raise
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, ValueError) as error:
        said = printable(error, _QUOTED)
        raise BenchmarkError(f"{path}: cannot be read as npz ({said}); expected an official label file") from error
    corpora = {}
    for name, content in contents.items():
        where = f"{path}, {printable(name, _QUOTED)}"
        try:
            value = inert_pickle.load(_after_header(content))
        except UnsafePickle as error:
            raise UnsafePickle(f"{path}: {error} (array {printable(name, _QUOTED)})") from None
        except (ValueError, OverflowError, RecursionError) as error:  # the standard library's words for damage
            said = printable(f"{type(error).__name__}: {error}", _QUOTED)
            raise BenchmarkError(f"{where} cannot be read ({said}); it is truncated or damaged: get it again") from None
        corpora[_label(name, where)] = _corpus(value, where)
    return corpora


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
        atomic_files.write_text(out, text.getvalue())
    except OSError as error:
        raise BenchmarkError(f"{out} cannot be written: {error}") from error
    return out, {split: len(corpus) for split, corpus in corpora.items()}


def refusal(path: pathlib.Path) -> str:
    """What to say where an official npz stands without its CSV."""
    return (
        f"{path}: labels in pickled form are not read: a pickle can run code when it is opened. Convert the file once, "
        f"through a reader that runs nothing: {COMMAND} --labels={path}"
    )


def _check_members(path: pathlib.Path, members: list[zipfile.ZipInfo]) -> None:
    """Refuses what numpy does not write, and what would unpack to more than a label file holds."""
    if not members:
        raise BenchmarkError(f"{path}: holds no array; expected dictionaries of labels, such as test_corpus")
    if len(members) > MAX_ARRAYS:
        raise BenchmarkError(f"{path}: holds {len(members)} files, expected an array for each of a few corpora")
    names = [info.filename for info in members]
    if len(set(names)) < len(names):
        raise BenchmarkError(f"{path}: holds two files of one name, expected an array for each corpus; refused")
    for info in members:
        name = printable(info.filename, _QUOTED)
        if not info.filename.endswith(".npy"):
            raise BenchmarkError(f"{path}: holds {name}, which is no array; expected an official label file")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & _ENCRYPTED:
            raise BenchmarkError(f"{path}: {name} is packed in a way numpy does not use; expected an official file")
    size = sum(info.file_size for info in members)
    if size > MAX_BYTES:
        raise BenchmarkError(f"{path}: unpacks to {size} bytes, expected at most {MAX_BYTES}; refused")


def _unpacked(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """A member's bytes, never more than the archive's index says."""
    with archive.open(info) as member:
        content = member.read(info.file_size + 1)
    if len(content) != info.file_size:
        raise zipfile.BadZipFile(f"{printable(info.filename, _QUOTED)} is not as long as the index says")
    return content


def _after_header(content: bytes) -> bytes:
    """What follows an .npy header. The header is looked at as text: a type it describes is never made."""
    start = _NPY.match(content)
    if not start:
        raise ValueError("no array of numpy's")
    long = start.group(1) != b"\1"
    offset = 12 if long else 10
    length = int.from_bytes(content[8:offset], "little")
    header = content[offset : offset + length]
    if length > MAX_HEADER or len(header) < length:
        raise ValueError(f"a header of {length} bytes")
    if not re.search(rb"""["']descr["']\s*:\s*["']\|?O["']""", header):
        raise UnsafePickle("holds an array of numbers or texts, expected a dictionary from clip name to labels")
    return content[offset + length :]


def _corpus(value: Any, where: str) -> dict[str, dict[str, Any]]:
    held = value.content if isinstance(value, inert_pickle.Array) and value.size == 1 else value
    if not isinstance(held, Mapping):
        raise BenchmarkError(f"{where}: got {_kind(held)}, expected a dictionary from clip name to labels")
    corpus = {}
    for name, row in held.items():
        name = _label(name, where)
        if not isinstance(row, Mapping):
            raise BenchmarkError(f"{where}, {name}: got {_kind(row)}, expected the clip's labels")
        labels = {_label(str(label), f"{where}, {name}"): value for label, value in row.items()}
        if clash := {SPLIT, NAME} & labels.keys():
            raise BenchmarkError(f"{where}, {name}: a label is called {clash.pop()}, which is a column of the CSV")
        corpus[name] = {label: _plain(value, f"{where}, {name}, {label}") for label, value in labels.items()}
    return corpus


def _plain(value: Any, where: str) -> str | int | float:
    if isinstance(value, inert_pickle.Array) and value.size == 1:
        value = value.content
    if isinstance(value, str):
        return _label(value, where)
    if not isinstance(value, int | float):
        raise BenchmarkError(f"{where}: got {_kind(value)}, expected text or a number")
    return value


def _label(text: Any, where: str) -> str:
    """A text that may stand in the CSV, unchanged: it is looked up among files and words later."""
    if not isinstance(text, str):
        raise BenchmarkError(f"{where}: got the name {printable(_kind(text))}, expected text")
    if printable(text, one_line=False) != text:
        raise BenchmarkError(f"{where}: {printable(text, _QUOTED)} holds characters that no name or label has; refused")
    if would_run_in_a_spreadsheet(text):
        raise BenchmarkError(f"{where}: {printable(text, _QUOTED)} would be run as a formula by a spreadsheet; refused")
    return text


def _kind(value: Any) -> str:
    if isinstance(value, inert_pickle.Array):
        return f"an array of {value.size} elements"
    return type(value).__name__
