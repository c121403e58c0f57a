"""Bicubic antialiased resizing of uint8 pictures, bit for bit as PyTorch's uint8 CPU kernel (which torchvision v2 calls).

Two passes, width first. Each output pixel is a weighted sum of a run of input pixels with int16 fixed-point weights; the
sum is rounded, shifted back and clipped to uint8 between the passes and at the end.
"""

from __future__ import annotations

import functools

import numpy as np

CUBIC_A = -0.5  # Keys' cubic, as Pillow and PyTorch's antialiased kernels use
CUBIC_SUPPORT = 2.0
MAX_SHIFT = 22  # PyTorch tries no larger one


def resize(pictures: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes pictures.

    Args:
        pictures: uint8[..., h, w, channels].
        height: wanted height in pixels.
        width: wanted width in pixels.

    Returns:
        uint8[..., height, width, channels].
    """
    if pictures.dtype != np.uint8 or pictures.ndim < 3:
        raise ValueError(f"got {pictures.dtype}{list(pictures.shape)}, expected uint8[..., height, width, channels]")
    *lead, h, w, channels = pictures.shape
    if w != width:
        pictures = _resize_axis(pictures.reshape(-1, w, channels), width).reshape(*lead, h, width, channels)
    if h != height:
        pictures = _resize_axis(pictures.reshape(-1, h, width * channels), height)
    return pictures.reshape(*lead, height, width, channels)


def _resize_axis(rows_ROI: np.ndarray, size: int) -> np.ndarray:
    """Resizes the middle axis of uint8[rows, outer, inner] to `size`."""
    first, weights, shift = _weights(rows_ROI.shape[1], size)
    total = np.full((rows_ROI.shape[0], size, rows_ROI.shape[2]), 1 << (shift - 1), np.int32)
    product = np.empty_like(total)
    for tap in range(weights.shape[1]):
        # Runs shorter than the longest one have zero weights at their end, where clipping the index does no harm.
        taken = rows_ROI[:, np.minimum(first + tap, rows_ROI.shape[1] - 1)]
        np.multiply(taken, weights[:, tap, None], out=product)
        total += product
    total >>= shift
    return np.clip(total, 0, 255, out=total).astype(np.uint8)


@functools.lru_cache(maxsize=256)
def _weights(size_in: int, size_out: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Fixed-point filter runs of one axis.

    Returns:
        first: int64[size_out], the input index each run starts at.
        weights: int32[size_out, taps], zero beyond a run's end.
        shift: bits the weights are scaled by: the most at which the largest still fits int16.
    """
    scale = size_in / size_out
    stretch = max(scale, 1.0)  # shrinking widens the filter: that is the antialiasing
    support = CUBIC_SUPPORT * stretch
    centre = scale * (np.arange(size_out) + 0.5)
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    length = np.minimum((centre + support + 0.5).astype(np.int64), size_in) - first
    tap = np.arange(length.max())
    real = _cubic((tap + first[:, None] - centre[:, None] + 0.5) / stretch)
    real = np.where(tap < length[:, None], real, 0.0)
    real /= _ordered_sum(real)[:, None]
    shift = 0
    while shift < MAX_SHIFT and int(0.5 + real.max() * (1 << (shift + 1))) < 1 << 15:
        shift += 1
    fixed = np.trunc(real * (1 << shift) + np.where(real < 0, -0.5, 0.5)).astype(np.int32)
    return first, fixed, shift


def _ordered_sum(values: np.ndarray) -> np.ndarray:
    """Sums the last axis from left to right; numpy's pairwise sum can differ in the last bit."""
    return np.cumsum(values, axis=-1)[..., -1]


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel."""
    x = np.abs(x)
    near = ((CUBIC_A + 2.0) * x - (CUBIC_A + 3.0)) * x * x + 1
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * CUBIC_A
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
