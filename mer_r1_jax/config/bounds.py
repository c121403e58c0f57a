"""What a setting may be, as part of its type in the schema: `fps: Annotated[float, Number(0, 1000, above=True)]`.

A bound is written once, beside the field, and holds however a configuration comes in. The highest values are far beyond
any use; they catch slips of the keyboard and overflows before these become programs that cannot be compiled.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from mer_r1_jax.foreign_text import printable

SCHEME = "gs://"
_ADDRESS = re.compile(r"gs://[a-z0-9][a-z0-9._-]{1,220}[a-z0-9](?:/(?P<name>.*))?")
_SHOWN = 80  # characters of a value that an error shows
_PATH_BYTES, _NAME_BYTES = 4096, 200  # Linux takes 4096 and 255; a run's name leaves room for suffixes of its files


@dataclasses.dataclass(frozen=True)
class Number:
    """An interval of numbers; NaN is in none.

    Attributes:
        least, most: its ends.
        above, below: leave `least`, or `most`, itself out.
        also: single numbers that are allowed besides.
        note: added to the error, for instance why.
    """

    least: float
    most: float
    above: bool = False
    below: bool = False
    also: tuple[float, ...] = ()
    note: str = ""

    def problem(self, value: Any) -> str:
        """What is expected in place of a value; "" where nothing is wrong with it."""
        over = value > self.least if self.above else value >= self.least
        under = value < self.most if self.below else value <= self.most
        return "" if (over and under) or value in self.also else f"expected {self}{self.note and f': {self.note}'}"

    def __str__(self) -> str:
        if isinstance(self.least, float) and not (self.above or self.below):
            return f"{self.least:g}..{self.most:g}"
        low = f"{'more than' if self.above else 'at least'} {self.least:g}"
        most = f"{self.most:,}" if isinstance(self.most, int) else f"{self.most:g}"
        return f"{low} and {'less than' if self.below else 'at most'} {most}"


@dataclasses.dataclass(frozen=True)
class PlaceText:
    """A path of a file system, or, where `bucket` is set, gs://<bucket>/<path>."""

    bucket: bool = True

    def problem(self, value: str) -> str:
        """What is expected in place of a path; "" where nothing is wrong with it."""
        if any(_is_control(character) for character in value):
            return "expected a path without control characters"
        try:
            too_long = len(os.fsencode(value)) > _PATH_BYTES
        except UnicodeEncodeError:
            return "expected a path that a file system can hold; half a surrogate pair stands in it"
        if too_long:
            return f"expected a path of at most {_PATH_BYTES:,} bytes"
        if "://" not in value:
            return ""
        if not self.bucket:
            return "expected a folder on a disk of every host, not one in a bucket"
        if not is_bucket(value):
            return (
                "expected a path of a file system or gs://<bucket>/<path>; mount other storage at the same place on "
                "every host (docs/launching.md) and name that place"
            )
        match = _ADDRESS.fullmatch(value)
        if match is None:
            return "expected gs://<bucket>/<path>"
        parts = (match["name"] or "").removesuffix("/").split("/")
        if any(part in (".", "..") for part in parts) or ("" in parts and parts != [""]):
            return "expected gs://<bucket>/<path> without empty parts, '.' and '..'"
        return ""


@dataclasses.dataclass(frozen=True)
class NameText:
    """The name of a folder below another one, or several joined by "/"; "" only where `empty` is set."""

    empty: bool = False

    def problem(self, value: str) -> str:
        """What is expected in place of a name; "" where nothing is wrong with it."""
        if not value and self.empty:
            return ""
        wrong = next((reason for part in value.split("/") if (reason := _wrong_part(part))), "")
        return wrong and f"expected the name of a folder below train.output_dir, such as mer_r1_seed0; {wrong}"


@dataclasses.dataclass(frozen=True)
class Text:
    """Any text that can be written as UTF-8."""

    def problem(self, value: str) -> str:
        """What is expected in place of a text; "" where nothing is wrong with it."""
        return "" if _is_utf8(value) else "expected text that UTF-8 can hold; half a surrogate pair stands in it"


def is_bucket(path: str | os.PathLike) -> bool:
    """Whether a path is an address in a bucket."""
    return str(path).startswith(SCHEME)


@dataclasses.dataclass(frozen=True)
class NameOrPath:
    """One of several names, or the dotted path of a function of the user's, such as my_module.my_advantage."""

    names: tuple[str, ...]

    def problem(self, value: str) -> str:
        """What is expected in place of a name; "" where nothing is wrong with it."""
        parts = value.split(".")
        if value in self.names or (len(parts) > 1 and all(part.isidentifier() for part in parts)):
            return ""
        return f"expected {self}"

    def __str__(self) -> str:
        return f"one of {', '.join(self.names)}, or a function of your own as module.function"


