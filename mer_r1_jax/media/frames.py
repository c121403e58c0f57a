"""Which frames of a video are looked at, and how large: the rules of qwen-omni-utils 0.0.9, host-side arithmetic."""

from __future__ import annotations

import math

import numpy as np

from mer_r1_jax.config.schema import MAX_ASPECT_RATIO, MediaConfig

FRAME_FACTOR = 2  # a video has an even number of frames: the vision tower takes them in pairs
MIN_HEADROOM = 1.05  # a frame's share of the total never falls below this times the minimum
ROUNDING = 1e-9  # more than what float64 adds to a side before it is rounded up


def frame_count(total: int, rate: float, media: MediaConfig) -> int:
    """Returns how many frames to sample, an even number.

    `total / rate * fps`, clamped to [min_frames, max_frames] (each rounded to even) and to `total`, floored to even.

    Args:
        total: frames the video has.
        rate: its frames per second.
        media: limits (fps, min_frames, max_frames).

    Raises:
        ValueError: if the video has fewer than two frames.
    """
    if total < FRAME_FACTOR:
        raise ValueError(f"got a video of {total} frame(s), expected at least {FRAME_FACTOR}")
    fewest = math.ceil(media.min_frames / FRAME_FACTOR) * FRAME_FACTOR
    most = math.floor(min(media.max_frames, total) / FRAME_FACTOR) * FRAME_FACTOR
    wanted = min(max(total / rate * media.fps, fewest), most, total)
    return math.floor(wanted / FRAME_FACTOR) * FRAME_FACTOR


def frame_indices(total: int, count: int) -> np.ndarray:
    """Returns int64[count]: evenly spread frame indices from the first to the last frame.

    torch.linspace in float32 followed by round-half-even. Its CPU kernel counts from both ends, which float32 makes
    visible: the first half is `start + step * i`, the second `end - step * (count - 1 - i)`.
    """
    if count == 1:
        return np.zeros(1, np.int64)
    last = np.float32(total - 1)
    step = last / np.float32(count - 1)
    i = np.arange(count)
    from_start = step * i.astype(np.float32)
    from_end = last - step * (count - 1 - i).astype(np.float32)
    return np.round(np.where(i < count // 2, from_start, from_end)).astype(np.int64)


def smart_resize(
    height: int,
    width: int,
    factor: int,
    min_pixels: int,
    max_pixels: float,
    max_aspect_ratio: float = MAX_ASPECT_RATIO,
) -> tuple[int, int]:
    """Returns the (height, width) to resize to: multiples of `factor`, aspect ratio kept about.

    The area is within the limits, with two exceptions: no side is less than `factor`, so that a long strip can be
    larger than `max_pixels`, and a picture enlarged to `min_pixels` is rounded up, whatever `max_pixels` is. See
    `most_cells`.

    Args:
        height: in pixels.
        width: in pixels.
        factor: patch size times merge size.
        min_pixels: smallest area.
        max_pixels: largest area.
        max_aspect_ratio: how many times one side may be as long as the other.

    Raises:
        ValueError: if one side is longer than that.
    """
    if max(height, width) > max_aspect_ratio * min(height, width):
        raise ValueError(
            f"got a picture of {width}x{height} pixels, expected sides at most {max_aspect_ratio:g} times apart"
        )
    # Python's round is half to even here and in the original alike.
    new_height = max(factor, round(height / factor) * factor)
    new_width = max(factor, round(width / factor) * factor)
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def most_cells(min_pixels: float, max_pixels: float, factor: int, max_aspect_ratio: float) -> int:
    """Returns the most factor x factor cells `smart_resize` gives any picture it takes.

    Args:
        min_pixels: smallest area.
        max_pixels: largest area.
        factor: patch size times merge size.
        max_aspect_ratio: how many times one side may be as long as the other.
    """
    least, most = min_pixels / factor**2, max_pixels / factor**2
    # Shrunk: both sides are rounded down, but none below one cell, and the other is sqrt(most * ratio) at most then.
    cells = max(1, math.floor(most * (1 + ROUNDING)), math.floor(math.sqrt(most * max_aspect_ratio) * (1 + ROUNDING)))
    # Enlarged: sides a <= b with a * b = least are rounded up. For each ceil(a), b is longest where a is shortest.
    if least <= 1:
        return cells  # nothing is that small once its sides are rounded
    longest = math.sqrt(least * max_aspect_ratio)
    for short in range(1, math.ceil(math.sqrt(least) * (1 + ROUNDING)) + 1):
        long = min(longest, least / (short - 1)) if short > 1 else longest
        cells = max(cells, short * math.ceil(long * (1 + ROUNDING)))
    return cells


def video_size(height: int, width: int, frames: int, factor: int, media: MediaConfig) -> tuple[int, int]:
    """Returns the (height, width) every frame of a video of `frames` sampled frames is resized to."""
    most = video_pixels(frames, media)
    return smart_resize(height, width, factor, media.video_min_pixels, most, media.max_aspect_ratio)


def video_pixels(frames: int, media: MediaConfig) -> float:
    """Returns the most pixels a frame may have in a video of `frames` sampled frames."""
    share = media.video_total_pixels / frames * FRAME_FACTOR
    return min(media.video_max_pixels, max(share, int(media.video_min_pixels * MIN_HEADROOM)))


def image_size(height: int, width: int, factor: int, media: MediaConfig) -> tuple[int, int]:
    """Returns the (height, width) an image is resized to."""
    return smart_resize(height, width, factor, media.image_min_pixels, media.image_max_pixels, media.max_aspect_ratio)
