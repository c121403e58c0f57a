"""Where the patches of an image or video sit: grid positions and attention windows.

Host-side numpy. Patches come in 2x2 merge blocks, blocks in raster order, as transformers' processor lays them out.
"""

from __future__ import annotations

import functools

import numpy as np

from mer_r1_jax.omni.config import VisionConfig


@functools.lru_cache(maxsize=64)
def patch_layout(height: int, width: int, config: VisionConfig) -> tuple[np.ndarray, np.ndarray]:
    """Grid positions and attention windows of the patches of one frame pair.

    A window is `window_cells` merged cells square; windows at the right and lower edge may be smaller.

    Args:
        height, width: patch rows and columns, multiples of the merge size.
        config: for the merge size and the window.

    Returns:
        (int32 position_S2 of rows and columns, int32 window_S counting from 0), both read-only.

    Raises:
        ValueError: a height or width that merge blocks do not cover.
    """
    merge = config.spatial_merge_size
    if height % merge or width % merge or height < 1 or width < 1:
        raise ValueError(f"a grid of {height} x {width} patches: expected positive multiples of {merge}")
    axes = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    blocks = [axis.reshape(height // merge, merge, width // merge, merge).transpose(0, 2, 1, 3) for axis in axes]
    position_S2 = np.stack([block.reshape(-1) for block in blocks], axis=-1).astype(np.int32)
    window_row, window_column = (position_S2 // (merge * config.window_cells)).T
    windows_across = -(-width // (merge * config.window_cells))
    window_S = (window_row * windows_across + window_column).astype(np.int32)
    for array in (position_S2, window_S):
        array.flags.writeable = False  # the cache hands them out again
    return position_S2, window_S
