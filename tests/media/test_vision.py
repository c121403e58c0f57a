"""The layout of patches: grids, windows and positions as transformers' vision tower computes them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from mer_r1_jax.media.clips import cut_patches, laid_out
from mer_r1_jax.omni.config import VisionConfig
from mer_r1_jax.omni.grids import patch_layout

VISION = VisionConfig()
GRIDS = [(2, 2), (6, 6), (8, 8), (6, 10), (10, 18), (16, 16), (20, 28), (34, 2)]


@pytest.mark.parametrize("grid", GRIDS)
def test_positions_are_those_of_transformers(grid):
    position_S2, _ = patch_layout(*grid, VISION)
    expected = get_vision_position_ids(torch.tensor([[1, *grid]]), VISION.spatial_merge_size)
    np.testing.assert_array_equal(position_S2, expected.numpy())


@pytest.mark.parametrize("grid", GRIDS)
def test_windows_are_those_of_transformers(grid):
    _, window_S = patch_layout(*grid, VISION)
    cells, limits = get_vision_window_index(
        torch.tensor([[1, *grid]]),
        spatial_merge_size=VISION.spatial_merge_size,
        window_size=VISION.window_size,
        patch_size=VISION.patch_size,
    )
    # Cells in window order, cut at the cumulative patch counts: each piece must be one of our windows.
    limits = np.unique(limits.numpy()) // 4
    window_of_cell = window_S.reshape(-1, 4)
    assert (window_of_cell == window_of_cell[:, :1]).all(), "a merge block lies in one window"
    pieces = [cells.numpy()[start:stop] for start, stop in zip(limits[:-1], limits[1:], strict=True)]
    ours = [set(window_of_cell[piece, 0].tolist()) for piece in pieces]
    assert all(len(window) == 1 for window in ours)
    assert sorted(next(iter(window)) for window in ours) == list(range(len(pieces)))


def test_a_patch_is_flattened_as_channel_time_row_column():
    """Every value is traced back to its pixel, in loops."""
    frames = np.random.default_rng(0).integers(0, 256, (4, 28, 56, 3), dtype=np.uint8)
    patches = cut_patches(frames, VISION)
    assert patches.shape == (2, 8, 1176) and patches.dtype == np.float32
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    position_S2, _ = patch_layout(2, 4, VISION)
    generator = np.random.default_rng(1)
    for pair, s, x in zip(*(generator.integers(0, size, 300) for size in patches.shape), strict=True):
        channel, time, y, column = np.unravel_index(x, (3, 2, 14, 14))
        row_patch, column_patch = position_S2[s]
        pixel = frames[2 * pair + time, 14 * row_patch + y, 14 * column_patch + column, channel]
        expected = (pixel / 255 - mean[channel]) / deviation[channel]
        assert abs(patches[pair, s, x] - expected) < 1e-6


def test_an_image_stands_for_two_frames():
    frame = np.random.default_rng(0).integers(0, 256, (1, 56, 56, 3), dtype=np.uint8)
    image = laid_out(frame, 0.0, VISION)
    assert image.grid == (1, 4, 4) and image.second_per_grid == 0 and image.rows == 4
    np.testing.assert_array_equal(image.patches, cut_patches(np.repeat(frame, 2, axis=0), VISION))


def test_seconds_per_grid_are_float32_of_what_was_sampled():
    video = laid_out(np.zeros((6, 28, 28, 3), np.uint8), 3.0, VISION)
    assert video.grid == (3, 2, 2)
    assert video.second_per_grid.dtype == np.float32 and video.second_per_grid == np.float32(2 / 3)


def test_frames_that_were_not_resized_are_refused():
    with pytest.raises(ValueError, match="got frames of 30x28 pixels, expected multiples of 28"):
        laid_out(np.zeros((2, 28, 30, 3), np.uint8), 2.0, VISION)


def test_the_layout_of_a_grid_cannot_be_changed_by_accident():
    position_S2, window_S = patch_layout(6, 6, VISION)
    with pytest.raises(ValueError):
        position_S2[0] = 1
    with pytest.raises(ValueError):
        window_S[0] = 1
