"""The border to transformers' processor: its packed tensors become our padded batch, and features become packed again.

Only here do rows of several clips lie behind one another in one array; nothing inside `jit` knows packed rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from mer_r1_jax.omni.batch import (
    MEL_FRAMES_PER_UNIT,
    PADDING,
    PROMPT,
    AudioClips,
    Batch,
    BatchShape,
    FeatureLayout,
    Tokens,
    VisionClips,
)
from mer_r1_jax.omni.config import ThinkerConfig
from mer_r1_jax.omni.grids import feature_rows, patch_layout
from mer_r1_jax.omni.positions import MediaSizes, audio_token_count, feature_sources, rope_positions, vision_token_count


class InputError(ValueError):
    """Processor tensors that are missing, misshapen or do not belong together."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessorInputs:
    """The tensors of transformers' Qwen2_5OmniProcessor as numpy arrays, under its names.

    Attributes:
        input_ids, attention_mask: int [batch, length]; padding may be on either side.
        pixel_values, image_grid_thw: float [patches of all images, X] and int [images, 3].
        pixel_values_videos, video_grid_thw, video_second_per_grid: the same for videos, and float [videos].
        input_features, feature_attention_mask: float [audios, M, frames] and int [audios, frames].
        use_audio_in_video: whether every video is interleaved with its own audio.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray
    pixel_values: np.ndarray | None = None
    image_grid_thw: np.ndarray | None = None
    pixel_values_videos: np.ndarray | None = None
    video_grid_thw: np.ndarray | None = None
    video_second_per_grid: np.ndarray | None = None
    input_features: np.ndarray | None = None
    feature_attention_mask: np.ndarray | None = None
    use_audio_in_video: bool = False

    @classmethod
    def of(cls, arrays: Mapping[str, Any]) -> ProcessorInputs:
        """Reads them from a mapping, such as an opened .npz file; media that come in parts have to be complete.

        Raises:
            InputError: listing everything that is unknown, missing or misshapen.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        given = {name: np.asarray(arrays[name]) for name in arrays if arrays[name] is not None}
        problems = [f"{name}: not an input; expected {', '.join(names)}" for name in given if name not in names]
        for parts in _TOGETHER:
            missing = [name for name in parts if name not in given]
            if missing and (parts == _TOGETHER[0] or len(missing) < len(parts)):
                problems.append(f"{', '.join(missing)}: missing; {', '.join(parts)} belong together")
        for name, ndim in _NDIM.items():
            if name in given and given[name].ndim != ndim:
                problems.append(f"{name}: shape {given[name].shape}, expected {ndim} dimensions")
        problems += [
            f"{mask}: shape {given[mask].shape}, expected {given[of].shape[:1] + given[of].shape[-1:]} as {of} has"
            for mask, of in (("attention_mask", "input_ids"), ("feature_attention_mask", "input_features"))
            if not problems and mask in given and given[mask].shape != given[of].shape[:1] + given[of].shape[-1:]
        ]
        if problems:
            raise InputError("inputs do not fit:\n  " + "\n  ".join(problems))
        given["use_audio_in_video"] = bool(np.any(given.get("use_audio_in_video", False)))
        return cls(**given)


_TOGETHER = (
    ("input_ids", "attention_mask"),
    ("pixel_values", "image_grid_thw"),
    ("pixel_values_videos", "video_grid_thw", "video_second_per_grid"),
    ("input_features", "feature_attention_mask"),
)
_NDIM = {
    "input_ids": 2,
    "attention_mask": 2,
    "pixel_values": 2,
    "image_grid_thw": 2,
    "pixel_values_videos": 2,
    "video_grid_thw": 2,
    "video_second_per_grid": 1,
    "input_features": 3,
    "feature_attention_mask": 2,
}


@dataclasses.dataclass(frozen=True)
class _Clip:
    """One medium: where it goes and what it holds; `array` is [patches, X] or [frames, M]."""

    kind: str
    array: np.ndarray
    tokens: int
    grid: tuple[int, int, int] | None = None
    second_per_grid: float = 0.0


@dataclasses.dataclass(frozen=True)
class Packing:
    """Which feature rows make up transformers' packed features: kind -> (batch row, feature row) int [rows, 2]."""

    rows: dict[str, np.ndarray]

    def pack(self, features_BRD: np.ndarray) -> dict[str, np.ndarray]:
        """`audio_features`, `image_features`, `video_features` [rows, D], as far as present."""
        return {f"{kind}_features": features_BRD[at[:, 0], at[:, 1]] for kind, at in self.rows.items() if len(at)}


