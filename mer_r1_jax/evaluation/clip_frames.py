"""Frames of clips for people and for judges, taken as training takes them: in a process with limits."""

from __future__ import annotations

import base64
import dataclasses
import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mer_r1_jax.config.schema import MediaConfig
from mer_r1_jax.data.paths import MediaPathError, resolve_media
from mer_r1_jax.media.decoded import STILLS, VIDEO, Entry
from mer_r1_jax.media.opening import MediaError
from mer_r1_jax.media.pool import WorkerPool

QUALITY = 85  # of a judge's JPEGs
FRAMES = 4  # spread over the clip, the first and the last among them
_PIXELS = 256 * 256  # of a frame before it is fitted into its strip
MEDIA = MediaConfig(
    fps=1e-3,  # so few that the least number of frames counts
    min_frames=FRAMES,
    max_frames=FRAMES,
    video_min_pixels=4,
    video_max_pixels=_PIXELS,
    video_total_pixels=FRAMES * _PIXELS,
    max_clip_seconds=3600.0,
    decode_timeout=120.0,
)


@dataclasses.dataclass(frozen=True)
class ClipStrip:
    """What a report shows of a clip: a data URI and its seconds, or None and None and the problem."""

    source: str | None
    seconds: float | None
    problem: str | None


def clip_strips(videos: Sequence[str | None], root: str | os.PathLike) -> list[ClipStrip]:
    """Takes frames from clips as training does: in a process with limits, and nothing from outside the media root.

    Args:
        videos: paths relative to `root`, None for a clip without a video.
        root: the media root.
    """
    pool = WorkerPool(1, MEDIA.decode_timeout)
    try:
        return [strip_of(video, root, pool) for video in videos]
    finally:
        pool.close()


def strip_of(video: str | None, root: str | os.PathLike, pool: WorkerPool) -> ClipStrip:
    """Takes frames from one clip; see `clip_strips`."""
    if not video:
        return ClipStrip(None, None, "the clip has no video")
    read = read_file(str(video), VIDEO, root, pool)
    if isinstance(read, str):
        return ClipStrip(None, None, read)
    return ClipStrip(frame_strip(read.arrays["frames"]), read.facts["duration"], None)


def read_file(name: str, kind: str, root: str | os.PathLike, pool: WorkerPool) -> Entry | str:
    """What a file of the media folder holds, or why it cannot be shown.

    Args:
        name: its path relative to `root`.
        kind: what to read from it, as `decoded.decode_file` takes it.
        root: the media root.
        pool: reads it.
    """
    job = {"root": str(root), "kind": kind, "factor": 2, "n_mels": 1, "media": dataclasses.asdict(MEDIA)}
    try:
        if not resolve_media(root, name).is_file():
            return f"{name} is not in the media folder"
        return pool.decode(job | {"path": os.path.join(root, name)})
    except MediaPathError as error:
        return str(error)
    except MediaError as error:
        return f"{Path(name).name} cannot be shown: {error.found}; expected {error.expected}"
    except OSError as error:
        return f"{Path(name).name} cannot be shown: {error.strerror}"


def frame_strip(frames: np.ndarray, height: int = 84) -> str:
    """Returns frames uint8[n, h, w, 3] side by side, `height` pixels high, as a JPEG data URI."""
    width = max(1, round(frames.shape[2] * height / frames.shape[1]))
    strip = Image.new("RGB", (len(frames) * width + 2 * (len(frames) - 1), height), "white")
    for number, frame in enumerate(frames):
        picture = Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS)
        strip.paste(picture, (number * (width + 2), 0))
    out = io.BytesIO()
    strip.save(out, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


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
