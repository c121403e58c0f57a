"""Whether a clip is still the one a run has seen: its size and a hash of its first and last MiB, by its name.

Names are those of the records, never where a folder happens to lie, so that data may be moved. What a run has seen is
kept in its folder (`clips.json`) and held against every clip that is decoded again, in this start and in later ones.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from mer_r1_jax.media.opening import MediaError, media_file

END_BYTES = 1 << 20  # hashed of each end of a file: enough to tell files apart, little beside what decoding reads


class ClipChangedError(RuntimeError):
    """A clip holds other bytes than when this run saw it first."""


def of_ends(path: str | os.PathLike) -> str:
    """`<size>-<hash>` of a file, the hash over its first and last MiB.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        return _of_open(file)


def _of_open(file: BinaryIO) -> str:
    size = os.fstat(file.fileno()).st_size
    digest = hashlib.sha256(file.read(END_BYTES))
    if size > END_BYTES:
        file.seek(max(END_BYTES, size - END_BYTES))
        digest.update(file.read(END_BYTES))
    return f"{size}-{digest.hexdigest()[:32]}"


class ClipFingerprints:
    """What the clips of a run were when it saw them. Safe to use from several threads.

    Args:
        label: says of a record's file what its clips' names are relative to, so that equal names in two data sets
            with folders of their own are two clips; "" where they are one.
    """

    def __init__(self, label: Callable[[str], str] = lambda file: ""):
        self._label = label
        self._known: dict[str, str] = {}
        self._new: dict[str, str] = {}
        self._read: dict[str, tuple[tuple[int, ...], str]] = {}  # path -> its state when it was read, and the result
        self._lock = threading.Lock()

    def restore(self, known: Mapping[str, str]) -> None:
        """Takes what an earlier start, or another process, has seen."""
        with self._lock:
            self._known |= known

    def take_new(self) -> dict[str, str]:
        """What was seen since the last call and is not kept anywhere yet."""
        with self._lock:
            new, self._new = self._new, {}
        return new

    def check(self, record: Any, root: Path) -> dict[str, str]:
        """The fingerprints of a record's clips, by the names that `add` keeps them under.

        Args:
            record: a `data.records.Record`.
            root: folder its paths are relative to.

        Raises:
            ClipChangedError: one is not what this run saw under its name.
        """
        found = {}
        for name in dict.fromkeys((*record.videos, *record.audios, *record.images)):
            key = f"{self._label(record.file)}{name}"
            now = self._of(root / name, root)
            if now is None:  # the loader says what is wrong with it
                continue
            known = self._known.get(key, now)
            if known != now:
                raise ClipChangedError(
                    f"{record.where}: {record.id}: {name} is not the clip that this run saw under that name before: "
                    f"got {in_words(now)}, expected {in_words(known)}. Put the earlier file back to go on with the "
                    "run, or choose another train.run_name for a new one."
                )
            found[key] = now
        return found

    def add(self, found: Mapping[str, str]) -> None:
        """Keeps fingerprints of clips that were decoded."""
        with self._lock:
            self._new |= {name: value for name, value in found.items() if name not in self._known}
            self._known |= found

    def _of(self, path: Path, root: Path) -> str | None:
        """A file's fingerprint, read again only where its size, times or identity changed; None where it cannot be
        used as a clip, as one that a link leads to out of the media root."""
        try:
            with media_file(path, root) as file:
                status = file.status()
                # A file's own time can be set back; when its status changed cannot.
                state = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
                read = self._read.get(str(path))
                if read is None or read[0] != state:
                    read = self._read[str(path)] = state, _of_open(file.rewound())
                return read[1]
        except (MediaError, OSError, ValueError):
            return None


def in_words(fingerprint: str) -> str:
    """A fingerprint as messages name it."""
    size, _, digest = fingerprint.partition("-")
    return f"{size} bytes with hash {digest[:12]}"
