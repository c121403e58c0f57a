"""Real media files for tests, made with PyAV: H.264 pictures that move and an AAC tone."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def make_clip(
    path: str | Path,
    seconds: float = 1.0,
    fps: int = 8,
    size: tuple[int, int] = (64, 64),
    *,
    with_video: bool = True,
    with_audio: bool = True,
    video_codec: str = "libx264",
    audio_codec: str = "aac",
    sampling_rate: int = 16_000,
    frequency: float = 440.0,
    loudness: float = 0.3,
    seed: int = 0,
) -> Path:
    """Writes an mp4 file (any container PyAV knows by its ending) and returns its path.

    Args:
        path: the file to write.
        seconds: length of both tracks.
        fps: frames a second.
        size: (height, width) in pixels, both even.
        with_video, with_audio: which tracks the file has.
        video_codec, audio_codec: how they are coded, by FFmpeg's names.
        sampling_rate: Hz of the sound.
        frequency: Hz of the tone.
        loudness: amplitude of the tone, 0 for silence.
        seed: colours of the moving square.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        video = audio = None
        if with_video:
            options = {"crf": "28", "preset": "ultrafast"} if video_codec == "libx264" else {}
            video = container.add_stream(video_codec, rate=fps, options=options)
            video.height, video.width = size
            video.pix_fmt = "yuv420p"
        if with_audio:
            audio = container.add_stream(audio_codec, rate=sampling_rate)
            audio.layout = "mono"
        if video is not None:
            for picture in moving_square(round(seconds * fps), size, seed):
                container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(video.encode(None))
        if audio is not None:
            time = np.arange(round(seconds * sampling_rate)) / sampling_rate
            samples = (loudness * np.sin(2 * np.pi * frequency * time)).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = sampling_rate, 0, Fraction(1, sampling_rate)
            container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
    return path


def moving_square(frames: int, size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """uint8[frames, height, width, 3]: a square of one colour that crosses a background of another."""
    height, width = size
    background, colour = np.random.default_rng(seed).integers(0, 256, (2, 3), dtype=np.uint8)
    pictures = np.tile(background, (frames, height, width, 1))
    side = max(2, min(height, width) // 3)
    for number, picture in enumerate(pictures):
        left = round((width - side) * number / max(1, frames - 1))
        top = (height - side) // 2
        picture[top : top + side, left : left + side] = colour
    return pictures
