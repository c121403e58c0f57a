"""What a data file is that holds no JSON lines: told from its first bytes, with who reads it or how to convert it."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import PurePath
from typing import Literal

START = 64 * 1024  # bytes of a file that are looked at
_MOST_NAMED = 60  # characters of a first line that a message shows

_PANDAS = "python -c \"import pandas; pandas.{read}.to_json('data.jsonl', orient='records', lines=True)\""
_UNPACK = "unpack it first, e.g. `{command} > data.jsonl`"

# first bytes -> (what it is, how to get JSON lines from it); {file} is the quoted path
_BINARY = (
    (b"\x1f\x8b", "a gzip-compressed file", _UNPACK.format(command="gzip -dc {file}")),
    (b"BZh", "a bzip2-compressed file", _UNPACK.format(command="bzip2 -dc {file}")),
    (b"\xfd7zXZ\x00", "an xz-compressed file", _UNPACK.format(command="xz -dc {file}")),
    (b"\x28\xb5\x2f\xfd", "a zstd-compressed file", _UNPACK.format(command="zstd -dc {file}")),
    (b"\x04\x22\x4d\x18", "an lz4-compressed file", _UNPACK.format(command="lz4 -dc {file}")),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it and name the JSON-lines file inside"),
    (b"Rar!\x1a\x07", "a RAR archive", "unpack it and name the JSON-lines file inside"),
    (b"FEA1", "a Feather file", f"convert it, e.g. `{_PANDAS.format(read='read_feather({file!r})')}`"),
    (b"Obj\x01", "an Avro file", "convert it to JSON lines"),
    (b"SQLite format 3\x00", "an SQLite database", "export the table as JSON lines"),
    (b"\x89HDF", "an HDF5 file", "convert it to JSON lines"),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook", f"convert it, e.g. `{_PANDAS.format(read='read_excel({file!r})')}`"),
    (b"\x93NUMPY", "a NumPy array", "convert it to JSON lines"),
)
Reader = Literal["", "json", "csv", "parquet", "arrow_file", "arrow_stream"]
# first bytes -> (what it is, who reads it)
_TABLES: tuple[tuple[bytes, str, Reader], ...] = (
    (b"PAR1", "a Parquet file", "parquet"),
    (b"ARROW1", "an Arrow file", "arrow_file"),
    (b"\xff\xff\xff\xff", "an Arrow stream", "arrow_stream"),  # as Hugging Face datasets keep them
)
_UTF = (  # the longer marks first: UTF-32 begins like UTF-16
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
# keys of a single record or prediction: an object with one of them wraps nothing
_RECORD_KEYS = frozenset(
    "id messages conversations conversation prompt question problem query system solution reasoning subtitle video "
    "videos audio audios image images prediction truth".split()
)
_WRAPPED = re.compile(r'^\{[^\[\]{}]*?"([^"\\]{1,64})"\s*:\s*\[\s*(?:\{|$)')
_DELIMITERS = {",": "a CSV file", "\t": "a TSV file (tabs between columns)", ";": "a CSV file with semicolons"}


@dataclasses.dataclass(frozen=True)
class OtherKind:
    """A file that is no JSON lines.

    Attributes:
        name: what it is, with its article.
        mend: how to make JSON lines of it; "" where it is read as it is.
        reader: who reads it: json (values with white space or in one list), csv, parquet, arrow_file, arrow_stream; ""
            where nobody does.
        delimiter: between the columns of a CSV file; of another text that which a CSV file of one column would have.
        texts: columns of a CSV file whose cells are text whatever they look like; known to whoever reads it.
    """

    name: str
    mend: str = ""
    reader: Reader = ""
    delimiter: str = ""
    texts: frozenset[str] = frozenset()


def begins_with_a_text(start: bytes) -> bool:
    """Whether the first line is a text in quotes: as JSON no record, but the name of a CSV file's only column."""
    lines = (line.strip() for line in start.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace").split("\n"))
    return isinstance(_parsed(next(filter(None, lines), "")), str)


def other_kind(path: object, start: bytes) -> OtherKind | None:
    """What the file is, if its first bytes show that it holds no JSON lines in UTF-8; None where nothing says so.

    Args:
        path: of the file, for the commands that convert it.
        start: its first `START` bytes, or all of a shorter file.
    """
    return _binary_kind(str(path), start) or _encoded_kind(str(path), start) or _text_kind(str(path), start)


def conversion_to_utf8(path: object, encoding: str) -> str:
    """The mend for a text in another encoding."""
    copy = f"data{PurePath(str(path)).suffix or '.jsonl'}"
    file, copy = shlex.quote(str(path)), shlex.quote(copy)
    return f"save the file as UTF-8, e.g. `iconv -f {encoding} -t UTF-8 {file} > {copy}`"


def likely_encoding(raw: bytes) -> str:
    """The likelier of the two encodings that most often stand in for UTF-8: GB18030 (GBK) or Windows-1252.

    A Chinese character is two high bytes or a high byte and a letter, and seldom stands alone; an accented letter does.
    """
    try:
        raw.decode("gb18030")
    except UnicodeDecodeError:
        return "WINDOWS-1252"
    runs = re.findall(rb"[\x80-\xff]+", raw)
    return "GB18030" if 2 * sum(len(run) > 1 for run in runs) >= len(runs) else "WINDOWS-1252"


def _binary_kind(path: str, start: bytes) -> OtherKind | None:
    for magic, name, reader in _TABLES:
        if start.startswith(magic):
            return OtherKind(name, reader=reader)
    for magic, name, mend in _BINARY:
        if start.startswith(magic):
            return OtherKind(name, _for_file(mend, path))
    if start.startswith(b"PK\x03\x04"):
        return _zip_kind(path, start)
    if start[257:262] == b"ustar":
        return OtherKind("a tar archive", "unpack it and name the JSON-lines file inside")
    return None


def _zip_kind(path: str, start: bytes) -> OtherKind:
    if b"xl/" in start or b"[Content_Types].xml" in start:
        mend = f"convert it, e.g. `{_PANDAS.format(read='read_excel({file!r})')}`"
        return OtherKind("an Excel workbook (xlsx)", _for_file(mend, path))
    if start[30:].startswith((b"arr_0.npy", b"corpus.npy")) or b".npy" in start[:512]:
        return OtherKind("a NumPy archive (npz)", "convert it to JSON lines")
    return OtherKind("a zip archive", _for_file("unpack it first, e.g. `unzip -p {file} > data.jsonl`", path))


def _encoded_kind(path: str, start: bytes) -> OtherKind | None:
    for mark, name in _UTF:
        if start.startswith(mark):
            return OtherKind(f"a text in {name}", conversion_to_utf8(path, name))
    if b"\x00" not in start:
        return None
    # UTF-16 without a mark: every second byte of an ASCII text is zero.
    even, odd = start[0:2000:2], start[1:2000:2]
    for zeros, others, name in ((odd, even, "UTF-16LE"), (even, odd, "UTF-16BE")):
        if zeros.count(0) > 0.8 * len(zeros) and others.count(0) < 0.2 * len(others):
            return OtherKind(f"a text in {name}", conversion_to_utf8(path, name))
    if not start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        return OtherKind("a binary file", "name the JSON-lines file")
    return None


def _text_kind(path: str, start: bytes) -> OtherKind | None:
    text = start.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace")
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not lines:
        return None
    if lines[0].startswith("["):
        return OtherKind("a JSON array", reader="json")
    if lines[0].startswith("{"):
        return _object_kind(path, text, lines, complete=len(start) < START)
    if _is_json(lines[0]) or (len(lines) > 1 and lines[1].startswith("{")):
        return None  # the faults of single lines are named line by line
    return _plain_kind(lines)


def _object_kind(path: str, text: str, lines: list[str], complete: bool) -> OtherKind | None:
    """JSON that is one object, or objects over several lines."""
    first = lines[0]
    row = _parsed(first)
    if isinstance(row, dict):
        return _wrapped_kind(path, row) if len(lines) == 1 and complete else None
    pieces = [piece.strip() for piece in text.split("\r") if piece.strip()]
    if "\n" not in text and len(pieces) > 1 and isinstance(_parsed(pieces[0]), dict):
        mend = "write line feeds, e.g. `tr '\\r' '\\n' < {file} > data.jsonl`"
        return OtherKind("a text whose lines end in carriage returns alone", _for_file(mend, path))
    if _closes(first) or len(lines) == 1 or (lines[1].startswith("{") and first[-1] not in "{[,:"):
        return None
    if isinstance(_parsed(lines[1]), dict) and not first.endswith("["):
        return None  # one line is cut, the next is whole
    whole = _parsed(text) if complete else None
    found = _WRAPPED.search(" ".join(lines[:50]))
    if whole is None and found and found.group(1) not in _RECORD_KEYS:
        whole = {found.group(1): [{}]}
    wrapped = _wrapped_kind(path, whole) if isinstance(whole, dict) else None
    return wrapped or OtherKind("JSON over several lines (pretty-printed)", reader="json")


def _wrapped_kind(path: str, row: dict) -> OtherKind | None:
    """An object that holds the records, in a list under one of its keys or each under a key of its own."""
    if _RECORD_KEYS & row.keys():
        return None
    file = shlex.quote(path)
    for key, value in row.items():
        if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
            name = json.dumps(key, ensure_ascii=False)
            mend = f"write one object per line, e.g. `jq -c '.[{name}][]' {file} > data.jsonl`"
            return OtherKind(f"JSON whose objects are wrapped in a list under {name}", mend)
    if len(row) > 1 and all(isinstance(value, dict) for value in row.values()):
        mend = f"write one object per line, e.g. `jq -c '.[]' {file} > data.jsonl`"
        return OtherKind("one JSON object that holds the others, each under a key", mend)
    return None


def _closes(line: str) -> bool:
    """Whether a line ends as a whole object does."""
    return line.rstrip(",").endswith("}") and line.count("{") <= line.count("}")


def _plain_kind(lines: list[str]) -> OtherKind:
    first = lines[0]
    if first.startswith("version https://git-lfs"):
        return OtherKind("a git-lfs pointer, not the file itself", "run `git lfs pull`")
    if first.lower().startswith(("<!doctype", "<html")):
        return OtherKind("a web page", "download the file itself, not the page about it")
    if first.startswith("<"):
        return OtherKind("an XML file", "convert it to JSON lines")
    delimiter = max(_DELIMITERS, key=first.count)
    if delimiter in first and (len(lines) == 1 or delimiter in lines[1]):
        return OtherKind(_DELIMITERS[delimiter], reader="csv", delimiter=delimiter)
    shown = first if len(first) <= _MOST_NAMED else f"{first[:_MOST_NAMED]}..."
    return OtherKind(f"a text that is not JSON (it begins {shown!r})", "write one JSON object per line", delimiter=",")


def _for_file(mend: str, path: str) -> str:
    return mend.replace("{file!r}", repr(path)).replace("{file}", shlex.quote(path))


def _parsed(text: str) -> object | None:
    """The JSON value, or None where there is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    except (ValueError, RecursionError):  # a number of too many digits, or a deep value: JSON all the same
        return True
    return True
