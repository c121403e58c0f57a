"""Decoded media of one record."""

from __future__ import annotations

import dataclasses

import numpy as np

from mer_r1_jax.media.vision import VisionInput
from mer_r1_jax.omni.positions import audio_token_count


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
    """

    videos: tuple[VisionInput, ...] = ()
    video_audios: tuple[AudioInput | None, ...] = ()
    audios: tuple[AudioInput | None, ...] = ()
    images: tuple[VisionInput, ...] = ()
    silent_audio: int = 0
    audio_cut: int = 0