def to_batch(
    inputs: ProcessorInputs, config: ThinkerConfig, shape: BatchShape | None = None
) -> tuple[Batch, np.ndarray, Packing]:
    """Our batch for processor tensors.

    Args:
        inputs: the tensors.
        config: the model's.
        shape: sizes to pad to, so that many inputs share one compiled program; None for just large enough. Rows and
            columns that the inputs do not have are padding behind theirs.

    Returns:
        (batch; int32 position after the last token next_position_B; the way back to packed features).

    Raises:
        InputError, PositionError: the media do not match the placeholders, or the inputs do not fit the shape.
    """
    real_BT = np.asarray(inputs.attention_mask) == 1
    rows_ids = [inputs.input_ids[b][real_BT[b]] for b in range(len(real_BT))]
    clips = {"image": _images(inputs, config), "video": _videos(inputs, config), "audio": _audios(inputs, config)}
    token_ids = {"image": config.image_token_id, "video": config.video_token_id, "audio": config.audio_token_id}
    by_row = {
        kind: _deal(found, [int((ids == token_ids[kind]).sum()) for ids in rows_ids], kind)
        for kind, found in clips.items()
    }
    vision_rows = [images + videos for images, videos in zip(by_row["image"], by_row["video"], strict=True)]
    shape = _fit(_shape_of(inputs, vision_rows, by_row["audio"]), shape)

    B, T = shape.rows, shape.tokens
    b_in, t_in = inputs.input_ids.shape
    id_BT = np.full((B, T), config.pad_token_id, np.int32)
    id_BT[:b_in, :t_in] = inputs.input_ids
    segment_BT = np.full((B, T), PADDING, np.int32)
    segment_BT[:b_in, :t_in] = np.where(real_BT, PROMPT, PADDING)
    position_3BT = np.ones((3, B, T), np.int32)
    source_BT2 = np.tile(np.array([-1, 0], np.int32), (B, T, 1))
    next_position_B = np.zeros(B, np.int32)
    for b, ids in enumerate(rows_ids):
        images, videos, audios = (by_row[kind][b] for kind in ("image", "video", "audio"))
        at = np.flatnonzero(real_BT[b])
        position_3BT[:, b, at], next_position_B[b] = rope_positions(
            ids,
            config,
            MediaSizes(
                image_grids=[clip.grid for clip in images],
                video_grids=[clip.grid for clip in videos],
                second_per_grids=[clip.second_per_grid for clip in videos],
                audio_lengths=[len(clip.array) for clip in audios],
                use_audio_in_video=inputs.use_audio_in_video,
            ),
        )
        rows = [(number, feature_rows(clip.grid, shape.patches)) for number, clip in enumerate(images + videos)]
        source_BT2[b, at] = feature_sources(
            ids,
            config,
            images=rows[: len(images)],
            videos=rows[len(images) :],
            audios=[(shape.vision_clips + number, np.arange(clip.tokens)) for number, clip in enumerate(audios)],
        )
    tokens = Tokens(id_BT=id_BT, segment_BT=segment_BT, position_3BT=position_3BT, source_BT2=source_BT2)
    vision = _pad_vision(vision_rows, shape, config) if shape.vision_clips else None
    audio = _pad_audio(by_row["audio"], shape, config) if shape.audio_clips else None
    batch = Batch(tokens=tokens, vision=vision, audio=audio)
    return batch, next_position_B, _packing(tokens, FeatureLayout.of_shape(shape), token_ids)


