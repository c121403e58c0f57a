"""Clips' frames for a report, or why there are none."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from mer_r1_jax.config.schema import MediaConfig
from mer_r1_jax.data.paths import MediaPathError, resolve_media
from mer_r1_jax.evaluation.figures import frame_strip
from mer_r1_jax.media.entry import VIDEO
from mer_r1_jax.media.errors import MediaError
from mer_r1_jax.media.pool import WorkerPool

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
        return [_strip(video, root, pool) for video in videos]
    finally:
        pool.close()


def _strip(video: str | None, root: str | os.PathLike, pool: WorkerPool) -> ClipStrip:
    if not video:
        return ClipStrip(None, None, "the clip has no video")
    job = {"root": str(root), "kind": VIDEO, "factor": 2, "n_mels": 1, "media": dataclasses.asdict(MEDIA)}
    try:
        if not resolve_media(root, str(video)).is_file():
            return ClipStrip(None, None, f"{video} is not in the media folder")
        entry = pool.decode(job | {"path": os.path.join(root, str(video))})
    except MediaPathError as error:
        return ClipStrip(None, None, str(error))
    except (MediaError, OSError) as error:
        said = f"{error.found}; expected {error.expected}" if isinstance(error, MediaError) else error.strerror
        return ClipStrip(None, None, f"{Path(str(video)).name} cannot be shown: {said}")
    return ClipStrip(frame_strip(entry.arrays["frames"]), entry.facts["duration"], None)
