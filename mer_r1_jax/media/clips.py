"""Decoded media of one record, and its frames as patches.

Patches come in the order of transformers' Qwen2-VL processors (see `omni.grids` for where each lies). Shape letters:
P frame pairs, S patches of a frame pair, X values of a patch; n frames, h and w in pixels.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from mer_r1_jax.config.schema import MediaConfig
from mer_r1_jax.omni.config import VisionConfig
from mer_r1_jax.omni.positions import audio_token_count

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the pixels CLIP was trained on, RGB
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
IMAGE_SECONDS = 0.0  # an image has no time


@dataclasses.dataclass(frozen=True)
class VisionInput:
    """An image or a video, resized and ready to be cut into patches.

    Attributes:
        frames: uint8[n, h, w, 3]; an image has one frame, a video a multiple of the temporal patch size.
        grid: frame pairs, patch rows, patch columns.
        second_per_grid: float32 seconds from one frame pair to the next.
        vision: patch sizes.
    """

    frames: np.ndarray
    grid: tuple[int, int, int]
    second_per_grid: np.float32
    vision: VisionConfig

    @property
    def patches(self) -> np.ndarray:
        """float32[P, S, X] normalised patches, in 2x2 merge blocks, each flattened as (channel, time, y, x)."""
        return cut_patches(self.frames, self.vision)

    @property
    def rows(self) -> int:
        """Feature rows the vision tower makes of it, one per 2x2 merge block."""
        pairs, height, width = self.grid
        return pairs * height * width // self.vision.spatial_merge_size**2


def interleaves(record, media: MediaConfig) -> bool:
    """Whether a record's videos bring their own sound, interleaved with the frames: as it says, or as `media` does."""
    return media.use_audio_in_video if record.use_audio_in_video is None else record.use_audio_in_video


def merge_factor(vision: VisionConfig) -> int:
    """Returns the pixels that height and width of a resized picture are multiples of."""
    return vision.patch_size * vision.spatial_merge_size


def laid_out(frames: np.ndarray, fps: float, vision: VisionConfig) -> VisionInput:
    """Returns frames of their final size as a VisionInput.

    Args:
        frames: uint8[n, h, w, 3], h and w multiples of the merge factor.
        fps: sampled frames per second, 0 for an image.
        vision: patch sizes.
    """
    count, height, width = frames.shape[:3]
    factor = merge_factor(vision)
    if height % factor or width % factor:
        raise ValueError(f"got frames of {width}x{height} pixels, expected multiples of {factor}; resize them first")
    pairs = -(-count // vision.temporal_patch_size)
    grid = (pairs, height // vision.patch_size, width // vision.patch_size)
    seconds = vision.temporal_patch_size / fps if fps else IMAGE_SECONDS
    return VisionInput(frames=frames, grid=grid, second_per_grid=np.float32(seconds), vision=vision)


def cut_patches(frames: np.ndarray, vision: VisionConfig) -> np.ndarray:
    """Normalises frames uint8[n, h, w, 3] and returns their patches, float32[P, S, X].

    A missing last frame of a pair is a copy of the frame before it.
    """
    time, patch, merge = vision.temporal_patch_size, vision.patch_size, vision.spatial_merge_size
    count, height, width, channels = frames.shape
    if short := -count % time:
        frames = np.concatenate([frames, np.repeat(frames[-1:], short, axis=0)])
    rows, columns = height // (patch * merge), width // (patch * merge)
    blocks = frames.reshape(-1, time, rows, merge, patch, columns, merge, patch, channels)
    #           pair, row, column, row in block, column in block, channel, time, y, x
    blocks = blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
    patches = np.empty(blocks.shape, np.float32)
    for channel in range(channels):
        np.take(_normalised()[channel], blocks[..., channel, :, :, :], out=patches[..., channel, :, :, :])
    return patches.reshape(len(blocks), rows * columns * merge * merge, channels * time * patch * patch)


@functools.cache
def _normalised() -> np.ndarray:
    """float32[3, 256]: what each uint8 value of each channel becomes; rescaling and normalising in one step."""
    values = np.arange(256, dtype=np.float32)
    mean = np.array(MEAN, np.float32)[:, None] * np.float32(255)
    deviation = np.array(DEVIATION, np.float32)[:, None] * np.float32(255)
    return (values - mean) / deviation


@dataclasses.dataclass(frozen=True)
class AudioInput:
    """An audio clip.

    Attributes:
        mel: float32[F, M] log-mel frames.
        seconds: of sound it was made from.
    """

    mel: np.ndarray
    seconds: float

    @property
    def rows(self) -> int:
        """Feature rows the audio tower makes of it, 25 a second."""
        return audio_token_count(len(self.mel))


@dataclasses.dataclass(frozen=True)
class Clips:
    """What was decoded for a record, in the order of its lists.

    Attributes:
        videos: one per video.
        video_audios: each video's own audio track where it is interleaved with the frames, else None.
        audios: one per audio file; None where it has no tokens of its own: a video's own track that is interleaved, or
            a missing one that is skipped.
        images: one per image.
        silent_audio: audio tracks that are missing and were replaced by silence or skipped.
        audio_cut: audio tracks that were longer than `media.max_audio_seconds`.
        audio_filled: seconds of silence put in where tracks start late or have gaps.
        mute_audio: audio tracks that are there but hold nothing except silence.
        cancelled_audio: audio tracks whose channels cancel each other out when they are averaged.
    """

    videos: tuple[VisionInput, ...] = ()
    video_audios: tuple[AudioInput | None, ...] = ()
    audios: tuple[AudioInput | None, ...] = ()
    images: tuple[VisionInput, ...] = ()
    silent_audio: int = 0
    audio_cut: int = 0
    audio_filled: float = 0.0
    mute_audio: int = 0
    cancelled_audio: int = 0


def sound_remarks(clips: Clips) -> list[tuple[str, str, str]]:
    """Returns (got, expected, how to mend it) for what is odd about a record's sound, yet can be used."""
    remarks = []
    if clips.audio_filled:
        got = f"sound that starts late or has gaps; {clips.audio_filled:.2f} s of silence keep it beside the frames"
        remarks.append((got, "sound throughout", "record the clip again if something was said there"))
    if clips.mute_audio:
        got = f"{clips.mute_audio} sound track(s) of nothing but silence"
        remarks.append((got, "a voice", "take the track that holds it, or list no audio for this clip"))
    if clips.cancelled_audio:
        got = f"{clips.cancelled_audio} sound track(s) whose channels cancel each other out when averaged"
        mend = "keep one channel of it, or turn one upside down; the model hears next to nothing of it now"
        remarks.append((got, "channels that agree", mend))
    return remarks
