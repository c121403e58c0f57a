"""The resize, bit for bit against PyTorch's kernel, and against a slow one written out from its description."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from mer_r1_jax.media.resize import resize


def pictures(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def smooth(height: int, width: int) -> np.ndarray:
    """A picture without noise, as a clip's are."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 17 + shift) * np.cos(y / 23 - shift) for shift in (0.0, 1.0, 2.0)]
    return np.uint8(127.5 + 120 * np.stack(waves, axis=-1))


def torch_resize(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    tensor = torch.from_numpy(picture).movedim(-1, 1)
    new = torch.nn.functional.interpolate(tensor, (height, width), mode="bicubic", antialias=True, align_corners=False)
    return new.movedim(1, -1).numpy()


def slow_row(row: list[int], size: int) -> list[int]:
    """One row of one channel, pixel by pixel."""
    scale = len(row) / size
    stretch = max(scale, 1.0)
    runs = []
    for i in range(size):
        centre = scale * (i + 0.5)
        first = max(int(centre - 2 * stretch + 0.5), 0)
        last = min(int(centre + 2 * stretch + 0.5), len(row))
        weights = []
        for j in range(first, last):
            x = abs((j - centre + 0.5) / stretch)
            if x < 1:
                weights.append(1.5 * x**3 - 2.5 * x**2 + 1)
            elif x < 2:
                weights.append(-0.5 * x**3 + 2.5 * x**2 - 4 * x + 2)
            else:
                weights.append(0.0)
        total = sum(weights)
        runs.append((first, [weight / total for weight in weights]))
    largest = max(weight for _, weights in runs for weight in weights)
    shift = 0
    while shift < 22 and int(0.5 + largest * 2 ** (shift + 1)) < 2**15:
        shift += 1
    out = []
    for first, weights in runs:
        fixed = [math.floor(w * 2**shift + 0.5) if w >= 0 else -math.floor(-w * 2**shift + 0.5) for w in weights]
        value = 2 ** (shift - 1) + sum(weight * row[first + k] for k, weight in enumerate(fixed))
        out.append(min(255, max(0, value >> shift)))
    return out


def test_resize_equals_torch_bit_for_bit_at_random_sizes():
    generator = np.random.default_rng(1)
    for number in range(120):
        h, w, height, width = (int(side) for side in generator.integers(2, 300, 4))
        picture = pictures(2, h, w, 3, seed=number)
        np.testing.assert_array_equal(
            resize(picture, height, width), torch_resize(picture, height, width), err_msg=f"{h}x{w} to {height}x{width}"
        )


@pytest.mark.parametrize(
    ("size", "new"),
    [
        ((96, 128), (280, 392)),
        ((720, 1280), (420, 756)),
        ((84, 84), (84, 112)),
        ((84, 84), (56, 84)),
        ((1, 5), (28, 28)),
    ],
)
def test_resize_equals_torch_at_sizes_that_occur(size, new):
    picture = pictures(1, *size, 3)
    np.testing.assert_array_equal(resize(picture, *new), torch_resize(picture, *new))


def test_resize_equals_the_slow_description():
    picture = pictures(13, 17, 3)
    wide = np.stack(
        [[slow_row(row[:, channel].tolist(), 9) for row in picture] for channel in range(3)], axis=-1
    ).astype(np.uint8)
    tall = np.stack(
        [[slow_row(wide[:, column, channel].tolist(), 29) for column in range(9)] for channel in range(3)], axis=-1
    )
    np.testing.assert_array_equal(resize(picture, 29, 9), tall.transpose(1, 0, 2))


def test_resize_stays_close_to_pillow_width_first():
    picture = smooth(270, 480)
    ours = resize(picture, 168, 280).astype(int)
    pillow = Image.fromarray(picture).resize((280, 270), Image.BICUBIC).resize((280, 168), Image.BICUBIC)
    difference = np.abs(ours - np.asarray(pillow))
    # Pillow's weights have more bits: where a sum lies close to a half, the two round apart.
    assert difference.max() <= 2
    assert (difference > 0).mean() < 0.03


def test_the_same_size_changes_nothing():
    picture = pictures(2, 56, 84, 3)
    np.testing.assert_array_equal(resize(picture, 56, 84), picture)


def test_white_and_black_stay_white_and_black():
    for value in (0, 255):
        assert (resize(np.full((50, 70, 3), value, np.uint8), 28, 84) == value).all()


def test_pictures_of_another_type_are_refused():
    with pytest.raises(ValueError, match=r"got float32\[4, 4, 3\], expected uint8"):
        resize(np.zeros((4, 4, 3), np.float32), 2, 2)
