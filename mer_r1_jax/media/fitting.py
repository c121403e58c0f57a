"""From decoded video frames to pictures of one size, upright and with square pixels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import av
import numpy as np

from mer_r1_jax.config.schema import MediaConfig
from mer_r1_jax.media.errors import MediaError
from mer_r1_jax.media.frames import video_size
from mer_r1_jax.media.orientation import Size, shown_size, turn_of
from mer_r1_jax.media.resize import resize

MAX_SIDE = 8192  # pixels; a larger picture is a broken header or not a clip of a person


def check_size(path: str | Path, width: int, height: int) -> None:
    """Raises MediaError for pictures without pixels and for those with too many."""
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise MediaError(
            path,
            "bad_size",
            f"pictures of {width}x{height} pixels",
            f"1 to {MAX_SIDE} pixels a side",
            "Scale the clip down.",
        )


def fitter(path, stream, count: int, media: MediaConfig, factor: int | None) -> Callable[[av.VideoFrame], np.ndarray]:
    """Returns a function from a frame to the picture that is shown, of the size the first one asks for.

    `factor` None leaves it as large as it is; pixels that are not square are made so either way.
    """

    size: list[Size] = []

    def fit(frame: av.VideoFrame) -> np.ndarray:
        turn = turn_of(path, frame)
        if not size:
            height, width = shown_size((frame.height, frame.width), stream.sample_aspect_ratio, turn)
            check_size(path, width, height)
            try:
                size.append(video_size(height, width, count, factor, media) if factor else (height, width))
            except ValueError as error:
                raise MediaError(path, "bad_size", str(error), "a usual picture format", "Crop the clip.") from error
        return resize(turn.apply(frame.to_ndarray(format="rgb24")), *size[0])

    return fit
