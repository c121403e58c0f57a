"""Prompts of different sizes become one batch of a shape that was planned before the run (see `training.prompts`).

Every array of a batch is as large as its bucket says, so a run compiles one program per bucket. Shape letters as in
`omni.batch`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from mer_r1_jax.media.prompt import Prompt, PromptError
from mer_r1_jax.omni.batch import (
    MEL_FRAMES_PER_UNIT,
    PROMPT,
    AudioClips,
    Batch,
    BatchShape,
    Tokens,
    VisionClips,
)
from mer_r1_jax.omni.config import ThinkerConfig
from mer_r1_jax.omni.grids import patch_layout

PATCHES_PER_ROW = 4  # patches of a merge block, which becomes one feature row


def prompt_shape(prompt: Prompt) -> BatchShape:
    """Returns the smallest bucket, of one row, that holds a prompt."""
    grids = [clip.grid for clip in prompt.vision]
    return BatchShape(
        rows=1,
        tokens=len(prompt.ids),
        vision_clips=len(grids),
        frame_pairs=max((t for t, _, _ in grids), default=0),
        patches=max((h * w for _, h, w in grids), default=0),
        audio_clips=len(prompt.audio),
        audio_units=max((-(-len(clip.mel) // MEL_FRAMES_PER_UNIT) for clip in prompt.audio), default=0),
    )


def largest_of(shapes: Sequence[BatchShape]) -> BatchShape:
    """Returns the smallest bucket that holds each of these shapes."""
    names = [field.name for field in dataclasses.fields(BatchShape)]
    return BatchShape(**{name: max(getattr(shape, name) for shape in shapes) for name in names})


def fits(shape: BatchShape, bucket: BatchShape) -> bool:
    """Whether everything of `shape` but its rows fits into `bucket`."""
    return all(
        getattr(shape, field.name) <= getattr(bucket, field.name)
        for field in dataclasses.fields(BatchShape)
        if field.name != "rows"
    )


def bucket_for(prompts: Sequence[Prompt | None], buckets: Sequence[BatchShape]) -> BatchShape:
    """Returns the first, that is the smallest, bucket that holds all prompts.

    Raises:
        PromptError: naming the prompt that fits none, and what is too large about it.
    """
    shapes = {prompt.id: prompt_shape(prompt) for prompt in prompts if prompt is not None}
    for bucket in buckets:
        if len(prompts) <= bucket.rows and all(fits(shape, bucket) for shape in shapes.values()):
            return bucket
    for name, shape in shapes.items():
        if not any(fits(shape, bucket) for bucket in buckets):
            raise PromptError(
                f"{name}: got {_sizes(shape)}, expected at most {_sizes(buckets[-1])}, the largest bucket of this run; "
                "plan the buckets with this prompt, or lower the media settings"
            )
    raise PromptError(
        f"got {len(prompts)} prompts that fit no single bucket of {buckets[-1].rows} rows; batch fewer at once, "
        "or plan buckets that hold the largest sizes together"
    )


def collate(prompts: Sequence[Prompt | None], shape: BatchShape, thinker: ThinkerConfig) -> Batch:
    """Pads prompts to a bucket.

    Args:
        prompts: at most `shape.rows`; None stands for a row whose clip is broken and which is all padding.
        shape: the bucket, which must hold every prompt.
        thinker: sizes of a patch and of a mel frame, and the padding id.

    Returns:
        the batch with numpy leaves; rows are padded on the right, rows beyond the prompts are all padding.

    Raises:
        PromptError: if a prompt is larger than the bucket.
    """
    if len(prompts) > shape.rows:
        raise PromptError(f"got {len(prompts)} prompts for a bucket of {shape.rows} rows")
    rows = [(number, prompt) for number, prompt in enumerate(prompts) if prompt is not None]
    for _, prompt in rows:
        if not fits(prompt_shape(prompt), shape):
            raise PromptError(f"{prompt.id}: got {_sizes(prompt_shape(prompt))} for a bucket of {_sizes(shape)}")
    return Batch(
        tokens=_tokens(rows, shape, thinker),
        vision=_vision(rows, shape, thinker) if shape.vision_clips else None,
        audio=_audio(rows, shape, thinker) if shape.audio_clips else None,
    )


def _sizes(shape: BatchShape) -> str:
    return ", ".join(
        f"{field.name}={getattr(shape, field.name)}" for field in dataclasses.fields(shape) if field.name != "rows"
    )


def _tokens(rows, shape: BatchShape, thinker: ThinkerConfig) -> Tokens:
    B, T = shape.rows, shape.tokens
    id_BT = np.full((B, T), thinker.pad_token_id, np.int32)
    segment_BT = np.zeros((B, T), np.int32)
    position_3BT = np.ones((3, B, T), np.int32)  # transformers gives padding position 1
    source_BT2 = np.zeros((B, T, 2), np.int32)
    source_BT2[..., 0] = -1
    for row, prompt in rows:
        length = len(prompt.ids)
        id_BT[row, :length] = prompt.ids
        segment_BT[row, :length] = PROMPT
        position_3BT[:, row, :length] = prompt.position
        source_BT2[row, :length] = _padded_source(prompt, shape)
    return Tokens(id_BT=id_BT, segment_BT=segment_BT, position_3BT=position_3BT, source_BT2=source_BT2)


def _padded_source(prompt: Prompt, shape: BatchShape) -> np.ndarray:
    """Renumbers int32[T, 2] sources: clips and feature rows as they lie in the padded batch."""
    clip, row = prompt.source[:, 0], prompt.source[:, 1]
    source = prompt.source.copy()
    for number, vision in enumerate(prompt.vision):
        own = clip == number
        cells = vision.grid[1] * vision.grid[2] // PATCHES_PER_ROW
        source[own, 1] = row[own] // cells * (shape.patches // PATCHES_PER_ROW) + row[own] % cells
    source[clip >= len(prompt.vision), 0] += shape.vision_clips - len(prompt.vision)
    return source


def _vision(rows, shape: BatchShape, thinker: ThinkerConfig) -> VisionClips:
    B, V, P, S = shape.rows, shape.vision_clips, shape.frame_pairs, shape.patches
    sizes = thinker.vision
    patches_BVPSX = np.zeros((B, V, P, S, sizes.patch_values), np.float32)
    position_BVS2 = np.zeros((B, V, S, 2), np.int32)
    window_BVS = np.full((B, V, S), -1, np.int32)
    pairs_BV = np.zeros((B, V), np.int32)
    for row, prompt in rows:
        for number, clip in enumerate(prompt.vision):
            pairs, grid_h, grid_w = clip.grid
            patches = grid_h * grid_w
            patches_BVPSX[row, number, :pairs, :patches] = clip.patches
            position_S2, window_S = patch_layout(grid_h, grid_w, sizes)
            position_BVS2[row, number, :patches], window_BVS[row, number, :patches] = position_S2, window_S
            pairs_BV[row, number] = pairs
    return VisionClips(
        patches_BVPSX=patches_BVPSX, position_BVS2=position_BVS2, window_BVS=window_BVS, pairs_BV=pairs_BV
    )


def _audio(rows, shape: BatchShape, thinker: ThinkerConfig) -> AudioClips:
    B, A, U, M = shape.rows, shape.audio_clips, shape.audio_units, thinker.audio.num_mel_bins
    mel_BAFM = np.zeros((B, A, U * MEL_FRAMES_PER_UNIT, M), np.float32)
    frames_BA = np.zeros((B, A), np.int32)
    for row, prompt in rows:
        for number, clip in enumerate(prompt.audio):
            mel_BAFM[row, number, : len(clip.mel)] = clip.mel
            frames_BA[row, number] = len(clip.mel)
    return AudioClips(mel_BAUFM=mel_BAFM.reshape(B, A, U, MEL_FRAMES_PER_UNIT, M), frames_BA=frames_BA)
