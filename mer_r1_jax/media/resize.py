"""Bicubic antialiased resizing of uint8 pictures, bit for bit as PyTorch's uint8 CPU kernel.

That is the kernel torchvision v2 and through it transformers' video processors call. Two passes, width first. Each
output pixel is a weighted sum of a run of input pixels with int16 fixed-point weights; the sum is rounded, shifted back
and clipped to uint8 between the passes and at the end.
"""

from __future__ import annotations

import functools

import numpy as np
import scipy.sparse

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
    if (h, w) == (height, width):
        return pictures
    resized = [_resize_one(picture, height, width) for picture in pictures.reshape(-1, h, w, channels)]
    return np.stack(resized).reshape(*lead, height, width, channels)


def _resize_one(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    h, w, channels = picture.shape
    if w != width:
        columns = _resize_rows(picture.transpose(1, 0, 2).reshape(w, h * channels), width)
        picture = columns.reshape(width, h, channels).transpose(1, 0, 2)
    if h != height:
        picture = _resize_rows(picture.reshape(h, width * channels), height).reshape(height, width, channels)
    return picture


def _resize_rows(rows: np.ndarray, size: int) -> np.ndarray:
    """Resizes the first axis of uint8[rows, values] to `size`."""
    weights, shift = _weights(rows.shape[0], size)
    total = weights @ rows.astype(np.int32)
    total += 1 << (shift - 1)
    total >>= shift
    return np.clip(total, 0, 255, out=total).astype(np.uint8)


@functools.lru_cache(maxsize=256)
def _weights(size_in: int, size_out: int) -> tuple[scipy.sparse.csr_matrix, int]:
    """Fixed-point filter of one axis.

    Returns:
        weights: int32[size_out, size_in], a short run of inputs for every output.
        shift: bits the weights are scaled by: the most at which the largest still fits int16.
    """
    scale = size_in / size_out
    stretch = max(scale, 1.0)  # shrinking widens the filter: that is the antialiasing
    support = CUBIC_SUPPORT * stretch
    centre = scale * (np.arange(size_out) + 0.5)
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    length = np.minimum((centre + support + 0.5).astype(np.int64), size_in) - first
    tap = np.arange(length.max())
    inside = tap < length[:, None]
    real = np.where(inside, _cubic((tap + first[:, None] - centre[:, None] + 0.5) / stretch), 0.0)
    real /= np.cumsum(real, axis=-1)[:, -1:]  # summed from left to right: a pairwise sum can differ in the last bit
    shift = 0
    while shift < MAX_SHIFT and int(0.5 + real.max() * (1 << (shift + 1))) < 1 << 15:
        shift += 1
    fixed = np.trunc(real * (1 << shift) + np.where(real < 0, -0.5, 0.5)).astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(length)])
    columns = (first[:, None] + tap)[inside]
    return scipy.sparse.csr_matrix((fixed[inside], columns, starts), shape=(size_out, size_in)), shift


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel."""
    x = np.abs(x)
    near = ((CUBIC_A + 2.0) * x - (CUBIC_A + 3.0)) * x * x + 1
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * CUBIC_A
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