def _wrong_part(part: str) -> str:
    if part in ("", ".", ".."):
        return f"a part of it is {part!r}" if part else "it, or a part of it, is empty"
    if part != part.strip():
        return "a part of it begins or ends with a space"
    if any(_is_control(character) for character in part) or "\\" in part or not _is_utf8(part):
        return "control characters, backslashes and halves of surrogate pairs may not stand in it"
    if len(part.encode()) > _NAME_BYTES:
        return f"a part of it may have at most {_NAME_BYTES} bytes"
    return ""


def _is_control(character: str) -> bool:
    return ord(character) < 32 or 127 <= ord(character) < 160


def _is_utf8(text: str) -> bool:
    return not any(0xD800 <= ord(character) < 0xE000 for character in text)


# Kinds of numbers, by what they count or measure.
Count = Annotated[int, Number(1, 1_000_000_000)]
CountOrZero = Annotated[int, Number(0, 1_000_000_000)]
FewOrZero = Annotated[int, Number(0, 10_000)]
Rows = Annotated[int, Number(1, 1_000_000)]  # of a batch, or parts it is cut into
Tokens = Annotated[int, Number(1, 1 << 20)]
TokensOrZero = Annotated[int, Number(0, 1 << 20)]
Pixels = Annotated[int, Number(1, 1 << 40)]
Steps = Annotated[int, Number(-1, 1_000_000_000, note="-1 means epochs, 0 skips the phase")]
Epochs = Annotated[float, Number(0, 1_000_000, above=True)]
Size = Annotated[int, Number(0, 1_000_000, note="0 means the preset's")]  # of a part of the model
MeshSize = Annotated[
    int, Number(1, 1_000_000, also=(-1,), note="axes have positive sizes, and one may be -1: the devices that are left")
]
Seed = Annotated[int, Number(0, (1 << 31) - 1)]  # doubled, it is a 32-bit seed still
Seconds = Annotated[float, Number(0, 86_400, above=True)]
Share = Annotated[float, Number(0.0, 1.0)]
ShareBelowOne = Annotated[float, Number(0, 1, below=True)]
Weight = Annotated[float, Number(0, 1_000_000)]
AnyWeight = Annotated[float, Number(-1e6, 1e6)]

# Kinds of text.
Place = Annotated[str, PlaceText()]
DiskPlace = Annotated[str, PlaceText(bucket=False)]  # written to file by file
Words = Annotated[str, Text()]


@functools.cache
def field_types(section: type) -> dict[str, Any]:
    """Name -> type of every field of a section of the schema, bounds included."""
    return typing.get_type_hints(section, include_extras=True)


def all_fields(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, type, value) of every field of a section and of those within it, in the schema's order."""
    for name, hint in field_types(type(section)).items():
        value = getattr(section, name)
        if dataclasses.is_dataclass(value):
            yield from all_fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, hint, value


def plain_type(hint: Any) -> Any:
    """A field's type without what it may hold: int, float, bool, str, or tuple[such, ...]."""
    if typing.get_origin(hint) is Annotated:
        return typing.get_args(hint)[0]
    if typing.get_origin(hint) is Literal:
        return str
    if typing.get_origin(hint) is tuple:
        return tuple[plain_type(typing.get_args(hint)[0]), ...]
    return hint


def bounds_of(hint: Any) -> tuple[Any, ...]:
    """The bounds that a field's type brings along; a tuple's are those of its items."""
    if typing.get_origin(hint) is tuple:
        return bounds_of(typing.get_args(hint)[0])
    if typing.get_origin(hint) is Annotated:
        return hint.__metadata__
    return ()


def problem_with(hint: Any, value: Any) -> str:
    """What is wrong with a value of the right plain type: "got ..., expected ..."; "" where nothing is."""
    if typing.get_origin(hint) is tuple:
        hint, items = typing.get_args(hint)[0], value
    else:
        items = (value,)
    for item in items:
        if typing.get_origin(hint) is Literal and item not in typing.get_args(hint):
            return f"got {shown_value(item)}, expected one of {', '.join(typing.get_args(hint))}"
        for bound in bounds_of(hint):
            if wrong := bound.problem(item):
                return f"got {shown_value(value)}, {wrong}"
    return ""


def shown_value(value: Any) -> str:
    """A value as an error shows it: short, on one line, and whatever it is."""
    try:
        return printable(repr(value), _SHOWN)
    except ValueError:  # Python writes out no integer beyond 4300 digits
        return "a number of thousands of digits"
