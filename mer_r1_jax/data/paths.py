"""Media paths: relative to one folder, the media root, and never outside it."""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path, PurePosixPath

from mer_r1_jax.json_lines import cut

MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 4095  # what Linux file systems take, of one name and of a whole path
# A colon alone makes no URL: `12:30.mp4`, `a:b.mp4` and `file:x` are names of files, and are opened as such.
_URL = re.compile(r"^(?:[A-Za-z][A-Za-z0-9+.-]*:)?//|^data:(?:[\w.+-]+/[\w.+-]+)?[;,]", re.IGNORECASE)
_WINDOWS_ABSOLUTE = re.compile(r"^(?:[A-Za-z]:)?[\\]|^[A-Za-z]:/(?!/)")


class MediaPathError(ValueError):
    """A media path that is malformed or leaves the media root.

    Attributes:
        got: what the path is.
        expected: what it should have been.
        mend: how to put it right.
    """

    def __init__(self, got: str, expected: str, mend: str):
        super().__init__(f"got {got}; expected {expected}; to mend it, {mend}")
        self.got, self.expected, self.mend = got, expected, mend


def resolve_media(media_root: str | os.PathLike, relative: str) -> Path:
    """The absolute path, links resolved, of a record's media path. The file itself need not exist.

    Args:
        media_root: folder the path is relative to.
        relative: path as a record gives it.

    Raises:
        MediaPathError: for an empty, absolute or home-relative path, a URL, a path with `..`, a control character or
            more bytes than a file system takes, and for one whose symbolic links lead out of the media root.
    """
    expected = f"a path relative to the media root {str(media_root)!r}"
    if not relative.strip():
        raise MediaPathError("an empty path", expected, "name the file or leave the column out")
    if any(unicodedata.category(character) == "Cc" for character in relative):
        raise MediaPathError(f"control characters in {cut(relative)}", expected, "rename the file")
    if _URL.match(relative):
        raise MediaPathError(f"the URL {cut(relative)}", expected, "download the file and give its path")
    if PurePosixPath(relative).is_absolute() or _WINDOWS_ABSOLUTE.match(relative) or relative.startswith("~"):
        raise MediaPathError(
            f"the absolute path {cut(relative)}", expected, "set media_root to the folder and shorten the path"
        )
    if ".." in re.split(r"[/\\]", relative):
        raise MediaPathError(f"'..' in {cut(relative)}", expected, "set media_root to a folder that holds all clips")
    _check_bytes(relative, expected)
    root = os.path.realpath(media_root)
    resolved = os.path.realpath(os.path.join(root, relative))
    if resolved == root or os.path.commonpath([root, resolved]) != root:
        raise MediaPathError(
            f"{cut(relative)}, which leads to {resolved!r}",
            f"a file inside the media root {root!r}",
            "copy the file into the media root; a symbolic link may not leave it",
        )
    return Path(resolved)


def _check_bytes(relative: str, expected: str) -> None:
    """Refuses what no file system can hold, before it is asked."""
    try:
        raw = os.fsencode(relative)
    except UnicodeEncodeError:
        raise MediaPathError(f"half of a surrogate pair in {cut(relative)}", expected, "correct the name") from None
    longest = max(len(name) for name in raw.split(b"/"))
    if len(raw) > MAX_PATH_BYTES or longest > MAX_NAME_BYTES:
        got = f"{cut(relative)}, a path of {len(raw)} bytes with a name of {longest}"
        limits = f"{expected}, of at most {MAX_PATH_BYTES} bytes and {MAX_NAME_BYTES} a name"
        raise MediaPathError(got, limits, "check that the column holds file names and nothing else")
