"""Which frames, how many, how large: against torch, transformers and figures worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as transformers_smart_resize

from mer_r1_jax.config.schema import MediaConfig
from mer_r1_jax.media.frames import frame_count, frame_indices, image_size, most_cells, smart_resize, video_size

CELL = 28 * 28


@pytest.mark.parametrize(
    ("total", "rate", "settings", "expected"),
    [
        (32, 16.0, {}, 4),
        (300, 30.0, {}, 20),
        (315, 30.0, {}, 20),  # 21, floored to even
        (20, 25.0, {}, 4),  # 1.6, raised to the least
        (3, 25.0, {}, 2),  # fewer frames than the least
        (5, 25.0, {}, 4),
        (100_000, 25.0, {}, 768),
        (300, 30.0, {"max_frames": 9}, 8),
        (300, 30.0, {"min_frames": 31}, 32),
        (300, 30.0, {"fps": 100.0}, 300),
        (300, 29.97, {"fps": 1.0}, 10),
    ],
)
def test_frame_count_follows_the_rules(total, rate, settings, expected):
    assert frame_count(total, rate, MediaConfig(**settings)) == expected


@pytest.mark.parametrize("total", [0, 1])
def test_a_single_frame_is_no_video(total):
    with pytest.raises(ValueError, match=f"got a video of {total} frame"):
        frame_count(total, 25.0, MediaConfig())


def test_indices_are_torch_linspace_in_float32():
    for total in [*range(2, 400), 1000, 2997, 9001, 18_000]:
        for count in range(2, min(total, 768) + 1, 2 if total < 100 else 38):
            expected = torch.linspace(0, total - 1, count).round().long().numpy()
            np.testing.assert_array_equal(frame_indices(total, count), expected, err_msg=f"{total=} {count=}")


def test_smart_resize_is_transformers():
    generator = np.random.default_rng(0)
    for _ in range(3000):
        height, width = (int(side) for side in np.exp(generator.uniform(np.log(14), np.log(3000), 2)))
        if max(height, width) > 200 * min(height, width):
            continue
        least = int(generator.integers(1, 200)) * CELL
        limits = dict(factor=28, min_pixels=least, max_pixels=least * int(generator.integers(1, 20)))
        if min(height, width) > 14:  # transformers rounds smaller sides to zero
            assert smart_resize(height, width, **limits) == transformers_smart_resize(height, width, **limits)


def test_smart_resize_never_rounds_a_side_to_nothing():
    assert smart_resize(10, 500, 28, CELL, 400 * CELL) == (28, 504)


def test_extreme_shapes_are_refused():
    with pytest.raises(ValueError, match="got a picture of 3000x10 pixels, expected sides at most 200"):
        smart_resize(10, 3000, 28, CELL, 100 * CELL)


def test_default_video_size_is_that_of_qwen_omni_utils():
    media = MediaConfig()
    assert media.video_total_pixels == int(0.9 * 128_000 * CELL)
    # A small clip is enlarged to at least 128 cells, a large one reduced to at most 768.
    assert video_size(96, 128, 4, 28, media) == (280, 392)
    height, width = video_size(1080, 1920, 4, 28, media)
    assert (height, width) == transformers_smart_resize(1080, 1920, 28, 128 * CELL, 768 * CELL)
    # 600 frames share the total: 90 316 800 / 600 * 2 = 301 056 pixels each.
    assert video_size(1080, 1920, 600, 28, media) == transformers_smart_resize(1080, 1920, 28, 128 * CELL, 301_056)


def test_the_share_of_a_long_video_stops_at_the_least_size():
    media = MediaConfig(video_total_pixels=768 * CELL)
    height, width = video_size(1080, 1920, 768, 28, media)
    assert (height, width) == transformers_smart_resize(1080, 1920, 28, 128 * CELL, int(128 * CELL * 1.05))


def test_the_configured_maximum_wins_over_the_least_share():
    media = MediaConfig(video_min_pixels=84 * 84, video_max_pixels=84 * 84)
    assert video_size(84, 84, 4, 28, media) == (84, 84)
    assert video_size(480, 480, 4, 28, media) == (84, 84)


def test_image_size_uses_the_image_limits():
    media = MediaConfig(image_max_pixels=100 * CELL)
    assert image_size(1000, 1000, 28, media) == (280, 280)
    assert image_size(20, 20, 28, media) == (56, 56)


@pytest.mark.parametrize(
    ("least", "most", "ratio", "expected"),
    [(1, 9, 2, 9), (1, 9, 9, 9), (9, 9, 1, 16), (9, 9, 2, 16), (9, 9, 200, 43), (4, 4, 4, 10)],
)
def test_most_cells_is_what_some_picture_gets_and_none_passes(least, most, ratio, expected):
    largest = 0
    for short in range(1, int(math.sqrt(2 * most) * 28) + 1):
        for long in range(short, min(ratio * short, 3 * most * 784 // short) + 1):
            height, width = smart_resize(short, long, 28, least * 784, most * 784)
            largest = max(largest, height * width // 784)
    assert largest == expected == most_cells(least * 784, most * 784, 28, ratio)


def test_most_cells_of_the_configurations_that_ship():
    assert most_cells(64 * CELL, 128 * CELL, 28, 16) == 128 < most_cells(64 * CELL, 128 * CELL, 28, 200) == 160
    assert most_cells(128 * CELL, 768 * CELL, 28, 200) == 768
    assert most_cells(128 * CELL, 256 * CELL, 28, 200) == 258  # 19 x 2432 pixels become 2 x 129 cells
    assert smart_resize(19, 2432, 28, 128 * CELL, 256 * CELL) == (2 * 28, 129 * 28)
