"""Tensors of transformers' processor become our padded batch, features become packed again, and a prompt its tensors.

Only here do rows of several clips lie behind one another in one array; nothing inside `jit` knows packed rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from mer_r1_jax.media.clips import IMAGE_SECONDS, AudioInput, VisionInput
from mer_r1_jax.media.collate import collate, largest_of, prompt_shape
from mer_r1_jax.media.prompt import Prompt
from mer_r1_jax.omni.batch import Batch, BatchShape, FeatureLayout, Tokens
from mer_r1_jax.omni.config import ThinkerConfig
from mer_r1_jax.omni.positions import MediaSizes, feature_sources, rope_positions

MEL_PADDING = 3000  # mel is padded to a multiple of Whisper's 30 seconds, as the processor pads it
Clip = TypeVar("Clip", bound=VisionInput | AudioInput)


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
        interleaved = bool(np.any(given.pop("use_audio_in_video", False)))
        return cls(**given, use_audio_in_video=interleaved)


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
class _CutVision(VisionInput):
    """An image or a video that comes as patches float32 [P, S, X]: its frames are not known."""

    given: np.ndarray

    @property
    def patches(self) -> np.ndarray:
        return self.given


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
    prompts = _prompts(inputs, config, [ids[real] for ids, real in zip(inputs.input_ids, real_BT, strict=True)])
    rows, length = real_BT.shape
    shape = _fit(largest_of([BatchShape(rows=rows, tokens=length), *map(prompt_shape, prompts)]), shape)

    padded = collate(prompts, shape, config)
    batch = dataclasses.replace(padded, tokens=_where_they_were(padded.tokens, real_BT))
    next_position_B = np.zeros(shape.rows, np.int32)
    next_position_B[:rows] = [prompt.next_position for prompt in prompts]
    return batch, next_position_B, _packing(batch, config)


def shape_of(inputs: ProcessorInputs, config: ThinkerConfig) -> BatchShape:
    """The smallest shape that holds the inputs.

    Raises:
        InputError, PositionError: the media do not match the placeholders.
    """
    real_BT = np.asarray(inputs.attention_mask) == 1
    prompts = _prompts(inputs, config, [ids[real] for ids, real in zip(inputs.input_ids, real_BT, strict=True)])
    rows, length = real_BT.shape
    return largest_of([BatchShape(rows=rows, tokens=length), *map(prompt_shape, prompts)])


def _prompts(inputs: ProcessorInputs, config: ThinkerConfig, ids_of_rows: list[np.ndarray]) -> list[Prompt]:
    """A prompt a row, without its padding, with the clips that its placeholders stand for."""

    def dealt(kind: str, clips: Sequence[Clip], token_id: int) -> list[list[Clip]]:
        return _deal(clips, [int((ids == token_id).sum()) for ids in ids_of_rows], kind)

    images_B = dealt("image", _images(inputs, config), config.image_token_id)
    videos_B = dealt("video", _videos(inputs, config), config.video_token_id)
    audios_B = dealt("audio", _audios(inputs, config), config.audio_token_id)
    prompts = []
    for row, (ids, images, videos, audios) in enumerate(zip(ids_of_rows, images_B, videos_B, audios_B, strict=True)):
        position, next_position = rope_positions(
            ids,
            config,
            MediaSizes(
                image_grids=[clip.grid for clip in images],
                video_grids=[clip.grid for clip in videos],
                second_per_grids=[float(clip.second_per_grid) for clip in videos],
                audio_lengths=[len(clip.mel) for clip in audios],
                use_audio_in_video=inputs.use_audio_in_video,
            ),
        )
        # Images are numbered before videos, wherever they stand: sources say which clip is meant.
        numbered = [(number, np.arange(clip.rows)) for number, clip in enumerate([*images, *videos, *audios])]
        vision = len(images) + len(videos)
        source = feature_sources(
            ids,
            config,
            images=numbered[: len(images)],
            videos=numbered[len(images) : vision],
            audios=numbered[vision:],
        )
        prompts.append(
            Prompt(
                id=f"row {row}",
                ids=ids,
                source=source,
                position=position,
                next_position=next_position,
                vision=(*images, *videos),
                audio=tuple(audios),
            )
        )
    return prompts


def _where_they_were(tokens: Tokens, real_BT: np.ndarray) -> Tokens:
    """The tokens in the columns they had in the inputs, where padding may be on the left."""
    real = np.zeros(tokens.id_BT.shape, bool)
    real[: real_BT.shape[0], : real_BT.shape[1]] = real_BT
    # Real columns in front, as they were padded; its inverse says which of those each column takes.
    front_BT = np.argsort(np.argsort(~real, axis=1, kind="stable"), axis=1)
    return Tokens(
        id_BT=np.take_along_axis(tokens.id_BT, front_BT, axis=1),
        segment_BT=np.take_along_axis(tokens.segment_BT, front_BT, axis=1),
        position_3BT=np.take_along_axis(tokens.position_3BT, front_BT[None], axis=2),
        source_BT2=np.take_along_axis(tokens.source_BT2, front_BT[..., None], axis=1),
    )


def _fit(needed: BatchShape, shape: BatchShape | None) -> BatchShape:
    """The shape asked for, or just what is needed."""
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


def _images(inputs: ProcessorInputs, config: ThinkerConfig) -> list[_CutVision]:
    if inputs.pixel_values is None or inputs.image_grid_thw is None:
        return []
    seconds = np.full(len(inputs.image_grid_thw), IMAGE_SECONDS)
    return _vision_clips("image", inputs.pixel_values, inputs.image_grid_thw, seconds, config)


def _videos(inputs: ProcessorInputs, config: ThinkerConfig) -> list[_CutVision]:
    pixels, grids, seconds = inputs.pixel_values_videos, inputs.video_grid_thw, inputs.video_second_per_grid
    if pixels is None or grids is None or seconds is None:
        return []
    return _vision_clips("video", pixels, grids, seconds, config)


def _vision_clips(
    kind: str, pixels: np.ndarray, grids: np.ndarray, seconds: np.ndarray, config: ThinkerConfig
) -> list[_CutVision]:
    vision = config.vision
    sizes = np.prod(grids, axis=1).astype(int)
    if sizes.sum() != len(pixels) or pixels.shape[1] != vision.patch_values or len(seconds) != len(grids):
        raise InputError(
            f"{kind}s: {len(pixels)} patches of {pixels.shape[1]} values, {len(grids)} grids of {sizes.sum()} patches, "
            f"{len(seconds)} values of second_per_grid; expected equal counts and {vision.patch_values} values"
        )
    parts = np.split(np.asarray(pixels, np.float32), np.cumsum(sizes)[:-1])
    return [
        _CutVision(
            frames=np.zeros((0, 0, 0, 3), np.uint8),
            grid=(int(pairs), int(height), int(width)),
            second_per_grid=np.float32(second),
            vision=vision,
            given=part.reshape(pairs, height * width, -1),
        )
        for part, (pairs, height, width), second in zip(parts, grids, seconds, strict=True)
    ]


def _audios(inputs: ProcessorInputs, config: ThinkerConfig) -> list[AudioInput]:
    features, mask = inputs.input_features, inputs.feature_attention_mask
    if features is None or mask is None:
        return []
    if features.shape[1] != config.audio.num_mel_bins:
        raise InputError(f"input_features: shape {features.shape}, expected {config.audio.num_mel_bins} mel bins")
    mels = [np.asarray(mel.T[real == 1], np.float32) for mel, real in zip(features, mask, strict=True)]
    return [AudioInput(mel, seconds=0.0) for mel in mels]  # nothing here asks how long it sounds


def _deal(clips: Sequence[Clip], tokens_B: list[int], kind: str) -> list[list[Clip]]:
    """Gives each row the clips its placeholders stand for, in order."""
    rows, used = [], 0
    for b, tokens in enumerate(tokens_B):
        row: list[Clip] = []
        while sum(clip.rows for clip in row) < tokens and used < len(clips):
            row.append(clips[used])
            used += 1
        if sum(clip.rows for clip in row) != tokens:
            raise InputError(
                f"row {b} has {tokens} {kind} placeholders, which no whole number of the {len(clips)} {kind} clips "
                f"fills (their token counts: {[clip.rows for clip in clips]})"
            )
        rows.append(row)
    if used < len(clips):
        raise InputError(f"{len(clips)} {kind} clips, but the placeholders take only {used} of them")
    return rows


def _packing(batch: Batch, config: ThinkerConfig) -> Packing:
    """Packed rows follow the placeholders in reading order, batch row after batch row, each kind for itself."""
    tokens = batch.tokens
    index_BT = np.asarray(FeatureLayout.of_batch(batch).index(tokens.source_BT2))
    token_ids = {"image": config.image_token_id, "video": config.video_token_id, "audio": config.audio_token_id}
    rows = {}
    for kind, token_id in token_ids.items():
        b, t = np.nonzero((tokens.id_BT == token_id) & (tokens.source_BT2[..., 0] >= 0))
        rows[kind] = np.stack([b, index_BT[b, t]], axis=1)
    return Packing(rows)


def processor_tensors(prompt: Prompt) -> dict[str, np.ndarray]:
    """The way back: a prompt as the tensors of transformers' Qwen2_5OmniProcessor, batch 1, under its names.

    Returns:
        `input_ids` and `attention_mask` [1, T]; as far as present, `pixel_values` and `image_grid_thw`,
        `pixel_values_videos`, `video_grid_thw` and `video_second_per_grid` (patches of all clips behind one another, in
        merge-block order), `input_features` [A, M, frames] and `feature_attention_mask` [A, frames].
    """
    ids = prompt.ids[None].astype(np.int64)
    tensors: dict[str, np.ndarray] = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    # An image has no time between frame pairs; a video always has.
    images = [clip for clip in prompt.vision if not clip.second_per_grid]
    videos = [clip for clip in prompt.vision if clip.second_per_grid]
    for clips, pixels, grid in (
        (images, "pixel_values", "image_grid_thw"),
        (videos, "pixel_values_videos", "video_grid_thw"),
    ):
        if clips:
            patches = [clip.patches for clip in clips]
            tensors[pixels] = np.concatenate([clip.reshape(-1, clip.shape[-1]) for clip in patches])
            tensors[grid] = np.asarray([clip.grid for clip in clips], np.int64)
    if videos:
        tensors["video_second_per_grid"] = np.asarray([clip.second_per_grid for clip in videos], np.float32)
    if prompt.audio:
        frames = -(-max(len(clip.mel) for clip in prompt.audio) // MEL_PADDING) * MEL_PADDING
        features_AMF = np.zeros((len(prompt.audio), prompt.audio[0].mel.shape[1], frames), np.float32)
        mask_AF = np.zeros((len(prompt.audio), frames), np.int64)
        for number, clip in enumerate(prompt.audio):
            features_AMF[number, :, : len(clip.mel)] = clip.mel.T
            mask_AF[number, : len(clip.mel)] = 1
        tensors |= {"input_features": features_AMF, "feature_attention_mask": mask_AF}
    return tensors
