"""JSON lines that somebody else wrote: from a file to its lines, and from a line to one object safe to carry on.

What cannot be read is a fault with three parts, never an exception of the standard library. Python's `json` lets
through what neither UTF-8 nor another reader takes: halves of surrogate pairs, infinities, a key twice.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from mer_r1_jax.file_kinds import conversion_to_utf8, likely_encoding
from mer_r1_jax.foreign_text import printable

MAX_NESTING = 64  # lists and objects inside one another; far from what recursive code downstream can bear
MAX_DIGITS = 300  # of a whole number; a float holds about as much
_MOST_NAMED = 80  # characters of a key that a message shows


@dataclasses.dataclass(frozen=True)
class Fault:
    """What is wrong with a file, a line of it (`line` > 0) or a field of the line.

    Attributes:
        line: 1-based line, 0 for the whole file.
        got, expected, mend: the three parts of the message.
        field: the line's key that is at fault, "" for the whole line.
        is_end: nothing behind it could be read.
    """

    line: int
    got: str
    expected: str
    mend: str
    field: str = ""
    is_end: bool = False

    def __str__(self) -> str:
        place = f"{self.field}: " if self.field else ""
        return f"{place}got {self.got}; expected {self.expected}; to mend it, {self.mend}"


class JsonLineError(ValueError):
    """A line that is not one JSON object; `fault` has the parts of the message."""

    def __init__(self, fault: Fault):
        super().__init__(str(fault))
        self.fault = fault


def json_texts(text: str) -> list[str]:
    """The lines of JSON lines that are not blank.

    A line ends at a line feed alone: `str.splitlines` also takes U+2028 and its like for an end, which JSON allows
    inside a text.
    """
    return [line for line in text.split("\n") if line.strip()]


def numbered_lines(stream: Iterable[bytes], path: str | os.PathLike, faults: list[Fault]) -> Iterator[tuple[int, str]]:
    """Yields (1-based number, text) of every line that is UTF-8, with its blanks. A byte order mark is read over.

    Args:
        stream: the lines of a file that is open.
        path: of the file, for messages.
        faults: is given one fault, at the first line of its kind, where lines are not UTF-8.
    """
    undecoded = _Undecoded(Path(path))
    for number, raw in enumerate(stream, start=1):
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            if _holds_surrogates(raw):
                expected, mend = "valid Unicode text", "write the character whole"
                faults.append(Fault(number, "half of a surrogate pair", expected, mend))
            else:
                undecoded.add(number, raw, error.start)
            continue
        yield number, text
    faults.extend(undecoded.faults())


def _holds_surrogates(raw: bytes) -> bool:
    """Whether bytes are UTF-8 but for halves of surrogate pairs, which some programs write like characters."""
    try:
        raw.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return False
    return True


class _Undecoded:
    """The lines of a file that are not UTF-8; one fault names them all, since they have one cause."""

    def __init__(self, path: Path):
        self.path = path
        self.lines = 0
        self.first: tuple[int, bytes, int] | None = None

    def add(self, number: int, raw: bytes, at: int) -> None:
        self.lines += 1
        self.first = self.first or (number, raw, at)

    def faults(self) -> list[Fault]:
        if self.first is None:
            return []
        number, raw, at = self.first
        encoding = likely_encoding(raw)
        more = f", and {self.lines - 1} further line(s) that are not UTF-8" if self.lines > 1 else ""
        got = f"byte 0x{raw[at]:02x} at column {at + 1}, as in a text in {encoding}{more}"
        return [Fault(number, got, "UTF-8", conversion_to_utf8(self.path, encoding))]


def parse_value(text: str, *, nan: bool = False) -> Any:
    """The JSON value on a line.

    Args:
        text: the line.
        nan: takes NaN, which pandas writes for an empty cell.

    Raises:
        JsonLineError: malformed JSON, a key twice, a number that is none or has hundreds of digits, brackets nested
            beyond what Python reads.
    """
    try:
        return json.loads(
            text,
            object_pairs_hook=_unique_keys,
            parse_constant=_nan_alone if nan else _no_constant,
            parse_int=_whole_number,
            parse_float=_finite_number,
        )
    except json.JSONDecodeError as error:
        got = f"malformed JSON at column {error.colno} ({error.msg})"
        mend = "put exactly one object on the line, strings in double quotes, no trailing comma"
        raise JsonLineError(Fault(0, got, "one JSON object per line", mend)) from None
    except (_BadJson, RecursionError) as error:
        got = str(error) if isinstance(error, _BadJson) else "brackets nested beyond the recursion limit"
        raise JsonLineError(Fault(0, got, "plain JSON with each key once", "correct the line")) from None


def unfit_values(row: dict[str, Any]) -> list[Fault]:
    """One fault for each key of an object whose name or value cannot be carried on: halves of surrogate pairs, which
    no file takes, and nesting beyond `MAX_NESTING`."""
    found = []
    for name, value in row.items():
        reason = _unfit(name) or _unfit(value)
        if reason is not None:
            got, expected, mend = reason
            found.append(Fault(0, got, expected, mend, field=printable(name, _MOST_NAMED)))
    return found


def cut(value: object, limit: int = _MOST_NAMED) -> str:
    """A value as a message shows it: its repr, which escapes what a terminal obeys, cut to `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


def kind_of(value: Any) -> str:
    """A JSON value's kind, with its article."""
    names = {bool: "a boolean", str: "the text", list: "the list", dict: "the object", type(None): "null"}
    return names.get(type(value), "the number")


def _unfit(value: Any) -> tuple[str, str, str] | None:
    """(got, expected, mend) of what is wrong inside a value, or None. It keeps its own stack: the value may be deep."""
    waiting = [(value, 1)]
    while waiting:
        entry, depth = waiting.pop()
        if isinstance(entry, str):
            if any("\ud800" <= character <= "\udfff" for character in entry):
                return "half of a surrogate pair", "valid Unicode text", "correct the \\u escapes"
        elif isinstance(entry, dict | list):
            if depth > MAX_NESTING:
                return f"brackets nested more than {MAX_NESTING} deep", "plainer JSON", "flatten the value"
            inner = [*entry.keys(), *entry.values()] if isinstance(entry, dict) else entry
            waiting.extend((part, depth + 1) for part in inner)
    return None


class _BadJson(ValueError):
    """Valid for Python's json module, but not what a data file may contain."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        seen: set[str] = set()
        doubled = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise _BadJson(f"the key {cut(doubled)} twice in one object")
    return row


def _no_constant(name: str) -> NoReturn:
    raise _BadJson(f"the number {name}, which JSON does not know")


def _nan_alone(name: str) -> float:
    return math.nan if name == "NaN" else _no_constant(name)


def _whole_number(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise _BadJson(f"a whole number of {len(text.lstrip('-'))} digits")
    return int(text)


def _finite_number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise _BadJson(f"the number {cut(text).strip(chr(39))}, which is too large")
    return number