def _shape_of(inputs: ProcessorInputs, vision_rows: list[list[_Clip]], audio_rows: list[list[_Clip]]) -> BatchShape:
    """The smallest shape that holds these clips."""
    rows, tokens = inputs.input_ids.shape
    grids = [clip.grid for row in vision_rows for clip in row]
    frames = [len(clip.array) for row in audio_rows for clip in row]
    return BatchShape(
        rows=rows,
        tokens=tokens,
        vision_clips=max(map(len, vision_rows)),
        frame_pairs=max((pairs for pairs, _, _ in grids), default=0),
        patches=max((height * width for _, height, width in grids), default=0),
        audio_clips=max(map(len, audio_rows)),
        audio_units=max((max(1, -(-count // MEL_FRAMES_PER_UNIT)) for count in frames), default=0),
    )


def _fit(needed: BatchShape, shape: BatchShape | None) -> BatchShape:
    if shape is None:
        return needed
    small = [
        f"{field.name} {getattr(needed, field.name)} > {getattr(shape, field.name)}"
        for field in dataclasses.fields(BatchShape)
        if getattr(needed, field.name) > getattr(shape, field.name)
    ]
    if small:
        raise InputError(f"the inputs do not fit the shape they should be padded to: {', '.join(small)}")
    return shape


def _images(inputs: ProcessorInputs, config: ThinkerConfig) -> list[_Clip]:
    if inputs.pixel_values is None:
        return []
    return _vision_clips(
        "image", inputs.pixel_values, inputs.image_grid_thw, np.zeros(len(inputs.image_grid_thw)), config
    )


def _videos(inputs: ProcessorInputs, config: ThinkerConfig) -> list[_Clip]:
    if inputs.pixel_values_videos is None:
        return []
    seconds = inputs.video_second_per_grid
    return _vision_clips("video", inputs.pixel_values_videos, inputs.video_grid_thw, seconds, config)


def _vision_clips(kind: str, pixels, grids, seconds, config: ThinkerConfig) -> list[_Clip]:
    sizes = np.prod(grids, axis=1).astype(int)
    if sizes.sum() != len(pixels) or pixels.shape[1] != config.vision.patch_values or len(seconds) != len(grids):
        raise InputError(
            f"{kind}s: {len(pixels)} patches of {pixels.shape[1]} values, {len(grids)} grids of {sizes.sum()} patches, "
            f"{len(seconds)} values of second_per_grid; expected equal counts and {config.vision.patch_values} values"
        )
    parts = np.split(np.asarray(pixels, np.float32), np.cumsum(sizes)[:-1])
    merge = config.vision.spatial_merge_size
    return [
        _Clip(kind, part, vision_token_count(grid, merge), tuple(int(size) for size in grid), float(second))
        for part, grid, second in zip(parts, grids, seconds, strict=True)
    ]


def _audios(inputs: ProcessorInputs, config: ThinkerConfig) -> list[_Clip]:
    if inputs.input_features is None:
        return []
    if inputs.input_features.shape[1] != config.audio.num_mel_bins:
        raise InputError(
            f"input_features: shape {inputs.input_features.shape}, expected {config.audio.num_mel_bins} mel bins"
        )
    mels = [mel.T[mask == 1] for mel, mask in zip(inputs.input_features, inputs.feature_attention_mask, strict=True)]
    return [_Clip("audio", np.asarray(mel, np.float32), audio_token_count(len(mel))) for mel in mels]


def _deal(clips: list[_Clip], tokens_B: list[int], kind: str) -> list[list[_Clip]]:
    """Gives each row the clips its placeholders stand for, in order."""
    rows, used = [], 0
    for b, tokens in enumerate(tokens_B):
        row: list[_Clip] = []
        while sum(clip.tokens for clip in row) < tokens and used < len(clips):
            row.append(clips[used])
            used += 1
        if sum(clip.tokens for clip in row) != tokens:
            raise InputError(
                f"row {b} has {tokens} {kind} placeholders, which no whole number of the {len(clips)} {kind} clips "
                f"fills (their token counts: {[clip.tokens for clip in clips]})"
            )
        rows.append(row)
    if used < len(clips):
        raise InputError(f"{len(clips)} {kind} clips, but the placeholders take only {used} of them")
    return rows


def _pad_vision(rows: list[list[_Clip]], shape: BatchShape, config: ThinkerConfig) -> VisionClips:
    B, V, P, S = shape.rows, shape.vision_clips, shape.frame_pairs, shape.patches
    patches = np.zeros((B, V, P, S, config.vision.patch_values), np.float32)
    position, window = np.zeros((B, V, S, 2), np.int32), np.full((B, V, S), -1, np.int32)
    pairs = np.zeros((B, V), np.int32)
    for b, row in enumerate(rows):
        for v, clip in enumerate(row):
            count, height, width = clip.grid
            size = height * width
            patches[b, v, :count, :size] = clip.array.reshape(count, size, -1)
            position[b, v, :size], window[b, v, :size] = patch_layout(height, width, config.vision)
            pairs[b, v] = count
    return VisionClips(patches_BVPSX=patches, position_BVS2=position, window_BVS=window, pairs_BV=pairs)


def _pad_audio(rows: list[list[_Clip]], shape: BatchShape, config: ThinkerConfig) -> AudioClips:
    B, A, U = shape.rows, shape.audio_clips, shape.audio_units
    mel = np.zeros((B, A, U * MEL_FRAMES_PER_UNIT, config.audio.num_mel_bins), np.float32)
    frames = np.zeros((B, A), np.int32)
    for b, row in enumerate(rows):
        for a, clip in enumerate(row):
            mel[b, a, : len(clip.array)] = clip.array
            frames[b, a] = len(clip.array)
    return AudioClips(mel_BAUFM=mel.reshape(B, A, U, MEL_FRAMES_PER_UNIT, -1), frames_BA=frames)


def _packing(tokens: Tokens, layout: FeatureLayout, token_ids: dict[str, int]) -> Packing:
    """Packed rows follow the placeholders in reading order, batch row after batch row, each kind for itself."""
    index_BT = np.asarray(layout.index(tokens.source_BT2))
    rows = {}
    for kind, token_id in token_ids.items():
        b, t = np.nonzero((tokens.id_BT == token_id) & (tokens.source_BT2[..., 0] >= 0))
        rows[kind] = np.stack([b, index_BT[b, t]], axis=1)
    return Packing(rows)
