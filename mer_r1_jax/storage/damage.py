"""What makes a saved step damaged: files that cannot be read, and JSON that is not what was written there."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from mer_r1_jax.foreign_text import printable
from mer_r1_jax.storage.bucket import BucketError
from mer_r1_jax.storage.stored_arrays import CheckpointError, hash_of_json

MAX_REASON = 300  # characters of a system's message that are shown


class DamagedStepError(CheckpointError):
    """A saved step cannot be used; the message says what is wrong with it. An older one may be whole."""


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Turns an error of the system or the bucket while `what` is read into a damage of its step."""
    try:
        yield
    except (OSError, BucketError) as error:
        raise DamagedStepError(f"{what} cannot be read: {described(error)}") from error


def described(error: BaseException) -> str:
    """An exception in one line."""
    text = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__} {printable(text, MAX_REASON, one_line=True)}".rstrip()


def parsed(content: bytes, what: str, kind: str) -> dict[str, Any]:
    """A JSON object.

    Args:
        content: of the file.
        what: the file's name.
        kind: what it ought to be, with its article.

    Raises:
        DamagedStepError: it is something else.
    """
    try:
        found = json.loads(content)
    except RecursionError as error:
        raise DamagedStepError(f"{what} cannot be read as {kind}: its JSON is nested too deeply") from error
    except ValueError as error:  # of JSON, of UTF-8, and of numbers with thousands of digits
        raise DamagedStepError(f"{what} cannot be read as {kind}: {described(error)}") from error
    if not isinstance(found, dict):
        raise DamagedStepError(f"{what} cannot be read as {kind}: it holds a {type(found).__name__}, not an object")
    return found


def checked_manifest(content: bytes, what: str, step: int, fields: tuple[str, ...]) -> dict[str, Any]:
    """A manifest that matches its own hash and belongs to `step`.

    Args:
        fields: that its hash covers; "step" among them.

    Raises:
        DamagedStepError: it is harmed, or another step's.
    """
    manifest = parsed(content, what, "a manifest")
    if missing := [name for name in (*fields, "sha256") if name not in manifest]:
        raise DamagedStepError(f"{what} cannot be read as a manifest: it lacks {', '.join(missing)}")
    found = {name: manifest[name] for name in fields}
    try:
        harmed = manifest["sha256"] != hash_of_json(found)
    except (RecursionError, ValueError) as error:
        raise DamagedStepError(f"{what} cannot be read as a manifest: {described(error)}") from error
    if harmed:
        raise DamagedStepError(f"{what} does not match its own hash")
    if not is_count(found["step"]) or found["step"] != step:
        raise DamagedStepError(f"{what} belongs to step {printable(str(found['step']), 40, one_line=True)}")
    return found


def host_state(content: bytes, what: str) -> dict[str, Any]:
    """What `stored_arrays.host_content` made, read back.

    Raises:
        DamagedStepError: it has not that form.
    """
    state = parsed(content, what, "a host state")
    arrays = state.get("arrays")
    wrong = [
        name
        for name, right in (
            ("layout_version", is_count(state.get("layout_version"))),
            ("arrays", isinstance(arrays, dict) and all(map(_is_array, arrays.values()))),
            ("saved_on", isinstance(state.get("saved_on", {}), dict)),
            ("host", isinstance(state.get("host"), dict)),
        )
        if not right
    ]
    if wrong:
        raise DamagedStepError(f"{what} cannot be read as a host state: {', '.join(wrong)} missing or of another type")
    return state


def is_count(value: Any) -> bool:
    """Whether a value from JSON is a whole number of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_array(described: Any) -> bool:
    shape = described.get("shape") if isinstance(described, dict) else None
    return isinstance(shape, list) and all(map(is_count, shape)) and isinstance(described.get("dtype"), str)
