"""From decoded video frames to pictures of one size, upright and with square pixels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np

from mer_r1_jax.config.schema import MediaConfig
from mer_r1_jax.media.frames import video_size
from mer_r1_jax.media.opening import MediaError, MediaFile
from mer_r1_jax.media.resize import resize

SLACK = math.tan(math.radians(1.0))  # FFmpeg's own: a turn within a degree of a quarter turn is one

Size = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Turn:
    """One of the eight ways to show a rectangle: transposed first, then mirrored.

    Attributes:
        transposed: whether rows become columns.
        upside_down: whether the rows of the result are reversed.
        mirrored: whether the columns of the result are reversed.
    """

    transposed: bool = False
    upside_down: bool = False
    mirrored: bool = False

    def apply(self, picture: np.ndarray) -> np.ndarray:
        """Returns array[h, w, channels] as it is shown; a view."""
        shown = picture.swapaxes(0, 1) if self.transposed else picture
        return shown[:: -1 if self.upside_down else 1, :: -1 if self.mirrored else 1]

    def size(self, height: int, width: int) -> Size:
        """Returns the (height, width) that a stored (height, width) is shown at."""
        return (width, height) if self.transposed else (height, width)


def turn_of(path, frame) -> Turn:
    """Returns how a decoded frame is to be shown, from the 2x2 part of its display matrix.

    Scale is left out: FFmpeg hands it on as the shape of the pixels.

    Args:
        path: named in the error.
        frame: an `av.VideoFrame`.

    Raises:
        MediaError: for a turn that is not by quarters, a shear, and a matrix that flattens the picture.
    """
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return Turn()
    # Row vectors, y downwards: shown x = a x + c y, shown y = b x + d y.
    (a, b, _), (c, d, _), _ = np.frombuffer(bytes(data), np.int32).reshape(3, 3).astype(float).tolist()
    if a == b == c == d == 0:
        return Turn()  # written by tools that leave the header empty; players show the picture as it is stored
    if max(abs(b), abs(c)) < SLACK * min(abs(a), abs(d)):
        return Turn(upside_down=d < 0, mirrored=a < 0)
    if max(abs(a), abs(d)) < SLACK * min(abs(b), abs(c)):
        return Turn(transposed=True, upside_down=b < 0, mirrored=c < 0)
    one = float(1 << 16)
    raise MediaError(
        path,
        "odd_turn",
        f"a display matrix ({a / one:g} {b / one:g}; {c / one:g} {d / one:g}) that is no quarter turn or mirror image",
        "pictures turned by 0, 90, 180 or 270 degrees, mirrored or not",
        "Encode the clip again: that turns the pixels themselves.",
    )


def shown_size(stored: Size, pixel_ratio: float | None, turn: Turn) -> Size:
    """Returns the (height, width) of square pixels a stored picture is shown at.

    Args:
        stored: (height, width) in pixels.
        pixel_ratio: width of a pixel over its height; None or 0 where the file does not say.
        turn: applied after stretching.
    """
    height, width = stored
    return turn.size(height, max(1, round(width * (pixel_ratio or 1.0))))


MAX_SIDE = 8192  # pixels; a larger picture is a broken header or not a clip of a person


def check_size(path: str | Path | MediaFile, width: int, height: int) -> None:
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
