"""A clip's frames for a report, or why there are none."""

from __future__ import annotations

from pathlib import Path

from mer_r1_jax.data.paths import MediaPathError, resolve_media
from mer_r1_jax.evaluation.figures import frame_strip


def clip_strip(video: str | None, root: Path) -> tuple[str | None, float | None, str | None]:
    """(data URI, seconds, None), or (None, None, why there is no picture).

    Args:
        video: path relative to `root`, or None.
        root: the media folder.
    """
    if not video:
        return None, None, "the clip has no video"
    try:
        path = resolve_media(root, str(video))
        if not path.is_file():
            return None, None, f"{video} is not in the media folder"
        return *frame_strip(path), None
    except (MediaPathError, ValueError) as error:
        return None, None, str(error)
