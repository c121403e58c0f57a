"""The frames a judge is shown: one a second from the clip's start, as JPEGs."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

from PIL import Image

from mer_r1_jax.config.schema import MediaConfig
from mer_r1_jax.media.entry import STILLS
from mer_r1_jax.media.pool import WorkerPool

QUALITY = 85  # of the JPEGs


class Pictures:
    """Takes frames from clips, in worker processes with a time limit. Safe to use from several threads.

    Args:
        max_frames: at most.
        side: pixels of the longer side at most.
        workers: processes.
    """

    def __init__(self, max_frames: int, side: int, workers: int = 2):
        self._media = MediaConfig(fps=1.0, max_frames=max_frames, max_clip_seconds=3600.0)
        self._side = side
        self._pool = WorkerPool(workers, self._media.decode_timeout)

    def of(self, path: str | Path, root: str | Path = "") -> list[bytes]:
        """The frames of a clip; `root` is the media root, which links may not lead out of.

        Raises:
            MediaError: for a clip that cannot be used.
        """
        media = dataclasses.asdict(self._media)
        job = {"path": str(path), "root": str(root), "kind": STILLS, "factor": 1, "n_mels": 1, "media": media}
        entry = self._pool.decode(job)
        return [self._jpeg(frame) for frame in entry.arrays["frames"]]

    def close(self) -> None:
        """Ends the processes."""
        self._pool.close()

    def _jpeg(self, frame) -> bytes:
        picture = Image.fromarray(frame)
        picture.thumbnail((self._side, self._side))
        data = io.BytesIO()
        picture.save(data, "JPEG", quality=QUALITY)
        return data.getvalue()
