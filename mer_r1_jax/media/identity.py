"""Whether two paths are one file: `a.mp4`, `./a.mp4`, a link to it, another letter case on a disk that ignores case."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

FileKey = tuple[int, int] | str


def file_key(path: str | os.PathLike) -> FileKey:
    """Returns what all spellings of one file have in common; of one that is not there, its normalised path."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return unicodedata.normalize("NFC", os.path.realpath(path))
    if not status.st_ino:  # some mounted disks number no files
        return unicodedata.normalize("NFC", os.path.realpath(path))
    return status.st_dev, status.st_ino


def other_spelling(path: str | os.PathLike) -> str | None:
    """Returns the name of a file beside a missing one that differs in letter case or Unicode form only, if any.

    A disk that tells these apart shows names that look alike, or are alike elsewhere: macOS writes é as two characters,
    and Windows finds `Clip.MP4` as `clip.mp4`.
    """
    path = Path(path)
    try:
        names = os.listdir(path.parent)
    except (OSError, ValueError):
        return None
    wanted = _folded(path.name)
    return next((name for name in sorted(names) if name != path.name and _folded(name) == wanted), None)


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
