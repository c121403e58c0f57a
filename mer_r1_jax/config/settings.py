"""Every setting with its type, default and comment, read from the schema: for `--help` and the reference page."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import io
import tokenize
import typing
from collections.abc import Iterator
from typing import Any, Literal

from mer_r1_jax.config import schema
from mer_r1_jax.config.bounds import NameOrPath, Number, PlaceText, bounds_of, field_types, plain_type


@dataclasses.dataclass(frozen=True)
class Setting:
    """One field of the schema.

    Attributes:
        name: dotted, as on the command line: rl.num_generations.
        kind: what it may be, in words: "int, at least 2 and at most 65,536".
        default: as written on the command line; "" for an empty text.
        comment: what it means, from the comment beside the field.
    """

    name: str
    kind: str
    default: str
    comment: str


@functools.cache
def settings() -> tuple[Setting, ...]:
    """Every field of the schema, in its order."""
    return tuple(_settings_of(schema.RunConfig(), ""))


def sections() -> dict[str, str]:
    """Section -> what it is about, from the docstrings of the schema; "" is that of the whole run."""
    parts = {"": inspect.getdoc(schema.RunConfig) or ""}
    for name, hint in field_types(schema.RunConfig).items():
        if dataclasses.is_dataclass(hint):
            parts[name] = inspect.getdoc(hint) or ""
            for inner, kind in field_types(hint).items():
                if dataclasses.is_dataclass(kind):
                    parts[f"{name}.{inner}"] = inspect.getdoc(kind) or ""
    return parts


def _settings_of(section: Any, prefix: str) -> Iterator[Setting]:
    comments = _comments()[type(section).__name__]
    for name, hint in field_types(type(section)).items():
        value = getattr(section, name)
        if dataclasses.is_dataclass(value):
            yield from _settings_of(value, f"{prefix}{name}.")
        else:
            yield Setting(prefix + name, _kind(hint), _text(value), comments.get(name, ""))


def _text(value: Any) -> str:
    return str(value) if not isinstance(value, tuple) else f"({', '.join(map(repr, value))}{',' * (len(value) == 1)})"


def _kind(hint: Any) -> str:
    """A type of the schema in words."""
    if typing.get_origin(hint) is tuple:
        return f"any number of: {_kind(typing.get_args(hint)[0])}"
    if typing.get_origin(hint) is Literal:
        return " | ".join(typing.get_args(hint))
    plain = plain_type(hint)
    name = "text" if plain is str else "true | false" if plain is bool else plain.__name__
    for bound in bounds_of(hint):
        if isinstance(bound, Number):
            also = "".join(f", or {value:g}" for value in bound.also)
            return f"{name}, {bound}{also}"
        if isinstance(bound, NameOrPath):
            return f"{' | '.join(bound.names)} | module.function"
        if isinstance(bound, PlaceText):
            return "path or gs:// address" if bound.bucket else "path on a disk"
    return name


@functools.cache
def _comments() -> dict[str, dict[str, str]]:
    """Class -> field -> the comment that stands on its line, or on the first line of its value."""
    source = inspect.getsource(schema)
    said = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    return {
        node.name: {
            field.target.id: said.get(field.lineno) or said.get(field.end_lineno or 0, "")
            for field in node.body
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        }
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef)
    }
