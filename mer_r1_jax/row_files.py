"""A data file of any kind that is read, as the texts of its rows: JSON lines, JSON, CSV, Parquet, Arrow, `datasets`.

Every row becomes the JSON text of one value, so that what checks a line of JSON lines checks every row. Text files are
split here, tables are read by pyarrow; a file of a kind that nobody reads is a fault that says what it is.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import dataclasses
import datetime
import decimal
import io
import json
import math
import os
import tokenize
from collections.abc import Callable, Collection, Iterator
from json import JSONDecodeError
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mer_r1_jax.file_kinds import (
    START,
    OtherKind,
    begins_with_a_text,
    conversion_to_utf8,
    likely_encoding,
    other_kind,
)
from mer_r1_jax.foreign_text import printable
from mer_r1_jax.json_lines import Fault, cut, numbered_lines

if TYPE_CHECKING:
    import pyarrow as pa

EXPECTED = "JSON lines, JSON, CSV, Parquet, Arrow, or a folder that `save_to_disk` of Hugging Face datasets wrote"
MAX_PYTHON_LIST = 4000  # characters
_ROWS_AT_ONCE = 1024  # of a table that are Python values at a time
_STATE, _SPLITS = "state.json", "dataset_dict.json"  # what save_to_disk writes beside the arrow files
_TIMES = (datetime.date, datetime.time)


def numbered_rows(
    path: str | os.PathLike, faults: list[Fault], *, one_column: bool = False, texts: Collection[str] = ()
) -> Iterator[tuple[int, str]]:
    """Yields (number, JSON text) of the rows that are not blank.

    The number is the line a row begins at in JSON lines and CSV, and else its place in the file, from 1.

    Args:
        path: a file, or a folder that `save_to_disk` wrote.
        faults: is given what cannot be read: the file, a row of it, or its lines that are not UTF-8.
        one_column: takes a text for a CSV file of one column, which nothing shows.
        texts: columns of a CSV file whose cells are text, also where one looks like a list (`[1]`, `["sighs"]`).
    """
    if os.path.isdir(path):
        yield from _folder_rows(Path(path), faults)
        return
    try:
        stream = open(path, "rb")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        got = printable(getattr(error, "strerror", None) or error)
        faults.append(Fault(0, got, "a readable data file", "check the path and its permissions"))
        return
    with stream:
        start = stream.read(START)
        kind = other_kind(path, start)
        if kind is None and one_column and begins_with_a_text(start):
            kind = OtherKind("a CSV file", reader="csv", delimiter=",")
        stream.seek(0)
        if kind is None:
            for number, text in numbered_lines(stream, path, faults):
                if text := text.strip():
                    yield number, text
        elif reader := kind.reader or ("csv" if one_column and kind.delimiter else ""):
            kind = dataclasses.replace(kind, texts=frozenset(texts))
            yield from _READERS[reader](stream, Path(path), kind, faults)
        else:
            faults.append(Fault(0, kind.name, EXPECTED, kind.mend))


def _json_rows(stream: BinaryIO, path: Path, kind: OtherKind, faults: list[Fault]) -> Iterator[tuple[int, str]]:
    """The values of one JSON array, or of a file that holds one after the other, white space between them."""
    raw = stream.read().removeprefix(b"\xef\xbb\xbf")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        encoding = likely_encoding(raw)
        got = f"byte 0x{raw[error.start]:02x} at line {raw[: error.start].count(10) + 1}, as in a text in {encoding}"
        faults.append(Fault(0, got, "UTF-8", conversion_to_utf8(path, encoding)))
        return
    # Only where values end is asked here; whoever reads a row's text checks what is in it.
    decoder = json.JSONDecoder(parse_int=len, parse_float=len, parse_constant=len)
    in_array = text.lstrip().startswith("[")
    at, number, closed = _next(text, text.index("[") + 1 if in_array else 0), 0, False
    while at < len(text):
        if in_array and text[at] == "]" and number == 0:
            at, closed = _next(text, at + 1), True
            break
        number += 1
        try:
            _, end = decoder.raw_decode(text, at)
        except (JSONDecodeError, RecursionError) as error:
            faults.append(_malformed(text, number, error))
            return
        yield number, text[at:end]
        at = _next(text, end)
        if not in_array:
            continue
        if text[at : at + 1] not in (",", "]"):
            break
        closed = text[at] == "]"
        at = _next(text, at + 1)
        if closed:
            break
    if in_array and (not closed or at < len(text)):
        rest = f"{cut(text[at : at + 40])} after entry {number}, at line {_line(text, at)}"
        got = rest if at < len(text) else "an array without an end"
        faults.append(Fault(0, got, "one JSON array, closed by ]", "check that the file is complete"))


def _next(text: str, at: int) -> int:
    """The next place that is not white space."""
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def _malformed(text: str, number: int, error: Exception) -> Fault:
    if isinstance(error, JSONDecodeError):
        where = f"line {error.lineno}, column {error.colno}"
        got, mend = f"malformed JSON at {where} ({error.msg})", "correct it; what follows it cannot be told apart"
    else:
        got, mend = "brackets nested beyond the recursion limit", "flatten the value"
    return Fault(number, got, "one JSON object for each record", mend, is_end=True)


def _csv_rows(stream: BinaryIO, path: Path, kind: OtherKind, faults: list[Fault]) -> Iterator[tuple[int, str]]:
    """The rows of a table in text, whose first row names its columns.

    Cells are text; an empty one is absent, and one that holds a JSON list or object, or a list as Python writes it, is
    that, but for the columns that hold text whatever it looks like.
    """
    consumed: list[int] = []  # lines that the row at hand takes

    def lines() -> Iterator[str]:
        for number, text in numbered_lines(stream, path, faults):
            consumed.append(number)
            yield text

    table = csv.reader(lines(), delimiter=kind.delimiter, skipinitialspace=True, strict=True)
    names: list[str] | None = None
    try:
        for cells in table:
            number = consumed[0]
            consumed.clear()
            if not any(cell.strip() for cell in cells):
                continue
            if names is None:
                names = [name.strip() for name in cells]
                if len(set(names)) < len(names):
                    twice = next(name for name in names if names.count(name) > 1)
                    got, expected = f"the column {cut(twice)} twice in the first row", "each name once"
                    faults.append(Fault(number, got, expected, "rename one of them"))
                    return
            elif len(cells) != len(names):
                mend = "put quotes around a cell that holds the delimiter, or correct the row"
                got = f"{len(cells)} cells between {cut(kind.delimiter)}"
                faults.append(Fault(number, got, f"{len(names)}, as in the first row", mend))
            else:
                row = {name: _cell(text, is_text=name in kind.texts) for name, text in zip(names, cells, strict=True)}
                yield number, json.dumps(row, ensure_ascii=False)
    except csv.Error as error:
        got, mend = f"no CSV ({printable(error)})", "check the quotes from this row on; they are doubled inside a cell"
        faults.append(Fault(consumed[0] if consumed else 0, got, "rows of a CSV file", mend, is_end=True))


def _cell(text: str, *, is_text: bool) -> Any:
    if not text.strip():
        return None
    if not is_text and text.lstrip()[0] in "[{":
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(text)
        with contextlib.suppress(ValueError):
            return python_list(text)
    return text


def python_list(text: str) -> list[str]:
    """The texts of a list as Python writes it, `['a', "b's"]`, which is read as data.

    Raises:
        ValueError: it is no list of texts, has more than `MAX_PYTHON_LIST` characters, or two texts without a comma
            between them, as NumPy prints them, which Python would take for one.
    """
    text = text.strip()
    if len(text) > MAX_PYTHON_LIST:
        raise ValueError("too long")
    try:
        found = ast.literal_eval(text)
        quoted = sum(token.type == tokenize.STRING for token in tokenize.generate_tokens(io.StringIO(text).readline))
    except (SyntaxError, RecursionError, MemoryError, tokenize.TokenError) as error:
        raise ValueError("no list") from error
    if not isinstance(found, list) or not all(isinstance(entry, str) for entry in found) or quoted != len(found):
        raise ValueError("no list of texts")
    return found


def _parquet_rows(stream: BinaryIO, path: Path, kind: OtherKind, faults: list[Fault]) -> Iterator[tuple[int, str]]:
    import pyarrow.parquet as pq

    def batches() -> Iterator[pa.RecordBatch]:
        return pq.ParquetFile(stream).iter_batches(_ROWS_AT_ONCE)

    yield from _table_rows(batches, kind.name, faults)


def _arrow_rows(stream: BinaryIO, path: Path, kind: OtherKind, faults: list[Fault]) -> Iterator[tuple[int, str]]:
    yield from _table_rows(lambda: _arrow_batches(stream, kind.reader == "arrow_stream"), kind.name, faults)


def _arrow_batches(stream: BinaryIO, streamed: bool) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    if streamed:
        yield from pa.ipc.open_stream(stream)
        return
    file = pa.ipc.open_file(stream)
    for place in range(file.num_record_batches):
        yield file.get_batch(place)


def _folder_rows(folder: Path, faults: list[Fault]) -> Iterator[tuple[int, str]]:
    """The rows of a folder that `save_to_disk` wrote: `state.json` names its arrow files, in order."""
    state = _json_object(folder / _STATE)
    splits = (_json_object(folder / _SPLITS) or {}).get("splits")
    if state is None and isinstance(splits, list) and splits:
        got = f"a folder of several data sets: {printable(', '.join(map(str, splits)), 200)}"
        faults.append(Fault(0, got, "one of them", f"name it, e.g. {printable(folder / str(splits[0]))}"))
        return
    listed = (state or {}).get("_data_files")
    listed = listed if isinstance(listed, list) else []
    named = [str(entry.get("filename")) for entry in listed if isinstance(entry, dict)]
    # A name is one of this folder's: what is elsewhere is not read for a file that says so.
    if not named or not all(name == os.path.basename(name) for name in named):
        mend = f"name a file; a folder is read where its {_STATE} lists arrow files, as `save_to_disk` writes it"
        faults.append(Fault(0, "a folder", EXPECTED, mend))
        return
    if (state or {}).get("_indices_files") or (state or {}).get("_indices_data_files"):
        mend = "call `flatten_indices()` on the data set and save it again"
        faults.append(Fault(0, "a data set that is a selection of its rows", "the rows themselves", mend))
        return

    def batches() -> Iterator[pa.RecordBatch]:
        for name in named:
            with open(folder / name, "rb") as stream:
                streamed = not stream.read(6).startswith(b"ARROW1")
                stream.seek(0)
                yield from _arrow_batches(stream, streamed)

    yield from _table_rows(batches, "a folder of Arrow files", faults)


def _json_object(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _table_rows(
    batches: Callable[[], Iterator[pa.RecordBatch]], name: str, faults: list[Fault]
) -> Iterator[tuple[int, str]]:
    import pyarrow as pa

    number = 0
    try:
        for batch in batches():
            if len(set(batch.schema.names)) < len(batch.schema.names):
                faults.append(Fault(0, f"{name} with two columns of one name", "each name once", "rename one of them"))
                return
            for row in batch.to_pylist():
                number += 1
                try:
                    plain = {column: _plain(value, column) for column, value in row.items()}
                except _UnfitValueError as error:
                    faults.append(Fault(number, error.got, "text, numbers, lists and objects", error.mend, error.field))
                    continue
                yield number, json.dumps(plain, ensure_ascii=False)
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
        got = f"{name} that cannot be read after row {number} ({printable(error, 200)})"
        faults.append(Fault(0, got, "a whole file", "write or download it again"))


class _UnfitValueError(ValueError):
    """A value of a table that a record cannot hold."""

    def __init__(self, field: str, got: str, mend: str):
        super().__init__(got)
        self.field, self.got, self.mend = printable(field, 80), got, mend


def _plain(value: Any, field: str) -> Any:
    """A value of a table as JSON has it.

    Arrow gives every object of a column all keys that any of them has, so a key without a value is absent; pandas
    writes NaN for an empty cell.
    """
    if isinstance(value, dict):
        if value.keys() == {"bytes", "path"}:
            return _named_file(value, field)
        return {str(key): _plain(entry, field) for key, entry in value.items() if entry is not None}
    if isinstance(value, list | tuple):
        return [_plain(entry, field) for entry in value]
    if isinstance(value, bytes):
        raise _UnfitValueError(field, f"{len(value)} bytes", "take the column out, or write it as text")
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, _TIMES):
        return value.isoformat()
    if isinstance(value, datetime.timedelta | decimal.Decimal) or value.__class__.__module__ == "uuid":
        return str(value)
    return value


def _named_file(value: dict[str, Any], field: str) -> str | None:
    """The path of a medium as `datasets` stores its features Audio, Image and Video: `{"bytes": null, "path": ...}`."""
    if value["bytes"] is not None:
        got = f"{len(value['bytes'])} bytes of a file inside the table"
        raise _UnfitValueError(field, got, "write the file into the media folder and give its path here")
    return value["path"]


_READERS: dict[str, Callable[[BinaryIO, Path, OtherKind, list[Fault]], Iterator[tuple[int, str]]]] = {
    "json": _json_rows,
    "csv": _csv_rows,
    "parquet": _parquet_rows,
    "arrow_file": _arrow_rows,
    "arrow_stream": _arrow_rows,
}
