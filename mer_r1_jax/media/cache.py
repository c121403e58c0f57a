"""Decoded clips on disk, keyed by what is in the file and by every setting that shapes the result."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import threading
from pathlib import Path

import av
import numpy as np
import PIL
import soxr

from mer_r1_jax.config.schema import MediaConfig
from mer_r1_jax.media.decoded import AUDIO, IMAGE, VIDEO, CorruptEntryError, Entry
from mer_r1_jax.media.opening import MediaError, MediaFile, media_file

CODE_VERSION = 5  # raise when decoding, resizing or the mel spectrogram changes
_FRAMES = ("fps", "min_frames", "max_frames")
_VIDEO_PIXELS = ("video_min_pixels", "video_max_pixels", "video_total_pixels", "max_aspect_ratio")
SETTINGS = {  # the settings that shape what a kind of entry holds
    VIDEO: (*_FRAMES, *_VIDEO_PIXELS, "max_clip_seconds"),
    AUDIO: ("sampling_rate", "max_audio_seconds", "max_clip_seconds"),
    IMAGE: ("image_min_pixels", "image_max_pixels", "max_aspect_ratio"),
}

log = logging.getLogger(__name__)


class ClipCache:
    """A folder of entries. Damaged ones are removed and made again; a full disk only costs the cache its use.

    Attributes:
        hits, misses, corrupt: how often an entry was found, not found, and found damaged.
    """

    def __init__(self, folder: str | Path, media: MediaConfig, factor: int, n_mels: int):
        self.folder = Path(folder)
        self.hits = self.misses = self.corrupt = 0
        self._lock = threading.Lock()
        self._suffix = {kind: _settings_hash(kind, media, factor, n_mels) for kind in SETTINGS}
        self._content: dict[str, tuple[tuple[int, ...], str]] = {}
        self._complained = False

    def key(self, path: str, kind: str, root: str | Path = "") -> Path:
        """Returns where the entry of a file as it is now belongs; `path` and `root` as in `opening.media_file`.

        Raises:
            MediaError: if the file cannot be read.
        """
        digest = self._digest(path, root)
        return self.folder / digest[:2] / f"{digest[2:]}-{kind}-{self._suffix[kind]}.clip"

    def get(self, key: Path) -> Entry | None:
        """Returns an entry, None where there is none that is whole."""
        entry = None
        try:
            entry = Entry.from_bytes(key.read_bytes())
        except FileNotFoundError:
            pass
        except (CorruptEntryError, OSError) as error:
            log.warning("%s: damaged cache entry (%s), made again", key, error)
            with contextlib.suppress(OSError):
                key.unlink(missing_ok=True)
            with self._lock:
                self.corrupt += 1
        with self._lock:
            if entry is None:
                self.misses += 1
            else:
                self.hits += 1
        return entry

    def put(self, key: Path, entry: Entry) -> None:
        """Stores an entry: written beside its place, then renamed, so that readers never see half of one."""
        partial = key.with_name(f"{key.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            key.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(entry.to_bytes())
            os.replace(partial, key)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            if not self._complained:
                log.warning("%s: decoded clips cannot be cached (%s); going on without", self.folder, error)
            self._complained = True

    def _digest(self, path: str, root: str | Path) -> str:
        """SHA-256 of a file's content, read again only when its size, time or identity changed."""
        with media_file(path, root) as file:
            status = file.status()
            # A file's own time can be set back; when its status changed cannot.
            signature = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
            known = self._content.get(path)
            if known is None or known[0] != signature:
                known = signature, _sha256(file)
                self._content[path] = known
            return known[1]


def _sha256(file: MediaFile) -> str:
    try:
        return hashlib.file_digest(file.rewound(), "sha256").hexdigest()
    except OSError as error:
        found = f"a file that cannot be read ({error.strerror})"
        raise MediaError(file, "unreadable", found, "one that can", "Look at the disk, or copy it again.") from error


def _settings_hash(kind: str, media: MediaConfig, factor: int, n_mels: int) -> str:
    settings = dataclasses.asdict(media)
    relevant = {name: settings[name] for name in SETTINGS[kind]}
    relevant |= {"code": CODE_VERSION, "av": av.__version__, "numpy": np.__version__}
    relevant |= {"n_mels": n_mels, "soxr": soxr.__version__} if kind == AUDIO else {"factor": factor}
    if kind == IMAGE:
        relevant |= {"pillow": PIL.__version__}
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:16]
