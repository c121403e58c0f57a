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
